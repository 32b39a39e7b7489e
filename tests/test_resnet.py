"""The residual network: the layers that it has, what a block computes, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from selffl_ray.errors import ConfigError
from selffl_ray.gradients import RowEngine
from selffl_ray.models.build import ModelConfig, build_model, start_params
from selffl_ray.models.resnet import ResNetConfig
from selffl_ray.registry import Component
from selffl_ray.tasks import CLASSIFICATION, DataShape

SHAPE = DataShape((3, 8, 8), 5)


def built(config=ResNetConfig(), shape=SHAPE):  # noqa: B008
    return build_model(ModelConfig(component=Component("resnet", config)), shape)


def outputs(model, x_B, seed=0):
    theta = torch.from_numpy(start_params(model, seed))
    engine = RowEngine(model, CLASSIFICATION, torch.device("cpu"))
    return model.spec.named(theta), engine.outputs(theta[None], x_B[None])[0]


@pytest.mark.parametrize(("blocks", "layers"), [(1, 8), (3, 20), (5, 32)])
def test_three_stages_of_n_blocks_are_6n_and_2_layers_with_weights(blocks, layers):
    names = built(ResNetConfig(blocks=blocks)).spec.names
    on_the_path = [n for n in names if "shortcut" not in n and "norm" not in n]
    assert sum(n.endswith("weight") for n in on_the_path) == layers


def test_the_usual_one_has_the_papers_size():
    """0.27 million parameters (table 6 of the paper, ResNet-20)."""
    assert built(shape=DataShape((3, 32, 32), 10)).spec.num_params == pytest.approx(
        0.27e6, rel=0.02
    )


def test_outputs_are_those_of_the_formula_written_out():
    model = built(ResNetConfig(channels=(4, 8), blocks=2, groups=2))
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 3, 8, 8))).float()
    named, found = outputs(model, x)

    def conv(name, h, stride=1):
        weight = named[f"{name}.weight"]
        return F.conv2d(h, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(name, h):
        scale, shift = (named[f"{name}.{part}"].view(-1, 1, 1) for part in ("weight", "bias"))
        flat = h.reshape(len(h), 2, -1)
        centred = flat - flat.mean(2, keepdim=True)
        spread = (centred.square().mean(2, keepdim=True) + 1e-5).sqrt()
        return (centred / spread).view_as(h) * scale + shift

    h = norm("stem_norm", conv("stem", x)).clamp(min=0)
    for stage in (0, 1):
        for block in (0, 1):
            at, stride = f"stages.{stage}.{block}", 2 if (stage, block) == (1, 0) else 1
            inner = norm(f"{at}.norm1", conv(f"{at}.conv1", h, stride)).clamp(min=0)
            inner = norm(f"{at}.norm2", conv(f"{at}.conv2", inner))
            if stride == 2:
                h = norm(f"{at}.shortcut.1", conv(f"{at}.shortcut.0", h, stride))
            h = (inner + h).clamp(min=0)
    assert h.shape == (6, 8, 4, 4)
    expected = h.mean((2, 3)) @ named["output.weight"].T + named["output.bias"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_example_does_not_see_its_neighbours_in_the_batch():
    """As it would through BatchNorm, which has padding rows change the others."""
    model = built(ResNetConfig(channels=(8,), blocks=1))
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(5, 3, 8, 8))).float()
    _, whole = outputs(model, x)
    _, other = outputs(model, torch.cat([x[:2], 100 * x[2:]]))
    torch.testing.assert_close(whole[:2], other[:2], rtol=1e-5, atol=1e-6)


def test_convolutions_start_with_the_variance_that_keeps_gradients_level():
    named, _ = outputs(built(), torch.zeros(1, 3, 8, 8))
    for name in ("stages.1.1.conv2.weight", "stages.2.0.conv1.weight"):
        fan_out = named[name].shape[0] * 9
        assert float(named[name].std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.03), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNetConfig(channels=()), r"model\.channels needs at least one .*\[\]"),
        (lambda: ResNetConfig(channels=(8, 0)), r"model\.channels .*\[8, 0\]"),
        (lambda: ResNetConfig(blocks=0), r"model\.blocks must be >= 1, got 0"),
        (lambda: ResNetConfig(channels=(12,)), r"model\.groups must divide .*\[12\], got 8"),
        (lambda: ResNetConfig(groups=0), r"model\.groups .* got 0"),
        (lambda: built(shape=DataShape((9,), 4)), r"resnet needs images .*\(9,\); use mlp"),
        (lambda: built(shape=DataShape((9,), 4, 11)), "resnet needs features, .* tokens"),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
