"""Random programs against log densities in plain torch: no number is silently wrong.

Each seed is a program of :mod:`fuzz_programs`; what it comes to is worked out by
:mod:`fuzz_answers`, from the draws that were made. A ValueError that names what is wrong is a
refusal; refusals are counted, and programs without anything unusual must not be refused.

    PYRO_VAE_FUZZ=2000 pytest -m slow tests/patterns/test_fuzz.py         # as many programs
    PYRO_VAE_FUZZ=1 PYRO_VAE_FUZZ_SEED=1234 pytest -m slow ...   # program 1234 alone
"""

from __future__ import annotations

import collections
import contextlib
import copy
import logging
import math
import os
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.infer
import pyro.optim
import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.programs.batch import as_batch
from tests.patterns import fuzz_answers
from tests.patterns.fuzz_answers import Answer
from tests.patterns.fuzz_programs import ENUMERABLE, default_dtype, generate

# Programs of a run, dealt out to test items so that processes can share them.
COUNT = int(os.environ.get("PYRO_VAE_FUZZ", "400"))
FIRST = int(os.environ.get("PYRO_VAE_FUZZ_SEED", "0"))
ITEMS = min(COUNT, 10)

# What may be refused: words of the message, and traits of a program, one of which it must have.
EXCUSES = {
    "data plate is not plain": ("inner",),
    "draws its own minibatch": ("plate_drawn",),
    "cannot be reparameterized": ("proposed",),
    "which lies in the plate": ("mean",),
    "no expectation entry by entry": ("mean", "drop_dims", "latent_mask"),
    "at once differs": ("mean", "drop_dims", "latent_mask"),
    "are connected by discrete latents": ("scales",),
    "outside the data plate": ("global",),
    "the loss is infinite": ("wider",),
    "the model's density is zero": ("wider",),
    "no latent site is continuous": ("summed", "proposed", "enumerated"),
    "no latent site": ("no latents",),
    "needs one scale for all latent sites": ("scales",),
    "that the model masks": ("free_mask",),
    "depends on": ("latent_mask", "enumerated", "mean"),
    "several particles does not agree": ("drop_dims", "mean"),
    "is no plate's": ("drop_dims",),
}

# The share of what was asked that may be refused, and of how much at least it is one.
REFUSED, ASKED = 0.3, 100


@dataclass
class Outcome:
    """What became of the checks of some programs."""

    answered: collections.Counter[str] = field(default_factory=collections.Counter)
    refused: collections.Counter[str] = field(default_factory=collections.Counter)
    discrepancies: list[str] = field(default_factory=list)
    reasons: collections.Counter[str] = field(default_factory=collections.Counter)

    def add(self, other: Outcome) -> None:
        self.answered += other.answered
        self.refused += other.refused
        self.discrepancies += other.discrepancies
        self.reasons += other.reasons


