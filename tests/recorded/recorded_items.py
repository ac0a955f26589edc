"""What record_numbers.py records: what is done with each case, by public names alone."""

from __future__ import annotations

import functools
import itertools
import math
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.optim
import torch
import xarray as xr
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from recorded_cases import (
    FAMILIES,
    GUIDES,
    KINDS,
    RUNS,
    SETTINGS,
    STRUCTURES,
    ZOO,
    Case,
    Make,
    N,
    OfNumbers,
    SmallVAE,
    by_hand_case,
    by_row_case,
    data,
    digits_case,
    dropout_case,
    em_amortized,
    em_local,
    em_mixture,
    heavy_case,
    hierarchy,
    hierarchy_case,
    in_double,
    items_case,
    linear,
    local_case,
    local_model,
    local_model_case,
    mlp,
    pixels,
    schools_case,
    small_case,
    zoo,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv

sys.path.append(str(Path(__file__).resolve().parents[1] / "patterns"))
from pyro_pairs import PAIRS

__all__ = ["COUNTS", "ITEMS", "Item", "attempt"]

Item = Callable[[], Mapping[str, Any]]
ITEMS: dict[str, Item] = {}
COUNTS: dict[str, Item] = {}

OBJECTIVES: dict[str, Callable[..., Any]] = {
    "ELBO(1)": lambda **options: pv.ELBO(1, **options),
    "ELBO(3)": lambda **options: pv.ELBO(3, **options),
    "ELBO(1, sample)": lambda **options: pv.ELBO(1, "sample", **options),
    "ELBO(3, sample)": lambda **options: pv.ELBO(3, "sample", **options),
    "ELBO(3, stl)": lambda **options: pv.ELBO(3, estimator="stl", **options),
    "ELBO(1, score)": lambda **options: pv.ELBO(1, estimator="score", **options),
    "ELBO(3, score)": lambda **options: pv.ELBO(3, "sample", "score", **options),
    "ELBO(2, free bits)": lambda **options: pv.ELBO(2, free_bits=0.3, **options),
    "ELBO(2, alone)": lambda **options: pv.ELBO(2, vectorize_particles=False, **options),
    "IWAE(1)": lambda **options: pv.IWAE(1, **options),
    "IWAE(3)": lambda **options: pv.IWAE(3, **options),
    "IWAE(3, stl)": lambda **options: pv.IWAE(3, "stl", **options),
    "IWAE(3, dreg)": lambda **options: pv.IWAE(3, "dreg", **options),
    "IWAE(2, dreg, alone)": lambda **options: pv.IWAE(
        2, "dreg", vectorize_particles=False, **options
    ),
    "WakeSleep(3)": lambda **options: pv.WakeSleep(3, **options),
    "WakeSleep(3, sleep)": lambda **options: pv.WakeSleep(3, insomnia=0.6, **options),
}
FEW = ("ELBO(1)", "ELBO(3)", "ELBO(3, stl)", "IWAE(3)", "IWAE(3, dreg)", "WakeSleep(3)")
# Of the objectives that train a case: by turns, two for each.
TRAINED = (*FEW, "ELBO(1, score)", "ELBO(3, sample)")
# Of structures that most objectives refuse.
TRAINED_BY = {
    "structure, discrete proposals": ("ELBO(1, score)", "WakeSleep(3)"),
    "structure, spike and slab": ("ELBO(3, score)", "WakeSleep(3)"),
    "structure, enumerated proposals": ("ELBO(1)", "ELBO(3)"),
    "structure, global latents": ("ELBO(3)", "IWAE(3)"),
    "structure, global latents subsampled": ("ELBO(3, stl)", "IWAE(3)"),
    "structure, outside the support": ("WakeSleep(3)",),
}


# --- what is done with a case --------------------------------------------------------------


def parameters(case: Case) -> dict[str, Tensor]:
    """Return parameters and public buffers of modules, and what Pyro's store holds beside them."""
    found: dict[str, Tensor] = {}
    for place, fn in (("model", case.model), ("guide", case.guide)):
        owner = getattr(fn, "__self__", fn)
        if isinstance(owner, nn.Module):
            named = itertools.chain(owner.named_parameters(), owner.named_buffers())
            found.update({f"{place}.{name}": p for name, p in named})
    known = set(map(id, found.values()))
    for name, parameter in pyro.get_param_store().named_parameters():
        if id(parameter) not in known:
            # A guide's name in the store has a number, another one for each guide of a process.
            found[re.sub(r"-\d+\$\$\$", ".", name)] = parameter
    return {n: value for n, value in found.items() if not n.rpartition(".")[2].startswith("_")}


def joined(tensors: Mapping[str, Tensor | None]) -> Mapping[str, Any]:
    """Return one vector of each dtype, and the names of what is in it."""
    parts: dict[str, list[Tensor]] = {}
    names = []
    for name, tensor in tensors.items():
        names.append(f"{name}: {'none' if tensor is None else list(tensor.shape)}")
        if tensor is not None:
            parts.setdefault(str(tensor.dtype), []).append(tensor.detach().flatten())
    return {dtype: torch.cat(vectors) for dtype, vectors in parts.items()} | {
        "names": "\n".join(names)
    }


def gradients(case: Case) -> Mapping[str, Any]:
    """Return the gradients of all parameters, and drop them."""
    found = {name: p.grad for name, p in parameters(case).items() if p.requires_grad}
    for parameter in parameters(case).values():
        parameter.grad = None
    return joined(found)


def attempt(item: Item) -> Mapping[str, Any]:
    """Return what an item returns, or what it raises."""
    try:
        return item()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is recorded
        return {"raised": f"{type(error).__name__}: {error}"}


def losses(make: Make, names: tuple[str, ...]) -> Mapping[str, Any]:
    """Loss and gradients, twice: the second time with what the first has found out."""

    def of(name: str) -> Mapping[str, Any]:
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        case = make()
        loss = OBJECTIVES[name](data_plate=case.data_plate)
        found: dict[str, Any] = {}
        for call in ("first", "second"):
            torch.manual_seed(2)
            value = loss.loss_and_grads(case.model, case.guide, *case.args, **case.kwargs)
            found[call] = {"loss": value, "gradient": gradients(case)}
        torch.manual_seed(3)
        found["value"] = loss.loss(case.model, case.guide, *case.args, **case.kwargs)
        return found

    return {name: attempt(functools.partial(of, name)) for name in names}


def training(make: Make, names: tuple[str, ...], steps: int = 20) -> Mapping[str, Any]:
    """Losses and parameters of steps by CompiledSVI, eagerly and by replay."""

    def of(name: str, how: str | bool) -> Mapping[str, Any]:
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        case = make()
        loss = OBJECTIVES[name](data_plate=case.data_plate)
        optim = pyro.optim.Adam({"lr": 0.01})
        svi = pv.CompiledSVI(case.model, case.guide, optim, loss, compile=how)
        found = [svi.step(*case.args, **case.kwargs) for _ in range(steps)]
        return {"loss": found, "mode": svi.mode, "parameter": joined(parameters(case))}

    return {
        f"{name}, {'replay' if how else 'eager'}": attempt(functools.partial(of, name, how))
        for name in names
        for how in (False, "replay")
    }


def bound_arrays(bound: Any) -> Mapping[str, Any]:
    return {
        "value": bound.value,
        "std_error": bound.std_error,
        "skewness": bound.skewness,
        "ess": bound.ess,
        "largest": bound.largest,
        "pareto_k": bound.pareto_k,
        "untrusted": bound.untrusted,
        "given": dict(bound.given),
        "text": repr(bound),
    }


def weight_arrays(weights: Any) -> Mapping[str, Any]:
    names = ("log_likelihood", "log_prior", "log_guide", "total")
    return {name: getattr(weights, name) for name in names} | {"given": dict(weights.given)}


def evaluation(make: Make, *, replay: bool = False) -> Mapping[str, Any]:
    """Log weights and bounds: in each mode, in chunks of several sizes, by graphs."""
    case = make()
    pair = (case.model, case.guide, case.batch)
    common: dict[str, Any] = {"data_plate": case.data_plate, "seed": 5}

    def weights(**options: Any) -> Item:
        return lambda: weight_arrays(pv.log_weights(*pair, num_particles=4, **common, **options))

    def bound(function: Callable[..., Any], num_particles: int, **options: Any) -> Item:
        return lambda: bound_arrays(
            function(*pair, num_particles=num_particles, **common, **options)
        )

    runs: dict[str, Item] = {
        "weights": weights(compile=False),
        "weights, repeat": weights(particles="repeat", compile=False),
        "weights, loop": weights(particles="loop", compile=False),
        "weights, chunks": weights(chunk_size=5, compile=False),
        "elbo": bound(pv.elbo, 30, compile=False),
        "iwae": bound(pv.iwae_bound, 40, compile=False),
        "iwae, chunks of 7": bound(pv.iwae_bound, 40, chunk_size=7, compile=False),
    }
    if replay:
        runs["iwae, chunks of 100, replay"] = bound(
            pv.iwae_bound, 100, chunk_size=100, compile="replay"
        )
    return {name: attempt(run) for name, run in runs.items()}


def texts(make: Make) -> Mapping[str, Any]:
    """What describe and explain say."""
    case = make()
    found = {"describe": lambda: _described(case)}
    for name in ("ELBO(3)", "ELBO(3, stl)", "IWAE(3)"):
        loss = OBJECTIVES[name](data_plate=case.data_plate)
        found[name] = functools.partial(pv.explain, loss, case.model, case.guide, case.batch)
    return {name: attempt(run) for name, run in found.items()}


def _described(case: Case) -> Mapping[str, Any]:
    described = pv.describe(case.model, case.batch, data_plate=case.data_plate)
    return {"text": repr(described), "html": described._repr_html_()}


def exported(make: Make) -> Mapping[str, Any]:
    """All groups of to_arviz."""
    case = make()

    def of(**options: Any) -> Mapping[str, Any]:
        tree = pv.to_arviz(
            case.model,
            case.guide,
            case.batch,
            num_draws=30,
            data_plate=case.data_plate,
            seed=3,
            **options,
        )
        return groups(tree)

    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "psis": {"resample": "psis"},
        "without prediction": {"predictive": False},
    }
    return {name: attempt(lambda o=options: of(**o)) for name, options in kinds.items()}


