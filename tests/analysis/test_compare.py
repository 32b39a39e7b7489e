"""The comparison against cases computed by hand: differences, signs, Holm, losses that show."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.compare.__main__ import build_parser, gather, main, report
from analysis.compare.bootstrap import (
    ClientPair,
    bootstrap_means,
    percentile_interval,
    weighted_mean,
    worst_tenth,
)
from analysis.compare.forest import forests
from analysis.compare.paired import (
    GLOBAL,
    LOCAL,
    OUTCOMES,
    Compared,
    adjusted,
    compare_scenes,
    pool,
)
from analysis.compare.scenes import read_study
from analysis.compare.verdict import TITLES, verdict
from analysis.report.naming import Variant, marks
from analysis.report.store import Store
from selffl_ray import load_config, run_experiment
from tests.analysis.made_runs import Made, MadeStore

# See tests/test_tracking.py: MLflow declares its tables with an option that SQLAlchemy will drop.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy is deprecated:sqlalchemy.exc.SADeprecationWarning"
)

T_975_DF2 = 4.302653
T_975_DF5 = 2.570582
"""Quantiles of Student's t, from a printed table."""

OWN = np.asarray([0.80, 0.84, 0.88, 0.92])
"""Clients of the reference; mean 0.86, plus 0.01 a seed."""
TWO = "selffl-two_tap"


def fill_study(store: MadeStore) -> None:
    """A scene with a win, a tie, a loss and a level baseline, and a second scene by participation.

    Reference minus fedavg: 0.10, 0.101, 0.099 on every client; minus ditto: 0.01, 0.02, 0.00;
    minus fedrep: -0.02 on every client; same: the reference itself.
    """
    for seed in range(3):
        own = OWN + 0.01 * seed
        far, near = (0.10, 0.101, 0.099)[seed], (0.01, 0.02, 0.00)[seed]

        def add(experiment: str, label: str, local: np.ndarray, **more: object) -> None:
            made = Made(label=label, seed=seed, local=local.tolist(), **more)  # noqa: B023
            store.add(experiment, made)

        add("study", TWO, own, global_=0.80, steps=300)
        add("study", "fedavg", own - far, global_=0.82)
        add("study", "ditto", own - near, global_=0.80)
        add("study", "fedrep", own + 0.02, global_=None)
        add("study", "same", own, global_=0.80)
        few = {"training.participation_rate": "0.3"}
        add("few", TWO, own, params=few)
        add("few", "fedavg", own - 0.04, params=few)
        add("few", "fedrep", own - 0.04, params=few)
        errors = {"score": "mse", "global_": 1.0, "data": "data-2"}
        tags = {"dataset": "lines"}
        add("errors", TWO, 1 - own, tags=tags, **errors)
        add("errors", "fedavg", 1 - own + 0.1, tags=tags, **errors)
        add("errors", "fedrep", 1 - own - 0.1, tags=tags, **errors)


def fill_sweep(store: MadeStore) -> None:
    """A sweep whose first stage has no test data, and what it confirmed; two options of one."""
    parent = store.add_parent("sweep", "the-sweep")
    for seed in range(2):
        for mu in ("0.1", "1"):
            tags = {"mlflow.parentRunId": parent, "stage": "select", "configuration": f"mu={mu}"}
            made = Made(label="fedprox", seed=seed, local=[0.99] * 4, splits=("val",), tags=tags)
            store.add("sweep", made)
    for seed in (10, 11):
        common = {"mlflow.parentRunId": parent, "stage": "confirm"}
        for mu, level in (("0.1", 0.8), ("1", 0.7)):
            made = Made(
                label="fedprox",
                seed=seed,
                local=[level] * 4,
                params={"method.mu": mu},
                tags=common | {"configuration": f"mu={mu}"},
            )
            store.add("sweep", made)
        tags = common | {"configuration": "preset=two_tap"}
        store.add("sweep", Made(label=TWO, seed=seed, local=[0.9] * 4, tags=tags))


