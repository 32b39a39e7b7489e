"""Estimators of a client's own uncertainty: formulas, and what they observe of a real stack.

The stacks hold clients of 1, 3, 7, 25, 300 and 600 examples. Expected values come from gradients of
one example at a time, taken by autograd on models that are written down here once more.

Shape letters: C clients, N examples, P parameters, G groups, T iterates, J chunks.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from selffl_ray import trees
from selffl_ray.errors import ConfigError
from selffl_ray.estimators.inter_base import NoOptions
from selffl_ray.estimators.intra import (
    fisher,
    gradient,
    gradient_chunks,
    known,
    round_window,
    sample_size,
    split_half,
    trajectory,
    trajectory_rescaled,
)
from selffl_ray.estimators.intra_base import IntraContext, Observed
from selffl_ray.evaluation import CHUNK
from selffl_ray.gradients import RowEngine
from selffl_ray.models.linear import LinearConfig, linear
from selffl_ray.models.mlp import MLPConfig, mlp
from selffl_ray.registry import Component, intra_estimators
from selffl_ray.seeding import generator
from selffl_ray.tasks import CLASSIFICATION, REGRESSION, DataShape
from selffl_ray.training import (
    Rows,
    Stack,
    TrainingConfig,
    local_sgd,
    observe_tail,
    start_tail,
)

SIZES = (25, 1, 7, 300, 3, 600)
FEATURES, OUTPUTS, HIDDEN = 5, 3, 4
SHAPE = DataShape((FEATURES,), OUTPUTS)
SEED = 11
GRANULARITIES = pytest.mark.parametrize("granularity", ["model", "layer", "parameter"])
KINDS = pytest.mark.parametrize("kind", ["linear", "mlp"])


@pytest.fixture(autouse=True)
def one_thread():
    """As in a host: with more, a sum's bits depend on how many rows it has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------
# Stacks


@cache
def model_of(kind):
    if kind == "linear":
        return linear(LinearConfig(dtype="float64"), SHAPE)
    return mlp(MLPConfig(hidden=(HIDDEN,)), SHAPE)


@cache
def examples(size):
    """Features and classes of the client of that size; its classes are of its own proportions."""
    rng = np.random.default_rng([3, size])
    y = rng.choice(OUTPUTS, size=size, p=rng.dirichlet(np.ones(OUTPUTS)))
    x = rng.normal(size=(size, FEATURES)) + y[:, None] * 0.5
    return torch.from_numpy(x).float(), torch.from_numpy(y)


def rows_of(parts):
    """Rows of several clients from their (x, y)."""
    num_C = torch.tensor([len(x) for x, _ in parts])
    x, y = (torch.cat(same) for same in zip(*parts, strict=True))
    return Rows(x, y, torch.cumsum(num_C, 0) - num_C, num_C)


def stack_of(kind, sizes=SIZES, *, round_index=2, parts=None, names=None, **training):
    """A stack whose clients are called by their sizes."""
    options = TrainingConfig(**{"batch_size": 20, "learning_rate": 0.2, **training})
    return Stack(
        tuple(names or (f"client-{size}" for size in sizes)),
        rows_of(parts or [examples(size) for size in sizes]),
        options.batch_size,
        RowEngine(model_of(kind), CLASSIFICATION, torch.device("cpu")),
        options,
        SEED,
        round_index,
        0.2,
    )


def observed_of(stack, *, global_P=None, tail=None, steps_C=None, rate=0.2, retained=0.5):
    """A round whose global model, starts and uploads are all different points."""
    spec, count = stack.spec, stack.num_clients
    if global_P is None:
        global_P = torch.from_numpy(np.random.default_rng(5).normal(size=spec.num_params))
    points = [
        [np.random.default_rng([6, place, int(n)]).normal(size=spec.num_params) for place in (0, 1)]
        for n in stack.train.num_C
    ]
    start_CP, upload_CP = torch.from_numpy(np.array(points)).to(spec.dtype).unbind(1)
    steps_C = torch.full((count,), 5) if steps_C is None else steps_C
    rate_C = torch.as_tensor(rate, dtype=torch.float64).expand(count)
    retained_CG = torch.as_tensor(retained, dtype=torch.float64)
    if retained_CG.ndim == 0:
        retained_CG = retained_CG.expand(count, 1)
    return Observed(
        stack, global_P.to(spec.dtype), start_CP, upload_CP, tail, steps_C, rate_C, retained_CG
    )


