"""Two pairs in one process whose parameters have one name: that which was passed is trained."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

import pyro_vae as pv
from tests.models import NormalModel

STEPS = 120  # beyond the eager ones, and beyond the comparisons at the 8th and 32nd


def data() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 3, generator=generator, dtype=torch.float64) + 2


def by_hand():
    """Decoder and encoder in plain functions, by pyro.module; the noise by pyro.param."""
    torch.manual_seed(0)
    decoder, encoder = nn.Linear(1, 3).double(), nn.Linear(3, 1).double()

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 0.7).to_event(1))

    return model, guide, [decoder, encoder]


def one_name():
    """A network of one name in the model and in the guide."""
    torch.manual_seed(0)
    decoder, encoder = nn.Linear(1, 3).double(), nn.Linear(3, 1).double()

    def model(x):
        net = pyro.module("net", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    def guide(x):
        net = pyro.module("net", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x), 0.7).to_event(1))

    return model, guide, [decoder, encoder]


class Decoder(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 3).double()
        self.shift = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z) + self.shift, 1.0).to_event(1), obs=x)


class Encoder(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1).double()

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x), 0.7).to_event(1))


def modules():
    torch.manual_seed(0)
    model, guide = Decoder(), Encoder()  # each has a "net"
    return model, guide, [model, guide]


def trained_by_torch(make) -> list[Tensor]:
    """The parameters after as many steps of plain PyTorch: Trace_ELBO's terms by hand."""
    _, _, nets = make()
    decoder, encoder = (getattr(net, "net", net) for net in nets)
    parameters = [p for net in nets for p in net.parameters()]
    optimizer, x = torch.optim.Adam(parameters, lr=0.02), data()
    torch.manual_seed(1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loc = encoder(x)
        z = loc + 0.7 * torch.randn_like(loc)
        mean = decoder(z) + getattr(nets[0], "shift", 0.0)
        log_q = dist.Normal(loc, 0.7).log_prob(z).sum()
        log_p = dist.Normal(0.0, 1.0).log_prob(z).sum() + dist.Normal(mean, 1.0).log_prob(x).sum()
        (log_q - log_p).backward()
        optimizer.step()
    return [p.detach() for p in parameters]


@pytest.mark.filterwarnings("ignore")  # of PyTorch's own compiler
@pytest.mark.parametrize("how", [False, "replay", pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", [by_hand, one_name, modules])
def test_a_cell_that_is_run_twice(make, how):
    """Each time the pair that was passed; the first one stays as it was left."""
    wanted, kept = trained_by_torch(make), []
    for _ in range(2):
        model, guide, nets = make()
        optim = pyro.optim.Adam({"lr": 0.02})
        svi = pv.CompiledSVI(model, guide, optim, Trace_ELBO(), compile=how)
        torch.manual_seed(1)
        for _ in range(STEPS):
            svi.step(data())
        assert svi.mode == {False: "eager", "replay": "replayed", True: "compiled"}[how]
        kept.append([p for net in nets for p in net.parameters()])
        for parameters in kept:
            torch.testing.assert_close([p.detach() for p in parameters], wanted)


@pytest.mark.parametrize("how", [pytest.param(False, marks=pytest.mark.slow), "replay"])
@pytest.mark.parametrize("make", [by_hand, modules])
def test_a_fit_that_is_run_twice(make, how, tmp_path):
    """The second one too when it is resumed half way, from a file."""
    found, epochs = [], STEPS // 3
    for number, parts in enumerate([[epochs], [epochs], [epochs // 2, epochs]]):
        for end in parts:
            model, guide, nets = make()
            pv.fit(
                model,
                guide,
                data(),
                loss=Trace_ELBO(),
                epochs=end,
                batch_size=4,
                optim=lambda parameters: torch.optim.Adam(parameters, lr=0.02),
                compile=how,
                checkpoint=tmp_path / str(number),
                progress=False,
            )
        found.append([p.detach() for net in nets for p in net.parameters()])
    _, _, nets = make()
    assert not any(
        torch.allclose(p, q) for p, q in zip(found[0], nets[0].parameters(), strict=False)
    )
    torch.testing.assert_close(found[1], found[0], rtol=0.0, atol=0.0)
    torch.testing.assert_close(found[2], found[0], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("first", [torch.zeros, lambda size: lambda: torch.randn(size)])
def test_a_value_of_another_shape_is_refused_by_name(first):
    def pair(size):
        def guide(x):
            loc = pyro.param("loc", first(size))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, 1.0))

        return NormalModel(), guide

    adam = pyro.optim.Adam({"lr": 0.1})
    pv.CompiledSVI(*pair(1), adam, Trace_ELBO()).step(torch.zeros(1))
    told = r"pyro.param\('loc'\).* shape \(1,\) .* shape \(5,\).*pyro.clear_param_store\(\)"
    with pytest.raises(ValueError, match=told):
        pv.CompiledSVI(*pair(5), adam, Trace_ELBO()).step(torch.zeros(5))
    with pytest.raises(ValueError, match=told):
        pv.fit(*pair(5), torch.zeros(5), progress=False)


class Noisy(PyroModule):
    """x ~ Normal(0, sigma^2 + 1) in all: sigma has an optimum of its own for each data set."""

    def __init__(self) -> None:
        super().__init__()
        start = torch.tensor(1.0, dtype=torch.float64)
        self.sigma = PyroParam(start, constraint=dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, self.sigma), obs=x)


def exact(model):
    """The posterior under the model's present parameters: the ELBO is the evidence."""

    def guide(x):
        with pyro.plate("data", len(x)):
            precision = 1 + 1 / model.sigma**2
            pyro.sample("z", dist.Normal(x / (1 + model.sigma**2), precision**-0.5))

    return guide


@pytest.mark.parametrize("how", [pytest.param(False, marks=pytest.mark.slow), "replay"])
@pytest.mark.parametrize("trainer", ["fit", "CompiledSVI", "SVI"])
def test_two_pyro_modules_of_one_class(trainer, how, caplog):
    """sigma^2 = mean(x^2) - 1 maximizes the evidence of each; the first stays what it was."""
    x = torch.linspace(-3.0, 3.0, 20, dtype=torch.float64)
    pairs = []
    for scale in (1.0, 2.0):
        model = Noisy()
        pairs.append((model, exact(model), scale * x))
        if trainer == "fit":
            pv.fit(
                *pairs[-1],
                loss=Trace_ELBO(),
                optim=lambda parameters: torch.optim.Adam(parameters, lr=0.05),
                epochs=400,
                compile=how,
                progress=False,
            )
            continue
        optim = pyro.optim.Adam({"lr": 0.05})
        if trainer == "SVI" and scale == 1.0:  # the first one by Pyro's alone
            svi = SVI(model, pairs[-1][1], optim, Trace_ELBO())
        else:
            svi = pv.CompiledSVI(model, pairs[-1][1], optim, Trace_ELBO(), compile=how)
        for _ in range(400):
            svi.step(scale * x)
    for model, _, y in pairs:
        assert model.sigma.item() ** 2 == pytest.approx((y**2).mean().item() - 1, rel=1e-3)
    (record,) = caplog.records
    assert "names ['sigma']" in record.getMessage()
    assert "another Noisy that lives" in record.getMessage()
    assert "pyro.clear_param_store()" in record.getMessage()


def test_a_pyro_module_takes_up_what_was_loaded():
    """As Pyro says: where no other module has it, the store's value counts."""
    positive = dist.constraints.positive
    pyro.param("sigma", torch.tensor(3.0, dtype=torch.float64), constraint=positive)
    model = Noisy()
    svi = pv.CompiledSVI(model, exact(model), pyro.optim.Adam({"lr": 1e-9}), Trace_ELBO())
    svi.step(torch.zeros(4, dtype=torch.float64))
    assert model.sigma.item() == pytest.approx(3.0, rel=1e-6)


def test_a_param_of_one_name_in_model_and_guide_is_said(caplog):
    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.sigma = PyroParam(torch.ones(()).double(), dist.constraints.positive)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x / 2, self.sigma))

    pv.fit(Noisy(), Guide(), torch.zeros(4).double(), max_steps=1, progress=False)
    (record,) = caplog.records
    assert "PyroParams of the names ['sigma']" in record.getMessage()


# --- what is trained -------------------------------------------------------------------


class Half(nn.Module):
    """Of two layers, Pyro is told of one."""

    def __init__(self) -> None:
        super().__init__()
        self.told, self.untold = nn.Linear(1, 1).double(), nn.Linear(1, 1).double()

    def model(self, x):
        pyro.module("told", self.told)
        with pyro.plate("data", len(x)):
            loc = self.told(self.untold(x.new_ones(len(x), 1)))
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    forward = model


def empty(x):
    pass


@pytest.mark.parametrize("how", [False, "replay"])
@pytest.mark.parametrize("fn", [lambda m: m, lambda m: m.model, lambda m: lambda x: m.model(x)])
def test_what_pyro_is_told_of_is_trained_as_by_svi(fn, how, caplog):
    x, found = data()[:, :1], []
    for make in (SVI, lambda *args: pv.CompiledSVI(*args, compile=how)):
        pyro.clear_param_store()
        torch.manual_seed(0)
        half = Half()
        svi = make(fn(half), empty, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        found.append([svi.step(x) for _ in range(100)] + [*half.state_dict().values()])
    torch.testing.assert_close(found[1], found[0])
    (record,) = caplog.records
    assert "2 parameters of modules, of shapes (1, 1), (1,)" in record.getMessage()
    assert "pyro.module(name, module)" in record.getMessage()


def test_fit_trains_all_of_a_module_and_says_so(caplog):
    class Latent(Half):
        def forward(self, x):
            with pyro.plate("latents", len(x)):
                pyro.sample("z", dist.Normal(0.0, 1.0))
            self.model(x)

    def guide(x):
        with pyro.plate("latents", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    model = Latent()
    before = model.untold.weight.item()
    with caplog.at_level("INFO"):
        pv.fit(
            model,
            guide,
            data()[:, :1],
            loss=Trace_ELBO(),
            max_steps=3,
            data_plate=False,
            progress=False,
        )
    assert model.untold.weight.item() != before
    assert "model: untold.weight, untold.bias" in caplog.text


def later(x, use):
    """A weight that is there from the second step on, and gets a gradient in some."""
    w = pyro.param("w", torch.tensor(5.0, dtype=torch.float64)) if use else torch.zeros(())
    if use == "constant":
        w = w.detach()
    with pyro.plate("data", 3):
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


@pytest.mark.parametrize("how", [False, "replay"])
@pytest.mark.parametrize(
    "uses", [[""], ["constant"], ["", "yes", "yes"], ["yes", "constant", "constant", ""]]
)
def test_steps_without_a_parameter_or_a_gradient_are_those_of_svi(uses, how):
    """By momentum a parameter moves on without a gradient, where the step has it."""
    x, found = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), []
    for make in (SVI, lambda *args: pv.CompiledSVI(*args, compile=how)):
        pyro.clear_param_store()
        svi = make(later, lambda x, use: None, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        found.append([svi.step(x, uses[step % len(uses)]) for step in range(40)])
    assert found[1] == pytest.approx(found[0], rel=1e-12)


def new_bias(holder):
    holder.net.bias = nn.Parameter(torch.tensor([5.0], dtype=torch.float64))


def new_net(holder):
    holder.net = nn.Linear(1, 1).double()
    new_bias(holder)


@pytest.mark.parametrize("change", [new_bias, new_net])
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_a_parameter_that_is_replaced(change, steps):
    """Its gradient is -3 (2 - w), its updates SGD's: before the traced step, and after it."""

    class Holder:
        net = nn.Linear(1, 1).double()

    holder = Holder()

    def model(x):
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(pyro.module("net", holder.net).bias, 1.0), obs=x)

    svi = pv.CompiledSVI(model, empty, pyro.optim.SGD({"lr": 0.01}), Trace_ELBO(), compile="replay")
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    for _ in range(steps):
        svi.step(x)
    change(holder)
    wanted = 5.0
    for _ in range(100):
        svi.step(x)
        wanted -= 0.01 * 3 * (wanted - 2.0)
    assert svi.mode == "replayed"
    assert holder.net.bias.item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("how", [False, "replay"])
def test_a_module_that_takes_up_what_is_stored(how):
    """pyro.module(update_module_params=True): the store's values go on, as Pyro says."""
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    wanted = None
    for _ in range(2):
        net = nn.Linear(1, 1).double()

        def model(x, net=net):
            loc = pyro.module("net", net, update_module_params=True).bias
            with pyro.plate("data", 3):
                pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

        wanted = net.bias.item() if wanted is None else wanted
        sgd = pyro.optim.SGD({"lr": 0.01})
        svi = pv.CompiledSVI(model, empty, sgd, Trace_ELBO(), compile=how)
        for _ in range(30):
            svi.step(x)
            wanted -= 0.01 * 3 * (wanted - 2.0)
        assert net.bias.item() == pytest.approx(wanted, rel=1e-12)


def test_a_fit_of_modules_that_take_up_what_is_stored():
    for _ in range(2):
        net, other = nn.Linear(1, 1).double(), nn.Linear(1, 1).double()

        def model(x, net=net):
            loc = pyro.module("net", net, update_module_params=True).bias
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(loc, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x, net=net, other=other):
            shift = pyro.module("other", other).bias
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal((x + net.bias) / 2 + shift, 0.5**0.5))

        before = net.bias.item()
        pv.fit(model, guide, data()[:, 0], max_steps=300, progress=False)
        assert net.bias.item() != before
        assert pyro.param("net$$$bias").unconstrained() is net.bias
        assert net.bias.grad is None
