"""A trained pair in a file: saved and loaded without running code."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, TypeGuard

import torch

from pyro_vae.programs.batch import as_batch
from pyro_vae.programs.guide_kinds import on_rows, row_guide
from pyro_vae.programs.messages import as_path
from pyro_vae.programs.pyro_internals import store_parameters
from pyro_vae.programs.state import Look, module_of, one_thread
from pyro_vae.programs.structure import ModelLooks
from pyro_vae.programs.types import Program
from pyro_vae.training import checkpoints, sealed
from pyro_vae.training.parameters import Parameters, State
from pyro_vae.training.run_state import Settings, differences, pair_settings

_KEY, _VERSION, _WHAT = (
    "pyro_vae_pair",
    1,
    "a pair of pyro_vae.save or a checkpoint of pyro_vae.fit",
)
_OURS = re.compile(r"\w+-\d+(\$\$\$|\.)")  # names that guides of ours have in Pyro's store


def save(path: str | os.PathLike[str], model: Program, guide: Program, *batch: Any) -> None:
    """Write all parameters and buffers of a model and a guide to a file.

    Those of modules, and those in Pyro's parameter store; what a LocalGuide's rows were fitted to,
    and the values of global latents that they were fitted at. The file is written whole or not at
    all, has a checksum, and holds tensors, numbers and text alone, which
    ``torch.load(path, weights_only=True)`` reads too. Nothing has to be trained before.

    Args:
        path: of the file.
        model: a Pyro model.
        guide: a Pyro guide.
        *batch: data that model and guide run on once; a few rows do. Needed where plain functions
            keep parameters in Pyro's store, because a run alone shows which are theirs. With it,
            the sites of the model are saved, and compared by :func:`load`.

    Raises:
        ValueError: where it takes a run to find the parameters, and there is no batch.
        OSError: where the file cannot be written; one that was there stays.

    Example:
        >>> import pathlib, tempfile, pyro, torch
        >>> import pyro.distributions as dist
        >>> import pyro_vae as pv
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.linspace(-1, 1, 50)
        >>> guide = pv.LocalGuide(model, num_data=50, example=x)
        >>> _ = pv.fit(model, guide, x, epochs=2, progress=False)
        >>> pyro.clear_param_store()  # of what other models left there
        >>> path = pathlib.Path(tempfile.mkdtemp(), "pair.pt")
        >>> pv.save(path, model, guide)
        >>> other = pv.LocalGuide(model, num_data=50, example=x)
        >>> pv.load(path, model, other)
        >>> pv.elbo(model, other, x, seed=0).mean == pv.elbo(model, guide, x, seed=0).mean
        True
    """
    path = as_path("save(path, model, guide)", path)
    parameters, settings = _found(model, guide, batch, "save(path, model, guide, x[:9])")
    parameters.initialize()
    versions = {name: version(name) for name in ("pyro-vae", "pyro-ppl", "torch")}
    settings = {**settings, "constraints": parameters.constraints()}
    content = {"versions": versions, "settings": settings, "parameters": parameters.state()}
    sealed.write({_KEY: _VERSION, **content}, path)


def load(path: str | os.PathLike[str], model: Program, guide: Program, *batch: Any) -> None:
    """Give a model and a guide the parameters and buffers of a file.

    Of :func:`save`; or of a checkpoint of :func:`pyro_vae.fit`: the best ones on its validation
    data, or the last ones. Model and guide are made as they were for the pair that was saved; all
    names, shapes and dtypes must be the same, and nothing changes where one is not. No code in the
    file is run.

    Args:
        path: of the file.
        model: a Pyro model.
        guide: a Pyro guide.
        *batch: data that model and guide run on once, as in :func:`save`; the sites of the model
            are compared where it was given there too.

    Raises:
        ValueError: for a file that is damaged, cut off, of another kind or a newer version; for one
            of another pair, naming what differs; where it takes a run to find the parameters, and
            there is no batch.
        OSError: where there is no such file.
    """
    state, saved = _read(as_path("load(path, model, guide)", path))
    parameters, settings = _found(model, guide, batch, "load(path, model, guide, x[:9])")
    found = [text] if (text := parameters.differ(state)) else []
    found += differences({**settings, "constraints": parameters.constraints()}, saved)
    if found:
        if "here none" in text and not batch:
            found.append(
                "what is made in a first run (Pyro's autoguides, parameters of plain functions) is "
                "there with a batch, load(path, model, guide, x)"
            )
        raise ValueError(f"{os.fspath(path)}: {'; '.join(found)}")
    parameters.initialize()
    parameters.restore(state)


def _read(path: str | os.PathLike[str]) -> tuple[State, Settings]:
    """Return the parameters and settings of a file of either kind."""
    versions = {_KEY: _VERSION, checkpoints.KEY: checkpoints.VERSION}
    content = sealed.read(path, versions, _WHAT, {checkpoints.KEY: checkpoints.UNSEALED})
    state = content.get("parameters")
    if _KEY not in content:
        kinds = (content.get(name) for name in ("best", "now", "last"))
        state = next((kind for kind in kinds if kind is not None), None)
    settings = content.get("settings", {})
    if not _is_state(state) or not isinstance(settings, Mapping):
        raise ValueError(f"{os.fspath(path)} holds something else than parameters")
    return state, {n: settings[n] for n in ("family", "sites", "constraints") if n in settings}


def _is_state(state: Any) -> TypeGuard[State]:
    """Return whether something has the form of parameters: tensors by name, by holder."""
    if not isinstance(state, Mapping) or not all(isinstance(v, Mapping) for v in state.values()):
        return False
    named = [pair for tensors in state.values() for pair in tensors.items()]
    return all(isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in named)


def _found(
    model: Program, guide: Program, batch: tuple[Any, ...], call: str
) -> tuple[Parameters, Settings]:
    """Return the parameters of a pair, by a run where there is a batch, and what tells it apart."""
    if not batch:
        parameters = Parameters(model, guide, None)
        _check_store(model, guide, parameters, call)
        return parameters, pair_settings(guide, None)
    made = as_batch(*batch)
    table = row_guide(guide)
    few = None
    if table is not None and not table.is_whole and made.size != table.num_data:
        few = torch.arange(made.size or 0)
    with one_thread(), on_rows(guide, few):
        parameters = Parameters(model, guide, made, needed=False)
        with Look():  # a model may run under its guide's draws alone: its sites are not told then
            return parameters, pair_settings(guide, ModelLooks(model, made).run)
    return parameters, pair_settings(guide, None)


def _check_store(model: Program, guide: Program, parameters: Parameters, call: str) -> None:
    """Raise ValueError where Pyro's store holds what may be the pair's, and no run shows it.

    Modules are taken to keep their networks as attributes; plain functions may have any.
    """
    modules = all(module_of(program) is not None for program in (model, guide))
    held = parameters.held
    left = [
        name
        for name, value in store_parameters().items()
        if id(value) not in held and not _OURS.match(name) and not (modules and "$$$" in name)
    ]
    if left:
        shown = ", ".join(map(repr, left[:5])) + (", ..." if len(left) > 5 else "")
        raise ValueError(
            f"Pyro's parameter store holds {shown}, and a run alone shows whether model and guide "
            f"use them: pass a few rows of data, {call}; or, if they are another model's, call "
            "pyro.clear_param_store() before"
        )
