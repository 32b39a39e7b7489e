"""The tables of a section: scores, cost, the selected round, differences to the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from analysis.report.clients import ClientComparison
from analysis.report.grouping import PairKey
from analysis.report.measures import FACTORS, Measure, decimals, shown, signed, span
from analysis.report.notes import cost_notes, score_notes
from analysis.report.statistics import Interval, t_interval
from analysis.report.summary import Difference, RowSummary, Summary
from analysis.report.tables import Cell, Table

ABSENT = "n/a"

Column = tuple[Measure, list[Interval | None], tuple[bool, ...]]


def tables(summary: Summary) -> list[Table]:
    """All tables of a section, the main one first."""
    found = [scores_table(summary), cost_table(summary), selected_table(summary)]
    if summary.reference is not None and len(summary.rows) > 1:
        found.append(differences_table(summary, summary.reference))
    return found


def heading(summary: Summary, what: str) -> str:
    """Title of a table: what it shows, on which data set, in which stage of a sweep."""
    stage = {"confirm": ", confirmed with fresh seeds", "select": ", stage that selects"}
    return f"{what}, {summary.section.title}{stage.get(summary.section.stage, '')}"


def name(summary: Summary, what: str) -> str:
    """Short name of a table or figure, fit for a file name."""
    kept = "".join(c if c.isalnum() else "-" for c in f"{summary.section.title}-{what}".lower())
    stage = f"{summary.section.stage}-" if summary.section.stage else ""
    return stage + "-".join(filter(None, kept.split("-")))


def scores_table(summary: Summary) -> Table:
    """The main table."""
    measures = summary.columns()
    return Table(
        name(summary, "scores"),
        heading(summary, "Scores"),
        summary.split,
        ("method", *(column_title(m) for m in measures)),
        score_rows(summary, measures),
        tuple(score_notes(summary, measures)),
    )


def cost_table(summary: Summary) -> Table:
    """What each row spent."""
    measures = summary.costs()
    return Table(
        name(summary, "cost"),
        heading(summary, "Cost of one run"),
        "",
        ("method", *(column_title(m) for m in measures)),
        score_rows(summary, measures),
        tuple(cost_notes(summary)),
    )


def column_title(measure: Measure) -> str:
    """A column's title with its unit."""
    return f"{measure.title} (%)" if measure.unit == "percent" else measure.title


def score_rows(summary: Summary, measures: Sequence[Measure]) -> tuple[tuple[Cell, ...], ...]:
    """A row's label and a mean with its half-width for every column."""
    columns = [
        _cells([row.mean(m.metric) for row in summary.rows], m, summary.ranking(m).bold)
        for m in measures
    ]
    return tuple(
        (_label(row), *(column[at] for column in columns)) for at, row in enumerate(summary.rows)
    )


def _label(row: RowSummary) -> Cell:
    return Cell(f"{row.label} \N{BLACK STAR}" if row.row.chosen else row.label)


def _cells(
    intervals: Sequence[Interval | None], measure: Measure, bold: Sequence[bool]
) -> list[Cell]:
    factor = FACTORS[measure.unit]
    digits = decimals(measure.unit, [i.mean * factor for i in intervals if i is not None])
    return [
        Cell(ABSENT) if own is None else Cell(shown(own, factor, digits), mark)
        for own, mark in zip(intervals, bold, strict=True)
    ]


def selected_table(summary: Summary) -> Table:
    """The round with the best validation score of each run, beside the final one."""
    wanted = (summary.global_, summary.local)
    measures = [m for m in summary.columns() if m.metric in wanted]
    columns = [
        cells
        for m in measures
        for cells in (
            _cells([_mean(row.selected(m.metric)) for row in summary.rows], m, _plain(summary)),
            _cells([row.mean(m.metric) for row in summary.rows], m, _plain(summary)),
        )
    ]
    rows = tuple(
        (_label(row), Cell(_selected_rounds(row)), *(column[at] for column in columns))
        for at, row in enumerate(summary.rows)
    )
    titles = [f"{column_title(m)}, {which}" for m in measures for which in ("selected", "final")]
    notes = [
        "The round is selected in each run by the best val/local score, the first on a tie; "
        "rounds are counted from 1, one number for each seed.",
    ]
    if summary.split == "val":
        notes.append("The selected figures are the best of several on the same data: optimistic.")
    if any(cell.text == ABSENT for row in rows for cell in row):
        notes.append(f"{ABSENT}: the run has no validation data to select a round with.")
    return Table(
        name(summary, "selected"),
        heading(summary, "Selected round"),
        summary.split,
        ("method", "round", *titles),
        rows,
        tuple(notes),
    )


