"""What machines do to a run: killed, a full disk, damaged and foreign files, counted.

    python benchmarks/faults.py                     # all of it, about ten minutes on one core
    python benchmarks/faults.py --kills 10 --fuzz 500 --every 50

- **killed**: runs of pv.fit, each killed by SIGKILL at up to three random moments and started
  again, until it ends. Their parameters, buffers and histories must be those of a run that was
  never killed, to the bit, and no more than one interval between checkpoints may be lost.
- **full disk**: no file may grow beyond some size (RLIMIT_FSIZE), from nothing to just below that
  of a checkpoint. The checkpoint before stays as it is, byte by byte; where the first write of a
  run fails, it ends with an OSError; where a later one does, training goes on to the same numbers.
- **damaged**: each byte of a checkpoint and of a pair is changed, and each is cut at each length.
- **fuzzed**: checkpoints, pairs and data files are changed at random, as they are, with a checksum
  that is made anew, or in the first format that had none. Each must be read, or refused by a
  ValueError that names the file; no audit event may tell of a program or a folder that is made.
- **hostile**: files that run code where they are unpickled.

Each part runs in processes of its own, so that a crash is one more count. The exit status is the
number of parts that failed.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import machine
import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch._dynamo  # what a first run would import, in each forked process anew
from torch import nn

import pyro_vae as pv
from pyro_vae.training import checkpoints, sealed

INTERVAL = 3  # steps between checkpoints
X = np.random.default_rng(0).normal(size=(56, 4))


# --- a run --------------------------------------------------------------------------------


class Model(nn.Module):
    """A linear Gaussian model of two latents."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 4).double()

    def forward(self, x: torch.Tensor) -> None:
        """Run the Pyro model."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), 0.5).to_event(1), obs=x)


def make_pair() -> tuple[Model, pv.AmortizedGuide]:
    torch.manual_seed(0)
    model = Model()
    encoder = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.1)).double()
    return model, pv.AmortizedGuide(model, encoder, example=torch.from_numpy(X))


class Told(pv.callbacks.Callback):
    """Writes the number of each step into a pipe."""

    def __init__(self, pipe: int | None) -> None:
        self.pipe = pipe

    def on_step(self, step: pv.callbacks.Step) -> None:
        """Tell the step."""
        if self.pipe is not None:
            os.write(self.pipe, step.step.to_bytes(4, "big"))


def train(path: Path | None, compile: Any, pipe: int | None = None, **options: Any) -> str:
    """Return the hash of all that a run leaves behind."""
    model, guide = make_pair()
    x, more = torch.from_numpy(X), options.pop("callbacks", [])
    given = {"epochs": 8, "checkpoint_every": INTERVAL if path else None, "checkpoint": path}
    result = pv.fit(
        *(model, guide, x[:50]),
        **(given | options),
        validation_data=x[50:],
        batch_size=8,
        optim=lambda parameters: torch.optim.Adam(parameters, lr=0.02),
        schedule=pv.schedules.LinearWarmup(40),
        compile=compile,
        progress=False,
        callbacks=[Told(pipe), *more],
    )
    found = hashlib.sha256(repr(sorted(result.history.items())).encode())
    for module in (model, guide):
        for name, value in module.state_dict().items():
            found.update(name.encode() + value.numpy().tobytes())
    return found.hexdigest()


def forked(task: Callable[[], Any]) -> Any:
    """Return what a task returns in a process of its own; its signal where it crashed."""
    inside, outside = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(inside)
            with os.fdopen(outside, "wb") as file:
                pickle.dump(task(), file)
            status = 0
        finally:
            os._exit(status)
    os.close(outside)
    with os.fdopen(inside, "rb") as file:
        told = file.read()
    _, status = os.waitpid(pid, 0)
    return pickle.loads(told) if status == 0 else f"crash ({status})"  # our own bytes


# --- killed -------------------------------------------------------------------------------


def killed(runs: int, rng: random.Random, folder: Path) -> tuple[Counter[str], bool]:
    """Kill runs at random moments; return counts, and whether all is well."""
    kinds = (False, False, False, "replay")
    wanted = {kind: forked(lambda kind=kind: train(None, kind)) for kind in set(kinds)}
    steps, _, lasts = one_life(folder / "timed", False, None, 0.0)
    step = lasts / len(steps)
    counts: Counter[str] = Counter(runs=runs)
    for number in range(runs):
        kind, path = kinds[number % 4], folder / f"run{number}"
        last = kills = 0
        while True:
            # Within two steps after one, before and during a write; now and then before the first.
            after = rng.choice((0, 1, *range(1, 30))) if kills < 3 else None
            wait = rng.uniform(0.0, 2 * step if after else lasts / 4)
            steps, digest, _ = one_life(path, kind, after, wait)
            if steps:
                lost = last - (steps[0] - 1)
                counts["steps lost, at most"] = max(counts["steps lost, at most"], lost)
                counts["resumed inside an epoch"] += last > 0 and (steps[0] - 1) % 7 > 0
                last = steps[-1]
            if digest:
                break
            kills += 1
            counts["in the middle of a write"] += bool(list(folder.glob(f".run{number}.*.tmp")))
        counts["kills"] += kills
        counts["the same to the bit"] += digest == wanted[kind]
        counts["files left over"] += len(list(folder.glob(f".run{number}.*")))
    right = counts["the same to the bit"] == runs and not counts["files left over"]
    return counts, right and counts["steps lost, at most"] <= INTERVAL


def one_life(path: Path, kind: Any, after: int | None, wait: float) -> tuple[list[int], str, float]:
    """Let a run live, or kill it.

    Args:
        path: of its checkpoint.
        kind: how its steps run.
        after: so many steps; None to let it live.
        wait: and so many seconds.

    Returns:
        Its steps, what it left, and how many seconds it lived.
    """
    inside, outside = os.pipe()
    result = path.with_name(f"{path.name}-result")
    begin = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(inside)
            result.write_text(train(path, kind, outside))
        finally:
            os._exit(0)
    os.close(outside)
    told = b""
    if after is not None:
        while len(told) < 4 * after and (part := os.read(inside, 4 * after - len(told))):
            told += part
        time.sleep(wait)
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(inside, "rb") as file:
        told += file.read()
    os.waitpid(pid, 0)
    steps = [int.from_bytes(told[i : i + 4], "big") for i in range(0, len(told) - 3, 4)]
    digest = result.read_text() if result.exists() else ""
    return steps, digest, time.perf_counter() - begin


# --- a full disk --------------------------------------------------------------------------


class Full(pv.callbacks.Callback):
    """From a step on, no file may grow beyond a size."""

    def __init__(self, step: int, size: int) -> None:
        self.first, self.size = step, size

    def on_step(self, step: pv.callbacks.Step) -> None:
        """Set the limit."""
        if step.step == self.first:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, hard))


def full_disk(sizes: int, folder: Path) -> tuple[Counter[str], bool]:
    """Let writes of checkpoints fail at many lengths."""
    wanted = forked(lambda: train(None, False))
    good = folder / "good"
    forked(lambda: train(good, False, epochs=2))
    content, counts = good.read_bytes(), Counter(sizes=sizes)
    for number in range(sizes):
        size = number * (len(content) - 1) // max(sizes - 1, 1)
        for when in ("first", "later"):
            path = folder / f"{when}{number}"
            shutil.copyfile(good, path)
            step = 15 if when == "first" else 20  # 14 are in the file; 17 and 20 are written

            def run(path: Path = path, size: int = size, step: int = step) -> str:
                logging.disable()
                try:
                    return train(path, False, callbacks=[Full(step, size)])
                except OSError as error:
                    return f"{type(error).__name__} {error.__notes__}"

            found = forked(run)
            step_there = checkpoints.load(path)["progress"]["step"]
            if when == "first":
                stays = path.read_bytes() == content
                counts["first write: OSError, the file as it was"] += stays and "OSError" in found
            else:
                counts["later: same numbers, the one before stays"] += (
                    found == wanted and step_there == 17
                )
            counts["files left over"] += len(list(folder.glob(f".{path.name}.*")))
    names = (
        "first write: OSError, the file as it was",
        "later: same numbers, the one before stays",
    )
    return counts, all(counts[n] == sizes for n in names) and not counts["files left over"]


# --- files that are damaged -----------------------------------------------------------------


def outcome(read: Callable[[Path], Any], path: Path) -> str:
    """Return how a file was taken: read, refused by name, or what else was raised."""
    try:
        read(path)
    except (ValueError, FileNotFoundError) as error:
        return "refused by name" if path.name in str(error) else f"refused without a name: {error}"
    except Exception as error:  # noqa: BLE001 - each is counted
        return f"{type(error).__name__}: {error}"
    return "read"


def readers() -> dict[str, Callable[[Path], Any]]:
    """Return what reads each kind of file to the end."""
    model, guide = make_pair()

    def read_checkpoint(path: Path) -> None:
        checkpoints.load(path)
        pv.load(path, model, guide)

    return {
        "checkpoint": read_checkpoint,
        "pair": lambda path: pv.load(path, model, guide),
        "data": pv.datasets.load,
    }


def examples(folder: Path) -> dict[str, list[Path]]:
    """Write good files of each kind."""
    folder.mkdir(exist_ok=True)
    model, guide = make_pair()
    forked(lambda: train(folder / "run.ckpt", False, epochs=1))
    pv.save(folder / "pair.pt", model, guide)
    images = np.random.default_rng(1).integers(0, 256, (6, 5, 5)).astype(np.uint8)
    labels = np.arange(6, dtype=np.uint8)
    np.save(folder / "a.npy", images)
    np.savez(folder / "b.npz", x=images, y=labels)
    np.savez_compressed(folder / "c.npz", x_train=images, y_train=labels, x_test=images)
    idx = (0x803).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in (6, 5, 5))
    (folder / "d-images-idx3-ubyte").write_bytes(idx + images.tobytes())
    (folder / "e-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx + images.tobytes()))
    return {
        "checkpoint": [folder / "run.ckpt"],
        "pair": [folder / "pair.pt"],
        "data": sorted(folder.glob("[a-e]*")),
    }


def damaged(every: int, folder: Path) -> tuple[Counter[str], bool]:
    """Change each byte of sealed files, and cut them at each length."""

    def run() -> Counter[str]:
        counts: Counter[str] = Counter()
        for kind in ("checkpoint", "pair"):
            (source,) = examples(folder / "good")[kind]
            good, path, read = source.read_bytes(), folder / source.name, readers()[kind]
            path.write_bytes(good)
            counts[f"{kind} as it was: {outcome(read, path)}"] += 1
            for place in range(0, len(good), every):
                bad = bytearray(good)
                bad[place] ^= 1 << place % 8
                path.write_bytes(bad)
                counts[f"{kind}, a bit changed: {outcome(read, path)}"] += 1
                path.write_bytes(good[:place])
                counts[f"{kind}, cut: {outcome(read, path)}"] += 1
        return counts

    counts = forked(run)
    if isinstance(counts, str):
        return Counter([counts]), False
    fine = all(k.endswith("as it was: read") or k.endswith("refused by name") for k in counts)
    return counts, fine


# --- fuzzed and hostile files -----------------------------------------------------------------


def changed(content: bytes, rng: random.Random) -> bytes:
    """Return a file with a few random changes."""
    bad = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        place, size = rng.randrange(len(bad) + 1), min(rng.choice((1, 4, 16, 256)), len(bad))
        other = rng.randrange(len(bad) - size + 1)
        match rng.randrange(7):
            case 0:
                bad[place : place + 1] = bytes([rng.randrange(256)])
            case 1:
                bad[place : place + size] = rng.randbytes(size)
            case 2:
                bad[place : place + size] = b""
            case 3:
                bad[place:place] = bad[other : other + size]
            case 4:
                bad[place : place + size] = bad[other : other + size]
            case 5:
                bad[place : place + size] = rng.choice((b"\x00", b"\xff")) * size
            case _:
                del bad[place:]
        if not bad:
            break
    return bytes(bad) if bad != content else changed(content, rng)


def resealed(content: bytes) -> bytes:
    """Return a file with a checksum that is right."""
    return content + sealed._SEAL % hashlib.sha256(content).hexdigest().encode()


def first_format(path: Path, *, zipped: bool) -> bytes:
    """Return a checkpoint as the first version wrote it, or older PyTorch would have."""
    buffer, content = io.BytesIO(), checkpoints.load(path)
    torch.save({**content, checkpoints.KEY: 1}, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def repacked(content: bytes, rng: random.Random) -> bytes:
    """Return an archive whose pickle alone is changed, and whose checksums are right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as good, zipfile.ZipFile(buffer, "w") as made:
        for name in good.namelist():
            part = good.read(name)
            made.writestr(name, changed(part, rng) if name.endswith("data.pkl") else part)
    return buffer.getvalue()


