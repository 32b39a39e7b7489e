"""Calibration of the intra-client estimators: Self-FL itself, run on ``gaussian`` data.

24 clients of 25, 100 and 400 examples, 20 coordinates, noise variance 1, so that a client's local
optimum has variance 1 / n; inter_var 0.01, its value for 100 examples. Every estimator runs inside
Self-FL (beside ``moments``, no smoothing); the raw variances of the last round are read from the
run's uncertainty table. They are compared with the truth and plugged into the posterior of each
client's parameters about the true local optima, so that only the variances are judged, not the
training.

One scale: the loss has curvature 1, so gradients are on the scale of parameters, and 40 steps at
rate 0.1 leave (1 - 0.9^40)^2 = 0.97 of the variance of uploads. With noise variance 1 the loss is
the negative log-likelihood, which is the best case for ``fisher``, and ``sample_size`` with its
default scale is told the truth. The noise is the same for all clients, which is what pooling
assumes.

Shape letters: M clients, P coordinates, R replicates (seeds).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from analysis import calibration_base as base
from analysis.calibration_base import Figure, Floats, Measured
from selffl_ray import ExperimentConfig, load_config, run_experiment
from selffl_ray.experiment import prepare_experiment

SIZES = (25, 100, 400)
CLIENTS_A_SIZE = 8
DIMENSION = 20
INTER_VAR = 0.01
LEARNING_RATE = 0.1
NUM_STEPS = 40
NUM_ROUNDS = 6
"""The first upload starts elsewhere and ``round_window`` remembers the five after it."""
BAYES = "true variances"
SAMPLINGS: Mapping[str, Sequence[str]] = {
    "replacement": base.INTRA,
    "epoch": ("round_window", "split_half", "trajectory", "trajectory_rescaled"),
}
"""How batches are drawn, and the estimators that are tried with it. Independent batches are what
5.1 assumes; the package's default, ``epoch``, changes only those that look at training."""


class Truth(NamedTuple):
    """Of one draw: names, sizes, true parameters, local optima, their true variances."""

    client_ids: tuple[str, ...]
    num_M: npt.NDArray[np.int64]
    theta_MP: Floats
    optima_MP: Floats
    intra_M: Floats


class Estimated(NamedTuple):
    """What Self-FL estimated in a run's last round. shrink_M: what it made of both."""

    intra_M: Floats
    inter_var: float
    shrink_M: Floats


def configuration(
    seed: int,
    intra: str,
    *,
    sampling: str = "replacement",
    pooling: str = "own",
    clients_a_size: int = CLIENTS_A_SIZE,
) -> ExperimentConfig:
    """Self-FL on one draw of the clients; nothing is personalized, only estimated."""
    sizes = [n for n in SIZES for _ in range(clients_a_size)]
    return load_config(
        None,
        [
            "experiment=calibration",
            f"seed={seed}",
            f"data={{name: gaussian, num_clients: {len(sizes)}, dimension: {DIMENSION}, "
            f"num_examples: {sizes}, noise_var: 1.0, inter_var: {INTER_VAR}}}",
            f"method={{name: selffl, intra: {intra}, intra_pooling: {pooling}, inter: moments, "
            "probe_every: 1, beta: 0.0, curvature: 1.0, max_contraction: 0.9, "
            "personalization: none}",
            f"training.num_rounds={NUM_ROUNDS}",
            f"training.num_local_steps={NUM_STEPS}",
            f"training.learning_rate={LEARNING_RATE}",
            "training.batch_size=20",
            f"training.sampling={sampling}",
            "placement.backend=local",
            "tracking.enabled=false",
            f"evaluation.every={NUM_ROUNDS}",
            f"checkpoint.every={NUM_ROUNDS}",
        ],
    )


def truth(config: ExperimentConfig) -> Truth:
    """The draw behind a configuration: every client's one test example is its theta_m."""
    prepared = prepare_experiment(config)
    known = prepared.federation.known
    assert known is not None, "gaussian data know their variances"
    theta, optima = [], []
    for client in prepared.clients:
        theta.append(prepared.store.read(np.sort(client.test)).y[0, 1, 0])
        examples_NP = prepared.store.read(np.sort(client.train)).y[:, 1, 0]
        optima.append(examples_NP.astype(np.float64).mean(axis=0))
    return Truth(
        tuple(prepared.client_ids),
        prepared.federation.num_examples_M,
        np.asarray(theta, dtype=np.float64),
        np.asarray(optima),
        known.intra_var_M,
    )


