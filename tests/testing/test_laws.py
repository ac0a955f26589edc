"""Laws by name: what is broken is told, what was expected is not, and the user's state stays."""

from __future__ import annotations

import subprocess
import sys

import pyro
import pytest
import torch

from pyro_vae.testing.laws import LawError, check, close, require


def broken():
    raise LawError("found this")


def raises():
    raise KeyError("gone")


LAWS = {"holds": lambda: None, "is broken": broken, "raises": raises}


def test_broken_laws_are_told_by_name():
    with pytest.raises(LawError) as told:
        check("my class", LAWS)
    assert str(told.value).splitlines() == [
        "2 of 3 laws do not hold for 'my class':",
        "- is broken: found this",
        "- raises: raised KeyError: 'gone'",
    ]


def test_expected_failures():
    found = check("it", LAWS, {"is broken": "it is so", "raises": "it is so"})
    assert found.kept == ("holds",)
    assert found.expected == {"is broken": "found this", "raises": "raised KeyError: 'gone'"}
    assert "1 laws hold: holds" in repr(found) and "as expected: raises" in repr(found)
    with pytest.raises(LawError, match=r"- holds: holds, though it was expected not to \(why\)"):
        check("it", {"holds": LAWS["holds"]}, {"holds": "why"})
    with pytest.raises(ValueError, match=r"no law is named \['nonsense'\]"):
        check("it", LAWS, {"nonsense": "why"})


def test_the_users_state_stays():
    pyro.clear_param_store()
    pyro.param("mine", torch.tensor(1.0))
    before = torch.get_rng_state()
    drawn = []

    def law():
        drawn.append(float(torch.randn(())))
        pyro.clear_param_store()

    check("it", {"one": law, "two": law})
    assert drawn[0] == drawn[1]
    assert torch.equal(torch.get_rng_state(), before)
    assert list(pyro.get_param_store()) == ["mine"]
    pyro.clear_param_store()


def test_what_is_required():
    require(True, "")
    with pytest.raises(LawError, match="so"):
        require(torch.tensor(False), "so")
    close(torch.ones(2), torch.ones(2), "it")
    with pytest.raises(LawError, match=r"it: Tensor-likes are not close"):
        close(torch.ones(2), torch.zeros(2), "it")


def test_pytest_is_not_needed():
    code = "import sys; sys.modules['pytest'] = None; import pyro_vae; pyro_vae.testing.check_loss"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