def fill_others(store: MadeStore) -> None:
    """New clients and sizes; drawn clients; one seed; mistakes."""
    drawn = {"data.partition.name": "dirichlet"}
    for seed in range(2):
        local = (0.9 + 0.1 * seed, 0.5)
        new = [0.7, 0.9]
        made = Made(label=TWO, seed=seed, local=local, sizes=(10, 30), new=new, params=drawn)
        store.add("sizes", made)
        base = Made(
            label="fedavg",
            seed=seed,
            local=(0.8, 0.6),
            sizes=(10, 30),
            new=[0.8, 0.8],
            params=drawn,
        )
        store.add("sizes", base)
    for label, seed in ((TWO, 0), ("fedavg", 0)):
        level = 0.9 if label == TWO else 0.95
        store.add("single", Made(label=label, seed=seed, local=[level] * 4, artifacts=False))
    store.add("apart", Made(label=TWO, seed=0, local=[0.9] * 4))
    store.add("apart", Made(label="fedavg", seed=1, local=[0.9] * 4))
    store.add("alone", Made(label=TWO, seed=0, local=[0.9] * 4))
    store.add("none", Made(label="fedavg", seed=0, local=[0.9] * 4))
    parent = store.add_parent("sealed", "sealed-sweep")
    tags = {"mlflow.parentRunId": parent, "stage": "select"}
    store.add("sealed", Made(label=TWO, seed=0, local=[0.9] * 4, splits=("val",), tags=tags))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    made = MadeStore(folder=tmp_path_factory.mktemp("store"))
    fill_study(made)
    fill_sweep(made)
    fill_others(made)
    return made.uri


Run = Callable[..., tuple[list[Compared], list[Compared], str]]


@pytest.fixture(scope="module")
def run(store) -> Run:
    """Compares experiments once: comparisons, pooled ones, the Markdown."""
    made: dict[tuple[str, ...], tuple[list[Compared], list[Compared], str]] = {}

    def compare(*experiments: str, references: tuple[str, ...] = ()):
        key = (*experiments, "--", *references)
        if key not in made:
            words = [word for name in experiments for word in ("--experiment", name)]
            words += [word for label in references for word in ("--reference", label)]
            found = gather(build_parser().parse_args([*words, "--store", store]))
            made[key] = found.compared, found.pooled, report(found)
        return made[key]

    return compare


def one(compared: list[Compared], baseline: str, outcome: str = "local") -> Compared:
    found = [c for c in compared if (c.baseline, c.outcome.name) == (baseline, outcome)]
    assert len(found) == 1
    return found[0]


# -- one comparison -------------------------------------------------------------------------------


def test_a_paired_difference_is_the_reference_minus_the_baseline_with_the_interval_by_hand(run):
    found = one(run("study")[0], "ditto")
    # 0.01, 0.02, 0.00: mean 0.01, standard deviation 0.01.
    assert found.interval.mean == pytest.approx(0.01)
    assert found.interval.half == pytest.approx(T_975_DF2 * 0.01 / math.sqrt(3), rel=1e-6)
    assert found.standing == "level"
    assert one(run("study")[0], "fedavg").standing == "ahead"
    assert one(run("study")[0], "fedrep").standing == "behind"


def test_the_bootstrap_of_clients_that_agree_is_that_of_seeds(run):
    """All clients of a seed differ by the same: with 3 seeds the extremes have 1/27 each."""
    low, high = one(run("study")[0], "ditto").bootstrap
    assert (low, high) == pytest.approx((0.00, 0.02))


def test_global_models_are_compared_and_a_method_without_one_is_not(run):
    compared, _, text = run("study")
    found = one(compared, "fedavg", "global")
    assert found.interval.mean == pytest.approx(-0.02)
    assert found.standing == "behind"
    missing = one(compared, "fedrep", "global")
    assert (missing.standing, missing.interval) == ("missing", None)
    assert "not compared with, toys: fedrep (the method has no global model)" in text


def test_the_worst_tenth_has_its_own_difference_and_bootstrap(run):
    found = one(run("study")[0], "fedrep", "worst tenth")
    assert found.interval.mean == pytest.approx(-0.02)
    # Every client differs by the same, so does the worst of any resample.
    assert found.bootstrap == pytest.approx((-0.02, -0.02))
    assert found.each is None


def test_errors_keep_their_sign_and_lower_is_ahead(run):
    compared, _, text = run("errors")
    for baseline, mean, standing, effect, shares in (
        ("fedavg", -0.1, "ahead", 1.0, (1.0, 0.0, 0.0)),
        ("fedrep", 0.1, "behind", -1.0, (0.0, 0.0, 1.0)),
    ):
        found = one(compared, baseline)
        assert found.interval.mean == pytest.approx(mean)
        assert found.standing == standing
        assert found.ranks.effect == effect
        assert found.shares == shares
        # The worst client has the largest error; 1 - 0.80 is the reference's.
        assert one(compared, baseline, "worst tenth").standing == standing
    assert "a negative difference is in favour of the reference" in text
    assert re.search(
        r"ahead of, lines: fedavg \N{MINUS SIGN}0\.1\d* .* mse, negative is better", text
    )


def test_ties_count_as_neither_helped_nor_harmed(run):
    found = one(run("study")[0], "same")
    assert found.shares == (0.0, 1.0, 0.0)
    assert found.ranks is None
    assert found.holm_p is None
    assert (found.interval.mean, found.interval.half) == (0.0, 0.0)
    assert found.standing == "level"


