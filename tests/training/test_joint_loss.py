"""pv.fit in several processes: the numbers of one process, to rounding, or a refusal."""

import copy
import math
import os
import signal
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

import pyro_vae as pv
from tests.together import together

D = torch.float64
N = 53


def data(count=N):
    return torch.randn(count, 5, dtype=D, generator=torch.Generator().manual_seed(1))


def model(x):
    weight = pyro.param("weight", torch.randn(2, 5, dtype=D))  # made by the first step
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=D), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ weight, 0.5).to_event(1), obs=x)


def shared(x):
    """A level that all data share."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(5, dtype=D), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=D), 1.0).to_event(1))
        seen = torch.arange(5) < 4  # a mask beside
        fn = dist.Normal(mu + z.repeat(1, 3)[:, :5], 0.5).mask(seen).to_event(1)
        pyro.sample("x", fn, obs=x)


def mixture(x):
    mu = pyro.param("mu", torch.arange(15.0, dtype=D).reshape(3, 5) / 5)
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.ones(3, dtype=D) / 3))
        z = pyro.sample("z", dist.Normal(torch.zeros(5, dtype=D), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(mu[k] + z, 1.0).to_event(1), obs=x)


def encoder(*more):
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), *more).double()


def amortized(of=model, *more):
    example = data(8)
    options = {}
    if of is shared:
        held = pyro.poutine.block(of, expose=["mu"])
        options["global_guide"] = AutoNormal(held)
    return pv.AmortizedGuide(of, encoder(*more), example=example, **options).double()


class GammaGuide(nn.Module):
    """Draws by as many numbers as its parameters ask for."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(5, 2).double()

    def forward(self, x):
        pyro.module("gamma_guide", self)
        a, b = nn.functional.softplus(self.net(x) + 1).unbind(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(a, b))


def rates(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(torch.tensor(2.0, dtype=D), 1.0))
        pyro.sample("x", dist.Normal(z[:, None], 1.0).expand([len(x), 5]).to_event(1), obs=x)


class Categorical(nn.Module):
    """A proposal that the score function is for."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(5, 3).double()

    def forward(self, x):
        pyro.module("categorical", self)
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=self.net(x)))


def classes(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.ones(3, dtype=D) / 3))
        pyro.sample("x", dist.Normal(k[:, None].to(D), 1.0).expand([len(x), 5]).to_event(1), obs=x)


class Drawn:
    """Each step draws its own values of the data."""

    source = torch.rand(N, 5, dtype=D, generator=torch.Generator().manual_seed(1))

    def draw(self, p):
        return torch.bernoulli(p)


class Redrawn:
    """Each epoch does."""

    def epoch(self, generator):
        return torch.randn(N, 5, dtype=D, generator=generator)


class Rows(Dataset):
    def __init__(self):
        self.x = data()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i]


def fitted(model=model, guide=None, x=None, made=None, **options):
    """History and parameters of a run, from the same start in each process."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    x = data() if x is None else x
    guide = amortized(model) if guide is None else guide()
    defaults = {"batch_size": 20, "epochs": 3, "compile": False, "progress": False}
    optim = options.pop("optim", lambda p: torch.optim.Adam(p, lr=0.01))
    options["loss"] = copy.deepcopy(options.get("loss"))  # which may carry a state on
    result = pv.fit(model, guide, x, optim=optim, **{**defaults, **options})
    guides = (
        [p.detach().clone() for p in guide.parameters()] if hasattr(guide, "parameters") else []
    )
    store = [p.detach().clone() for _, p in sorted(pyro.get_param_store().items())]
    return result.history, result.stopped_by, [*guides, *store], torch.get_rng_state()


