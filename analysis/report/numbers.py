"""One run in numbers: its final and its selected round, its curves, its cost.

``final`` holds what :func:`selffl_ray.tables.final_metrics` gives (means over the last
``evaluation.last`` evaluated rounds) plus what the report derives:

``cost/rounds``           rounds done
``cost/training_steps``   gradient steps of training, all clients and rounds
``cost/readout_steps``    gradient steps of the last personalization, all clients
``cost/total_steps``      both together
``cost/total_bytes_up``, ``_down``, ``cost/total_bytes``  bytes over all rounds; both ways
``cost/seconds``          training and evaluation, all rounds, without start-up
``<split>/clients_harmed_vs_local``, ``_vs_fedavg``  added by :mod:`analysis.report.clients`
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from analysis.report.grouping import PairKey, pair_key
from analysis.report.store import Store, StoredRun
from selffl_ray.tables import final_metrics, selected_round

SPLITS = ("test", "val", "new")
SCORE = re.compile(r"(?:test|val|new)/local_(accuracy|mse)$")
COSTS = (
    "cost/gradient_steps",
    "cost/personalization_steps",
    "comm/bytes_up",
    "comm/bytes_down",
    "time/round_s",
    "time/eval_s",
)


@dataclass(frozen=True, eq=False)
class RunNumbers:
    """A run's numbers.

    score: ``accuracy``, ``mse``, or None if no personalized model was ever scored.
    series: metrics by round index; final, selected: metrics (none if there was no validation).
    """

    run: StoredRun
    key: PairKey
    score: str | None
    series: Mapping[str, Mapping[int, float]]
    final: Mapping[str, float]
    selected_round: int | None
    selected: Mapping[str, float]

    def last_rounds(self) -> list[int]:
        """Indices of the evaluated rounds that the final metrics are means over."""
        last = int(self.run.params.get("evaluation.last", "1"))
        return _evaluated(self.series)[-last:]


def read_numbers(store: Store, run: StoredRun) -> RunNumbers:
    """Fetch a run's metrics and derive the rest."""
    wanted = [n for n in run.metrics if n.startswith(SPLITS) and not n.endswith("_loss")]
    series = store.series(run, [*wanted, *(n for n in COSTS if n in run.metrics)])
    return numbers_of(run, series)


def numbers_of(run: StoredRun, series: Mapping[str, Mapping[int, float]]) -> RunNumbers:
    """A run's numbers from its metric series."""
    rows = [_row(series, at) for at in _evaluated(series)]
    score = _score(series)
    final = final_metrics(rows, int(run.params.get("evaluation.last", "1"))) | _costs(series)
    selected = None
    if score is not None:
        selected = selected_round(rows, score, higher_is_better=score == "accuracy")
    return RunNumbers(
        run=run,
        key=pair_key(run),
        score=score,
        series=series,
        final=final,
        selected_round=None if selected is None else selected["round_index"],
        selected={} if selected is None else selected["metrics"],
    )


def _score(names: Iterable[str]) -> str | None:
    found = {match.group(1) for name in names if (match := SCORE.match(name))}
    return min(found) if found else None


def _evaluated(series: Mapping[str, Mapping[int, float]]) -> list[int]:
    return sorted({at for n, s in series.items() if n.startswith(SPLITS) for at in s})


def _row(series: Mapping[str, Mapping[int, float]], at: int) -> dict[str, Any]:
    return {"round_index": at} | {name: own[at] for name, own in series.items() if at in own}


def _costs(series: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """Totals of a run; what was not recorded is absent."""
    found: dict[str, float] = {}
    if rounds := series.get("comm/bytes_down") or series.get("time/round_s"):
        found["cost/rounds"] = float(max(rounds) + 1)
    if steps := series.get("cost/gradient_steps"):
        readout = series.get("cost/personalization_steps") or {0: 0.0}
        # The first counts on from round to round; the second is that of one evaluation.
        found["cost/training_steps"] = steps[max(steps)]
        found["cost/readout_steps"] = readout[max(readout)]
        found["cost/total_steps"] = steps[max(steps)] + readout[max(readout)]
    for way in ("up", "down"):
        if sent := series.get(f"comm/bytes_{way}"):
            found[f"cost/total_bytes_{way}"] = sum(sent.values())
    ways = ("cost/total_bytes_up", "cost/total_bytes_down")
    if all(way in found for way in ways):
        found["cost/total_bytes"] = sum(found[way] for way in ways)
    if spent := series.get("time/round_s"):
        found["cost/seconds"] = sum(spent.values()) + sum(series.get("time/eval_s", {}).values())
    return found
