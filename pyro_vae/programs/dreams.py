"""Data that a model draws itself, put in the place of the observed ones among its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_vae.programs.batch import Batch
from pyro_vae.programs.types import Values


def sources_of(
    observed: Mapping[str, Tensor], batch: Batch, *, who: str, remedy: str
) -> dict[str, int | str]:
    """Return which argument of a batch holds the values of each observed site.

    Args:
        observed: site to the value that a run of the model on the batch observed.
        batch: the arguments.
        who: asks, for the message.
        remedy: what else to do, for the message.

    Raises:
        ValueError: where it is not one argument, or one that holds another site's values too.
    """
    found: dict[str, int | str] = {}
    tensors = [(k, value) for k, value in _by_key(batch).items() if isinstance(value, Tensor)]
    for name, value in observed.items():
        # The argument itself, or a view of it; else whatever is equal, if nothing else is.
        alike = [(k, t.reshape(value.shape)) for k, t in tensors if t.numel() == value.numel()]
        keys = [key for key, view in alike if _is_view(view, value)] or [
            key
            for key, view in alike
            # Equal numbers of one argument, transposed, are so by chance.
            if view.data_ptr() != value.data_ptr() and _same(view, value)
        ]
        if len(keys) != 1 or keys[0] in found.values():
            raise ValueError(
                f"{who} cannot tell which argument of the batch holds the values of the "
                f"observed site {name!r} (candidates: {keys}); give dream=, a function from "
                f"{{site: dreamt value}} to a batch{remedy}"
            )
        found[name] = keys[0]
    return found


def with_dreamt(batch: Batch, sources: Mapping[str, int | str], dreamt: Values) -> Batch:
    """Return the arguments with dreamt values in the place of the observed ones.

    What is missing (NaN) stays missing.
    """
    given = _by_key(batch)
    for name, key in sources.items():
        held = given[key]
        drawn = dreamt[name].reshape(held.shape).to(held)
        given[key] = torch.where(held.isnan(), held, drawn)
    return Batch(tuple(given.pop(i) for i in range(len(batch.args))), given, batch.has_rows)


def check_held(sources: Mapping[str, int | str], batch: Batch, dreamt: Values) -> None:
    """Raise ValueError for dreamt values that the dtype of their argument does not hold."""
    for name, key in sources.items():
        held, drawn = _by_key(batch)[key], dreamt[name]
        if not held.is_floating_point() and bool((drawn.to(held.dtype) != drawn).any()):
            raise ValueError(
                f"the model draws values of the observed site {name!r} that {held.dtype}, the "
                "dtype of the argument that holds them, does not; pass it in the dtype of the "
                "draws, x.float()"
            )


def _is_view(tensor: Tensor, value: Tensor) -> bool:
    """Return whether a value has the memory of a tensor of its shape, in the same order."""
    return tensor.data_ptr() == value.data_ptr() and all(
        size <= 1 or one == other
        for size, one, other in zip(value.shape, tensor.stride(), value.stride(), strict=True)
    )


def _same(tensor: Tensor, value: Tensor) -> bool:
    """Return whether a tensor holds values, but for what is missing (NaN) in it."""
    missing = tensor.isnan()
    return bool(((tensor.to(value) == value) | missing).all()) and not bool(missing.all())


def _by_key(batch: Batch) -> dict[Any, Any]:
    """Return the arguments by number or name."""
    return {**dict(enumerate(batch.args)), **batch.kwargs}