def groups(tree: Any) -> Mapping[str, Any]:
    """Return the datasets of ArviZ's container, 0.x or 1.x, by group."""
    names = tree.groups() if callable(tree.groups) else [g.strip("/") for g in tree.groups]
    found: dict[str, Any] = {}
    for name in sorted(filter(None, names)):
        group = tree[name]
        found[name] = dataset(group if isinstance(group, xr.Dataset) else group.to_dataset())
    return found


def dataset(data: xr.Dataset) -> Mapping[str, Any]:
    """Return variables, dimensions and what attributes say, without dates and versions."""
    said = {key: str(v) for key, v in data.attrs.items() if key in _ATTRIBUTES}
    dims = {str(key): " ".join(map(str, v.dims)) for key, v in data.variables.items()}
    return {"variable": data, "dims": dims, "attribute": said}


_ATTRIBUTES = ("given", "doubt", "log_evidence_from", "log_evidence_num_particles")


def refined(make: Make, **options: Any) -> Mapping[str, Any]:
    """The table that refine finds, and which rows have converged."""
    case = make()
    options = {"max_steps": 30, "data_plate": case.data_plate, **options}
    local = pv.refine(
        case.model, case.guide, case.batch, seed=4, compile=False, progress=False, **options
    )
    return {"table": local.table, "converged": local.converged, "given": dict(local.given)}