CASES = {
    "minibatches": {},
    "dropout": {"guide": lambda: amortized(model, nn.Dropout(0.3))},
    "replayed": {"compile": "replay", "epochs": 4},
    "last of one": {"batch_size": 26},
    "drop_last": {"drop_last": True},
    "all data at once": {"batch_size": 500},
    "a datum for three": {"batch_size": 2, "x": data(7)},
    "iwae": {"loss": pv.IWAE(3), "compile": "replay"},
    "wake-sleep": {"loss": pv.WakeSleep(2, insomnia=0.5)},
    "pyro's loss": {"loss": Trace_ELBO()},
    "shared latents": {"model": shared, "compile": "replay"},
    "shared latents, all data": {"model": shared, "batch_size": N},
    "summed out": {"model": mixture, "compile": "replay"},
    "score function": {"model": classes, "guide": Categorical, "loss": pv.ELBO(estimator="score")},
    "gamma": {"model": rates, "guide": GammaGuide, "compile": "replay"},
    "drawn by step": {"x": Drawn(), "compile": "replay"},
    "drawn by epoch": {"x": Redrawn()},
    "read by rows": {"x": Rows()},
    "rows of a table": {
        "guide": lambda: pv.LocalGuide(model, num_data=N, example=data(8)).double(),
        "compile": "replay",
    },
    "one datum": {"data_plate": False, "guide": lambda: AutoNormal(model)},
    "validation": {"validation_data": data(31), "compile": "replay", "epochs": 4},
    "patience": {
        "validation_data": data(20),
        "patience": 2,
        "epochs": 50,
        "optim": lambda p: torch.optim.SGD(p, lr=0.0),
    },
    "schedule": {"schedule": lambda step: min(1.0, (step + 1) / 6)},
    "max_steps": {"max_steps": 4},
    "clipped": {"clip_norm": 0.1},
}


