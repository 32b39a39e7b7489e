"""One section in numbers: its rows, what each measured, and differences to a reference row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.report.clients import (
    ByClient,
    ByTable,
    ClientComparison,
    client_table,
    compare_clients,
    harmed_by_run,
)
from analysis.report.grouping import PairKey, Row, Section
from analysis.report.measures import Measure, cost_measures, score_measures
from analysis.report.numbers import RunNumbers, read_numbers
from analysis.report.statistics import Interval, Ranking, holm, paired, rank, t_interval
from analysis.report.store import Store
from selffl_ray.errors import UsageError

BASELINES = ("local", "fedavg")
"""Methods whose clients the others are compared with, one by one."""
UNEQUAL = 1.05
"""Ratio of gradient steps from which the budgets are called unequal."""


@dataclass(frozen=True, eq=False)
class RowSummary:
    """A row: its runs' numbers in the order of seeds, and its clients' scores.

    clients: of the section's split; new: clients that never trained, where they were scored.
    """

    row: Row
    numbers: tuple[RunNumbers, ...]
    clients: ByClient
    tables: ByTable
    new: ByTable
    harmed: Mapping[str, Mapping[PairKey, float]]

    @property
    def label(self) -> str:
        """Name of the row."""
        return self.row.label

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds, ascending."""
        return tuple(sorted({n.key.seed for n in self.numbers}))

    def values(self, metric: str) -> dict[PairKey, float]:
        """A final metric of every run that has it."""
        if metric in self.harmed:
            return dict(self.harmed[metric])
        return {n.key: n.final[metric] for n in self.numbers if metric in n.final}

    def selected(self, metric: str) -> dict[PairKey, float]:
        """A metric in the round that validation chose, of every run that has it."""
        return {n.key: n.selected[metric] for n in self.numbers if metric in n.selected}

    def mean(self, metric: str) -> Interval | None:
        """Mean and interval of a final metric; None if no run has it."""
        values = list(self.values(metric).values())
        return t_interval(values) if values else None


@dataclass(frozen=True)
class Difference:
    """A row minus the reference row; what cannot be compared is None.

    holm_p: of the signed-rank test, adjusted over the rows of the section.
    """

    label: str
    by_global: Interval | None
    by_local: Interval | None
    clients: ClientComparison | None
    holm_p: float | None


@dataclass(frozen=True, eq=False)
class Summary:
    """A section.

    split: ``test``, or ``val`` where nothing was tested; score: ``accuracy`` or ``mse``;
    rows: best local score first; reference: row that the others are compared with.
    """

    section: Section
    split: str
    score: str
    rows: tuple[RowSummary, ...]
    reference: RowSummary | None

    @property
    def better(self) -> int:
        """1 if a higher score is better, -1 if a lower one is."""
        return 1 if self.score == "accuracy" else -1

    @property
    def local(self) -> str:
        """Name of the metric that the report is about first."""
        return f"{self.split}/local_{self.score}"

    @property
    def global_(self) -> str:
        """Name of the global model's metric."""
        return f"{self.split}/global_{self.score}"

    @property
    def seeds(self) -> tuple[int, ...]:
        """All seeds of the section."""
        return tuple(sorted({seed for row in self.rows for seed in row.seeds}))

    @property
    def num_clients(self) -> tuple[int, ...]:
        """Numbers of clients that were scored, ascending; usually one."""
        counts = {len(scores) for row in self.rows for scores in row.clients.values()}
        return tuple(sorted(counts))

    def columns(self) -> list[Measure]:
        """Columns of scores; optional ones only if some row has them."""
        return [m for m in score_measures(self.split, self.score) if self._has(m)]

    def costs(self) -> list[Measure]:
        """Columns of costs."""
        return cost_measures()

    def _has(self, measure: Measure) -> bool:
        return not measure.optional or any(row.values(measure.metric) for row in self.rows)

    def ranking(self, measure: Measure) -> Ranking:
        """Which rows are bold in a column."""
        if not measure.better:
            return Ranking(None, (False,) * len(self.rows), ())
        return rank([row.values(measure.metric) for row in self.rows], measure.better)

    def unequal_steps(self, metric: str = "cost/total_steps") -> tuple[float, float] | None:
        """Least and most gradient steps, if they differ by more than 5 %."""
        found = [row.mean(metric) for row in self.rows]
        means = [interval.mean for interval in found if interval is not None]
        if not means or max(means) <= UNEQUAL * min(means):
            return None
        return min(means), max(means)

    def other_partitions(self) -> dict[int, list[list[str]]]:
        """Seeds that not all rows ran on one partition, with the labels that share one."""
        found: dict[int, dict[PairKey, list[str]]] = {}
        for row in self.rows:
            for own in row.numbers:
                found.setdefault(own.key.seed, {}).setdefault(own.key, []).append(row.label)
        return {seed: list(by.values()) for seed, by in sorted(found.items()) if len(by) > 1}

    def differences(self) -> list[Difference]:
        """Every other row minus the reference row."""
        if self.reference is None:
            return []
        others = [row for row in self.rows if row is not self.reference]
        compared = [self._clients_against(row, self.reference) for row in others]
        tested = [c.ranks.p_value for c in compared if c is not None and c.ranks is not None]
        adjusted = iter(holm(tested))
        found = []
        for row, clients in zip(others, compared, strict=True):
            has = clients is not None and clients.ranks is not None
            found.append(
                Difference(
                    row.label,
                    self.difference(row, self.reference, self.global_),
                    self.difference(row, self.reference, self.local),
                    clients,
                    next(adjusted) if has else None,
                )
            )
        return found

    def difference(self, own: RowSummary, other: RowSummary, metric: str) -> Interval | None:
        """Interval of a final metric's difference over the runs with the same pair key."""
        return paired(own.values(metric), other.values(metric))

    def _clients_against(self, own: RowSummary, other: RowSummary) -> ClientComparison | None:
        return compare_clients(
            own.clients, other.clients, self.better, natural=self.section.natural
        )