def compared(
    make: Make, families: Mapping[str, Any] | None = None, **options: Any
) -> Mapping[str, Any]:
    """The dataset of compare, its table and its text."""
    case = make()
    guides = {"guide": case.guide, **(families or {})}
    options = {"num_particles": 40, "max_steps": 6, "data_plate": case.data_plate, **options}
    found = pv.compare(case.model, guides, case.batch, seed=6, progress=False, **options)
    return {
        **dataset(found.dataset),
        "summary": {name: column.to_numpy() for name, column in found.summary().items()},
        "text": repr(found),
        "guides": " ".join(found.guides),
    }


def fitted(make: Make, how: str | bool, **options: Any) -> Mapping[str, Any]:
    """The history of fit, how it ended, and the parameters."""
    case = make()
    options = {"epochs": 4, "batch_size": 4, "data": case.batch, **options}
    for name in ("loss", "callbacks", "data", "validation_data"):
        if callable(options.get(name)):
            options[name] = options[name]()
    result = pv.fit(
        case.model, case.guide, compile=how, progress=False, data_plate=case.data_plate, **options
    )
    return {
        "history": dict(result.history),
        "end": [result.steps, result.best_epoch],
        "stopped_by": result.stopped_by,
        "parameter": joined(parameters(case)),
    }


def imputed(make: Make) -> Mapping[str, Any]:
    """All draws, means and errors of impute."""
    case = make()
    found = pv.impute(
        case.model,
        case.guide,
        case.batch,
        num_draws=5,
        num_particles=40,
        data_plate=case.data_plate,
        seed=7,
    )
    return {**dataset(found.dataset), "sites": " ".join(found.sites), "text": repr(found)}


