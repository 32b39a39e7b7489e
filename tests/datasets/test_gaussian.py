"""The two-level Gaussian data: variances as configured, and exact metrics without Monte Carlo."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selffl_ray.datasets.base import TEST, TRAIN
from selffl_ray.datasets.gaussian import GaussianConfig
from selffl_ray.datasets.store import prepare
from selffl_ray.errors import ConfigError
from selffl_ray.evaluation import ClientScores, score_rows, split_metrics
from selffl_ray.gradients import RowEngine
from selffl_ray.hierarchy import mixture_mse
from selffl_ray.models.build import ModelConfig, build_model
from selffl_ray.models.linear import LinearConfig
from selffl_ray.registry import Component, datasets
from selffl_ray.tasks import REGRESSION
from selffl_ray.training import Rows


def dataset_of(**options):
    return datasets.make(Component("gaussian", GaussianConfig(**options)))


def drawn(seed=0, **options):
    """Of every client: local optimum (mean of its examples), truth, examples (each coordinate)."""
    optima, truths, examples = [], [], []
    for group in dataset_of(**options).read((), seed):
        train = group.y[group.official == TRAIN][:, 1, 0]
        (test,) = group.y[group.official == TEST]
        optima.append(train.mean(0))
        truths.append(test[1, 0])
        examples.append(train)
    return np.stack(optima), np.stack(truths), examples


# -- drawn ----------------------------------------------------------------------------------------


def test_truths_and_optima_have_the_configured_variances():
    """20,000 coordinates: a variance is known to 1 % (one standard error)."""
    optima, truths, examples = drawn(
        num_clients=400, dimension=50, num_examples=(4,), noise_var=8.0, inter_var=3.0
    )
    assert truths.var() == pytest.approx(3.0, rel=0.05)
    assert abs(truths.mean()) < 0.07
    assert (optima - truths).var() == pytest.approx(8.0 / 4, rel=0.05)
    assert (optima.var()) == pytest.approx(3.0 + 2.0, rel=0.05)
    noise = np.stack(examples) - truths[:, None]
    assert noise.var() == pytest.approx(8.0, rel=0.05)
    between = np.corrcoef((optima - truths).ravel(), truths.ravel())[0, 1]
    assert abs(between) < 0.04


def test_every_client_has_its_own_variance():
    optima, truths, _ = drawn(
        num_clients=3, dimension=8000, num_examples=(5,), intra_var=(0.5, 2.0, 8.0), inter_var=1.0
    )
    assert (optima - truths).var(1) == pytest.approx([0.5, 2.0, 8.0], rel=0.1)


def test_a_range_of_examples_is_geometric_and_sets_the_variances():
    config = GaussianConfig(num_clients=3, num_examples=(10, 1000), noise_var=10.0)
    assert config.num_examples_M.tolist() == [10, 100, 1000]
    assert config.intra_var_M == pytest.approx([1.0, 0.1, 0.01])
    assert config.known_inter_var == pytest.approx(0.37)
    halved = GaussianConfig(num_clients=3, num_examples=(10, 1000), inter_ratio=0.5)
    assert halved.known_inter_var == pytest.approx(0.185)
    sizes = [len(e) for e in drawn(num_clients=3, dimension=2, num_examples=(10, 1000))[2]]
    assert sizes == [10, 100, 1000]


def test_variances_of_a_range_are_those_before_sizes_are_rounded():
    config = GaussianConfig(num_clients=3, num_examples=(1, 6), noise_var=12.0)
    assert config.num_examples_M.tolist() == [1, 2, 6]
    assert config.intra_var_M == pytest.approx([12.0, 12 / math.sqrt(6), 2.0])
    optima, truths, _ = drawn(
        num_clients=3, dimension=8000, num_examples=(1, 6), noise_var=12.0, inter_var=1.0
    )
    assert (optima - truths).var(1) == pytest.approx(config.intra_var_M, rel=0.1)


def test_one_client_of_one_coordinate_is_a_federation():
    optima, truths, examples = drawn(num_clients=1, dimension=1, num_examples=(1,))
    assert optima.shape == truths.shape == (1, 1)
    assert len(examples[0]) == 1


@pytest.mark.parametrize(
    ("num_examples", "expected"), [((7,), [7, 7, 7]), ((3, 9, 5), [3, 9, 5]), ((4, 16), [4, 8, 16])]
)
def test_numbers_of_examples_are_one_for_all_one_each_or_a_range(num_examples, expected):
    config = GaussianConfig(num_clients=3, num_examples=num_examples)
    assert config.num_examples_M.tolist() == expected


def test_two_numbers_for_two_clients_are_one_each():
    config = GaussianConfig(num_clients=2, num_examples=(30, 10), noise_var=3.0)
    assert config.num_examples_M.tolist() == [30, 10]
    assert config.intra_var_M == pytest.approx([0.1, 0.3])


def test_known_variances_are_those_of_the_draws():
    dataset = dataset_of(num_clients=4, num_examples=(10,), noise_var=5.0, inter_var=0.7)
    known = dataset.known()
    assert known.inter_var == 0.7
    assert known.intra_var_M == pytest.approx([0.5] * 4)


def test_the_same_seed_draws_the_same_and_clients_differ():
    first, again, other = (drawn(seed=s, num_clients=3, num_examples=(4,)) for s in (0, 0, 1))
    for a, b, c in zip(first[:2], again[:2], other[:2], strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.abs(a - c).max() > 0.1
    assert np.abs(first[1][0] - first[1][1]).max() > 0.1


def test_a_client_keeps_its_draws_in_a_larger_federation():
    small, large = (drawn(num_clients=m, num_examples=(4,), inter_var=1.0) for m in (3, 5))
    np.testing.assert_array_equal(small[0], large[0][:3])
    np.testing.assert_array_equal(small[1], large[1][:3])


def test_the_stored_test_example_judges_the_global_model_by_zero_and_the_clients_by_its_truth():
    options = {"num_clients": 3, "dimension": 4, "num_examples": (5,)}
    _, truths, _ = drawn(**options)
    outputs = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]], dtype=torch.float64)
    for group, truth in zip(dataset_of(**options).read((), 0), truths, strict=True):
        test = torch.from_numpy(group.y[group.official == TEST])[None]
        by_zero = REGRESSION.score(outputs, test, "global")
        by_truth = REGRESSION.score(outputs, test, "local")
        assert float(by_zero) == pytest.approx((1 + 4 + 9 + 16) / 4)
        expected = ((np.asarray([1, 2, 3, 4]) - truth) ** 2).mean()
        assert float(by_truth) == pytest.approx(expected)


def test_training_pulls_to_each_example_with_curvature_one():
    (group,) = dataset_of(num_clients=1, dimension=3, num_examples=(4,)).read((), 0)
    y = torch.from_numpy(group.y[group.official == TRAIN])[None]
    outputs = torch.ones(1, 4, 3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(REGRESSION.loss(outputs, y).mean(), outputs)
    torch.testing.assert_close(grad.sum(1)[0], 1 - y[0, :, 1, 0].mean(0))
    assert (group.x == 1).all()


def test_a_store_is_drawn_for_each_seed_and_identity_serves_all(tmp_path):
    for optima, count in (("drawn", 2), ("identity", 1)):
        config = GaussianConfig(num_clients=3, optima=optima)
        dataset = datasets.make(Component("gaussian", config))
        stores = [prepare(dataset, config, None, seed, tmp_path) for seed in (0, 1)]
        assert len({store.folder for store in stores}) == count
        assert len({store.manifest.digest for store in stores}) == count


# -- identity -------------------------------------------------------------------------------------

count_of = 5
numbers = st.floats(-2, 2, allow_nan=False)
variances = st.floats(0, 10, allow_nan=False)


@settings(max_examples=60)
@given(
    mixtures=st.lists(
        st.lists(numbers, min_size=count_of, max_size=count_of),
        min_size=count_of,
        max_size=count_of,
    ),
    inter=variances,
    intra=st.lists(variances, min_size=count_of, max_size=count_of),
)
def test_stored_targets_give_the_exact_expected_errors_of_any_mixture(mixtures, inter, intra):
    """A model that is a mixture p of the optima is scored by hierarchy.mixture_mse: no draws."""
    dataset = dataset_of(
        num_clients=count_of,
        num_examples=(2,),
        intra_var=tuple(intra),
        inter_var=inter,
        optima="identity",
    )
    p_MM = np.asarray(mixtures)
    expected_M = mixture_mse(p_MM, inter, intra)
    total_M = inter + np.asarray(intra)
    for client, group in enumerate(dataset.read((), 0)):
        test = torch.from_numpy(group.y[group.official == TEST])[None]
        outputs = torch.from_numpy(p_MM[client]).expand(1, 2, -1)
        local = float(REGRESSION.score(outputs, test, "local").mean())
        assert local == pytest.approx(float(expected_M[client]), rel=1e-9, abs=1e-12)
        by_global = float(REGRESSION.score(outputs, test, "global").mean())
        expected = float((p_MM[client] ** 2 * total_M).sum())
        assert by_global == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_metrics_through_store_and_evaluation_are_the_closed_forms(tmp_path):
    config = GaussianConfig(
        num_clients=4, num_examples=(3, 24), noise_var=6.0, inter_var=0.8, optima="identity"
    )
    dataset = datasets.make(Component("gaussian", config))
    store = prepare(dataset, config, None, 0, tmp_path)
    rows = np.flatnonzero(store.official() == TEST)
    x, y = store.read(rows)
    num_C = torch.full((4,), 2)
    part = Rows(torch.from_numpy(x), torch.from_numpy(y), torch.arange(0, 8, 2), num_C)
    component = Component("linear", LinearConfig(bias=False, dtype="float64"))
    model = build_model(ModelConfig(component=component), dataset.shape)
    assert model.spec.num_params == 4
    engine = RowEngine(model, dataset.task, torch.device("cpu"))
    p_MM = np.random.default_rng(0).dirichlet(np.ones(4), size=4)
    shared = np.asarray([[0.4, 0.3, 0.2, 0.1]])

    def scores(params, role):
        return score_rows(engine, torch.from_numpy(params), part, role, stack_size=3)

    local_C, local_loss_C = scores(p_MM, "local")
    found = split_metrics(
        ClientScores(
            np.arange(4),
            num_C.numpy(),
            scores(shared, "global")[0].numpy(),
            scores(shared, "local")[0].numpy(),
            np.zeros(4),
            local_C.numpy(),
            local_loss_C.numpy(),
        ),
        "test",
        dataset.task,
    )
    intra = config.intra_var_M
    assert intra == pytest.approx([2.0, 1.0, 0.5, 0.25])
    mine, theirs = (mixture_mse(p, 0.8, intra) for p in (p_MM, shared[0]))
    assert found["test/local_mse"] == pytest.approx(mine.mean())
    assert found["test/local_mse_worst10"] == pytest.approx(mine.max())
    assert found["test/global_mse_on_clients"] == pytest.approx(theirs.mean())
    assert found["test/global_mse"] == pytest.approx((shared[0] ** 2 * (0.8 + intra)).sum())
    assert found["test/clients_harmed_vs_global"] == (mine > theirs).mean()


def test_every_training_example_of_identity_is_the_clients_unit_vector():
    dataset = dataset_of(num_clients=3, num_examples=(2, 8), optima="identity")
    for client, group in enumerate(dataset.read((), 0)):
        train = group.y[group.official == TRAIN]
        assert len(train) == [2, 4, 8][client]
        for role in (0, 1):
            np.testing.assert_array_equal(train[:, role, 0], np.eye(3)[[client] * len(train)])
            assert (train[:, role, 1] == 1).all()
    assert dataset.shape.num_outputs == 3


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clients": 0}, r"num_clients and data\.dimension must be >= 1, got 0 and 20"),
        ({"dimension": 0}, r"must be >= 1, got 10 and 0"),
        ({"noise_var": -1.0}, r"noise_var and data\.inter_ratio must be >= 0, got -1\.0 and 1\.0"),
        ({"inter_ratio": math.nan}, r"must be >= 0, got 10\.0 and nan"),
        ({"noise_var": math.inf}, r"must be >= 0, got inf and 1\.0"),
        ({"inter_var": math.inf}, r"data\.inter_var must be >= 0, got inf"),
        ({"intra_var": (1.0,) * 9 + (math.inf,)}, r"data\.intra_var must be >= 0, got \[1\.0, "),
        ({"inter_var": -0.1}, r"data\.inter_var must be >= 0, got -0\.1"),
        ({"num_examples": (1, 2, 3)}, r"must hold 1, 2 or num_clients=10 .* got \[1, 2, 3\]"),
        ({"num_examples": (0, 10)}, r"num_clients=10 positive numbers, got \[0, 10\]"),
        ({"num_examples": (0,)}, r"data\.num_examples must be >= 1, got \[0\]"),
        ({"num_examples": ()}, r"must hold 1, 2 or num_clients=10 positive numbers, got \[\]"),
        ({"intra_var": (1.0, 2.0)}, r"intra_var must hold 1 or num_clients=10 .*\[1\.0, 2\.0\]"),
        ({"intra_var": (-1.0,)}, r"data\.intra_var must be >= 0, got \[-1\.0\]"),
        (
            {"optima": "identity", "dimension": 7},
            r"identity has one coordinate a client \(10\); leave out data\.dimension \(got 7\)",
        ),
    ],
)
def test_a_wrong_option_is_named_with_its_value(options, message):
    with pytest.raises(ConfigError, match=message):
        GaussianConfig(**options)
