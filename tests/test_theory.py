"""The code of docs/theory.md runs, in order, and its figures are those that the example draws."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
FIGURES = re.findall(r"^!\[[^\]]+\]\(figures/([\w.]+)\)$", TEXT, re.MULTILINE)


@pytest.mark.slow
def test_the_code_of_the_page_runs():
    namespace: dict[str, object] = {}
    for block in re.finditer(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE):
        # Blank lines, so that a failure names the line of the page.
        before = "\n" * (TEXT[: block.start()].count("\n") + 1)
        exec(compile(before + block[1], "docs/theory.md", "exec"), namespace)


def test_every_block_of_code_checks_something():
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    assert len(blocks) > 20
    for block in blocks[1:]:  # the first one imports
        assert re.search(r"^ *(assert |torch\.testing\.assert_close)", block, re.MULTILINE), block


def test_every_figure_is_there():
    assert len(FIGURES) == 5
    for name in FIGURES:
        figure = ROOT / "docs" / "figures" / name
        assert figure.read_bytes().startswith(b"\x89PNG"), name
        assert figure.stat().st_size < 150_000, name


@pytest.mark.slow
def test_the_example_draws_every_figure(tmp_path: Path):
    script = ROOT / "docs" / "theory_figures.py"
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), "--quick", "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FIGURES)


def test_the_references_are_those_of_the_text():
    text, listed = TEXT.split("## References")
    entries = re.findall(r"^- (.+?) \((\d{4})\)\.", listed, re.MULTILINE)
    firsts = [re.split(r"[,&]", authors)[0].strip() for authors, _ in entries]
    assert len(entries) == listed.count("\n- ")
    assert firsts == sorted(firsts)
    for first, (_, year) in zip(firsts, entries, strict=True):
        assert re.search(rf"{first}[^()]*{year}|{first}[^()]*\({year}", text), (first, year)