def _of_cases() -> None:
    """Every case by every function; of the linear model, a part of the settings by each."""
    every = tuple(OBJECTIVES)
    turn = itertools.count()
    for number, (kind, setting) in enumerate(itertools.product(GUIDES, SETTINGS)):
        make = functools.partial(linear, kind, setting)
        name = f"linear, {kind}, {setting}"
        common = setting in ("plain", "subsampled", "masked", "missing")
        ITEMS[f"loss/{name}"] = functools.partial(losses, make, every if common else FEW)
        if number % 2 == 0:
            chosen = (TRAINED[next(turn) % len(TRAINED)],)
            ITEMS[f"training/{name}"] = functools.partial(training, make, chosen)
        if setting in ("plain", "subsampled", "masked", "repeat", "loop"):
            ITEMS[f"evaluation/{name}"] = functools.partial(evaluation, make)
        if setting in ("plain", "masked"):
            ITEMS[f"text/{name}"] = functools.partial(texts, make)
            ITEMS[f"arviz/{name}"] = functools.partial(exported, make)
            ITEMS[f"refine/{name}"] = functools.partial(refined, make)
            ITEMS[f"compare/{name}"] = functools.partial(compared, make)
    cases: dict[str, Make] = {
        **{f"zoo, {name}": functools.partial(zoo, name) for name in ZOO},
        **{f"structure, {name}": make for name, make in STRUCTURES.items()},
    }
    for name, make in cases.items():
        ITEMS[f"loss/{name}"] = functools.partial(losses, make, every)
        by_turns = (TRAINED[next(turn) % len(TRAINED)], TRAINED[next(turn) % len(TRAINED)])
        chosen = TRAINED_BY.get(name, by_turns)
        ITEMS[f"training/{name}"] = functools.partial(training, make, chosen)
        ITEMS[f"evaluation/{name}"] = functools.partial(evaluation, make, replay=True)
        ITEMS[f"text/{name}"] = functools.partial(texts, make)
        ITEMS[f"arviz/{name}"] = functools.partial(exported, make)
        ITEMS[f"refine/{name}"] = functools.partial(refined, make)
        ITEMS[f"compare/{name}"] = functools.partial(compared, make)
        ITEMS[f"fit/{name}"] = functools.partial(fitted, make, False, epochs=2)
    for name, entry in ZOO.items():
        single = functools.partial(zoo, name, dtype=torch.float32)
        ITEMS[f"loss/zoo in float32, {name}"] = functools.partial(losses, single, FEW)
        ITEMS[f"evaluation/zoo in float32, {name}"] = functools.partial(evaluation, single)
        if entry.missing:
            make = functools.partial(zoo, name, missing=True)
            ITEMS[f"loss/missing, {name}"] = functools.partial(losses, make, FEW)
            ITEMS[f"evaluation/missing, {name}"] = functools.partial(evaluation, make)
            ITEMS[f"impute/missing, {name}"] = functools.partial(imputed, make)
            ITEMS[f"arviz/missing, {name}"] = functools.partial(exported, make)
    for name in KINDS:
        for label, family in FAMILIES.items():
            make = functools.partial(zoo, name, family)
            ITEMS[f"loss/{label}, {name}"] = functools.partial(losses, make, FEW)
            ITEMS[f"evaluation/{label}, {name}"] = functools.partial(evaluation, make)
            steps = 6 if label == "flow" else 30
            ITEMS[f"refine/{label}, {name}"] = functools.partial(refined, make, max_steps=steps)
            chosen = (FEW[next(turn) % len(FEW)],)
            ITEMS[f"training/{label}, {name}"] = functools.partial(training, make, chosen, 12)


# --- the corpus of Pyro's pairs -----------------------------------------------------------------


def corpus(name: str, loss: str) -> Mapping[str, Any]:
    """Steps of CompiledSVI by Pyro's loss or by ours: one eagerly, the others by replay."""
    torch.set_default_dtype(torch.float64)
    pair = PAIRS[name]()
    optim = pyro.optim.Adam({"lr": pair.lr})
    chosen = pair.loss if loss == "its loss" else pv.ELBO(kl="sample")
    svi = pv.CompiledSVI(pair.model, pair.guide, optim, chosen, compile="replay")
    pyro.set_rng_seed(1)
    found = [float(svi.step(*pair.args, **pair.kwargs)) for _ in range(4)]
    case = Case(pair.model, pair.guide, pair.args)
    return {"loss": found, "mode": svi.mode, "parameter": joined(parameters(case))}


def _of_corpus() -> None:
    for name in PAIRS:
        for loss in ("its loss", "ELBO"):
            ITEMS[f"corpus/{name}, {loss}"] = functools.partial(corpus, name, loss)


# --- fit ----------------------------------------------------------------------------------------


def binarized() -> Any:
    return pv.datasets.StochasticBinarization(pv.datasets.digits().train[:24], 16)


def loader() -> Any:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(pixels(20)), batch_size=6, shuffle=True, generator=generator)


def scheduled(parameters_: Any) -> Any:
    return torch.optim.SGD(parameters_, lr=0.01, momentum=0.9)


