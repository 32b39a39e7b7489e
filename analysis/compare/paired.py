"""A reference minus a baseline: over seeds, client by client, in a scene and over all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import pandas as pd

from analysis.compare.bootstrap import (
    ClientPair,
    Statistic,
    bootstrap_means,
    percentile_interval,
    weighted_mean,
    worst_tenth,
)
from analysis.compare.scenes import Scene
from analysis.report.clients import ByTable, client_differences, distribution
from analysis.report.grouping import PairKey
from analysis.report.measures import FACTORS, Unit, decimals
from analysis.report.statistics import (
    NOISE,
    Floats,
    Interval,
    SignedRanks,
    holm,
    paired_differences,
    signed_ranks,
    t_interval,
)
from analysis.report.summary import RowSummary, Summary

POOLED = "all scenes"

Standing = Literal["behind", "level", "ahead", "one pair", "missing"]
"""What the t interval over seeds says of the reference; ``level``: it includes 0."""


@dataclass(frozen=True)
class Outcome:
    """What is compared.

    metric: with ``{score}`` for ``accuracy`` or ``mse``; new: on clients that never trained;
    column: of the clients' tables; by_client: whether a client has a number of its own;
    not_client_by_client: scores whose clients' numbers do not make up the metric.
    """

    name: str
    metric: str
    column: str
    statistic: Callable[[int], Statistic]
    new: bool = False
    by_client: bool = True
    not_client_by_client: tuple[str, ...] = ()


LOCAL = Outcome("local", "test/local_{score}", "local", lambda better: weighted_mean)
GLOBAL = Outcome(
    "global",
    "test/global_{score}",
    "global",
    lambda better: weighted_mean,
    # Its metric is judged by the global truth, its clients' errors by each client's own.
    not_client_by_client=("mse",),
)
WORST = Outcome("worst tenth", "test/local_{score}_worst10", "local", worst_tenth, by_client=False)
NEW = Outcome("new clients", "new/local_{score}", "local", lambda better: weighted_mean, new=True)
OUTCOMES = (LOCAL, GLOBAL, WORST, NEW)

NOT_USED = {("local", GLOBAL)}
"""Methods and outcomes that nobody would use: without exchange the mean of all parameters is no
model of anybody, and is shown but not counted."""
NO_TABLES = "a run without clients.parquet among its artifacts"
OTHER_TRUTH = (
    "the clients' errors are judged by each client's own truth, the global model's by that of all"
)


def outcomes_of(summary: Summary) -> list[Outcome]:
    """All outcomes that some row of the scene has."""
    return [
        outcome
        for outcome in OUTCOMES
        if any(row.values(outcome.metric.format(score=summary.score)) for row in summary.rows)
    ]


@dataclass(frozen=True, eq=False)
class Compared:
    """One outcome of a reference minus that of a baseline.

    scene: its title, or ``all scenes``; score: ``accuracy`` or ``mse``; num_scenes: 1, or how many
    are pooled; better: 1 if a higher score is better, else -1; factor, digits: how the score is
    shown; differences: one a pair of runs on the same seed, data and partition; draws: resampled
    means; each: a number for every client; reason: why the last two, or all, are missing;
    counted: False where it is shown only, see ``NOT_USED``.
    """

    scene: str
    reference: str
    baseline: str
    outcome: Outcome
    score: str
    better: int
    factor: float
    digits: int
    differences: tuple[float, ...]
    draws: Floats | None
    each: Floats | None
    reason: str = ""
    num_scenes: int = 1
    holm_p: float | None = None
    counted: bool = True

    @property
    def metric(self) -> str:
        """Name of the metric."""
        return self.outcome.metric.format(score=self.score)

    @cached_property
    def interval(self) -> Interval | None:
        """Mean and t interval over the pairs; None without a pair."""
        return t_interval(self.differences) if self.differences else None

    @cached_property
    def bootstrap(self) -> tuple[float, float] | None:
        """Hierarchical interval; None from one pair, or without the clients' scores."""
        if self.draws is None or len(self.differences) < 2:
            return None
        return percentile_interval(self.draws)

    @cached_property
    def ranks(self) -> SignedRanks | None:
        """The signed-rank test over clients, positive in favour of the reference."""
        return None if self.each is None else signed_ranks(self.better * self.each)

    @property
    def shares(self) -> tuple[float, float, float] | None:
        """Shares of clients helped, equal and harmed by the reference."""
        if self.each is None:
            return None
        own = np.sign(self.better * self.each)
        return float((own > 0).mean()), float((own == 0).mean()), float((own < 0).mean())

    @property
    def standing(self) -> Standing:
        """Where the reference stands; the sign is the score's, lower errors are ahead."""
        found = self.interval
        if found is None:
            return "missing"
        if found.half is None:
            return "one pair"
        if not found.excludes_zero:
            return "level"
        return "ahead" if self.better * found.mean > 0 else "behind"


def compare_scenes(scenes: Sequence[Scene]) -> list[Compared]:
    """Every reference with every baseline of its scene, outcome by outcome."""
    found = []
    for number, scene in enumerate(scenes):
        for reference in scene.references:
            for outcome in outcomes_of(scene.summary):
                family = [
                    _compare(scene, number, outcome, reference, baseline)
                    for baseline in scene.baselines
                ]
                found += adjusted(family)
    return found


