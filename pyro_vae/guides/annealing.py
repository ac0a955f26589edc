"""Draws of a guide moved by annealed steps: the model's gradient, at draws and in any run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae.families.annealed import Annealed
from pyro_vae.guides.coordinates import Coordinates
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.enumeration import contract, enumerated
from pyro_vae.programs.masks import lift_masks
from pyro_vae.programs.messages import trace_of
from pyro_vae.programs.moved import NOISE_SITE, WORK_SITE, Noise
from pyro_vae.programs.nodes import is_subsample, sample_nodes
from pyro_vae.programs.preimages import DrawByPreimage, Preimage, density
from pyro_vae.programs.pyro_internals import is_deterministic
from pyro_vae.programs.sites import Structure
from pyro_vae.programs.state import evaluation, looking
from pyro_vae.programs.structure import ModelLooks
from pyro_vae.programs.supports import flat_transforms
from pyro_vae.programs.traces import GiveValues, site_log_prob
from pyro_vae.programs.types import Distribution, Node, Trace, Values

_SEED = 0
# From the base's parameters, a site and the unconstrained values before it, to its proposal.
Propose = Callable[[Tensor, Coordinates, Sequence[Tensor]], Distribution]


@dataclass(frozen=True)
class Walked:
    """Draws at the end of their steps.

    Attributes:
        draws: by site, in unconstrained coordinates, in the site's shape.
        gained: by log w on the way, in the batch shape of the noise.
    """

    draws: Mapping[str, Tensor]
    gained: Tensor

    def score(self) -> None:
        """Make the statement that takes what was gained out of log q."""
        point = pyro.distributions.Delta(torch.zeros_like(self.gained), log_density=-self.gained)
        pyro.sample(WORK_SITE, point, infer={"is_auxiliary": True})


@dataclass(frozen=True)
class _Lead:
    """Where particles are among the batch dimensions of a run.

    Attributes:
        count: K, of all dimensions left of the data's.
        dim: theirs, negative.
        ndim: batch dimensions of the run's noise.
    """

    count: int
    dim: int
    ndim: int

    @classmethod
    def of(cls, noise: Tensor, data_dim: int | None) -> _Lead:
        """Return that of noise ``[*particles, *batch, M]``."""
        ndim = noise.ndim - 1
        lead = noise.shape[: ndim + (data_dim or 0)]
        place = next((axis for axis, size in enumerate(lead) if size > 1), 0)
        return cls(math.prod(lead), place - ndim, ndim)

    def place(self, value: Tensor, batch_ndim: int) -> Tensor:
        """Return a site's value ``[K, *batch, *event]`` with particles where the run's are."""
        ndim = max(self.ndim, batch_ndim)
        ahead = [1] * (ndim - batch_ndim)
        if self.count > 1:
            ahead[ndim + self.dim] = self.count
        return value.reshape((*ahead, *value.shape[1:]))


class _InPlate(Messenger):
    """Says of sites that they lie in a plate of particles, over which nothing is to be summed.

    The run's own such plate is not seen from inside, and has the dimension taken.
    """

    def __init__(self, lead: _Lead) -> None:
        super().__init__()
        count = lead.count
        self._frame = CondIndepStackFrame("_particles", lead.dim, count, 0, count)

    def _pyro_sample(self, msg: Node) -> None:
        if not is_subsample(msg):
            msg["cond_indep_stack"] = (*msg["cond_indep_stack"], self._frame)


class Annealing:
    """What a guide of the family Annealed knows of its model.

    Args:
        looks: what runs of the model have shown.
        structure: of the model.
        coordinates: where each latent site's coordinates lie.
        family: with steps.
        propose: the base's proposal of a site.

    Raises:
        ValueError: for a model that draws its own minibatch.
    """

    def __init__(
        self,
        looks: ModelLooks,
        structure: Structure,
        coordinates: tuple[Coordinates, ...],
        family: Annealed,
        propose: Propose,
    ) -> None:
        plate = structure.data_plate
        if plate is not None and plate.drawn:
            raise ValueError(
                f"the model draws its own minibatch in plate {plate.name!r}, and {family!r} runs "
                "the model at its draws, on rows that it must know. Pass the minibatch as the "
                "batch, with pyro.plate(name, num_data, subsample=x)"
            )
        self.model, self.family, self._coordinates = looks.model, family, coordinates
        self._propose, self._size = propose, coordinates[-1].columns.stop
        self._data_dim, self._nesting = structure.data_dim, structure.nesting
        latents = (*structure.local_latents, *structure.global_latents)
        self._discrete = tuple(site.name for site in latents if site.enumerable)
        self._shared = {s.name: s.value for s in structure.global_latents if plate is not None}

    def draw_noise(self, like: Tensor) -> Tensor:
        """Make the statement of the noise, in the plate of the data; return it."""
        fn = Noise(self.family.num_noise(self._size), like)
        noise: Tensor = pyro.sample(NOISE_SITE, fn, infer={"is_auxiliary": True})
        return noise

    def noise_value(self, noise: Tensor, num_data: int) -> Tensor:
        """Return noise [K, M], alike for each datum, as a single run has it, ``[K, *batch, M]``."""
        inner = [] if self._data_dim is None else [num_data, *[1] * (-1 - self._data_dim)]
        return noise.reshape(len(noise), *[1] * len(inner), -1).expand(-1, *inner, -1)

    def walk(self, batch: Batch, shared: Values, params: Tensor, noise: Tensor) -> Walked:
        """Return the draws that are made of noise, moved.

        Args:
            batch: arguments of the model.
            shared: values of the global latents.
            params: of the family, [N, P].
            noise: of a run, in which plates its data and particles lie.
        """
        lead, size = _Lead.of(noise, self._data_dim), self._size
        rows = noise.reshape(lead.count, len(params), -1)
        own = self.family.base_params(params, size)

        def slope(u: Tensor) -> Tensor:
            goes_on = torch.is_grad_enabled()
            with torch.enable_grad():
                at = u if goes_on and u.requires_grad else u.detach().requires_grad_()
                draws = self._draws(own, at, lead)
                with pyro.validation_enabled(False):
                    ratio = torch.stack(
                        list(self._terms(batch, shared, own, draws, lead).values())
                    ).sum()
                (found,) = torch.autograd.grad(ratio, [at], create_graph=goes_on)
            return found if goes_on else found.detach()

        u, gained = self.family.walk(params, size, rows, slope)
        return Walked(self._draws(own, u, lead), gained.reshape(noise.shape[:-1]))

    def _draws(self, own: Tensor, u: Tensor, lead: _Lead) -> dict[str, Tensor]:
        """Return the unconstrained values of sites that the base makes of noise [K, N, M]."""
        z = self.family.base.from_noise(own, self._size, u)
        return {
            c.name: lead.place(c.arrange(c.spread(z[..., c.columns])), len(c.batch))
            for c in self._coordinates
        }

    def _terms(
        self, batch: Batch, shared: Values, own: Tensor, draws: Values, lead: _Lead
    ) -> dict[tuple[str, ...], Tensor]:
        """Return log p(x, z) less log q_0(z), each a sum over particles and data, by sites.

        Without scales: steps are those of one datum, whatever it counts for.
        """
        preimages = {
            c.name: Preimage(draws[c.name], tuple(flat_transforms([c.transform])))
            for c in self._coordinates
        }
        values = {c.name: c.value(draws[c.name]) for c in self._coordinates}
        trace, found = self._of_model(batch, {**shared, **values}, preimages, lead)
        terms = {names: term.sum() for names, term in found.items()}
        before: list[Tensor] = []
        for c in self._coordinates:
            fn = self._propose(own, c, before)
            log_prob = density(fn, values[c.name], preimages[c.name])
            # A latent that the model masks is not there, nor is its proposal.
            mask = trace.nodes[c.name]["mask"]
            terms["guide", c.name] = -scale_and_mask(log_prob, mask=mask).sum()
            before.append(c.flatten(draws[c.name]))
        return terms

    def _of_model(
        self, batch: Batch, values: Values, preimages: Mapping[str, Preimage], lead: _Lead
    ) -> tuple[Trace, dict[tuple[str, ...], Tensor]]:
        """Run the model at values, unseen, in eval mode; return its trace and log densities."""
        discrete = [name for name in self._discrete if name not in values]
        kept = {name: one for name, one in preimages.items() if one.transforms}
        nesting = max(
            [self._nesting, *(values[c.name].ndim - len(c.event) for c in self._coordinates)]
        )
        program = GiveValues(values, kept)(enumerated(self.model, discrete, -1 - nesting))
        if discrete and lead.count > 1:
            program = _InPlate(lead)(program)
        # Modules that draw random numbers, or look at other data, would push draws by these.
        with evaluation(self.model), poutine.block(), DrawByPreimage():
            trace = lift_masks(trace_of(program, batch), discrete)
            nodes = {n: at for n, at in sample_nodes(trace) if not is_deterministic(at)}
            terms = {name: site_log_prob(name, at) for name, at in nodes.items()}
            if discrete:
                return trace, contract(trace, terms, nesting)
        return trace, {(name,): term for name, term in terms.items()}

    def check_slopes(self, params: Tensor, batch: Batch, num_data: int) -> None:
        """Raise ValueError for densities of the model that steps get no, or too few, slopes of.

        Args:
            params: of the family, [P].
            batch: the model's arguments.
            num_data: N, of the batch.
        """
        own = self.family.base_params(params.expand(num_data, -1), self._size)
        lead = _Lead(1, 0, -(self._data_dim or 0))

        def terms(u: Tensor) -> dict[tuple[str, ...], Tensor]:
            torch.manual_seed(_SEED)  # first values of parameters may be drawn
            return self._terms(batch, self._shared, own, self._draws(own, u, lead), lead)

        with looking(self.model, device=params.device, gradients=True):
            torch.manual_seed(_SEED)
            shape = 2, 1, num_data, self.family.base.num_noise(self._size)
            u, other = torch.randn(shape, dtype=params.dtype, device=params.device)
            u.requires_grad_()
            found, elsewhere = terms(u), terms(other)
            for names, term in found.items():
                if _slope(term, u) is None and not torch.equal(term, elsewhere[names]):
                    raise ValueError(
                        f"the log density of {list(names)} depends on the latents and has no "
                        f"derivative by them, which the steps of {self.family!r} follow: write it "
                        "in PyTorch's differentiable operations, or take the base alone"
                    )
            self._check_twice(torch.stack(list(found.values())).sum(), u)

    def _check_twice(self, ratio: Tensor, u: Tensor) -> None:
        """Raise ValueError where a slope has no derivative, as training needs."""
        (slope,) = torch.autograd.grad(ratio, [u], create_graph=True)
        seen, stack = set(), [slope.grad_fn]
        while stack:
            function = stack.pop()
            if function is None or function in seen:
                continue
            # PyTorch puts it where a derivative is missing; gradients by u alone go past it.
            if function.name().endswith(("Error", "NotImplemented")):
                raise ValueError(
                    "the model's log density has an operation without second derivatives, by which "
                    f"training moves the steps of {self.family!r}: write it in PyTorch's own "
                    "operations, or take the base alone"
                )
            seen.add(function)
            stack.extend(before for before, _ in function.next_functions)


def _slope(term: Tensor, u: Tensor) -> Tensor | None:
    """Return the gradient of a number; None where it has none."""
    if not term.requires_grad:
        return None
    found: Sequence[Tensor | None] = torch.autograd.grad(
        term, [u], retain_graph=True, allow_unused=True
    )
    return found[0]
