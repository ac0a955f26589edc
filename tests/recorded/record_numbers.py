"""Record the numbers that pyro_vae gives under seeds, and compare another version's with them.

    python tests/recorded/record_numbers.py record before.npz
    python tests/recorded/record_numbers.py compare before.npz

Both compute all items of recorded_items.py, which knows pyro_vae by its public names alone:
PYTHONPATH says which version runs. Each item runs in a process of its own, forked from one that has
the imports behind it, with an empty parameter store, one seed and one thread. Recorded are arrays,
texts, what was raised, what was logged from WARNING on, and the next random number. Two runs
of one version are equal to the last bit.

``compare`` exits with status 1 where numbers differ by more than rounding, texts differ, or items
are missing. How often a model is run, and how long a first fit takes, is printed, not compared.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import multiprocessing
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from recorded_cases import small_pair
from recorded_items import COUNTS, ITEMS, Item, attempt
from torch import Tensor

import pyro_vae as pv

SEED = 20
TIMEOUT = 120.0  # seconds of an item
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
# Arrays are measured against their largest number, but no smaller than this: where all of them
# are zero but for rounding, there is nothing to be relative to.
FLOOR = 1e-3
SHOWN = 6  # lines of an item in a report
STARTS = 3  # processes that measure the start of fit, of which the fastest counts

Found = dict[str, np.ndarray]


# --- one item ------------------------------------------------------------------------------


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(f"{record.levelname}: {record.getMessage()}")


def arrays(value: Any, name: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Yield the arrays in nested mappings, by their path."""
    if isinstance(value, xr.Dataset):
        value = {str(key): part.values for key, part in value.variables.items()}
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from arrays(part, f"{name}/{key}" if name else str(key))
    elif isinstance(value, Tensor):
        yield name, value.detach().cpu().numpy().copy()
    elif isinstance(value, str):
        yield name, np.asarray(re.sub(r"0x[0-9a-f]+", "0x...", value))
    else:
        found = np.asarray(value)
        yield name, found.astype(str) if found.dtype == object else found


def compute(item: Item) -> Found:
    """Run an item from a clean state; return its arrays, and the seconds that it took."""
    pyro.clear_param_store()
    pyro.set_rng_seed(SEED)
    torch.set_default_dtype(torch.float32)
    messages = _Messages()
    logger = logging.getLogger("pyro_vae")
    logger.addHandler(messages)
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = dict(arrays(attempt(item)))
    found["random_after"] = torch.rand(2, dtype=torch.float64).numpy()
    found["logged"] = np.asarray("\n".join(messages.texts))
    found["seconds"] = np.asarray(time.perf_counter() - begin)
    return found


def isolated(item: Item) -> Found:
    """Return what :func:`compute` does, in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(compute(item)))
    process.start()
    sender.close()
    try:
        answered = receiver.poll(TIMEOUT)
        found = receiver.recv() if answered else {"raised": f"no answer in {TIMEOUT:g} seconds"}
    except EOFError:
        found = {"raised": "the process ended"}
    finally:
        receiver.close()
        process.kill()
        process.join()
    return dict(arrays(found))


# --- all of them ---------------------------------------------------------------------------


def warm_up() -> None:
    """Import what functions import as they run, before processes are forked."""
    x = torch.randn(4, 3)
    model = pv.zoo.FactorAnalysis(3, 1)
    guide = pv.AmortizedGuide(model, model.make_encoder([2]), example=x)
    options: dict[str, Any] = {"progress": False, "seed": 0}
    pv.fit(model, guide, x, max_steps=4, compile="replay", **options)
    pv.compare(model, {"guide": guide}, x, num_particles=30, max_steps=2, **options)
    pv.to_arviz(model, guide, x, num_draws=2, seed=0)
    gc.freeze()  # pages that a child's collector does not touch are not copied


def record(
    items: Mapping[str, Item], counts: Mapping[str, Item], *, progress: bool = False
) -> dict[str, np.ndarray]:
    """Return the arrays of items, by "item/array"; counts begin with "count/"."""
    with alone():
        warm_up()
        return dict(_all_found(items, counts, progress))


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """One thread, and a logger of pyro_vae's that hands nothing on."""
    logger, threads = logging.getLogger("pyro_vae"), torch.get_num_threads()
    torch.set_num_threads(1)
    nothing = logging.NullHandler()
    logger.addHandler(nothing)
    logger.propagate = False
    yield
    logger.propagate = True
    logger.removeHandler(nothing)
    torch.set_num_threads(threads)


