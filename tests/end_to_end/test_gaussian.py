"""The two-level Gaussian model, run on the real system to its fixed points.

The optima are unit vectors (``optima: identity``), so a model at the fixed point *is* its weights,
and the reported errors are exact expectations: no Monte Carlo.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from selffl_ray import hierarchy, load_config, run_experiment

pytestmark = pytest.mark.slow

BASE = (
    "data.name=gaussian",
    "data.optima=identity",
    "model.dtype=float64",
    "placement.backend=local",
    "tracking.enabled=false",
    "evaluation.every=100000",
    "training.learning_rate=0.3",
    "training.num_local_steps=10",
    # All examples of a client are equal, so a batch of any size has the full gradient.
    "training.batch_size=4",
    "export_models=true",
)
KNOWN = (
    "method.intra=known",
    "method.inter=known",
    "method.curvature=1.0",
    "method.contraction=null",
    "method.max_contraction=0.9",
    "method.max_steps=3000",
    "method.rounding=ceil",
    "method.warm_up_rounds=0",
)


def run(folder, *settings, rounds=150):
    config = load_config(None, [*BASE, f"training.num_rounds={rounds}", *settings])
    return run_experiment(config, output=folder)


def selffl(preset, *more):
    return ("method.name=selffl", f"method.preset={preset}", *KNOWN, *more)


# (R, Bayes global, Bayes local) and ratios to them (global, local) of FedAvg, as_described, and of
# the uniform mean and local training; M = 10, n geometric from 10 to 1000, intra = 10 / n.
TABLE = {
    0.01: (0.00463, 0.00652, (1.006, 1.020), (1.207, 1.130), (5.411, 38.09)),
    0.1: (0.00897, 0.02314, (1.150, 1.304), (1.162, 1.032), (3.043, 10.73)),
    1: (0.03821, 0.09433, (1.752, 2.814), (1.075, 1.005), (1.299, 2.631)),
    10: (0.27000, 0.20448, (2.344, 12.81), (1.008, 1.000), (1.011, 1.214)),
}


@pytest.mark.parametrize("ratio", TABLE)
def test_the_table_of_the_gaussian_model_is_reproduced_to_three_digits(ratio, tmp_path):
    bayes_global, bayes_local, fedavg, as_described, local = TABLE[ratio]
    # Ten times the examples at ten times the noise: the same variances, and sizes that are closer
    # to the geometric ones after rounding to whole examples.
    data = (
        "data.num_clients=10",
        "data.num_examples=[100, 10000]",
        "data.noise_var=100",
        f"data.inter_ratio={ratio}",
    )
    expected = {
        "fedavg": (("method=fedavg",), fedavg),
        "exact": (selffl("exact"), (1.0, 1.0)),
        "as_described": (selffl("as_described"), as_described),
        "local": (("method=local",), local),
    }
    for name, (settings, (global_ratio, local_ratio)) in expected.items():
        final = run(tmp_path / name, *data, *settings).summary["final"]
        assert final["test/global_mse"] / bayes_global == pytest.approx(global_ratio, rel=1.5e-3)
        assert final["test/local_mse"] / bayes_local == pytest.approx(local_ratio, rel=1.5e-3)


VARIANCES = (0.5, 2.0, 0.1, 1.0, 4.0)
FIVE = (
    "data.num_clients=5",
    "data.num_examples=[40, 10, 5, 20, 30]",
    f"data.intra_var={list(VARIANCES)}",
    "data.inter_var=0.7",
)
RULES = {
    ("precision", "loo"): selffl("as_described"),
    ("precision", "global"): selffl("as_described", "method.init=global"),
    ("uniform", "global"): selffl("exact"),
    ("uniform", "loo"): selffl("exact", "method.init=loo"),
    ("deshrunk", "loo"): selffl("as_described", "method.aggregation=deshrunk"),
    ("deshrunk", "global"): selffl(
        "as_described", "method.aggregation=deshrunk", "method.init=global"
    ),
    ("common_tap", "loo"): selffl("two_tap"),
    ("common_tap", "global"): selffl("two_tap", "method.init=global"),
    ("fedavg", "global"): ("method=fedavg",),
}


@pytest.mark.parametrize(("rule", "initial"), RULES)
def test_the_real_system_reaches_the_fixed_point_of_every_rule(rule, initial, tmp_path):
    result = run(tmp_path, *FIVE, *RULES[rule, initial], rounds=400)
    reached = load_file(result.folder / "models" / "global.safetensors")["output.weight"][0]
    # Ten steps at rate 0.3 on curvature 1 retain 0.7 ** 10 of the start.
    weights = hierarchy.fixed_point_weights(
        0.7, VARIANCES, rule, initial, retained=0.7**10, num_examples_M=[40, 10, 5, 20, 30]
    )
    np.testing.assert_allclose(reached.numpy(), weights, atol=1e-8)


def test_exact_uploads_the_posterior_means_and_its_global_model_is_the_posterior_in_float32(
    tmp_path,
):
    """Drawn optima, float32: uploads are equation (3) and the global model equation (1)."""
    settings = (
        "data={name: gaussian, num_clients: 6, dimension: 8, num_examples: [10, 60], "
        "noise_var: 20, inter_var: 0.6, optima: drawn}",
        "model.dtype=float32",
        "training.batch_size=64",
    )
    result = run(tmp_path, *settings, *selffl("exact"), rounds=200)
    config = load_config(result.folder / "config.yaml")
    sizes = np.asarray([len(c) for c in _examples(config)])
    optima = np.stack([c.mean(axis=0) for c in _examples(config)])
    intra = (
        20
        / np.round(np.geomspace(10, 60, 6))
        * np.round(np.geomspace(10, 60, 6))
        / (np.geomspace(10, 60, 6))
    )
    assert sizes.tolist() == np.round(np.geomspace(10, 60, 6)).tolist()
    personal, _ = hierarchy.personal_posterior(optima, 0.6, intra)
    shared, _ = hierarchy.global_posterior(optima, 0.6, intra)
    reached = load_file(result.folder / "models" / "global.safetensors")["output.weight"][0]
    np.testing.assert_allclose(reached.numpy(), shared, atol=1e-6)
    for client, mean in enumerate(personal):
        file = result.folder / "models" / "clients" / f"client-{client}.safetensors"
        np.testing.assert_allclose(load_file(file)["output.weight"][0].numpy(), mean, atol=1e-6)


def _examples(config):
    from selffl_ray.experiment import prepare_experiment

    prepared = prepare_experiment(config)
    return [prepared.store.read(np.sort(c.train)).y[:, 1, 0] for c in prepared.clients]


@pytest.mark.parametrize("personalization", ["interpolate", "early_stop", "learning_rate"])
def test_every_readout_of_the_common_tap_is_the_leave_one_out_posterior(personalization, tmp_path):
    """From unshrunk uploads and without noise a readout lands on (1 - B) y + B theta_{-m}."""
    result = run(
        tmp_path,
        *FIVE,
        *selffl("two_tap"),
        f"method.personalization={personalization}",
        "method.readout_rate=1.0",
        "method.readout_steps=200",
        # One step at rate 1 on curvature 1 lands on the optimum: uploads are unshrunk.
        "training.learning_rate=0.999999",
        "method.max_contraction=0.9999999",
        rounds=20,
    )
    mean, _ = hierarchy.personal_posterior(np.eye(5), 0.7, VARIANCES)
    for client in range(5):
        file = result.folder / "models" / "clients" / f"client-{client}.safetensors"
        reached = load_file(file)["output.weight"][0].numpy()
        np.testing.assert_allclose(reached, mean[client], atol=2e-6)


@pytest.mark.parametrize(
    ("settings", "unchanged"),
    [
        (selffl("two_tap", "method.init=global", "method.discount=1.0"), True),
        (selffl("exact"), True),
        (selffl("two_tap", "method.init=global", "method.discount=0.0"), False),
    ],
)
def test_kept_uploads_keep_the_fixed_point_under_partial_participation(
    settings, unchanged, tmp_path
):
    settings = (*FIVE, *settings, "training.participation_rate=0.4")
    result = run(tmp_path, *settings, rounds=600)
    reached = load_file(result.folder / "models" / "global.safetensors")["output.weight"][0]
    posterior = hierarchy.precision_weights(0.7, VARIANCES)
    close = torch.allclose(reached, torch.from_numpy(posterior), atol=1e-6)
    assert close == unchanged


def test_a_run_on_drawn_data_has_the_expected_errors_on_average(tmp_path):
    """The identity mode is a shortcut for the mean over draws: here the draws themselves."""
    found = []
    for seed in range(4):
        result = run(
            tmp_path / str(seed),
            f"seed={seed}",
            "data={name: gaussian, num_clients: 10, dimension: 200, num_examples: [10, 1000], "
            "inter_ratio: 1.0, optima: drawn}",
            "training.batch_size=1000",
            "training.learning_rate=0.9",
            "export_models=false",
            *selffl("exact"),
            rounds=12,
        )
        found.append(result.summary["final"])
    local = np.mean([f["test/local_mse"] for f in found])
    shared = np.mean([f["test/global_mse"] for f in found])
    # 10 clients x 200 coordinates x 4 seeds: a relative standard error of about 0.02 and 0.05.
    assert local == pytest.approx(0.09433, rel=0.06)
    assert shared == pytest.approx(0.03821, rel=0.15)
    assert json.loads((tmp_path / "0" / "summary.json").read_text())["status"] == "FINISHED"
