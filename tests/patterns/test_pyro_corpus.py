"""A drop-in is a drop-in: each pair of the corpus by pyro.infer.SVI and by CompiledSVI.

Under one seed, with Pyro's loss and with ours, eagerly and by replay: equal losses at each step and
equal parameters after the last. Where ours cannot, it says so, and REFUSED says with which words.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.infer
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from tests.patterns.pyro_pairs import PAIRS, Pair

# Pairs that a loss of ours does not take, and words of the message.
REFUSED: dict[str, str] = {
    "discrete_proposals": "cannot be reparameterized",
    "discrete_with_baselines": "cannot be reparameterized",
    "epidemiology_sir": "depends on draws of .* that the model masks",
    "gradient_of_a_sample_without_reparameterization": "cannot be reparameterized",
}

# Where pyro.infer.SVI leaves untrained what it was given, as ours does not.
DIFFERENT = {
    "cevae_as_it_is": "parts of guide and model have one name, and Pyro's store keeps the first"
}

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """In float64, without warnings of Pyro's and of loops."""
    torch.set_default_dtype(torch.float64)
    level = logging.getLogger("pyro_vae").level
    logging.getLogger("pyro_vae").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.getLogger("pyro_vae").setLevel(level)


def _modules(pair: Pair) -> list[nn.Module]:
    owners = [getattr(fn, "__self__", fn) for fn in (pair.model, pair.guide)]
    return [owner for owner in owners if isinstance(owner, nn.Module)]


def _parameters(pair: Pair) -> dict[str, Tensor]:
    """All parameters, those that Pyro does not know of too."""
    found = {name: p.detach().clone() for name, p in pyro.get_param_store().items()}
    for number, module in enumerate(_modules(pair)):
        for name, parameter in module.named_parameters():
            found[f"{number}.{name}"] = parameter.detach().clone()
    return found


def train(
    make: Callable[..., Any], name: str, loss: Callable[[Pair], Any], steps: int = 0
) -> tuple[list[float], dict[str, Tensor], str]:
    """Return the losses, the parameters at the end, and how the last step was run."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    pair = PAIRS[name]()
    optim = pyro.optim.Adam({"lr": pair.lr})
    svi = make(pair.model, pair.guide, optim, loss=loss(pair))
    pyro.set_rng_seed(1)
    losses = [float(svi.step(*pair.args, **pair.kwargs)) for _ in range(steps or pair.steps)]
    return losses, _parameters(pair), getattr(svi, "mode", "")


def assert_equal(found: Any, wanted: Any) -> None:
    for step, (mine, theirs) in enumerate(zip(found[0], wanted[0], strict=True)):
        assert mine == pytest.approx(theirs, rel=1e-7, abs=1e-8), f"the loss of step {step}"
    assert found[1].keys() == wanted[1].keys()
    for name, value in wanted[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=1e-8, msg=name)


def compiled(mode: str | bool) -> Callable[..., Any]:
    return lambda *args, **kwargs: pv.CompiledSVI(*args, compile=mode, **kwargs)


@pytest.mark.parametrize("name", PAIRS)
def test_pyros_loss(name: str) -> None:
    def of_pair(pair: Pair) -> Any:
        return pair.loss

    wanted = train(pyro.infer.SVI, name, of_pair)
    eager = train(compiled(False), name, of_pair)
    if name in DIFFERENT:
        assert eager[0][0] == pytest.approx(wanted[0][0]) and eager[0][1:] != wanted[0][1:]
        wanted = eager
    assert_equal(eager, wanted)
    assert_equal(train(compiled("replay"), name, of_pair), wanted)


@pytest.mark.parametrize("name", PAIRS)
def test_our_loss(name: str) -> None:
    def elbo(pair: Pair) -> Any:
        return pv.ELBO(kl="sample")

    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            train(compiled("replay"), name, elbo)
        return
    wanted = train(compiled(False) if name in DIFFERENT else pyro.infer.SVI, name, elbo, 12)
    assert_equal(train(compiled("replay"), name, elbo, 12), wanted)


@pytest.mark.parametrize("name", PAIRS)
def test_our_loss_has_the_value_of_trace_elbo(name: str) -> None:
    pair = PAIRS[name]()
    if not pair.same_value or name in REFUSED:
        pytest.skip("another loss of Pyro's, or a minibatch that is drawn in another order")
    values = []
    for loss in (pair.loss, pv.ELBO(pair.loss.num_particles, kl="sample")):
        pyro.set_rng_seed(0)
        loss.loss(pair.model, pair.guide, *pair.args, **pair.kwargs)  # autoguides set up
        pyro.set_rng_seed(1)
        values.append(loss.loss(pair.model, pair.guide, *pair.args, **pair.kwargs))
    assert values[1] == pytest.approx(values[0], rel=1e-9)
