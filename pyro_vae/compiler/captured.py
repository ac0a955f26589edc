"""The Python values that a function's code reads beside its arguments, and where they lie."""

from __future__ import annotations

import copy
import dis
import functools
import importlib.util
import itertools
import operator
import sys
import types
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

MISSING = object()  # stands for what is not there
_MAX_JOINED = 50  # tests that one "and" joins, because Python nests them
_PLAIN = (bool, int, float, complex, str, bytes)
# Their code is not looked into: it reads nothing that a user changes between two steps.
_LIBRARIES = {"torch", "pyro", "pyro_vae", "numpy", "scipy", "pandas", "opt_einsum", "tqdm"}
# Of their objects, these alone have attributes that say what a step does.
_SETTINGS = (
    *("torch.distributions", "pyro.distributions", "pyro.poutine", "pyro.infer", "pyro_vae."),
    *("types", "argparse", "collections", "functools"),
)
# By these names, code gets at attributes, or globals, that it does not name.
_BY_ANY_NAME = {"getattr", "vars", "asdict", "astuple", "attrgetter", "__dict__"}
_ANY_GLOBAL = {"globals", "eval", "exec"}
_LONG = 256  # items of a container that are watched
_MANY = 10_000  # values that are looked at
_CONTAINERS = (list, tuple, set, frozenset, dict, deque, types.MappingProxyType)
# The attributes that hold what a value is made of. Pyro's handlers hide the partial functions that
# they are.
_INSIDE = (
    (functools.partial, ("func", "args", "keywords", "__wrapped__")),
    ((types.MethodType, types.BuiltinMethodType), ("__func__", "__self__")),
    ((staticmethod, classmethod), ("__func__",)),
    ((property, functools.cached_property), ("fget", "func")),
)


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


class Unchanged:
    """Whether places hold what they held when this was made, and containers have their sizes."""

    def __init__(self, containers: Sequence[Sized], places: list[Place]) -> None:
        self._full = [container for container in containers if len(container)]
        self._empty = [container for container in containers if not len(container)]  # most of them
        self._sizes = list(map(len, self._full))
        self._check = identity_check(places)
        self._expected = [place.content for place in places]

    def holds(self) -> bool:
        """Return whether they do."""
        if any(self._empty) or list(map(len, self._full)) != self._sizes:
            return False
        return self._check(self._expected)


def is_plain(value: object) -> bool:
    """Whether a value is a number or a text: what Python decides by, and a graph takes in."""
    return value is None or isinstance(value, _PLAIN)


def is_library(name: object) -> bool:
    """Whether a module, by its name, is of those whose code is not looked into."""
    top = str(name).partition(".")[0]
    return top in _LIBRARIES or (top in sys.stdlib_module_names and top != "__main__")


class _Reads(NamedTuple):
    """The names that a code object reads, those of functions inside it too."""

    globals: set[str]
    attributes: set[str]
    imports: set[tuple[str, int]]  # names of modules, with their levels


