"""The text network against nn.Modules, what padding may change (nothing), and its start."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from selffl_ray.errors import ConfigError
from selffl_ray.gradients import RowEngine
from selffl_ray.models.build import ModelConfig, build_model, start_params
from selffl_ray.models.textcnn import TextCNNConfig
from selffl_ray.registry import Component
from selffl_ray.tasks import CLASSIFICATION, DataShape

SHAPE = DataShape((9,), 4, num_tokens=11)


def built(shape=SHAPE, **options):
    config = TextCNNConfig(**{"embedding": 3, "channels": 5, **options})
    return build_model(ModelConfig(component=Component("textcnn", config)), shape)


def rows_and_tokens(model, rows=3, batch=4, low=0):
    rng = np.random.default_rng(1)
    theta_CP = torch.from_numpy(rng.normal(scale=0.4, size=(rows, model.spec.num_params))).float()
    size = (rows, batch, *model.shape.input_shape)
    return theta_CP, torch.from_numpy(rng.integers(low, model.shape.num_tokens, size=size))


def reference(named, text, kernel, pool, hidden):
    """One text without padding, through torch's own layers: (K,)."""
    embedding = nn.Embedding.from_pretrained(named["embedding.weight"])
    conv = nn.Conv1d(embedding.embedding_dim, len(named["conv.bias"]), kernel)
    # Stored (coordinate by place in the window, outputs); torch has (outputs, coordinates, places).
    weight = named["conv.weight"].T.reshape(conv.weight.shape)
    conv.load_state_dict({"weight": weight, "bias": named["conv.bias"]})
    behind = 0 if pool == "last" else kernel - 1
    vectors = F.pad(embedding(text).T, (0, behind))
    windows = conv(vectors).relu()
    pooled = {"mean": windows.mean(1), "max": windows.amax(1), "last": windows[:, -1]}[pool]
    for index in range(hidden):
        layer = pooled @ named[f"hidden{index}.weight"] + named[f"hidden{index}.bias"]
        pooled = layer.relu()
    return pooled @ named["output.weight"] + named["output.bias"]


@pytest.mark.parametrize("pool", ["mean", "max", "last"])
@pytest.mark.parametrize(("kernel", "hidden"), [(1, ()), (3, ()), (4, (7,))])
def test_it_is_an_embedding_a_convolution_pooling_and_dense_layers(pool, kernel, hidden):
    model = built(pool=pool, kernel=kernel, hidden=hidden)
    assert model.spec.layers == (
        "embedding", "conv", *(f"hidden{i}" for i in range(len(hidden))), "output"
    )  # fmt: skip
    theta_CP, x = rows_and_tokens(model, low=1)
    outputs = model.apply(model.spec.views(theta_CP), x)
    assert outputs.shape == (3, 4, 4)
    for row in range(3):
        named = model.spec.named(theta_CP[row])
        for at in range(4):
            expected = reference(named, x[row, at], kernel, pool, len(hidden))
            torch.testing.assert_close(outputs[row, at], expected)


@settings(max_examples=40)
@given(
    pool=st.sampled_from(["mean", "max"]),
    length=st.integers(0, 9),
    front=st.integers(0, 12),
    behind=st.integers(1, 12),
)
def test_padding_changes_no_output(pool, length, front, behind):
    """In front or behind, as much as one likes; a text of nothing has the output of its biases."""
    text = torch.from_numpy(np.random.default_rng(length).integers(1, 11, size=(1, 1, length)))
    short, long = DataShape((length + 1,), 4, 11), DataShape((length + front + behind,), 4, 11)
    alone, padded = built(short, pool=pool), built(long, pool=pool)
    theta_CP, _ = rows_and_tokens(alone, rows=1)
    leaves = alone.spec.views(theta_CP)
    first = alone.apply(leaves, F.pad(text, (0, 1)))
    second = padded.apply(leaves, F.pad(text, (front, behind)))
    torch.testing.assert_close(first, second)
    if not length:
        torch.testing.assert_close(second[0, 0], leaves[-1][0])


def test_the_last_window_alone_decides_with_pool_last():
    model = built(pool="last", kernel=3)
    theta_CP, x = rows_and_tokens(model)
    leaves = model.spec.views(theta_CP)
    before = model.apply(leaves, x)
    other = x.clone()
    other[..., :-3] = (other[..., :-3] + 1) % 11
    torch.testing.assert_close(model.apply(leaves, other), before, rtol=0, atol=0)
    other[..., -3] = other[..., -3] % 10 + 1
    assert not torch.allclose(model.apply(leaves, other), before)


@pytest.mark.parametrize("pool", ["mean", "max", "last"])
def test_the_vector_of_padding_and_those_of_absent_tokens_have_no_gradient(pool):
    model = built(pool=pool)
    theta_CP, x = rows_and_tokens(model, rows=2)
    x[0], x[1] = x[0] % 4, x[1] % 4 + 5
    x[:, :, -1] = 0
    engine = RowEngine(model, CLASSIFICATION, torch.device("cpu"))
    _, grad_CP = engine.loss_and_grad(
        theta_CP, x, torch.zeros((2, 4), dtype=torch.int64), torch.full((2, 4), 0.25)
    )
    gradient = model.spec.views(grad_CP)[0].abs().sum(2)
    seen = x[..., -3:] if pool == "last" else x
    for row in range(2):
        expected = sorted(set(seen[row].flatten().tolist()) - {0})
        assert torch.nonzero(gradient[row]).flatten().tolist() == expected


def test_it_starts_at_unit_vectors_and_he_scale():
    shape = DataShape((20,), 30, num_tokens=500)
    model = built(shape, embedding=20, channels=100, kernel=4)
    named = model.spec.named(torch.from_numpy(start_params(model, 0)))
    expected = {"embedding.weight": 1.0, "conv.weight": 2 / 80, "output.weight": 1 / 100}
    for name, variance in expected.items():
        assert float(named[name].var()) == pytest.approx(variance, rel=0.1)
    assert not named["conv.bias"].any()
    assert not named["output.bias"].any()


@pytest.mark.parametrize("name", ["linear", "mlp", "cnn"])
def test_networks_of_numbers_refuse_tokens(name):
    with pytest.raises(ConfigError, match=f"{name} needs features, .* tokens out of 11; use text"):
        build_model(ModelConfig(component=Component(name)), SHAPE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: built(DataShape((9,), 4)), r"textcnn needs a row of tokens.*shape \(9,\); use"),
        (lambda: built(DataShape((3, 3), 4, 7)), r"textcnn needs a row of tokens.*\(3, 3\)"),
        (lambda: built(pool="last", kernel=10), r"kernel: the last 10 tokens .* have 9; lower it"),
        (lambda: TextCNNConfig(kernel=0), r"model\.kernel must be >= 1, got 0"),
        (lambda: TextCNNConfig(embedding=0), r"model\.embedding must be >= 1, got 0"),
        (lambda: TextCNNConfig(channels=-1), r"model\.channels must be >= 1, got -1"),
        (lambda: TextCNNConfig(hidden=(3, 0)), r"model\.hidden must hold positive .*\[3, 0\]"),
    ],
)
def test_what_cannot_work_is_refused_with_its_value(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