FAST = ("dropout", "shared latents", "rows of a table")


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_a_run_is_that_of_one_process(name, tmp_path):
    case = CASES[name]

    def function(rank):
        torch.manual_seed(5)
        return fitted(**case)

    history, stopped_by, parameters, random = function(0)
    found = together(function, tmp_path, 3 if "three" in name else 2)
    for each in found:
        assert not isinstance(each, str), each
        assert each[1] == stopped_by
        for key, wanted in history.items():
            assert each[0][key] == pytest.approx(wanted, rel=1e-9, nan_ok=True), key
        assert torch.equal(each[3], random)  # the global state stays as it was
        for a, b in zip(each[2], parameters, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
        for a, b in zip(each[2], found[0][2], strict=True):
            assert torch.equal(a, b)  # replicas, to the bit


def test_without_a_seed_processes_draw_by_that_of_the_first(tmp_path):
    def function(rank):
        pyro.clear_param_store()
        guide = amortized(shared)
        torch.manual_seed(rank)
        pv.fit(shared, guide, data(), seed=None, epochs=1, compile=False, progress=False)
        return [p.detach() for p in guide.parameters()]

    one, other = together(function, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- what is refused, in all processes


class Averaged(pv.ELBO):
    """A loss that is no sum over data, and does not say so."""

    def _loss(self, model, guide, batch):
        loss = super()._loss(model, guide, batch)
        return loss + torch.stack([b.sum() for b in batch.args]).sum() ** 2


class Looking(nn.Module):
    """An encoder that looks at the whole minibatch."""

    def __init__(self):
        super().__init__()
        self.net = encoder()

    def forward(self, x):
        return self.net(x - x.mean(0))


REFUSED = {
    "BatchNorm1d\\(8\\) in training mode normalizes by the minibatch. Use torch.nn.LayerNorm": {
        "guide": lambda: amortized(model, nn.BatchNorm1d(8).double())
    },
    "free_bits=0.5 hold on average over a minibatch": {"loss": pv.ELBO(free_bits=0.5)},
    "is not the sum of the losses of its parts": {"loss": Averaged()},
    "parts, of which each process takes one: they give": {
        "guide": lambda: pv.AmortizedGuide(model, Looking(), example=data(8)).double()
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_losses_that_are_no_sum_over_data_are_refused(message, tmp_path):
    options = REFUSED[message]
    fitted(**options)  # as one process takes it
    for found in together(lambda rank: fitted(**options), tmp_path):
        assert isinstance(found, str) and found.startswith("ValueError")
        with pytest.raises(ValueError, match=message):
            raise ValueError(found)


def test_processes_with_other_data_are_refused(tmp_path):
    found = together(lambda rank: fitted(x=data(30 + rank)), tmp_path)
    assert all("process 1 was given other data than process 0 (31 and 30 of" in f for f in found)


def test_validation_data_must_be_the_same(tmp_path):
    def function(rank):
        return fitted(validation_data=data(20) + rank)

    found = together(function, tmp_path)
    assert all("process 1 was given other data than process 0 (20 and 20 of" in f for f in found)


def test_a_table_in_a_file_that_processes_share_is_refused(tmp_path):
    def stored(name):
        storage = tmp_path / name
        return pv.LocalGuide(model, num_data=N, example=data(8), storage=storage)

    def function(name):
        pyro.get_param_store()  # of the process
        return fitted(guide=lambda: stored(name))

    stored("rows.npy")
    found = together(lambda rank: function("rows.npy"), tmp_path)
    assert all("all processes would write to it, once each at each step" in each for each in found)
    for found in together(lambda rank: function(f"{rank}.npy"), tmp_path):
        assert not isinstance(found, str), found


# --- loaders


def test_loaders_that_give_the_same_are_refused(tmp_path):
    loader = DataLoader(TensorDataset(data()), batch_size=10)
    found = together(lambda rank: fitted(x=loader), tmp_path)
    assert all("Pass the dataset itself; or a DataLoader with torch" in f for f in found)


def test_a_loader_for_each_process(tmp_path):
    """The gradient of the joint minibatch, of a loss that draws nothing, written out."""

    def points(x):
        shift = pyro.param("shift", torch.zeros(5, dtype=D))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(shift, 1.0).to_event(1), obs=x)

    def nothing(x):
        pass

    def function(rank):
        sampler = DistributedSampler(TensorDataset(data(40)), 2, rank, shuffle=False)
        loader = DataLoader(sampler.dataset, batch_size=5, sampler=sampler)
        descent = lambda p: torch.optim.SGD(p, lr=0.01)  # noqa: E731
        return fitted(points, lambda: nothing, loader, optim=descent, loss=Trace_ELBO(), epochs=1)

    shift, x = torch.zeros(5, dtype=D), data(40)
    for minibatch in x.split(10):
        shift = shift + 0.01 * (minibatch - shift).sum(0)
    for found in together(function, tmp_path):
        torch.testing.assert_close(found[2][0], shift)


def test_an_epoch_ends_with_the_shortest_loader(tmp_path):
    def function(rank):
        x = data()[: 30 if rank else 15]
        loader = DataLoader(TensorDataset(x + rank), batch_size=10)
        return fitted(x=loader)

    for found in together(function, tmp_path):
        assert found[0]["step"] == [2, 4, 6]


# --- what befalls one process alone


class Breaks(nn.Module):
    """An encoder that gives NaN, or raises, for some datum, after some calls."""

    def __init__(self, when, error=None):
        super().__init__()
        self.net, self.when, self.error, self.calls = encoder(), when, error, 0

    def forward(self, x):
        self.calls += 1
        bad = (x[:, :1] == data()[7, 0]) & (self.calls > self.when)
        if self.error is not None and bool(bad.any()):
            raise self.error
        return torch.where(bad, math.nan, self.net(x))


def test_nan_of_one_process_is_seen_by_all(tmp_path):
    def function(rank):
        guide = pv.AmortizedGuide(model, Breaks(20), example=data(8)).double()
        try:
            pv.fit(model, guide, data(), batch_size=20, epochs=9, compile=False, progress=False)
        except pv.NonFiniteLossError as error:
            return error.step, error.sites, [p.detach() for p in guide.parameters()]

    (step, sites, one), (other_step, other_sites, other) = together(function, tmp_path)
    assert step == other_step > 1 and sites == other_sites and "'z' of the guide" in sites
    assert all(
        torch.equal(a, b) and bool(a.isfinite().all()) for a, b in zip(one, other, strict=True)
    )


def test_what_cannot_be_tried_is_not_skipped(tmp_path):
    class Whole(nn.Module):
        """Breaks on a whole minibatch, which is run in the trial alone."""

        def __init__(self):
            super().__init__()
            self.net = encoder()

        def forward(self, x):
            return self.net(x) * (math.nan if len(x) == 20 else 1.0)

    def guide():
        return pv.AmortizedGuide(model, Whole(), example=data(8)).double()

    found = together(lambda rank: fitted(guide=guide, on_nan="skip"), tmp_path)
    assert all("the loss of the first rows is not finite, on which processes" in f for f in found)


def test_steps_that_are_not_finite_in_one_process_are_skipped_in_all(tmp_path):
    def function(rank):
        guide = pv.AmortizedGuide(model, Breaks(20), example=data(8)).double()
        options = {"batch_size": 20, "epochs": 9, "compile": False, "progress": False}
        found = pv.fit(model, guide, data(), on_nan="skip", **options)
        return found.skipped, [p.detach() for p in guide.parameters()]

    (skipped, one), (other_skipped, other) = together(function, tmp_path)
    assert skipped == other_skipped > 0
    assert all(
        torch.equal(a, b) and bool(a.isfinite().all()) for a, b in zip(one, other, strict=True)
    )


def test_an_error_of_one_process_is_told_to_all(tmp_path):
    def guide():
        return pv.AmortizedGuide(model, Breaks(20, RuntimeError("odd")), example=data(8)).double()

    found = together(lambda rank: fitted(guide=guide, epochs=20), tmp_path)
    assert "RuntimeError: odd" in found
    assert any("OtherProcessError: process" in f and "RuntimeError: odd" in f for f in found)


@pytest.mark.parametrize("kind", ["epoch", "step"])
def test_one_process_ends_training_of_all(kind, tmp_path):
    class Ends(pv.callbacks.Callback):
        def on_step(self, step):
            return kind == "step" and self.rank == 1 and step.step == 5

        def on_epoch(self, epoch):
            if self.rank == 1:
                torch.randn(3)  # which sets random states apart
            return kind == "epoch" and self.rank == 1 and epoch.epoch == 2

    def function(rank):
        ends = Ends()
        ends.rank = rank
        return fitted(shared, callbacks=[ends])

    for history, stopped_by, _, _ in together(function, tmp_path):
        assert stopped_by == "callback" and history["step"][-1] == (6 if kind == "epoch" else 5)


def test_an_interrupt_of_one_process_ends_all_at_one_step(tmp_path):
    class Interrupts(pv.callbacks.Callback):
        def on_step(self, step):
            if self.rank == 1 and step.step == 4:
                os.kill(os.getpid(), signal.SIGINT)

    def function(rank):
        interrupts = Interrupts()
        interrupts.rank = rank
        guide = amortized(model)
        result = pv.fit(model, guide, data(), batch_size=20, callbacks=[interrupts], progress=False)
        return result.stopped_by, result.steps, [p.detach() for p in guide.parameters()]

    one, other = together(function, tmp_path)
    assert one[:2] == other[:2] == ("interrupted", 5)
    assert all(torch.equal(a, b) for a, b in zip(one[2], other[2], strict=True))


def test_what_is_moved_in_one_process_alone_is_found(tmp_path):
    class Moves(pv.callbacks.Callback):
        def on_step(self, step):
            if self.rank == 1:
                self.guide.encoder[0].weight.data.add_(1.0)

    def function(rank):
        moves = Moves()
        moves.rank, moves.guide = rank, amortized(model)
        return fitted(guide=lambda: moves.guide, callbacks=[moves])

    for found in together(function, tmp_path):
        assert "processes hold different values of guide encoder.0.weight" in found


def test_files_are_written_by_the_first_process(tmp_path):
    class Writes(pv.callbacks.CSV):
        def __init__(self, path, rank):
            super().__init__(path)
            self.rank, self.called = rank, 0

        def on_epoch(self, epoch):
            self.called += 1
            super().on_epoch(epoch)

    def function(rank):
        writes = Writes(tmp_path / "history.csv", rank)
        fitted(callbacks=[writes])
        return writes.called

    assert together(function, tmp_path) == [3, 0]


def test_a_process_may_train_by_itself(tmp_path):
    wanted = fitted(x=data(30))[2]
    one, other = together(lambda rank: fitted(x=data(30 + rank), distributed=False), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(one[2], wanted, strict=True))
    assert not torch.equal(one[2][0], other[2][0])


def test_a_checkpoint_of_two_processes_goes_on_in_three(tmp_path):
    path = tmp_path / "run.ckpt"
    wanted, *_ = fitted(shared, epochs=5)
    first = together(lambda rank: fitted(shared, epochs=2, checkpoint=path), tmp_path)
    assert not isinstance(first[0], str), first[0]
    for found in together(lambda rank: fitted(shared, epochs=5, checkpoint=path), tmp_path, 3):
        assert not isinstance(found, str), found
        assert found[0]["elbo"] == pytest.approx(wanted["elbo"], rel=1e-9)


# --- under torchrun itself


SCRIPT = """
import os, signal, sys
import pyro, pyro.distributions as dist, torch
import pyro_vae as pv

torch.set_num_threads(1)
torch.manual_seed(0)
x = torch.randn(60, 3, dtype=torch.float64)

def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

guide = pv.AmortizedGuide(model, torch.nn.Linear(3, 4).double(), example=x[:5]).double()
attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
rank, die_at = int(os.environ.get("RANK", 0)), int(sys.argv[2])

class Steps(pv.callbacks.Callback):
    def on_step(self, step):
        with open(f"{sys.argv[1]}/steps.{attempt}.{rank}", "a") as file:
            file.write(f"{step.step} {step.elbo!r}\\n")
        if attempt == 0 and rank == 1 and step.step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

pv.fit(
    model, guide, x, batch_size=20, epochs=8, compile=False, progress=False, callbacks=[Steps()],
    checkpoint=f"{sys.argv[1]}/run.ckpt", checkpoint_every=5,
)
torch.save(guide.state_dict(), f"{sys.argv[1]}/guide.{rank}")
"""


def torchrun(folder, size, die_at=0, restarts=0):
    """Steps and their ELBOs by attempt, and the parameters of each process."""
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    launcher = [*launcher, f"--max-restarts={restarts}"] if size > 1 else []
    command = [sys.executable, *launcher, str(script), str(folder), str(die_at)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = {
        file.name: [(int(s), float(e)) for s, e in map(str.split, file.read_text().splitlines())]
        for file in folder.glob("steps.*")
    }
    return steps, [torch.load(folder / f"guide.{rank}") for rank in range(size)]


@pytest.mark.slow
def test_the_same_script_under_torchrun_and_after_a_worker_is_killed(tmp_path):
    one, (wanted,) = torchrun(tmp_path / "one", 1)
    curve = dict(one["steps.0.0"])
    for die_at, restarts in ((0, 0), (17, 1)):
        steps, guides = torchrun(tmp_path / f"two{die_at}", 2, die_at, restarts)
        for found in guides:
            for name, value in wanted.items():
                torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9)
        for file, rows in steps.items():
            for step, elbo in rows:
                assert elbo == pytest.approx(curve[step], rel=1e-9), (file, step)
        if restarts:
            # A worker that is lost costs the steps since the last checkpoint, and no more.
            assert steps["steps.0.1"][-1][0] == die_at
            assert [rows[0][0] for file, rows in sorted(steps.items()) if ".1." in file] == [16, 16]