def fuzzed_files(
    kind: str, sources: list[Path], number: int, rng: random.Random
) -> Iterator[tuple[str, str, bytes]]:
    """Yield files: how they were made, their names, their contents."""
    ways = ["as it is"] if kind == "data" else ["as it is", "sealed anew", "pickle, sealed anew"]
    ways += ["first format", "first format, legacy"] if kind == "checkpoint" else []
    for i in range(number):
        way, source = ways[i % len(ways)], rng.choice(sources)
        content = source.read_bytes()
        body = content[: -sealed._SEAL_SIZE]
        if way == "as it is":
            yield way, source.name, changed(content, rng)
        elif way == "sealed anew":
            yield way, source.name, resealed(changed(body, rng))
        elif way == "pickle, sealed anew":
            yield way, source.name, resealed(repacked(body, rng))
        else:
            yield way, source.name, changed(first_format(source, zipped=way == ways[-2]), rng)


_WATCHED = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "os.mkdir")
events: list[str] = []


def fuzz(kind: str, number: int, seed: int, folder: Path) -> Counter[str]:
    """Read files that were changed at random; return how each was taken."""
    sources, read = examples(folder / "good")[kind], readers()[kind]
    work = folder / kind
    work.mkdir(exist_ok=True)
    counts: Counter[str] = Counter()
    sys.addaudithook(lambda event, _: events.append(event) if event in _WATCHED else None)
    for way, name, content in fuzzed_files(kind, sources, number, random.Random(seed)):
        path = work / name
        path.write_bytes(content)
        counts[f"{kind}, {way}: {outcome(read, path)}"] += 1
    counts["events of programs or folders"] = len(events)
    return counts