def test_holm_corrects_over_the_baselines_that_were_tested(run):
    """Four clients that agree: p = 2 / 2^4 each; three tests, so three times that, all alike."""
    compared, _, _ = run("study")
    for baseline in ("fedavg", "ditto", "fedrep"):
        found = one(compared, baseline)
        assert found.ranks.p_value == pytest.approx(2 / 16)
        assert found.holm_p == pytest.approx(3 * 2 / 16)


def test_holm_steps_down_over_baselines():
    """n clients that agree give p = 2^(1 - n): 1/16 * 3, 1/8 * 2 raised to none, 1/4 * 1."""

    def made(baseline: str, num: int) -> Compared:
        each = np.linspace(0.1, 0.2, num)
        return Compared(
            "s", "r", baseline, LOCAL, "accuracy", 1, 100.0, 1, (0.1, 0.2), None, each
        )  # fmt: skip

    found = adjusted([made("a", 3), made("b", 5), made("c", 4)])
    assert [own.holm_p for own in found] == pytest.approx([1 / 4, 3 / 16, 1 / 4])


def test_a_baseline_without_a_run_in_common_is_missing_with_a_reason(run, store, tmp_path):
    made = MadeStore(store=store, folder=tmp_path)
    for seed in (0, 1):
        made.add("partly", Made(label=TWO, seed=seed, local=[0.9] * 4))
        made.add("partly", Made(label="fedavg", seed=seed, local=[0.8] * 4))
        made.add("partly", Made(label="apfl", seed=seed + 5, local=[0.8] * 4))
    compared, _, text = run("partly")
    assert one(compared, "apfl").standing == "missing"
    assert "not compared with, toys: apfl (no common seed on the same data and partition)" in text


# -- clients --------------------------------------------------------------------------------------


def test_differences_are_weighted_by_examples_and_drawn_clients_count_once_a_seed(run):
    """Seed 0: (0.1 * 10 - 0.1 * 30) / 40 = -0.05; seed 1: (0.2 * 10 - 0.1 * 30) / 40 = -0.025."""
    found = one(run("sizes")[0], "fedavg")
    assert found.differences == pytest.approx((-0.05, -0.025))
    assert found.draws.mean() == pytest.approx(_expected_bootstrap(), abs=0.004)
    np.testing.assert_allclose(sorted(found.each), [-0.1, -0.1, 0.1, 0.2], atol=1e-12)
    assert found.shares == (0.5, 0.0, 0.5)


def _expected_bootstrap() -> float:
    """Two clients drawn from two: both the first, one each (twice as likely), both the second."""
    seeds = [(0.1, -0.1), (0.2, -0.1)]
    return float(np.mean([(a + 2 * (10 * a + 30 * b) / 40 + b) / 4 for a, b in seeds]))


def test_new_clients_are_compared_where_they_are(run):
    compared, _, text = run("sizes")
    found = one(compared, "fedavg", "new clients")
    assert found.interval.mean == pytest.approx(0.0)
    np.testing.assert_allclose(sorted(found.each), [-0.1, -0.1, 0.1, 0.1], atol=1e-12)
    assert "Local accuracy of new clients: behind in 0, level in 1" in text
    assert not [c for c in run("study")[0] if c.outcome.name == "new clients"]


def test_more_clients_harmed_than_helped_is_said_although_the_mean_is_ahead(store, run, tmp_path):
    made = MadeStore(store=store, folder=tmp_path)
    for seed in range(3):
        made.add("harm", Made(label=TWO, seed=seed, local=[0.99, 0.79, 0.79, 0.79]))
        made.add("harm", Made(label="fedavg", seed=seed, local=[0.40, 0.80, 0.80, 0.80]))
    compared, _, text = run("harm")
    assert one(compared, "fedavg").standing == "ahead"
    said = "MORE CLIENTS HARMED THAN HELPED, toys, against: fedavg (75 % harmed, 25 % helped)."
    assert said in text


