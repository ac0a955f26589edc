"""Whether many places still hold the objects that they held: in as little time as Python allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import CellType
from typing import Any

_MAX_JOINED = 50  # tests that one "and" joins, because Python nests them


def identity_check(
    entries: Sequence[tuple[object, object]],
    cells: Sequence[CellType] = (),
    slots: Sequence[tuple[object, str]] = (),
) -> Callable[[list[object]], bool]:
    """Return a function of the objects expected: whether each lies in its place.

    It is called at each step of training. One line of code for each place takes a third of the
    time of a loop, and makes no list.

    Args:
        entries: mappings, each with a key (a text or an object) that may be missing.
        cells: of closures.
        slots: objects, each with the name of an attribute that it has.

    Returns:
        A function of one list, in the order entries, cells, slots. What is not there is taken for
        another object than the expected one.
    """
    bound = _Bound()
    reads = [f"{bound.name(h)}[{bound.text(key)}]" for h, key in entries]
    reads += [f"{bound.name(cell)}.cell_contents" for cell in cells]
    reads += [f"{bound.name(holder)}.{name}" for holder, name in slots]
    tests = [f"{read} is v[{i}]" for i, read in enumerate(reads)]
    pieces = [tests[i : i + _MAX_JOINED] for i in range(0, len(tests), _MAX_JOINED)]
    lines = [f"    if not ({' and '.join(piece)}): return False\n" for piece in pieces]
    signature = ", ".join(["v", *(f"{name}={name}" for name in bound.values)])
    source = f"def check({signature}):\n{''.join(lines)}    return True\n"
    exec(compile(source, "<pyro_vae check>", "exec"), bound.values)
    check: Callable[[list[object]], bool] = bound.values["check"]

    def holds(expected: list[object]) -> bool:
        try:
            return check(expected)
        except (KeyError, ValueError, AttributeError):  # no entry, an empty cell, no attribute
            return False

    return holds


class _Bound:
    """Objects under the names by which the source of a function refers to them."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._names: dict[int, str] = {}

    def name(self, value: object) -> str:
        """Return the name of an object."""
        name = self._names.setdefault(id(value), f"b{len(self._names)}")
        self.values[name] = value
        return name

    def text(self, key: object) -> str:
        """Return a key as it stands in the source."""
        return repr(key) if isinstance(key, str) else self.name(key)
