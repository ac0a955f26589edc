"""AmortizedGuide: a variational family whose parameters an encoder network computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae.families.base import FactorizedFamily, Family
from pyro_vae.guides.base import Added, FamilyGuide, refuse_globals
from pyro_vae.guides.coordinates import Coordinates
from pyro_vae.guides.shared_draws import SharedDraws
from pyro_vae.programs.answers import leaves_of
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.handlers import name_apart, register
from pyro_vae.programs.state import call_network, evaluation, module_of, preserved_rng
from pyro_vae.programs.structure import ModelLooks
from pyro_vae.programs.traces import dependencies
from pyro_vae.programs.types import DataPlate, Program, Values

_HEAD_SCALE = 0.1  # of the head's first weights: every datum's proposal is then close to the prior


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
        top_down: whether a site's proposal sees, beside the datum, the draws of the latents of the
            datum that it depends on in the model (a hierarchy z2 -> z1 -> x: q(z2 | x)
            q(z1 | z2, x)), and those of all global latents g: q(g) q(z | x, g). Each through a
            network with one hidden layer, as wide as the features, which begins by adding
            nothing. A guide of a hierarchy is then of no family, and :func:`pyro_vae.compare`
            measures it against the reference that you name.

    Raises:
        DataPlateError: where no plate is plainly that of the data.
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
        model: Program,
        encoder: Callable[..., Any],
        *,
        example: Any,
        family: Family | None = None,
        data_plate: DataPlate = None,
        global_guide: Program | None = None,
        top_down: bool = False,
    ) -> None:
        looks = ModelLooks.of(model, example)
        structure = looks.structure(data_plate)
        if structure.data_plate is None:
            raise ValueError(
                "AmortizedGuide is for latents of each datum; with data_plate=False there are "
                "none: use LocalGuide(model, num_data=1, example=batch, data_plate=False), or a "
                "guide of Pyro's (pyro.infer.autoguide)"
            )
        if global_guide is None:
            refuse_globals(structure, "Give a guide for them (global_guide=...)")
        super().__init__(looks, structure, family)
        self.encoder = encoder
        self.global_guide = global_guide
        batch = looks.batch
        if structure.data_plate.drawn:
            batch = batch.rows(slice(0, structure.data_plate.size))
        features = self._example_features(model, batch)
        prior = self._prior_params.to(features)
        self.head = _linear(features.shape[1], prior.numel(), features)
        with torch.no_grad():  # every datum's proposal near the prior
            self.head.weight.mul_(_HEAD_SCALE)
            self.head.bias.copy_(prior.flatten())
        shares = [site.name for site in structure.global_latents if not site.enumerable]
        is_joint = not isinstance(self.family, FactorizedFamily)
        if top_down and self.annealing is not None:
            raise ValueError(
                f"top_down with {self.family}: steps move all latents of a datum jointly, with the "
                "global ones as they are drawn; leave top_down out"
            )
        if top_down and is_joint and not shares:
            raise ValueError(
                f"top_down with {self.family}: that family is joint over the sites already; "
                "leave top_down out, or take families.Normal()"
            )
        sees = top_down and not is_joint
        self.parents = dependencies(model, batch, self.site_names) if sees else {}
        self.conditioners = nn.ModuleDict()  # by the number of their site
        for number, name in enumerate(self.site_names):
            if self.parents.get(name):
                self.conditioners[str(number)] = self._conditioner(features, name)
        self.shared = None
        if top_down and shares:
            self.shared = SharedDraws(looks, structure, features, prior.numel())
        if global_guide is not None:
            # Pyro's autoguides make their parameters at the first call.
            rng = preserved_rng(features.device)
            with torch.no_grad(), poutine.block(), rng, evaluation(global_guide):
                self._run_global_guide(batch)

    def _example_features(self, model: Program, batch: Batch) -> Tensor:
        """Return the encoder's features of the example, [N, F]; ValueError for unusable ones."""
        with torch.enable_grad(), evaluation(self.encoder):
            features = self._features(batch)
        _refuse_hidden_parameters(model, self.encoder, features)
        if not bool(features.isfinite().all()):
            raise ValueError(
                "the encoder returned NaN or infinite features for the example; where data are "
                "missing (NaN), let it see which: pyro_vae.MissingEncoder(encoder)"
            )
        return features.detach()

    def _conditioner(self, features: Tensor, name: str) -> nn.Module:
        """Return the network from features and parents to what is added to a site's parameters."""
        size_of = {c.name: c.columns.stop - c.columns.start for c in self.coordinates}
        width = features.shape[1]
        inputs = width + sum(size_of[parent] for parent in self.parents[name])
        last = _linear(width, size_of[name] * self.family.params_shape(1)[1], features)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        return nn.Sequential(_linear(inputs, width, features), nn.Tanh(), last)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site, and return values by site name; the Pyro guide."""
        register(self)
        batch = Batch(args, kwargs)
        found, drawn = self._run_global_guide(batch)
        return {**found, **self._sample_batch(batch, drawn)}

    def _run_global_guide(self, batch: Batch) -> tuple[Values, Values]:
        """Sample the global latents; return what their guide returns, and what it draws."""
        if self.global_guide is None:
            return {}, self.held
        if isinstance(self.global_guide, PyroModule):
            name_apart(self.global_guide)
        with poutine.trace() as record:
            found = self.global_guide(*batch.args, **batch.kwargs)
        nodes: Any = record.trace.nodes
        drawn = {name: at["value"] for name, at in nodes.items() if at["type"] == "sample"}
        return found if isinstance(found, Mapping) else {}, drawn

    def family_params(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the family's parameters for a batch, [N, P]: P is family.params_shape(D).

        With top_down, of each site where the conditioners add nothing, and of global latents that
        are not held at values.
        """
        features = self._features(Batch(args, kwargs))
        params = self._params(features)
        if self.shared is None or not self.held:
            return params
        return params + self.shared(features, self.held).reshape(params.shape)

    def _params(self, features: Tensor) -> Tensor:
        params: Tensor = self.head(features)
        return params.unflatten(-1, self.family.params_shape(self.num_coordinates))

    @property
    def is_dependent(self) -> bool:
        """Whether a site's proposal may depend on the draws of sites before it."""
        return super().is_dependent or len(self.conditioners) > 0

    @property
    def sees_draws(self) -> bool:
        """Whether parameters of a datum's proposals depend on draws, of globals or of its own."""
        return len(self.conditioners) > 0 or (self.shared is not None and not self.held)

    def _proposed(self, batch: Batch, shared: Values) -> tuple[Tensor, Added | None]:
        if not self.sees_draws:
            return super()._proposed(batch, shared)
        features = self._features(batch)
        gained = self._gained(features, shared)

        def added(coordinates: Coordinates, before: Values) -> Tensor | None:
            found = gained
            if found is not None and isinstance(self.family, FactorizedFamily):
                found = found.unflatten(-1, self.family.params_shape(self.num_coordinates))
                found = found[..., coordinates.columns, :].flatten(-2)
            if not (parents := self.parents.get(coordinates.name)):
                return found
            seen = [coordinates.spread(features), *(before[name] for name in parents)]
            shape = torch.broadcast_shapes(*(rows.shape[:-1] for rows in seen))
            rows = torch.cat([rows.expand(*shape, -1) for rows in seen], -1)
            more = self.conditioners[str(self.site_names.index(coordinates.name))](rows)
            return more if found is None else found + more

        return self._params(features), added

    def _gained(self, features: Tensor, shared: Values) -> Tensor | None:
        """Return what parameters gain by the global latents, in a row; None where they gain none.

        Rows lie along the dimension of the data plate, and those of particles before.
        """
        if self.shared is None or self._data_plate is None:
            return None
        inner = [1] * (-1 - self._data_plate.dim)
        return self.shared(features.reshape(len(features), *inner, -1), shared)

    def _features(self, batch: Batch) -> Tensor:
        features = call_network(self.encoder, batch.args, batch.kwargs)
        what = type(features).__name__
        if isinstance(features, Tensor):
            if features.ndim == 2 and len(features) == batch.size:
                return features
            what = f"a tensor of shape {tuple(features.shape)}"
        needed = f"features [{batch.size}, F] are needed, a row per datum"
        raise ValueError(f"the encoder returned {what}; {needed}")


def _linear(inputs: int, outputs: int, like: Tensor) -> nn.Linear:
    return nn.Linear(inputs, outputs, device=like.device, dtype=like.dtype)


def _refuse_hidden_parameters(
    model: Program, encoder: Callable[..., Any], features: Tensor
) -> None:
    """Raise ValueError for an encoder whose parameters are neither its own nor the model's."""
    if isinstance(encoder, nn.Module) and next(encoder.parameters(), None) is not None:
        return
    module = module_of(model)
    known = set() if module is None else set(map(id, module.parameters()))
    if hidden := [leaf for key, leaf in leaves_of(features).items() if key not in known]:
        shapes = ", ".join(str(list(leaf.shape)) for leaf in hidden[:5])
        raise ValueError(
            f"the encoder, {type(encoder).__name__!r}, uses parameters that are not its own (of "
            f"{shapes}): no optimizer would find them; pass the network, or a module that has it"
        )
