"""What a graph of a training step takes for constant, though Python may change it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pyro
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae.compiler.captured import MISSING, Captured, Place, Unchanged, is_library, is_plain
from pyro_vae.programs.guide_kinds import buffers_of_runs
from pyro_vae.programs.pyro_internals import STORE_PARAMETERS, store_parameters
from pyro_vae.torch_internals import buffers_of, parameters_of, structure_of

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
        self, roots: Iterable[object], modules: Iterable[nn.Module], names: list[str], modes: bool
    ) -> None:
        self._captured = Captured([*roots, *modules])
        of_steps = self._captured.modules.values()
        self.modules = {id(part): part for module in of_steps for part in module.modules()}
        # Mappings of parameters and buffers; of children and hooks.
        self._held: list[Mapping[Any, object]] = []
        self._structure: list[Mapping[Any, object]] = []
        for module in self.modules.values():
            self._add_attributes(module, modes)
            self._held += [parameters_of(module), buffers_of(module)]
            self._structure += structure_of(module)
        self._captured.follow()
        self._names = names
        self.expect()

    def _add_attributes(self, module: nn.Module, modes: bool) -> None:
        """Watch the attributes of a module, beside those that every module has."""
        kind = type(module)
        always = _OF_ALL_MODULES - {"training"} if modes else _OF_ALL_MODULES
        is_own = not is_library(kind.__module__)
        for name, value in list(vars(module).items()):
            if name not in always and name != "given_rows":  # the rows of a table are an input
                # Of a library's module, into what users gave it.
                followed = is_own or callable(value) or _is_plain_list(value)
                self._captured.add(vars(module), name, f"{kind.__name__}.{name}", followed=followed)

    def expect(self) -> None:
        """Expect the present state from now on."""
        captured = self._captured
        self._values, self._contents = captured.values(), captured.contents()
        self._places, self._digests = captured.places(), captured.digests()
        of_store = [Place(store_parameters(), name) for name in self._names]
        held = [*_items(self._held), *of_store]
        # Another store after it was cleared.
        held.append(Place(pyro.get_param_store(), STORE_PARAMETERS, is_item=False))
        tensors = {id(t): t for place in held if isinstance(t := place.content, Tensor)}
        kinds = itertools.product(tensors.values(), ("requires_grad", "dtype"))
        held += [Place(tensor, name, is_item=False) for tensor, name in kinds]
        self._have_tensors = Unchanged(self._held, held)
        self._have_parts = Unchanged(self._structure, _items(self._structure))

    def holds(self) -> bool:
        """Return whether all is as expected."""
        # By identity first: this runs at each step.
        captured, parts, tensors = self._captured, self._have_parts, self._have_tensors
        if not captured.has(self._values):
            now = captured.values()
            if not all(map(_same, now, self._values)):
                return False
            self._values = now
        contents = captured.contents()
        if len(contents) != len(self._contents) or not all(map(_same, contents, self._contents)):
            return False
        return parts.holds() and tensors.holds() and captured.digests() == self._digests

    def holds_tensors(self) -> bool:
        """Return whether the parameters and buffers are the expected ones."""
        return self._have_tensors.holds()

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
        """Yield the buffers of all modules that a step may write to."""
        for module in self.modules.values():
            yield from buffers_of_runs(module)


def _same(one: object, other: object) -> bool:
    """Return whether two values are one object, or equal plain values."""
    return one is other or (is_plain(one) and type(one) is type(other) and bool(one == other))


def _is_plain_or_missing(value: object) -> bool:
    """Return whether a value is plain, or not there."""
    return value is MISSING or is_plain(value)


def _is_plain_list(value: object) -> bool:
    """Return whether a list or mapping holds nothing but plain values and such lists."""
    items = list(value.values()) if isinstance(value, Mapping) else value
    return isinstance(items, (list, tuple)) and all(
        is_plain(item) or _is_plain_list(item) for item in items[:_LONG]
    )


def _items(mappings: Iterable[Mapping[Any, object]]) -> list[Place]:
    """Return the places of all items of some mappings."""
    return [Place(mapping, key) for mapping in mappings for key in tuple(mapping.keys())]
