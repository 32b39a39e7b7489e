"""Rows of a stack: right gradients, and the same bits at any height and in any place."""

from __future__ import annotations

import dataclasses
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, reject, settings
from hypothesis import strategies as st
from torch import nn

from selffl_ray.errors import ConfigError
from selffl_ray.flat import ParamSpec
from selffl_ray.gradients import Height, RowEngine
from selffl_ray.models import cnn
from selffl_ray.models.base import Model, lift
from selffl_ray.models.build import ModelConfig, build_model
from selffl_ray.models.cnn import CNNConfig
from selffl_ray.models.linear import LinearConfig
from selffl_ray.models.mlp import MLPConfig
from selffl_ray.registry import Component
from selffl_ray.stacking import stack_on_cpu
from selffl_ray.tasks import CLASSIFICATION, DataShape

IMAGES = DataShape((1, 8, 8), 5)
CPU = torch.device("cpu")


def built(name, options, shape=IMAGES):
    return build_model(ModelConfig(component=Component(name, options)), shape)


def convolution():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5)
    )


def group_norm():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    )


def tanh_of_an_odd_width():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7), nn.Tanh(), nn.Linear(7, 5))


MODELS = {
    "linear": built("linear", LinearConfig()),
    "linear64": built("linear", LinearConfig(dtype="float64")),
    "mlp": built("mlp", MLPConfig(hidden=(17, 9))),
    "cnn": built("cnn", CNNConfig(channels=(3,), kernel=3, hidden=(7,))),
    "lifted convolution": lift(convolution, IMAGES),
    "lifted GroupNorm": lift(group_norm, IMAGES),
    "lifted tanh": lift(tanh_of_an_odd_width, IMAGES),
}
VECTOR = built("linear", LinearConfig(bias=False), DataShape((1,), 50))
"""One constant input and many outputs: needs pairs on some processors from some batch length on."""


def engine_of(model):
    return RowEngine(model, CLASSIFICATION, CPU)


def made_up(model, rows, batch):
    """Parameters, inputs, labels and weights of some rows; the last third of a batch is padding."""
    rng = np.random.default_rng(batch)
    theta_CP = torch.from_numpy(rng.normal(scale=0.2, size=(rows, model.spec.num_params)))
    x = torch.from_numpy(rng.normal(size=(rows, batch, *model.shape.input_shape))).float()
    y = torch.from_numpy(rng.integers(model.shape.num_outputs, size=(rows, batch)))
    weight = torch.zeros(rows, batch, dtype=model.spec.dtype)
    real = batch - batch // 3
    weight[:, :real] = 1 / real
    return theta_CP.to(model.spec.dtype), x, y, weight


# -- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_gradients_equal_autograd_of_each_rows_own_mean_loss(model):
    theta_CP, x, y, weight = made_up(model, 4, 6)
    loss_C, grad_CP = engine_of(model).loss_and_grad(theta_CP, x, y, weight)
    for row in range(4):
        theta_1P = theta_CP[row : row + 1].clone().requires_grad_()
        outputs = model.apply(model.spec.views(theta_1P), x[row : row + 1, :4])
        loss = F.cross_entropy(outputs[0], y[row, :4])
        loss.backward()
        torch.testing.assert_close(loss_C[row], loss.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad_CP[row], theta_1P.grad[0], rtol=1e-4, atol=1e-6)