def fuzzed(number: int, seed: int, folder: Path) -> tuple[Counter[str], bool]:
    """Read changed files of each kind, in blocks, each in a process of its own."""
    counts: Counter[str] = Counter()
    for kind in ("checkpoint", "pair", "data"):
        for block in range(0, number, 500):
            size = min(500, number - block)
            found = forked(lambda kind=kind, n=size, b=block: fuzz(kind, n, seed + b, folder))
            counts.update([f"{kind}: {found}"] if isinstance(found, str) else found)
    fine = ("refused by name", "read")
    return counts, all(k.endswith(fine) or not v for k, v in counts.items())


class Payload:
    """Makes a folder where it is unpickled."""

    def __init__(self, call: Any, *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.args


def hostile(folder: Path) -> tuple[Counter[str], bool]:
    """Read files that run code where they are unpickled; return how many did."""

    def run() -> Counter[str]:
        counts, victim = Counter[str](), folder / "victim"
        calls = (
            Payload(os.mkdir, str(victim)),
            Payload(eval, f"__import__('os').mkdir({str(victim)!r})"),
        )
        (source,) = examples(folder / "good")["checkpoint"]
        content = checkpoints.load(source)
        for call in calls:
            for place in ("progress", "last", "optimizer", "random", "added"):
                for zipped in (True, False):
                    buffer = io.BytesIO()
                    bad = {**content, place: call}
                    torch.save(bad, buffer, _use_new_zipfile_serialization=zipped)
                    path = folder / "hostile.pt"
                    path.write_bytes(resealed(buffer.getvalue()))
                    for kind in ("checkpoint", "pair"):
                        counts[f"{kind}: {outcome(readers()[kind], path)}"] += 1
            path = folder / "hostile.npy"
            np.save(path, np.array([call], dtype=object), allow_pickle=True)
            counts[f"data: {outcome(pv.datasets.load, path)}"] += 1
            np.savez(folder / "hostile.npz", x=np.array([call], dtype=object))
            counts[f"data: {outcome(pv.datasets.load, folder / 'hostile.npz')}"] += 1
            counts["that ran"] += victim.exists()
        return counts

    counts = forked(run)
    if isinstance(counts, str):
        return Counter([counts]), False
    return counts, all(k.endswith("refused by name") or not v for k, v in counts.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="runs that are killed")
    parser.add_argument("--sizes", type=int, default=30, help="sizes of a full disk")
    parser.add_argument("--fuzz", type=int, default=10_000, help="changed files of each kind")
    parser.add_argument("--every", type=int, default=1, help="bytes from a change to the next")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="*", help="of those above; all by default")
    parser.add_argument("--folder", help="where files are written; /dev/shm, where there is one")
    options = parser.parse_args()
    torch.set_num_threads(1)  # else a forked process would wait for threads that it lacks
    logging.getLogger("pyro_vae").setLevel(logging.ERROR)
    print(machine.describe())
    failed = 0
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where a sync takes no time
    with tempfile.TemporaryDirectory(dir=options.folder or memory) as name:
        folder = Path(name)
        parts: dict[str, Callable[[Path], tuple[Counter[str], bool]]] = {
            "killed": lambda p: killed(options.kills, random.Random(options.seed), p),
            "full disk": lambda p: full_disk(options.sizes, p),
            "damaged": lambda p: damaged(options.every, p),
            "fuzzed": lambda p: fuzzed(options.fuzz, options.seed, p),
            "hostile": hostile,
        }
        for part, run in parts.items():
            if options.parts and part not in options.parts:
                continue
            own = folder / part.replace(" ", "-")
            own.mkdir()
            begin = time.perf_counter()
            counts, fine = run(own)
            verdict, seconds = "as it should" if fine else "FAILED", time.perf_counter() - begin
            print(f"\n{part}: {verdict} ({seconds:.0f} s)")
            for what, count in sorted(counts.items()):
                print(f"  {count:7d}  {what}", flush=True)
            failed += not fine
    return failed


if __name__ == "__main__":
    sys.exit(main())
