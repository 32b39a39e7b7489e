"""Alarms about uncertainties: raised by the case that each is for, quiet on healthy variances."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from selffl_ray import load_config, run_experiment
from selffl_ray.algorithms.selffl.alarms import (
    MOST_RATIO,
    SMALL_SHARE,
    Probed,
    alarms,
    correlation,
    floor,
    no_information,
    ratio,
)
from selffl_ray.run_loop import Message

SIZES = np.array([20.0, 40.0, 80.0, 160.0, 320.0, 640.0])
NAMES = ["floor", "ratio", "no_information"]


def probed(var_K=None, *, num=SIZES, inter=0.5, smoothed=0.5, pooling="own", **more):
    """One group; by default variances as the theory has them: 10 / n."""
    var = 10 / num if var_K is None else np.asarray(var_K, float)
    one = [np.array([v]) for v in (inter, smoothed, 1000.0)]
    return Probed(num, var[:, None], *one, pooling, **more)


def raised(probe):
    return [name for name, alarm in zip(NAMES, alarms(probe), strict=True) if alarm.text]


def grouped(var_KG, inter_G, smoothed_G, sizes_G):
    arrays = [np.asarray(a, float) for a in (var_KG, inter_G, smoothed_G, sizes_G)]
    return Probed(SIZES, *arrays, "own")


@given(
    st.integers(0, 10**6),
    st.sampled_from(["own", "pooled"]),
    st.floats(0.01, 100.0),
    st.floats(1e-20, 1e6),
)
def test_variances_that_go_with_one_over_n_are_quiet_on_any_scale(seed, pooling, odds, scale):
    # Each a factor of up to 1.5 off, which sizes over a factor of 32 outweigh.
    off = np.exp(np.random.default_rng(seed).uniform(-0.4, 0.4, len(SIZES)))
    var = scale * off / SIZES
    inter = odds * var.mean()
    probe = probed(var, inter=inter, smoothed=odds / (1 + odds), pooling=pooling)
    assert raised(probe) == []


def test_metrics_have_the_names_of_the_docstring():
    names = [alarm.metric for alarm in alarms(probed())]
    assert names == [f"uncertainty/alarm_{name}" for name in NAMES]


@pytest.mark.parametrize(
    "case",
    [
        probed(inter=0.0, smoothed=0.0),
        probed(10 / SIZES * [1, 1, 1, 1, 1, 0], smoothed=0.5),
        probed(10.0 ** np.arange(6)[::-1], inter=1.0),
        probed(inter=1e9),
        probed(SIZES),
        probed(np.full(6, np.nan)),
        probed(np.ones(6)),
    ],
)
def test_a_text_is_one_line_with_a_remedy_in_it(case):
    texts = [alarm.text for alarm in alarms(case) if alarm.text]
    assert texts
    for text in texts:
        assert "\n" not in text
        assert len(text) < 320
        assert "method." in text


# -- floor --------------------------------------------------------------------------------------


def test_no_variance_between_clients_is_a_floor():
    assert raised(probed(inter=0.0, smoothed=0.0)) == ["floor"]
    assert "inter-client variance is estimated as 0" in floor(probed(inter=0.0, smoothed=0.0))


def test_a_single_zero_among_other_estimates_is_chance():
    assert floor(probed(inter=0.0, smoothed=2 * SMALL_SHARE)) is None


def test_a_zero_at_the_untrained_model_is_not_an_alarm():
    assert floor(probed(inter=0.0, smoothed=0.0, first=True)) is None


def test_a_true_variance_of_zero_was_not_estimated():
    assert floor(probed(inter=0.0, smoothed=0.0, known_inter=True)) is None


@pytest.mark.parametrize("var", [0.0, 1e-14])
def test_a_client_that_counts_as_certain_is_a_floor(var):
    certain = 10 / SIZES
    certain[-1] = var
    assert raised(probed(certain)) == ["floor"]
    assert "1 of 6 participants" in floor(probed(certain))
    assert floor(probed(certain, known_intra=True)) is None


def test_a_floor_is_that_of_most_parameters():
    var = np.stack([10 / SIZES, 10 / SIZES], axis=1)
    small = grouped(var, [0.0, 0.5], [0.0, 0.5], [40, 60])
    large = grouped(var, [0.0, 0.5], [0.0, 0.5], [60, 40])
    assert floor(small) is None
    assert floor(large) is not None


# -- ratio --------------------------------------------------------------------------------------


def test_intra_variances_beyond_the_bound_are_an_alarm_where_they_are_used():
    wild = 10 / SIZES
    wild[0] = 1.1 * MOST_RATIO * wild[-1]
    assert raised(probed(wild, inter=1.0)) == ["ratio"]
    assert raised(probed(wild / [1.3, 1, 1, 1, 1, 1], inter=1.0)) == []
    # Pooled variances are those of the sizes, whatever single ones are.
    assert raised(probed(wild, inter=1.0, pooling="pooled")) == []


def test_inter_variance_beyond_the_bound_is_an_alarm():
    mean = (10 / SIZES).mean()
    assert raised(probed(inter=1.01 * MOST_RATIO * mean)) == ["ratio"]
    assert raised(probed(inter=0.99 * MOST_RATIO * mean)) == []


def test_granularities_are_judged_by_their_mean_over_parameters():
    # In one of a thousand parameters everything explodes: nothing that would be felt.
    var = np.stack([10 / SIZES, [1e3, 1, 1, 1, 1, 1e-3]], axis=1)
    assert ratio(grouped(var, [0.5, 1e4], [0.5, 1.0], [999, 1])) is None
    assert ratio(grouped(var, [0.5, 1e4], [0.5, 1.0], [1, 999])) is not None


# -- no information -----------------------------------------------------------------------------


def test_larger_variances_of_larger_clients_are_no_information():
    # Variance over rounds, where small clients fit their data perfectly.
    text = no_information(probed(SIZES**0.5))
    assert "correlation of log variance with log 1/n -1.00, 6 clients" in text
    assert raised(probed(SIZES**0.5)) == ["no_information"]
    assert no_information(probed(SIZES**0.5, known_intra=True)) is None


def test_sizes_that_are_nearly_equal_or_few_tell_nothing():
    near = np.array([20.0, 22, 24, 26, 30, 39])
    assert no_information(probed(near, num=near)) is None
    four = SIZES[:4]
    assert no_information(probed(four, num=four)) is None
    assert no_information(probed(SIZES[:5], num=SIZES[:5])) is not None


def test_a_negative_correlation_by_chance_is_rare():
    rng = np.random.default_rng(0)
    # Variances that ignore the sizes altogether: the level of the test, by construction.
    found = [
        no_information(probed(np.exp(rng.standard_normal(6)))) is not None for _ in range(2000)
    ]
    assert 0.03 < np.mean(found) < 0.07


@pytest.mark.parametrize("var", [np.ones(6), 1 + 0.01 / SIZES])
def test_equal_variances_of_unequal_clients_are_no_information(var):
    assert "20 to 640 training examples" in no_information(probed(var))


def test_equal_variances_of_equal_clients_are_right():
    equal = np.full(6, 30.0)
    assert raised(probed(np.ones(6), num=equal)) == []


@pytest.mark.parametrize(("known", "expected"), [(0, True), (1, True), (2, False)])
def test_two_known_variances_are_needed(known, expected):
    var = np.where(np.arange(6) < known, 10 / SIZES, np.nan)
    assert raised(probed(var)) == (["no_information"] if expected else [])
    if expected:
        assert "fewer than 2 of 6 participants" in no_information(probed(var))


# -- in a run -----------------------------------------------------------------------------------

UNEQUAL = "data.partition.sizes={min: 20, max: 110}"


def run(tmp_path, *settings):
    said = []
    config = load_config(
        None, ["placement.backend=local", "tracking.enabled=false", UNEQUAL, *settings]
    )
    result = run_experiment(
        config,
        output=tmp_path / "run",
        watch=lambda e: said.append(e.text) if isinstance(e, Message) else None,
    )
    return result, [text for text in said if "alarm" in text]


def test_the_default_is_quiet_and_has_the_metrics_of_its_probes(tmp_path):
    result, said = run(tmp_path, "training.num_rounds=12")
    assert said == []
    columns = [f"uncertainty/alarm_{name}" for name in NAMES]
    probes = result.rounds["round_index"] % 5 == 0
    assert (result.rounds.loc[probes, columns] == 0).all(axis=None)
    assert result.rounds.loc[~probes, columns].isna().all(axis=None)


def test_an_alarm_is_a_metric_in_every_round_and_a_warning_once(tmp_path):
    # Variance within a round is optimisation noise: small clients look certain on every probe.
    result, said = run(
        tmp_path, "method.intra=trajectory", "method.probe_every=2", "training.num_rounds=6"
    )
    alarm = result.rounds["uncertainty/alarm_no_information"]
    assert alarm[::2].tolist() == [1, 1, 1]
    assert len(said) == 1
    assert said[0].startswith(
        "selffl-two_tap seed 0, round 0, uncertainty/alarm_no_information: clients with fewer"
    )


def test_warm_up_rounds_have_no_alarms_and_variance_over_rounds_has_one(tmp_path):
    result, said = run(
        tmp_path, "method.name=selffl", "method.preset=as_described", "training.num_rounds=9"
    )
    alarm = result.rounds["uncertainty/alarm_no_information"]
    assert alarm[:3].isna().all()
    assert not alarm[3:].isna().any()
    assert alarm.sum() >= 3
    assert len(said) == 1


@given(st.integers(5, 60), st.floats(-3, 3), st.integers(0, 2**32 - 1))
def test_the_correlation_is_tested_as_scipy_does(count, slope, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=count)
    y = slope * x + rng.normal(size=count)
    wanted = stats.pearsonr(x, y, alternative="less")
    found = correlation(x, y)
    assert found.r == pytest.approx(wanted.statistic, abs=1e-12)
    assert found.p_less == pytest.approx(wanted.pvalue, rel=1e-6, abs=1e-14)


@pytest.mark.parametrize(("sign", "p_less"), [(1, 1.0), (-1, 0.0)])
def test_a_perfect_correlation_has_no_doubt(sign, p_less):
    x = np.log(SIZES)
    found = correlation(x, sign * x)
    assert found.r == pytest.approx(sign)
    assert found.p_less == pytest.approx(p_less, abs=1e-12)


def test_methods_without_uncertainties_have_no_alarms(tmp_path):
    result, _ = run(tmp_path, "method=fedavg", "training.num_rounds=1")
    assert not pd.Index(result.rounds.columns).str.contains("alarm").any()
