"""The two-level Gaussian model: posteriors, shrinkage, local steps, rates and weights.

theta_m | theta_0 ~ N(theta_0, inter_var I)   the clients' true parameters around the global ones
y_m | theta_m     ~ N(theta_m, intra_var_m I) a client's local optimum around its true parameters

Variances are per coordinate. Only their ratios matter to weights, shrinkage and steps, so both may
be measured on any common scale, but never on two different ones. All scalars are float64.

Shape letters: M clients, P parameters. Vectors are NumPy arrays or torch tensors.

Source: Chen et al., "Self-Aware Personalized Federated Learning" (NeurIPS 2022), for the model, the
two uncertainties and the three local factors; the leave-one-out and with-self posteriors are
standard normal-normal conditioning. The fixed points of the iterated algorithm and the integer
rounding rule are this project's own derivations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from selffl_ray.errors import VarianceError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Vector = TypeVar("Vector", npt.NDArray[Any], torch.Tensor)
Rule = Literal["precision", "uniform", "deshrunk", "common_tap", "fedavg"]
Initial = Literal["loo", "global"]

SMALLEST_DISCOUNT = 2.0**-24
"""Discounts below this are dropped: they are under the resolution of a float32 sum."""


def check_variances(inter_var: float, intra_var_M: npt.ArrayLike) -> tuple[float, Floats]:
    """The two variances as float64, refused if negative or NaN; infinity is allowed.

    Raises:
        VarianceError: naming the first offending value and its client.
    """
    inter = float(inter_var)
    if not inter >= 0:
        raise VarianceError(f"inter_var must be >= 0, got {inter}; estimate it again or drop it")
    intra_M = np.atleast_1d(np.asarray(intra_var_M, dtype=np.float64))
    bad_M = ~(intra_M >= 0)
    if bad_M.any():
        client = int(np.argmax(bad_M))
        raise VarianceError(
            f"intra_var of client {client} must be >= 0, got {intra_M[client]}; "
            "leave out clients whose variance is unknown"
        )
    return inter, intra_M


def _relative_precisions(inter: float, intra_M: Floats) -> Floats:
    """w_m up to one common factor, with the limits taken: the largest is 1 unless all are 0."""
    seen_M = np.isfinite(intra_M)
    if math.isinf(inter):
        return np.asarray(seen_M, dtype=np.float64)
    total_M = inter + intra_M
    if (total_M == 0).any():
        return np.asarray(total_M == 0, dtype=np.float64)
    smallest = float(total_M.min(initial=math.inf))
    if not math.isfinite(smallest):
        return np.zeros_like(total_M)
    return np.where(seen_M, smallest / total_M, 0.0)


def precision_weights(inter_var: float, intra_var_M: npt.ArrayLike) -> Floats:
    """q_m = w_m / W with w_m = 1 / (inter_var + intra_var_m): equation (1)'s weights.

    Args:
        inter_var: >= 0, infinity allowed (all clients that were seen weigh the same).
        intra_var_M: (M,), >= 0; infinity marks a client that was never seen (weight 0). Clients
            with inter_var + intra_var_m = 0 share all the weight.

    Returns:
        (M,), sums to 1.

    Raises:
        VarianceError: a negative or NaN variance, or nobody has a weight.
    """
    return discounted_weights(inter_var, intra_var_M, None, 1.0)


def discounted_weights(
    inter_var: float,
    intra_var_M: npt.ArrayLike,
    age_M: npt.ArrayLike | None,
    discount: float,
) -> Floats:
    """Weights proportional to discount**age_m / (inter_var + intra_var_m): equation (12).

    Args:
        inter_var: >= 0.
        intra_var_M: (M,), >= 0; infinity marks a client that was never seen.
        age_M: (M,) rounds since the client's last upload, 0 if it uploaded in the last aggregation.
        discount: gamma in [0, 1]; 1 keeps old uploads whole, 0 keeps participants only (0**0 = 1).

    Returns:
        (M,), sums to 1. Discounts below 2**-24 count as 0.

    Raises:
        VarianceError: a bad variance, a discount outside [0, 1], or nobody has a weight.
    """
    inter, intra_M = check_variances(inter_var, intra_var_M)
    if not 0 <= discount <= 1:
        raise VarianceError(f"discount must lie in [0, 1], got {discount}")
    weights_M = _relative_precisions(inter, intra_M)
    if age_M is not None:
        weights_M = weights_M * discounts(age_M, discount)
    total = float(weights_M.sum())
    if total == 0:
        raise VarianceError(
            "all weights are 0: no client has been seen, or all uploads are discounted away; "
            "aggregate only after a client has answered"
        )
    return weights_M / total


def discounts(age_M: npt.ArrayLike, discount: float) -> Floats:
    """discount**age with 0**0 = 1; below 2**-24 it is dropped to 0."""
    powers_M = np.power(float(discount), np.asarray(age_M, dtype=np.float64))
    return np.where(powers_M < SMALLEST_DISCOUNT, 0.0, powers_M)


def _total_precision(inter: float, intra_M: Floats) -> float:
    """W = sum of 1 / (inter_var + intra_var_m); infinite if one of them is certain."""
    total_M = inter + intra_M
    return math.inf if (total_M == 0).any() else float((1.0 / total_M).sum())


def global_posterior(
    local_params_MP: Vector, inter_var: float, intra_var_M: npt.ArrayLike
) -> tuple[Vector, float]:
    """Posterior mean and variance of the global parameters: equation (1).

    Returns:
        mean (P,), and the variance 1 / W a coordinate (0 if a client is certain).

    Raises:
        VarianceError: as in :func:`precision_weights`.
    """
    inter, intra_M = check_variances(inter_var, intra_var_M)
    mean_P = _weighted_mean(local_params_MP, precision_weights(inter, intra_M))
    precision = _total_precision(inter, intra_M)
    return mean_P, 1.0 / precision if precision > 0 else math.inf


def _weighted_mean(rows_MP: Vector, weights_M: Floats) -> Vector:
    """Sum of weight * row over the rows with a weight, in client order.

    Rows without a weight are skipped, not multiplied: they may hold NaN (never seen).
    """
    terms: list[Vector] = [rows_MP[m] * float(weights_M[m]) for m in np.flatnonzero(weights_M)]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def leave_one_out(
    local_params_MP: Vector, inter_var: float, intra_var_M: npt.ArrayLike, client: int
) -> tuple[Vector | None, float]:
    """Global posterior of all clients but one: theta_{-m} and its variance v_{-m}.

    Returns:
        mean (P,) and variance; (None, infinity) if no other client has a weight. The variance is 0
        if another client is certain.

    Raises:
        VarianceError: a negative or NaN variance.
    """
    inter, intra_M = check_variances(inter_var, intra_var_M)
    others_M = intra_M.copy()
    others_M[client] = math.inf
    weights_M = _relative_precisions(inter, others_M)
    if weights_M.sum() == 0:
        return None, math.inf
    mean_P = _weighted_mean(local_params_MP, weights_M / weights_M.sum())
    return mean_P, leave_one_out_variances(inter, intra_M)[client]


def leave_one_out_variances(inter_var: float, intra_var_M: npt.ArrayLike) -> Floats:
    """v_{-m} = 1 / (W - w_m) for every client: (M,), 0 if another client is certain, maybe inf."""
    inter, intra_M = check_variances(inter_var, intra_var_M)
    total_M = inter + intra_M
    certain_M = total_M == 0
    others_certain_M = certain_M.sum() - certain_M > 0
    with np.errstate(divide="ignore"):
        weights_M = np.where(certain_M, 0.0, 1.0 / total_M)
    with np.errstate(divide="ignore"):
        return np.where(others_certain_M, 0.0, 1.0 / _sum_of_others(weights_M))


def _sum_of_others(weights_M: Floats) -> Floats:
    """Sum without each client, never total - own: one with nearly all the weight would cancel."""
    before_M = np.concatenate([[0.0], np.cumsum(weights_M)[:-1]])
    after_M = np.concatenate([np.cumsum(weights_M[::-1])[:-1][::-1], [0.0]])
    return np.asarray(before_M + after_M)


def shrinkage(inter_var: float, intra_var_M: npt.ArrayLike, *, kappa: float = 1.0) -> Floats:
    """lambda_m = intra_var_m / (intra_var_m + inter_var), the weight on the global model: (3).

    Args:
        kappa: >= 0, multiplies intra_var_m: above 1 shrinks more.

    Returns:
        (M,) in [0, 1]; 0 for a certain client (also 0 / 0), 1 for one that was never seen.
    """
    inter, intra_M = check_variances(inter_var, intra_var_M)
    return posterior_weight(_scaled(intra_M, kappa), np.full_like(intra_M, inter))


def shrinkage_loo(inter_var: float, intra_var_M: npt.ArrayLike, *, kappa: float = 1.0) -> Floats:
    """B_m = intra_var_m / (intra_var_m + inter_var + v_{-m}), weight on theta_{-m}: (2).

    Args:
        kappa: >= 0, multiplies intra_var_m here but not in v_{-m}: above 1 shrinks more.

    Returns:
        (M,) in [0, 1]; 0 for a certain client and where no other client has a weight, 1 for a
        client that was never seen. Equals lambda_m (1 - q_m), equation (4).

    Raises:
        VarianceError: a negative or NaN variance, or no client was ever seen.
    """
    inter, intra_M = check_variances(inter_var, intra_var_M)
    if not np.isfinite(intra_M).any():
        raise VarianceError("no client has a finite intra_var: nothing to shrink towards")
    return posterior_weight(
        _scaled(intra_M, kappa), inter + leave_one_out_variances(inter, intra_M)
    )


def _scaled(intra_M: Floats, kappa: float) -> Floats:
    """Kappa * intra; a client that was never seen stays at infinity whatever kappa is."""
    return np.where(np.isinf(intra_M), np.inf, kappa * np.where(np.isinf(intra_M), 0.0, intra_M))


def posterior_weight(intra_M: Floats, prior_M: Floats) -> Floats:
    """Weight on the prior's mean, intra / (intra + prior), with its limits.

    0 / 0 is 0, an infinite intra is 1, and otherwise an infinite prior is 0.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio_M = intra_M / (intra_M + prior_M)
    ratio_M = np.where(np.isinf(prior_M), 0.0, ratio_M)
    return np.where(intra_M == 0, 0.0, np.where(np.isinf(intra_M), 1.0, ratio_M))


