"""What a graph of a training step takes for constant, though Python may change it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pyro
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae.compiler.captured import MISSING, Captured, is_library, is_plain
from pyro_vae.compiler.identity_checks import identity_check
from pyro_vae.programs.pyro_internals import STORE_PARAMETERS, store_parameters
from pyro_vae.torch_internals import buffers_of, children_of, hooks_of, parameters_of

_OF_ALL_MODULES = frozenset(vars(PyroModule("")))
_LONG = 20  # items of a list that are looked at


class Watched:
    """Modes, attributes, captured values, hooks, and the identities of what holds tensors.

    Args:
        roots: functions and objects that a step runs, or that say what it does.
        modules: that a step calls.
        names: of the parameters of Pyro's store that it reads.
        modes: whether train() and eval() of modules make a difference.
    """

    def __init__(
        self,
        roots: Iterable[object],
        modules: Iterable[nn.Module],
        names: list[str],
        *,
        modes: bool,
    ) -> None:
        self._captured = Captured([*roots, *modules])
        self.modules = {
            id(part): part
            for module in self._captured.modules.values()
            for part in module.modules()
        }
        for module in self.modules.values():
            self._add_attributes(module, modes)
        self._structure: list[Mapping[Any, object]] = []  # mappings of children, and of hooks
        self._held: list[tuple[Any, str]] = []  # parameters and buffers that a step reads
        self._lengths_of: list[Mapping[Any, object]] = []  # mappings of them
        for part in self.modules.values():
            self._structure += [children_of(part), *hooks_of(part)]
            for holder in (parameters_of(part), buffers_of(part)):
                self._held += [(holder, name) for name in tuple(holder.keys())]
                self._lengths_of.append(holder)
        self._held += [(store_parameters(), name) for name in names]
        self._store = (pyro.get_param_store(), STORE_PARAMETERS)  # another one after it was cleared
        self.expect()

    def _add_attributes(self, module: nn.Module, modes: bool) -> None:
        """Watch the attributes of a module, beside those that every module has."""
        kind = type(module)
        for name, value in list(vars(module).items()):
            # The rows of a table are an input.
            if (
                name in _OF_ALL_MODULES and not (name == "training" and modes)
            ) or name == "given_rows":
                continue
            self._captured.add(
                vars(module), name, f"{kind.__name__}.{name}", followed=_is_followed(kind, value)
            )
        self._captured.follow((), "")

    @functools.cached_property
    def _has_values(self) -> Callable[[list[object]], bool]:
        return self._captured.identity_check()

    def expect(self) -> None:
        """Expect the present state from now on."""
        captured = self._captured
        self._values, self._contents = captured.values(), captured.contents()
        self._places, self._digests = captured.places(), captured.digests()
        tensors = [*itertools.starmap(_entry, self._held), store_parameters()]
        unique = {id(t): t for t in tensors if isinstance(t, Tensor)}
        kinds = [(t, name) for t in unique.values() for name in ("requires_grad", "dtype")]
        self._has_tensors = identity_check(self._held, slots=[self._store, *kinds])
        self._tensors = [*tensors, *itertools.starmap(getattr, kinds)]
        parts = [(holder, key) for holder in self._structure for key in tuple(holder.keys())]
        self._has_parts = identity_check(parts)
        self._parts = [holder[key] for holder, key in parts]
        self._sizes, self._sizes_of_parts = _Sizes(self._lengths_of), _Sizes(self._structure)

    def holds(self) -> bool:
        """Return whether all is as expected."""
        # By identity first: this runs at each step.
        if not self._has_values(self._values):
            now = self._captured.values()
            if not all(map(_same, now, self._values)):
                return False
            self._values = now
        contents = self._captured.contents()
        if len(contents) != len(self._contents) or not all(map(_same, contents, self._contents)):
            return False
        return (
            self._sizes_of_parts.hold()
            and self._has_parts(self._parts)
            and self.holds_tensors()
            and self._captured.digests() == self._digests
        )

    def holds_tensors(self) -> bool:
        """Return whether the parameters and buffers are the expected ones."""
        return self._sizes.hold() and self._has_tensors(self._tensors)

    def changed(self, *, plain: bool = False) -> str | None:
        """Return where a value lies that is another than expected; None if there is none.

        Args:
            plain: whether to look for numbers and texts alone.
        """
        for index, pairs in self._differing():
            if any(not plain or all(map(_is_plain_or_missing, pair)) for pair in pairs):
                return self._places[index][0]
        return None

    def settle(self) -> None:
        """Expect the state after a run, and watch no more what the run itself wrote.

        A module that keeps its last draw would make this graph a stale one with every run for
        other arguments.
        """
        if written := {index for index, _ in self._differing()}:
            self._captured.forget(written)
            vars(self).pop("_has_values", None)
        self.expect()

    def _differing(self) -> Iterator[tuple[int, list[tuple[object, object]]]]:
        """Yield the places whose values are not the expected ones, with both, item by item."""
        both = zip(self._places, self._captured.places(), strict=True)
        for index, ((_, old), (_, new)) in enumerate(both):
            pairs = itertools.zip_longest(old, new, fillvalue=MISSING)
            if differing := [pair for pair in pairs if not _same(*pair)]:
                yield index, differing

    def snapshot(self) -> Callable[[], None]:
        """Return a function that puts all values back where they lie now, tensors aside."""
        return self._captured.snapshot()

    def buffers(self) -> Iterator[Tensor]:
        """Yield the buffers of all modules."""
        for module in self.modules.values():
            yield from (b for b in buffers_of(module).values() if b is not None)


def _same(one: object, other: object) -> bool:
    """Return whether two values are one object, or equal plain values."""
    return one is other or (is_plain(one) and type(one) is type(other) and bool(one == other))


def _entry(holder: Mapping[str, object], name: str) -> object:
    """Return what a mapping holds under a name; None where there is no such entry."""
    try:
        return holder[name]
    except (KeyError, AttributeError):  # as TorchScript's mappings say it
        return None


def _is_plain_or_missing(value: object) -> bool:
    """Return whether a value is plain, or not there."""
    return value is MISSING or is_plain(value)


def _is_followed(kind: type, value: object) -> bool:
    """Return whether to look into an attribute: of a library's module, into what users gave it."""
    return not is_library(kind.__module__) or callable(value) or _is_plain_list(value)


def _is_plain_list(value: object) -> bool:
    """Return whether a list or mapping holds nothing but plain values and such lists."""
    items = list(value.values()) if isinstance(value, Mapping) else value
    return isinstance(items, (list, tuple)) and all(
        is_plain(item) or _is_plain_list(item) for item in items[:_LONG]
    )


class _Sizes:
    """The sizes of many mappings, most of which are empty."""

    def __init__(self, holders: list[Mapping[Any, object]]) -> None:
        self._full = [d for d in holders if len(d)]
        self._empty = [d for d in holders if not len(d)]
        self._expected = list(map(len, self._full))

    def hold(self) -> bool:
        """Return whether they are as they were."""
        return not any(self._empty) and list(map(len, self._full)) == self._expected