def _all_found(
    items: Mapping[str, Item], counts: Mapping[str, Item], progress: bool
) -> Iterator[tuple[str, np.ndarray]]:
    begin = time.perf_counter()
    named = {**items, **{f"count/{name}": item for name, item in counts.items()}}
    for number, (name, item) in enumerate(named.items(), start=1):
        for part, value in isolated(item).items():
            yield f"{name}//{part}", value
        if progress and (number % 50 == 0 or number == len(named)):
            seconds = time.perf_counter() - begin
            print(f"{number} of {len(named)} items, {seconds:.0f} s: {name}", flush=True)


def start_seconds() -> dict[str, float]:
    """Return the seconds of the first and the second fit of one step in a new process."""
    answers = []
    for _ in range(STARTS):
        command = [sys.executable, str(Path(__file__).resolve()), "start"]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        answers.append(json.loads(answer.stdout.splitlines()[-1]))
    return {name: min(answer[name] for answer in answers) for name in answers[0]}


def start() -> dict[str, float]:
    """Measure two fits of one step in this process, each of a new model."""
    torch.set_num_threads(1)
    seconds = {}
    for name in ("first fit", "second fit"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, guide, x = small_pair()
        begin = time.perf_counter()
        pv.fit(model, guide, x, loss=pv.IWAE(5), max_steps=1, progress=False)
        seconds[name] = time.perf_counter() - begin
    return seconds


# --- comparing -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """How far apart two arrays are.

    Attributes:
        relative: of the largest number; 0 for equal bits, infinite for other texts or shapes.
        allowed: what rounding may do.
        text: what the two are, in words.
    """

    relative: float
    allowed: float = 0.0
    text: str = ""

    @property
    def kind(self) -> str:
        if self.relative == 0:
            return "bit"
        return "rounding" if self.relative <= self.allowed else "differs"


def difference(before: np.ndarray, after: np.ndarray) -> Difference:
    """Compare two arrays."""
    if before.dtype.kind == "U" or after.dtype.kind == "U":
        return _text_difference(before, after)
    if before.shape != after.shape or before.dtype != after.dtype:
        kinds = [f"{a.dtype}{list(a.shape)}" for a in (before, after)]
        return Difference(np.inf, text=" -> ".join(kinds))
    if before.tobytes() == after.tobytes():
        return Difference(0.0)
    if before.dtype.kind != "f":
        apart = int((before != after).sum())
        return Difference(np.inf, text=f"{apart} of {before.size} {before.dtype} numbers differ")
    if not np.array_equal(np.isfinite(before), np.isfinite(after)):
        return Difference(np.inf, text=f"not finite in other places: {before} -> {after}")
    finite = np.isfinite(before)
    if not np.array_equal(before[~finite], after[~finite], equal_nan=True):
        return Difference(np.inf, text=f"not finite otherwise: {before} -> {after}")
    one, other = before[finite].astype(float), after[finite].astype(float)
    if not one.size:
        return Difference(0.0)
    size = max(np.abs(one).max(), np.abs(other).max(), FLOOR)
    worst = int(np.abs(one - other).argmax())
    relative = abs(one[worst] - other[worst]) / size
    # Zeros of two signs, or NaNs of two kinds, are no difference; equal bits were seen above.
    relative = float(relative) or np.finfo(before.dtype).tiny
    text = f"{float(one[worst])!r} -> {float(other[worst])!r}, relative {relative:.2g}"
    return Difference(relative, TOLERANCE.get(str(before.dtype), 0.0), text)


def _text_difference(before: np.ndarray, after: np.ndarray) -> Difference:
    # A warning may name a line of the package.
    one, other = (re.sub(r"\w+\.py, line \d+", "line ...", str(text)) for text in (before, after))
    return Difference(0.0) if one == other else Difference(np.inf, text=f"{one!r} -> {other!r}")


def report(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> bool:
    """Print how two records compare; return whether they agree."""
    _report_counts(before, after)
    kinds: dict[str, list[str]] = {"bit": [], "rounding": [], "differs": [], "missing": []}
    worst = dict.fromkeys(TOLERANCE, 0.0)
    lines: dict[str, list[str]] = {}
    for name, keys in _by_item(before).items():
        found = []
        for key in keys:
            if key not in after:
                lines.setdefault(name, []).append(f"{key}: missing")
                continue
            apart = difference(before[key], after[key])
            found.append(apart.kind)
            dtype = str(before[key].dtype)
            if apart.kind == "rounding":
                worst[dtype] = max(worst[dtype], apart.relative)
            if apart.kind != "bit":
                lines.setdefault(name, []).append(f"{key}: {apart.kind}, {apart.text}")
        missing = [key for key in keys if key not in after]
        more = [k for k in _by_item(after).get(name, []) if k not in before]
        lines.setdefault(name, []).extend(f"{key}: new" for key in more)
        if len(missing) == len(keys):
            kinds["missing"].append(name)
        elif missing or more or "differs" in found:
            kinds["differs"].append(name)
        else:
            kinds["rounding" if "rounding" in found else "bit"].append(name)
    for kind in ("rounding", "differs", "missing"):
        for name in kinds[kind]:
            print(f"{kind}: {name}")
            said = lines.get(name, [])
            for line in said[:SHOWN]:
                print(f"    {line[:400]}")
            if len(said) > SHOWN:
                print(f"    and {len(said) - SHOWN} more")
    print(f"equal to the last bit: {len(kinds['bit'])} items")
    apart_most = ", ".join(f"{relative:.2g} in {name}" for name, relative in worst.items())
    print(f"equal to rounding:     {len(kinds['rounding'])} items, at most {apart_most}")
    print(f"differ:                {len(kinds['differs'])} items")
    print(f"missing:               {len(kinds['missing'])} items")
    return not kinds["differs"] and not kinds["missing"]


def _by_item(record: Mapping[str, np.ndarray]) -> dict[str, list[str]]:
    """Return the names of what is compared, by item."""
    found: dict[str, list[str]] = {}
    for key in record:
        name, _, part = key.partition("//")
        if not name.startswith(("count/", "start")) and part != "seconds":
            found.setdefault(name, []).append(key)
    return found


def _report_counts(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> None:
    print("runs of model and guide (not compared):")
    for key, value in before.items():
        name, _, part = key.removeprefix("count/").partition("//")
        if key.startswith("count/") and part not in ("seconds", "random_after", "logged"):
            print(f"    {name}, {part}: {value} -> {after.get(key, 'missing')}")
    for key, value in before.items():
        if key.startswith("start"):
            new = after.get(key)
            told = "missing" if new is None else f"{float(new):.3f} s"
            print(f"    {key.replace('//', ', ')}: {float(value):.3f} s -> {told}")
    totals = [
        sum(float(v) for k, v in r.items() if k.endswith("//seconds")) for r in (before, after)
    ]
    print(f"    all items: {totals[0]:.0f} s -> {totals[1]:.0f} s")


# --- the command line ----------------------------------------------------------------------


def compute_all(wanted: Callable[[str], bool], *, start_too: bool) -> dict[str, np.ndarray]:
    """Record the items and counts whose names are wanted; and how long fit takes to start."""
    seconds = start_seconds() if start_too else {}
    found = record(
        {name: item for name, item in ITEMS.items() if wanted(name)},
        {name: item for name, item in COUNTS.items() if wanted(f"count/{name}")},
        progress=True,
    )
    return found | {f"start//{name}": np.asarray(value) for name, value in seconds.items()}


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("record", "compute all items and write them to a file"),
        ("compare", "compute all items and compare them with a file's"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("file", type=Path)
        command.add_argument("--only", nargs="+", default=[], help="beginnings of items' names")
    command.add_argument("--below", type=float, help="of items that took fewer seconds alone")
    command.add_argument("--after", type=Path, help="a second file, in place of computing")
    commands.add_parser("start", help="the seconds of two first steps of fit, as JSON")
    arguments = parser.parse_args()
    if arguments.command == "start":
        print(json.dumps(start()))
        return 0
    print(f"pyro_vae of {Path(pv.__file__).parent}", flush=True)
    begins = tuple(arguments.only) or ("",)
    whole = begins == ("",)
    if arguments.command == "record":
        found = compute_all(lambda name: name.startswith(begins), start_too=whole)
        np.savez_compressed(arguments.file, **{k.replace("/", "|"): v for k, v in found.items()})
        return 0
    most = arguments.below or np.inf
    before = load(arguments.file)
    slow = {k.partition("//")[0] for k, v in before.items() if k.endswith("//seconds") and v > most}

    def wanted(name: str) -> bool:
        return name.startswith(begins) and name not in slow

    before = {key: value for key, value in before.items() if wanted(key.partition("//")[0])}
    after = load(arguments.after) if arguments.after else compute_all(wanted, start_too=whole)
    return 0 if report(before, after) else 1


def load(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file that ``record`` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return {name.replace("|", "/"): file[name] for name in file.files}


if __name__ == "__main__":
    sys.exit(main())