def personal_posterior(
    local_params_MP: Vector, inter_var: float, intra_var_M: npt.ArrayLike
) -> tuple[Vector, Floats]:
    """Posterior mean and variance of every client's own parameters: equation (2).

    Returns:
        mean (M, P): (1 - B_m) y_m + B_m theta_{-m}; variance (M,): intra_var_m (1 - B_m), or
        inter_var + v_{-m} for a client that was never seen (its row is not read).

    Raises:
        VarianceError: as in :func:`precision_weights`.
    """
    inter, intra_M = check_variances(inter_var, intra_var_M)
    shrink_M = shrinkage_loo(inter, intra_M)
    rows = [
        _personal_mean(local_params_MP, inter, intra_M, m, float(shrink_M[m]))
        for m in range(len(intra_M))
    ]
    prior_M = inter + leave_one_out_variances(inter, intra_M)
    with np.errstate(invalid="ignore"):
        # 1 - B as a ratio of its own: a difference would cancel where B is near 1.
        own_M = intra_M * posterior_weight(prior_M, intra_M)
    return _stack(rows), np.where(np.isinf(intra_M), prior_M, own_M)


def _personal_mean(
    local_params_MP: Vector, inter: float, intra_M: Floats, client: int, shrink: float
) -> Vector:
    own_P: Vector = local_params_MP[client] * (1.0 - shrink)
    if shrink == 0:
        return own_P
    others_P, _ = leave_one_out(local_params_MP, inter, intra_M, client)
    assert others_P is not None, "B > 0 only where another client has a weight"
    if shrink == 1:
        return others_P
    mean_P: Vector = own_P + others_P * shrink
    return mean_P


