"""Random numbers of a minibatch that processes share: those that one process would draw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.programs.processes import Processes, Share
from pyro_vae.recording import is_recording
from pyro_vae.torch_internals import DispatchMode, Operator, draws_in_place, is_random

_aten = torch.ops.aten
# Draw as many numbers whatever their parameters are: those of other rows may be any.
_STEADY = frozenset(
    {
        *(_aten.bernoulli.default, _aten.bernoulli.p, _aten.bernoulli.Tensor),
        *(_aten.bernoulli_.Tensor, _aten.native_dropout.default, _aten.randint_like.Tensor),
        *(_aten.normal.Tensor_Tensor, _aten.normal.Tensor_float, _aten.normal.float_Tensor),
        *(_aten.rand_like.default, _aten.randn_like.default, _aten.randint_like.default),
        *(_aten.randint_like.low_dtype, _aten.multinomial.default),
    }
)


class NotSharedError(ValueError):
    """A draw of which it is not known what part belongs to the rows of this process."""


@dataclass(frozen=True)
class _Kind:
    """A draw of a run: its operator, and the shape of its numbers.

    Attributes:
        operator: that draws.
        shape: for as many data as the share.
        dim: along which the data lie; None where it is drawn for all data alike.
        times: how often the data lie there, one after the other.
    """

    operator: Operator
    shape: tuple[int, ...]
    dim: int | None = None
    times: int = 1

    def is_like(self, operator: Operator, shape: tuple[int, ...], count: int) -> bool:
        """Whether a draw for so many data may be this one; other dimensions may vary."""
        if operator is not self.operator or len(shape) != len(self.shape):
            return False
        return self.dim is None or shape[self.dim] == self.times * count

    def others(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the sizes of all dimensions but that of the data."""
        return shape if self.dim is None else (*shape[: self.dim], *shape[self.dim + 1 :])


