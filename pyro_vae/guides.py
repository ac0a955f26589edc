"""Guides: a variational family and where its parameters come from.

AmortizedGuide = family of an encoder's output; LocalGuide = family of a table
with a row per datum. Both are nn.Modules and Pyro guides, made from the model's
structure, and sample the model's local latent sites under their own names.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae.batches import Batch, as_batch, rows_text
from pyro_vae.coordinates import Coordinates
from pyro_vae.counts import as_count
from pyro_vae.families import FactorizedFamily, Family
from pyro_vae.family_guide import Conditionals, FamilyGuide
from pyro_vae.handlers import name_apart
from pyro_vae.running import call_network, evaluation, module_of, preserved_rng
from pyro_vae.sites import Structure, inspect
from pyro_vae.traces import dependencies

__all__ = ["AmortizedGuide", "LocalGuide"]

_SAME_TABLE = 1e-5  # of its length: by less it has moved by rounding
_SAME_DATUM = 1e-4  # of its length: what two fingerprints of a datum may be apart


class AmortizedGuide(FamilyGuide):
    r"""A guide whose parameters an encoder computes from the datum.

    .. math:: q_\phi(z | x) = \mathrm{family}(z; \mathrm{head}(\mathrm{encoder}_\phi(x)))

    Made from the model: it samples every continuous latent site of the data plate, under
    the site's name, mapped to the site's support; discrete ones are left to be summed out. The
    encoder returns features [N, F]; the guide adds the linear head. At the start every
    datum's proposal is close to the prior. All parameters exist after construction.

    Args:
        model: a Pyro model with latent sites in the plate of its data.
        encoder: an nn.Module (one of TorchScript too), or a function without parameters;
            called as ``encoder(*batch)``, or ``encoder(**batch)`` for a mapping;
            returns features [N, F].
        example: a batch (tensor, tuple or mapping) to read shapes from; a few rows do.
        family: the variational family; families.Normal() by default.
        data_plate: the name of the plate of the data, where it is not plain.
        global_guide: a Pyro guide for the latent sites outside the data plate, if the
            model has any, for example AutoNormal(poutine.block(model, expose=[...])).
        top_down: whether a site's proposal sees, beside the datum, the draws of those sites
            that it depends on in the model (a hierarchy z2 -> z1 -> x: q(z2 | x) q(z1 | z2, x)),
            through a network with one hidden layer. It is then of no family, and
            :func:`pyro_vae.compare` measures it against the reference that you name.

    Raises:
        DataPlateError: where the data plate cannot be told.
        ValueError: where no latent site is continuous, for a discrete one of infinitely many
            values, global latents without a guide, or an encoder whose features are not [N, F].

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> import pyro_vae as pv
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z.repeat(1, 2), 1.0).to_event(1), obs=x)
        >>> x = torch.zeros(5, 4)
        >>> guide = pv.AmortizedGuide(model, torch.nn.Linear(4, 8), example=x)
        >>> guide(x)["z"].shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: Callable[..., Any],
        *,
        example: Any,
        family: Family | None = None,
        data_plate: str | bool | None = None,
        global_guide: Callable[..., Any] | None = None,
        top_down: bool = False,
    ) -> None:
        structure = inspect(model, as_batch(example), data_plate=data_plate)
        if structure.data_plate is None:
            raise ValueError(
                "AmortizedGuide is for latents of each datum; with data_plate=False there are "
                "none: use LocalGuide(model, num_data=1, example=batch, data_plate=False), or a "
                "guide of Pyro's (pyro.infer.autoguide)"
            )
        if global_guide is None:
            _refuse_globals(structure, "Give a guide for them (global_guide=...)")
        super().__init__(model, example, family, structure)
        self.encoder = encoder
        self.global_guide = global_guide
        batch = as_batch(example)
        if structure.data_plate.drawn:
            batch = batch.rows(slice(0, structure.data_plate.size))
        with torch.enable_grad(), evaluation(encoder):
            features = self._features(batch.args, batch.kwargs)
        _refuse_hidden_parameters(model, encoder, features)
        features = features.detach()
        if not bool(features.isfinite().all()):
            raise ValueError(
                "the encoder returned NaN or infinite features for the example; where data are "
                "missing (NaN), let it see which: pyro_vae.MissingEncoder(encoder)"
            )
        prior = self._prior_params.to(features)
        like: dict[str, Any] = {"device": features.device, "dtype": features.dtype}
        self.head = nn.Linear(features.shape[1], prior.numel(), **like)
        with torch.no_grad():
            self.head.weight.mul_(0.1)
            self.head.bias.copy_(prior.flatten())
        self.parents: dict[str, tuple[str, ...]] = {}
        if top_down:
            if not isinstance(self.family, FactorizedFamily):
                raise ValueError(
                    f"top_down with {self.family}: that family is joint over the sites already; "
                    "leave top_down out, or take families.Normal()"
                )
            names = [coordinates.name for coordinates in self.coordinates]
            self.parents = dependencies(model, batch, names)
        self.conditioners = nn.ModuleDict(
            {
                str(number): self._conditioner(features.shape[1], coordinates, like)
                for number, coordinates in enumerate(self.coordinates)
                if self.parents.get(coordinates.name)
            }
        )
        if global_guide is not None:
            # Pyro's autoguides make their parameters at the first call.
            with (
                torch.no_grad(),
                poutine.block(),
                preserved_rng(features.device),
                evaluation(global_guide),
            ):
                if isinstance(global_guide, PyroModule):
                    name_apart(global_guide)
                global_guide(*batch.args, **batch.kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site; the Pyro guide."""
        values: dict[str, Tensor] = {}
        if self.global_guide is not None:
            if isinstance(self.global_guide, PyroModule):
                name_apart(self.global_guide)
            returned = self.global_guide(*args, **kwargs)
            values.update(returned if isinstance(returned, Mapping) else {})
        return {**values, **super().forward(*args, **kwargs)}

    def local_part(self) -> AmortizedGuide:
        """Return this guide without its global part, the parameters shared."""
        local = copy.copy(self)
        local._modules = {**self._modules}
        local._modules.pop("global_guide", None)
        local.__dict__["global_guide"] = None
        return local

    def family_params(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the family's parameters for a batch, [N, P]: P is family.params_shape(D).

        With top_down, of each site where the conditioners add nothing.
        """
        return self._params(self._features(args, kwargs))

    def _params(self, features: Tensor) -> Tensor:
        shape = self.family.params_shape(self.num_coordinates)
        return self.head(features).unflatten(-1, shape)

    @property
    def is_dependent(self) -> bool:
        """Whether a site's proposal may depend on the draws of sites before it."""
        return super().is_dependent or len(self.conditioners) > 0

    def _conditioner(self, width: int, coordinates: Coordinates, like: Any) -> nn.Module:
        """Return the network from features and parents to what is added to parameters."""
        size_of = {c.name: c.columns.stop - c.columns.start for c in self.coordinates}
        inputs = width + sum(size_of[name] for name in self.parents[coordinates.name])
        per_coordinate = self.family.params_shape(1)[1]
        last = nn.Linear(width, size_of[coordinates.name] * per_coordinate, **like)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return nn.Sequential(nn.Linear(inputs, width, **like), nn.Tanh(), last)

    def _conditionals(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[int, Conditionals]:
        if not self.conditioners:
            return super()._conditionals(args, kwargs)
        features = self._features(args, kwargs)
        params = self._params(features)
        number_of = {c.name: str(number) for number, c in enumerate(self.coordinates)}

        def params_of(coordinates: Coordinates, before: Mapping[str, Tensor]) -> Tensor:
            mine = params[:, coordinates.columns]
            own = coordinates.spread(mine.flatten(1))
            if parents := self.parents[coordinates.name]:
                seen = [coordinates.spread(features), *(before[name] for name in parents)]
                shape = torch.broadcast_shapes(*(rows.shape[:-1] for rows in seen))
                rows = torch.cat([rows.expand(*shape, rows.shape[-1]) for rows in seen], -1)
                own = own + self.conditioners[number_of[coordinates.name]](rows)
            return own.unflatten(-1, mine.shape[1:])

        return params.shape[0], params_of

    def _features(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        features = call_network(self.encoder, args, kwargs)
        size = Batch(tuple(args), kwargs).size
        if not isinstance(features, Tensor) or features.ndim != 2 or features.shape[0] != size:
            found = (
                f"a tensor of shape {tuple(features.shape)}"
                if isinstance(features, Tensor)
                else type(features).__name__
            )
            raise ValueError(
                f"the encoder returned {found}; features of shape [{size}, F] are needed, a row "
                "for each datum of the batch"
            )
        return features


def _refuse_hidden_parameters(
    model: Callable[..., Any], encoder: Callable[..., Any], features: Tensor
) -> None:
    """Raise ValueError for an encoder that is a function, with parameters that nobody finds."""
    own = list(encoder.parameters()) if isinstance(encoder, nn.Module) else []
    if own or features.grad_fn is None:
        return
    module = module_of(model)
    known = set() if module is None else set(map(id, module.parameters()))
    hidden = [leaf for leaf in _leaves(features) if id(leaf) not in known]
    if hidden:
        shapes = ", ".join(str(list(leaf.shape)) for leaf in hidden[:5])
        raise ValueError(
            f"the encoder, {type(encoder).__name__!r}, uses parameters that are not its own (of "
            f"shapes {shapes}), so that no optimizer would find them; pass the network itself, or "
            "an nn.Module that has it as an attribute"
        )


def _leaves(tensor: Tensor) -> list[Tensor]:
    """Return the tensors without history that a tensor was made of, those with gradients."""
    found, seen, todo = list[Tensor](), set[Any](), [tensor.grad_fn]
    while todo:
        function: Any = todo.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if hasattr(function, "variable"):
            found.append(function.variable)
        todo += [source for source, _ in function.next_functions]
    return found


class LocalGuide(FamilyGuide):
    """A guide with a row of parameters for each datum: no encoder, no amortization.

    Args:
        model: a Pyro model with latent sites in the plate of its data.
        num_data: rows of the table.
        example: a batch to read shapes from; a few rows do.
        family: the variational family; families.Normal() by default.
        data_plate: the name of the plate of the data, where it is not plain; False for all
            latents of the model jointly, as one datum, in one row.

    Attributes:
        table: the parameters, [num_data, P]: P is family.params_shape(D), for a factorized family
            (D, params_per_coordinate).
        converged: [num_data], whether :func:`pyro_vae.refine` found each row's optimum.
        given: the values of global latent sites that its rows were fitted at, by name.

    What :func:`pyro_vae.refine` or :func:`pyro_vae.fit` has fitted rows to is remembered: their
    bounds on other data are refused, in another order too. ``guide.rows(index)`` says
    which of the data a batch holds.

    Raises:
        DataPlateError: where the data plate cannot be told.
        ValueError: where no latent site is continuous, for a discrete one of infinitely many
            values, a global one, or num_data < 1.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> import pyro_vae as pv
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.zeros(5)
        >>> guide = pv.LocalGuide(model, num_data=5, example=x)
        >>> with guide.rows(torch.tensor([0, 3])):
        ...     guide(x[[0, 3]])["z"].shape
        torch.Size([2])
    """

    converged: Tensor
    _fingerprints: Tensor
    _fitted: Tensor

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        num_data: int,
        example: Any,
        family: Family | None = None,
        data_plate: str | bool | None = None,
    ) -> None:
        num_data = as_count("num_data", num_data)
        structure = inspect(model, as_batch(example), data_plate=data_plate)
        _refuse_globals(structure, "Train an AmortizedGuide(global_guide=...) with them")
        if structure.data_plate is None and num_data != 1:
            raise ValueError(
                f"num_data={num_data}: with data_plate=False the whole batch is one datum"
            )
        super().__init__(model, example, family, structure)
        prior = self._prior_params
        self.table = nn.Parameter(prior.repeat(num_data, *[1] * prior.ndim))
        self.register_buffer("converged", torch.zeros(num_data, dtype=torch.bool))
        # Of the data that the rows were fitted to, and of the table then: infinite for none.
        self.register_buffer("_fingerprints", torch.zeros(num_data, dtype=torch.float64))
        self.register_buffer("_fitted", torch.tensor(math.inf, dtype=torch.float64))
        self._hold({})
        self._unchecked = False
        self._rows: Tensor | None = None
        self._trial: Tensor | None = None

    @property
    def num_data(self) -> int:
        """Rows of the table."""
        return self.table.shape[0]

    @property
    def given(self) -> dict[str, Tensor]:
        """The values of global latent sites that the rows were fitted at."""
        held = self._modules.get("_given")
        return {} if held is None else {_site_of(n): v for n, v in held.named_buffers()}

    def _hold(self, given: Mapping[str, Tensor]) -> None:
        self._modules.pop("_given", None)
        if given:
            self._given = nn.Module()
            for site, value in given.items():
                self._given.register_buffer(_buffer_of(site), value.detach().clone())

    def remember(self, batch: Batch | None, given: Mapping[str, Tensor] | None = None) -> None:
        """Remember what the rows were fitted to.

        Args:
            batch: a datum for each row; None forgets.
            given: the values of global latent sites.
        """
        self._hold(given or {})
        known = batch is not None and (self._data_plate is None or batch.size == self.num_data)
        self._fitted.fill_(math.inf)
        if batch is not None and known:
            number, _ = batch.fingerprints(whole=self._data_plate is None)
            self._fingerprints.copy_(number)
            self._fitted.copy_(self._checksum()[0])

    @property
    def is_start(self) -> bool:
        """Whether :meth:`for_any_data` is in force."""
        return self._unchecked

    @contextlib.contextmanager
    def for_any_data(self) -> Iterator[None]:
        """Take any batch of the right size, as a start for its rows."""
        before, self._unchecked = self._unchecked, True
        try:
            yield
        finally:
            self._unchecked = before

    def check_data(self, batch: Batch) -> None:
        """Raise ValueError where the rows in force were fitted to other data than these."""
        self.check_size(batch.size)
        checksum, length = self._checksum()
        # Rows that moved since speak for whatever moved them.
        moved = not bool((checksum - self._fitted.to(checksum)).abs() <= _SAME_TABLE * length)
        if self._unchecked or moved:
            return
        number, length = batch.fingerprints(whole=self._data_plate is None)
        wanted = self._fingerprints.to(number)
        if self._data_plate is not None:
            wanted = wanted[self.current_rows.to(wanted.device)]
        other = (number - wanted).abs() > _SAME_DATUM * length + torch.finfo(number.dtype).tiny
        if bool(other.any()):
            raise ValueError(
                f"{rows_text(other)} of the batch are not the data that this LocalGuide's rows "
                "were fitted to. Where the batch holds some of those data, say which: with "
                "guide.rows(index): ...; for other data, refine it on them: "
                "pyro_vae.refine(model, guide, *batch)"
            )

    def _checksum(self) -> tuple[Tensor, Tensor]:
        """Return a number that tells the table from others, and its length."""
        table = self.table.detach().flatten().to("cpu", torch.float64)
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(len(table), generator=generator, dtype=torch.float64)
        return table @ direction, table.norm()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # States of guides that remember nothing: of an earlier version.
        state_dict.setdefault(f"{prefix}_fingerprints", torch.zeros_like(self._fingerprints))
        state_dict.setdefault(f"{prefix}_fitted", torch.full_like(self._fitted, math.inf))
        held = f"{prefix}_given."
        self._hold(
            {
                _site_of(key.removeprefix(held)): value
                for key, value in state_dict.items()
                if key.startswith(held)
            }
        )
        super()._load_from_state_dict(state_dict, prefix, *args)

    @contextlib.contextmanager
    def rows(self, index: Tensor | slice) -> Iterator[None]:
        """Say which rows of the table the batches inside the context hold.

        Args:
            index: [n] integers below num_data, or a slice; row i of the batch is
                datum index[i].

        Raises:
            IndexError: for an index out of range.
        """
        if isinstance(index, slice):
            index = torch.arange(self.num_data)[index]
        if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise IndexError(
                f"rows: a 1-dimensional tensor of integers is needed, found {index.dtype} of "
                f"shape {tuple(index.shape)}"
            )
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.num_data:
            raise IndexError(
                f"rows: indices run from {int(index.min())} to {int(index.max())}, but the guide "
                f"has rows 0 to {self.num_data - 1}"
            )
        with self.rows_as_given(index.to(self.table.device)):
            yield

    @property
    def given_rows(self) -> Tensor | None:
        """The rows of :meth:`rows` that are in force; None for all."""
        return self._rows

    @contextlib.contextmanager
    def rows_as_given(self, index: Tensor) -> Iterator[None]:
        """Take rows that were given before, and need not be checked again."""
        before, self._rows = self._rows, index
        try:
            yield
        finally:
            self._rows = before

    @contextlib.contextmanager
    def using(self, table: Tensor) -> Iterator[None]:
        """Take another table in place of the guide's own, to differentiate by it.

        Args:
            table: of the shape of the guide's own.
        """
        before, self._trial = self._trial, table
        try:
            yield
        finally:
            self._trial = before

    @property
    def current_rows(self) -> Tensor:
        """The rows that a batch holds now: those of :meth:`rows`, else all, [n]."""
        if self._rows is not None:
            return self._rows
        return torch.arange(self.num_data, device=self.table.device)

    def family_params(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the rows of the table for a batch, [N, P]: P is family.params_shape(D)."""
        self.check_size(Batch(args, kwargs).size)
        table = self.table if self._trial is None else self._trial
        return table if self._rows is None else table[self._rows]

    def _chosen_rows(self, index: Tensor) -> contextlib.AbstractContextManager[None]:
        return self.rows(index)

    def check_size(self, size: int | None) -> None:
        """Raise ValueError if a batch of this size does not match the rows in force."""
        wanted = self.num_data if self._rows is None else self._rows.shape[0]
        if size is None or size == wanted or self._data_plate is None:
            return
        if self._rows is None:
            raise ValueError(
                f"this LocalGuide has a row for each of {wanted} data but the batch has {size}; "
                "say which rows a minibatch holds: with guide.rows(index): ..."
            )
        raise ValueError(f"guide.rows(index) names {wanted} rows but the batch has {size}")


def _buffer_of(site: str) -> str:
    """Return a name for a buffer, which may hold no dot."""
    return site.replace(".", "|")


def _site_of(buffer: str) -> str:
    return buffer.replace("|", ".")


def _refuse_globals(structure: Structure, advice: str) -> None:
    if structure.data_plate is not None and structure.global_latents:
        names = [site.name for site in structure.global_latents]
        raise ValueError(
            f"the latent sites {names} lie outside the data plate {structure.data_plate.name!r}: "
            f"they are global. {advice}, or condition the model on a value"
        )
