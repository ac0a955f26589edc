"""A page stands alone: no script, nothing from elsewhere, figures inside, names escaped."""

from __future__ import annotations

import base64
import re
import sys

import matplotlib
import pytest
from matplotlib import pyplot as plt

from pyro_vae.report.findings import Finding
from pyro_vae.report.page import Drawing, Section, Table, page, written
from tests.test_markup import Balanced

matplotlib.use("Agg")
NAME = "</main><script>alert(1)</script>"


def drawn(count: int):
    def draw():
        _, ax = plt.subplots()
        ax.scatter(range(count), range(count))
        return ax

    return Drawing(draw, f"{NAME} \"'")


def section(*drawings):
    finding = Finding(NAME, "bad", NAME, {NAME: 1.23456}, NAME)
    tables = [Table([["", NAME], [NAME, "1"]], NAME), Table([["a"], ["b"]], "folded", True)]
    return Section(NAME, [NAME], {"": [finding], NAME: [finding]}, tables, drawings)


def test_it_is_whole_and_escaped():
    text = page(NAME, [section(drawn(3))])
    found = Balanced(text).found
    assert "<script" not in text and NAME in found
    assert f"Problem, {NAME}:" in found and f"From: {NAME} = 1.235" in found
    assert text.count("<details>") == 2  # the second part's findings, the folded table
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "http" not in re.sub(r"base64,[\w+/=]+", "", text)
    assert '<meta name="viewport"' in text and 'lang="en"' in text
    assert "prefers-color-scheme:dark" in text


@pytest.mark.parametrize(("count", "kind"), [(3, "svg+xml"), (20_000, "png")])
def test_figures_are_inside(count, kind):
    before = plt.get_fignums()
    text = page("title", [section(drawn(count))])
    assert plt.get_fignums() == before
    found_kind, found = re.search(r'src="data:image/([\w+]+);base64,([\w+/=]+)"', text).groups()
    assert found_kind == kind
    start = b"<?xml" if kind == "svg+xml" else b"\x89PNG"
    assert base64.b64decode(found).startswith(start)


def test_the_same_page_twice():
    one, two = (page("title", [section(drawn(3))]) for _ in range(2))
    assert one == two


def test_it_is_written_where_a_file_is_named(tmp_path):
    assert written("ü", None) == "ü"
    assert written("ü", tmp_path / "page.html") == "ü"
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == "ü"


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pyro-vae\[plots\]"):
        page("title", [section(drawn(3))])
