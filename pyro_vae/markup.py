"""Tables of results as text, and as HTML, escaped; for notebooks and for the report."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

_DIGITS = 3


def plus_minus(value: float, error: float = math.nan) -> str:
    """Return a number with its standard error, "-" where there is none.

    >>> plus_minus(1.23456, 0.01), plus_minus(2.0), plus_minus(float("nan"))
    ('1.235 ± 0.010', '2.000', '-')
    """
    if math.isnan(value):
        return "-"
    return f"{value:.{_DIGITS}f}" + ("" if math.isnan(error) else f" ± {error:.{_DIGITS}f}")


def cells(frame: pd.DataFrame) -> list[list[str]]:
    """Return a table as text: a head, and rows that begin with their names.

    A column ``x_se`` stands behind that of ``x``, as its standard error.
    """
    names = [name for name in map(str, frame.columns) if not name.endswith("_se")]
    head = [str(frame.index.name or ""), *(name.replace("_", " ") for name in names)]
    rows = [head]
    for label, row in frame.iterrows():
        rows.append([str(label), *(_cell(row[n], row.get(f"{n}_se", math.nan)) for n in names)])
    return rows


def _cell(value: object, error: float) -> str:
    if isinstance(value, float):
        whole = value == round(value) if math.isfinite(value) else False
        return f"{value:.0f}" if whole and math.isnan(error) else plus_minus(value, error)
    return str(value)


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text: its first row is the head, the first cell of each row a name.

    >>> print(text_table([("guide", "ELBO"), ("mine", "-1.25")]))
    guide |  ELBO
    ------+------
    mine  | -1.25
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *lines = (
        " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )
    return "\n".join([head, "-+-".join("-" * width for width in widths), *lines])


def table(rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """Return a table: its first row is the head, the first cell of each other one its name."""
    head, *body = rows
    columns = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    lines = []
    for name, *others in body:
        numbers = "".join(f"<td>{html.escape(cell)}</td>" for cell in others)
        lines.append(f'<tr><th scope="row">{html.escape(name)}</th>{numbers}</tr>')
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{columns}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def paragraphs(lines: Iterable[str]) -> str:
    """Return a paragraph for each line of text that is not empty."""
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines if line)


def result(frame: pd.DataFrame, lines: Iterable[str]) -> str:
    """Return what a notebook shows of a result: its table, and what is to be said of it."""
    return table(cells(frame)) + paragraphs(lines)