def summarize(store: Store, section: Section, reference: str | None) -> Summary:
    """Read a section's runs.

    Args:
        reference: label of the reference row; None for the only FedAvg row, if there is one.

    Raises:
        UsageError: no run of the section was evaluated.
    """
    read = {row: tuple(read_numbers(store, run) for run in row.runs) for row in section.rows}
    split, score = _what_was_measured([n for own in read.values() for n in own], section)
    tables, new, clients = {}, {}, {}
    for row, own in read.items():
        tables[row], new[row] = _tables(store, own, (split, "new"))
        clients[row] = {key: table["local"] for key, table in tables[row].items()}
    better = 1 if score == "accuracy" else -1
    harm = _harmed(clients, split, better)
    rows = [
        RowSummary(row, own, clients[row], tables[row], new[row], harm[row])
        for row, own in read.items()
    ]
    local = f"{split}/local_{score}"
    rows.sort(key=lambda row: _place(row.mean(local), better))
    return Summary(section, split, score, tuple(rows), _reference(rows, reference))


def _what_was_measured(numbers: Sequence[RunNumbers], section: Section) -> tuple[str, str]:
    """The split that the section is about, and its score."""
    scores = {n.score for n in numbers} - {None}
    if not scores:
        raise UsageError(
            f"no run on {section.title} has val/local_* or test/local_*; evaluate them "
            "(evaluation.every, evaluation.splits)"
        )
    score = min(s for s in scores if s is not None)
    tested = any(f"test/local_{score}" in n.final for n in numbers)
    return ("test" if tested else "val"), score


def _tables(
    store: Store, runs: Sequence[RunNumbers], splits: Sequence[str]
) -> list[dict[PairKey, pd.DataFrame]]:
    """Each split's tables of clients; the artifact is fetched once."""
    found: list[dict[PairKey, pd.DataFrame]] = [{} for _ in splits]
    for own in runs:
        whole = store.clients(own.run)
        for split, by_key in zip(splits, found, strict=True):
            table = client_table(whole, own, split)
            if table is not None:
                by_key[own.key] = table
    return found


def _harmed(
    clients: Mapping[Row, ByClient], split: str, better: int
) -> dict[Row, dict[str, Mapping[PairKey, float]]]:
    """Shares harmed against the baselines that exactly one row stands for."""
    found: dict[Row, dict[str, Mapping[PairKey, float]]] = {row: {} for row in clients}
    for method in BASELINES:
        baseline = [row for row in clients if row.method == method]
        if len(baseline) != 1:
            continue
        for row in clients:
            if row is not baseline[0]:
                shares = harmed_by_run(clients[row], clients[baseline[0]], better)
                found[row][f"{split}/clients_harmed_vs_{method}"] = shares
    return found


def _place(interval: Interval | None, better: int) -> float:
    return np.inf if interval is None else -better * interval.mean


def _reference(rows: Sequence[RowSummary], wanted: str | None) -> RowSummary | None:
    if wanted is not None:
        return next((row for row in rows if row.label == wanted), None)
    averaging = [row for row in rows if row.row.method == "fedavg"]
    return averaging[0] if len(averaging) == 1 else None