def adjusted(family: Sequence[Compared]) -> list[Compared]:
    """The same with Holm's p-values: the family is one reference and outcome, all baselines."""
    tested = [own for own in family if own.counted and own.ranks is not None]
    p_values = iter(holm([own.ranks.p_value for own in tested if own.ranks is not None]))
    return [replace(own, holm_p=next(p_values)) if own in tested else own for own in family]


def _compare(
    scene: Scene, number: int, outcome: Outcome, reference: RowSummary, baseline: RowSummary
) -> Compared:
    summary = scene.summary
    metric = outcome.metric.format(score=summary.score)
    own, other = reference.values(metric), baseline.values(metric)
    differences = paired_differences(own, other)
    pairs: list[ClientPair] | None = None
    each, reason = None, ""
    if not differences:
        reason = _reason(summary, metric, reference, baseline)
    elif summary.score in outcome.not_client_by_client:
        reason = OTHER_TRUTH
    else:
        ours, theirs = (_tables(r, outcome, list(differences)) for r in (reference, baseline))
        pairs = _client_pairs(ours, theirs, list(differences), outcome.column)
        reason = "" if pairs else NO_TABLES
        if pairs and outcome.by_client:
            each = _each_client(ours, theirs, outcome.column, natural=summary.section.natural)
    factor, digits = _scale(summary, metric)
    return Compared(
        scene=scene.title,
        reference=reference.label,
        baseline=baseline.label,
        outcome=outcome,
        score=summary.score,
        better=summary.better,
        factor=factor,
        digits=digits,
        differences=tuple(differences.values()),
        draws=bootstrap_means(pairs, outcome.statistic(summary.better), number) if pairs else None,
        each=each,
        reason=reason,
        counted=not any((r.row.method, outcome) in NOT_USED for r in (reference, baseline)),
    )


def _reason(summary: Summary, metric: str, reference: RowSummary, baseline: RowSummary) -> str:
    """Why there is no pair; of the baseline where nobody is named."""
    why = next((m.missing for m in summary.columns() if m.metric == metric), "not measured")
    if not reference.values(metric):
        return f"{reference.label}: {why}"
    return "no common seed on the same data and partition" if baseline.values(metric) else why


def _scale(summary: Summary, metric: str) -> tuple[float, int]:
    """Factor and digits of a metric, as the table of scores shows it."""
    unit: Unit = "percent" if summary.score == "accuracy" else "score"
    means = [i.mean * FACTORS[unit] for row in summary.rows if (i := row.mean(metric))]
    return FACTORS[unit], decimals(unit, means)


def _tables(row: RowSummary, outcome: Outcome, keys: Sequence[PairKey]) -> ByTable:
    tables = row.new if outcome.new else row.tables
    return {key: tables[key] for key in keys if key in tables}


def _client_pairs(
    own: ByTable, other: ByTable, keys: Sequence[PairKey], column: str
) -> list[ClientPair] | None:
    """The clients' scores of every pair of runs; None if a run lacks them."""
    found = []
    for key in keys:
        if key not in own or key not in other:
            return None
        parts = [own[key][column], other[key][column], own[key]["num_examples"]]
        both = pd.concat(parts, axis=1, join="inner").to_numpy(np.float64)
        if not len(both) or np.isnan(both).any():
            return None
        found.append(ClientPair(*both.T))
    return found


def _each_client(own: ByTable, other: ByTable, column: str, *, natural: bool) -> Floats:
    """Own minus other of every client, mean over seeds; drawn clients once for each seed."""
    scores = [{key: table[column] for key, table in tables.items()} for tables in (own, other)]
    each = distribution(client_differences(*scores), natural=natural)
    return np.where(np.abs(each) < NOISE, 0.0, each)


def pool(compared: Sequence[Compared]) -> list[Compared]:
    """Comparisons over all scenes that have both methods, where these are at least two.

    A pair of scene and seed is one difference; seeds are resampled within each scene.
    """
    groups: dict[tuple[str, Outcome, str], dict[str, list[Compared]]] = defaultdict(dict)
    for own in compared:
        if own.differences and own.counted:
            family = groups[own.reference, own.outcome, own.score]
            family.setdefault(own.baseline, []).append(own)
    several = {
        key: [parts for parts in family.values() if len(parts) > 1]
        for key, family in groups.items()
    }
    mixed = len({score for (_, _, score), families in several.items() if families}) > 1
    found = []
    for (_, _, score), families in several.items():
        scene = f"{POOLED} ({score})" if mixed else POOLED
        found += adjusted([_pooled(parts, scene) for parts in families])
    return found


def _pooled(parts: Sequence[Compared], scene: str) -> Compared:
    counts = np.asarray([len(own.differences) for own in parts], np.float64)
    draws = [own.draws for own in parts if own.draws is not None]
    each = [own.each for own in parts if own.each is not None]
    whole = len(draws) == len(parts)
    return replace(
        parts[0],
        scene=scene,
        digits=max(own.digits for own in parts),
        differences=tuple(d for own in parts for d in own.differences),
        draws=counts @ np.stack(draws) / counts.sum() if whole else None,
        each=np.concatenate(each) if len(each) == len(parts) else None,
        reason=next((own.reason for own in parts if own.draws is None), ""),
        num_scenes=len(parts),
        holm_p=None,
    )


def titles(compared: Sequence[Compared]) -> list[str]:
    """Scenes in the order in which they are met."""
    return list(dict.fromkeys(own.scene for own in compared))