class Checks:
    """The checks of one program."""

    def __init__(self, seed: int) -> None:
        self.program = generate(seed)
        self.rng = random.Random(seed + 10**6)
        self.outcome = Outcome()
        model: Callable[..., Any] = self.program.model
        self.model = pv.MissingData(model) if self.program.missing else model
        self.guide = self.program.guide
        double = self.program.dtype == torch.float64
        self.tolerance = 1e-8 if double else 2e-5
        self.whole = any(not site.local for site in self.program.latents)

    def run(self) -> Outcome:
        """Make a random part of all checks."""
        program = self.program
        pyro.clear_param_store()
        with default_dtype(program.dtype), quiet():
            torch.manual_seed(program.seed)
            with torch.no_grad():
                try:
                    program.guide(*program.positional)
                    program.model(*program.positional)
                except ValueError:  # a draw outside of the support of the other
                    pass
            self.attempt("log_weights", self.log_weights)
            if self.rng.random() < 0.4:
                self.attempt("bounds", self.bounds)
            for loss in self.rng.sample(self.losses(), 2):
                if self.rng.random() < 0.9 and not self.differentiable(loss):
                    continue
                self.attempt(repr(loss), lambda loss=loss: self.loss(loss))
            if self.rng.random() < 0.12:
                self.attempt("CompiledSVI", self.steps)
            if self.rng.random() < 0.4:
                self.attempt("evidence", self.evidence)
            if self.rng.random() < 0.12:
                self.attempt("families", self.families)
        return self.outcome

    def attempt(self, name: str, check: Callable[[], None]) -> None:
        """Make a check; sort what it raises."""
        kind = name.split("(")[0]
        try:
            check()
        except ValueError as error:
            text = str(error)
            if not legitimate(text):
                self.found(name, f"unclear ValueError: {text[:300]}")
            elif not self.excused(text):
                self.found(name, f"refused, though nothing asks for it: {text[:300]}")
            self.outcome.refused[kind] += 1
            self.outcome.reasons[f"{kind}: {text[:70]}"] += 1
        except Exception as error:  # noqa: BLE001 - any other error is what is looked for
            self.found(name, f"{type(error).__name__}: {str(error)[:300]}")
        else:
            self.outcome.answered[kind] += 1

    def excused(self, text: str) -> bool:
        """Whether a program has the trait that a refusal speaks of."""
        corners = {*self.program.corners, *([] if self.program.latents else ["no latents"])}
        corners |= {"inner"} if self.program.inner else set()
        return any(words in text and corners & set(causes) for words, causes in EXCUSES.items())

    def found(self, check: str, what: str) -> None:
        self.outcome.discrepancies.append(f"[{self.program.seed}] {check}: {what}\n{self.program}")

    def compare(
        self, check: str, found: Tensor, wanted: Tensor, size: Tensor | float = 1.0
    ) -> None:
        """Note where two tensors differ by more than rounding of terms of a size."""
        found, wanted = torch.broadcast_tensors(found.detach().double(), wanted.detach().double())
        # A part of a density of zero, such as log p(x, z) - log p(z), need not be a number.
        known = ~wanted.isnan()
        scale = self.tolerance * (10.0 + wanted.abs().nan_to_num(posinf=0.0) + size)
        equal = ~known | (found == wanted) | ((found - wanted).abs() <= scale)
        if not bool(equal.all()):
            where = torch.nonzero(~equal)[0].tolist()
            place = tuple(where)
            self.found(check, f"{found[place]:.8g}, right {wanted[place]:.8g} at {where}")

    def parameters(self) -> dict[str, Tensor]:
        return {name: pyro.param(name) for name in pyro.get_param_store()}

    # --- evaluation

    def evaluator(self, seed: int, **options: Any) -> Evaluator:
        plate: Any = False if self.whole else "data"
        options = {"data_plate": plate, **options}
        return Evaluator(
            self.model, self.guide, as_batch(*self.program.positional), seed=seed, **options
        )

    def options(self) -> dict[str, Any]:
        particles = self.rng.choice(["auto", "auto", "loop"])
        compiled = self.rng.choice([False, False, "auto", "replay"])
        plate: Any = False if self.whole else self.rng.choice(["data", "data", None])
        return {"particles": particles, "compile": compiled, "data_plate": plate}

    def drawn(self, seed: int, num_particles: int, **options: Any) -> dict[str, Tensor]:
        """Return the draws behind the log weights of a seed, in the answer's layout."""
        values: dict[str, list[list[Tensor]]] = {}
        evaluator = self.evaluator(seed, **options)
        last = -1
        for chunk in evaluator.chunks(num_particles):
            for name, value in chunk.values.items():
                blocks = values.setdefault(name, [])
                if chunk.rows.start != last:
                    blocks.append([])
                blocks[-1].append(value)
            last = chunk.rows.start
        found = {}
        for name, blocks in values.items():
            if name not in self.program.proposed:
                continue
            site = self.program.site(name)
            events = 1 if site.size else 0
            nesting = self.program.nesting
            canonical = [
                self.program.from_batch(torch.cat(pieces), events, nesting) for pieces in blocks
            ]
            found[name] = torch.cat(canonical, 1) if site.local else canonical[0]
        return found

    def log_weights(self) -> None:
        program, options = self.program, self.options()
        num_particles, seed = self.rng.choice([1, 2, 5]), self.rng.randrange(1000)
        chunk_size = self.rng.choice([None, None, 1, 4])
        weights = pv.log_weights(
            self.model,
            self.guide,
            *program.positional,
            num_particles=num_particles,
            seed=seed,
            chunk_size=chunk_size,
            **options,
        )
        options["data_plate"] = False if self.whole else "data"
        values = self.drawn(seed, num_particles, **options)
        right = Answer(program, self.parameters()).log_weights(values)
        label = f"log_weights(K={num_particles}, chunk_size={chunk_size}, {options})"
        parts = ("log_likelihood", "log_prior", "log_guide")
        size = sum(right[part].abs().nan_to_num(posinf=0.0) for part in parts)
        if self.whole:
            size = size.sum(1, keepdim=True)
            right = {name: value.sum(1, keepdim=True) for name, value in right.items()}
            right["log_prior"] = right["log_prior"] + right["shared_prior"]
            right["log_guide"] = right["log_guide"] + right["shared_guide"]
            right["total"] = right["total"] + right["shared"]
        possible = bool(right["total"].isfinite().all())
        for part in (*parts, "total") if possible else ("total",):
            self.compare(f"{label}.{part}", getattr(weights, part), right[part], size)

    def bounds(self) -> None:
        options = self.options()
        seed, num_particles = self.rng.randrange(1000), self.rng.choice([1, 7, 50])
        arguments = (self.model, self.guide, *self.program.positional)
        options |= {"num_particles": num_particles, "seed": seed}
        total = pv.log_weights(*arguments, **options).total.double()
        chunked = options | {"chunk_size": self.rng.choice([None, 3, 100])}
        elbo, iwae = pv.elbo(*arguments, **chunked), pv.iwae_bound(*arguments, **chunked)
        self.compare(f"elbo {chunked}", elbo.value, total.mean(0))
        self.compare(f"iwae {chunked}", iwae.value, total.logsumexp(0) - math.log(num_particles))
        if num_particles > 1 and bool(total.isfinite().all()):
            # Few particles may be told more; less than their own spread, never.
            error = total.std(0) / num_particles**0.5
            short = torch.minimum(elbo.std_error.double(), error)
            self.compare(f"elbo se {chunked}", short, error)

    def evidence(self) -> None:
        exact = fuzz_answers.evidence(self.program, self.parameters())
        if exact is None:
            return
        options = {"num_particles": 1000, "seed": self.rng.randrange(1000), "data_plate": "data"}
        arguments = (self.model, self.guide, *self.program.positional)
        self.below("iwae_bound", pv.iwae_bound(*arguments, **options), exact)
        self.below("elbo", pv.elbo(*arguments, **options), exact)

    def below(self, name: str, bound: Any, exact: Tensor) -> None:
        """Note a bound above log p(x) by more than five standard errors."""
        allowed = 5 * bound.std_error.double().nan_to_num(nan=0.0) + 1e-4 * (10 + exact.abs())
        over = bound.value.double() - exact - allowed
        if bool((over > 0).any()):
            n = int(over.argmax())
            value, error = bound.value[n].item(), bound.std_error[n].item()
            self.found(name, f"{value:.6g} +- {error:.2g} above log p(x) = {exact[n].item():.6g}")

    def families(self) -> None:
        """Check a guide of ours: its bounds, and a factorized Gaussian's density."""
        program = self.program
        if any(site.family == "poisson" for site in program.latents) or program.missing:
            return
        family = self.rng.choice([pv.families.Normal, pv.families.FullRankNormal])()
        plate: Any = None if self.whole else "data"
        local = pv.LocalGuide(
            self.model,
            num_data=program.num_data,
            example=program.positional,
            family=family,
            data_plate=plate,
        )
        with torch.no_grad():
            local.table.add_(0.3 * torch.randn_like(local.table))
        options = {"num_particles": 1000, "seed": 1, "data_plate": "data"}
        exact = fuzz_answers.evidence(program, self.parameters())
        arguments = (self.model, local, *program.positional)
        iwae = pv.iwae_bound(*arguments, **options)
        elbo = pv.elbo(*arguments, **options)
        if exact is not None:
            self.below(f"iwae_bound of {local!r:.40}", iwae, exact)
            self.below(f"elbo of {local!r:.40}", elbo, exact)

    # --- training

    def losses(self) -> list[Any]:
        k = self.rng.choice([1, 2, 4])
        loop = self.rng.random() < 0.3
        kwargs: dict[str, Any] = {"vectorize_particles": not loop}
        if not self.whole:
            kwargs["data_plate"] = "data"
        return [
            pv.ELBO(k, kl="sample", **kwargs),
            pv.ELBO(k, **kwargs),
            pv.ELBO(k, estimator="stl", **kwargs),
            pv.ELBO(k, estimator="score", kl="sample", **kwargs),
            pv.IWAE(k, **kwargs),
            pv.IWAE(k, estimator="stl", **kwargs),
            pv.IWAE(k, estimator="dreg", **kwargs),
            pv.WakeSleep(max(k, 2), **kwargs),
        ]

    def differentiable(self, loss: Any) -> bool:
        """Whether a loss has gradients of what the guide draws."""
        if isinstance(loss, pv.WakeSleep) or getattr(loss, "estimator", "") == "score":
            return True
        discrete = [s for s in self.program.guide_sites if s.family in (*ENUMERABLE, "poisson")]
        return all(site.enumerate for site in discrete)

    def recorded(
        self, num_particles: int, enumerated: tuple[str, ...], *, shared: bool
    ) -> tuple[dict[str, Tensor], Any]:
        """Return what the guide drew in the last call of a loss, and the rows that it saw."""
        program = self.program
        # A draw of latents that all data share comes before those of the particles.
        runs = program.runs[1:] if shared else program.runs
        first = runs[0]["values"]
        nesting = program.nesting
        drawn = [site for site in program.guide_sites if site.name not in enumerated]
        lead, repeat = 1, False
        for site in drawn:
            value = program.from_batch(first[site.name], int(site.size > 0), nesting)
            lead = max(lead, value.shape[0])
            repeat |= site.local and value.shape[1] == num_particles * program.num_data
        together = num_particles == 1 or lead == num_particles
        repeat = repeat and num_particles > 1 and not together
        if program.plate_style != "drawn" and (not drawn or together or repeat):
            chosen = runs[:1]
        else:
            chosen = runs[:num_particles]
        values = {}
        for site in drawn:
            pieces = [
                program.from_batch(run["values"][site.name], int(site.size > 0), nesting)
                for run in chosen
            ]
            value = torch.cat(pieces)
            if repeat and site.local:
                value = value.reshape(num_particles, -1, *value.shape[2:])
            values[site.name] = value
        return values, [run["rows"] for run in chosen]

    def loss(self, loss: Any) -> None:
        program = self.program
        batch = program.positional
        importance = isinstance(loss, (pv.IWAE, pv.WakeSleep))
        asked = tuple(site.name for site in program.guide_sites if site.enumerate)
        torch.manual_seed(program.seed)
        loss.loss(self.model, self.guide, *batch)  # looks at the pair
        program.runs.clear()
        taken: list[str] = []
        if isinstance(loss, pv.ELBO):
            remember_analytic(loss, taken)
        found = loss.differentiable_loss(self.model, self.guide, *batch)
        sums = isinstance(loss, pv.IWAE)
        enumerated = () if isinstance(loss, pv.WakeSleep) else asked
        values, rows = self.recorded(
            loss.num_particles, enumerated, shared=self.whole and isinstance(loss, pv.IWAE)
        )
        names = self.parameters()
        stopped = getattr(loss, "estimator", "") in ("stl", "dreg")
        wanted = gradient = None
        if importance:
            answer = Answer(program, names, rows[0])
            if sums and asked:
                answer.summed_out = (*answer.summed_out, *asked)
            parts = answer.importance(values, detach=stopped)
            if parts is not None:
                wanted, gradient = self.importance_loss(loss, *parts)
        else:
            analytic: tuple[str, ...] = ()
            if loss.kl == "analytic":
                told = loss.explain(self.model, self.guide, *batch)
                analytic = tuple(n for n, how in told.items() if how.startswith("analytic"))
                if set(analytic) != set(taken):
                    self.found("explain", f"{told}, but the loss takes a KL of {sorted(taken)}")
                analytic = tuple(taken)
            options = {"enumerated": enumerated, "analytic": analytic, "detach": stopped}
            if len(rows) > 1 and rows[0] is not None:  # each with a minibatch of its own
                parts = [
                    Answer(program, names, r).elbo(
                        {n: v[k : k + 1] for n, v in values.items()}, **options
                    )
                    for k, r in enumerate(rows)
                ]
                wanted = None if parts[0] is None else -sum(parts) / len(parts)
            else:
                elbo = Answer(program, names, rows[0]).elbo(values, **options)
                wanted = None if elbo is None else -elbo
            gradient = None if loss.estimator == "score" else wanted
        if wanted is None:
            self.outcome.reasons["no answer: a scale inside a sum"] += 1
            return
        label = f"{loss!r}{'' if loss.vectorize_particles else ' loop'}"
        if not bool(torch.isfinite(wanted)):  # and so there is no gradient
            if bool(torch.isfinite(found)):
                self.found(label, f"{found.item():.8g}, right {wanted.item():.8g}")
            return
        self.compare(label, found, wanted, 10.0 * program.num_data)
        if gradient is None:
            return
        self.gradients(label, found, gradient, names)

    def importance_loss(
        self, loss: Any, scale: Tensor, joint: Tensor, guide: Tensor, shared: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return a loss of importance weights, and what has its gradient."""
        weights = joint - guide
        count = math.log(weights.shape[0])
        bound = (scale * (weights.logsumexp(0) - count)).sum() + shared
        shares = weights.detach().softmax(0)
        if isinstance(loss, pv.WakeSleep):
            theta = (scale * shares * joint).sum()
            phi = (scale * shares * guide).sum()
            return -bound, (theta, phi)  # type: ignore[return-value]
        if loss.estimator == "dreg":
            ratio_one = all(site.scale is None for site in self.program.model_sites)
            if not ratio_one:
                return -bound, None
            return -bound, ((scale * shares * weights).sum(), (scale * shares**2 * weights).sum())  # type: ignore[return-value]
        return -bound, -bound

    def gradients(self, label: str, found: Tensor, wanted: Any, names: dict[str, Tensor]) -> None:
        leaves = list(names.values())

        def of(term: Tensor) -> list[Tensor]:
            if not term.requires_grad:
                return [torch.zeros_like(leaf) for leaf in leaves]
            got = torch.autograd.grad(term, leaves, retain_graph=True, allow_unused=True)
            return [
                torch.zeros_like(p) if g is None else g for p, g in zip(leaves, got, strict=True)
            ]

        mine = of(found)
        if isinstance(wanted, tuple):  # of the model's parameters, and of the guide's
            theta, phi = (of(-term) for term in wanted)
            right = [
                t if name.startswith("p_") else f
                for name, t, f in zip(names, theta, phi, strict=True)
            ]
        else:
            right = of(wanted)
        size = max(float(g.abs().max()) for g in right) if right else 0.0
        for name, a, b in zip(names, mine, right, strict=True):
            self.compare(f"gradient of {label} by {name}", a, b, size)

    def steps(self) -> None:
        """A traced step against an eager one."""
        program = self.program
        state = copy.deepcopy(pyro.get_param_store().get_state())
        loss = self.rng.choice(self.losses()[:5])
        if not self.differentiable(loss):
            return
        k = loss.num_particles
        batch = program.positional
        histories = []
        for make in (
            lambda optim: pyro.infer.SVI(self.model, self.guide, optim, loss=loss),
            lambda optim: pv.CompiledSVI(
                self.model, self.guide, optim, loss=loss, compile="replay"
            ),
        ):
            pyro.get_param_store().set_state(copy.deepcopy(state))
            loss.load_state_dict({})
            torch.manual_seed(program.seed)
            # The loss is that of all data: larger steps run away.
            svi = make(pyro.optim.SGD({"lr": min(1e-3, 1e-2 / program.full_size)}))
            losses = [svi.step(*batch) for _ in range(10)]
            ends = torch.cat(
                [pyro.param(name).detach().reshape(-1) for name in sorted(pyro.get_param_store())]
            )
            histories.append((torch.tensor(losses).double(), ends.double()))
        pyro.get_param_store().set_state(state)
        (losses, ends), (compiled, compiled_ends) = histories
        if not bool(losses.isfinite().all()):
            return
        self.compare(f"CompiledSVI {loss!r} K={k} losses", compiled, losses, 100.0)
        self.compare(f"CompiledSVI {loss!r} K={k} parameters", compiled_ends, ends, 100.0)


def remember_analytic(loss: pv.ELBO, names: list[str]) -> None:
    """Have a loss say which sites' KL it takes in closed form: either way is right."""
    original = loss._analytic

    def analytic(run: Any) -> dict[str, Tensor]:
        found = original(run)
        names[:] = list(found)
        return found

    loss._analytic = analytic  # type: ignore[method-assign]


def legitimate(text: str) -> bool:
    """Whether a message is one of ours: it says what was found in terms of the user's model."""
    foreign = ("Expected value argument", "Expected parameter", "The expanded size", "shape '[")
    return not text.startswith(foreign) and len(text) > 40


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without logged warnings (loops are slow) and repeated ones."""
    logger = logging.getLogger("pyro_vae")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def check(seed: int) -> Outcome:
    """Check the program of a seed."""
    return Checks(seed).run()


@pytest.mark.slow
@pytest.mark.parametrize("item", range(ITEMS))
def test_random_programs(item: int, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = Outcome()
    for seed in range(FIRST + item, FIRST + COUNT, ITEMS):
        outcome.add(check(seed))
    answered, refused = sum(outcome.answered.values()), sum(outcome.refused.values())
    with capsys.disabled():
        print(
            f"\nprograms {FIRST + item}..{FIRST + COUNT} by {ITEMS}: {answered} answered, "
            f"{refused} refused, {len(outcome.discrepancies)} discrepancies"
        )
    assert not outcome.discrepancies, "\n\n".join(outcome.discrepancies[:5])
    asked = answered + refused
    assert refused <= REFUSED * asked or asked < ASKED, outcome.reasons.most_common(10)
