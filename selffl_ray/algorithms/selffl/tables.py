"""What Self-FL tells the tables about its uncertainties."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from selffl_ray.algorithms.base import Record, Reports, UncertaintyRows
from selffl_ray.algorithms.selffl.context import Context, Server
from selffl_ray.algorithms.selffl.readout import schedule
from selffl_ray.flat import Groups

Floats = npt.NDArray[np.float64]


def record(context: Context, server: Server, reports: Reports, shrink_NG: Floats) -> Record:
    """Metrics over the clients seen, and a row for each participant and group.

    ``num_local_steps`` and ``learning_rate`` are those of the early stop or readout under the
    shrink factor of the row; before the first estimate there are none.
    """
    config, federation = context.config, context.federation
    rate = federation.training.rate(reports.plan.round_index)
    fixed: int | list[int] = config.readout_steps
    if config.upload == "personal":
        fixed = [federation.training.steps(int(n)) for n in federation.num_examples_M]
    else:
        rate *= config.readout_rate
    shrink_MG = shrink_NG[: federation.num_clients]
    sizes_G = context.groups.sizes_G
    scalar_M = shrink_MG @ sizes_G / sizes_G.sum()
    known_M = ~np.isnan(scalar_M)
    plan = schedule(config, np.where(known_M, scalar_M, 0.0), rate, fixed)
    steps_M = np.where(known_M, plan.steps_C.astype(np.float64), np.nan)
    rate_M = np.where(known_M, plan.rate_C, np.nan)
    seen_M = server.age_M.numpy() >= 0
    metrics = {
        "inter_var": _mean(server.raw_inter_G.numpy(), sizes_G),
        "intra_var_mean": _mean(_rows(server.raw_intra_MG.numpy()).mean(axis=0), sizes_G),
        "shrinkage_mean": float(np.mean(scalar_M[seen_M])),
        "num_local_steps_mean": float(np.mean(steps_M[seen_M])),
    }
    named = {f"uncertainty/{k}": v for k, v in metrics.items() if not np.isnan(v)}
    return Record(
        named, _table(context, server, reports, shrink_MG, steps_M=steps_M, rate_M=rate_M)
    )


def _rows(values_MG: Floats) -> Floats:
    """The rows with an estimate, or one row of NaN: a mean over nothing is not a warning."""
    known = ~np.isnan(values_MG).any(axis=1)
    return values_MG[known] if known.any() else np.full((1, values_MG.shape[1]), np.nan)


def _mean(values_G: Floats, sizes_G: npt.NDArray[np.int64]) -> float:
    return float(values_G @ sizes_G / sizes_G.sum())


def _table(
    context: Context,
    server: Server,
    reports: Reports,
    shrink_MG: Floats,
    *,
    steps_M: Floats,
    rate_M: Floats,
) -> UncertaintyRows:
    names, cells = _summary_groups(context)
    index = reports.client_index
    count = len(names)
    inter_MG = np.broadcast_to(server.raw_inter_G.numpy(), server.raw_intra_MG.shape)

    def column(values_MG: Floats) -> Floats:
        rows = values_MG[index]
        return np.asarray(rows if cells is None else rows @ cells).reshape(-1)

    return UncertaintyRows(
        np.repeat(index, count),
        np.tile(np.asarray(names), len(index)),
        column(server.raw_intra_MG.numpy()),
        column(inter_MG),
        column(shrink_MG),
        np.repeat(steps_M[index], count),
        np.repeat(rate_M[index], count),
        column(server.weight_MG.numpy()),
    )


def _summary_groups(context: Context) -> tuple[tuple[str, ...], Floats | None]:
    """Groups of the table, and how the method's groups average into them: (G, G of the table).

    The same ones (None), except that single parameters are summarised by layer.
    """
    groups = context.groups
    if context.config.granularity != "parameter":
        return groups.names, None
    layers: Groups = context.federation.spec.groups("layer")
    owner_P = np.repeat(np.asarray(layers.owners), np.asarray(layers.piece_sizes))
    cells = np.zeros((groups.num_groups, layers.num_groups))
    cells[np.arange(len(owner_P)), owner_P] = 1.0
    return layers.names, cells / layers.sizes_G
