"""The command ``pyro-vae``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    Args:
        argv: the arguments; those of the process by default.
    """
    arguments = vars(_parser().parse_args(argv))
    command = _demo if arguments.pop("command") == "demo" else _report
    try:
        command(**arguments)
    except KeyboardInterrupt:
        print("pyro-vae: interrupted", file=sys.stderr)
        return 130
    except (OSError, ValueError, ImportError) as error:
        print(f"pyro-vae: {error}", file=sys.stderr)
        return 1
    return 0


# Their imports are inside, because `pyro-vae --help` should not wait for PyTorch.


def _demo(*, quick: bool, **arguments: Any) -> None:
    from pyro_vae.demo import Settings, run

    settings, progress = Settings.quick() if quick else Settings(), sys.stderr.isatty() or not quick
    run(settings, progress=progress, **arguments)


def _report(*, paths: Sequence[Path], output: Path) -> None:
    from pyro_vae.evaluation.saved import report_of_files

    output.write_text(report_of_files(paths), encoding="utf-8")
    print(f"wrote {output}")


def _parser() -> argparse.ArgumentParser:
    from importlib.metadata import version

    parser = argparse.ArgumentParser(
        prog="pyro-vae", description="Amortized variational inference in Pyro, checked."
    )
    parser.add_argument("--version", action="version", version=version("pyro-vae"))
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo", help="train a VAE on images and say how wrong its posterior is"
    )
    demo.description = (
        "Train a VAE, compare its encoder with per-datum guides on training and held-out images, "
        "mend the posteriors of held-out ones, and write the posterior for ArviZ, tables of gaps "
        "and repairs, figures, and a report for a browser."
    )
    images = ".npz, .npy, idx, idx.gz or a folder of MNIST's files (default: the 8x8 digits)"
    demo.add_argument("--data", type=Path, help=images)
    demo.add_argument(
        "--output", type=Path, default=Path("demo-output"), help="folder (default: %(default)s)"
    )
    demo.add_argument("--quick", action="store_true", help="a short run, to see that it works")
    demo.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    demo.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    report = commands.add_parser("report", help="one page of what results say, for a browser")
    report.description = (
        "Write a page of findings in plain words, tables and figures from netCDF files of results: "
        'result.dataset.to_netcdf("name.nc") of pv.compare, pv.repair, pv.bdmc, pv.sbc, '
        "pv.coverage, pv.compare_models and pv.outliers. The page needs nothing else. "
        "Comparisons in comparison-train.nc and comparison-test.nc are "
        "compared with each other."
    )
    paths = "netCDF files, or folders of them; of a folder, files of other kinds are left out"
    report.add_argument("paths", type=Path, nargs="+", metavar="FILE_OR_FOLDER", help=paths)
    report.add_argument(
        "--output", type=Path, default=Path("report.html"), help="file (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