def test_the_mean_of_models_that_never_met_is_shown_but_neither_counted_nor_pooled(
    store, run, tmp_path
):
    made = MadeStore(store=store, folder=tmp_path)
    for part in ("0.5", "1.0"):
        for seed in (0, 1):
            common = {"seed": seed, "params": {"training.participation_rate": part}}
            made.add("alone-too", Made(label=TWO, local=[0.9] * 4, global_=0.8, **common))
            made.add("alone-too", Made(label="local", local=[0.8] * 4, global_=0.2, **common))
            made.add("alone-too", Made(label="fedavg", local=[0.8] * 4, global_=0.7, **common))
    compared, pooled, text = run("alone-too")
    assert {o.baseline for o in compared if o.outcome is GLOBAL} == {"local", "fedavg"}
    assert {o.baseline for o in pooled if o.outcome is GLOBAL} == {"fedavg"}
    assert {o.baseline for o in pooled if o.outcome is LOCAL} == {"local", "fedavg"}
    # Two scenes of local and worst tenth against two baselines, global against one.
    assert "behind in none of 10 comparisons" in text
    assert "Global accuracy: behind in 0, level in 0, ahead in 2 of 2" in text
    assert "+60.0 (+60.0 to +60.0) [+60.0 to +60.0] \N{DAGGER}" in text
    assert "\N{DAGGER}: shown for comparison only" in text
    unused = [o for o in compared if not o.counted]
    assert {(o.baseline, o.outcome, o.holm_p) for o in unused} == {("local", GLOBAL, None)}
    for picture in forests(compared, pooled):
        assert max(picture.figure.axes[1].get_xlim()) < 60


def test_errors_of_a_global_model_have_no_numbers_of_clients(run):
    """Its metric is judged by another truth than its clients' rows are."""
    compared, _, text = run("errors")
    for baseline in ("fedavg", "fedrep"):
        found = one(compared, baseline, "global")
        assert found.interval is not None
        assert (found.draws, found.bootstrap, found.each, found.ranks) == (None,) * 4
        assert found.holm_p is None
        assert one(compared, baseline).draws is not None
    assert "without a bootstrap interval, the clients' errors are judged by each client's" in text


# -- the bootstrap --------------------------------------------------------------------------------


def pair(own: list[float], other: list[float], weights: list[float] | None = None) -> ClientPair:
    return ClientPair(*(np.asarray(x, float) for x in (own, other, weights or [1.0] * len(own))))


@given(st.floats(-1, 1), st.integers(1, 3), st.integers(1, 30))
def test_the_bootstrap_of_a_constant_difference_is_that_constant(constant, seeds, clients):
    other = np.linspace(0, 1, clients)
    one_seed = ClientPair(other + constant, other, np.arange(1.0, clients + 1))
    draws = bootstrap_means([one_seed] * seeds, weighted_mean, 0)
    np.testing.assert_allclose(draws, constant, atol=1e-12)


def test_the_bootstrap_resamples_clients_within_a_seed():
    """200 clients of variance 1 in two seeds: standard error 1 / sqrt(200)."""
    signs = [-1.0, 1.0] * 50
    draws = bootstrap_means([pair(signs, [0.0] * 100)] * 2, weighted_mean, 0)
    assert draws.std() == pytest.approx(1 / math.sqrt(200), rel=0.05)


def test_the_same_clients_are_drawn_for_both_methods():
    """What differs between clients but not between methods adds nothing."""
    easy = np.linspace(0, 100, 50)
    draws = bootstrap_means([pair(list(easy + 1), list(easy))] * 3, weighted_mean, 0)
    np.testing.assert_allclose(draws, 1.0)


def test_scenes_have_streams_of_their_own():
    seeds = [pair([-1.0, 1.0] * 50, [0.0] * 100)] * 2
    first, second = (bootstrap_means(seeds, weighted_mean, scene) for scene in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1
    np.testing.assert_array_equal(first, bootstrap_means(seeds, weighted_mean, 0))


@pytest.mark.parametrize(("better", "expected"), [(1, 1.5), (-1, 19.5)])
def test_the_worst_tenth_is_the_mean_of_the_worst_two_of_twenty(better, expected):
    scores = np.arange(1.0, 21.0)[None]
    assert worst_tenth(better)(scores, np.ones_like(scores)) == pytest.approx([expected])


def test_many_clients_are_resampled_in_pieces_with_the_same_spread():
    """5000 clients exceed what is drawn at once."""
    signs = [-1.0, 1.0] * 2500
    low, high = percentile_interval(bootstrap_means([pair(signs, [0.0] * 5000)], weighted_mean, 0))
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(5000), rel=0.1)


# -- scenes and pooling ---------------------------------------------------------------------------


def test_participation_makes_scenes_and_differences_are_pooled_over_them(run):
    compared, pooled, text = run("study", "few")
    scenes = {own.scene for own in compared}
    assert scenes == {"toys (participation_rate=unset)", "toys (participation_rate=0.3)"}
    found = one(pooled, "fedrep")
    # Three differences of -0.02, three of 0.04: mean 0.01, squared deviations 6 * 0.03^2 over 5.
    assert found.interval.mean == pytest.approx(0.01)
    half = T_975_DF5 * math.sqrt(6 * 0.03**2 / 5) / math.sqrt(6)
    assert found.interval.half == pytest.approx(half, rel=1e-6)
    assert (found.num_scenes, len(found.differences)) == (2, 6)
    # Neither seeds nor clients differ within a scene, so nothing is left to resample.
    assert found.bootstrap == pytest.approx((0.01, 0.01))
    assert "6 in 2 scenes" in text
    # Two baselines in both scenes; eight clients, -0.02 four times and 0.04 four times.
    assert found.holm_p == pytest.approx(min(1.0, found.ranks.p_value))
    assert found.shares == (0.5, 0.0, 0.5)
    assert {own.baseline for own in pooled} == {"fedavg", "fedrep"}