class Stepping:
    """A callback that halves the learning rate, and ends training after the third epoch."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, epoch: Any) -> bool:
        self.seen.append(epoch.epoch)
        return epoch.epoch == 3


FITS: dict[str, tuple[Make, dict[str, Any]]] = {
    "plain": (small_case, {}),
    "validation": (small_case, {"validation_data": pixels(9, 1), "epochs": 6, "patience": 2}),
    "validation, IWAE": (
        small_case,
        {"validation_data": pixels(9, 1), "loss": lambda: pv.IWAE(3, "dreg")},
    ),
    "validation, float64": (
        functools.partial(zoo, "factor analysis"),
        {"validation_data": lambda: data(5, 4).double()},
    ),
    "Trace_ELBO": (small_case, {"loss": Trace_ELBO}),
    "TraceMeanField_ELBO": (small_case, {"loss": lambda: TraceMeanField_ELBO(num_particles=2)}),
    "warm-up": (small_case, {"schedule": pv.schedules.LinearWarmup(12)}),
    "cycles, IWAE": (
        small_case,
        {"schedule": pv.schedules.Cyclical(10), "loss": lambda: pv.IWAE(3)},
    ),
    "free bits": (small_case, {"loss": lambda: pv.ELBO(2, free_bits=0.2)}),
    "last batch dropped": (small_case, {"drop_last": True, "batch_size": 6}),
    "last batch smaller": (small_case, {"batch_size": 6}),
    "wake and sleep": (small_case, {"loss": lambda: pv.WakeSleep(3, insomnia=0.5)}),
    "callback": (small_case, {"callbacks": lambda: [Stepping()], "epochs": 9}),
    "momentum": (small_case, {"optim": scheduled}),
    "clipped": (small_case, {"optim": pyro.optim.ClippedAdam({"lr": 0.01})}),
    "seed of its own": (small_case, {"seed": 11, "optim": torch.optim.Adagrad}),
    "global seed": (small_case, {"seed": None}),
    "dropout": (dropout_case, {"loss": lambda: pv.ELBO(2)}),
    "local": (local_case, {"loss": lambda: pv.IWAE(3)}),
    "by hand": (by_hand_case, {"loss": lambda: pv.ELBO(estimator="stl")}),
    "by row": (by_row_case, {}),
    "item response": (items_case, {"loss": lambda: pv.IWAE(3)}),
    "plate of the minibatch": (hierarchy_case, {}),
    "eight schools": (schools_case, {}),
    "drawn in the step": (digits_case, {"data": binarized, "loss": lambda: pv.IWAE(2)}),
    "loader": (small_case, {"data": loader}),
    "dataset": (small_case, {"data": lambda: TensorDataset(pixels(20))}),
    "convolution": (functools.partial(zoo, "convolutional VAE"), {"loss": lambda: pv.ELBO(2)}),
    "missing": (functools.partial(zoo, "factor analysis", missing=True), {}),
    "mixture": (STRUCTURES["mixture"], {"loss": lambda: pv.IWAE(3)}),
    "score": (
        STRUCTURES["discrete proposals"],
        {"loss": lambda: pv.ELBO(estimator="score"), "batch_size": N},
    ),
}


def resumed() -> Mapping[str, Any]:
    """Three epochs, and three more from the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.ckpt"
        found = {}
        for epochs in (3, 6):
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            options = {"epochs": epochs, "checkpoint": path, "validation_data": pixels(9, 1)}
            found[str(epochs)] = fitted(small_case, False, **options)
        return found


def _of_fit() -> None:
    for name, (make, options) in FITS.items():
        for label, how in (("eager", False), ("replay", "replay")):
            ITEMS[f"fit/{name}, {label}"] = functools.partial(fitted, make, how, **options)
    ITEMS["fit/resumed"] = resumed


# --- refine, compare, em, in earnest ------------------------------------------------------------


def _of_refine() -> None:
    amortized, heavy = in_double(local_model_case), in_double(heavy_case)
    by_hand = in_double(functools.partial(local_model_case, "by hand"))
    for label, family in {"normal": pv.families.Normal(), **FAMILIES}.items():
        for name, make in (("amortized", amortized), ("by hand", by_hand)):
            steps = 30 if label == "flow" else 600
            ITEMS[f"refine/in earnest, {label}, from {name}"] = functools.partial(
                refined, make, family=family, max_steps=steps
            )
    ITEMS["refine/in earnest, float32"] = functools.partial(
        refined, local_model_case, max_steps=600
    )
    ITEMS["refine/in earnest, heavy tail"] = functools.partial(refined, heavy, max_steps=600)
    ITEMS["refine/replay"] = lambda: _refined_by_replay(amortized)
    families = {"normal": pv.families.Normal(), "full rank": pv.families.FullRankNormal()}
    ITEMS["compare/in earnest"] = functools.partial(
        compared, amortized, families, max_steps=400, num_particles=300
    )
    ITEMS["compare/in earnest, by hand"] = functools.partial(
        compared, by_hand, families, max_steps=400, num_particles=300, reference="full rank"
    )
    ITEMS["compare/in earnest, chunks"] = functools.partial(
        compared, amortized, families, max_steps=200, num_particles=300, chunk_size=100
    )
    ITEMS["compare/in earnest, float32"] = functools.partial(
        compared, local_model_case, families, max_steps=200, num_particles=300
    )
    ITEMS["compare/in earnest, heavy tail"] = functools.partial(
        compared,
        heavy,
        {"flow": pv.families.Flow(bins=3, hidden=2)},
        max_steps=100,
        num_particles=300,
    )
    ITEMS["compare/families alone"] = lambda: _families_alone(amortized)


