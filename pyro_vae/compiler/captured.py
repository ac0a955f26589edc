"""The Python values that a function's code reads beside its arguments, and where they lie."""

from __future__ import annotations

import copy
import dis
import functools
import importlib.util
import itertools
import sys
import types
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae.compiler.identity_checks import identity_check

MISSING = object()  # stands for what is not there

_PLAIN = (bool, int, float, complex, str, bytes)
# Their code is not looked into: it reads nothing that a user changes between two steps.
_LIBRARIES = {"torch", "pyro", "pyro_vae", "numpy", "scipy", "pandas", "opt_einsum", "tqdm"}
# Of their objects, these alone have attributes that say what a step does.
_SETTINGS: tuple[str, ...] = (
    "torch.distributions",
    "pyro.distributions",
    "pyro.poutine",
    "pyro.infer",
    "pyro_vae.",
)
_SETTINGS += ("types", "argparse", "collections", "functools")
# By these names, code gets at attributes, or globals, that it does not name.
_BY_ANY_NAME = {"getattr", "vars", "asdict", "astuple", "attrgetter", "__dict__"}
_ANY_GLOBAL = {"globals", "eval", "exec"}
_LONG = 256  # items of a container that are watched
_MANY = 10_000  # values that are looked at


def is_plain(value: object) -> bool:
    """Whether a value is a number or a text: what Python decides by, and a graph takes in."""
    return value is None or isinstance(value, _PLAIN)


def is_library(name: object) -> bool:
    """Whether a module, by its name, is of those whose code is not looked into."""
    top = str(name).partition(".")[0]
    return top in _LIBRARIES or (top in sys.stdlib_module_names and top != "__main__")


@dataclass(frozen=True)
class _Reads:
    """The names that a code object reads, those of functions inside it too."""

    globals: frozenset[str]
    attributes: frozenset[str]
    imports: frozenset[tuple[str, int]]  # names of modules, with their levels


@functools.lru_cache(maxsize=1024)
def _reads(code: types.CodeType) -> _Reads:
    """Return the names that a code object reads, those of functions inside it too."""
    names, attributes, imports = set[str](), set[str](), set[tuple[str, int]]()
    level: Any = 0
    before: list[Any] = []
    for instruction in dis.get_instructions(code):
        what = instruction.opname
        if what in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.add(instruction.argval)
        elif what in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM"):
            attributes.add(instruction.argval)
        elif what == "IMPORT_NAME":
            level = before[-2].argval if len(before) > 1 else 0  # of "from .. import"
            imports.add((instruction.argval, level if isinstance(level, int) else 0))
        before.append(instruction)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = _reads(constant)
            names |= inner.globals
            attributes |= inner.attributes
            imports |= inner.imports
    return _Reads(frozenset(names), frozenset(attributes), frozenset(imports))


