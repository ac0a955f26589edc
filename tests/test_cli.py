"""The command line; what it runs is tested in test_demo.py."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

from pyro_vae import cli
from tests.report.cases import repair_dataset


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--version"], version("pyro-vae")),
        (["--help"], "demo"),
        (["demo", "--help"], "--data"),
        (["report", "--help"], "FILE_OR_FOLDER"),
    ],
)
def test_asks_and_leaves(argv, told, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(argv)
    assert left.value.code == 0
    assert told in capsys.readouterr().out


def test_help_does_not_wait_for_torch():
    code = (
        "import sys, importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('cli', {cli.__file__!r})\n"
        "cli = importlib.util.module_from_spec(spec); spec.loader.exec_module(cli)\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["demo", "--seed", "x"], ["report"]])
def test_bad_arguments(argv, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(argv)
    assert left.value.code == 2
    assert "usage: pyro-vae" in capsys.readouterr().err


def test_a_missing_data_file(tmp_path, capsys):
    missing = tmp_path / "missing.npz"
    status = cli.main(["demo", "--quick", "--data", str(missing), "--output", str(tmp_path / "o")])
    assert status == 1
    told = capsys.readouterr().err
    assert told.startswith("pyro-vae: ")
    assert str(missing) in told


def test_an_output_that_is_a_file(tmp_path, capsys):
    path = tmp_path / "file"
    path.touch()
    assert cli.main(["demo", "--quick", "--output", str(path)]) == 1
    assert str(path) in capsys.readouterr().err


def test_a_report_of_files(tmp_path, capsys):
    path, page = tmp_path / "mine.nc", tmp_path / "page.html"
    repair_dataset().to_netcdf(path)
    assert cli.main(["report", str(path), "--output", str(page)]) == 0
    assert capsys.readouterr().out == f"wrote {page}\n"
    assert "Posteriors mended" in page.read_text(encoding="utf-8")
    assert cli.main(["report", str(tmp_path / "none.nc"), "--output", str(page)]) == 1
    assert "none.nc" in capsys.readouterr().err