def context_of(kind, granularity="model", *, curvature=1.0, known_var=None):
    return IntraContext(model_of(kind).spec.groups(granularity), curvature, OUTPUTS, known_var)


def columns_of(kind, granularity):
    """Coordinates of each group, by the models' layouts as written in their docstrings."""
    if kind == "linear":
        count = FEATURES * OUTPUTS + OUTPUTS
        layers = [range(count)]
    else:
        first = FEATURES * HIDDEN + HIDDEN
        count = first + HIDDEN * OUTPUTS + OUTPUTS
        layers = [range(first), range(first, count)]
    by_name = {"model": [range(count)], "layer": layers, "parameter": [[i] for i in range(count)]}
    return [list(columns) for columns in by_name[granularity]]


def outputs_by_hand(kind, theta_P, x_F):
    """The model of one example in float64."""
    x_F = x_F.double()
    if kind == "linear":
        return x_F @ theta_P[:15].view(FEATURES, OUTPUTS) + theta_P[15:]
    hidden = (x_F @ theta_P[:20].view(FEATURES, HIDDEN) + theta_P[20:24]).relu()
    return hidden @ theta_P[24:36].view(HIDDEN, OUTPUTS) + theta_P[36:]


def gradients_by_hand(kind, theta_P, x, y):
    """Per-example gradients (N, P), one call of autograd each."""
    grads = []
    for x_F, label in zip(x, y, strict=True):
        at_P = theta_P.double().detach().requires_grad_()
        loss = F.cross_entropy(outputs_by_hand(kind, at_P, x_F).unsqueeze(0), label.unsqueeze(0))
        grads.append(torch.autograd.grad(loss, at_P)[0])
    return torch.stack(grads).numpy()


@cache
def gradients_at_global(kind, size):
    observed = observed_of(stack_of(kind, (size,)))
    return gradients_by_hand(kind, observed.global_P, *examples(size))


def tolerance(kind):
    """The linear models are float64, the perceptrons float32."""
    return {"rtol": 1e-9, "atol": 1e-14} if kind == "linear" else {"rtol": 2e-4, "atol": 1e-9}


def estimate(module, config, stack_or_observed, context):
    """Evidence of the module's estimator, without memory."""
    factory = getattr(module, module.__name__.rpartition(".")[2])
    observed = stack_or_observed
    if isinstance(observed, Stack):
        observed = observed_of(observed)
    return factory(config, context).estimate(None, by_group(observed, context))


def by_group(observed, context):
    """What is retained of the start, for each group of the context."""
    retained_CG = observed.retained_CG.expand(-1, context.groups.num_groups)
    return observed._replace(retained_CG=retained_CG)


# ---------------------------------------------------------------------------------------------
# gradient, gradient_chunks, fisher: pure formulas


def test_gradient_variance_is_the_squared_standard_error_of_the_mean_gradient():
    grads_NP = np.random.default_rng(0).normal(size=(9, 4))
    by_coordinate = [grads_NP[:, p].var(ddof=1) / 9 for p in range(4)]
    assert gradient.variance(grads_NP) == pytest.approx(np.mean(by_coordinate), rel=1e-13)
    assert gradient.variance(grads_NP, curvature=0.5) == pytest.approx(
        4 * np.mean(by_coordinate), rel=1e-13
    )


@pytest.mark.parametrize("module", [gradient, gradient_chunks])
def test_one_gradient_knows_nothing_of_its_variance(module):
    assert math.isnan(module.variance(np.ones((1, 4))))


def test_chunk_variance_weighs_the_chunks_by_their_sizes():
    chunks_JP, sizes_J = np.array([[1.0, 0.0], [4.0, 6.0], [-2.0, 3.0]]), [5, 1, 2]
    mean_P = (5 * chunks_JP[0] + chunks_JP[1] + 2 * chunks_JP[2]) / 8
    spread = sum(
        n / 8 * ((chunk_P - mean_P) ** 2).sum()
        for n, chunk_P in zip(sizes_J, chunks_JP, strict=True)
    )
    assert gradient_chunks.variance(chunks_JP, sizes_J) == pytest.approx(spread / 4, rel=1e-13)
    assert gradient_chunks.variance(chunks_JP, sizes_J, curvature=2.0) == pytest.approx(
        spread / 16, rel=1e-13
    )
    assert gradient_chunks.variance(chunks_JP, [3, 3, 3]) == gradient_chunks.variance(chunks_JP)


