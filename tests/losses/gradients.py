"""The loss of a pair under a seed, and its gradients by every parameter."""

from __future__ import annotations

import torch


def losses_and_gradients(loss, model, guide, x, seed=0):
    guide.zero_grad()
    torch.manual_seed(seed)
    value = loss.loss_and_grads(model, guide, x)
    return value, torch.cat([p.grad.flatten() for p in guide.parameters()])