def _refined_by_replay(make: Make) -> Mapping[str, Any]:
    case = make()
    local = pv.refine(
        case.model, case.guide, case.batch, max_steps=300, seed=4, compile="replay", progress=False
    )
    return {"table": local.table, "converged": local.converged}


def _families_alone(make: Make) -> Mapping[str, Any]:
    case = make()
    families = {"normal": pv.families.Normal(), "low rank": pv.families.LowRankNormal(1)}
    found = pv.compare(
        case.model, families, case.batch, max_steps=100, num_particles=100, seed=1, progress=False
    )
    return dataset(found.dataset)


def em_result(make: Make, **options: Any) -> Mapping[str, Any]:
    """The history of em, and the parameters at its end."""
    case = make()
    result = pv.em(case.model, case.guide, case.batch, progress=False, **options)
    history = dict(result.history)
    return {
        "history": history,
        "stopped_by": result.stopped_by,
        "iterations": result.iterations,
        "parameter": joined(parameters(case)),
    }


def _of_em() -> None:
    runs: dict[str, tuple[Make, dict[str, Any]]] = {
        "exact": (in_double(em_mixture), {"num_iterations": 15}),
        "variational": (in_double(em_local), {"num_iterations": 2, "e_steps": 20, "m_steps": 10}),
        "full rank": (
            in_double(functools.partial(em_local, pv.families.FullRankNormal())),
            {"num_iterations": 2, "e_steps": 20, "m_steps": 10},
        ),
        "point": (
            in_double(functools.partial(em_local, pv.families.Delta())),
            {"num_iterations": 3, "e_steps": 20, "m_steps": 10},
        ),
        "importance": (
            in_double(em_amortized),
            {"e_step": "importance", "num_iterations": 3, "m_steps": 10, "num_particles": 20},
        ),
        "nuts": (
            in_double(em_amortized),
            {"e_step": "nuts", "num_iterations": 1, "m_steps": 5, "num_particles": 5, "e_steps": 5},
        ),
        "adam": (
            in_double(em_mixture),
            {"num_iterations": 3, "optim": torch.optim.Adam, "m_steps": 20},
        ),
    }
    for name, (make, options) in runs.items():
        ITEMS[f"em/{name}"] = functools.partial(em_result, make, **options)


# --- the rest -------------------------------------------------------------------------------------


def tails() -> Mapping[str, Any]:
    """pareto_k of constant, light, heavy and infinite weights."""
    draws = torch.randn(200, 4, dtype=torch.float64)
    scaled = draws * torch.tensor([0.0, 0.3, 1.0, 4.0], dtype=torch.float64)
    some = torch.where(draws > 0, draws, -math.inf)
    return {
        "normal": pv.pareto_k(scaled),
        "float32": pv.pareto_k(scaled.float()),
        "few": pv.pareto_k(scaled[:10]),
        "zero weights": pv.pareto_k(some),
        "nan": attempt(lambda: {"k": pv.pareto_k(torch.full((9, 2), math.nan))}),
        "shape": attempt(lambda: {"k": pv.pareto_k(torch.zeros(3))}),
    }


def given_globals() -> Mapping[str, Any]:
    """Bounds, refine, compare and export at given values of global latents."""
    case = STRUCTURES["global latents"]()
    options: dict[str, Any] = {"given": {"g": torch.tensor(0.7, dtype=torch.float64)}, "seed": 1}
    pair = (case.model, case.guide, case.batch)
    local = pv.refine(*pair, max_steps=20, compile=False, progress=False, **options)
    comparison = pv.compare(
        case.model,
        {"guide": case.guide},
        case.batch,
        num_particles=30,
        max_steps=10,
        progress=False,
        **options,
    )
    return {
        "elbo": bound_arrays(pv.elbo(*pair, num_particles=30, compile=False, **options)),
        "iwae": bound_arrays(pv.iwae_bound(*pair, num_particles=30, compile=False, **options)),
        "weights": weight_arrays(pv.log_weights(*pair, num_particles=3, **options)),
        "refine": {"table": local.table, "given": dict(local.given)},
        "of the refined": bound_arrays(
            pv.elbo(case.model, local, case.batch, num_particles=30, compile=False, seed=2)
        ),
        "compare": dataset(comparison.dataset),
        "arviz": groups(pv.to_arviz(*pair, num_draws=5, **options)),
    }


def rows_of_a_table() -> Mapping[str, Any]:
    """A refined guide on a part of its data, and on other data."""
    case = in_double(local_model_case)()
    (x,) = case.args
    local = pv.refine(
        case.model, case.guide, x, max_steps=20, seed=1, compile=False, progress=False
    )
    options: dict[str, Any] = {"num_particles": 20, "seed": 1, "compile": False}
    index = torch.tensor([4, 1])
    with local.rows(index):
        part = bound_arrays(pv.elbo(case.model, local, x[index], **options))
    return {
        "part": part,
        "other data": attempt(lambda: bound_arrays(pv.elbo(case.model, local, x + 1, **options))),
        "other order": attempt(
            lambda: bound_arrays(pv.elbo(case.model, local, x.flip(0), **options))
        ),
        "other number": attempt(lambda: bound_arrays(pv.elbo(case.model, local, x[:3], **options))),
    }