def _mean(values: Mapping[PairKey, float]) -> Interval | None:
    return t_interval(list(values.values())) if values else None


def _plain(summary: Summary) -> tuple[bool, ...]:
    return (False,) * len(summary.rows)


def _selected_rounds(row: RowSummary) -> str:
    found = [n.selected_round for n in row.numbers if n.selected_round is not None]
    return ", ".join(str(at + 1) for at in found) or ABSENT


def differences_table(summary: Summary, reference: RowSummary) -> Table:
    """Every row minus the reference: over seeds, and client by client."""
    found = summary.differences()
    header = (
        "method",
        "global",
        "local",
        "seeds",
        "clients better / equal / worse",
        "mean client, bootstrap",
        "rank-biserial",
        "p (Holm)",
    )
    return Table(
        name(summary, "differences"),
        heading(summary, f"Difference to {reference.label}"),
        summary.split,
        header,
        tuple(_difference_row(summary, own) for own in found),
        tuple(_difference_notes(summary, found)),
    )


def _difference_row(summary: Summary, own: Difference) -> tuple[Cell, ...]:
    clients = own.clients
    ranks = None if clients is None else clients.ranks
    return (
        Cell(own.label),
        _difference(summary, own.by_global),
        _difference(summary, own.by_local),
        Cell(ABSENT if own.by_local is None else str(own.by_local.num)),
        Cell(
            ABSENT if clients is None else f"{clients.better} / {clients.equal} / {clients.worse}"
        ),
        Cell(_bootstrap(summary, clients)),
        Cell(ABSENT if ranks is None else signed(ranks.effect, 1.0, 2)),
        Cell(ABSENT if own.holm_p is None else f"{own.holm_p:.3f}"),
    )


def _scale(summary: Summary) -> tuple[float, int]:
    """Factor and digits of a score's differences."""
    measure = next(m for m in summary.columns() if m.metric == summary.local)
    factor = FACTORS[measure.unit]
    means = [i.mean * factor for row in summary.rows if (i := row.mean(summary.local))]
    return factor, decimals(measure.unit, means)


def _difference(summary: Summary, own: Interval | None) -> Cell:
    if own is None:
        return Cell(ABSENT)
    factor, digits = _scale(summary)
    mean = signed(own.mean, factor, digits)
    if own.low is None or own.high is None:
        return Cell(mean)
    return Cell(f"{mean} ({span(own.low, own.high, factor, digits)})")


def _bootstrap(summary: Summary, clients: ClientComparison | None) -> str:
    if clients is None or clients.bootstrap is None:
        return ABSENT
    factor, digits = _scale(summary)
    return span(*clients.bootstrap, factor, digits)


def _difference_notes(summary: Summary, found: Sequence[Difference]) -> list[str]:
    natural = summary.section.natural
    unit = "points" if summary.score == "accuracy" else f"units of the {summary.score}"
    notes = [
        f"global, local: mean paired difference in {unit}, in brackets its 95 % t interval over "
        "the seeds that both rows ran on the same data and partition.",
        "clients better / equal / worse: personalized scores, "
        + ("averaged over seeds." if natural else "a client counts once for each seed."),
        "bootstrap: 95 % interval of the unweighted mean over clients, seeds and then clients "
        "resampled; with few seeds it is too narrow.",
    ]
    if natural:
        notes.append(
            "rank-biserial: effect size in [-1, 1], positive in favour of the row; p: Wilcoxon's "
            f"signed-rank test over clients averaged over seeds, Holm-adjusted for {len(found)} "
            "rows. Clients are a check, not a replacement for seeds."
        )
    reasons = {reason for own in found if own.clients for reason in own.clients.reasons}
    if any(own.by_local is None for own in found):
        reasons.add("no common seed on the same data and partition")
    if any(own.by_local is not None and own.clients is None for own in found):
        reasons.add("a run without clients.parquet among its artifacts")
    if any(own.clients and natural and own.clients.ranks is None for own in found):
        reasons.add("no signed-rank test where no client differs")
    return notes + [f"{ABSENT}: {'; '.join(sorted(reasons))}."] * bool(reasons)
