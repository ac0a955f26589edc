r"""Expectation-maximisation: coordinate ascent of the ELBO in q, then in the model's parameters.

.. math::
    \log p_\theta(x) \ge \mathrm{ELBO}(q, \theta)
    = \mathbb{E}_q[\log p_\theta(x, z)] + \mathrm{H}[q]

The E-step raises it in q alone, the M-step in the model's parameters alone (Neal & Hinton 1998).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae.guides.exact import ExactGuide
from pyro_vae.guides.local import LocalGuide
from pyro_vae.programs.batch import Batch, as_batch
from pyro_vae.programs.messages import as_count
from pyro_vae.programs.sites import Structure
from pyro_vae.programs.state import preserved_rng
from pyro_vae.programs.structure import ModelLooks
from pyro_vae.programs.types import DataPlate, Program
from pyro_vae.training.e_steps import E_STEPS, EStep, Problem, StepELBO
from pyro_vae.training.optimizers import drop_gradients, make_optimizer
from pyro_vae.training.parameters import Parameters, all_finite

logger = logging.getLogger(__name__)

EMStop: TypeAlias = Literal["tolerance", "noise", "num_iterations", "interrupted"]
HalfStep: TypeAlias = Literal["E", "M"]

_WINDOW = 5  # iterations over which a gain must show above its error


@dataclass(frozen=True)
class EMResult:
    """The result of :func:`pyro_vae.em`.

    Attributes:
        history: equally long lists, one entry per half-step: iteration (0 is the start),
            half_step ("E" or "M"), elbo and elbo_std_error (in nats per datum; Monte
            Carlo standard error, 0 where nothing was drawn).
        stopped_by: "tolerance", "noise", "num_iterations" or "interrupted".
        iterations: M-steps taken.
        elapsed: seconds.
    """

    history: Mapping[str, list[Any]]
    stopped_by: EMStop
    iterations: int
    elapsed: float

    @property
    def converged(self) -> bool:
        """Whether an iteration gained less than the tolerance, its error included."""
        return self.stopped_by == "tolerance"

    @property
    def elbo(self) -> float:
        """The ELBO after the last half-step, in nats per datum; nan where there was none."""
        return float(self.history["elbo"][-1]) if self.history["elbo"] else math.nan

    @property
    def elbo_std_error(self) -> float:
        """Its Monte Carlo standard error."""
        return float(self.history["elbo_std_error"][-1]) if self.history["elbo"] else math.nan

    def __repr__(self) -> str:
        return (
            f"EMResult(stopped_by={self.stopped_by!r}, iterations={self.iterations}, "
            f"elapsed={self.elapsed:.1f}s, elbo={self.elbo:.4f})"
        )


class NonFiniteHalfStepError(ArithmeticError):
    """EM met an ELBO or a gradient that is not finite, and stopped.

    The model keeps the parameters of the last good half-step.

    Attributes:
        half_step: "E" or "M".
        iteration: counted from 1; 0 for the first E-step.
    """

    def __init__(self, message: str, half_step: HalfStep, iteration: int) -> None:
        super().__init__(message)
        self.half_step = half_step
        self.iteration = iteration


def em(
    model: Program,
    guide: Program,
    *batch: Any,
    e_step: Literal["auto", "exact", "variational", "importance", "nuts"] = "auto",
    num_iterations: int = 100,
    tolerance: float = 1e-6,
    num_particles: int = 100,
    e_steps: int | None = None,
    m_steps: int = 100,
    optim: Any = None,
    seed: int | None = 0,
    progress: bool = True,
    data_plate: DataPlate = None,
) -> EMResult:
    r"""Estimate a model's parameters by expectation-maximisation on all the data at once.

    Alternates two half-steps on one objective, the ELBO:

    - E: the guide, with the model's parameters fixed. With an ExactGuide it becomes the exact
      posterior (EM, Dempster, Laird & Rubin 1977). A LocalGuide is refined from its present
      rows (variational EM; with families.Delta, MAP or hard EM, whose "ELBO" is
      :math:`\log p(x, \hat z)` and no bound).
      "importance" weights draws of any guide into the posterior, and "nuts" draws from it
      (Monte Carlo EM, Wei & Tanner 1990); the guide itself stays as it is.
    - M: the model's parameters, with q fixed, so that the objective is deterministic.
      L-BFGS, until no more is to be gained.

    An M-step that does not raise its objective is undone. With exact E-steps the ELBO
    therefore never decreases, and after each is log p(x); with the others it may, by
    their Monte Carlo error. Runs start and end with an E-step, so that guide and
    parameters belong together. What is found is a local optimum.

    The model's parameters are changed in place, from their present values: those of its
    modules, of pyro.param and of pyro.module. Modules run in eval mode.

    Args:
        model: a Pyro model with parameters, without global latents.
        guide: an ExactGuide, a LocalGuide, or any guide with a density for "importance"
            and "nuts", where it proposes, and measures log p(x).
        *batch: their arguments, all the data.
        e_step: "exact", "variational", "importance" or "nuts"; "auto" is "exact" for an
            ExactGuide and "variational" for a LocalGuide.
        num_iterations: M-steps at most.
        tolerance: in nats per datum: an iteration that gains less, two standard errors
            included, ends the run.
        num_particles: draws for each datum of an E-step that draws.
        e_steps: of :func:`pyro_vae.refine` in a variational E-step, at most (100); of the
            adaptation of NUTS (50).
        m_steps: of the optimizer in an M-step, at most.
        optim: as in :func:`pyro_vae.fit`, but of the model's parameters; torch's L-BFGS by
            default.
        seed: of everything random in here; None takes one from the global random state.
        progress: whether to show a bar.
        data_plate: as in :func:`pyro_vae.log_weights`.

    Returns:
        An EMResult: the ELBO after each half-step, with its standard error. ``stopped_by`` is
        "tolerance"; "noise", where five iterations together gained no more than two
        standard errors, so that more particles would be needed to go on;
        "num_iterations"; or "interrupted".

    Raises:
        NonFiniteHalfStepError: naming half-step and iteration; the parameters are those of
            the last good half-step.
        ValueError: for a model without parameters, or with global latents, a minibatch, a
            guide that the E-step cannot use, and numbers out of range.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> import pyro_vae as pv
        >>> def model(x):
        ...     mean = pyro.param("mean", torch.tensor(0.0, dtype=torch.float64))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(mean, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
        >>> guide = pv.LocalGuide(model, num_data=3, example=x)
        >>> result = pv.em(model, guide, x, num_iterations=3, e_steps=100, progress=False)
        >>> result.history["half_step"]
        ['E', 'M', 'E', 'M', 'E', 'M', 'E']
    """
    num_iterations = as_count("num_iterations", num_iterations)
    num_particles = as_count("num_particles", num_particles)
    e_steps = None if e_steps is None else as_count("e_steps", e_steps)
    m_steps = as_count("m_steps", m_steps)
    if not tolerance > 0:
        raise ValueError(f"tolerance={tolerance}: a positive number of nats is needed")
    kind = _kind(e_step, guide)
    data = as_batch(*batch)
    structure = ModelLooks(model, data).structure(data_plate)
    _check_model(structure, kind)
    parameters = _parameters(model, structure, data)
    seed = int(torch.randint(2**31, ()).item()) if seed is None else int(seed)
    problem = Problem(model, guide, data, structure, data_plate, num_particles, e_steps, seed)
    e = E_STEPS[kind](problem)
    run = _Run(e, parameters, optim, m_steps)
    with preserved_rng(data.device):
        try:
            stopped_by = run.loop(num_iterations, tolerance, progress)
            for text in () if stopped_by == "interrupted" else e.doubts():
                logger.warning("em: in the last E-step, %s", text)
        finally:
            e.close()
    elapsed = time.perf_counter() - run.begin
    return EMResult(run.history, stopped_by, run.iterations, elapsed)


def _kind(e_step: str, guide: Program) -> str:
    """Return the kind of E-step; raise ValueError where "auto" has none for this guide."""
    if isinstance(e_step, str) and e_step in E_STEPS:
        return e_step
    if e_step != "auto":
        raise ValueError(f"e_step={e_step!r}: one of {('auto', *E_STEPS)} is needed")
    if isinstance(guide, ExactGuide):
        return "exact"
    if isinstance(guide, LocalGuide):
        return "variational"
    raise ValueError(
        f"e_step='auto' is for an ExactGuide or a LocalGuide, found {type(guide).__name__}: choose "
        "e_step='importance' or 'nuts', or train model and guide together with pyro_vae.fit"
    )


def _check_model(structure: Structure, kind: str) -> None:
    """Raise ValueError for global latents, minibatches, and scales that an E-step cannot carry."""
    structure.require_no_globals()
    for plate in (plate for site in structure.sites.values() for plate in site.plates):
        if plate.drawn or plate.size != plate.full_size:
            raise ValueError(
                f"plate {plate.name!r} holds {plate.size} of {plate.full_size} entries: EM takes "
                "all data at once; pass them without subsampling, or train with pyro_vae.fit"
            )
    for site in structure.sites.values():
        if kind != "exact" and bool((torch.as_tensor(site.scale) != 1).any()):
            raise ValueError(
                f"site {site.name!r} has the scale {site.scale} (poutine.scale), which the draws "
                f"of e_step={kind!r} do not carry; leave it out, or use an ExactGuide"
            )


def _parameters(model: Program, structure: Structure, batch: Batch) -> Parameters:
    """Return the parameters of the model alone."""

    def points(*args: Any, **kwargs: Any) -> None:
        for site in structure.sites.values():
            if site.kind != "observed":
                point = dist.Delta(site.value, event_dim=len(site.event_shape))
                pyro.sample(site.name, point)

    try:
        parameters = Parameters(model, points, batch)
    except ValueError as error:
        error.add_note("em estimates the parameters of the model, not those of the guide")
        raise
    parameters.initialize()
    return parameters


class _Run:
    """The alternation, and its record; an M-step raises the objective, or leaves all alone."""

    def __init__(self, e_step: EStep, parameters: Parameters, optim: Any, m_steps: int) -> None:
        self.e_step, self.parameters, self.m_steps = e_step, parameters, m_steps
        self.optimizer = None if optim is None else make_optimizer(optim, parameters.trained)
        names = ("iteration", "half_step", "elbo", "elbo_std_error")
        self.history: dict[str, list[Any]] = {name: [] for name in names}
        self.iterations, self.begin = 0, time.perf_counter()

    def loop(self, num_iterations: int, tolerance: float, progress: bool) -> EMStop:
        """Alternate half-steps; return the reason for ending."""
        try:
            with tqdm(total=num_iterations, disable=not progress, unit="iteration") as bar:
                estimates = [self._record(0, "E", self.e_step.update(0))]
                for iteration in range(1, num_iterations + 1):
                    self._m_step(iteration)
                    self.iterations = iteration
                    with self._undone_on_error():
                        self._record(iteration, "M", self.e_step.estimate())
                    found = self._record(iteration, "E", self.e_step.update(iteration))
                    estimates = [*estimates, found][-_WINDOW - 1 :]
                    bar.update()
                    bar.set_postfix(ELBO=f"{found.mean:.4f}")
                    gain, error = found.gain(estimates[-2])
                    if gain + 2 * error < tolerance:
                        return "tolerance"
                    gain, error = found.gain(estimates[0])
                    if error > 0 and len(estimates) > _WINDOW and gain < 2 * error:
                        return "noise"
        except KeyboardInterrupt:
            text = "interrupted in iteration %d; the model keeps the last whole M-step's parameters"
            logger.warning(text, self.iterations + 1)
            return "interrupted"
        return "num_iterations"

    def _record(self, iteration: int, half_step: HalfStep, estimate: StepELBO) -> StepELBO:
        if not math.isfinite(estimate.mean):
            raise _failure(f"the ELBO ({estimate.mean})", half_step, iteration)
        row = (iteration, half_step, estimate.mean, estimate.std_error)
        for name, value in zip(self.history, row, strict=True):
            self.history[name].append(value)
        return estimate

    def _m_step(self, iteration: int) -> None:
        """Maximise the objective; restore the parameters on an error or where nothing is gained."""
        objective = self.e_step.objective
        with torch.no_grad():
            before = float(objective().detach())
        self._state = self.parameters.state()
        with self._undone_on_error(), pyro.validation_enabled(False):
            self._climb(before, iteration)
            if not self.parameters.finite():
                raise _failure("a parameter", "M", iteration)
            with torch.no_grad():
                after = float(objective().detach())
            if math.isnan(after):
                raise _failure("the objective", "M", iteration)
        if not after > before:
            self.parameters.restore(self._state)

    def _climb(self, before: float, iteration: int) -> None:
        """Move the parameters; ``before`` is the objective where they are."""
        trained, calls = self.parameters.trained, 0

        def closure() -> float:
            nonlocal calls
            calls += 1
            try:
                loss, gradients = self._differentiate(iteration)
            except (NonFiniteHalfStepError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
                if calls == 1 or self.optimizer is not None:
                    raise
                # A trial of the line search that went too far: a height turns it back, where
                # nan would be taken for a value.
                loss, gradients = 1e6 * (1 + abs(before)) - before, [None] * len(trained)
            for parameter, gradient in zip(trained, gradients, strict=True):
                if gradient is None:
                    gradient = torch.zeros_like(parameter)
                parameter.grad = gradient.contiguous()  # torch's L-BFGS takes views of it
            return loss

        if self.optimizer is None:
            torch.optim.LBFGS(
                trained,
                max_iter=self.m_steps,
                tolerance_grad=1e-9,
                tolerance_change=1e-12,
                history_size=20,
                line_search_fn="strong_wolfe",
            ).step(closure)
            return
        for _ in range(self.m_steps):
            self.optimizer.step(closure)

    def _differentiate(self, iteration: int) -> tuple[float, list[Tensor | None]]:
        """Return minus the objective and its gradients, None for unused parameters."""
        loss = -self.e_step.objective()
        gradients = torch.autograd.grad(loss, self.parameters.trained, allow_unused=True)
        found = [gradient for gradient in gradients if gradient is not None]
        if not bool(torch.isfinite(loss)) or not all_finite(found):
            raise _failure("the objective or its gradient", "M", iteration)
        if not found:
            raise ValueError("the ELBO does not depend on any parameter of the model")
        return float(loss.detach()), list(gradients)

    @contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        """Go back to the parameters before the last M-step if anything is raised inside."""
        try:
            yield
        except BaseException:  # an interruption by the user too
            self.parameters.restore(self._state)
            raise
        finally:
            drop_gradients(self.parameters.trained)


def _failure(what: str, half_step: HalfStep, iteration: int) -> NonFiniteHalfStepError:
    """Return the error for a quantity that is not finite in a half-step."""
    where = f"the {half_step}-step of iteration {iteration}"
    kept = "The model keeps the parameters of the last good half-step"
    text = f"{what} is not finite in {where}. {kept}. Try another start, float64, or bound scales"
    return NonFiniteHalfStepError(text, half_step, iteration)
