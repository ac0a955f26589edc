"""The benchmark of data that do not fit in memory, on a small file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_each_part_runs_in_bounded_memory(tmp_path):
    """Counts that are made, trained on, bounded and exported; nothing is left behind."""
    pytest.importorskip("zarr")
    script = ROOT / "benchmarks" / "large_data.py"
    arguments = ["--rows", "10000", "--columns", "200", "--bounded", "3000", "--folder", tmp_path]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    parts = dict(re.findall(r"^(make|fit|bounds|posterior): (.*)$", done.stdout, re.MULTILINE))
    assert list(parts) == ["make", "fit", "bounds", "posterior"]
    peaks = [int(re.search(r"(\d+) MiB at the peak", told)[1]) for told in parts.values()]
    assert max(peaks) < 2048
    assert "20 steps" in parts["fit"]
    elbo, iwae = map(float, re.findall(r" (-\d+\.\d+) ±", parts["bounds"]))
    assert elbo < iwae
    assert "'draw': 20, 'datum': 3000" in parts["posterior"]
    assert list(tmp_path.iterdir()) == []