def test_accuracies_and_errors_are_not_pooled(run):
    assert pool([*run("study")[0], *run("errors")[0]]) == []


def test_a_scene_with_more_seeds_weighs_more_in_mean_and_bootstrap_alike():
    def part(scene: str, differences: tuple[float, ...]) -> Compared:
        draws = np.full(10, np.mean(differences))
        return Compared(
            scene, "r", "b", LOCAL, "accuracy", 1, 100.0, 1, differences, draws, np.zeros(2)
        )  # fmt: skip

    (found,) = pool([part("a", (0.1, 0.1, 0.1)), part("b", (0.5,))])
    assert found.interval.mean == pytest.approx(0.2)
    np.testing.assert_allclose(found.draws, 0.2)


def test_options_that_differ_between_pooled_scenes_are_said(store, run, tmp_path):
    made = MadeStore(store=store, folder=tmp_path)
    for rate, mu in (("0.5", "0.1"), ("1.0", "1")):
        for seed in (0, 1):
            scene = {"training.participation_rate": rate}
            made.add("tuned", Made(label=TWO, seed=seed, local=[0.9] * 4, params=scene))
            own = scene | {"method.mu": mu}
            made.add("tuned", Made(label="fedprox", seed=seed, local=[0.8] * 4, params=own))
    text = run("tuned")[2]
    said = re.findall(r"Pooled with options that differ between scenes \((.*)\): (.*)\.", text)
    assert len(said) == 1
    assert (set(said[0][0].split(" | ")), said[0][1]) == ({"mu=0.1", "mu=1"}, "fedprox")


SERVERS = ("mean", "fedavgm", "fedadam")


def add_servers(made: MadeStore, experiment: str, *, tagged: bool) -> None:
    """Two scenes, each with a rate of its own: FedAvg with three servers in one, alone in one.

    FedAvg is 0.1 below Self-FL in the first scene and 0.3 in the second.
    """
    for part, rate in (("0.5", "0.1"), ("1.0", "0.6")):
        for seed in (0, 1):
            scene = {"training.participation_rate": part}
            own = Made(label=TWO, seed=seed, local=[0.9] * 4, params=scene)
            made.add(experiment, own)
            for at, server in enumerate(SERVERS if part == "0.5" else SERVERS[:1]):
                params = scene | {"method.server.name": server, "training.learning_rate": rate}
                if server != "mean":
                    params |= {"method.server.learning_rate": "0.01", "method.server.floor": "1"}
                named = "fedavg" if server == "mean" else str({"name": "fedavg", "server": server})
                local = [(0.8 if part == "0.5" else 0.6) - 0.01 * at] * 4
                tags = {"space.method": named} if tagged else {}
                own = Made(label="fedavg", seed=seed, local=local, params=params, tags=tags)
                made.add(experiment, own)


@pytest.mark.parametrize("tagged", [True, False], ids=["sweep", "by hand"])
def test_a_method_beside_its_variants_keeps_its_name_and_is_pooled_over_all_scenes(
    tagged, store, run, tmp_path
):
    add_servers(MadeStore(store=store, folder=tmp_path), f"servers-{tagged}", tagged=tagged)
    compared, pooled, text = run(f"servers-{tagged}")
    first = {own.baseline for own in compared if "0.5" in own.scene}
    assert first == {"fedavg", "fedavg server=fedavgm", "fedavg server=fedadam"}
    found = one(pooled, "fedavg")
    assert (found.num_scenes, found.interval.mean) == (2, pytest.approx(0.2))
    assert {own.baseline for own in pooled} == {"fedavg"}
    said = re.findall(r"Not in all 2 scenes with accuracy, .*: (.*)\.", text)
    assert set(said[0].split(", ")) == {"fedavg server=fedavgm (1)", "fedavg server=fedadam (1)"}
    assert "Pooled with options that differ between scenes" in text


