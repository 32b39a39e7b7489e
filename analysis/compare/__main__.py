"""Command line of the comparison."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from analysis.compare.forest import forests
from analysis.compare.frames import differences_frame, methods_frame
from analysis.compare.layout import differences_table, methods_table, reading_notes
from analysis.compare.paired import Compared, compare_scenes, pool, titles
from analysis.compare.scenes import Study, read_study
from analysis.compare.verdict import verdict
from analysis.report.store import Store
from analysis.report.tables import markdown
from selffl_ray.errors import UsageError
from selffl_ray.tables import write_text

EXAMPLE = (
    "example: python -m analysis.compare --experiment baselines --reference selffl-two_tap "
    "--output reports/compare"
)
PNG_DPI = 200


class Comparison(NamedTuple):
    """All numbers, and the command that gives them."""

    study: Study
    compared: list[Compared]
    pooled: list[Compared]
    command: str


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.compare",
        description="Paired differences of Self-FL, or any method, to every other method.",
        epilog=EXAMPLE,
    )
    parser.add_argument(
        "--experiment",
        required=True,
        action="append",
        metavar="NAME",
        help="MLflow experiment; repeat it for several",
    )
    parser.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="LABEL",
        help="method compared with all others; repeatable; default: every selffl-PRESET found",
    )
    parser.add_argument(
        "--parent",
        metavar="RUN",
        help="id or name of a sweep's parent run; default: the newest sweep, if there is one",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder for compare.md, methods.csv, differences.csv and the figures; default: none",
    )
    parser.add_argument(
        "--store", metavar="URI", help="default: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare.

    Returns:
        0; or, after one line that says what to mend, 2, or 1 if a file could not be written.
    """
    options = build_parser().parse_args(arguments)
    try:
        comparison = gather(options)
        text = report(comparison)
        if options.output is not None:
            write(Path(options.output).absolute(), comparison, text)
    except UsageError as error:
        print(f"compare: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"compare: {error}; give another folder as --output", file=sys.stderr)
        return 1
    print(text)
    return 0


def gather(options: argparse.Namespace) -> Comparison:
    """All numbers, read from the store.

    Raises:
        UsageError: what :func:`~analysis.compare.scenes.read_study` refuses.
    """
    store = Store(options.store)
    study = read_study(store, options.experiment, options.parent, options.reference)
    compared = compare_scenes(study.scenes)
    return Comparison(study, compared, pool(compared), _command(options, store))


def _command(options: argparse.Namespace, store: Store) -> str:
    words = ["python", "-m", "analysis.compare"]
    for name in options.experiment:
        words += ["--experiment", name]
    for label in options.reference:
        words += ["--reference", label]
    if options.parent is not None:
        words += ["--parent", options.parent]
    return shlex.join([*words, "--store", store.public_uri])


def report(comparison: Comparison) -> str:
    """Everything as Markdown: methods, verdicts, differences, how to read them."""
    study, compared, pooled, command = comparison
    everything = [*compared, *pooled]
    blocks = [f"## {', '.join(study.references)} against the other methods"]
    blocks += [markdown(methods_table(scene)) for scene in study.scenes]
    blocks += [
        verdict(compared, pooled, label, study.failures(label)) for label in study.references
    ]
    for title in titles(everything):
        for label in study.references:
            own = [o for o in everything if (o.scene, o.reference) == (title, label)]
            if own:
                blocks.append(markdown(differences_table(title, label, own)))
    notes = reading_notes(study.scenes, compared)
    notes.append(f"Runs: {'; '.join(study.sources)}.")
    notes.append(f"Left out: {'; '.join(study.left_out) or 'nothing'}.")
    notes.append(f"Made by `{command}`.")
    blocks.append("\n".join(["### How to read this", "", *(f"- {note}" for note in notes)]))
    return "\n\n".join(blocks)


def write(output: Path, comparison: Comparison, text: str) -> None:
    """``compare.md``, ``methods.csv``, ``differences.csv``, and a PNG for every scene."""
    write_text(output / "compare.md", text + "\n")
    everything = [*comparison.compared, *comparison.pooled]
    _write_csv(output / "methods.csv", methods_frame(comparison.study.scenes))
    _write_csv(output / "differences.csv", differences_frame(everything))
    for picture in forests(comparison.compared, comparison.pooled):
        picture.figure.savefig(output / f"{picture.name}.png", dpi=PNG_DPI)


def _write_csv(path: Path, frame: pd.DataFrame) -> None:
    write_text(path, frame.to_csv(index=False, lineterminator="\n"))


if __name__ == "__main__":
    sys.exit(main())
