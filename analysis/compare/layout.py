"""The tables: every method of a scene with its cost, and a reference minus every baseline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from analysis.compare.paired import (
    GLOBAL,
    LOCAL,
    NOT_USED,
    OUTCOMES,
    Compared,
    Outcome,
    outcomes_of,
)
from analysis.compare.scenes import Scene, changing_options, method_of
from analysis.compare.verdict import shown_difference
from analysis.report.layout import ABSENT, column_title, score_rows
from analysis.report.measures import Measure, score_measures, signed, span
from analysis.report.notes import (
    absent_notes,
    bold_notes,
    budget_notes,
    named,
    partition_notes,
    run_notes,
    seed_notes,
    what_notes,
)
from analysis.report.summary import Summary
from analysis.report.tables import Cell, Table

STOPS = "training.stop."
NOT_COUNTED = "\N{DAGGER}"
COSTS = (
    Measure("cost/rounds", "rounds", "count", 0),
    Measure("cost/training_steps", "training steps", "count", 0),
    Measure("cost/readout_steps", "personalization steps", "count", 0),
    Measure("cost/total_bytes", "MB up + down", "megabytes", 0),
)


def method_measures(summary: Summary) -> list[Measure]:
    """Columns of the table of methods: outcomes, then costs."""
    metrics = [outcome.metric.format(score=summary.score) for outcome in outcomes_of(summary)]
    scores = [m for m in score_measures("test", summary.score) if m.metric in metrics]
    return [*scores, *COSTS]


def methods_table(scene: Scene) -> Table:
    """Every method of a scene: scores with intervals, and what they cost."""
    summary = scene.summary
    measures = method_measures(summary)
    return Table(
        "methods",
        f"Methods, {scene.title}",
        summary.split,
        ("method", *(column_title(m) for m in measures)),
        score_rows(summary, measures),
        tuple(_method_notes(summary, measures)),
    )


def _method_notes(summary: Summary, measures: Sequence[Measure]) -> Iterator[str]:
    yield from what_notes(summary)
    yield from bold_notes(summary, measures)
    yield from seed_notes(summary)
    yield from partition_notes(summary)
    yield from absent_notes(summary, measures)
    yield from budget_notes(summary, "cost/training_steps", "gradient steps of training")
    yield from _stops(summary)
    unused = [
        row.label
        for row in summary.rows
        if (row.row.method, GLOBAL) in NOT_USED and row.values(summary.global_)
    ]
    if unused:
        yield f"global of {named(unused)}: the mean of all parameters, a model that nobody uses."
    yield (
        "Steps: gradients of all clients in training, and in the last personalization apart; MB: "
        "10^6 bytes that the method would send in the whole run, all clients together."
    )
    yield from run_notes(summary)


def _stops(summary: Summary) -> Iterator[str]:
    """What may have ended the runs before their last round."""
    runs = [own.run for row in summary.rows for own in row.numbers]
    found = {
        f"{key.removeprefix(STOPS)} {value}"
        for run in runs
        for key, value in run.params.items()
        if key.startswith(STOPS) and key != f"{STOPS}metric" and value != "None"
    }
    if found:
        yield f"Runs end early at: {', '.join(sorted(found))}."


def differences_table(scene: str, reference: str, compared: Sequence[Compared]) -> Table:
    """The reference minus every baseline.

    Args:
        compared: of that scene and reference, at least one.
    """
    outcomes = [o for o in OUTCOMES if any(own.outcome is o for own in compared)]
    labels = dict.fromkeys(own.baseline for own in compared)
    header = (
        "baseline",
        *(outcome.name for outcome in outcomes),
        "pairs",
        "clients helped / equal / harmed (%)",
        "rank-biserial",
        "p (Holm)",
    )
    rows = [
        _difference_row(label, outcomes, [own for own in compared if own.baseline == label])
        for label in labels
    ]
    return Table(
        "differences",
        f"{reference} minus each baseline, {scene}",
        "test",
        header,
        tuple(rows),
        tuple(_absent(compared)),
    )


def _difference_row(
    label: str, outcomes: Sequence[Outcome], own: Sequence[Compared]
) -> tuple[Cell, ...]:
    by_outcome = {one.outcome: one for one in own}
    local = by_outcome.get(LOCAL)
    shares = None if local is None else local.shares
    ranks = None if local is None else local.ranks
    holm_p = None if local is None else local.holm_p
    return (
        Cell(label),
        *(Cell(_difference(by_outcome.get(outcome))) for outcome in outcomes),
        Cell(_pairs(local)),
        Cell(ABSENT if shares is None else " / ".join(f"{100 * s:.0f}" for s in shares)),
        Cell(ABSENT if ranks is None else signed(ranks.effect, 1.0, 2)),
        Cell(_p_value(holm_p)),
    )


def _p_value(value: float | None) -> str:
    if value is None:
        return ABSENT
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _pairs(own: Compared | None) -> str:
    if own is None or not own.differences:
        return "0"
    count = str(len(own.differences))
    return count if own.num_scenes == 1 else f"{count} in {own.num_scenes} scenes"


def _difference(own: Compared | None) -> str:
    """``−1.2 (−2.0 to −0.4) [−1.9 to −0.6]``: mean, t interval, bootstrap."""
    if own is None or own.interval is None:
        return ABSENT
    text = shown_difference(own)
    if own.bootstrap is not None:
        text += f" [{span(*own.bootstrap, own.factor, own.digits)}]"
    return text if own.counted else f"{text} {NOT_COUNTED}"


def _absent(compared: Sequence[Compared]) -> Iterator[str]:
    reasons: dict[str, list[str]] = {}
    for own in compared:
        if own.reason:
            reasons.setdefault(own.reason, []).append(f"{own.baseline}: {own.outcome.name}")
    for reason, where in reasons.items():
        yield f"{ABSENT} or without a bootstrap interval, {reason} ({named(where)})."
    unused = dict.fromkeys(own.baseline for own in compared if not own.counted and own.differences)
    if unused:
        yield (
            f"{NOT_COUNTED}: shown for comparison only, in no count, correction or pooling: "
            "without exchange nobody has a global model; the number is that of the mean of all "
            f"parameters ({named(list(unused))})."
        )
    if any(own.ranks is None and own.each is not None for own in compared):
        yield f"{ABSENT}: no signed-rank test where no client differs."


def reading_notes(scenes: Sequence[Scene], compared: Sequence[Compared]) -> list[str]:
    """How the verdict and the differences are to be read."""
    notes = [*_intervals(), *_few_seeds(compared), *_clients(scenes), *_families(scenes, compared)]
    if any(own.better < 0 for own in compared):
        notes.insert(
            1,
            "Errors (mse): lower is better; a negative difference is in favour of the reference.",
        )
    if len(scenes) > 1:
        notes += _pooling(scenes, compared)
    return notes


def _intervals() -> Iterator[str]:
    yield (
        "Difference: reference minus baseline, within a pair of runs on the same seed, data and "
        "partition; accuracies in points of percent. In round brackets its 95 % t interval over "
        "pairs, which alone decides between ahead, level and behind."
    )
    yield (
        "In square brackets the 95 % interval of a hierarchical bootstrap: pairs are resampled, "
        "then the clients of each, weighted by their examples (the worst tenth is sought anew for "
        "each method in each resample). It also covers the choice of clients, but from few seeds "
        "it is too narrow (with 3 of them, the same one is drawn three times in 1 of 9 resamples). "
        "For the worst tenth of few clients it need not lie around the mean."
    )


def _few_seeds(compared: Sequence[Compared]) -> Iterator[str]:
    counts = {len(own.differences) for own in compared if own.differences}
    if 2 in counts:
        yield "From two pairs a t interval is 12.7 standard errors each way: little can be shown."
    if counts and min(counts) < 5:
        yield (
            f"Some comparisons rest on {min(counts)} pair{'s' * (min(counts) > 1)} of runs: level "
            "then says that nothing is shown, not that the methods are equal."
        )


def _clients(scenes: Sequence[Scene]) -> Iterator[str]:
    drawn = [scene.title for scene in scenes if not scene.summary.section.natural]
    text = (
        "Clients helped, harmed: local score of the reference above or below the baseline's, each "
        "client averaged over seeds; ties are neither. Rank-biserial: effect size in [-1, 1], "
        "positive in favour of the reference. p: Wilcoxon's signed-rank test over these clients."
    )
    if drawn:
        text += f" Clients are drawn anew for each seed, and count once for each: {named(drawn)}."
    yield text
    yield (
        "p is a check and decides nothing: clients of a run share its models and are not "
        "independent, so it can be far too small."
    )


def _families(scenes: Sequence[Scene], compared: Sequence[Compared]) -> Iterator[str]:
    counts = sorted({len(scene.baselines) for scene in scenes if scene.references})
    decided = sum(own.counted and own.standing in ("ahead", "level", "behind") for own in compared)
    many = " or ".join(map(str, counts))
    yield (
        f"Holm's correction is over the baselines ({many}) of a reference in a scene. Intervals are"
        f" not corrected: of {decided} comparisons about {0.05 * decided:.2g} would be called "
        "ahead or behind if all methods were equal."
    )
    if any(len(scene.references) > 1 for scene in scenes):
        yield "References are not compared with each other; name one by --reference to do so."
    variants = {
        row.label for scene in scenes for row in scene.summary.rows if row.label != method_of(row)
    }
    if variants:
        yield (
            "Configurations of one method in one scene are rows of their own, named by the fewest "
            "options that tell them apart (a bare name has the defaults of these), and never "
            f"averaged: {named(sorted(variants))}."
        )
    alone = [scene.title for scene in scenes if not scene.references]
    if alone:
        yield f"No reference was run in: {named(alone)}."


def _pooling(scenes: Sequence[Scene], compared: Sequence[Compared]) -> Iterator[str]:
    yield (
        "All scenes pooled: a difference for every scene and seed, each with the same weight; the "
        "bootstrap resamples seeds within each scene. Scenes on one data set share examples, and "
        "scenes are few, so this speaks of these scenes, not of others. Errors of different scale "
        "are pooled as they are."
    )
    yield from _not_everywhere(scenes)
    labels = dict.fromkeys(label for own in compared for label in (own.reference, own.baseline))
    changing: dict[str, list[str]] = {}
    for label in labels:
        if (how := changing_options(scenes, label)) is not None:
            changing.setdefault(how, []).append(label)
    for how, own in changing.items():
        yield f"Pooled with options that differ between scenes ({how}): {named(own)}."


def _not_everywhere(scenes: Sequence[Scene]) -> Iterator[str]:
    """Rows that are missing in some of the scenes of one score, with in how many they are."""
    for score in dict.fromkeys(scene.summary.score for scene in scenes):
        own = [scene for scene in scenes if scene.summary.score == score and scene.references]
        counts = Counter(row.label for scene in own for row in scene.summary.rows)
        partly = [f"{label} ({count})" for label, count in counts.items() if count < len(own)]
        if partly:
            yield (
                f"Not in all {len(own)} scenes with {score}, so pooled over fewer or not at all "
                f"(in how many): {', '.join(partly)}."
            )
