"""Which mode a guide or a model runs in: the first that agrees with single particles."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

from torch import Tensor

from pyro_vae.particles.modes import MODES
from pyro_vae.particles.run import Runner
from pyro_vae.programs.agreement import agree, largest_gap
from pyro_vae.programs.plain_errors import text_of
from pyro_vae.programs.state import Look, unwrapped
from pyro_vae.programs.types import ModeName, Particles
from pyro_vae.programs.warned_once import warn_once

__all__ = ["UnnamedDrawsError", "choose_mode"]

logger = logging.getLogger(__name__)


class UnnamedDrawsError(ValueError):
    """A model or guide draws random numbers outside of sample statements."""


def choose_mode(
    runner: Runner,
    role: Literal["guide", "model"],
    particles: Particles,
    reference: Tensor,
    score: Callable[[Runner], Tensor],
) -> Runner:
    """Return the runner in the first mode that agrees with single particles.

    Args:
        runner: of a guide or a model.
        role: which of them, for messages.
        particles: the mode that is asked for; "auto" tries all.
        reference: log densities of single particles, run one by one, [K, N].
        score: returns the log densities of the same particles by a runner.

    Raises:
        UnnamedDrawsError: where the same latents have another density in each run.
        ValueError: where no mode agrees.
    """
    reasons: list[str] = []
    for name in _candidates(runner, particles):
        chosen = runner.in_mode(name)
        with Look() as look:
            found = score(chosen)
        if look.error is not None:
            # A shape that the network cannot take, said in its own way; the loop, which is the
            # reference and has already run, is always left to fall back on.
            reasons.append(f"{name}: {type(look.error).__name__}: {text_of(look.error)}")
        elif agree(reference, found):
            if name == "loop" and reasons:
                slow = "the %s runs particle by particle, which is slow: %s"
                warn_once(logger, (unwrapped(runner.program),), slow, role, "; ".join(reasons))
            return chosen
        else:
            gap = largest_gap(reference, found)
            reasons.append(f"{name}: log densities differ from single particles by {gap:.3g} nats")
    if not agree(reference, score(runner.in_mode("loop"))):
        raise UnnamedDrawsError(
            f"the {role} draws random numbers outside of sample statements: its log density of the "
            "same latents is another in each run, and a weight of each draw needs one. Give the "
            "draw a name with pyro.sample, as a latent of its own; or, if it is dropout in "
            f"training mode, call .eval() on the {role}'s modules. A mean over particles (pv.ELBO) "
            "is well defined, and trains it"
        )
    raise ValueError(
        f"the {role}'s log density of several particles does not agree with that of each alone "
        f"({'; '.join(reasons)}): its broadcasting over the particle dimension, the leftmost, is "
        "wrong"
    )


def _candidates(runner: Runner, particles: Particles) -> list[ModeName]:
    """Return the modes to try, in order."""
    if particles == "repeat":
        runner.in_mode("repeat")  # refuses a model that is one datum
    names = list(MODES) if particles == "auto" else [particles]
    if runner.mode.data_dim is None or runner.batch.size is None:
        names = [name for name in names if name != "repeat"] or ["loop"]
    return names
