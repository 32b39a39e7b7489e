"""Footnotes of the main tables: everything that a reader must know to read a number rightly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from analysis.report.answer import SPLIT_WORDS
from analysis.report.measures import Measure, number
from analysis.report.summary import RowSummary, Summary

MOST_NAMED = 6
"""Most rows that a footnote names."""


def named(labels: Sequence[str]) -> str:
    """Labels in a row, the rest counted."""
    rest = len(labels) - MOST_NAMED
    return ", ".join(labels[:MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def score_notes(summary: Summary, measures: Sequence[Measure]) -> list[str]:
    """Footnotes of the table of scores."""
    return [
        *what_notes(summary),
        *schedule_notes(summary),
        *bold_notes(summary, measures),
        *seed_notes(summary),
        *partition_notes(summary),
        *_columns(summary, measures),
        *absent_notes(summary, measures),
        *budget_notes(summary),
        *run_notes(summary),
    ]


def what_notes(summary: Summary) -> Iterable[str]:
    """Which data, which unit, which interval, what was left out."""
    seeds = ", ".join(map(str, summary.seeds))
    clients = " or ".join(map(str, summary.num_clients))
    unit = "percent" if summary.score == "accuracy" else "squared error, lower is better"
    text = f"{SPLIT_WORDS[summary.split].capitalize()}, final round, {unit}; "
    if len(summary.seeds) > 1:
        text += f"mean ± half-width of the 95 % t interval over seeds {seeds}"
    else:
        text += f"one seed ({seeds}), hence no interval"
    yield text + (f"; {clients} clients." if clients else ".")
    if len(summary.seeds) == 2:
        yield "Two seeds leave one degree of freedom: an interval is 12.7 standard errors each way."
    if summary.split == "val":
        yield "Validation data chose among these rows or may do so: the best of them is flattered."
    if any(row.row.chosen for row in summary.rows):
        yield "\N{BLACK STAR}: the sweep's choice."
    if summary.section.older:
        yield f"Left out: {summary.section.older} runs with a newer one of the same row and seed."


def schedule_notes(summary: Summary) -> Iterable[str]:
    """Rows whose runs are members of a population, and whose options changed on the way."""
    found = [r.label for r in summary.rows if any("schedule" in n.run.tags for n in r.numbers)]
    if found:
        yield (
            "Of population-based training, each a schedule and not a configuration (its options "
            f"changed during the run): {named(found)}."
        )


def bold_notes(summary: Summary, measures: Sequence[Measure]) -> Iterable[str]:
    """What bold means here."""
    rankings = [summary.ranking(m) for m in measures]
    if not any(any(r.bold) for r in rankings):
        yield "Nothing is bold: no two rows share two seeds on the same data and partition."
        return
    yield (
        "Bold: the best mean of a column, and every row whose paired difference to it (same seed, "
        "data and partition; at least two) has a 95 % t interval that includes 0. Not corrected "
        "for the number of comparisons."
    )
    unpaired = sorted({summary.rows[at].label for r in rankings for at in r.unpaired})
    if unpaired:
        yield (
            "Not compared with the best, since fewer than two seeds on the same data and partition "
            f"are common: {named(unpaired)}."
        )


def seed_notes(summary: Summary) -> Iterable[str]:
    """Rows that lack seeds which others have."""
    partial = [row for row in summary.rows if row.seeds != summary.seeds]
    if partial:
        told = [f"{r.label} ({', '.join(map(str, r.seeds))})" for r in partial]
        yield f"Fewer seeds, so their means are not over the same runs: {named(told)}."


def partition_notes(summary: Summary) -> Iterable[str]:
    """Seeds that were dealt in more than one way."""
    for seed, groups in summary.other_partitions().items():
        told = " | ".join(named(labels) for labels in groups)
        yield (
            f"Seed {seed} was run on {len(groups)} different partitions ({told}): between these "
            "groups nothing is paired, and their means are not on the same deal."
        )


def _columns(summary: Summary, measures: Sequence[Measure]) -> Iterable[str]:
    yield (
        "global: the server's model on all clients' examples; local: each client's personalized "
        "model on its own, weighted by examples; client mean and std, worst and best tenth: the "
        "local score over clients, unweighted."
    )
    yield (
        "harmed vs global: share of clients whose personalized model is worse on their own "
        "examples than the run's global model; 0 by construction where they predict with that one."
    )
    if any(m.metric.endswith(("_vs_local", "_vs_fedavg")) for m in measures):
        yield (
            "harmed vs local, vs fedavg: share whose personalized model is worse than the one that "
            "they have in that row, on the same partition."
        )
    if any(m.metric.startswith("new/") for m in measures):
        yield "new clients: held out from training, adapted to, and tested."


def absent_notes(summary: Summary, measures: Sequence[Measure]) -> Iterable[str]:
    """Why cells are n/a, and means that lack some of a row's runs."""
    reasons: dict[str, list[str]] = {}
    for measure in measures:
        for row in summary.rows:
            has = len(row.values(measure.metric))
            if not has:
                reason = _reason(measure, row)
                reasons.setdefault(reason, []).append(f"{row.label}: {measure.title}")
            elif has < len(row.numbers):
                few = f"measured in {has} of {len(row.numbers)} runs only"
                reasons.setdefault(few, []).append(f"{row.label}: {measure.title}")
    for reason, where in reasons.items():
        yield f"n/a or partial, {reason} ({named(where)})."


def _reason(measure: Measure, row: RowSummary) -> str:
    if measure.metric.endswith(f"_vs_{row.row.method}"):
        return "the row is the one compared with"
    return measure.missing


def budget_notes(
    summary: Summary, metric: str = "cost/total_steps", what: str = "gradient steps"
) -> Iterable[str]:
    """Whether all rows spent the same."""
    steps = {row.label: i.mean for row in summary.rows if (i := row.mean(metric))}
    if not steps:
        yield f"Budget: {what} were not recorded."
        return
    if (unequal := summary.unequal_steps(metric)) is None:
        yield f"Budget: {number(next(iter(steps.values())), 0)} {what}, equal within 5 %."
        return
    least, most = (min(steps, key=steps.__getitem__), max(steps, key=steps.__getitem__))
    yield (
        f"UNEQUAL BUDGETS: {number(unequal[0], 0)} {what} ({least}) to "
        f"{number(unequal[1], 0)} ({most}); more of them help, whatever the method."
    )


def run_notes(summary: Summary) -> Iterable[str]:
    """Over how many evaluations the scores are means, and versions that differ."""
    runs = [n.run for row in summary.rows for n in row.numbers]
    last = sorted({run.params.get("evaluation.last", "1") for run in runs})
    if last != ["1"]:
        yield f"Final: mean over the last {' or '.join(last)} evaluated rounds."
    versions = sorted({run.tags.get("selffl_ray_version", "unknown") for run in runs})
    if len(versions) > 1:
        yield f"The runs are of different versions of selffl_ray: {', '.join(versions)}."


def cost_notes(summary: Summary) -> list[str]:
    """Footnotes of the table of costs."""
    notes = [
        "gradient steps: of all clients in training and in the last personalization; rounds: all "
        "that were run, whichever is selected.",
        "MB: 10^6 bytes that the method would send over a network in the whole run, all clients "
        "together; not what Ray moves.",
        "seconds: training and evaluation, without start-up; they depend on the machine and on "
        "what else it did, so compare them only within one machine.",
        *absent_notes(summary, summary.costs()),
    ]
    if len(summary.seeds) > 1:
        notes.insert(0, "Mean ± half-width of the 95 % t interval over seeds.")
    return notes