def test_weights_scale_loss_and_gradient_of_each_example():
    model = MODELS["linear64"]
    engine = engine_of(model)
    theta_CP, x, y, _ = made_up(model, 2, 6)
    weight = torch.rand(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss_C, grad_CP = engine.loss_and_grad(theta_CP, x, y, weight)
    parts = []
    for place in range(6):
        at = slice(place, place + 1)
        parts.append(engine.loss_and_grad(theta_CP, x[:, at], y[:, at], torch.ones(2, 1).double()))
    torch.testing.assert_close(loss_C, sum(w * p[0] for w, p in zip(weight.T, parts, strict=True)))
    pieces = zip(weight.T, parts, strict=True)
    torch.testing.assert_close(grad_CP, sum(w[:, None] * p[1] for w, p in pieces))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_gradient_lands_where_it_is_asked_and_nothing_else_is_touched(model):
    engine = engine_of(model)
    theta_CP, x, y, weight = made_up(model, 3, 4)
    before, scratch = theta_CP.clone(), torch.full((5, model.spec.num_params), 7.0)
    scratch = scratch.to(model.spec.dtype)
    _, expected = engine.loss_and_grad(theta_CP, x, y, weight)
    _, grad_CP = engine.loss_and_grad(theta_CP, x, y, weight, scratch[:3])
    assert grad_CP.data_ptr() == scratch.data_ptr()
    assert torch.equal(scratch[:3], expected)
    assert (scratch[3:] == 7).all()
    assert torch.equal(theta_CP, before)
    assert not theta_CP.requires_grad


def test_a_parameter_that_the_loss_does_not_use_has_gradient_zero():
    def leaves_out_the_second(leaves, x):
        return x.flatten(2)[:, :, :5] * leaves[0].unsqueeze(1)

    spec = ParamSpec(("used.weight", "unused.weight"), ((5,), (3,)))
    model = Model(spec, IMAGES, leaves_out_the_second, lambda rng: torch.zeros(8))
    _, grad_CP = engine_of(model).loss_and_grad(*made_up(model, 2, 3))
    assert grad_CP[:, :5].any()
    assert not grad_CP[:, 5:].any()


# -- the same bits everywhere ---------------------------------------------------------------------


def assert_rows_keep_their_bits(model, batch):
    engine = engine_of(model)
    theta_CP, x, y, weight = made_up(model, 7, batch)
    loss_C, grad_CP = engine.loss_and_grad(theta_CP, x, y, weight)
    outputs = engine.outputs(theta_CP, x)
    for pick in ([0], [4], [6], [1, 5], [6, 0], [2, 3, 4], [6, 2, 0], [3, 6, 0, 5, 1, 4, 2]):
        some = engine.loss_and_grad(theta_CP[pick], x[pick], y[pick], weight[pick])
        assert torch.equal(some[0], loss_C[pick])
        assert torch.equal(some[1], grad_CP[pick])
        assert torch.equal(engine.outputs(theta_CP[pick], x[pick]), outputs[pick])


@pytest.mark.parametrize("batch", [1, 2, 5, 20, 64])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_rows_have_the_same_bits_at_any_height_and_place(model, batch):
    assert_rows_keep_their_bits(model, batch)


@pytest.mark.parametrize("batch", [1, 16, 32])
@pytest.mark.parametrize(("inputs", "hidden"), [(784, 100), (64, 8), (30, 33), (784, 10)])
def test_rows_of_the_tallest_stacks_have_the_bits_that_they_have_alone(inputs, hidden, batch):
    model = built("mlp", MLPConfig(hidden=(hidden,)), DataShape((inputs,), 10))
    tallest = stack_on_cpu(model)
    assert tallest > 20
    engine = engine_of(model)
    theta_CP, x, y, weight = made_up(model, tallest, batch)
    loss_C, grad_CP = engine.loss_and_grad(theta_CP, x, y, weight)
    outputs = engine.outputs(theta_CP, x)
    last = tallest - 1
    for pick in ([0], [last], [7, last - 1], list(range(13)), list(range(last, last - 20, -1))):
        some = engine.loss_and_grad(theta_CP[pick], x[pick], y[pick], weight[pick])
        assert torch.equal(some[0], loss_C[pick])
        assert torch.equal(some[1], grad_CP[pick])
        assert torch.equal(engine.outputs(theta_CP[pick], x[pick]), outputs[pick])


@pytest.mark.parametrize("batch", [1, 5, 20, 100, 256])
def test_a_free_vector_of_parameters_has_the_same_bits_at_any_height_and_place(batch):
    assert_rows_keep_their_bits(VECTOR, batch)


@settings(max_examples=20)
@given(
    inputs=st.integers(1, 40),
    hidden=st.lists(st.integers(1, 70), max_size=2),
    outputs=st.integers(1, 40),
    batch=st.integers(1, 130),
)
def test_dense_networks_of_any_shape_keep_their_bits(inputs, hidden, outputs, batch):
    shape = DataShape((inputs,), outputs)
    assert_rows_keep_their_bits(built("mlp", MLPConfig(hidden=tuple(hidden)), shape), batch)


@settings(max_examples=60)
@given(
    widths=st.lists(st.integers(2, 70), max_size=2),
    inputs=st.integers(2, 100),
    rows=st.integers(1, 6),
    batch=st.integers(1, 70),
    broken=st.booleans(),
)
def test_the_backward_pass_of_dense_networks_has_the_bits_of_automatic_differentiation(
    widths, inputs, rows, batch, broken
):
    """Also of a row that diverged: NaN must stay where it was."""
    own = built("mlp", MLPConfig(hidden=tuple(widths)), DataShape((inputs,), 4))
    theta_CP, *batches = made_up(own, rows, batch)
    if broken:
        theta_CP[0, 3] = float("nan")
    assert own.forward is not None
    found = engine_of(own).loss_and_grad(theta_CP, *batches)
    automatic = engine_of(dataclasses.replace(own, forward=None))
    for one, other in zip(found, automatic.loss_and_grad(theta_CP, *batches), strict=True):
        # But for the sign of a zero, which no step takes notice of.
        assert np.array_equal(one.numpy(), other.numpy(), equal_nan=True)


@settings(max_examples=100)
# Pooled numbers laid out otherwise than torch's would get other last bits here.
@example([4, 6], 1, 2, 0, 2, [], (1, 24, 17), 20, False, False)
@example([8, 4], 1, 1, 1, 2, [], (1, 29, 12), 9, False, False)
@given(
    channels=st.lists(st.integers(1, 6), min_size=1, max_size=2),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    pool=st.integers(1, 3),
    hidden=st.lists(st.integers(1, 9), max_size=1),
    image=st.tuples(st.integers(1, 3), st.integers(9, 20), st.integers(9, 20)),
    batch=st.integers(1, 20),
    flat=st.booleans(),
    broken=st.booleans(),
)
def test_pooling_with_channels_last_inside_keeps_all_bits_of_a_network(
    channels, kernel, stride, padding, pool, hidden, image, batch, flat, broken
):
    """Also where equal numbers meet in a window, as in the flat background of an image."""
    options = CNNConfig(
        channels=tuple(channels),
        kernel=kernel,
        stride=stride,
        padding=padding,
        pool=pool,
        hidden=tuple(hidden),
    )
    try:
        model = built("cnn", options, DataShape(image, 4))
    except ConfigError:
        # Nothing is left of the image.
        reject()
    theta_CP, x, y, weight = made_up(model, 2, batch)
    if flat:
        x = (x > 1).float()
    if broken:
        theta_CP[0, 0] = float("nan")
    found = engine_of(model).loss_and_grad(theta_CP, x, y, weight)
    # The usual order, with the ReLU first; the one behind it changes nothing then.
    with mock.patch.object(cnn, "_max_pool", lambda x, pool: F.max_pool2d(x.relu(), pool)):
        expected = engine_of(model).loss_and_grad(theta_CP, x, y, weight)
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one.numpy(), other.numpy(), equal_nan=True)
        numbers = ~one.isnan()
        # Also the sign of a zero.
        assert torch.equal(one[numbers].view(torch.int32), other[numbers].view(torch.int32))