def test_a_chunk_for_each_example_is_the_per_example_variance():
    grads_NP = np.random.default_rng(1).normal(size=(13, 5))
    assert gradient_chunks.variance(grads_NP, curvature=0.7) == pytest.approx(
        gradient.variance(grads_NP, curvature=0.7), rel=1e-13
    )


def test_chunk_variance_is_unbiased_for_unequal_chunks():
    """25 examples with unit variance in 8 chunks of 3 or 4: expected 1/25."""
    rng = np.random.default_rng(2)
    edges = [25 * j // 8 for j in range(9)]
    sizes_J = np.diff(edges)
    found = []
    for _ in range(3000):
        grads_NP = rng.normal(size=(25, 4))
        chunks_JP = [grads_NP[a:b].mean(0) for a, b in pairwise(edges)]
        found.append(gradient_chunks.variance(chunks_JP, sizes_J))
    assert np.mean(found) == pytest.approx(1 / 25, abs=4 * np.std(found) / math.sqrt(3000))
    assert np.std(found) / math.sqrt(3000) < 0.01 / 25


def test_fisher_variance_is_the_mean_inverse_of_the_damped_information():
    grads_NP = np.array([[1.0, 0.0], [3.0, 0.0]])
    assert fisher.variance(grads_NP, 0.5) == pytest.approx((1 / 10.5 + 1 / 0.5) / 2, rel=1e-15)


def test_more_damping_means_less_variance():
    grads_NP = np.random.default_rng(3).normal(size=(5, 6))
    found = [fisher.variance(grads_NP, damping) for damping in (0.1, 1.0, 10.0)]
    assert found[0] > 1.1 * found[1] > 1.21 * found[2]


# ---------------------------------------------------------------------------------------------
# gradient, gradient_chunks, fisher: what they compute on a stack


def assert_evidence(evidence, vectors_CP, expected_CG, kind):
    assert evidence.var_CG.dtype == torch.float64
    np.testing.assert_allclose(evidence.vector_CP, np.stack(vectors_CP), **tolerance(kind))
    np.testing.assert_allclose(evidence.var_CG, np.array(expected_CG), **tolerance(kind))


@KINDS
@GRANULARITIES
def test_the_gradient_estimator_is_its_formula_on_per_example_gradients(kind, granularity):
    evidence = estimate(gradient, NoOptions(), stack_of(kind), context_of(kind, granularity))
    grads = [gradients_at_global(kind, size) for size in SIZES]
    columns = columns_of(kind, granularity)
    expected_CG = [[gradient.variance(g[:, own]) for own in columns] for g in grads]
    assert_evidence(evidence, [g.mean(0) for g in grads], expected_CG, kind)


def chunks_by_hand(grads_NP, size, num_chunks):
    """Mean gradients and sizes of chunks cut at floor(n j / J) from the client's fixed order."""
    order = generator(SEED, "chunks", 0, f"client-{size}").permutation(size)
    count = min(num_chunks, size)
    chunks = [order[size * j // count : size * (j + 1) // count] for j in range(count)]
    return [grads_NP[chunk].mean(0) for chunk in chunks], [len(chunk) for chunk in chunks]


@KINDS
@GRANULARITIES
@pytest.mark.parametrize("num_chunks", [2, 8])
def test_the_chunk_estimator_is_its_formula_on_chunks_of_a_random_order(
    kind, granularity, num_chunks
):
    assert max(SIZES) / 2 > CHUNK, "the largest client's chunks come in pieces"
    config = gradient_chunks.GradientChunksConfig(num_chunks=num_chunks)
    evidence = estimate(gradient_chunks, config, stack_of(kind), context_of(kind, granularity))
    grads = [gradients_at_global(kind, size) for size in SIZES]
    expected_CG = []
    for grads_NP, size in zip(grads, SIZES, strict=True):
        chunks_JP, sizes_J = chunks_by_hand(grads_NP, size, num_chunks)
        expected_CG.append(
            [
                gradient_chunks.variance(np.array(chunks_JP)[:, own], sizes_J)
                for own in columns_of(kind, granularity)
            ]
        )
    assert_evidence(evidence, [g.mean(0) for g in grads], expected_CG, kind)


def test_as_many_chunks_as_examples_are_the_gradient_estimator():
    sizes = (3, 7, 25, 300)
    config = gradient_chunks.GradientChunksConfig(num_chunks=300)
    stack, context = stack_of("linear", sizes), context_of("linear")
    chunked = estimate(gradient_chunks, config, stack, context)
    single = estimate(gradient, NoOptions(), stack, context)
    np.testing.assert_allclose(chunked.var_CG, single.var_CG, rtol=1e-10)
    np.testing.assert_allclose(chunked.vector_CP, single.vector_CP, rtol=1e-10, atol=1e-15)


@KINDS
@GRANULARITIES
def test_the_fisher_estimator_is_its_formula_and_brings_deshrunk_uploads(kind, granularity):
    observed = observed_of(stack_of(kind), retained=0.75)
    config = fisher.FisherConfig(damping=0.3)
    evidence = estimate(fisher, config, observed, context_of(kind, granularity))
    columns = columns_of(kind, granularity)
    expected_CG = [
        [fisher.variance(gradients_at_global(kind, size)[:, own], 0.3) for own in columns]
        for size in SIZES
    ]
    undone_CP = observed.start_CP + 4 * (observed.upload_CP - observed.start_CP)
    assert_evidence(evidence, list(undone_CP), expected_CG, kind)


@pytest.mark.parametrize(
    ("module", "config"),
    [
        (gradient, NoOptions()),
        (gradient_chunks, gradient_chunks.GradientChunksConfig()),
        (split_half, NoOptions()),
    ],
)
def test_a_single_example_leaves_the_variance_unknown(module, config):
    evidence = estimate(module, config, stack_of("linear"), context_of("linear"))
    assert torch.isnan(evidence.var_CG).flatten().tolist() == [size == 1 for size in SIZES]
    assert torch.isfinite(evidence.vector_CP).all()


@pytest.mark.parametrize("module", [gradient, gradient_chunks])
def test_curvature_stays_out_of_what_is_compared_with_gradients(module):
    config = NoOptions() if module is gradient else gradient_chunks.GradientChunksConfig()
    one, other = (
        estimate(module, config, stack_of("linear"), context_of("linear", curvature=h))
        for h in (1.0, 0.3)
    )
    assert torch.equal(one.var_CG.nan_to_num(-1), other.var_CG.nan_to_num(-1))


def test_the_order_of_chunks_is_the_same_in_every_round():
    config, context = gradient_chunks.GradientChunksConfig(), context_of("linear")
    rounds = [
        estimate(gradient_chunks, config, stack_of("linear", (300,), round_index=r), context)
        for r in (0, 7)
    ]
    assert torch.equal(rounds[0].var_CG, rounds[1].var_CG)


@pytest.mark.parametrize("num_chunks", [2, 8])
def test_rows_sorted_by_class_give_the_variance_of_shuffled_rows(num_chunks):
    """Cut in recording order, chunks of one class each would look most uncertain."""
    x, y = examples(600)
    order = y.argsort(stable=True)
    shuffled = torch.from_numpy(np.random.default_rng(8).permutation(600))
    config = gradient_chunks.GradientChunksConfig(num_chunks=num_chunks)
    context = context_of("linear")
    names = [f"copy-{i}" for i in range(40)]
    found = {}
    for name, at in (("sorted", order), ("shuffled", shuffled)):
        stack = stack_of("linear", (600,) * 40, parts=[(x[at], y[at])] * 40, names=names)
        found[name] = estimate(gradient_chunks, config, stack, context).var_CG[:, 0].numpy()
    # 40 orders of the same rows: compare the means by their standard errors.
    error = math.hypot(*(v.std() / math.sqrt(40) for v in found.values()))
    assert abs(found["sorted"].mean() - found["shuffled"].mean()) < 4 * error
    truth = gradient.variance(gradients_at_global("linear", 600))
    assert found["sorted"].mean() == pytest.approx(truth, abs=4 * error)
    grads_NP = gradients_at_global("linear", 600)[order]
    cut_JP = grads_NP.reshape(num_chunks, -1, grads_NP.shape[1]).mean(1)
    assert gradient_chunks.variance(cut_JP) > 5 * found["sorted"].mean()


@pytest.mark.parametrize(
    ("config_type", "key", "bad"),
    [
        (gradient_chunks.GradientChunksConfig, "num_chunks", 1),
        (fisher.FisherConfig, "damping", 0.0),
        (fisher.FisherConfig, "damping", math.nan),
        (sample_size.SampleSizeConfig, "scale", -0.1),
        (sample_size.SampleSizeConfig, "scale", math.nan),
        (round_window.RoundWindowConfig, "window", 1),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(config_type, key, bad):
    with pytest.raises(ConfigError, match=rf"method\.intra\.{key} must be .*, got {bad}"):
        config_type(**{key: bad})


# ---------------------------------------------------------------------------------------------
# round_window


def test_a_window_of_uploads_has_their_variance_and_one_upload_has_none():
    models_WP = np.random.default_rng(4).normal(size=(5, 7)) + 1e3
    expected = np.mean(models_WP.var(axis=0, ddof=1))
    assert round_window.variance(models_WP) == pytest.approx(expected, rel=1e-10)
    assert round_window.variance(models_WP[:1]) is None
    assert round_window.variance(models_WP[:0]) is None


def uploads_of(kind, num_rounds, num_clients=2):
    """Far from 0 and close to each other: squares of the uploads themselves would cancel."""
    rng = np.random.default_rng(9)
    count = model_of(kind).spec.num_params
    moves = rng.normal(size=(num_rounds, num_clients, count)) * 0.01
    return torch.from_numpy(100 + moves).to(model_of(kind).spec.dtype)


@KINDS
@GRANULARITIES
def test_the_window_holds_the_last_uploads_and_forgets_older_ones(kind, granularity):
    context, config = context_of(kind, granularity), round_window.RoundWindowConfig(window=3)
    estimator = round_window.round_window(config, context)
    observed = observed_of(stack_of(kind, (3, 25)))
    memory = estimator.init_memory(
        2, torch.zeros(observed.stack.spec.num_params).to(observed.global_P)
    )
    uploads = uploads_of(kind, 6)
    for index, upload_CP in enumerate(uploads):
        now = observed._replace(upload_CP=upload_CP)
        before = trees.map_tree(torch.clone, memory)
        after = estimator.remember(memory, now)
        for (_, a), (_, b) in zip(trees.leaves(before), trees.leaves(memory), strict=True):
            assert torch.equal(a, b), "what was remembered is not changed"
        memory = after
        evidence = estimator.estimate(memory, now)
        assert torch.equal(evidence.vector_CP, upload_CP)
        last = uploads[max(0, index - 2) : index + 1].double().numpy()
        for client in range(2):
            for g, own in enumerate(columns_of(kind, granularity)):
                expected = round_window.variance(last[:, client][:, own])
                found = float(evidence.var_CG[client, g])
                if expected is None:
                    assert math.isnan(found)
                else:
                    assert found == pytest.approx(expected, rel=1e-7)


def test_each_client_of_a_stack_has_its_own_number_of_uploads():
    context, config = context_of("linear"), round_window.RoundWindowConfig(window=4)
    estimator = round_window.round_window(config, context)
    stacks = {client: stack_of("linear", (size,)) for client, size in ((0, 3), (1, 25))}
    uploads = uploads_of("linear", 5)
    memories = []
    for client, first in ((0, 0), (1, 4)):
        memory = estimator.init_memory(1, uploads[0, 0] * 0)
        for upload_CP in uploads[first:]:
            now = observed_of(stacks[client])._replace(upload_CP=upload_CP[client : client + 1])
            memory = estimator.remember(memory, now)
        memories.append(memory)
    together = observed_of(stack_of("linear", (3, 25)))._replace(upload_CP=uploads[-1])
    found_CG = estimator.estimate(trees.concatenate(memories), together).var_CG
    expected = round_window.variance(uploads[1:, 0].numpy())
    assert float(found_CG[0, 0]) == pytest.approx(expected, rel=1e-10)
    assert math.isnan(float(found_CG[1, 0]))


# ---------------------------------------------------------------------------------------------
# trajectory, trajectory_rescaled


def test_iterates_have_their_variance_and_fewer_than_two_have_none():
    iterates_TP = np.random.default_rng(5).normal(size=(6, 3))
    expected = np.mean(iterates_TP.var(axis=0, ddof=1))
    assert trajectory.variance(iterates_TP) == pytest.approx(expected, rel=1e-13)
    assert trajectory_rescaled.variance(iterates_TP, 20, 0.1, 0.5, 300) == pytest.approx(
        expected * 2 * 20 / (0.1 * 0.5 * 300), rel=1e-13
    )
    assert trajectory.variance(iterates_TP[:1]) is None
    assert trajectory_rescaled.variance(iterates_TP[:1], 20, 0.1, 0.5, 300) is None


def test_the_spread_of_stationary_sgd_rescales_to_the_variance_of_the_local_optimum():
    """Noise of variance g / batch on a quadratic: the optimum has variance g / (h^2 n)."""
    rng = np.random.default_rng(6)
    rate, curvature, batch, examples_, g = 0.05, 0.8, 4, 50, 3.0
    x_P, kept = np.zeros(200), []
    for step in range(4000):
        noise_P = rng.normal(size=200) * math.sqrt(g / batch)
        x_P = x_P - rate * (curvature * x_P + noise_P)
        if step >= 1000:
            kept.append(x_P)
    found = trajectory_rescaled.variance(np.array(kept), batch, rate, curvature, examples_)
    assert found == pytest.approx(g / (curvature**2 * examples_), rel=0.06)


STEPS_C = torch.tensor([11, 1, 2, 6, 3, 4])


def watched(kind, stack, steps_C=STEPS_C):
    """The observed round after real training, and all of its iterates (T, C, P)."""
    start_P = torch.from_numpy(np.random.default_rng(7).normal(size=stack.spec.num_params))

    def observe(seen, theta_CP, step):
        tail, iterates = seen
        return observe_tail(tail, theta_CP, step), [*iterates, theta_CP.clone()]

    start_CP = start_P.to(stack.spec.dtype).expand(stack.num_clients, -1)
    tail = start_tail(start_CP, stack.num_clients, squares=True)
    trained = local_sgd(stack, start=start_CP, steps_C=steps_C, observe=observe, seen=(tail, []))
    observed = observed_of(stack, tail=trained.seen[0], steps_C=steps_C)
    return observed, torch.stack(trained.seen[1]).double().numpy()


def tail_variance(iterates_TCP, client, steps, own):
    """Variance of the last ceil(T / 2) of the client's T iterates; NaN for one."""
    found = trajectory.variance(iterates_TCP[steps // 2 : steps, client][:, own])
    return math.nan if found is None else found


@KINDS
@GRANULARITIES
def test_the_trajectory_estimator_is_the_variance_of_the_second_half_of_the_steps(
    kind, granularity
):
    observed, iterates_TCP = watched(kind, stack_of(kind))
    evidence = estimate(trajectory, NoOptions(), observed, context_of(kind, granularity))
    columns = columns_of(kind, granularity)
    expected_CG = [
        [tail_variance(iterates_TCP, c, int(steps), own) for own in columns]
        for c, steps in enumerate(STEPS_C)
    ]
    assert np.isnan(expected_CG).any(axis=1).tolist() == [False, True, True, False, False, False]
    # Sums over the iterates are kept in the model's own precision.
    rtol = 1e-8 if kind == "linear" else 2e-3
    np.testing.assert_allclose(evidence.var_CG, expected_CG, rtol=rtol, atol=1e-9)
    assert torch.equal(evidence.vector_CP, observed.upload_CP)


@pytest.mark.parametrize("sampling", ["epoch", "replacement"])
def test_the_rescaled_trajectory_knows_how_many_examples_a_batch_really_has(sampling):
    """Batches are drawn with replacement at full size, or hold all of a client's few examples."""
    stack = stack_of("linear", sampling=sampling)
    observed, iterates_TCP = watched("linear", stack)
    rate_C = torch.linspace(0.1, 0.3, len(SIZES), dtype=torch.float64)
    evidence = estimate(
        trajectory_rescaled,
        NoOptions(),
        observed._replace(rate_C=rate_C),
        context_of("linear", curvature=0.4),
    )
    expected = []
    for c, (size, steps) in enumerate(zip(SIZES, STEPS_C.tolist(), strict=True)):
        tail_TP = iterates_TCP[steps // 2 : steps, c]
        batch = 20 if sampling == "replacement" else min(20, size)
        found = trajectory_rescaled.variance(tail_TP, batch, float(rate_C[c]), 0.4, size)
        expected.append(math.nan if found is None else found)
    np.testing.assert_allclose(evidence.var_CG[:, 0], expected, rtol=1e-8)
    assert torch.equal(evidence.vector_CP, observed.upload_CP)


# ---------------------------------------------------------------------------------------------
# split_half


def test_split_half_variance_is_a_quarter_of_the_mean_squared_difference():
    assert split_half.variance([1.0, 2.0, 3.0], [1.0, 4.0, 0.0]) == pytest.approx(13 / 12)


@GRANULARITIES
def test_the_split_half_estimator_trains_on_disjoint_halves_from_the_clients_start(granularity):
    """With batches of all examples training is gradient descent, done here by hand."""
    sizes = (25, 1, 7, 3)
    stack = stack_of("linear", sizes, batch_size=32)
    steps_C, rate_C = torch.tensor([4, 4, 6, 3]), torch.tensor([0.2, 0.2, 0.1, 0.3])
    observed = observed_of(stack, steps_C=steps_C)._replace(rate_C=rate_C.double())
    evidence = estimate(split_half, NoOptions(), observed, context_of("linear", granularity))
    assert torch.equal(evidence.vector_CP, observed.upload_CP)
    for c, size in enumerate(sizes):
        if size == 1:
            assert torch.isnan(evidence.var_CG[c]).all()
            continue
        x, y = examples(size)
        order = generator(SEED, "halves", 2, f"client-{size}").permutation(size)
        ends = []
        for half in (order[: (size + 1) // 2], order[(size + 1) // 2 :]):
            theta_P = observed.start_CP[c].numpy()
            for _ in range(int(steps_C[c])):
                at_P = torch.from_numpy(theta_P)
                grads_NP = gradients_by_hand("linear", at_P, x[half], y[half])
                theta_P = theta_P - float(rate_C[c]) * grads_NP.mean(0)
            ends.append(theta_P)
        for g, own in enumerate(columns_of("linear", granularity)):
            expected = split_half.variance(ends[0][own], ends[1][own])
            # The loop's rate is rounded to float32 on the way.
            assert float(evidence.var_CG[c, g]) == pytest.approx(expected, rel=1e-6, abs=1e-18)


def test_halves_are_drawn_anew_every_round():
    context = context_of("linear")
    one, other = (
        estimate(split_half, NoOptions(), stack_of("linear", (25,), round_index=r), context)
        for r in (0, 1)
    )
    assert abs(float(one.var_CG / other.var_CG) - 1) > 0.01


# ---------------------------------------------------------------------------------------------
# sample_size, and the limit of de-shrinking


def test_sample_size_is_a_constant_over_the_number_of_examples():
    assert sample_size.variance(40, 10.0) == 0.25
    config = sample_size.SampleSizeConfig(scale=6.0)
    observed = observed_of(stack_of("linear"), retained=0.75)
    evidence = estimate(sample_size, config, observed, context_of("linear", "parameter"))
    expected_CG = [[6.0 / size] * 18 for size in SIZES]
    undone_CP = observed.start_CP + 4 * (observed.upload_CP - observed.start_CP)
    assert_evidence(evidence, list(undone_CP), expected_CG, "linear")


@pytest.mark.parametrize(
    ("module", "config"),
    [(sample_size, sample_size.SampleSizeConfig()), (fisher, fisher.FisherConfig())],
)
def test_what_retains_more_than_nine_tenths_of_its_start_cannot_be_deshrunk(module, config):
    """Layer by layer: hidden0 and output of three clients."""
    retained = [[0.9, 0.2], [0.9001, 0.5], [0.0, 1.0]]
    observed = observed_of(stack_of("mlp", (25, 7, 3)), retained=retained)
    evidence = estimate(module, config, observed, context_of("mlp", "layer"))
    unknown = torch.isnan(evidence.var_CG).tolist()
    assert unknown == [[False, False], [True, False], [False, True]]
    moved_CP = observed.upload_CP - observed.start_CP
    for c in range(3):
        for g, own in enumerate(columns_of("mlp", "layer")):
            keep = 1.0 if unknown[c][g] else 1 - retained[c][g]
            expected = observed.start_CP[c, own] + moved_CP[c, own] / keep
            np.testing.assert_allclose(evidence.vector_CP[c, own], expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------
# A model that is a free vector: the truth is known


DIMENSION = 200


def vector_stack(sizes, noise_var=1.0):
    """Clients whose examples are draws around their optimum; the loss is |theta - y|^2 / 2."""
    rng = np.random.default_rng(12)
    model = linear(LinearConfig(bias=False, dtype="float64"), DataShape((1,), DIMENSION))
    parts = []
    for size in sizes:
        own = rng.normal(size=DIMENSION) + math.sqrt(noise_var) * rng.normal(size=(size, DIMENSION))
        target = np.stack(
            [np.stack([np.full_like(own, 50.0), own], 1), np.ones((size, 2, DIMENSION))], 2
        )
        parts.append((torch.ones(size, 1), torch.from_numpy(target)))
    options = TrainingConfig(batch_size=64, learning_rate=0.5)
    stack = Stack(
        tuple(f"client-{i}" for i in range(len(sizes))),
        rows_of(parts),
        64,
        RowEngine(model, REGRESSION, torch.device("cpu")),
        options,
        SEED,
        0,
        0.5,
    )
    return stack, model


def vector_context(model, known_var=None):
    return IntraContext(model.spec.groups("model"), 1.0, DIMENSION, known_var)


@pytest.mark.parametrize(
    ("module", "config"),
    [
        (gradient, NoOptions()),
        (gradient_chunks, gradient_chunks.GradientChunksConfig()),
        (split_half, NoOptions()),
    ],
)
@pytest.mark.parametrize("size", [4, 10, 40])
def test_three_estimators_measure_the_sampling_variance_of_the_local_optimum(module, config, size):
    """Unit noise: 1 / n, known here from 30 clients of 200 coordinates."""
    stack, model = vector_stack((size,) * 30)
    observed = observed_of(stack, steps_C=torch.full((30,), 60), rate=0.5)
    found_C = estimate(module, config, observed, vector_context(model)).var_CG[:, 0].numpy()
    error = found_C.std() / math.sqrt(30)
    assert error * size < 0.02
    assert found_C.mean() == pytest.approx(1 / size, abs=4 * error)


def test_the_known_estimator_returns_the_truth_and_the_optimum():
    stack, model = vector_stack((3, 8))
    context = vector_context(model, {"client-0": 0.25, "client-1": 4.0, "client-2": 9.0})
    evidence = estimate(known, NoOptions(), stack, context)
    assert evidence.var_CG.tolist() == [[0.25], [4.0]]
    own = stack.train.y[:, 1, 0]
    optima = torch.stack([own[:3].mean(0), own[3:].mean(0)])
    np.testing.assert_allclose(evidence.vector_CP, optima, rtol=1e-14)


def test_the_known_estimator_needs_data_with_a_known_truth():
    with pytest.raises(ConfigError, match="known needs data with known variances"):
        known.known(NoOptions(), vector_context(vector_stack((3,))[1]))


def test_the_known_estimator_needs_a_model_that_is_the_unknowns_themselves():
    with pytest.raises(ConfigError, match="parameters are the unknowns themselves"):
        known.known(NoOptions(), context_of("linear", known_var={"client-25": 1.0}))


# ---------------------------------------------------------------------------------------------
# What holds for all of them


def evidence_of(name, kind, sizes):
    """Two rounds of one stack under an estimator by name, with its default options."""
    stack = stack_of(kind, sizes)
    context = context_of(kind, "layer")
    estimator = intra_estimators.make(Component(name), context)
    steps_C = torch.tensor([4 + size % 3 for size in sizes])
    memory = estimator.init_memory(
        len(sizes), torch.zeros(stack.spec.num_params).to(stack.spec.dtype)
    )
    for shift in (1.0, 1.5):
        observed, _ = watched(kind, stack, steps_C)
        observed = by_group(observed, context)._replace(upload_CP=observed.upload_CP * shift)
        memory = estimator.remember(memory, observed)
    return estimator.estimate(memory, observed)


@KINDS
@pytest.mark.parametrize("name", [n for n in intra_estimators.names() if n != "known"])
def test_a_clients_evidence_has_the_same_bits_beside_any_neighbours(name, kind):
    together = evidence_of(name, kind, SIZES)
    for sizes in ((25,), (300, 25, 7), (3, 600)):
        apart = evidence_of(name, kind, sizes)
        at = [SIZES.index(size) for size in sizes]
        assert torch.equal(apart.vector_CP, together.vector_CP[at])
        assert torch.equal(apart.var_CG, together.var_CG[at])


def test_only_gradient_estimators_compare_gradients_and_only_trajectories_watch():
    made = {
        name: intra_estimators.make(Component(name), context_of("linear"))
        for name in intra_estimators.names()
        if name != "known"
    }
    assert {n for n, e in made.items() if not e.on_params} == {"gradient", "gradient_chunks"}
    assert {n for n, e in made.items() if e.watches} == {"trajectory", "trajectory_rescaled"}
