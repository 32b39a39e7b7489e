"""Command line of the report."""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis.report.answer import answer
from analysis.report.frames import clients_frame, curves_frame, difference_frame, table_frame
from analysis.report.grouping import sections
from analysis.report.html import About, Part, page
from analysis.report.layout import tables
from analysis.report.plots import pictures
from analysis.report.selection import Selection, select
from analysis.report.store import Store, nearest
from analysis.report.summary import Summary, summarize
from analysis.report.tables import latex, markdown
from selffl_ray.errors import UsageError
from selffl_ray.tables import write_text

EXAMPLE = "example: python -m analysis.report --experiment digits --store sqlite:///mlflow.db"
PNG_DPI = 200


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.report",
        description="Tables, plots and one page from the runs of an MLflow experiment.",
        epilog=EXAMPLE,
    )
    parser.add_argument("--experiment", required=True, metavar="NAME", help="MLflow experiment")
    parser.add_argument("--output", metavar="DIR", help="default: reports/NAME")
    parser.add_argument(
        "--store", metavar="URI", help="default: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db"
    )
    parser.add_argument(
        "--parent",
        metavar="RUN",
        help="id or name of a sweep's parent run; default: the newest sweep, if there is one",
    )
    parser.add_argument(
        "--reference",
        metavar="LABEL",
        help="row that the others are compared with; default: FedAvg's, if there is one",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report.

    Returns:
        0; or, after one line that says what to mend, 2, or 1 if a file could not be written.
    """
    options = build_parser().parse_args(arguments)
    try:
        report(options)
    except UsageError as error:
        print(f"report: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"report: {error}; give another folder as --output", file=sys.stderr)
        return 1
    return 0


def report(options: argparse.Namespace) -> None:
    """Read the store, write all files, print where they lie and the tables.

    Raises:
        UsageError: store, experiment, parent or reference that is not there.
    """
    about, parts = gather(options)
    output = Path(options.output or Path("reports") / options.experiment).absolute()
    print(write_tables(output, about, parts))
    write_page(output, about, parts)
    print(f"report: {output / 'report.html'}")


def gather(options: argparse.Namespace) -> tuple[About, list[Part]]:
    """All numbers and tables, read from the store.

    Raises:
        UsageError: store, experiment, parent or reference that is not there.
    """
    store = Store(options.store)
    selection = select(store.runs(options.experiment), options.parent)
    found = sections(selection.runs)
    summaries = [summarize(store, section, options.reference) for section in found]
    _check_reference(options.reference, summaries)
    parts = [Part(summary, tables(summary)) for summary in summaries]
    return _about(options, store, selection), parts


def _check_reference(wanted: str | None, summaries: Sequence[Summary]) -> None:
    labels = list(dict.fromkeys(row.label for s in summaries for row in s.rows))
    if wanted is not None and wanted not in labels:
        raise UsageError(
            f"--reference {wanted!r}: no row has that label; {nearest(wanted, labels)}"
        )


def _about(options: argparse.Namespace, store: Store, selection: Selection) -> About:
    command = ["python", "-m", "analysis.report"]
    for name in ("experiment", "parent", "reference"):
        if (value := getattr(options, name)) is not None:
            command += [f"--{name}", value]
    command += ["--store", store.public_uri]
    return About(
        options.experiment,
        store.public_uri,
        selection.source,
        selection.left_out,
        shlex.join(command),
    )


def write_tables(output: Path, about: About, parts: Sequence[Part]) -> str:
    """Markdown, LaTeX and CSV files; returns the Markdown."""
    text = _markdown(about, parts)
    write_text(output / "table.md", text + "\n")
    write_text(output / "table.tex", _latex(about, parts))
    summaries = [part.summary for part in parts]
    for name, frame in (
        ("table", table_frame(summaries)),
        ("differences", difference_frame(summaries)),
        ("clients", clients_frame(summaries)),
        ("curves", curves_frame(summaries)),
    ):
        _write_csv(output / f"{name}.csv", frame)
    return text


def write_page(output: Path, about: About, parts: Sequence[Part]) -> None:
    """The figures as PNG, and ``report.html``."""
    drawn = [pictures(part.summary) for part in parts]
    for picture in itertools.chain.from_iterable(drawn):
        picture.figure.savefig(output / f"{picture.name}.png", dpi=PNG_DPI)
    write_text(output / "report.html", page(about, parts, drawn))


def _write_csv(path: Path, frame: pd.DataFrame) -> None:
    write_text(path, frame.to_csv(index=False, lineterminator="\n"))


def _markdown(about: About, parts: Sequence[Part]) -> str:
    blocks = [f"## {about.experiment}"]
    for part in parts:
        blocks.append(" ".join(answer(part.summary)))
        blocks += [markdown(table) for table in part.tables]
    left = "; ".join(about.left_out) or "nothing"
    blocks.append(f"Runs: {about.source}. Left out: {left}. Made by `{about.command}`.")
    return "\n\n".join(blocks)


def _latex(about: About, parts: Sequence[Part]) -> str:
    head = [
        f"% Made by {about.command}",
        r"% Needs \usepackage{booktabs}; \input it where the tables belong.",
    ]
    return "\n\n".join(["\n".join(head), *(latex(t) for p in parts for t in p.tables)]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
