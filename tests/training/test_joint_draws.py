"""Each process gets its rows of what one process draws: compared with plain PyTorch."""

import pytest
import torch

from pyro_vae.programs.processes import Processes, Share
from pyro_vae.training.joint_draws import JointDraws, NotSharedError

TOTAL = 7


class Known(Processes):
    """Processes of which only one is run; the sums over all are known."""

    def add(self, tensor):
        rows = Processes(self.rank, self.size).share(TOTAL).rows
        (dim,) = (d for d, n in enumerate(tensor.shape) if n == TOTAL)
        whole = self.wanted.reshape(tensor.shape)
        own = [slice(None)] * tensor.ndim
        own[dim] = rows
        assert torch.equal(tensor[tuple(own)], whole[tuple(own)])
        return whole.clone()


def draws_of(function, rank, size=3, known=None):
    """What a process draws after it has learned, and what one process does."""
    processes = Known(rank, size)
    object.__setattr__(processes, "wanted", known)
    draws, share = JointDraws(processes), processes.share(TOTAL)
    torch.manual_seed(1)
    draws.watch(TOTAL)
    with draws:
        whole = function(slice(None), TOTAL)
    torch.manual_seed(1)
    draws.learn(share)
    with draws:
        first = function(share.rows, share.count)
    after = torch.get_rng_state()
    draws.use(share)
    torch.manual_seed(1)
    with draws:
        own = function(share.rows, share.count)
    assert torch.equal(after, torch.get_rng_state())
    torch.manual_seed(1)
    plain = function(slice(None), TOTAL)
    assert torch.equal(after, torch.get_rng_state())
    assert torch.equal(plain, whole)
    assert torch.equal(first, own)
    return own, plain, share.rows


PARAMETERS = torch.rand(TOTAL, 3, generator=torch.Generator().manual_seed(0)) + 0.3

PLAIN = {
    "normal_": lambda rows, n: torch.empty(n, 3).normal_(),
    "dropout": lambda rows, n: torch.nn.functional.dropout(PARAMETERS[rows], 0.5),
    "rand": lambda rows, n: torch.rand(n, 2, dtype=torch.float64),
    "randn_like": lambda rows, n: torch.randn_like(PARAMETERS[rows]),
    "randint": lambda rows, n: torch.randint(5, (n, 2)),
    "normal": lambda rows, n: torch.normal(PARAMETERS[rows], 1.0 + PARAMETERS[rows]),
    "bernoulli": lambda rows, n: torch.bernoulli(PARAMETERS[rows].clamp(max=1.0)),
    "bernoulli_": lambda rows, n: torch.empty(n, 3).bernoulli_(PARAMETERS[rows].clamp(max=1.0)),
    "exponential_": lambda rows, n: torch.empty(n).exponential_(),
    "multinomial": lambda rows, n: torch.multinomial(PARAMETERS[rows], 2, replacement=True),
}


@pytest.mark.parametrize("rank", range(3))
@pytest.mark.parametrize("name", PLAIN)
def test_rows_are_those_that_one_process_draws(name, rank):
    own, plain, rows = draws_of(PLAIN[name], rank)
    assert torch.equal(own, plain[rows])


@pytest.mark.parametrize("name", ["_standard_gamma", "poisson"])
def test_numbers_whose_count_depends_on_parameters_take_those_of_all(name):
    function = getattr(torch, name)
    own, plain, rows = draws_of(lambda rows, n: function(PARAMETERS[rows]), 1, known=PARAMETERS)
    assert torch.equal(own, plain[rows])


def test_particles_stand_before_the_data():
    own, plain, rows = draws_of(lambda rows, n: torch.randn(2, n, 3), 1)
    assert torch.equal(own, plain[:, rows])
    # In one dimension with the data, particle after particle.
    own, plain, rows = draws_of(lambda rows, n: torch.rand(2 * n), 1)
    assert torch.equal(own.reshape(2, -1), plain.reshape(2, TOTAL)[:, rows])


def test_what_all_data_share_is_drawn_alike_whatever_its_size():
    share = Processes(1, 3).share(TOTAL)

    def function(rows, n):
        shared = torch.randn(share.count)  # as many numbers as this process has data
        return torch.randn(n, share.count) + shared

    own, plain, rows = draws_of(function, 1)
    assert torch.equal(own, plain[rows])


def test_first_draws_may_be_left_out_later():
    processes = Processes(0, 2)
    draws, share = JointDraws(processes), processes.share(TOTAL)
    draws.watch(TOTAL)
    with draws:
        torch.randn(4), torch.randn(TOTAL, 4)
    draws.learn(share)
    with draws:
        torch.randn(4), torch.randn(4, 4)
    draws.use(share)
    torch.manual_seed(0)
    with draws:
        own = torch.randn(4, 4)  # square: of the data, and not of what came before them
    torch.manual_seed(0)
    assert torch.equal(own, torch.randn(TOTAL, 4)[:4])


def test_other_minibatches_and_what_was_not_met():
    processes = Processes(1, 2)
    draws = JointDraws(processes)
    draws.use(Share(2, 2, 4))
    torch.manual_seed(0)
    with draws:
        own = torch.randn(2, 3)  # by its size alone
    torch.manual_seed(0)
    assert torch.equal(own, torch.randn(4, 3)[2:])
    with draws, pytest.raises(NotSharedError, match=r"shape \[2, 2\], and the first one did not"):
        torch.randn(2, 2)


def test_fewer_data_that_draw_other_numbers_are_refused():
    draws, share = JointDraws(Processes(0, 2)), Processes(0, 2).share(TOTAL)
    draws.watch(TOTAL)
    with draws:
        torch.randn(TOTAL)
    draws.learn(share)
    with draws, pytest.raises(NotSharedError, match="fewer data draw other random numbers"):
        torch.rand(4)