def test_a_layer_of_one_unit_is_left_to_automatic_differentiation():
    """Its products' bits depend on how the result lies in memory."""
    assert built("mlp", MLPConfig(hidden=(1,))).forward is None
    assert built("mlp", MLPConfig(), DataShape((1,), 4)).forward is None
    assert built("mlp", MLPConfig(), DataShape((9,), 1)).forward is None


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_dense_networks_use_their_own_backward_pass_on_every_device(device):
    """``meta`` stands in for a GPU."""
    calls = []
    model = built("mlp", MLPConfig(hidden=(5,)))

    def forward(leaves, x):
        outputs, pull_back = model.forward(leaves, x)
        return outputs, lambda grad, out: calls.append(len(grad)) or pull_back(grad, out)

    own = dataclasses.replace(model, forward=forward)
    engine = RowEngine(own, CLASSIFICATION, torch.device(device))
    theta_CP, x, y, weight = (part.to(device) for part in made_up(model, 3, 4))
    engine.loss_and_grad(theta_CP, x, y, weight)
    calls.clear()
    engine.loss_and_grad(theta_CP, x, y, weight)
    assert calls == [3]


def test_dense_networks_take_the_gradient_of_the_loss_from_the_task_that_gives_one():
    """Otherwise autograd would do, with the same bits: nothing else shows which of them ran."""
    calls = []

    def loss_and_grad(*arguments):
        calls.append(len(arguments[0]))
        return CLASSIFICATION.loss_and_grad(*arguments)

    model = built("mlp", MLPConfig(hidden=(5,)))
    batch = made_up(model, 3, 4)
    found = {}
    for given_one in (loss_and_grad, None):
        task = dataclasses.replace(CLASSIFICATION, loss_and_grad=given_one)
        engine = RowEngine(model, task, CPU)
        engine.loss_and_grad(*batch)
        found[given_one] = engine.loss_and_grad(*batch)
    assert calls == [3, 3]
    for one, other in zip(found[loss_and_grad], found[None], strict=True):
        assert torch.equal(one, other)


