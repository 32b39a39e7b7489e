"""What a section says in words, generated from its numbers; never more than the interval shows."""

from __future__ import annotations

from analysis.report.measures import FACTORS, Measure, decimals, number, shown, span
from analysis.report.statistics import Interval
from analysis.report.summary import RowSummary, Summary

SPLIT_WORDS = {"test": "test data", "val": "validation data"}


def answer(summary: Summary) -> list[str]:
    """Sentences: the best row and its lead, who cannot be told from it, reference, budget."""
    measured = [row for row in summary.rows if row.mean(summary.local) is not None]
    if not measured:
        return [f"No personalized model was scored on {SPLIT_WORDS[summary.split]}."]
    if len(measured) == 1:
        return [_alone(summary, measured[0])]
    sentences = [*_lead(summary), *_global(summary), *_against_reference(summary)]
    if (steps := summary.unequal_steps()) is not None:
        low, high = steps
        sentences.append(
            f"The budgets differ, from {number(low, 0)} to {number(high, 0)} gradient steps, and "
            "more steps help whatever the method."
        )
    if summary.split == "val":
        sentences.append(
            "These are validation figures: where they also chose a configuration they flatter it."
        )
    return sentences


def quality(summary: Summary) -> str:
    """``highest`` or ``lowest``."""
    return "highest" if summary.better > 0 else "lowest"


def _scored(summary: Summary, metric: str) -> tuple[float, int, str]:
    """Factor, digits and unit of a score as the sentences show it."""
    measure = next(m for m in summary.columns() if m.metric == metric)
    means = [i.mean * FACTORS[measure.unit] for r in summary.rows if (i := r.mean(metric))]
    percent = measure.unit == "percent"
    return FACTORS[measure.unit], decimals(measure.unit, means), " %" if percent else ""


def _value(summary: Summary, interval: Interval, metric: str) -> str:
    factor, digits, unit = _scored(summary, metric)
    return f"{shown(interval, factor, digits)}{unit}"


def _where(summary: Summary) -> str:
    seeds = summary.seeds
    many = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    return f"On the {SPLIT_WORDS[summary.split]} of {summary.section.title} ({many})"


def _alone(summary: Summary, row: RowSummary) -> str:
    interval = row.mean(summary.local)
    assert interval is not None
    return (
        f"{_where(summary)}, {row.label} has a local {summary.score} of "
        f"{_value(summary, interval, summary.local)}; there is no other row to compare it with."
    )


def _lead(summary: Summary) -> list[str]:
    measure = next(m for m in summary.columns() if m.metric == summary.local)
    ranking = summary.ranking(measure)
    assert ranking.best is not None, "some row has a local score"
    best = summary.rows[ranking.best]
    interval = best.mean(summary.local)
    assert interval is not None
    first = (
        f"{_where(summary)}, {best.label} has the {quality(summary)} mean local {summary.score}: "
        f"{_value(summary, interval, summary.local)}."
    )
    return [first, *_next(summary, best, measure)]


def _next(summary: Summary, best: RowSummary, measure: Measure) -> list[str]:
    """The lead over the next row, and how many cannot be told from the best."""
    others = [r for r in summary.rows if r is not best and r.mean(summary.local) is not None]
    # Rows are sorted by their means.
    following = others[0]
    found = summary.difference(best, following, summary.local)
    if found is not None:
        found = _towards_better(summary, found)
    if found is None:
        return [f"It shares no seed and partition with the next, {following.label}."]
    if found.half is None:
        return [
            f"It leads the next, {following.label}, by {_points(summary, found)} on the one seed "
            "that they share: no interval, so nothing says that another seed would agree."
        ]
    if found.mean < 0:
        return [
            f"{following.label} has the better mean, over fewer seeds; on the common ones it is "
            f"{_points(summary, found)} better ({_interval(summary, found)})."
        ]
    lead = (
        f"Its lead over the next, {following.label}, is {_points(summary, found)} "
        f"({_interval(summary, found)})"
    )
    if found.excludes_zero:
        return [
            f"{lead}: the interval excludes 0 (it is not corrected for the number of rows that "
            "were compared)."
        ]
    bold = summary.ranking(measure).bold
    same = sum(bold) - 1
    rest = f"; {same} of the {len(others)} other rows cannot be told from the best" * (same > 1)
    return [f"{lead}: the interval includes 0, so no difference is shown{rest}."]


def _towards_better(summary: Summary, found: Interval) -> Interval:
    """A difference with its sign such that positive is better."""
    return found._replace(mean=summary.better * found.mean)


def _points(summary: Summary, found: Interval) -> str:
    factor, digits, _ = _scored(summary, summary.local)
    size = number(abs(found.mean) * factor, digits)
    return f"{size} points" if factor != 1 else size


def _interval(summary: Summary, found: Interval) -> str:
    factor, digits, _ = _scored(summary, summary.local)
    assert found.low is not None
    assert found.high is not None
    return f"95 % interval of the paired difference {span(found.low, found.high, factor, digits)}"


def _global(summary: Summary) -> list[str]:
    columns = [m for m in summary.columns() if m.metric == summary.global_]
    ranking = summary.ranking(columns[0])
    if ranking.best is None:
        return []
    best = summary.rows[ranking.best]
    interval = best.mean(summary.global_)
    assert interval is not None
    told = (
        f"The {quality(summary)} mean global {summary.score} is that of {best.label}: "
        f"{_value(summary, interval, summary.global_)}"
    )
    same = [row.label for row, bold in zip(summary.rows, ranking.bold, strict=True) if bold]
    same = [label for label in same if label != best.label]
    if not same:
        return [f"{told}."]
    who = same[0] if len(same) == 1 else f"{len(same)} rows"
    return [f"{told}, from which {who} cannot be told apart."]


def _against_reference(summary: Summary) -> list[str]:
    """The best row against the reference, if that is not the row already named."""
    reference = summary.reference
    measured = [row for row in summary.rows if row.mean(summary.local) is not None]
    if reference is None or reference in measured[:2]:
        return []
    found = summary.difference(measured[0], reference, summary.local)
    if found is None or found.half is None:
        return []
    found = _towards_better(summary, found)
    ahead = "ahead of" if found.mean >= 0 else "behind"
    shows = "excludes 0" if found.excludes_zero else "includes 0, so no difference is shown"
    return [
        f"{measured[0].label} is {_points(summary, found)} {ahead} {reference.label} "
        f"({_interval(summary, found)}): the interval {shows}."
    ]
