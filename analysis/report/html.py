"""``report.html``: one file, nothing from the network, readable on a desk and on a phone."""

from __future__ import annotations

import base64
import io
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import matplotlib as mpl
from matplotlib.figure import Figure

from analysis.report.answer import answer
from analysis.report.figures import STYLE, Picture
from analysis.report.summary import Summary
from analysis.report.tables import Table


@dataclass(frozen=True)
class Part:
    """A section with its tables."""

    summary: Summary
    tables: Sequence[Table]


@dataclass(frozen=True)
class About:
    """What the page says of itself: experiment, store, which runs, what was left out, command."""

    experiment: str
    store: str
    source: str
    left_out: Sequence[str]
    command: str


def page(about: About, parts: Sequence[Part], drawn: Sequence[Sequence[Picture]]) -> str:
    """The whole page.

    Args:
        drawn: the figures of each part.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = [
        {
            "id": f"section-{at}",
            "title": part.summary.section.title,
            "stage": part.summary.section.stage,
            "split": part.summary.split,
            "answer": answer(part.summary),
            "tables": part.tables,
            "groups": _groups(pictures),
            "runs": _runs(part.summary),
        }
        for at, (part, pictures) in enumerate(zip(parts, drawn, strict=True))
    ]
    return environment.get_template("page.html.j2").render(about=about, sections=sections)


def _groups(pictures: Sequence[Picture]) -> list[dict[str, object]]:
    """Figures by their group, as data URIs."""
    return [
        {
            "title": title,
            "pictures": [{"source": data_uri(p.figure), "caption": p.caption} for p in group],
        }
        for title, group in itertools.groupby(pictures, key=lambda picture: picture.group)
    ]


def data_uri(figure: Figure) -> str:
    """A figure as SVG inside an address; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):  # names of clip paths are salted when they are written
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = re.sub(rb"<metadata>.*?</metadata>", b"", buffer.getvalue(), flags=re.DOTALL)
    return f"data:image/svg+xml;base64,{base64.b64encode(text).decode()}"


def _runs(summary: Summary) -> list[tuple[str, int, str, str, str]]:
    """Label, seed, run id, partition and data digest of every run that was used."""
    return [
        (row.label, n.key.seed, n.run.run_id, n.key.partition[:8], n.key.data[:8])
        for row in summary.rows
        for n in row.numbers
    ]
