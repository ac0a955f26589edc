"""Places where Python keeps objects, and whether many still hold theirs: as fast as Python can."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

MISSING = object()  # stands for what is not there
_MAX_JOINED = 50  # tests that one "and" joins, because Python nests them


class Place(NamedTuple):
    """An item of a mapping or an attribute of an object; a closure's cell has one attribute.

    Attributes:
        holder: the mapping or the object.
        key: of the item (a text or an object), or the name of the attribute.
        is_item: which of the two it is.
        label: what it is in words.
    """

    holder: Any
    key: Any
    is_item: bool = True
    label: str = ""

    @property
    def content(self) -> object:
        """What lies there now; MISSING where nothing does."""
        try:
            return self.holder[self.key] if self.is_item else getattr(self.holder, self.key)
        except (KeyError, ValueError, AttributeError):  # no item, an empty cell, no attribute
            return MISSING

    def put(self, value: object) -> None:
        """Put an object there; of an item, MISSING takes it away."""
        if not self.is_item:
            setattr(self.holder, self.key, value)
        elif value is MISSING:
            self.holder.pop(self.key, None)
        else:
            self.holder[self.key] = value


def identity_check(places: Iterable[Place]) -> Callable[[list[object]], bool]:
    """Return a function of the objects expected, in order: whether each lies in its place.

    It is called at each step of training. One line of code for each place takes a third of the
    time of a loop, and makes no list. Nothing counts as another object than the expected one.
    """
    bound: dict[str, Any] = {}

    def name(value: object) -> str:
        bound[text := f"b{id(value)}"] = value
        return text

    tests = []
    for i, (holder, key, is_item, _) in enumerate(places):
        index = f"[{repr(key) if isinstance(key, str) else name(key)}]" if is_item else f".{key}"
        tests.append(f"{name(holder)}{index} is v[{i}]")
    pieces = [tests[i : i + _MAX_JOINED] for i in range(0, len(tests), _MAX_JOINED)]
    lines = [f"    if not ({' and '.join(piece)}): return False\n" for piece in pieces]
    signature = ", ".join(["v", *(f"{name}={name}" for name in bound)])
    source = f"def check({signature}):\n{''.join(lines)}    return True\n"
    exec(compile(source, "<pyro_vae check>", "exec"), bound)
    check: Callable[[list[object]], bool] = bound["check"]

    def holds(expected: list[object]) -> bool:
        try:
            return check(expected)
        except (KeyError, ValueError, AttributeError):
            return False

    return holds