def _stack(rows: Sequence[Vector]) -> Vector:
    if isinstance(rows[0], torch.Tensor):
        return torch.stack(list(rows))
    return np.stack(rows)


def num_local_steps(
    shrinkage: npt.ArrayLike,
    learning_rate: float,
    curvature: float = 1.0,
    *,
    min_steps: int = 1,
    max_steps: int,
    rounding: Literal["nearest", "ceil"] = "nearest",
) -> Ints:
    """Steps after which gradient descent retains the wanted shrink factor: equation (6).

    l = ln S / ln(1 - rho) with rho = learning_rate * curvature, clipped to [min_steps, max_steps]
    and rounded. ``nearest`` alone is harmless for rho <= 0.05; for more take ``ceil`` and then
    :func:`learning_rate` with that l, which lands exactly.

    Args:
        shrinkage: S, any shape; S <= 0 gives max_steps, S >= 1 gives min_steps.

    Raises:
        VarianceError: rho outside (0, 1), a NaN shrinkage, or min_steps > max_steps.
    """
    contraction = learning_rate * curvature
    if not 0 < contraction < 1:
        raise VarianceError(
            f"learning_rate * curvature must lie in (0, 1), got {learning_rate} * {curvature}; "
            "lower the learning rate or the assumed curvature"
        )
    if not 0 <= min_steps <= max_steps:
        raise VarianceError(f"need 0 <= min_steps <= max_steps, got {min_steps} and {max_steps}")
    shrink = np.asarray(shrinkage, dtype=np.float64)
    if np.isnan(shrink).any():
        raise VarianceError("shrinkage is NaN: the variances behind it are unknown")
    with np.errstate(divide="ignore"):
        steps = np.log(np.clip(shrink, 0.0, 1.0)) / math.log1p(-contraction)
    # A whole number of steps must not be pushed up by the rounding error of the two logarithms.
    rounded = np.floor(steps + 0.5) if rounding == "nearest" else np.ceil(steps - 1e-9)
    return np.clip(rounded, min_steps, max_steps).astype(np.int64)