def posterior() -> Mapping[str, Any]:
    """The responsibilities of an exact guide."""
    case = STRUCTURES["mixture with an exact guide"]()
    eyes = zoo("eye colour")
    return {"mixture": case.guide.posterior(*case.args), "eyes": eyes.guide.posterior(*eyes.args)}


REFUSALS: dict[str, Callable[[], Any]] = {}


def refusal(make: Callable[[], Any]) -> Callable[[], Any]:
    REFUSALS[make.__name__.replace("_", " ")] = make
    return make


def _bound(case: Case, **options: Any) -> Mapping[str, Any]:
    options = {"num_particles": 5, "seed": 0, "data_plate": case.data_plate, **options}
    return bound_arrays(pv.elbo(case.model, case.guide, case.batch, **options))


def _of_functions(model: Any, guide: Any, *args: Any) -> Case:
    return Case(model, guide, args)


def _normal_guide(name: str, shape: tuple[int, ...] = ()) -> Callable[[Tensor], None]:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample(name, dist.Normal(torch.zeros(shape), 1.0))

    return guide


REFUSALS.update(
    {
        "no particles": lambda: _bound(small_case(), num_particles=0),
        "half a particle": lambda: _bound(small_case(), num_particles=2.5),
        "unknown mode": lambda: _bound(small_case(), particles="all"),
        "unknown compile": lambda: _bound(small_case(), compile="yes"),
        "chunk of nothing": lambda: _bound(small_case(), chunk_size=0),
        "unknown plate": lambda: _bound(small_case(), data_plate="rows"),
        "given what is not there": lambda: _bound(small_case(), given={"g": torch.zeros(())}),
        "no rows": lambda: _bound(replace(small_case(), batch=(pixels(0),))),
        "nan": lambda: _bound(replace(small_case(), batch=(pixels(4) * math.nan,))),
        "outside the likelihood": lambda: _bound(replace(small_case(), batch=(pixels(4) + 3,))),
        "globals not given": lambda: _bound(
            Case(hierarchy, STRUCTURES["global latents subsampled"]().guide, (data(N),))
        ),
        "a site that is not proposed": lambda: _bound(
            _of_functions(local_model, lambda x: None, data(N))
        ),
        "a site that is not there": lambda: _bound(
            _of_functions(local_model, _normal_guide("y"), data(N))
        ),
        "a site of another shape": lambda: _bound(
            _of_functions(local_model, _normal_guide("z", (2,)), data(N))
        ),
        "refine, no steps": lambda: (
            pv.refine(*_pair(small_case()), max_steps=0, progress=False).table
        ),
        "refine, tolerance": lambda: (
            pv.refine(*_pair(small_case()), tolerance=0.0, progress=False).table
        ),
        "compare, nothing": lambda: pv.compare(small_case().model, {}, pixels(4), progress=False),
        "compare, a guide": lambda: pv.compare(
            small_case().model, small_case().guide, pixels(4), progress=False
        ),
        "compare, reference": lambda: compared(small_case, reference="other"),
        "compare, a point": lambda: compared(STRUCTURES["points"]),
        "unknown kl": lambda: pv.ELBO(kl="exact"),
        "unknown estimator": lambda: pv.IWAE(3, "score"),
        "analytic stl": lambda: pv.ELBO(kl="analytic", estimator="stl"),
        "one particle of wake": lambda: pv.WakeSleep(1),
        "free bits of samples": lambda: pv.ELBO(kl="sample", free_bits=1.0),
        "fit, patience": lambda: fitted(small_case, False, patience=2),
        "fit, batch size": lambda: fitted(small_case, False, batch_size=0),
        "fit, nan": lambda: fitted(small_case, False, data=(pixels(4) * math.nan,)),
        "fit, a folder": lambda: fitted(small_case, False, checkpoint="/nowhere/run.ckpt"),
        "fit, validation of rows": lambda: fitted(local_case, False, validation_data=pixels(4)),
        "fit, schedule": lambda: fitted(small_case, False, schedule=lambda step: -1.0),
        "fit, not finite": lambda: fitted(
            small_case, False, optim=lambda p: torch.optim.SGD(p, lr=1e30)
        ),
        "arviz, no draws": lambda: groups(pv.to_arviz(*_pair(small_case()), num_draws=0)),
        "arviz, resample": lambda: groups(pv.to_arviz(*_pair(small_case()), resample="all")),
        "impute, nothing missing": lambda: imputed(small_case),
        "em, no parameters": lambda: em_result(in_double(local_model_case), e_step="importance"),
        "em, a step": lambda: em_result(in_double(em_mixture), e_step="magic"),
        "exact, continuous": lambda: pv.ExactGuide(local_model, example=data(N)),
        "amortized, features": lambda: pv.AmortizedGuide(
            SmallVAE(), lambda x: x.sum(), example=pixels(4)
        ),
        "amortized, globals": lambda: pv.AmortizedGuide(hierarchy, OfNumbers(), example=data(N)),
        "local, globals": lambda: pv.LocalGuide(hierarchy, num_data=N, example=data(N)),
        "local, rows": lambda: losses(
            lambda: replace(local_case(), batch=(pixels(7),)), ("ELBO(1)",)
        ),
        "explain, of Pyro": lambda: pv.explain(Trace_ELBO(), *_pair(small_case())),
        "missing, mask": lambda: pv.MissingData(SmallVAE(), values=0),
        "svi, optimizer": lambda: pv.CompiledSVI(
            SmallVAE(), small_case().guide, "adam", pv.ELBO()
        ).step(pixels(4)),
        "svi, samples": lambda: pv.CompiledSVI(
            SmallVAE(), lambda x: None, torch.optim.Adam, pv.ELBO(), num_samples=3
        ),
    }
)


