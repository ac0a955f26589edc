"""Models of tables: words of documents, genes of cells, answers of persons, two categories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.nets import MLP
from pyro_vae.programs.handlers import Registered, register
from pyro_vae.programs.types import Distribution
from pyro_vae.zoo.simulation import draw

__all__ = ["EyeColour", "ItemResponse", "SingleCellCounts", "TopicModel"]


class TopicModel(Registered):
    r"""Latent Dirichlet allocation with the topic of each word summed out (Blei et al. 2003).

    .. math::
        \theta_n \sim \mathrm{Dirichlet}(\alpha, \dots, \alpha), \quad
        x_n | \theta_n \sim \mathrm{Multinomial}(m_n, \theta_n^\top \beta)

    The shares :math:`\theta_n` of the topics are latent; the topics :math:`\beta`
    (distributions over words) are parameters, and the length :math:`m_n` of a document is
    given. With an encoder it is the autoencoded topic model of Srivastava & Sutton (2017).

    Args:
        num_words: V, size of the vocabulary.
        num_topics: T.
        concentration: alpha of the Dirichlet; below 1, a document is of few topics. Below 0.3
            shares round to zero in float32, where the density is infinite: use float64.

    Raises:
        ValueError: for fewer than two topics.

    Example:
        >>> model = TopicModel(num_words=20, num_topics=3)
        >>> model.simulate(4, document_length=50).sum(-1)
        tensor([50., 50., 50., 50.])
    """

    def __init__(self, num_words: int, num_topics: int, *, concentration: float = 1.0) -> None:
        super().__init__()
        if num_topics < 2:
            raise ValueError(f"num_topics={num_topics}: at least 2 are needed")
        self.concentration = concentration
        self.topic_logits = nn.Parameter(torch.randn(num_topics, num_words))

    @property
    def topics(self) -> Tensor:
        """Probability of each word in each topic, [T, V]."""
        return self.topic_logits.softmax(-1)

    def forward(self, counts: Tensor) -> Tensor:
        """Run the model on word counts [N, V]; return the value of its observed site."""
        register(self)
        num_topics = self.topic_logits.shape[0]
        with pyro.plate("documents", len(counts)):
            prior = dist.Dirichlet(self.topic_logits.new_full((num_topics,), self.concentration))
            shares = pyro.sample("topic_shares", prior)
            words = Multinomial(counts.sum(-1), shares @ self.topics)
            return pyro.sample("counts", words, obs=counts)

    def make_encoder(self, hidden: Sequence[int], *, missing: bool = False) -> nn.Module:
        """Return a new encoder of word counts [N, V] to features [N, hidden[-1]].

        With ``missing`` of [N, 2 V], as :class:`pyro_vae.MissingEncoder` gives it. The counts of a
        document are one joint event: all of them are missing, or none is.
        """
        num_words = self.topic_logits.shape[1]
        return _LogCountEncoder(num_words, hidden, missing=missing).to(self.topic_logits)

    def simulate(self, num_data: int, seed: int = 0, *, document_length: int = 100) -> Tensor:
        """Draw word counts [num_data, V] of documents of one length from the model."""
        # The model takes the lengths of documents from their counts, and nothing else.
        blank = self.topic_logits.new_zeros(num_data, self.topic_logits.shape[1])
        blank[:, 0] = document_length
        return draw(self, blank, seed=seed)


class SingleCellCounts(Registered):
    r"""Counts of genes in cells: overdispersed, and of as many molecules as were caught.

    .. math::
        z_n &\sim \mathrm{Normal}(0, I_L) \\
        \log s_n &\sim \mathrm{Normal}(m, v^2) \quad \text{where the size factor is not given} \\
        x_{ng} | z_n, s_n &\sim \mathrm{NegativeBinomial}(
            \text{mean } s_n \,\mathrm{softmax}_g(f(z_n)), \text{inverse dispersion } r_g)

    The variance of a count of mean :math:`\mu` is :math:`\mu + \mu^2 / r_g`. The batch is
    ``counts``, and then the size factor s (the library size, in counts per cell) is a latent
    of each cell; or ``(counts, size)``, where it is known. This is scVI without batch effects
    and zero inflation (Lopez et al. 2018).

    Args:
        num_genes: G.
        num_latents: L.
        hidden: widths of the hidden layers of the decoder f.
        size_prior: m and v, mean and standard deviation of the log size factor.

    Example:
        >>> import torch
        >>> model = SingleCellCounts(num_genes=12, num_latents=2, hidden=[8])
        >>> counts, size = model.simulate(3, size=torch.tensor([500.0, 1000.0, 2000.0]))
        >>> counts.shape
        torch.Size([3, 12])
    """

    def __init__(
        self,
        num_genes: int,
        num_latents: int,
        *,
        hidden: Sequence[int],
        size_prior: tuple[float, float] = (7.0, 0.5),
    ) -> None:
        super().__init__()
        self.num_latents, self.size_prior = num_latents, size_prior
        self.decoder = MLP([num_latents, *hidden, num_genes])
        self.log_inverse_dispersion = nn.Parameter(torch.zeros(num_genes))

    @property
    def inverse_dispersion(self) -> Tensor:
        """r of each gene, [G]; the larger, the nearer to a Poisson."""
        return self.log_inverse_dispersion.exp()

    def forward(self, counts: Tensor, size: Tensor | None = None) -> Tensor:
        """Run the model on counts [N, G] and size factors [N]; return the observed value."""
        register(self)
        zero = self.log_inverse_dispersion.new_zeros(())
        with pyro.plate("cells", len(counts)):
            z = pyro.sample("z", dist.Normal(zero.expand(self.num_latents), 1.0).to_event(1))
            if size is None:
                location, scale = self.size_prior
                size = pyro.sample("size", dist.LogNormal(zero + location, scale))
            return pyro.sample("counts", self.likelihood(z, size).to_event(1), obs=counts)

    def likelihood(self, z: Tensor, size: Tensor) -> Distribution:
        """Return the distribution of each count, given latents [..., L] and sizes [...]."""
        log_mean = size.log().unsqueeze(-1) + self.decoder(z).log_softmax(-1)
        r = self.inverse_dispersion
        return dist.NegativeBinomial(r, logits=log_mean - self.log_inverse_dispersion)

    def make_encoder(self, hidden: Sequence[int], *, missing: bool = False) -> nn.Module:
        """Return a new encoder of counts [N, G] (sizes ignored) to features [N, hidden[-1]].

        With ``missing`` of [N, 2 G], as :class:`pyro_vae.MissingEncoder` gives it.
        """
        like = self.log_inverse_dispersion
        return _LogCountEncoder(len(like), hidden, missing=missing).to(like)

    def simulate(
        self, num_data: int, seed: int = 0, *, size: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Draw counts [num_data, G] from the model; with size factors [num_data], both."""
        blank = torch.zeros_like(self.log_inverse_dispersion).repeat(num_data, 1)
        counts = draw(self, blank, size, seed=seed)
        return counts if size is None else (counts, size)


