"""Clients one by one: the score of each, and how many are harmed against other rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.report.grouping import PairKey
from analysis.report.numbers import RunNumbers
from analysis.report.statistics import NOISE, SignedRanks, bootstrap_interval, signed_ranks

Floats = npt.NDArray[np.float64]
ByClient = Mapping[PairKey, "pd.Series[float]"]
"""Score of the personalized model by client id, of each run."""


ByTable = Mapping[PairKey, pd.DataFrame]
"""What :func:`client_table` gives, of each run."""


def client_table(table: pd.DataFrame | None, run: RunNumbers, split: str) -> pd.DataFrame | None:
    """What each client has at the end: means over the final rounds.

    Args:
        table: the run's ``clients.parquet``.

    Returns:
        Columns ``local`` (score of the personalized model), ``global`` (of the server's model on
        the client's examples; NaN without one) and ``num_examples``, by client id, ascending; None
        if the table does not have the first.
    """
    names = {f"local_{run.score}": "local", f"global_{run.score}": "global"}
    if table is None or f"local_{run.score}" not in table:
        return None
    rows = table[(table["split"] == split) & table["round_index"].isin(run.last_rounds())]
    wanted = [name for name in (*names, "num_examples") if name in rows]
    found = rows.groupby("client_id")[wanted].mean().rename(columns=names).sort_index()
    found = found.dropna(subset=["local"])
    return None if found.empty else found.reindex(columns=[*names.values(), "num_examples"])


def harmed(own: pd.Series, other: pd.Series, better: int) -> float | None:
    """Share of the common clients whose own score is worse than the other's; None without any.

    Args:
        better: 1 if higher is better, -1 if lower is.
    """
    both = pd.concat([own, other], axis=1, join="inner")
    if both.empty:
        return None
    return float((better * (both.iloc[:, 0] - both.iloc[:, 1]) < 0).mean())


def harmed_by_run(own: ByClient, other: ByClient, better: int) -> dict[PairKey, float]:
    """Share of clients harmed against another row, for every run with the same pair key."""
    found = {key: harmed(own[key], other[key], better) for key in own if key in other}
    return {key: share for key, share in found.items() if share is not None}


def distribution(scores: ByClient, *, natural: bool) -> Floats:
    """A number for every client: its mean over seeds; drawn clients count once for each seed."""
    if not scores:
        return np.empty(0)
    if natural:
        return pd.concat(scores.values(), axis=1).mean(axis=1).to_numpy(np.float64)
    return np.concatenate([values.to_numpy(np.float64) for values in scores.values()])


def client_differences(own: ByClient, other: ByClient) -> dict[PairKey, pd.Series]:
    """Own minus other of the clients that both have, for every run with the same pair key."""
    parts = {}
    for key in own:
        if key in other:
            both = pd.concat([own[key], other[key]], axis=1, join="inner")
            parts[key] = (both.iloc[:, 0] - both.iloc[:, 1]).rename(str(key.seed))
    return {key: part for key, part in parts.items() if len(part)}


@dataclass(frozen=True)
class ClientComparison:
    """Two rows, client by client.

    bootstrap: interval of the mean difference over clients, unweighted; ranks: the signed-rank
    test on clients averaged over seeds, where clients are the same for every seed.
    """

    better: int
    equal: int
    worse: int
    bootstrap: tuple[float, float] | None
    ranks: SignedRanks | None
    reasons: Sequence[str] = field(default=())


def compare_clients(
    own: ByClient, other: ByClient, better: int, *, natural: bool
) -> ClientComparison | None:
    """Own against other over the runs with the same pair key; None if there is none."""
    parts = client_differences(own, other)
    if not parts:
        return None
    each = distribution(parts, natural=natural)
    each = np.where(np.abs(each) < NOISE, 0.0, each)
    reasons = []
    if len(parts) < 2:
        reasons.append("no bootstrap interval from one seed")
    if not natural:
        reasons.append("no signed-rank test: clients are drawn anew for every seed")
    return ClientComparison(
        better=int((better * each > 0).sum()),
        equal=int((each == 0).sum()),
        worse=int((better * each < 0).sum()),
        bootstrap=bootstrap_interval([p.to_numpy(np.float64) for p in parts.values()]),
        ranks=signed_ranks(better * each) if natural else None,
        reasons=tuple(reasons),
    )