def test_what_a_sweep_takes_for_two_methods_is_not_pooled_though_each_is_alone(
    store, run, tmp_path
):
    made = MadeStore(store=store, folder=tmp_path)
    for part, steps in (("0.5", "1"), ("1.0", "20")):
        named = "perfedavg" if steps == "1" else str({"name": "perfedavg", "adapt_steps": 20})
        for seed in (0, 1):
            scene = {"training.participation_rate": part}
            made.add("alike", Made(label=TWO, seed=seed, local=[0.9] * 4, params=scene))
            params = scene | {"method.adapt_steps": steps, "method.inner_rate": part}
            tags = {"space.method": named}
            own = Made(label="perfedavg", seed=seed, local=[0.8] * 4, params=params, tags=tags)
            made.add("alike", own)
    compared, pooled, text = run("alike")
    assert {own.baseline for own in compared} == {"perfedavg", "perfedavg adapt_steps=20"}
    assert pooled == []
    assert "perfedavg (1)" in text


def variants(*rows: dict[str, str]) -> list[Variant]:
    return [Variant(row, None) for row in rows]


def test_a_label_names_the_fewest_options_and_those_of_the_method_first():
    """Two of three options that differ suffice; each of mu and rate alone tells the last two."""
    both = {"method.mu": "1", "training.learning_rate": "2", "method.kind": "a"}
    other = {"method.mu": "3", "training.learning_rate": "4", "method.kind": "a"}
    assert marks([variants(both, other)], {}) == [["mu=1", "mu=3"]]
    third = other | {"method.kind": "b"}
    assert marks([variants(both, other, third)], {}) == [
        ["kind=a mu=1", "kind=a mu=3", "kind=b mu=3"]
    ]


def test_a_default_is_left_out_unless_two_rows_would_then_be_called_alike():
    rows = variants({"method.kind": "a"}, {"method.kind": "b"})
    assert marks([rows], {"method.kind": "a"}) == [["", "kind=b"]]
    rows = variants({"method.mu": "1"}, {"method.mu": "2"})
    assert marks([rows], {"method.mu": "1"}) == [["mu=1", "mu=2"]]


# -- which runs count -----------------------------------------------------------------------------


def test_the_selecting_stage_is_left_out_with_its_count_and_variants_stay_apart(run):
    compared, _, text = run("sweep")
    assert "4 runs of a sweep's stage that selects, whose test data are sealed" in text
    assert one(compared, "fedprox mu=0.1").interval.mean == pytest.approx(0.1)
    assert one(compared, "fedprox mu=1").interval.mean == pytest.approx(0.2)
    assert "never averaged: fedprox mu=0.1, fedprox mu=1" in text
    assert "99.0" not in text


def test_what_a_sweep_varied_beside_the_options_of_a_row_is_not_pooled(store, run, tmp_path):
    made = MadeStore(store=store, folder=tmp_path)
    parent = made.add_parent("faulty", "faulty-sweep")
    for seed in (0, 1):
        for retries, level in (("0", 0.7), ("2", 0.8)):
            tags = {"mlflow.parentRunId": parent, "configuration": f"max_retries={retries}"}
            params = {"faults.max_retries": retries}
            for label, more in ((TWO, 0.1), ("fedavg", 0.0)):
                local = [level + more] * 4
                own = Made(label=label, seed=seed, local=local, tags=tags, params=params)
                made.add("faulty", own)
    compared, _, text = run("faulty")
    assert {own.baseline for own in compared} == {
        "fedavg (max_retries=0)",
        "fedavg (max_retries=2)",
    }
    assert "with a newer one of the same row" not in text


def test_failed_runs_are_named_with_their_seeds_and_in_the_first_sentences(store, run, tmp_path):
    made = MadeStore(store=store, folder=tmp_path)
    adam = {"space.method": str({"name": "fedavg", "server": "fedadam"})}
    for seed in range(4):
        made.add("broken", Made(label=TWO, seed=seed, local=[0.9] * 4))
        made.add("broken", Made(label="fedavg", seed=seed, local=[0.8] * 4))
    for seed in (2, 3):
        broken = Made(
            label="fedavg",
            seed=seed,
            local=[0.8] * 4,
            status="FAILED",
            tags=adam,
            params={"method.server.name": "fedadam"},
        )
        made.add("broken", broken)
    made.add("broken", Made(label=TWO, seed=0, local=[0.9] * 4, status="FAILED"))
    made.add("broken", Made(label="selffl-exact", seed=0, local=[0.9] * 4))
    made.add("broken", Made(label="selffl-exact", seed=1, local=[0.9] * 4, status="FAILED"))
    text = run("broken")[2]
    failed = f"fedavg server=fedadam seeds 2, 3; selffl-exact seed 1; {TWO} seed 0"
    assert f"broken: 4 runs failed ({failed})" in text
    # The reference's own was run again and finished; that of another reference is not beside it.
    first = text.split(f"### Where {TWO} stands")[1].strip().splitlines()[0]
    assert first.endswith(
        "FAILED RUNS, in none of these numbers: fedavg server=fedadam seeds 2, 3."
    )
    other = text.split("### Where selffl-exact stands")[1].strip().splitlines()[0]
    assert other.endswith("fedavg server=fedadam seeds 2, 3; selffl-exact seed 1.")
    assert "FAILED RUNS" not in run("study")[2]


