"""The code of docs/howto.md calls what there is, by arguments that there are."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import pyro_vae as pv

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "howto.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def called(node):
    """Return the dotted name of what is called, after pv; None for anything else."""
    names = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return names if isinstance(node, ast.Name) and node.id == "pv" and names else None


def check(code):
    """Raise an error for what is no Python, no name of the package, or no argument."""
    for node in ast.walk(ast.parse(code)):
        names = called(node.func) if isinstance(node, ast.Call) else None
        if names is None:
            continue
        function = pv
        for name in names:
            function = getattr(function, name)
        known = inspect.signature(function).parameters
        if any(p.kind is p.VAR_KEYWORD for p in known.values()):
            continue
        unknown = {k.arg for k in node.keywords if k.arg} - set(known)
        assert not unknown, f"pv.{'.'.join(names)} has no argument {unknown}"


def test_calls_are_of_what_there_is():
    assert len(BLOCKS) > 30
    for block in BLOCKS:
        check(block)


@pytest.mark.parametrize("wrong", ["pv.fitt(1)", "pv.fit(m, g, x, epoch=1)", "pv.fit("])
def test_what_there_is_not_is_found(wrong):
    with pytest.raises((AttributeError, AssertionError, SyntaxError)):
        check(wrong)
