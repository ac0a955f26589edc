"""Train a pair by Lightning's Trainer: a loss of pyro_vae is an nn.Module, loss(x) a tensor.

Needs `pip install lightning`, and says so without. What Lightning brings (its loggers, strategies,
precision) is at hand; what pv.fit brings (recorded steps, checks of minibatches) is not.

In Lightning's DDP each process draws random numbers of its own, so latents that all data share are
drawn apart in each, and gradients are averaged over processes, where the loss is a sum over data:
multiply the learning rate of SGD by the number of processes; Adam hardly knows. For the numbers of
one process, start the same pv.fit by torchrun.
"""

from __future__ import annotations

import logging
import warnings

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv

try:
    import lightning
except ImportError:
    raise SystemExit("this example needs Lightning: pip install lightning") from None

EPOCHS, BATCH = 15, 100


class Pair(lightning.LightningModule):
    """A model and a guide, and the loss that has both."""

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self.model = pv.zoo.VAE(64, 4, hidden=[64], num_trials=16)
        self.guide = pv.AmortizedGuide(self.model, self.model.make_encoder(), example=example)
        self.loss = pv.ELBO()(self.model, self.guide)  # an nn.Module

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        (x,) = batch
        return self.loss(x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    lightning.seed_everything(0, verbose=False)
    digits = pv.datasets.digits()
    train, test = digits.train.float(), digits.test.float()
    pair = Pair(train[:8])
    before = pv.elbo(pair.model, pair.guide, test, seed=0).mean
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(pair, DataLoader(TensorDataset(train), batch_size=BATCH, shuffle=True))
    after = pv.elbo(pair.model, pair.guide, test, seed=0).mean
    print(f"ELBO of test digits before, nats  {before:.1f}")
    print(f"ELBO of test digits after, nats   {after:.1f}")


if __name__ == "__main__":
    main()
