"""Scores against naive loops, the same bits in any grouping, and every metric by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from selffl_ray import evaluation
from selffl_ray.errors import ConfigError
from selffl_ray.evaluation import (
    ClientScores,
    EvaluationConfig,
    chunks_by_length,
    join_scores,
    score_rows,
    split_metrics,
)
from selffl_ray.gradients import RowEngine
from selffl_ray.models.build import ModelConfig, build_model
from selffl_ray.models.linear import LinearConfig
from selffl_ray.models.mlp import MLPConfig
from selffl_ray.registry import Component
from selffl_ray.tasks import CLASSIFICATION, REGRESSION, DataShape
from selffl_ray.training import Rows

SHAPE = DataShape((6,), 4)
SIZES = (0, 1, 2, 255, 256, 257, 600)


def engine_of(task=CLASSIFICATION, name="mlp", options=None):
    options = options or MLPConfig(hidden=(9,))
    model = build_model(ModelConfig(component=Component(name, options)), SHAPE)
    return RowEngine(model, task, torch.device("cpu"))


def made_up(sizes, task=CLASSIFICATION):
    """Parameters and examples of clients of some sizes."""
    rng = np.random.default_rng(0)
    num_C = torch.tensor(sizes)
    total = int(num_C.sum())
    x = torch.from_numpy(rng.normal(size=(total, 6))).float()
    if task is CLASSIFICATION:
        y = torch.from_numpy(rng.integers(4, size=total))
    else:
        y = torch.from_numpy(rng.normal(size=(total, 2, 2, 4))).float()
    return Rows(x, y, torch.cumsum(num_C, 0) - num_C, num_C)


def params_of(engine, rows):
    rng = np.random.default_rng(1)
    drawn = rng.normal(scale=0.5, size=(rows, engine.model.spec.num_params))
    return torch.from_numpy(drawn).to(engine.model.spec.dtype)


# -- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True], ids=["own rows", "one row for all"])
def test_scores_are_those_of_a_loop_over_the_examples(shared):
    engine, rows = engine_of(), made_up(SIZES)
    theta_CP = params_of(engine, 1 if shared else len(SIZES))
    score_C, loss_C = score_rows(engine, theta_CP, rows, "local", stack_size=4)
    assert score_C.dtype == loss_C.dtype == torch.float64
    for client, (start, number) in enumerate(zip(rows.start_C, rows.num_C, strict=True)):
        views = engine.model.spec.views(theta_CP[:1] if shared else theta_CP[client][None])
        right, loss = 0, 0.0
        for at in range(int(start), int(start + number)):
            output = engine.model.apply(views, rows.x[None, None, at])[0]
            right += int(output.argmax()) == int(rows.y[at])
            loss += float(F.cross_entropy(output, rows.y[at : at + 1]))
        assert score_C[client] == right
        assert float(loss_C[client]) == pytest.approx(loss, rel=1e-5)


def test_the_role_tells_by_which_truth_a_regression_is_judged():
    engine = engine_of(REGRESSION, "linear", LinearConfig(dtype="float64"))
    rows = made_up((3, 300), REGRESSION)
    rows = rows._replace(y=rows.y.double())
    theta_CP = params_of(engine, 2)
    outputs = torch.cat(
        [
            engine.model.apply(engine.model.spec.views(theta_CP[c][None]), rows.x[None, at])[0]
            for c, at in ((0, slice(0, 3)), (1, slice(3, 303)))
        ]
    )
    found = {}
    for role, at in (("global", 0), ("local", 1)):
        score_C, loss_C = score_rows(engine, theta_CP, rows, role, stack_size=2)
        squares = ((outputs - rows.y[:, at, 0]) ** 2 * rows.y[:, at, 1]).sum(1)
        torch.testing.assert_close(score_C, torch.stack([squares[:3].sum(), squares[3:].sum()]))
        found[role] = loss_C
    own = 0.5 * ((outputs - rows.y[:, 1, 0]) ** 2 * rows.y[:, 1, 1]).sum(1)
    for loss_C in found.values():
        torch.testing.assert_close(loss_C, torch.stack([own[:3].sum(), own[3:].sum()]))


@pytest.mark.parametrize("stack_size", [1, 2, 3, 7, 20])
def test_scores_have_the_same_bits_in_any_grouping_into_stacks(stack_size):
    engine, rows = engine_of(), made_up((*SIZES, 31, 90, 256))
    theta_CP = params_of(engine, len(rows.num_C))
    whole = score_rows(engine, theta_CP, rows, "local", stack_size=5)
    other = score_rows(engine, theta_CP, rows, "local", stack_size)
    for a, b in zip(whole, other, strict=True):
        assert torch.equal(a, b)
    for pick in ([3], [6, 1], [9, 4, 0, 5], [8, 7, 6, 5, 4, 3]):
        some = score_rows(engine, theta_CP[pick], rows.select(pick), "local", stack_size)
        for a, b in zip(whole, some, strict=True):
            assert torch.equal(a[pick], b)


def test_so_many_chunks_are_evaluated_together_as_their_examples_have_room(monkeypatch):
    engine, rows = engine_of(), made_up((600, 600, 600, 600, 40))
    theta_CP = params_of(engine, len(rows.num_C))
    seen = []

    def outputs(theta, x):
        seen.append((x.shape[1], len(x)))
        return RowEngine.outputs(engine, theta, x)

    monkeypatch.setattr(engine, "outputs", outputs)
    found = {}
    # Room for three of the longest chunks, for one number, and as it comes.
    for room in (3 * 256 * 6 * 4, 1, evaluation.SLAB_BYTES):
        monkeypatch.setattr(evaluation, "SLAB_BYTES", room)
        seen.clear()
        scores = score_rows(engine, theta_CP, rows, "local", stack_size=6)
        found[tuple(seen)] = scores
    by_room = [sorted(groups, reverse=True) for groups in found]
    assert by_room[0] == [(256, 3), (256, 3), (256, 2), (128, 4), (64, 1)]
    assert {height for _, height in by_room[1]} == {1}
    assert by_room[2] == [(256, 6), (256, 2), (128, 4), (64, 1)]
    one, *others = found.values()
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@settings(max_examples=60)
@given(sizes=st.lists(st.integers(0, 1100), min_size=1, max_size=6))
def test_chunks_cover_a_client_in_lengths_that_depend_on_its_size_only(sizes):
    found = {}
    for chunk in chunks_by_length(torch.tensor(sizes)):
        for row, start, num in zip(*(t.tolist() for t in chunk[1:]), strict=True):
            found.setdefault(row, []).append((start, num, chunk.length))
    assert sorted(found) == [row for row, size in enumerate(sizes) if size]
    for row, own in found.items():
        own.sort()
        assert [start for start, *_ in own] == list(range(0, sizes[row], 256))
        assert sum(num for _, num, _ in own) == sizes[row]
        for _, num, length in own:
            assert num <= length <= 256
            assert length < 2 * num or length == 1
            assert length & (length - 1) == 0
        alone = [chunk.length for chunk in chunks_by_length(torch.tensor([sizes[row]]))]
        assert sorted({length for *_, length in own}) == alone


# -- metrics --------------------------------------------------------------------------------------


def scores_of(num, global_, on_clients, local, global_loss=None, local_loss=None):
    count = len(num)
    columns = (
        global_,
        on_clients,
        global_loss or [0.0] * count,
        local,
        local_loss or [0.0] * count,
    )
    return ClientScores(
        np.arange(count),
        np.asarray(num),
        *(np.asarray(column, dtype=np.float64) for column in columns),
    )


def test_every_metric_of_a_small_federation_by_hand():
    scores = scores_of(
        num=[10, 40, 0, 50],
        global_=[6, 30, 0, 10],
        on_clients=[5, 20, 0, 15],
        local=[9, 10, 0, 30],
        global_loss=[20.0, 10.0, 0.0, 20.0],
        local_loss=[5.0, 10.0, 0.0, 10.0],
    )
    # Personalized: 0.9, 0.25, 0.6; the global model on them: 0.5, 0.5, 0.3.
    mean = (0.9 + 0.25 + 0.6) / 3
    expected = {
        "test/global_accuracy": 46 / 100,
        "test/global_accuracy_on_clients": 40 / 100,
        "test/global_loss": 50 / 100,
        "test/local_accuracy": 49 / 100,
        "test/local_loss": 25 / 100,
        "test/local_accuracy_mean": mean,
        "test/local_accuracy_std": math.sqrt(
            ((0.9 - mean) ** 2 + (0.25 - mean) ** 2 + (0.6 - mean) ** 2) / 3
        ),
        "test/local_accuracy_worst10": 0.25,
        "test/local_accuracy_best10": 0.9,
        "test/clients_harmed_vs_global": 1 / 3,
    }
    found = split_metrics(scores, "test", CLASSIFICATION)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(("clients", "tenth"), [(1, 1), (10, 1), (11, 2), (20, 2), (21, 3)])
def test_worst_and_best_ten_percent_are_means_over_a_tenth_rounded_up(clients, tenth):
    rng = np.random.default_rng(0)
    right = rng.permutation(np.arange(clients)).tolist()
    scores = scores_of([100] * clients, right, right, right)
    found = split_metrics(scores, "val", CLASSIFICATION)
    lowest, highest = np.arange(tenth), clients - 1 - np.arange(tenth)
    assert found["val/local_accuracy_worst10"] == pytest.approx(lowest.mean() / 100)
    assert found["val/local_accuracy_best10"] == pytest.approx(highest.mean() / 100)


def test_an_error_is_worst_where_it_is_highest():
    scores = scores_of([2] * 4, [4.0] * 4, [4.0] * 4, [2.0, 8.0, 3.0, 4.0])
    found = split_metrics(scores, "test", REGRESSION)
    assert found["test/local_mse_worst10"] == 4.0
    assert found["test/local_mse_best10"] == 1.0
    assert found["test/local_mse"] == found["test/local_mse_mean"] == 17 / 8
    assert found["test/global_mse"] == 2.0
    # Only the second of four is worse than the global model's 2.
    assert found["test/clients_harmed_vs_global"] == 1 / 4


def test_a_client_as_good_as_the_global_model_is_not_harmed():
    scores = scores_of([10, 10], [5, 5], [5, 5], [5, 4])
    assert split_metrics(scores, "test", CLASSIFICATION)["test/clients_harmed_vs_global"] == 0.5


def test_what_was_not_measured_is_absent():
    nothing = [math.nan] * 2
    found = split_metrics(
        scores_of([10, 10], nothing, nothing, [5, 9], nothing, [1.0, 2.0]), "test", CLASSIFICATION
    )
    assert not [name for name in found if "global" in name]
    assert found["test/local_accuracy"] == 0.7
    assert found["test/local_loss"] == 0.15
    assert split_metrics(scores_of([0, 0], [0, 0], [0, 0], [0, 0]), "test", CLASSIFICATION) == {}


def test_a_diverged_client_is_not_hidden_in_the_worst_ten_percent():
    scores = scores_of([1] * 3, [2.0] * 3, [2.0] * 3, [1.0, math.nan, 3.0])
    found = split_metrics(scores, "test", REGRESSION)
    assert found == {
        "test/global_mse": 2.0,
        "test/global_mse_on_clients": 2.0,
        "test/global_loss": 0.0,
        "test/local_loss": 0.0,
    }


def test_joined_scores_ascend_by_client_with_every_column_in_step():
    def part(index):
        values = np.asarray(index, dtype=np.float64)
        return ClientScores(
            np.asarray(index), np.asarray(index) * 10, *(values + k for k in range(5))
        )

    joined = join_scores([part([7, 2]), part([5]), part([0, 9, 1])])
    assert joined.client_index.tolist() == [0, 1, 2, 5, 7, 9]
    assert joined.num_examples.tolist() == [0, 10, 20, 50, 70, 90]
    for offset, column in enumerate(joined[2:]):
        assert column.tolist() == [i + offset for i in (0, 1, 2, 5, 7, 9)]


# -- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "last", "num_rounds", "rounds"),
    [
        (5, 1, 12, {4, 9, 11}),
        (5, 1, 10, {4, 9}),
        (1, 1, 4, {0, 1, 2, 3}),
        (5, 3, 12, {4, 9, 10, 11}),
        (50, 1, 12, {11}),
        (50, 20, 3, {0, 1, 2}),
    ],
)
def test_rounds_to_evaluate_are_every_so_many_and_the_last(every, last, num_rounds, rounds):
    assert EvaluationConfig(every=every, last=last).rounds(num_rounds) == rounds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "evaluation.every must be >= 1, got 0"),
        ({"last": 0}, "evaluation.last must be >= 1, got 0"),
        ({"max_clients": 0}, "evaluation.max_clients must be >= 1, got 0"),
        ({"new_clients": 1.0}, r"evaluation.new_clients must lie in \[0, 1\), got 1.0"),
        ({"new_clients": -0.1}, r"evaluation.new_clients must lie in \[0, 1\), got -0.1"),
        ({"splits": (0.5, 0.2, 0.2)}, r"sum to 1.*got \[0.5, 0.2, 0.2\]"),
        ({"splits": (0.0, 0.5, 0.5)}, r"some for training, got \[0.0, 0.5, 0.5\]"),
        ({"splits": (1.2, -0.1, -0.1)}, r"shares of train, val and test.*got \[1.2, -0.1, -0.1\]"),
        ({"splits": (math.nan, 0.5, 0.5)}, r"shares of train, val and test.*got \[nan"),
    ],
)
def test_a_wrong_option_of_the_evaluation_is_named_with_its_value(options, message):
    with pytest.raises(ConfigError, match=message):
        EvaluationConfig(**options)


def test_shares_may_sum_to_one_within_rounding():
    assert EvaluationConfig(splits=(0.7, 0.1, 0.2)).splits == (0.7, 0.1, 0.2)
