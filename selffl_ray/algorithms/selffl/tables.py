"""What Self-FL tells the tables about its uncertainties."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from selffl_ray.algorithms.base import Alarm, Record, Reports, UncertaintyRows
from selffl_ray.algorithms.selffl.alarms import Probed, alarms
from selffl_ray.algorithms.selffl.context import Context, Report, Server
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
    rows = _table(context, server, reports, shrink_MG, steps_M=steps_M, rate_M=rate_M)
    return Record(named, rows, _alarms(context, server, reports))


def _alarms(context: Context, server: Server, reports: Reports) -> tuple[Alarm, ...]:
    """Of a probe's round; none where nothing is estimated, or nothing is made of the estimates."""
    config, round_index = context.config, reports.plan.round_index
    if not config.probes(round_index) or round_index < config.warm_up_rounds:
        return ()
    report: Report = reports.rows
    num_K = context.federation.num_examples_M[reports.client_index]
    return alarms(
        Probed(
            num_K.astype(np.float64),
            report.var_CG.numpy(),
            server.raw_inter_G.numpy(),
            server.inter_G.numpy(),
            context.groups.sizes_G.astype(np.float64),
            config.intra_pooling,
            first=round_index < config.warm_up_rounds + config.probe_every,
            known_inter=context.known_inter_var is not None,
            known_intra=context.intra.exact,
        )
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
        return (rows if cells is None else _mean_of_known(rows, cells)).reshape(-1)

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


def _mean_of_known(values_KG: Floats, cells_GL: Floats) -> Floats:
    """Means by layer over the parameters that have a value; NaN where none has. (K, L)."""
    known_KG = ~np.isnan(values_KG)
    share_KL = known_KG @ cells_GL
    total_KL = np.where(known_KG, values_KG, 0.0) @ cells_GL
    return np.where(share_KL > 0, total_KL / np.where(share_KL > 0, share_KL, 1.0), np.nan)


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