class JointDraws(DispatchMode):
    """A context that draws for a whole minibatch, and hands out the rows of this process.

    Every process draws all numbers, so that each datum gets those that it would get in one process,
    latents that all data share are the same everywhere, and random states stay together. Which
    dimension of a draw holds the data is learned once, by comparing a run on some data with
    one on a share of them. Numbers whose count depends on their parameters (of a Gamma, say) are
    drawn from the parameters of all processes.

    Args:
        processes: that share the minibatch.

    Attributes:
        share: of the minibatch that is run next.
    """

    def __init__(self, processes: Processes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._processes = processes
        self.share = Share(0, 1, 1)
        self._kinds: list[_Kind] = []
        self._whole: list[_Kind] = []  # of a run on all rows
        self._watching = self._learning = False
        self._next = 0

    def __enter__(self) -> JointDraws:
        self._next = 0
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def watch(self, total: int) -> None:
        """Have the next run, on this many data, show what is drawn for all of them."""
        self.share, self._whole = Share(0, total, total), []
        self._watching, self._learning = True, False

    def learn(self, share: Share) -> None:
        """Have the next run, on a share of the same data, show where these lie in each draw."""
        self.share, self._kinds = share, []
        self._watching, self._learning = False, True

    def use(self, share: Share) -> None:
        """Have later runs, on a share of a minibatch, draw for all of it."""
        self.share = share
        self._watching = self._learning = False

    def __torch_dispatch__(
        self,
        func: Operator,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not is_random(func):
            return func(*args, **kwargs)
        shape = _shape_of([*args, *kwargs.values()])
        if self._watching:
            self._whole.append(_Kind(func, shape))
        if self.share.is_all:
            return func(*args, **kwargs)
        kind = self._learned(func, shape) if self._learning else self._known(func, shape)
        plain = kind.dim is None
        return func(*args, **kwargs) if plain else self._drawn(kind, shape, args, dict(kwargs))

    def _learned(self, func: Operator, shape: tuple[int, ...]) -> _Kind:
        """Return where the data lie in a draw, by that of the run on all of them."""
        whole, at = self._whole, len(self._kinds)
        if at >= len(whole) or whole[at].operator is not func or len(whole[at].shape) != len(shape):
            raise NotSharedError("fewer data draw other random numbers")
        differ = [dim for dim, size in enumerate(shape) if whole[at].shape[dim] != size]
        kind = _Kind(func, shape)
        if differ:
            dim, rest = differ[0], self.share.total - self.share.count
            times = (whole[at].shape[dim] - shape[dim]) // rest
            kind = _Kind(func, shape, dim, times)
            if len(differ) > 1 or not kind.is_like(func, shape, self.share.count):
                raise NotSharedError(f"{func} draws {list(whole[at].shape)} and {list(shape)}")
        self._kinds.append(kind)
        return kind

    def _known(self, func: Operator, shape: tuple[int, ...]) -> _Kind:
        """Return where the data lie in a draw: as in the next one that was learned and is like it.

        A run may leave out some of those; of one that was not met, its size must tell.
        """
        count, kinds = self.share.count, self._kinds
        order = [*range(self._next, len(kinds)), *range(self._next)]
        alike = [i for i in order if kinds[i].is_like(func, shape, count)]
        exact = [i for i in alike if kinds[i].others(kinds[i].shape) == kinds[i].others(shape)]
        if found := exact or alike:
            self._next = found[0] + 1
            return kinds[found[0]]
        dims = [dim for dim, size in enumerate(shape) if size == count]
        if len(dims) > 1:
            raise NotSharedError(
                f"a step draws numbers of shape {list(shape)}, and the first one did not: which "
                f"dimension holds the {count} data is not known"
            )
        return _Kind(func, shape, dims[0] if dims else None)

    def _drawn(
        self, kind: _Kind, shape: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return the rows of this process of a draw for all data."""
        func, dim = kind.operator, kind.dim or 0
        whole = [*shape[:dim], kind.times * self.share.total, *shape[dim + 1 :]]

        def of_all(value: object) -> object:
            if isinstance(value, Tensor):
                return self._of_all(value, kind, len(shape))
            return whole if isinstance(value, (list, tuple)) else value

        wide = {name: of_all(value) for name, value in kwargs.items()}
        if draws_in_place(func):
            target: Tensor = args[0]
            made = func(target.new_empty(whole), *map(of_all, args[1:]), **wide)
            return target.copy_(self._own(made, kind))
        made = func(*map(of_all, args), **wide)
        several = isinstance(made, tuple)
        return tuple(self._own(each, kind) for each in made) if several else self._own(made, kind)

    def _own(self, value: Tensor, kind: _Kind) -> Tensor:
        """Return the rows of this process."""
        dim, share = kind.dim or 0, self.share
        apart = value.unflatten(dim, (kind.times, share.total))
        return apart.narrow(dim + 1, share.start, share.count).flatten(dim, dim + 1).contiguous()

    def _of_all(self, value: Tensor, kind: _Kind, ndim: int) -> Tensor:
        """Return a parameter for all rows."""
        dim, share = kind.dim or 0, self.share
        at = dim - ndim + value.ndim  # it may have fewer dimensions than the draw
        if at < 0 or value.shape[at] == 1 != kind.times * share.count:
            return value  # one for all rows
        apart = value.unflatten(at, (kind.times, share.count))
        size = (*apart.shape[: at + 1], share.total, *apart.shape[at + 2 :])
        steady = kind.operator in _STEADY
        if not steady and is_recording():
            raise NotSharedError(
                f"{kind.operator} draws by parameters of each datum, those of other processes too"
            )
        filled = (
            apart.narrow(at + 1, 0, 1).expand(size).clone() if steady else apart.new_zeros(size)
        )
        filled.narrow(at + 1, share.start, share.count).copy_(apart)
        return (filled if steady else self._processes.add(filled)).flatten(at, at + 1)


def _shape_of(arguments: Sequence[object]) -> tuple[int, ...]:
    """Return the shape of the numbers that an operator draws with these arguments."""
    sizes = [tuple(value) for value in arguments if isinstance(value, (list, tuple))]
    shapes = [tuple(value.shape) for value in arguments if isinstance(value, Tensor)]
    return sizes[0] if sizes else tuple(torch.broadcast_shapes(*shapes))
