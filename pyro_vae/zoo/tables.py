"""Models of tables: answers of persons to items, and one category given another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_vae.nets import MLP
from pyro_vae.programs.handlers import Registered, register
from pyro_vae.zoo.simulation import draw


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
        >>> guide = pv.AmortizedGuide(
        ...     model,
        ...     model.make_encoder([16]),
        ...     example=responses,
        ...     global_guide=model.make_global_guide(),
        ... )
        >>> sorted(guide(responses))
        ['ability', 'difficulty', 'discrimination']
    """

    def __init__(
        self, num_items: int, *, discrimination: bool = True, num_persons: int | None = None
    ) -> None:
        super().__init__()
        self.num_items = num_items
        self.discrimination = discrimination
        self.num_persons = num_persons

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
            raise TypeError(
                f"responses are {responses.dtype}; give zeros and ones as floating point, "
                "responses.float()"
            )
        items = self.items(responses)
        with pyro.plate("persons", num_persons, subsample=responses):
            ability = pyro.sample("ability", dist.Normal(responses.new_zeros(()), 1.0))
            # Persons are the last dimension of a batch and items the event, particles before.
            logits = ability.unsqueeze(-1) - items["difficulty"].unsqueeze(-2)
            if self.discrimination:
                logits = logits * items["discrimination"].unsqueeze(-2)
            likelihood = dist.Bernoulli(logits=logits).to_event(1)
            return pyro.sample("responses", likelihood, obs=responses)

    def make_encoder(self, hidden: Sequence[int]) -> nn.Module:
        """Return a new encoder of responses [N, J] to features [N, hidden[-1]]."""
        return MLP([self.num_items, *hidden], activate_last=True)

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