def test_a_reference_may_be_any_method_and_then_self_fl_is_a_baseline(run):
    compared, _, _ = run("errors", references=("fedrep", "fedavg"))
    assert {own.reference for own in compared} == {"fedrep", "fedavg"}
    assert {own.baseline for own in compared} == {TWO}
    own = next(c for c in compared if (c.reference, c.outcome) == ("fedrep", LOCAL))
    assert own.interval.mean == pytest.approx(-0.1)


def test_a_method_named_without_its_options_means_all_of_its_configurations(run):
    compared, _, _ = run("sweep", references=("fedprox",))
    assert {own.reference for own in compared} == {"fedprox mu=0.1", "fedprox mu=1"}


# -- what is said ---------------------------------------------------------------------------------


def test_a_loss_stands_in_the_first_sentence_and_in_its_list(run):
    text = run("study")[2]
    section = text.split(f"### Where {TWO} stands")[1].split("###")[0]
    first = next(line for line in section.splitlines() if line)
    assert "does not win everywhere" in first
    worst = "fedrep (local accuracy of the worst tenth of the clients)"
    assert f"(toys: fedrep (local accuracy); fedavg (global accuracy); {worst})" in first
    # Behind three times, ahead of fedavg twice (local, worst tenth), level in the others.
    assert "behind in 3 of 11 comparisons" in first
    assert "ahead in 2 and level, not told apart, in 6; in 0 of the level ones" in first
    minus = "\N{MINUS SIGN}"
    assert f"BEHIND, toys: fedrep {minus}2.0 ({minus}2.0 to {minus}2.0) points" in section
    assert section.index("BEHIND, toys: fedrep") < section.index("ahead of, toys: fedavg")
    assert "level (the interval includes 0), toys: same 0.0 (0.0 to 0.0); ditto +1.0" in section


@given(st.lists(st.sampled_from([-0.05, 0.0, 0.05]), min_size=1, max_size=6))
def test_every_comparison_that_is_behind_is_named_whatever_else_is_won(means):
    compared = [
        Compared(
            "s", "r", f"b{at}", OUTCOMES[at % 3], "accuracy", 1, 100.0, 1,
            (mean, mean + 1e-4), None, None,
        )
        for at, mean in enumerate(means)
    ]  # fmt: skip
    first = verdict(compared, [], "r").splitlines()[2]
    for at, own in enumerate(compared):
        assert (own.standing == "behind") == (means[at] < 0)
        named = re.search(rf"\bb{at}\b[^;]*\({re.escape(TITLES[own.outcome.name][:6])}", first)
        assert bool(named) == (own.standing == "behind")


def test_no_win_is_not_called_one(store, run, tmp_path):
    made = MadeStore(store=store, folder=tmp_path)
    for seed in (0, 1):
        for label in (TWO, "fedavg"):
            made.add("equal", Made(label=label, seed=seed, local=[0.9] * 4))
    assert f"{TWO} wins nowhere, and is behind in none of 3 comparisons." in run("equal")[2]


def test_one_seed_gives_no_interval_and_no_verdict(run):
    compared, _, text = run("single")
    assert one(compared, "fedavg").standing == "one pair"
    assert one(compared, "fedavg").bootstrap is None
    assert "no comparison has two pairs of runs; run more seeds" in text
    assert "one seed only, hence no interval and nothing shown, toys: fedavg" in text
    assert "a run without clients.parquet among its artifacts" in text