def _pair(case: Case) -> tuple[Any, Any, Any]:
    return case.model, case.guide, case.batch


def refused(make: Callable[[], Any]) -> Mapping[str, Any]:
    result = make()
    return result if isinstance(result, Mapping) else {"no refusal": repr(type(result))}


def state_dicts() -> Mapping[str, Any]:
    """The names in the files that users keep."""
    cases = {
        "amortized": zoo("two layers, top-down"),
        "globals": items_case(),
        "flow": zoo("two layers", FAMILIES["flow"]),
        "local": local_case(),
    }
    return {name: joined(case.guide.state_dict(keep_vars=True)) for name, case in cases.items()}


def _of_the_rest() -> None:
    ITEMS["state_dict"] = state_dicts
    ITEMS["pareto_k"] = tails
    ITEMS["given"] = given_globals
    ITEMS["rows"] = rows_of_a_table
    ITEMS["posterior"] = posterior
    for name, make in REFUSALS.items():
        ITEMS[f"refusal/{name}"] = functools.partial(refused, make)


_of_cases()
_of_corpus()
_of_fit()
_of_refine()
_of_em()
_of_the_rest()


# --- how often model and guide are run ------------------------------------------------------------


def counted(make: Make, run: Callable[[Case], Any]) -> Mapping[str, Any]:
    """Count runs of model and guide in what is done with a case that exists already."""
    forward = pv.AmortizedGuide.forward

    def counting(self: pv.AmortizedGuide, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        RUNS["guide"] += 1
        return forward(self, *args, **kwargs)

    pv.AmortizedGuide.forward = counting  # type: ignore[method-assign]
    case = make()
    RUNS.clear()
    run(case)
    kinds = [f"model, {particles} at once" for particles in (1, 2, "more")]
    return {name: RUNS[name] for name in ("model", "guide", *kinds)}


def _of_counts() -> None:
    runs: dict[str, Callable[[Case], Any]] = {
        "a step of fit by ELBO": lambda case: pv.fit(*_pair(case), max_steps=1, progress=False),
        "a step of fit by IWAE(5)": lambda case: pv.fit(
            *_pair(case), loss=pv.IWAE(5), max_steps=1, progress=False
        ),
        "a step of CompiledSVI by IWAE(5)": lambda case: pv.CompiledSVI(
            case.model, case.guide, pyro.optim.Adam({"lr": 0.01}), pv.IWAE(5)
        ).step(*case.args),
        "compare, one refine step": lambda case: pv.compare(
            case.model,
            {"guide": case.guide},
            case.batch,
            num_particles=100,
            max_steps=1,
            seed=0,
            progress=False,
        ),
        "refine, one step": lambda case: pv.refine(
            *_pair(case), max_steps=1, seed=0, progress=False
        ),
        "elbo": lambda case: pv.elbo(*_pair(case), num_particles=10, seed=0),
        "log_weights": lambda case: pv.log_weights(*_pair(case), num_particles=10, seed=0),
        "to_arviz": lambda case: pv.to_arviz(*_pair(case), num_draws=10, seed=0),
        "describe": lambda case: pv.describe(case.model, case.batch),
        "explain": lambda case: pv.explain(pv.ELBO(), *_pair(case)),
    }
    for name, run in runs.items():
        for label, make in (("amortized", small_case), ("by hand", by_hand_case)):
            COUNTS[f"{name}, {label}"] = functools.partial(counted, make, run)
    COUNTS["AmortizedGuide"] = lambda: counted(
        by_hand_case, lambda case: pv.AmortizedGuide(case.model, mlp(12), example=case.batch)
    )


_of_counts()