def run(config: ExperimentConfig, client_ids: Sequence[str]) -> Estimated:
    """Run Self-FL and read what it estimated in the last round, in the order of the ids."""
    with tempfile.TemporaryDirectory() as folder:
        table = run_experiment(config, output=folder).uncertainty
    last = table[table["round_index"] == table["round_index"].max()]
    last = last.set_index("client_id").loc[list(client_ids)]
    return Estimated(
        last["intra_var"].to_numpy(np.float64),
        float(last["inter_var"].iloc[0]),
        last["shrinkage"].to_numpy(np.float64),
    )


def pooled(intra_M: Floats, num_M: npt.NDArray[np.int64]) -> Floats:
    """The variances that ``intra_pooling: pooled`` makes of raw ones: mean(n var) / n."""
    return np.asarray((num_M * intra_M).mean() / num_M)


def slope(intra_M: Floats, num_M: npt.NDArray[np.int64]) -> float:
    """Least-squares slope of log variance against log 1 / n: 1 is right, 0 is flat."""
    return float(np.polyfit(-np.log(num_M), np.log(intra_M), 1)[0])


class Judged(NamedTuple):
    """A rule on one draw, by client, (M,).

    ratio_M: its variances over the true ones; square_M: mean square error of the posterior mean;
    covered_M: share of coordinates inside the interval.
    """

    ratio_M: Floats
    square_M: Floats
    covered_M: Floats


def judge(drawn: Truth, inter_var: float, intra_M: Floats) -> Judged:
    """Plug variances in and compare with the truth."""
    posterior = base.plug_in(drawn.optima_MP, inter_var, intra_M)
    return Judged(
        intra_M / drawn.intra_M,
        base.square_errors(posterior, drawn.theta_MP),
        base.coverage(posterior, drawn.theta_MP),
    )


def figures(seeds: int, *, clients_a_size: int = CLIENTS_A_SIZE) -> list[Figure]:
    """Bias, RMSE, slope, coverage and plug-in risk of every estimator over that many draws."""
    draws = [
        truth(configuration(seed, "gradient", clients_a_size=clients_a_size))
        for seed in range(seeds)
    ]
    num_M = draws[0].num_M
    bayes = [judge(drawn, INTER_VAR, drawn.intra_M) for drawn in draws]
    rows = _figures_of(BAYES, "own", bayes, bayes, num_M)
    for sampling, names in SAMPLINGS.items():
        for name in names:
            found = [
                run(
                    configuration(seed, name, sampling=sampling, clients_a_size=clients_a_size),
                    drawn.client_ids,
                )
                for seed, drawn in enumerate(draws)
            ]
            slopes = base.mean([slope(one.intra_M, num_M) for one in found])
            rows.append(_figure(name, f"{sampling}, own", "slope", slopes))
            for pooling in ("own", "pooled"):
                judged = [
                    judge(
                        drawn,
                        one.inter_var,
                        one.intra_M if pooling == "own" else pooled(one.intra_M, num_M),
                    )
                    for drawn, one in zip(draws, found, strict=True)
                ]
                rows += _figures_of(name, f"{sampling}, {pooling}", judged, bayes, num_M)
            inter = base.mean([one.inter_var / INTER_VAR for one in found])
            rows.append(_figure(name, f"{sampling}, own", "moments_ratio", inter))
    return rows


def _figures_of(
    name: str,
    variant: str,
    judged: Sequence[Judged],
    bayes: Sequence[Judged],
    num_M: npt.NDArray[np.int64],
) -> list[Figure]:
    """Figures of one rule, by number of examples and over all clients."""
    own, best = (Judged(*map(np.stack, zip(*rows, strict=True))) for rows in (judged, bayes))
    rows = []
    for size in (*SIZES, np.nan):
        mine = num_M == size if size in SIZES else np.full(len(num_M), True)
        measured = {
            "ratio": base.mean(own.ratio_M[:, mine].mean(axis=1)),
            "log_rmse": base.root(np.square(np.log(own.ratio_M[:, mine])).mean(axis=1)),
            "coverage": base.mean(own.covered_M[:, mine].mean(axis=1)),
            "risk": base.ratio(
                own.square_M[:, mine].mean(axis=1), best.square_M[:, mine].mean(axis=1)
            ),
        }
        rows += [_figure(name, variant, q, m, size) for q, m in measured.items()]
    return rows


def _figure(
    name: str, variant: str, quantity: str, measured: Measured, size: float = np.nan
) -> Figure:
    return Figure(
        part="intra",
        estimator=name,
        variant=variant,
        quantity=quantity,
        value=measured.value,
        error=measured.error,
        inter_var=INTER_VAR,
        num_examples=size,
    )
