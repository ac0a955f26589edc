"""Every reference model and family under every objective: a replayed step is the eager one.

The combinations are many: some of them run by default, in which each model meets some of the
objectives, and each objective some of the models; the others with ``-m slow``.
"""

from __future__ import annotations

import copy
import functools
import itertools
import re
import warnings

import pyro.infer
import pyro.optim
import pytest
import torch

import pyro_vae as pv
from tests.laws.registry import ENTRIES, FAMILIES, KINDS, pair
from tests.runs import warned

NUM_STEPS = 4
SLOW = {"deep Markov model", "flow", "annealed"}  # seconds each
LOSSES = {
    "ELBO": pv.ELBO,
    "ELBO, 3 particles": functools.partial(pv.ELBO, 3),
    "ELBO, sampled KL": functools.partial(pv.ELBO, kl="sample"),
    "ELBO, stl": functools.partial(pv.ELBO, estimator="stl"),
    "ELBO, score": functools.partial(pv.ELBO, estimator="score"),
    "ELBO, free bits": functools.partial(pv.ELBO, free_bits=0.1),
    "IWAE": functools.partial(pv.IWAE, 3),
    "IWAE, stl": functools.partial(pv.IWAE, 3, "stl"),
    "IWAE, dreg": functools.partial(pv.IWAE, 3, "dreg"),
    "WakeSleep": functools.partial(pv.WakeSleep, 3),
    "WakeSleep, sleep": functools.partial(pv.WakeSleep, 3, 0.5),
    "Trace_ELBO": pyro.infer.Trace_ELBO,
    "Trace_ELBO, 3 particles": functools.partial(
        pyro.infer.Trace_ELBO, 3, vectorize_particles=False
    ),
    "TraceMeanField_ELBO": pyro.infer.TraceMeanField_ELBO,
    "TraceGraph_ELBO": pyro.infer.TraceGraph_ELBO,
    "TraceEnum_ELBO": functools.partial(pyro.infer.TraceEnum_ELBO, max_plate_nesting=3),
    "RenyiELBO": functools.partial(pyro.infer.RenyiELBO, 0.0, 3),
}
# Those of an ExactGuide: Pyro asks of a mask whether all of it holds.
READS = "Python reads a number out of a tensor"


def fallback(name, loss):
    """What the warning says where a step reads numbers out of tensors; None where it does not."""
    if (name, loss) == ("eye colour", "TraceEnum_ELBO"):
        return READS
    if (name, loss) == ("topic model", "WakeSleep, sleep"):
        return ""  # draws documents of a length that is a number in a tensor
    return None


def cases(*axes):
    """Each eleventh of all combinations, and each 29th, slow; all with a slow part are slow."""
    return [
        pytest.param(
            *case,
            id="-".join(case),
            marks=(pytest.mark.slow,) if number % 11 or SLOW & set(case) else (),
        )
        for number, case in enumerate(itertools.product(*axes))
        if number % 29 == 0 or number % 11 == 0
    ]


def steps(how, loss, name, family=None, *, missing=False):
    # A copy, for some entries share a likelihood among all that they make.
    model, guide, batch = copy.deepcopy(pair(name, family, missing=missing))
    svi = pv.CompiledSVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss(), compile=how)
    torch.manual_seed(1)
    losses, modes = [], []
    with warnings.catch_warnings():
        # Pyro advises other losses for discrete latents.
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(NUM_STEPS):
            losses.append(svi.step(*batch.args, **batch.kwargs))
            modes.append(svi.mode)
    state = [*model.state_dict().values(), *guide.state_dict().values()]
    return losses, modes, state, torch.get_rng_state()


def check(caplog, loss, name, family=None, *, missing=False, fallback=None):
    """A pair that an objective refuses is refused in every mode, with the same error."""
    refused = (ValueError, NotImplementedError, TypeError, RuntimeError, KeyError)
    try:
        losses, _, state, random = steps(False, loss, name, family, missing=missing)
    except refused as error:
        with pytest.raises(type(error), match=re.escape(str(error))):
            steps("replay", loss, name, family, missing=missing)
        return False
    caplog.clear()
    found, modes, found_state, found_random = steps("replay", loss, name, family, missing=missing)
    assert found == losses
    for one, other in zip(found_state, state, strict=True):
        assert torch.equal(one, other)
    # An ExactGuide draws outside of sample statements, and stl and dreg run it twice: a graph draws
    # twice, an eager step goes back to the state before.
    assert name == "eye colour" or torch.equal(found_random, random)
    told = [message for message in warned(caplog) if "steps run eagerly" in message]
    if fallback is None:
        assert modes == ["eager"] + ["replayed"] * (NUM_STEPS - 1)
        assert not told
    else:
        assert modes == ["eager"] * NUM_STEPS
        assert len(told) == 1
        assert fallback in told[0]
    return True


@pytest.mark.parametrize(("name", "loss"), cases(ENTRIES, LOSSES))
def test_models_and_objectives(caplog, name, loss):
    check(caplog, LOSSES[loss], name, fallback=fallback(name, loss))


@pytest.mark.parametrize(
    ("family", "name", "loss"), cases(FAMILIES, KINDS, ["ELBO, stl", "IWAE, dreg"])
)
def test_families_and_path_derivatives(caplog, family, name, loss):
    check(caplog, LOSSES[loss], name, FAMILIES[family])


@pytest.mark.parametrize(
    ("name", "loss"),
    cases([n for n, e in ENTRIES.items() if e.missing and e.encoder], ["ELBO", "IWAE"]),
)
def test_missing_data(caplog, name, loss):
    assert check(caplog, LOSSES[loss], name, missing=True)


def test_a_fallback_of_each_kind(caplog):
    """The draws of a topic model read numbers; so do some of Pyro's sums over discrete latents."""
    for name, loss in [("topic model", "WakeSleep, sleep"), ("eye colour", "TraceEnum_ELBO")]:
        assert check(caplog, LOSSES[loss], name, fallback=fallback(name, loss))
