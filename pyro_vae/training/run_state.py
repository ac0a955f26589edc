"""What a checkpoint holds of a run: gathered from it, compared with another, put back."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pyro_vae.guides.base import FamilyGuide
from pyro_vae.programs.sites import Structure
from pyro_vae.programs.state import random_state, set_random_state, unwrapped
from pyro_vae.programs.types import Program
from pyro_vae.training.callbacks import Callbacks
from pyro_vae.training.data_source import DataSource
from pyro_vae.training.lr_schedulers import schedulers_of
from pyro_vae.training.minibatches import MinibatchELBO
from pyro_vae.training.optimizers import KERNELS
from pyro_vae.training.parameters import State
from pyro_vae.training.steps import TrainingSteps

Settings = Mapping[str, Any]  # numbers, text, and mappings of text


@dataclass
class OpenEpoch:
    """An epoch that is under way.

    Attributes:
        begin: the random state at its begin, from which the order of its data was drawn.
        batches: that were taken.
        elbos: of them; of those that were read.
        factor: of the schedule, at the last of them.
    """

    begin: Mapping[str, Any]
    batches: int = 0
    elbos: list[MinibatchELBO] = field(default_factory=list)
    factor: float = 1.0


# --- random numbers: PyTorch's, NumPy's and Python's own, which a dataset or a model may draw from


def random_states(source: DataSource) -> dict[str, Any]:
    """Return the state of all generators that a step may draw from."""
    numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - what user code draws from
    version, numbers, spare = random.getstate()
    of_numpy = None
    if numpy["bit_generator"] == "MT19937":  # not where the user put another in its place
        key = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
        rest = {name: numpy[name] for name in ("has_gauss", "gauss")}
        of_numpy = {"key": key, "pos": numpy["state"]["pos"], **rest}
    return {
        "torch": random_state(),
        "numpy": of_numpy,
        "python": (version, torch.tensor(numbers), spare),
        "data": [generator.get_state() for generator in source.generators],
    }


def set_random_states(states: Mapping[str, Any], source: DataSource) -> None:
    """Put back what :func:`random_states` returned."""
    set_random_state(states["torch"])
    if (numpy := states["numpy"]) is not None:
        key = numpy["key"].numpy().astype(np.uint32)
        rest = numpy["pos"], numpy["has_gauss"], numpy["gauss"]
        np.random.set_state(("MT19937", key, *rest))  # noqa: NPY002 - as above
    version, numbers, spare = states["python"]
    random.setstate((version, tuple(numbers.tolist()), spare))
    for generator, state in zip(source.generators, states["data"], strict=True):
        generator.set_state(state)


# --- settings, by which a run is told from another


def settings_of(steps: TrainingSteps, seed: int | None, drop_last: bool) -> Settings:
    """Return what must be the same for a run to go on as it would have."""
    data = steps.data
    return {
        **pair_settings(data.guide, data.structure),
        "constraints": steps.parameters.constraints(),
        "loss": _text(steps.loss),
        "batch_size": data.batch_size,
        "data": data.num_data,
        "drop_last": drop_last,
        "shuffle": data.source.shuffle,
        "seed": seed,
        "generators of the loader": len(data.source.generators),
    }


def pair_settings(guide: Program, structure: Structure | None) -> Settings:
    """Return what tells a pair from others, beside its parameters.

    Args:
        guide: a Pyro guide.
        structure: of the model; None where no run has shown it.
    """
    inner = unwrapped(guide)
    found: dict[str, Any] = {}
    if isinstance(inner, FamilyGuide):
        found["family"] = _text(inner.family)
    if structure is not None:
        found["sites"] = outline(structure)
    return found


def outline(structure: Structure) -> dict[str, str]:
    """Return each site of a model in words that depend on no number of the data."""
    found = {}
    for name, site in structure.sites.items():
        plates = ", ".join(plate.name for plate in site.plates) or "no plate"
        kind = site.kind.rpartition(" ")[2]  # which of the latents are local, the plates say
        found[name] = f"{kind} {site.distribution} in {plates}"
    return found


def _text(value: Any) -> str:
    """Return a loss or a family in words that are the same in every process."""
    if " at 0x" not in (text := repr(value)):
        return text
    names = [name for name in ("num_particles", "alpha") if hasattr(value, name)]
    inside = ", ".join(f"{name}={getattr(value, name)!r}" for name in names)
    return f"{type(value).__name__}({inside})"


def differences(here: Settings, there: Settings) -> list[str]:
    """Return in words how settings differ; those that one of the two does not know count not."""
    found = []
    for name in [name for name in here if name in there]:
        one, other = there[name], here[name]
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            keys = [k for k in dict.fromkeys([*one, *other]) if one.get(k) != other.get(k)]
            what = name.removesuffix("s")
            pairs = [(f"{what} {k!r}", one.get(k, "none"), other.get(k, "none")) for k in keys[:5]]
        else:
            pairs = [(name, one, other)] if one != other else []
        found += [f"{what}: {saved} there, {now} here" for what, saved, now in pairs]
    return found


# --- a run's content


def gather(
    steps: TrainingSteps,
    callbacks: Callbacks,
    settings: Settings,
    progress: Mapping[str, Any],
    best: State | None,
    opened: OpenEpoch | None,
) -> dict[str, Any]:
    """Return the content of a checkpoint.

    Args:
        steps: of the run.
        callbacks: of the run.
        settings: of :func:`settings_of`.
        progress: numbers, and the history.
        best: the parameters of the best epoch.
        opened: the epoch that is under way; None between epochs.
    """
    optimizer, loss = steps.optimizer, steps.objective
    schedulers = schedulers_of(callbacks.given, optimizer)
    return {
        "settings": settings,
        "last": steps.last,
        "now": None if opened is None else steps.parameters.state(),
        "best": best,
        "optimizer": optimizer.state_dict(),
        "optimizer_type": type(optimizer).__name__,
        "optimizer_made_with": _made_with(optimizer),
        "loss": {} if loss is None else loss.state_dict(),
        "schedulers": [scheduler.state_dict() for scheduler in schedulers],
        "callbacks": callbacks.state(),
        "progress": progress,
        "skipped_in_a_row": steps.in_a_row,
        "random": random_states(steps.data.source),
        "epoch": None if opened is None else _packed(opened),
    }


def _packed(opened: OpenEpoch) -> dict[str, Any]:
    elbos = torch.tensor([tuple(elbo) for elbo in opened.elbos], dtype=torch.float64)
    return {**vars(opened), "elbos": elbos.reshape(-1, 2)}


def _unpacked(packed: Mapping[str, Any] | None) -> OpenEpoch | None:
    if packed is None:
        return None
    elbos = [MinibatchELBO(value, int(size)) for value, size in packed["elbos"].tolist()]
    return OpenEpoch(**{**packed, "elbos": elbos})


def check(
    content: Mapping[str, Any], steps: TrainingSteps, callbacks: Callbacks, settings: Settings
) -> None:
    """Raise ValueError for a content of another run, saying all that differs."""
    written = "it was written with"
    states = (content["last"], content.get("now"), content["best"])
    texts = (steps.parameters.differ(state) for state in states if state is not None)
    found = [text for text in texts if text][:1]
    if differ := differences(settings, content.get("settings", {})):
        found.append("it is of another run: " + "; ".join(differ))
    here, there = type(steps.optimizer).__name__, content["optimizer_type"]
    if here != there:
        found.append(f"{written} the optimizer {there}, not {here}")
    elif _groups(steps.optimizer.state_dict()) != (saved := _groups(content["optimizer"])):
        parts = f"{saved}, not {_groups(steps.optimizer.state_dict())}"
        found.append(f"{written} an optimizer with groups of so many parameters: {parts}")
    num_here = len(schedulers_of(callbacks.given, steps.optimizer))
    num_there = len(content.get("schedulers", []))
    if num_here != num_there:
        found.append(
            f"{written} {num_there} learning rate schedulers among the callbacks, and here "
            f"are {num_here}: they go on from their state in it; pass the same callbacks"
        )
    if found:
        advice = (
            "To begin another run with its parameters, pyro_vae.load them, and name another file"
        )
        raise ValueError(f"{'. And '.join(found)}. {advice}")


def _groups(state: Mapping[str, Any]) -> list[int]:
    """Return how many parameters each group of an optimizer has, from its state."""
    return [len(group["params"]) for group in state["param_groups"]]


def _made_with(optimizer: torch.optim.Optimizer) -> Settings:
    """Return the numbers that an optimizer was made with, which no scheduler changes."""
    named = {n: v for n, v in optimizer.defaults.items() if n not in KERNELS}
    return {n: v for n, v in named.items() if isinstance(v, (bool, int, float, tuple))}


def other_settings(content: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> list[str]:
    """Return in words which settings an optimizer was made with that are not a content's."""
    here = _made_with(optimizer)
    return differences(here, content.get("optimizer_made_with", here))


def put_back(
    content: Mapping[str, Any], steps: TrainingSteps, callbacks: Callbacks
) -> tuple[State | None, OpenEpoch | None, list[str]]:
    """Give a run the state of a content that was checked, its progress aside.

    Returns:
        The best parameters, the epoch that is under way, and the types of callbacks whose state
        nothing takes.
    """
    progress = content["progress"]
    steps.resume(content["last"], progress["step"], progress["epoch"], content.get("now"))
    steps.skipped = progress.get("skipped", 0)
    steps.in_a_row = content.get("skipped_in_a_row", 0)
    schedulers = schedulers_of(callbacks.given, steps.optimizer)
    steps.optimizer.load_state_dict(content["optimizer"])
    for scheduler, state in zip(schedulers, content.get("schedulers", []), strict=True):
        scheduler.load_state_dict(state)
    if steps.objective is not None:
        steps.objective.load_state_dict(content.get("loss", {}))
    missing = callbacks.load(content.get("callbacks", []))
    if "random" in content:
        set_random_states(content["random"], steps.data.source)
    else:  # the first format
        set_random_state(content["random_state"])
    return content["best"], _unpacked(content.get("epoch")), missing