def learning_rate(
    shrinkage: npt.ArrayLike, num_local_steps: npt.ArrayLike, curvature: float = 1.0
) -> Floats:
    """Rate with which exactly l >= 1 steps retain the shrink factor: (1 - S**(1/l)) / h, (7).

    Raises:
        VarianceError: S outside [0, 1], fewer than one step, or curvature <= 0.
    """
    shrink = np.asarray(shrinkage, dtype=np.float64)
    steps = np.asarray(num_local_steps, dtype=np.float64)
    if not ((shrink >= 0) & (shrink <= 1)).all():
        raise VarianceError(f"shrinkage must lie in [0, 1], got {shrink}")
    if not (steps >= 1).all():
        raise VarianceError(f"a rate needs at least one step, got {steps}")
    if not curvature > 0:
        raise VarianceError(f"curvature must be > 0, got {curvature}")
    with np.errstate(divide="ignore"):
        # -expm1(log S / l) keeps its digits where S is near 1.
        rate = -np.expm1(np.log(shrink) / steps) / curvature
    return np.asarray(rate, dtype=np.float64)


def interpolate(initial: Vector, trained: Vector, shrinkage: Any) -> Vector:
    """Initial + (1 - S) (trained - initial): equation (8); S broadcasts over the rows."""
    moved: Vector = initial + (1.0 - shrinkage) * (trained - initial)
    return moved