@functools.lru_cache(maxsize=1024)
def _reads(code: types.CodeType) -> _Reads:
    found = _Reads(set(), set(), set())
    instructions = list(dis.get_instructions(code))
    for i, instruction in enumerate(instructions):
        what, name = instruction.opname, instruction.argval
        if what in ("LOAD_GLOBAL", "LOAD_NAME"):
            found.globals.add(name)
        elif what in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM"):
            found.attributes.add(name)
        elif what == "IMPORT_NAME":
            level = instructions[i - 2].argval if i > 1 else 0  # of "from .. import"
            found.imports.add((name, level if isinstance(level, int) else 0))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = _reads(constant)
            found.globals.update(inner.globals)
            found.attributes.update(inner.attributes)
            found.imports.update(inner.imports)
    return found


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
        self._places: list[Place] = []
        self._contents: list[Iterable[Any]] = []  # views of containers
        self._labels: list[str] = []  # of these
        self._containers: list[Any] = []
        self._arrays: list[np.ndarray[Any, Any]] = []
        self._watched = set[tuple[int, str]]()
        self._proxies: dict[type, Mapping[str, Any]] = {}  # of the attributes of classes
        self._met: dict[int, Any] = {}  # by identity, which nothing else has while it is kept
        self._names = set[str]()  # of attributes that code reads
        self._holders: list[tuple[Any, set[str]]] = []  # of attributes, and names looked up
        starts = list(roots)
        # Of a module, the methods that a step calls are found from forward().
        self._roots = {id(root) for root in starts if not isinstance(root, nn.Module)}
        self._queue: deque[tuple[Any, str]] = deque((root, "") for root in starts)
        self.follow()

    # --- what is read at each step

    def values(self) -> list[object]:
        """Return what lies in all places now, containers aside, in the same order at each call."""
        return [place.content for place in self._places]

    def contents(self) -> list[object]:
        """Return what containers hold now, one after the other."""
        return list(itertools.chain.from_iterable(self._contents))

    @functools.cached_property
    def has(self) -> Callable[[list[object]], bool]:
        """A fast function of former :meth:`values`: whether all are there still."""
        return identity_check(self._places)

    def digests(self) -> list[bytes]:
        """Return the numbers of arrays, which code may write to where they are."""
        return [array.tobytes() for array in self._arrays]

    def places(self) -> list[tuple[str, list[object]]]:
        """Return all places, each in words and with what lies there."""
        contents = zip(self._labels, map(list, self._contents), strict=True)
        return [*((place.label, [place.content]) for place in self._places), *contents]

    def forget(self, indices: set[int]) -> None:
        """Watch some of the :meth:`places` no more."""
        vars(self).pop("has", None)
        kept = [i not in indices for i in range(len(self._places) + len(self._contents))]
        of_contents = kept[len(self._places) :]
        self._places = list(itertools.compress(self._places, kept))
        self._contents = list(itertools.compress(self._contents, of_contents))
        self._labels = list(itertools.compress(self._labels, of_contents))

    def snapshot(self) -> Callable[[], None]:
        """Return a function that puts all values back where they lie now."""
        places = [
            (place, place.content)
            for place in self._places
            if isinstance(place.holder, dict if place.is_item else types.CellType)
        ]
        containers = [(container, copy.copy(container)) for container in self._containers]

        def restore() -> None:
            for place, value in places:
                if place.content is not value and (place.is_item or value is not MISSING):
                    place.put(value)
            for container, before in containers:
                _put_back(container, before)

        return restore

    # --- how places are found

    def add(
        self, holder: object, key: str, label: str, *, is_item: bool = True, followed: bool = True
    ) -> None:
        """Watch an item of a mapping or an attribute, and what it captures; or itself alone."""
        known = (id(holder), key) in self._watched
        if not known and (len(self._watched) < _MANY or not is_item):
            self._watched.add((id(holder), key))
            place = Place(holder, key, is_item, label)
            self._places.append(place)  # which keeps the holder, for its identity to stay its own
            if followed:
                self._queue.append((place.content, label))

    def follow(self) -> None:
        """Look at all values in the queue, and at what they lead to."""
        while self._queue:
            while self._queue:
                self._look(*self._queue.popleft())
            # Code that was met since may name other attributes of objects that were met before.
            for holder, done in list(self._holders):
                if new := self._names - done:
                    done |= new
                    self._look_up(holder, new)

    def _look(self, value: Any, label: str) -> None:
        """Watch what one value captures, by what it is."""
        if is_plain(value) or value is MISSING or isinstance(value, (Tensor, torch.dtype)):
            return
        if id(value) in self._met or len(self._met) >= _MANY:
            return
        self._met[id(value)] = value
        names = next((names for kinds, names in _INSIDE if isinstance(value, kinds)), ())
        if isinstance(value, types.FunctionType):
            self._look_at_function(value)
        elif names:
            self._push((getattr(value, name, None) for name in names), label)
        elif isinstance(value, (types.ModuleType, type)):
            is_module = isinstance(value, types.ModuleType)
            if not is_library(value.__name__ if is_module else value.__module__):
                self._holders.append((value, set()))
        elif isinstance(value, _CONTAINERS):
            self._look_at_container(value, label)
        elif not isinstance(value, np.ndarray):
            self._look_at_object(value, label)
        elif value.size <= _LONG and value.dtype != object:
            self._arrays.append(value)  # whose numbers code may write to where they are

    def _push(self, values: Iterable[object], label: str) -> None:
        """Look at values later."""
        self._queue.extend((value, label) for value in values)

    def _look_at_function(self, function: types.FunctionType) -> None:
        """Watch a function's closure, globals and defaults; of a library's, the closure."""
        name = function.__qualname__.replace("<locals>.", "")
        known = function.__globals__
        is_of_library = is_library(known.get("__name__", ""))
        cells = zip(function.__closure__ or (), function.__code__.co_freevars, strict=True)
        for cell, variable in cells:
            # The decorators of a library close over the function that they decorate.
            if not is_of_library or callable(Place(cell, "cell_contents", is_item=False).content):
                label = f"{variable!r} in the closure of {name}"
                self.add(cell, "cell_contents", label, is_item=False)
        if is_of_library:
            return
        reads = _reads(function.__code__)
        self._names |= reads.attributes | (reads.globals & _BY_ANY_NAME)
        variables = set(reads.globals)
        if variables & _ANY_GLOBAL:
            variables |= {key for key, value in known.items() if isinstance(value, (int, float))}
        for variable in sorted(variables & known.keys() - {"__builtins__"}):
            self.add(known, variable, f"the global {variable!r}, which {name} reads")
        if function.__kwdefaults__:
            self._push([function.__kwdefaults__], f"the defaults of {name}")
        self.add(function, "__defaults__", f"the defaults of {name}", is_item=False)
        if vars(function):
            self._holders.append((function, set()))
        for module, level in reads.imports:
            self._push([_imported(module, level, known)], module)

    def _look_at_container(self, value: Any, label: str) -> None:
        """Watch what a container holds, unless it can never hold another content."""
        views = [value, value.values()] if isinstance(value, Mapping) else [value]
        self._push((item for view in views for item in itertools.islice(view, _LONG)), label)
        if isinstance(value, (tuple, frozenset)):
            return  # never another content
        if not isinstance(value, types.MappingProxyType):
            self._containers.append(value)
        self._contents += views if len(value) <= _LONG else map(_Head, views)
        self._labels += [label] * len(views)

    def _look_at_object(self, value: Any, label: str) -> None:
        """Watch an object's attributes: of a library's, those that say what a step does."""
        own = type(value)
        if hasattr(own, "__wrapped__") or "__wrapped__" in getattr(value, "__dict__", {}):
            self._push([getattr(value, "__wrapped__", None)], label)  # of functools.lru_cache
            return
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
                self.add(holder, name, f"{kind.__name__}.{name}", is_item=False)
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


def _put_back(container: Any, before: Any) -> None:
    """Give a container the items that its copy has."""
    now, then = _objects(container), _objects(before)
    if len(now) != len(then) or not all(map(operator.is_, now, then)):
        container.clear()
        (container.update if isinstance(container, (set, dict)) else container.extend)(before)


def _objects(container: Any) -> list[object]:
    """Return what a container holds, in its order."""
    return [*container, *(container.values() if isinstance(container, dict) else ())]


def _imported(module: str, level: int, known: Mapping[str, Any]) -> types.ModuleType | None:
    """Return the module that a statement inside a function imports; None before it did."""
    try:
        name = importlib.util.resolve_name("." * level + module, known.get("__package__") or "")
    except ImportError:
        return None
    return sys.modules.get(name)
