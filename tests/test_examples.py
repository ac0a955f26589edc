"""The scripts of examples/ run, on their own, without a warning, and say what they should."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MAX_LINES = 80


def run(name: str) -> str:
    """Return what an example prints; warnings are errors there too."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / name)],
        capture_output=True,
        text=True,
        # Networks this small gain nothing from threads, and lose where others use the cores.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def number(label: str, text: str) -> float:
    found = re.search(rf"^{re.escape(label)}\s+(-?[0-9.]+)", text, re.MULTILINE)
    assert found, f"no line {label!r} in:\n{text}"
    return float(found[1])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_fits_on_two_screens(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < MAX_LINES


def test_every_example_is_run():
    source = Path(__file__).read_text(encoding="utf-8")
    assert EXAMPLES
    for path in EXAMPLES:
        assert f'run("{path.name}")' in source, f"no test runs {path.name}"


@pytest.mark.slow
def test_exact_check():
    printed = run("exact_check.py")
    exact = number("exact log p(x)", printed)
    assert number("ELBO + both gaps", printed) == pytest.approx(exact, abs=0.015)
    kl = number("exact KL of the best mean field", printed)
    assert number("approximation gap", printed) == pytest.approx(kl, abs=0.02)


@pytest.mark.slow
def test_custom_model():
    printed = run("custom_model.py")
    assert "data plate: 'trials'" in printed
    rows = dict(re.findall(r"^(encoder|mean-field) +\| +(-[0-9.]+) ±", printed, re.MULTILINE))
    assert float(rows["encoder"]) < float(rows["mean-field"])
    assert "'draw': 200" in printed


@pytest.mark.slow
def test_handwritten_pair():
    printed = run("handwritten_pair.py")
    assert "{'z': 'analytic: closed form between Normal and Normal'}" in printed
    rows = dict(re.findall(r"^(by hand|Normal per datum) +\| +(-[0-9.]+) ±", printed, re.MULTILINE))
    assert float(rows["by hand"]) < float(rows["Normal per datum"])
