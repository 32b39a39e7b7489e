"""Expected errors on the two-level Gaussian model, by running the system to its fixed points.

    python -m analysis.gaussian [--output analysis/results/gaussian.md]

Known variances, optima at unit vectors: a model at the fixed point is its weights on the optima, so
the reported errors are exact expectations. Ratios to the Bayes errors of the theory; "theory" is
computed from closed forms, the rest is measured.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from selffl_ray import hierarchy, load_config, run_experiment

KNOWN = [
    "method.intra=known",
    "method.inter=known",
    "method.curvature=1.0",
    "method.contraction=null",
    "method.max_contraction=0.9",
    "method.max_steps=3000",
    "method.rounding=ceil",
    "method.warm_up_rounds=0",
]
METHODS = {
    "fedavg": ["method=fedavg"],
    "as_described": ["method.name=selffl", "method.preset=as_described", *KNOWN],
    "exact": ["method.name=selffl", "method.preset=exact", *KNOWN],
    "local": ["method=local"],
}
BASE = [
    "data.name=gaussian",
    "data.optima=identity",
    "model.dtype=float64",
    "placement.backend=local",
    "tracking.enabled=false",
    "evaluation.every=100000",
    "training.num_rounds=150",
    "training.num_local_steps=10",
    "training.learning_rate=0.3",
    "training.batch_size=4",
]
# Whole examples only: ten times as many at ten times the noise are closer to geometric sizes.
SIZES = {10: ("[100, 10000]", 100.0), 50: ("[10, 1000]", 10.0)}


def cell(clients: int, ratio: float, method: str) -> tuple[float, float]:
    """Ratios of the measured errors to the Bayes errors: global, local."""
    sizes, noise = SIZES[clients]
    data = [
        f"data.num_clients={clients}",
        f"data.num_examples={sizes}",
        f"data.noise_var={noise}",
        f"data.inter_ratio={ratio}",
    ]
    config = load_config(None, [*BASE, *data, *METHODS[method]])
    with tempfile.TemporaryDirectory() as folder:
        final = run_experiment(config, output=folder).summary["final"]
    theory = bayes(clients, ratio)
    return (
        final["test/global_mse"] / theory["global_bayes"],
        final["test/local_mse"] / theory["local_bayes"],
    )


def bayes(clients: int, ratio: float) -> dict[str, float]:
    """The closed forms at geometric sizes."""
    intra = 10 / np.geomspace(10, 1000, clients)
    return hierarchy.expected_mse(ratio * intra.mean(), intra, 10 / intra)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", default="analysis/results/gaussian.md")
    options = parser.parse_args()
    lines = [
        "Command: `python -m analysis.gaussian`",
        "",
        "Bayes columns: theory, absolute. Others: measured on the system, as ratios to them; in "
        "brackets the theory of FedAvg and of local training.",
        "",
        "| M | R | Bayes global | FedAvg | as_described | exact | uniform (local) | Bayes local | "
        "local only | FedAvg | as_described | exact |",
        "|" + " --- |" * 12,
    ]
    for clients in SIZES:
        for ratio in (0.01, 0.1, 1, 10):
            theory = bayes(clients, ratio)
            found = {name: cell(clients, ratio, name) for name in METHODS}
            lines.append(
                f"| {clients} | {ratio} | {theory['global_bayes']:.5f} | "
                f"{found['fedavg'][0]:.3f} "
                f"({theory['global_fedavg'] / theory['global_bayes']:.3f}) | "
                f"{found['as_described'][0]:.3f} | {found['exact'][0]:.3f} | "
                f"{found['local'][0]:.3f} | {theory['local_bayes']:.5f} | "
                f"{found['local'][1]:.4g} "
                f"({theory['local_only'] / theory['local_bayes']:.4g}) | "
                f"{found['fedavg'][1]:.4g} "
                f"({theory['local_fedavg'] / theory['local_bayes']:.4g}) | "
                f"{found['as_described'][1]:.3f} | {found['exact'][1]:.3f} |"
            )
            print(lines[-1], flush=True)
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
