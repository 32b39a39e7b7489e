"""The server's half of Self-FL: broadcast, weights, aggregation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from selffl_ray.algorithms.base import Record, Reports, Sums, Traffic, Weights
from selffl_ray.algorithms.selffl import estimates as est
from selffl_ray.algorithms.selffl.context import Context, PerClient, Report, Server, Shared
from selffl_ray.algorithms.selffl.tables import record
from selffl_ray.flat import FlatParams
from selffl_ray.participation import RoundPlan

Floats = npt.NDArray[np.float64]


def init(context: Context, params_P: FlatParams) -> Server:
    """Nothing seen, nothing estimated."""
    count, groups = context.federation.num_clients, context.groups.num_groups
    nothing = est.no_estimates(count, groups)
    return Server(
        params_P=params_P,
        others_P=params_P.clone(),
        **{name: torch.from_numpy(array) for name, array in nothing._asdict().items()},
        age_M=torch.full((count,), -1, dtype=torch.int64),
        usable_MG=torch.zeros((count, groups), dtype=torch.bool),
        weight_MG=torch.zeros((count, groups), dtype=torch.float64),
    )


def broadcast(context: Context, server: Server, plan: RoundPlan) -> tuple[Shared, PerClient]:
    """The global model to all, and to each client its weight and shrink factor."""
    index = plan.cohort
    weight_NG = np.zeros((context.federation.num_all, context.groups.num_groups))
    weight_NG[: context.federation.num_clients] = server.weight_MG.numpy()
    shrink_NG = all_shrink_factors(context, server)
    if plan.round_index < context.config.warm_up_rounds:
        shrink_NG = np.full_like(shrink_NG, np.nan)
    rows = PerClient(torch.from_numpy(weight_NG[index]), torch.from_numpy(shrink_NG[index]))
    return Shared(server.params_P, server.others_P), rows


def all_shrink_factors(context: Context, server: Server) -> Floats:
    """Shrink factors of all clients, those that take part first and then new ones: (M + N, G)."""
    federation = context.federation
    num_M, num_new = federation.num_examples_M, federation.num_examples_new
    columns = [
        est.shrink_factors(
            context.config,
            float(server.inter_G[g]),
            server.intra_MG[:, g].numpy(),
            num_M.astype(np.float64),
            seen_M=server.age_M.numpy() >= 0,
            new_num_examples=num_new.astype(np.float64),
        )
        for g in range(context.groups.num_groups)
    ]
    return np.stack(columns, axis=1)


def weigh(context: Context, server: Server, reports: Reports, sums: Sums) -> tuple[Server, Weights]:
    """Take in the probe, then weigh the last upload of everybody seen."""
    config, rows = context.config, reports.rows
    assert isinstance(rows, Report)
    age_M = torch.where(server.age_M >= 0, server.age_M + 1, server.age_M)
    accepted = torch.from_numpy(reports.client_index)
    age_M[accepted] = 0
    usable_MG = server.usable_MG.clone()
    usable_MG[accepted] = rows.usable_CG
    new = server._replace(age_M=age_M, usable_MG=usable_MG)
    if config.probes(reports.plan.round_index):
        new = _with_probe(context, new, reports, sums)
    num_M = context.federation.num_examples_M.astype(np.float64)
    warm = reports.plan.round_index < config.warm_up_rounds
    columns = [
        est.aggregation_weights(
            config,
            np.nan if warm else float(new.inter_G[g]),
            new.intra_MG[:, g].numpy(),
            num_M,
            age_M=age_M.numpy(),
            usable_M=usable_MG[:, g].numpy(),
        )
        for g in range(context.groups.num_groups)
    ]
    weight_MG = np.stack(columns, axis=1)
    new = new._replace(weight_MG=torch.from_numpy(weight_MG))
    return new, _nonzero(weight_MG)


def _with_probe(context: Context, server: Server, reports: Reports, sums: Sums) -> Server:
    rows: Report = reports.rows
    brought = sums[0].numpy()
    needs_rows = context.inter.needs_rows
    probe = est.Probe(
        reports.client_index,
        context.federation.num_examples_M[reports.client_index].astype(np.float64),
        rows.var_CG.numpy(),
        rows.mean_square_CG.numpy(),
        brought.mean(axis=0) if needs_rows else brought,
        brought.astype(np.float64) if needs_rows else None,
    )
    old = est.Estimates(*(getattr(server, name).numpy() for name in est.Estimates._fields))
    new = est.update_estimates(
        context.config,
        context.inter,
        context.groups,
        known_inter_var=context.known_inter_var,
        exact_intra=context.intra.exact,
        old=old,
        probe=probe,
    )
    return server._replace(**{k: torch.from_numpy(a) for k, a in new._asdict().items()})


def _nonzero(weight_MG: Floats) -> Weights:
    index = np.flatnonzero(weight_MG.any(axis=1)).astype(np.int64)
    weight = weight_MG[index]
    return Weights(index, weight[:, 0] if weight.shape[1] == 1 else weight)


def weigh_others(server: Server, reports: Reports, sums: Sums) -> tuple[Server, Weights]:
    """Weights without the client that holds more than half of a group; none if nobody does.

    Subtracting such a client from the global model would cancel, so its leave-one-out mean is
    summed directly.
    """
    weight_MG = server.weight_MG.numpy().copy()
    dominated = weight_MG.max(axis=0) > 0.5
    if not dominated.any():
        return server, Weights(np.empty(0, np.int64), np.empty(0))
    weight_MG[weight_MG.argmax(axis=0)[dominated], np.flatnonzero(dominated)] = 0.0
    total_G = weight_MG.sum(axis=0)
    return server, _nonzero(weight_MG / np.where(total_G > 0, total_G, 1.0))


def aggregate(
    context: Context, server: Server, sums: Sums, reports: Reports
) -> tuple[Server, Record]:
    """The weighted sum becomes the global model; a group without any weight keeps its values."""
    dtype = server.params_P.dtype
    weighed_1G = (server.weight_MG.sum(0) > 0).unsqueeze(0)
    weighed_P = context.groups.spread(weighed_1G)[0]
    params_P = server.params_P
    if len(sums[1]):
        params_P = torch.where(weighed_P, sums[1].to(dtype), params_P)
    others_P = params_P
    if len(sums[2]):
        # A group whose only weighed client is the dominating one has no others: theta stands in.
        rest_MG = server.weight_MG.clone()
        rest_MG[rest_MG.argmax(0), torch.arange(rest_MG.shape[1])] = 0.0
        has_others_P = context.groups.spread((rest_MG.sum(0) > 0).unsqueeze(0))[0]
        others_P = torch.where(has_others_P, sums[2].to(dtype), params_P)
    new = server._replace(params_P=params_P, others_P=others_P)
    return new, record(context, new, reports, all_shrink_factors(context, new))


def traffic(context: Context, plan: RoundPlan) -> Traffic:
    """A model down and one up; on a probe also a vector and two numbers a group up."""
    size, groups = context.num_params, context.groups.num_groups
    probe = size + 2 * groups if context.config.probes(plan.round_index) else 0
    return Traffic(size + 2 * groups, size + probe)