class _Head:
    """The first items of a long container, and how many there are."""

    def __init__(self, items: Collection[object]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[object]:
        yield len(self.items)
        yield from itertools.islice(self.items, _LONG)


class Captured:
    """Places of the values that functions read: closures, globals, defaults, attributes.

    From a function's code follow the names that it reads, from these the values: numbers, which
    are watched where they lie; functions, whose code is read likewise; containers; and objects, of
    which those attributes are watched that some code names (all of them where code gets at some
    without naming it, as by getattr, and those of a library's objects).

    Args:
        roots: functions, methods, modules or other objects to start from; of objects, all methods
            and attributes count.

    Attributes:
        modules: nn.Modules that were met, by identity.
    """

    def __init__(self, roots: Iterable[object]) -> None:
        self.modules: dict[int, nn.Module] = {}
        self._entries: list[tuple[Any, str]] = []  # of mappings: a global, an attribute
        self._entry_labels: list[str] = []
        self._cells: list[types.CellType] = []
        self._cell_labels: list[str] = []
        self._slots: list[tuple[Any, str]] = []  # of objects without a mapping of attributes
        self._slot_labels: list[str] = []
        self._contents: list[Iterable[Any]] = []  # views of containers
        self._content_labels: list[str] = []
        self._containers: list[Any] = []
        self._arrays: list[np.ndarray[Any, Any]] = []
        self._watched = set[Any]()
        self._proxies: dict[type, Mapping[str, Any]] = {}  # of the attributes of classes
        self._met: dict[int, Any] = {}  # by identity, which nothing else has while it is kept
        self._names = set[str]()  # of attributes that code reads
        self._holders: list[tuple[Any, set[str]]] = []  # of attributes, and names looked up
        starts = list(roots)
        # Of a module, the methods that a step calls are found from forward().
        self._roots = {id(root) for root in starts if not isinstance(root, nn.Module)}
        self._queue: deque[tuple[Any, str]] = deque((root, "") for root in starts)
        self._follow()

    # --- what is read at each step

    def values(self) -> list[object]:
        """Return what lies in all places now, containers aside, in the same order at each call."""
        found: list[object] = [holder.get(name, MISSING) for holder, name in self._entries]
        found += map(_content_of, self._cells)
        found += [getattr(holder, name, MISSING) for holder, name in self._slots]
        return found

    def contents(self) -> list[object]:
        """Return what containers hold now, one after the other."""
        return list(itertools.chain.from_iterable(self._contents))

    def identity_check(self) -> Callable[[list[object]], bool]:
        """Return a fast function of former :meth:`values`: whether all are there still."""
        return identity_check(self._entries, self._cells, self._slots)

    def digests(self) -> list[bytes]:
        """Return the numbers of arrays, which code may write to where they are."""
        return [array.tobytes() for array in self._arrays]

    def places(self) -> list[tuple[str, list[object]]]:
        """Return all places, each in words and with what lies there."""
        labels = [*self._entry_labels, *self._cell_labels, *self._slot_labels]
        single: list[tuple[str, list[object]]] = [
            (label, [value]) for label, value in zip(labels, self.values(), strict=True)
        ]
        contents = map(list, self._contents)
        return single + list(zip(self._content_labels, contents, strict=True))

    def forget(self, indices: set[int]) -> None:
        """Watch some of the :meth:`places` no more."""
        number = itertools.count()
        lists: list[tuple[list[Any], list[str]]] = [
            (self._entries, self._entry_labels),
            (self._cells, self._cell_labels),
            (self._slots, self._slot_labels),
            (self._contents, self._content_labels),
        ]
        for values, labels in lists:
            kept = [i for i in range(len(values)) if next(number) not in indices]
            values[:], labels[:] = [values[i] for i in kept], [labels[i] for i in kept]

    def snapshot(self) -> Callable[[], None]:
        """Return a function that puts all values back where they lie now."""
        entries = [
            (holder, name, holder.get(name, MISSING))
            for holder, name in self._entries
            if isinstance(holder, dict)
        ]
        cells = [(cell, _content_of(cell)) for cell in self._cells]
        containers = [(container, copy.copy(container)) for container in self._containers]

        def restore() -> None:
            for entry in entries:
                _put_back_entry(*entry)
            for cell, value in cells:
                if value is not MISSING and _content_of(cell) is not value:
                    cell.cell_contents = value
            for container, before in containers:
                _put_back(container, before)

        return restore

    # --- how places are found

    def add(
        self, holder: Mapping[str, object], name: str, label: str, *, followed: bool = True
    ) -> None:
        """Watch an entry of a mapping, and what its value captures; or its value alone."""
        if (id(holder), name) not in self._watched and len(self._watched) < _MANY:
            self._watched.add((id(holder), name))
            self._entries.append((holder, name))  # kept, for its identity to stay its own
            self._entry_labels.append(label)
            if followed:
                self._queue.append((holder.get(name, MISSING), label))

    def follow(self, value: object, label: str) -> None:
        """Watch what a value captures."""
        self._queue.append((value, label))
        self._follow()

    def _follow(self) -> None:
        """Look at all values in the queue, and at what they lead to."""
        while self._queue:
            while self._queue:
                self._look(*self._queue.popleft())
            # Code that was met since may name other attributes of objects that were met before.
            for holder, done in list(self._holders):
                if new := self._names - done:
                    done |= new
                    self._look_up(holder, new)

    def _look(self, value: object, label: str) -> None:
        """Watch what one value captures, by what it is."""
        if is_plain(value) or value is MISSING or isinstance(value, (Tensor, torch.dtype)):
            return
        if id(value) in self._met or len(self._met) >= _MANY:
            return
        self._met[id(value)] = value
        for kinds, look in _LOOKS:
            if isinstance(value, kinds):
                look(self, value, label)
                return
        if hasattr(type(value), "__wrapped__") or "__wrapped__" in getattr(value, "__dict__", {}):
            self._push([getattr(value, "__wrapped__", None)], label)  # of functools.lru_cache
        else:
            self._look_at_object(value, label)

    def _look_at_partial(self, value: functools.partial[Any], label: str) -> None:
        """Look at the function and the arguments of a partial function."""
        # Pyro's handlers hide the partial function that they are.
        inner = [value.func, *value.args, value.keywords, getattr(value, "__wrapped__", None)]
        self._push(inner, label)

    def _look_at_method(self, value: Any, label: str) -> None:
        """Look at a method's function, and at the object that it is bound to."""
        self._push([getattr(value, "__func__", None), value.__self__], label)

    def _look_at_static(self, value: Any, label: str) -> None:
        """Look at the function of a static method or class method."""
        self._push([value.__func__], label)

    def _look_at_property(self, value: Any, label: str) -> None:
        """Look at the function that computes an attribute."""
        self._push([getattr(value, "fget", None) or getattr(value, "func", None)], label)

    def _look_at_namespace(self, value: types.ModuleType | type, label: str) -> None:
        """Watch the attributes of a module or a class that code reads."""
        name = value.__name__ if isinstance(value, types.ModuleType) else value.__module__
        if not is_library(name):
            self._holders.append((value, set()))

    def _look_at_array(self, value: np.ndarray[Any, Any], label: str) -> None:
        """Watch the numbers of a small array, which code may write to where they are."""
        if value.size <= _LONG and value.dtype != object:
            self._arrays.append(value)

    def _push(self, values: Iterable[object], label: str) -> None:
        """Look at values later."""
        self._queue.extend((value, label) for value in values)

    def _look_at_function(self, function: types.FunctionType, label: str) -> None:
        """Watch a function's closure, globals and defaults; of a library's, the closure."""
        name = function.__qualname__.replace("<locals>.", "")
        is_of_library = is_library(function.__globals__.get("__name__", ""))
        self._look_at_closure(function, name, is_of_library)
        if is_of_library:
            return
        reads = _reads(function.__code__)
        self._names |= reads.attributes | (reads.globals & _BY_ANY_NAME)
        self._look_at_globals(function.__globals__, reads, name)
        if function.__kwdefaults__:
            self._push([function.__kwdefaults__], f"the defaults of {name}")
        self._watch_slot(function, "__defaults__", f"the defaults of {name}")
        if vars(function):
            self._holders.append((function, set()))
        for module, level in reads.imports:
            self._push([_imported(module, level, function.__globals__)], module)

    def _look_at_closure(
        self, function: types.FunctionType, name: str, is_of_library: bool
    ) -> None:
        """Watch the variables that a function closes over."""
        cells = zip(function.__closure__ or (), function.__code__.co_freevars, strict=True)
        for cell, variable in cells:
            label = f"{variable!r} in the closure of {name}"
            value = _content_of(cell)
            # The decorators of a library close over the function that they decorate.
            if is_of_library and not callable(value):
                continue
            self._queue.append((value, label))
            if id(cell) not in self._watched:
                self._watched.add(id(cell))
                self._met[id(cell)] = cell
                self._cells.append(cell)
                self._cell_labels.append(label)

    def _look_at_globals(self, known: dict[str, object], reads: _Reads, name: str) -> None:
        """Watch the globals that a function reads."""
        variables = set(reads.globals)
        if variables & _ANY_GLOBAL:
            variables |= {key for key, value in known.items() if isinstance(value, (int, float))}
        for variable in sorted(variables & known.keys() - {"__builtins__"}):
            self.add(known, variable, f"the global {variable!r}, which {name} reads")

    def _watch_slot(self, holder: object, name: str, label: str) -> None:
        """Watch an attribute of an object without a mapping, and what it captures."""
        if (id(holder), name) not in self._watched:
            self._watched.add((id(holder), name))
            self._slots.append((holder, name))
            self._slot_labels.append(label)
            self._queue.append((getattr(holder, name, MISSING), label))

    def _look_at_container(self, value: Any, label: str) -> None:
        """Watch what a container holds, unless it can never hold another content."""
        views = [value, value.values()] if isinstance(value, Mapping) else [value]
        items = [item for view in views for item in itertools.islice(view, _LONG)]
        self._push(items, label)
        if isinstance(value, (tuple, frozenset)):
            return  # never another content
        if not isinstance(value, types.MappingProxyType):
            self._containers.append(value)
        self._contents += views if len(value) <= _LONG else map(_Head, views)
        self._content_labels += [label] * len(views)

    def _look_at_object(self, value: Any, label: str) -> None:
        """Watch an object's attributes: of a library's, those that say what a step does."""
        own = type(value)
        if isinstance(value, nn.Module):
            self.modules[id(value)] = value
            self._push(value.children(), label)
        if not is_library(own.__module__):
            self._holders.append((value, set()))
        elif not isinstance(value, nn.Module) and own.__module__.startswith(_SETTINGS):
            for name, content in list(getattr(value, "__dict__", {}).items()):
                # What a library keeps for itself, in containers, grows with use.
                settled = name[:1] != "_" or is_plain(content) or callable(content)
                self.add(vars(value), name, f"{own.__name__}.{name}", followed=settled)

    def _look_up(self, holder: object, names: set[str]) -> None:
        """Watch the attributes of a module, a class or an object that have one of some names."""
        if isinstance(holder, (types.ModuleType, types.FunctionType)):
            label = getattr(holder, "__qualname__", holder.__name__)
            self._add_all(vars(holder), names & vars(holder).keys(), label)
            return
        is_class = isinstance(holder, type)
        kind: type = holder if isinstance(holder, type) else type(holder)
        attributes: dict[str, object] = {} if is_class else getattr(holder, "__dict__", {})
        by_any_name = bool(self._names & _BY_ANY_NAME) or id(holder) in self._roots
        found = set(attributes) if by_any_name else names & set(attributes)
        for owner in kind.__mro__:
            if is_library(owner.__module__):
                continue
            wanted = _of_class(owner, names, by_any_name)
            slots = {n for n in wanted if isinstance(vars(owner)[n], types.MemberDescriptorType)}
            for name in sorted(slots) if not is_class else ():
                self._watch_slot(holder, name, f"{kind.__name__}.{name}")
            mine = self._proxies.setdefault(owner, vars(owner))
            self._add_all(mine, wanted - slots, owner.__name__)
            found |= wanted - slots  # an attribute of the object would hide it
        if hasattr(holder, "__dict__") and not is_class:
            self._add_all(attributes, found, kind.__name__)

    def _add_all(self, holder: Mapping[str, object], names: set[str], label: str) -> None:
        """Watch entries of a mapping by some names, and what their values capture."""
        for name in sorted(names):
            self.add(holder, name, f"{label}.{name}")


def _of_class(owner: type, names: set[str], by_any_name: bool) -> set[str]:
    """Return the names of a class that code reads, those without a name in it included."""
    mine = vars(owner)
    found = names & mine.keys()
    found |= {n for n in mine if n == "forward" or (n[:2] == "__" and callable(mine[n]))}
    if by_any_name:
        values = (*_PLAIN, types.MemberDescriptorType, types.FunctionType, property)
        found |= {n for n, value in mine.items() if n[:2] != "__" and isinstance(value, values)}
    return found - _OF_ANY_CLASS


# No code of a step calls them.
_OF_ANY_CLASS = {"__init__", "__new__", "__init_subclass__", "__class_getitem__", "__repr__"}
_OF_ANY_CLASS |= {"__str__", "__reduce__", "__getstate__", "__setstate__", "__subclasshook__"}


def _content_of(cell: types.CellType) -> object:
    """Return what a cell holds; MISSING where it is empty."""
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return MISSING


def _put_back_entry(holder: dict[str, object], name: str, value: object) -> None:
    """Give a mapping the value that it had under a name, or none."""
    if value is MISSING:
        holder.pop(name, None)
    elif holder.get(name, MISSING) is not value:
        holder[name] = value


def _put_back(container: Any, before: Any) -> None:
    """Give a container the items that its copy has."""
    if _has_items(container, before):
        return
    container.clear()
    if isinstance(container, (set, dict)):
        container.update(before)
    else:
        container.extend(before)


def _has_items(container: Any, before: Any) -> bool:
    """Return whether two containers hold the same objects, in one order."""
    if len(container) != len(before) or any(
        a is not b for a, b in zip(container, before, strict=True)
    ):
        return False
    return not isinstance(container, dict) or all(
        container[key] is value for key, value in before.items()
    )


def _imported(module: str, level: int, known: Mapping[str, Any]) -> types.ModuleType | None:
    """Return the module that a statement inside a function imports; None before it did."""
    try:
        name = "." * level + module
        if level:
            name = importlib.util.resolve_name(name, known.get("__package__") or "")
    except ImportError:
        return None
    return sys.modules.get(name)


# How a value is looked at, by what it is: the first that fits.
_LOOKS: tuple[tuple[tuple[type, ...], Callable[[Captured, Any, str], None]], ...] = (
    ((types.FunctionType,), Captured._look_at_function),
    ((functools.partial,), Captured._look_at_partial),
    ((types.MethodType, types.BuiltinMethodType), Captured._look_at_method),
    ((staticmethod, classmethod), Captured._look_at_static),
    ((property, functools.cached_property), Captured._look_at_property),
    ((types.ModuleType, type), Captured._look_at_namespace),
    (
        (list, tuple, set, frozenset, dict, deque, types.MappingProxyType),
        Captured._look_at_container,
    ),
    ((np.ndarray,), Captured._look_at_array),
)