def test_the_table_of_methods_has_scores_costs_and_budgets(run):
    text = run("study")[2]
    header = next(line for line in text.splitlines() if line.startswith("| method"))
    names = [name.strip() for name in header.strip("|").split("|")]
    assert names == [
        "method", "global (%)", "local (%)", "worst tenth (%)", "rounds", "training steps",
        "personalization steps", "MB up + down",
    ]  # fmt: skip
    row = next(line for line in text.splitlines() if line.startswith(f"| {TWO}"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # Four rounds of 1 MB up and 2 MB down; 40 gradients in the last personalization.
    assert cells[4:] == ["4", "300", "40", "12.0"]
    assert "UNEQUAL BUDGETS: 100 gradient steps of training (fedavg)" in text.replace(
        "(ditto)", "(fedavg)"
    ).replace("(fedrep)", "(fedavg)").replace("(same)", "(fedavg)")
    best = next(line for line in text.splitlines() if line.startswith("| fedrep"))
    assert "**89.0" in best
    assert "**87.0" not in row


def test_a_loss_that_only_the_pooled_scenes_show_is_in_the_first_sentence_too():
    """-0.03, -0.01 in each of two scenes: nothing with 1 degree of freedom, behind with 3."""

    def part(scene: str) -> Compared:
        return Compared(
            scene, "r", "b", LOCAL, "accuracy", 1, 100.0, 1, (-0.03, -0.01), None, None
        )  # fmt: skip

    parts = [part("one"), part("two")]
    first = verdict(parts, pool(parts), "r").splitlines()[2]
    assert "does not win everywhere: it is behind in 0 of 2 comparisons" in first
    assert "(all scenes pooled: b (local accuracy))" in first
    assert "in 2 of the level ones its mean is the worse one" in first


# -- files and mistakes ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory) -> tuple[Path, str]:
    folder, printed = tmp_path_factory.mktemp("whole"), io.StringIO()
    words = ["--experiment", "few", "--experiment", "errors"]
    with contextlib.redirect_stdout(printed):
        assert main([*words, "--store", store, "--output", str(folder)]) == 0
    return folder, printed.getvalue()


def test_what_is_printed_is_what_is_written(whole):
    folder, printed = whole
    assert (folder / "compare.md").read_text() == printed
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert pictures == ["differences-lines.png", "differences-toys.png"]


def test_every_scene_and_all_together_have_a_figure(run):
    compared, pooled, _ = run("study", "few")
    assert sorted(picture.name for picture in forests(compared, pooled)) == [
        "differences-all-scenes",
        "differences-toys-participation-rate-0-3",
        "differences-toys-participation-rate-unset",
    ]


def test_the_csv_files_hold_the_numbers_in_full(whole):
    folder, _ = whole
    methods = pd.read_csv(folder / "methods.csv")
    own = methods[(methods["method"] == TWO) & (methods["metric"] == "test/local_mse")]
    # 1 - 0.86, 0.01 less for each seed.
    assert own["mean"].item() == pytest.approx(0.13)
    differences = pd.read_csv(folder / "differences.csv")
    keys = ["scene", "reference", "baseline", "metric"]
    assert not differences.duplicated(keys).any()
    row = differences.set_index(keys).loc[("lines", TWO, "fedrep", "test/local_mse")]
    assert row["standing"] == "behind"
    assert not row["higher_is_better"]
    assert row["mean"] == pytest.approx(0.1)
    assert row["clients_harmed"] == 1.0


def test_a_forest_marks_favour_by_the_direction_of_the_score(run):
    (picture,) = forests(run("errors")[0], [])
    axes = picture.figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["fedrep", "fedavg"]
    assert axes.get_xlabel().splitlines()[1].startswith("\N{LEFTWARDS ARROW} reference better")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--experiment", "studdy"], "nearest: study"),
        (["--experiment", "few", "--reference", "fedrepp"], "nearest: fedrep"),
        (["--experiment", "none"], "name what to compare by --reference, one of: fedavg"),
        (["--experiment", "alone"], "run baselines too"),
        (["--experiment", "apart"], "run them with the same seeds"),
        (["--experiment", "sealed"], "confirm what a sweep chose on fresh seeds"),
        (["--experiment", "study", "--experiment", "few", "--parent", "x"], "--experiment once"),
    ],
)
def test_a_mistake_is_one_line_with_the_remedy_and_status_two(
    arguments, says, store, tmp_path, capsys
):
    out = tmp_path / "out"
    assert main([*arguments, "--store", store, "--output", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert says in captured.err
    assert not out.exists()


# -- runs of the system itself --------------------------------------------------------------------


def test_on_real_runs_the_clients_scores_give_back_every_metric(store, tmp_path):
    """The bootstrap's statistic of the clients as they are is the run's own metric."""
    common = [
        "experiment=real",
        "data.name=digits",
        "placement.backend=local",
        "training.num_rounds=2",
        "evaluation.every=2",
        "evaluation.new_clients=0.2",
        f"tracking.uri={store}",
    ]
    for method in ("selffl", "fedavg"):
        for seed in (0, 1):
            config = load_config(None, [*common, f"method={method}", f"seed={seed}"])
            run_experiment(config, output=tmp_path / f"{method}-{seed}")
    (scene,) = read_study(Store(store), ["real"], None, []).scenes
    for row in scene.summary.rows:
        for outcome in OUTCOMES:
            tables = row.new if outcome.new else row.tables
            values = row.values(outcome.metric.format(score="accuracy"))
            assert len(values) == 2
            for key, value in values.items():
                scores, weights = (
                    tables[key][c].to_numpy(float)[None] for c in (outcome.column, "num_examples")
                )
                assert outcome.statistic(1)(scores, weights)[0] == pytest.approx(value, abs=1e-9)
    assert {c.outcome for c in compare_scenes([scene]) if c.draws is not None} == set(OUTCOMES)
