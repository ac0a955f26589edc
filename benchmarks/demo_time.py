"""Wall time of the demo and its parts, over a few runs.

    python benchmarks/demo_time.py [--runs 3] [--quick] [--data FILE]

Each run is a process of its own, so that the first steps of training and the imports count in
every one of them, as they do for a user.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time

import machine


def one_run(options: list[str]) -> dict[str, float]:
    """Run the demo; return the seconds of each part, and of the whole process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pyro_vae.cli", "demo", "--output", folder, *options]
        begin = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        whole = time.perf_counter() - begin
    # The demo's last line: "61.2 s: train 20.1 s, compare on train 18.0 s, ...".
    parts = re.findall(r"(?:: |, )([^:,]+?) ([0-9.]+) s", done.stdout.splitlines()[-1])
    seconds = {name: float(value) for name, value in parts}
    rest = whole - sum(seconds.values())
    return {**seconds, "imports and the rest": rest, "whole process": whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="the demo's own short run")
    parser.add_argument("--data", help="images, as for pyro-vae demo (default: the digits)")
    arguments = parser.parse_args()
    options = ["--quick"] if arguments.quick else []
    options += ["--data", arguments.data] if arguments.data else []
    print(machine.describe())
    runs = [one_run(options) for _ in range(arguments.runs)]
    print(f"pyro-vae demo {'--quick ' * arguments.quick}, {len(runs)} runs")
    print(f"{'part':<24} {'median s':>9} {'min - max':>15}")
    for part in runs[0]:
        found = [run[part] for run in runs]
        print(
            f"{part:<24} {statistics.median(found):9.1f} "
            f"{f'{min(found):.1f} - {max(found):.1f}':>15}"
        )


if __name__ == "__main__":
    main()
