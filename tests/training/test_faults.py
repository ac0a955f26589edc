"""What machines and data do to a run: killed, a full disk, damaged files, data at the edge.

The counts of the documentation are of benchmarks/faults.py, whose parts are run here, smaller.
"""

from __future__ import annotations

import os
import random
import runpy
import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from tests.models import NormalModel
from tests.training.runs import Kind, X, trained
from tests.training.test_resume_anywhere import assert_same

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faults.py"


@pytest.fixture(scope="module")
def faults():
    """The functions of the script."""
    sys.path.insert(0, os.fspath(SCRIPT.parent))
    try:
        return runpy.run_path(os.fspath(SCRIPT))
    finally:
        sys.path.pop(0)


@pytest.mark.parametrize("kind", ["checkpoint", "pair", "data"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # that a change has made
def test_files_changed_at_random_are_read_or_refused_by_name(faults, kind, tmp_path):
    sources = faults["examples"](tmp_path)[kind]
    read, path = faults["readers"]()[kind], tmp_path / "fuzzed"
    path.mkdir()
    found = {}
    for way, name, content in faults["fuzzed_files"](kind, sources, 60, random.Random(7)):
        (path / name).write_bytes(content)
        found.setdefault(way, set()).add(faults["outcome"](read, path / name))
    assert set().union(*found.values()) <= {"read", "refused by name"}
    # A changed file that nobody sealed anew is always seen; so are data whose form is broken.
    assert "refused by name" in found["as it is"]
    assert kind == "data" or found["as it is"] == {"refused by name"}
    for source in sources:
        assert faults["outcome"](read, source) == "read"


@pytest.mark.slow
def test_the_battery(tmp_path):
    """10 runs that are killed, a disk that fills, files that are damaged, fuzzed and hostile."""
    sizes = ["--kills", "10", "--sizes", "5", "--every", "61", "--fuzz", "300", "--seed", "3"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", os.fspath(SCRIPT), *sizes],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {
        line[9:].strip(): int(line[:9]) for line in done.stdout.splitlines() if line[:1] == " "
    }
    assert counts["the same to the bit"] == counts["runs"] == 10
    assert counts["kills"] >= 10
    assert counts["that ran"] == 0


# --- NaN at a step ----------------------------------------------------------------------------


class BreaksAt(torch.utils.data.Dataset):
    """Rows that are NaN once so many were read."""

    def __init__(self, count):
        self.left = count

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        self.left -= 1
        return X[i] if self.left else torch.full_like(X[i], torch.nan)


@pytest.mark.parametrize("count", [40, 60])
def test_nan_at_a_step_is_named_and_mended_data_go_on(count, tmp_path):
    kind = Kind(data=lambda: BreaksAt(0))
    whole = trained(kind, epochs=3)
    path = tmp_path / "run"
    broken = Kind(data=lambda: BreaksAt(8 + count))  # the first minibatch is read to look at it
    with pytest.raises((ValueError, pv.NonFiniteLossError), match=r"NaN|not finite"):
        trained(broken, epochs=3, checkpoint=path, checkpoint_every=1)
    assert_same(whole, trained(kind, epochs=3, checkpoint=path, checkpoint_every=1))


# --- data at the edge --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-38, 1e-6, 1.0, 1e4, 1e18, 1e30, 1e37])
def test_huge_and_tiny_data_have_a_bound_or_are_refused_by_name(scale, dtype):
    """x ~ Normal(0, sqrt 2), in closed form: never a bound above it."""
    model = NormalModel()
    x = scale * torch.randn(20, 1, generator=torch.Generator().manual_seed(0), dtype=dtype)
    torch.manual_seed(0)
    guide = pv.AmortizedGuide(model, nn.Linear(1, 2).to(dtype), example=x)
    refused: Exception | None = None
    try:
        pv.fit(model, guide.to(dtype), x, epochs=3, batch_size=8, progress=False)
        bound = pv.elbo(model, guide, x, num_particles=50, seed=0)
    except (ValueError, pv.NonFiniteLossError) as error:
        refused = error
    if refused is not None:
        assert scale >= 1e4
        told = " ".join([str(refused), *getattr(refused, "__notes__", [])])
        assert "site" in told
        assert "not finite" in told or "whose parameters overflow: rescale the data" in told
        return
    exact = dist.Normal(0.0, 2**0.5).log_prob(x.double().flatten())
    value, error = bound.value.double(), bound.std_error.double()
    assert value.isfinite().all()
    slack = 1e-5 * exact.abs() if dtype is torch.float32 else 1e-10 * exact.abs()
    assert (value <= exact + 6 * error + slack).all()


def test_constant_columns():
    """The noise of a constant column comes down as long as training goes on; no number breaks."""
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    x[:, 1], x[:, 3] = 0.0, 3.0
    model = pv.zoo.FactorAnalysis(4, 2)
    guide = pv.AmortizedGuide(model, nn.Linear(4, 4), example=x)
    result = pv.fit(
        *(model, guide, x),
        optim=lambda ps: torch.optim.Adam(ps, lr=0.02),
        epochs=60,
        progress=False,
    )
    assert result.history["elbo"][-1] > result.history["elbo"][0]
    bound = pv.elbo(model, guide, x, num_particles=20, seed=0)
    exact = model.log_evidence(x)
    assert (bound.value <= exact + 6 * bound.std_error + 1e-4 * exact.abs() + 1e-3).all()


def test_one_row():
    x = torch.zeros(1, 1)
    model = NormalModel()
    guide = pv.AmortizedGuide(model, nn.Linear(1, 2), example=x)
    assert pv.fit(model, guide, x, epochs=3, progress=False).steps == 3
    exact = dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(0.0))
    bound = pv.elbo(model, guide, x, num_particles=100, seed=0)
    assert bound.value.item() <= exact + 6 * bound.std_error.item()
    normed = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match="1 datum.*cannot normalize"):
        pv.fit(model, pv.AmortizedGuide(model, normed, example=x.repeat(2, 1)), x, progress=False)


def test_rows_that_are_missing_altogether():
    """Of nothing that was seen, log p is 0, and the posterior is the prior."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            with pyro.plate("columns", 2, dim=-2):
                pyro.sample("x", dist.Normal(z.T, 1.0), obs=x.T)

    x = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
    x[3] = torch.nan
    missing = pv.MissingData(model)
    guide = pv.LocalGuide(missing, num_data=10, example=x)
    pv.fit(
        *(missing, guide, x),
        optim=lambda ps: torch.optim.Adam(ps, lr=0.05),
        epochs=200,
        progress=False,
    )
    bound = pv.elbo(missing, guide, x, num_particles=200, seed=0)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x.nan_to_num()).sum(1)
    exact[3] = 0.0
    assert (bound.value <= exact + 6 * bound.std_error + 1e-4).all()
    assert (bound.value > exact - 0.1).all()