def deshrink(initial: Vector, stopped: Vector, shrinkage: Any) -> Vector:
    """Initial + (stopped - initial) / (1 - S): undoes early stopping, equation (9).

    The noise of ``stopped`` grows by 1 / (1 - S); use it for S <= 0.9 only.

    Raises:
        VarianceError: S >= 1, which retains nothing to undo.
    """
    if bool((np.asarray(shrinkage) >= 1).any()):
        raise VarianceError("deshrink needs S < 1: with S = 1 the client never left its start")
    optimum: Vector = initial + (stopped - initial) / (1.0 - shrinkage)
    return optimum


def normalise(inter_var: float, intra_var_M: npt.ArrayLike) -> tuple[float, Floats]:
    """Both variances over their common scale t = inter_var + mean(intra_var_M); t = 0 gives 0.

    Returns:
        (u0, u_M), which sum to 1 in the mean.
    """
    inter, intra_M = check_variances(inter_var, intra_var_M)
    scale = inter + float(intra_M.mean())
    if scale == 0:
        return 0.0, np.zeros_like(intra_M)
    return inter / scale, intra_M / scale


def smooth(
    previous: tuple[float, npt.ArrayLike] | None,
    inter_var: float,
    intra_var_M: npt.ArrayLike,
    beta: float,
    present_M: npt.ArrayLike | None = None,
    *,
    beta_intra: float | None = None,
) -> tuple[float, Floats] | None:
    """Normalised variances, smoothed over probes: u <- beta u + (1 - beta) new.

    Args:
        previous: (u0, u_M) of the last probe, NaN where a client was never probed; None before the
            first.
        inter_var, intra_var_M: this probe's raw estimates; entries of absent clients are not read.
        beta: in [0, 1), memory of u0, and of u_M unless ``beta_intra`` is given.
        present_M: (M,) bool, who took part; all by default.

    Returns:
        (u0, u_M); absent clients keep theirs (NaN if they have none). ``previous`` is returned as
        it came if fewer than two clients took part.
    """
    raw_M = np.asarray(intra_var_M, dtype=np.float64)
    present = np.ones(len(raw_M), bool) if present_M is None else np.asarray(present_M, bool)
    if present.sum() < 2:
        return None if previous is None else (float(previous[0]), np.array(previous[1], float))
    # Before the absent ones are left out, so that an error names the right client.
    check_variances(inter_var, np.where(present, raw_M, 0.0))
    new_u0, new_u = normalise(inter_var, raw_M[present])
    keep_0, keep_M = beta, beta if beta_intra is None else beta_intra
    old_u0, old_M = (math.nan, np.full(len(raw_M), math.nan))
    if previous is not None:
        old_u0, old_M = float(previous[0]), np.array(previous[1], dtype=np.float64)
    u_M = old_M.copy()
    first = np.isnan(old_M[present])
    u_M[present] = np.where(first, new_u, keep_M * old_M[present] + (1 - keep_M) * new_u)
    u0 = new_u0 if math.isnan(old_u0) else keep_0 * old_u0 + (1 - keep_0) * new_u0
    return u0, u_M