def at_height(scale):
    """A linear model whose results depend on the height of the stack by ``scale(height)``."""

    def apply(leaves, x):
        rows = len(x)
        outputs = torch.bmm(x.flatten(2), leaves[0]) * scale(rows)
        return outputs if rows > 1 or scale(1) == scale(2) else outputs * scale(1)

    spec = ParamSpec(("output.weight",), ((64, 5),))
    return Model(spec, IMAGES, apply, lambda rng: torch.zeros(320))


@pytest.mark.parametrize(
    ("scale", "height"),
    [
        (lambda rows: 1.0, Height.ANY),
        (lambda rows: 1.001 if rows == 1 else 1.0, Height.PAIR),
        (lambda rows: 1.0 + 0.001 * rows, Height.ONE),
    ],
    ids=["any height", "pairs", "one by one"],
)
def test_arithmetic_that_depends_on_the_height_is_found_and_kept_from_the_rows(scale, height):
    model = at_height(scale)
    assert engine_of(model)._height((4, 1, 8, 8)) is height
    assert_rows_keep_their_bits(model, 4)


def test_a_last_row_that_differs_from_the_same_row_elsewhere_is_found():
    """As with tanh: a rest that fills no vector of numbers is computed by another formula."""

    def apply(leaves, x):
        outputs = torch.bmm(x.flatten(2), leaves[0])
        scale = torch.ones(len(x), 1, 1)
        scale[-1] += 0.001 * (len(x) % 2)
        return outputs * scale

    spec = ParamSpec(("output.weight",), ((64, 5),))
    model = Model(spec, IMAGES, apply, lambda rng: torch.zeros(320))
    assert engine_of(model)._height((4, 1, 8, 8)) is Height.ONE
    assert_rows_keep_their_bits(model, 4)


def test_a_model_that_does_not_stack_on_a_cpu_is_run_row_by_row():
    heights = []

    def apply(leaves, x):
        heights.append(len(x))
        return torch.bmm(x.flatten(2), leaves[0])

    spec = ParamSpec(("output.weight",), ((64, 5),))
    init = lambda rng: torch.zeros(320)  # noqa: E731
    engine = engine_of(Model(spec, IMAGES, apply, init, stacks_on_cpu=False))
    theta_CP, x, y, weight = made_up(engine.model, 3, 4)
    engine.outputs(theta_CP, x)
    engine.loss_and_grad(theta_CP, x, y, weight)
    assert set(heights) == {1}


# -- outputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 20, 100])
@pytest.mark.parametrize("model", [*MODELS.values(), VECTOR], ids=[*MODELS, "vector"])
def test_one_shared_row_gives_every_row_of_inputs_what_its_own_copy_would(model, batch):
    engine = engine_of(model)
    theta_CP, x, *_ = made_up(model, 5, batch)
    shared = engine.outputs(theta_CP[:1], x)
    assert shared.shape == (5, batch, model.shape.num_outputs)
    assert torch.equal(shared, engine.outputs(theta_CP[:1].repeat(5, 1), x))
    assert torch.equal(shared[3:4], engine.outputs(theta_CP[:1], x[3:4]))


def test_outputs_carry_no_graph():
    model = MODELS["mlp"]
    theta_CP, x, *_ = made_up(model, 2, 3)
    assert not engine_of(model).outputs(theta_CP.requires_grad_(), x).requires_grad
