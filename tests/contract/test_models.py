"""What every registered model must keep to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from selffl_ray.gradients import RowEngine
from selffl_ray.models.build import ModelConfig, build_model, start_params
from selffl_ray.registry import Component, models
from selffl_ray.tasks import CLASSIFICATION, DataShape

SHAPE = DataShape((1, 16, 16), 5)
SHAPES = {
    "textcnn": DataShape((12,), 5, num_tokens=30),
    "gru": DataShape((12,), 5, num_tokens=30),
}
"""Of models that do not take images."""
OPTIONS = {
    "cnn": {"channels": (4, 6), "kernel": 3, "hidden": (16,)},
    "resnet": {"channels": (4, 8), "blocks": 1, "groups": 2},
}


def build(name):
    kind = models.get(name).config_type
    component = Component(name, kind(**OPTIONS.get(name, {})))
    return build_model(ModelConfig(component=component), SHAPES.get(name, SHAPE))


def inputs(rng, model, *size):
    """Numbers, or tokens for a model that takes them."""
    shape = (*size, *model.shape.input_shape)
    if model.shape.num_tokens is not None:
        return torch.from_numpy(rng.integers(model.shape.num_tokens, size=shape))
    return torch.from_numpy(rng.normal(size=shape)).float()


@pytest.mark.parametrize("name", models.names())
def test_rows_have_the_same_outputs_and_gradients_at_any_height_and_place(name):
    model = build(name)
    engine = RowEngine(model, CLASSIFICATION, torch.device("cpu"))
    rng = np.random.default_rng(0)
    theta = torch.from_numpy(rng.normal(scale=0.1, size=(7, model.spec.num_params)))
    theta = theta.to(model.spec.dtype)
    x = inputs(rng, model, 7, 6)
    y = torch.from_numpy(rng.integers(5, size=(7, 6)))
    weight = torch.full((7, 6), 1 / 6)
    loss, grad = engine.loss_and_grad(theta, x, y, weight)
    outputs = engine.outputs(theta, x)
    for pick in ([0], [6], [3, 1], [5, 2, 0, 6]):
        part_loss, part_grad = engine.loss_and_grad(theta[pick], x[pick], y[pick], weight[pick])
        assert torch.equal(part_loss, loss[pick])
        assert torch.equal(part_grad, grad[pick])
        assert torch.equal(engine.outputs(theta[pick], x[pick]), outputs[pick])


@pytest.mark.parametrize("name", models.names())
def test_the_start_is_seeded_finite_and_leaves_torchs_generator_alone(name):
    before = torch.random.get_rng_state()
    model = build(name)
    first, again, other = (start_params(model, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.isfinite(first).all()
    assert first.shape == (model.spec.num_params,)
    assert name == "linear" or not np.array_equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("name", models.names())
def test_outputs_have_the_promised_shape_and_every_layer_a_name(name):
    model = build(name)
    engine = RowEngine(model, CLASSIFICATION, torch.device("cpu"))
    theta = torch.from_numpy(start_params(model, 0))[None]
    outputs = engine.outputs(theta, inputs(np.random.default_rng(0), model, 3, 2))
    assert outputs.shape == (3, 2, model.shape.num_outputs)
    assert set(model.spec.groups("layer").names) == set(model.spec.layers)
    assert model.spec.groups("layer").sizes_G.sum() == model.spec.num_params
