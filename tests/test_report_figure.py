"""The picture of a report in the documentation is made by a command: a page, and a browser."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import matplotlib
import pytest

from tests.report.cases import comparison_dataset

matplotlib.use("Agg")

SCRIPT = Path(__file__).resolve().parents[1] / "docs" / "report_figure.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("report_figure", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_browser_is_given_the_page(script, monkeypatch, tmp_path, capsys):
    """One that writes the page that it is shown, in place of a picture of it."""
    fake = tmp_path / "chromium"
    fake.write_text(
        '#!/bin/sh\nfor a in "$@"; do case $a in --screenshot=*) out=${a#*=};; esac; done\n'
        'cp "${a#file://}" "$out"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setattr(script.shutil, "which", lambda name: str(fake))
    comparison_dataset(encoder=2.0).to_netcdf(tmp_path / "comparison-test.nc")
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path), "--output", str(tmp_path)])
    script.main()
    assert "Guides compared" in (tmp_path / "report.png").read_text()
    assert "report.png" in capsys.readouterr().out


def test_without_a_browser(script, monkeypatch):
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="a browser is needed"):
        script.browser()