class _LogCountEncoder(MLP):
    """A multilayer perceptron of log(1 + counts)."""

    def __init__(self, num_features: int, hidden: Sequence[int], *, missing: bool) -> None:
        # Of the mask, 0 and 1, the logarithm is the same on another scale.
        super().__init__([num_features * (1 + missing), *hidden], activate_last=True)

    def forward(self, counts: Tensor, size: Tensor | None = None) -> Tensor:
        return super().forward(counts.log1p())


class Multinomial(dist.TorchDistribution):
    """A multinomial whose totals differ from one datum to the next.

    torch's takes one total for all, and would predict documents of that length only.
    """

    arg_constraints = {  # noqa: RUF012 - torch's own interface
        "total_count": constraints.nonnegative_integer,
        "probs": constraints.independent(constraints.nonnegative, 1),
    }
    support = constraints.independent(constraints.nonnegative_integer, 1)

    def __init__(self, total_count: Tensor, probs: Tensor, validate_args: Any = None) -> None:
        batch_shape = torch.broadcast_shapes(total_count.shape, probs.shape[:-1])
        self.total_count = total_count.expand(batch_shape)
        self.probs = probs.expand(*batch_shape, -1)
        super().__init__(batch_shape, probs.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Multinomial:
        total, probs = self.total_count.expand(batch_shape), self.probs.expand(*batch_shape, -1)
        return Multinomial(total, probs, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The expected counts."""
        return self.total_count.unsqueeze(-1) * self.probs

    @property
    def variance(self) -> Tensor:
        """The variance of each count."""
        return self.mean * (1 - self.probs)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - torch's default
        longest = int(self.total_count.max())
        if longest == 0:
            return self.probs.new_zeros(*sample_shape, *self.batch_shape, *self.event_shape)
        words = dist.Categorical(self.probs).sample((longest, *sample_shape)).movedim(0, -1)
        position = torch.arange(longest, device=words.device)
        there = (position < self.total_count.unsqueeze(-1)).to(self.probs).expand(words.shape)
        counts = self.probs.new_zeros(*words.shape[:-1], *self.event_shape)
        return counts.scatter_add(-1, words, there)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        arrangements = (self.total_count + 1).lgamma() - (value + 1).lgamma().sum(-1)
        return arrangements + torch.xlogy(value, self.probs).sum(-1)


class ItemResponse(Registered):
    r"""Item response theory: able persons solve hard items (Rasch 1960, Birnbaum 1968).

    .. math::
        \theta_n &\sim \mathrm{Normal}(0, 1) \\
        b_j &\sim \mathrm{Normal}(0, 1.5^2), \quad a_j \sim \mathrm{LogNormal}(0, 0.5^2) \\
        x_{nj} &\sim \mathrm{Bernoulli}(\mathrm{logit} = a_j (\theta_n - b_j))

    The ability :math:`\theta_n` is a latent of a person, the datum; the ``difficulty``
    :math:`b_j` and the ``discrimination`` :math:`a_j` of an item are global. The batch
    is ``responses`` [N, J], floating point zeros and ones; precision follows it: the model
    has no parameters.

    Args:
        num_items: J.
        discrimination: whether items differ in it (the two-parameter model) or all have 1
            (Rasch's).
        num_persons: persons in all, where training is by minibatches: their likelihood is
            scaled up to it, as it must be beside global latents. By default those of the batch.

    Raises:
        ValueError: when called, for more responses than num_persons.

    Example:
        >>> import pyro_vae as pv
        >>> model = ItemResponse(num_items=8)
        >>> responses = model.simulate(20)
        >>> parts = {"example": responses, "global_guide": model.make_global_guide()}
        >>> guide = pv.AmortizedGuide(model, model.make_encoder([16]), **parts)
        >>> sorted(guide(responses))
        ['ability', 'difficulty', 'discrimination']
    """

    def __init__(
        self, num_items: int, *, discrimination: bool = True, num_persons: int | None = None
    ) -> None:
        super().__init__()
        self.num_items, self.num_persons = num_items, num_persons
        self.discrimination = discrimination

    def items(self, responses: Tensor) -> dict[str, Tensor]:
        """Run the model of the items alone, a Pyro model; return its latents, [J] each."""
        zero = responses.new_zeros(())
        values = {}
        with pyro.plate("items", self.num_items):
            values["difficulty"] = pyro.sample("difficulty", dist.Normal(zero, 1.5))
            if self.discrimination:
                prior = dist.LogNormal(zero, 0.5)
                values["discrimination"] = pyro.sample("discrimination", prior)
        return values

    def forward(self, responses: Tensor) -> Tensor:
        """Run the model on responses [N, J]; return the value of its observed site."""
        num_persons = len(responses) if self.num_persons is None else self.num_persons
        if len(responses) > num_persons:
            raise ValueError(
                f"responses of {len(responses)} persons, but num_persons={num_persons}: give the "
                "number of all persons, or leave it out where a batch is all of them"
            )
        if not responses.is_floating_point():
            wanted = "zeros and ones as floating point, responses.float()"
            raise TypeError(f"responses are {responses.dtype}; give {wanted}")
        items = self.items(responses)
        with pyro.plate("persons", num_persons, subsample=responses):
            ability = pyro.sample("ability", dist.Normal(responses.new_zeros(()), 1.0))
            # Persons are the last dimension of a batch and items the event, particles before.
            logits = ability.unsqueeze(-1) - items["difficulty"].unsqueeze(-2)
            if self.discrimination:
                logits = logits * items["discrimination"].unsqueeze(-2)
            likelihood = dist.Bernoulli(logits=logits).to_event(1)
            return pyro.sample("responses", likelihood, obs=responses)

    def make_encoder(self, hidden: Sequence[int], *, missing: bool = False) -> nn.Module:
        """Return a new encoder of responses [N, J] to features [N, hidden[-1]].

        With ``missing`` of [N, 2 J], as :class:`pyro_vae.MissingEncoder` gives it.
        """
        return MLP([self.num_items * (1 + missing), *hidden], activate_last=True)

    def make_global_guide(self) -> AutoNormal:
        """Return a new AutoNormal of the items, for AmortizedGuide(global_guide=...)."""
        return AutoNormal(self.items)

    def simulate(
        self, num_data: int, seed: int = 0, *, items: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Draw responses [num_data, J] from the model.

        Args:
            num_data: N, persons.
            seed: of the draw; the global random state is left alone.
            items: values of the sites ``difficulty`` and ``discrimination``, [J] each; drawn
                from their prior where they are not given.
        """
        return draw(self, torch.zeros(num_data, self.num_items), seed=seed, given=items)


class EyeColour(Registered):
    r"""A table of eye colour by nationality, of which the colour alone is seen.

    .. math::
        \mathrm{nationality}_n \sim \mathrm{Categorical}(\pi), \quad
        \mathrm{colour}_n | \mathrm{nationality}_n = i \sim \mathrm{Categorical}(\tau_i)

    The smallest model with a latent per datum: evidence and posterior are a sum and a ratio of
    the table's cells :math:`\pi_i \tau_{ij}`. The cells are the parameters, as logits. Colours
    alone tell the table's column sums and nothing of its rows.

    Args:
        table: [M, C], positive counts or probabilities of M nationalities and C colours.

    Raises:
        ValueError: for a table that is not of this shape, or has a cell that is not positive.

    Example:
        >>> import torch
        >>> model = EyeColour(torch.tensor([[30.0, 10.0], [5.0, 55.0]]))
        >>> model.log_evidence(torch.tensor([0, 1])).exp()
        tensor([0.3500, 0.6500], grad_fn=<ExpBackward0>)
        >>> model.posterior(torch.tensor([0]))
        tensor([[0.8571, 0.1429]], grad_fn=<SoftmaxBackward0>)
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        if table.ndim != 2 or not bool((table > 0).all()):
            raise ValueError(
                f"table of shape {list(table.shape)}: positive cells [nationality, colour] are "
                "needed; add a fraction of a count to empty ones"
            )
        self.logits = nn.Parameter((table / table.sum()).log())

    def forward(self, colour: Tensor) -> Tensor:
        """Run the model on colours [N], whole numbers; return the value of its observed site."""
        register(self)
        with pyro.plate("people", len(colour)):
            shares = dist.Categorical(logits=self.logits.logsumexp(-1))
            nationality = pyro.sample("nationality", shares)
            likelihood = dist.Categorical(logits=self.logits[nationality])
            return pyro.sample("colour", likelihood, obs=colour)

    def log_evidence(self, colour: Tensor) -> Tensor:
        """Return log p(colour), the log of a column's share of the table, [N]."""
        columns = self.logits.logsumexp(0)
        return (columns - columns.logsumexp(-1))[colour]

    def posterior(self, colour: Tensor) -> Tensor:
        """Return p(nationality | colour), [N, M]."""
        return self.logits.T[colour].softmax(-1)

    def simulate(self, num_data: int, seed: int = 0) -> Tensor:
        """Draw colours [num_data] from the model."""
        blank = torch.zeros(num_data, dtype=torch.long, device=self.logits.device)
        return draw(self, blank, seed=seed)
