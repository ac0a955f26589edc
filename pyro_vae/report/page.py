"""One page of HTML that needs nothing else: no script, no link out, figures inside."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pyro_vae import markup
from pyro_vae.plots.results import pyplot
from pyro_vae.report.findings import THRESHOLDS, Finding, Severity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LARGEST_SVG = 300_000  # bytes; a figure of many marks is smaller as pixels
_LABELS: dict[Severity, str] = {
    "bad": "Problem",
    "warning": "Caution",
    "note": "Note",
    "good": "Fine",
}
_WORDS = {
    "log p(x)": "the evidence of a datum: how probable the model finds it. Estimates of it are "
    "lower bounds; a bound that is not to be trusted may be far too low",
    "ELBO": "what a guide q reaches of it: log p(x) less the Kullback-Leibler divergence of q from "
    "the posterior",
    "approximation gap": "what the family of q loses, fitted to each datum alone: log p(x) less "
    "the best ELBO of the family",
    "amortization gap": "what the encoder loses on top, by answering for all data at once: the "
    "best ELBO of the family less that of the guide",
    "ESS": "effective sample size: to how many draws of the posterior the weighted draws amount",
    "k-hat": "the shape of the tail of the importance weights: above the threshold a few draws may "
    "decide everything, unless the tail carries hardly any weight",
    "nats": "units of log density: 1 nat is a factor of 2.72 in probability, and 1.44 bits",
    "a ± b": "an estimate and its Monte Carlo standard error, for these data",
}

_STYLE = """
:root{color-scheme:light dark;--fg:#1b1b1b;--bg:#fff;--soft:#f3f4f6;--line:#c9ccd1;--dim:#565b63;
--bad:#b3261e;--warning:#8a5a00;--note:#1d5fa8;--good:#1a7340}
@media(prefers-color-scheme:dark){:root{--fg:#e6e6e6;--bg:#17181a;--soft:#22252a;--line:#454a52;
--dim:#a6adb7;--bad:#ff8a80;--warning:#ffc766;--note:#8ab8f5;--good:#7ddc9f}}
*{box-sizing:border-box}
body{margin:0;font:1rem/1.5 system-ui,sans-serif;color:var(--fg);background:var(--bg)}
main{max-width:58rem;margin:0 auto;padding:1rem;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.25}h2{margin-top:2.5rem;border-bottom:1px solid var(--line)}
h3{margin:1.6rem 0 .5rem}
a{color:var(--note)}
ul.findings{list-style:none;padding:0}
ul.findings li{border-left:.35rem solid var(--line);background:var(--soft);
margin:.6rem 0;padding:.6rem .8rem}
ul.findings p{margin:0 0 .3rem}
ul.findings .label{font-weight:700}
.bad{border-color:var(--bad)!important}.bad .label{color:var(--bad)}
.warning{border-color:var(--warning)!important}.warning .label{color:var(--warning)}
.note{border-color:var(--note)!important}.note .label{color:var(--note)}
.good{border-color:var(--good)!important}.good .label{color:var(--good)}
small{color:var(--dim)}
.wide{overflow-x:auto;margin:1rem 0;background:
linear-gradient(to left,#0000,var(--bg) 2rem) left/2.5rem 100% no-repeat local,
linear-gradient(to right,#0000,var(--bg) 2rem) right/2.5rem 100% no-repeat local,
linear-gradient(to left,#0000,var(--line)) left/.7rem 100% no-repeat scroll,
linear-gradient(to right,#0000,var(--line)) right/.7rem 100% no-repeat scroll}
td{white-space:nowrap}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92rem}
caption{text-align:left;padding:.3rem 0;color:var(--dim)}
th,td{padding:.25rem .7rem;border-bottom:1px solid var(--line);text-align:right;
overflow-wrap:normal}
th{text-align:left}thead th:not(:first-child){text-align:right}
figure{margin:1.2rem 0}
figure .wide{margin:0;background:#fff;border:1px solid var(--line);padding:.5rem}
img{display:block;width:100%;min-width:34rem;max-width:50rem;height:auto;max-height:31rem;
object-fit:contain;object-position:left}
figcaption b{display:none}
@media(max-width:40rem){figcaption b{display:block;font-weight:400}
main{padding:.7rem}th,td{padding:.25rem .2rem;font-size:.78rem}}
figcaption{color:var(--dim);margin-top:.4rem}
summary{cursor:pointer;margin:.6rem 0}
dt{font-weight:700}dd{margin:0 0 .5rem 1rem}
""".strip()


@dataclass(frozen=True)
class Table:
    """Rows of text, the first of them the head."""

    rows: Sequence[Sequence[str]]
    caption: str
    is_folded: bool = False


@dataclass(frozen=True)
class Drawing:
    """A figure: what draws it, and what it shows in words."""

    draw: Callable[[], Axes]
    caption: str


@dataclass(frozen=True)
class Section:
    """What a page says of one kind of result.

    Attributes:
        title: its heading.
        lead: what was done, in sentences.
        findings: by the part of the data that they are of, or ""; those of the first part are
            open, the others folded.
        tables: the numbers.
        drawings: figures of them.
    """

    title: str
    lead: Sequence[str]
    findings: Mapping[str, Sequence[Finding]]
    tables: Sequence[Table] = ()
    drawings: Sequence[Drawing] = ()


def page(title: str, sections: Sequence[Section]) -> str:
    """Return a page as HTML; needs the extra ``plots``.

    Args:
        title: of the page.
        sections: in order.

    Raises:
        ImportError: without Matplotlib, with the way to install it.
    """
    body = [f"<h1>{html.escape(title)}</h1>", *map(_section, sections), _glossary()]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def written(text: str, path: str | Path | None) -> str:
    """Return a page, written to a file where one is named."""
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def _section(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>", markup.paragraphs(section.lead)]
    for number, (part, findings) in enumerate(section.findings.items()):
        head = html.escape(f"Findings: {part}" if part else "Findings")
        listed = f'<ul class="findings">{"".join(map(_finding, findings))}</ul>'
        parts.append(_folded(head, listed) if number else f"<h3>{head}</h3>{listed}")
    if section.tables:
        parts.append("<h3>Numbers</h3>")
    for table in section.tables:
        shown = _wide(markup.table(table.rows), table.caption)
        caption = html.escape(table.caption)
        parts.append(_folded(caption, shown) if table.is_folded else f"<p>{caption}</p>{shown}")
    if section.drawings:
        parts.append("<h3>Figures</h3>")
    parts += map(_figure, section.drawings)
    return f"<section>{''.join(parts)}</section>"


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>{content}</details>"


def _finding(finding: Finding) -> str:
    label = f"{_LABELS[finding.severity]}, {finding.about}:"
    numbers = ", ".join(f"{name} = {value:.4g}" for name, value in finding.evidence.items())
    parts = [f'<p><span class="label">{html.escape(label)}</span> {html.escape(finding.text)}.</p>']
    if finding.advice:
        parts.append(f"<p>What to do: {html.escape(finding.advice)}</p>")
    if numbers:
        parts.append(f"<p><small>From: {html.escape(numbers)}</small></p>")
    return f'<li class="{finding.severity}">{"".join(parts)}</li>'


def _wide(content: str, label: str) -> str:
    """Return what scrolls by itself where the screen is narrow, by keys too."""
    named = f'tabindex="0" role="region" aria-label="{html.escape(label)}"'
    return f'<div class="wide" {named}>{content}</div>'


def _figure(drawing: Drawing) -> str:
    caption = html.escape(drawing.caption)
    image = f'<img alt="{caption}" src="{_encoded(drawing.draw)}">'
    # The hint shows where the screen is narrow.
    below = f"<figcaption><b>↔ scroll sideways</b>{caption}</figcaption>"
    return f"<figure>{_wide(image, 'figure')}{below}</figure>"


def _encoded(draw: Callable[[], Axes]) -> str:
    """Return a figure as a data URL: as curves, or as pixels where these are many."""
    plt = pyplot()
    figure = cast("Figure", draw().figure)
    try:
        # The same figure gives the same bytes.
        with plt.rc_context({"svg.hashsalt": "pyro_vae"}):
            written = _saved(figure, format="svg", metadata={"Date": None, "Creator": None})
        kind = "svg+xml"
        if len(written) > _LARGEST_SVG:
            kind, written = "png", _saved(figure, format="png", dpi=160)
    finally:
        plt.close(figure)
    return f"data:image/{kind};base64,{base64.b64encode(written).decode()}"


def _saved(figure: Figure, **options: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, bbox_inches="tight", facecolor="white", **options)
    return file.getvalue()


def _glossary() -> str:
    words, rules = (
        "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}.</dd>" for name, text in part)
        for part in (_WORDS.items(), THRESHOLDS.items())
    )
    return (
        f"<section><h2>Words</h2><dl>{words}</dl></section>"
        f"<section><h2>Thresholds of the findings</h2><dl>{rules}</dl></section>"
    )