def fixed_point_weights(
    inter_var: float,
    intra_var_M: npt.ArrayLike,
    rule: Rule,
    initial: Initial,
    *,
    retained: float = 0.5,
    num_examples_M: npt.ArrayLike | None = None,
) -> Floats:
    """Weights e_m of the local optima in the global model that an iterated rule converges to.

    Args:
        rule: ``precision`` (early-stopped uploads, averaged by w_m), ``uniform`` (early-stopped,
            plain mean), ``deshrunk``, ``common_tap`` (the same number of steps for all, averaged
            by w_m), ``fedavg`` (the same number of steps, averaged by num_examples).
        initial: each client starts from the leave-one-out mean (of plain means for ``uniform``) or
            from the global model. ``deshrunk`` does not depend on it; ``fedavg`` knows ``global``.
        retained: fraction a in [0, 1) that the common number of steps retains of its start.
        num_examples_M: (M,), needed by ``fedavg`` only.

    Returns:
        (M,), sums to 1. Verified against brute-force iteration on quadratics. Where the global
        initial model is never left (inter_var = 0), the limit for a small inter_var.

    Raises:
        VarianceError: a bad variance, a rule that is not known with that initial model, or a
            common tap from the leave-one-out mean where one client holds all the weight.
    """
    inter, intra_M = check_variances(inter_var, intra_var_M)
    q_M = precision_weights(inter, intra_M)
    if len(intra_M) == 1:
        return np.ones(1)
    loo_M, others_M = shrinkage_loo(inter, intra_M), _sum_of_others(q_M)
    if rule == "fedavg" and initial == "global":
        if num_examples_M is None:
            raise VarianceError("fixed_point_weights(rule='fedavg') needs num_examples_M")
        raw_M = np.asarray(num_examples_M, dtype=np.float64)
    elif rule == "deshrunk" or (rule in ("common_tap", "uniform") and initial == "global"):
        raw_M = q_M  # 1 - lambda_m is proportional to w_m
    elif rule == "precision":
        loo_factor_M = (1 - loo_M) / (1 + shrinkage(inter, intra_M) * q_M)
        raw_M = q_M * (loo_factor_M if initial == "loo" else q_M)
    elif rule == "uniform":
        raw_M = (1 - loo_M) / (1 + loo_M / (len(intra_M) - 1))
    elif rule == "common_tap" and (others_M > 0).all():
        raw_M = q_M * others_M / (others_M + retained * q_M)
    else:
        raise VarianceError(
            f"no fixed point is known for rule {rule!r} with initial {initial!r} and weights {q_M}"
        )
    return np.asarray(raw_M / raw_M.sum(), dtype=np.float64)


def expected_mse(
    inter_var: float, intra_var_M: npt.ArrayLike, num_examples_M: npt.ArrayLike
) -> dict[str, float]:
    """Exact expected squared errors a coordinate of the usual estimators, no simulation.

    The ``global_*`` entries estimate theta_0; the ``local_*`` ones theta_m, averaged over clients:
    ``local_only`` uses y_m, ``local_fedavg`` FedAvg's model, ``local_global`` the Bayes global one.
    """
    inter, intra_M = check_variances(inter_var, intra_var_M)
    size_M = np.asarray(num_examples_M, dtype=np.float64)
    fedavg_M, count = size_M / size_M.sum(), len(intra_M)
    bayes_M = precision_weights(inter, intra_M)
    _, personal_var_M = personal_posterior(np.zeros((count, 1)), inter, intra_M)
    return {
        "global_bayes": _global_mse(bayes_M, inter, intra_M),
        "global_fedavg": _global_mse(fedavg_M, inter, intra_M),
        "global_uniform": _global_mse(np.full(count, 1 / count), inter, intra_M),
        "local_bayes": float(personal_var_M.mean()),
        "local_only": float(intra_M.mean()),
        "local_fedavg": float(mixture_mse(fedavg_M, inter, intra_M).mean()),
        "local_global": float(mixture_mse(bayes_M, inter, intra_M).mean()),
    }


def _global_mse(weights_M: Floats, inter: float, intra_M: Floats) -> float:
    return float((weights_M**2 * (inter + intra_M)).sum())


def mixture_mse(weights_M: Floats, inter_var: float, intra_var_M: npt.ArrayLike) -> Floats:
    """Expected squared error of sum_k weights_k y_k as an estimate of each client's theta_m.

    Args:
        weights_M: (M,) for one mixture, or (M, M) with a row for each client; rows sum to 1.

    Returns:
        (M,): (1 - e_m)^2 inter + e_m^2 intra_m + sum over k != m of e_k^2 (inter + intra_k).
    """
    inter, intra_M = check_variances(inter_var, intra_var_M)
    rows_MM = np.broadcast_to(np.asarray(weights_M, dtype=np.float64), (len(intra_M),) * 2)
    own_M = np.diagonal(rows_MM)
    spread_MM = rows_MM**2 * (inter + intra_M)
    others_M = spread_MM.sum(1) - np.diagonal(spread_MM)
    return np.asarray((1 - own_M) ** 2 * inter + own_M**2 * intra_M + others_M, np.float64)
