"""The network over time against nn.Modules, its start, and a problem that needs shared weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from selffl_ray.errors import ConfigError
from selffl_ray.gradients import RowEngine
from selffl_ray.models.build import ModelConfig, build_model, start_params
from selffl_ray.models.cnn1d import CNN1DConfig
from selffl_ray.registry import Component
from selffl_ray.tasks import CLASSIFICATION, DataShape

WINDOW = DataShape((6, 100), 7)
LOG_MEL = DataShape((1, 40, 30), 10)
SMALL = DataShape((3, 11), 4)
CPU = torch.device("cpu")


def built(shape, **options):
    component = Component("cnn1d", CNN1DConfig(**options))
    return build_model(ModelConfig(component=component), shape)


def rows_and_inputs(model, rows=3, batch=5):
    rng = np.random.default_rng(1)
    theta_CP = torch.from_numpy(rng.normal(scale=0.2, size=(rows, model.spec.num_params))).float()
    x = torch.from_numpy(rng.normal(size=(rows, batch, *model.shape.input_shape))).float()
    return theta_CP, x


def reference(named, x, config):
    """One row through torch's own layers, its weights brought into their layouts: (B, K)."""
    z = x.flatten(1, -2)
    for index in range(len(config.channels)):
        stored = named[f"conv{index}.weight"]
        conv = nn.Conv1d(z.shape[1], stored.shape[1], config.kernel,
                         stride=config.stride, padding=config.padding)  # fmt: skip
        # Stored (channel by place in the window, outputs); torch has (outputs, channels, places).
        weight = stored.T.reshape(conv.weight.shape)
        conv.load_state_dict({"weight": weight, "bias": named[f"conv{index}.bias"]})
        z = F.max_pool1d(conv(z).relu(), config.pool)
    z = {"flatten": z.transpose(1, 2).flatten(1), "mean": z.mean(2), "max": z.amax(2)}[
        config.readout
    ]
    for index in range(len(config.hidden)):
        z = (z @ named[f"hidden{index}.weight"] + named[f"hidden{index}.bias"]).relu()
    return z @ named["output.weight"] + named["output.bias"]


CASES = {
    "default": ({}, WINDOW),
    "log-mel, the mean over time": ({"readout": "mean", "channels": (8,), "pool": 3}, LOG_MEL),
    "the maximum over time, no dense layer": (
        {"readout": "max", "kernel": 2, "hidden": (), "pool": 1},
        SMALL,
    ),
    "stride, padding, pooling with a rest": (
        {"channels": (5, 6), "kernel": 4, "stride": 2, "padding": 3, "hidden": (7, 8)},
        SMALL,
    ),
}


@pytest.mark.parametrize(("options", "shape"), CASES.values(), ids=CASES)
def test_it_is_convolutions_over_time_with_relu_and_pooling_then_dense_layers(options, shape):
    model, config = built(shape, **options), CNN1DConfig(**options)
    convs = tuple(f"conv{i}" for i in range(len(config.channels)))
    assert model.spec.layers == (*convs, *(f"hidden{i}" for i in range(len(config.hidden))),
                                 "output")  # fmt: skip
    theta_CP, x = rows_and_inputs(model)
    outputs = model.apply(model.spec.views(theta_CP), x)
    assert outputs.shape == (3, 5, shape.num_outputs)
    for row in range(3):
        expected = reference(model.spec.named(theta_CP[row]), x[row], config)
        torch.testing.assert_close(outputs[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"readout": "max", "padding": 2}])
def test_gradients_of_a_stack_are_those_of_each_row_through_torchs_layers(options):
    options = {"kernel": 3, "channels": (4, 5), "pool": 1, **options}
    model, config = built(SMALL, **options), CNN1DConfig(**options)
    theta_CP, x = rows_and_inputs(model)
    y = torch.arange(15).view(3, 5) % 4
    _, grad_CP = RowEngine(model, CLASSIFICATION, CPU).loss_and_grad(
        theta_CP, x, y, torch.full((3, 5), 0.2)
    )
    for row in range(3):
        theta_P = theta_CP[row].clone().requires_grad_()
        named = dict(zip(model.spec.names, (v[0] for v in model.spec.views(theta_P[None])),
                         strict=True))  # fmt: skip
        F.cross_entropy(_functional(named, x[row], config), y[row]).backward()
        torch.testing.assert_close(grad_CP[row], theta_P.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("readout", ["flatten", "mean", "max"])
def test_a_row_has_the_same_bits_alone_and_among_others(readout):
    model = built(SMALL, kernel=2, channels=(5, 7), readout=readout, hidden=(3,))
    engine = RowEngine(model, CLASSIFICATION, CPU)
    theta_CP, x = rows_and_inputs(model, rows=6)
    y, weight = torch.zeros((6, 5), dtype=torch.int64), torch.full((6, 5), 0.2)
    outputs = engine.outputs(theta_CP, x)
    _, grad_CP = engine.loss_and_grad(theta_CP, x, y, weight)
    for pick in ([0], [4], [5, 1, 3]):
        assert torch.equal(engine.outputs(theta_CP[pick], x[pick]), outputs[pick])
        _, own = engine.loss_and_grad(theta_CP[pick], x[pick], y[pick], weight[pick])
        assert torch.equal(own, grad_CP[pick])


def _functional(named, x, config):
    """As ``reference``, with a graph back to the weights."""
    z = x
    for index in range(len(config.channels)):
        stored = named[f"conv{index}.weight"]
        weight = stored.T.reshape(stored.shape[1], z.shape[1], config.kernel)
        z = F.conv1d(z, weight, named[f"conv{index}.bias"], padding=config.padding).relu()
    z = z.transpose(1, 2).flatten(1) if config.readout == "flatten" else z.amax(2)
    for index in range(len(config.hidden)):
        z = (z @ named[f"hidden{index}.weight"] + named[f"hidden{index}.bias"]).relu()
    return z @ named["output.weight"] + named["output.bias"]


def test_the_size_is_that_of_its_layers():
    # (6 * 5) * 32 + 32, (32 * 5) * 64 + 64, then 100 - 4 = 96, 48, 44, 22 moments: 22 * 64 inputs.
    assert built(WINDOW).spec.num_params == 992 + 10_304 + 1_408 * 64 + 64 + 64 * 7 + 7
    assert built(WINDOW, readout="mean").spec.num_params == 992 + 10_304 + 64 * 64 + 64 + 455


def test_it_starts_at_he_scale_of_its_fan_in():
    model = built(WINDOW)
    named = model.spec.named(torch.from_numpy(start_params(model, 0)))
    for name, variance in (("conv0", 2 / 30), ("conv1", 2 / 160), ("hidden0", 2 / 1408),
                           ("output", 1 / 64)):  # fmt: skip
        # The relative error of a variance of n draws is sqrt(2 / n): 7 % for the 448 of output.
        assert float(named[f"{name}.weight"].var()) == pytest.approx(variance, rel=0.2)
        assert not named[f"{name}.bias"].any()


@pytest.mark.parametrize("readout", ["mean", "max"])
def test_read_out_over_time_a_signal_may_lie_anywhere(readout):
    """Moved inside of zeros that are longer than the receptive field: the same outputs."""
    model = built(DataShape((3, 40), 4), readout=readout, pool=1, kernel=3)
    theta_CP, _ = rows_and_inputs(model, rows=1)
    x = torch.zeros(1, 2, 3, 40)
    signal = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 6))).float()
    x[0, 0, :, 8:14], x[0, 1, :, 21:27] = signal, signal
    outputs = model.apply(model.spec.views(theta_CP), x)
    torch.testing.assert_close(outputs[0, 0], outputs[0, 1])
    assert not torch.allclose(outputs[0, 0], model.apply(model.spec.views(theta_CP), 0 * x)[0, 0])


def waves(rng, count):
    """A short wave that rises first or falls first, anywhere in noise; classes 0 and 1."""
    y = rng.integers(2, size=count)
    x = rng.normal(scale=0.3, size=(count, 2, 30))
    wave = np.concatenate([np.ones(3), -np.ones(3)])
    for example, label in zip(x, y, strict=True):
        at = rng.integers(24)
        example[1, at : at + 6] += wave if label else -wave
    return torch.from_numpy(x).float()[None], torch.from_numpy(y)[None]


def test_it_learns_which_way_a_wave_goes_wherever_it_lies():
    """The mean of either class is zero at every moment, so that no linear model can tell."""
    model = built(DataShape((2, 30), 2), channels=(8,), readout="max", hidden=())
    engine = RowEngine(model, CLASSIFICATION, CPU)
    theta_CP = torch.from_numpy(start_params(model, 0))[None]
    rng = np.random.default_rng(0)
    for _ in range(200):
        x, y = waves(rng, 20)
        _, grad_CP = engine.loss_and_grad(theta_CP, x, y, torch.full((1, 20), 0.05))
        theta_CP = theta_CP - 0.1 * grad_CP
    x, y = waves(rng, 500)
    assert (engine.outputs(theta_CP, x).argmax(-1) == y).float().mean() > 0.95


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CNN1DConfig(channels=()), r"model\.channels needs at least one.*got \[\]"),
        (lambda: CNN1DConfig(channels=(8, 0)), r"model\.channels needs .*got \[8, 0\]"),
        (lambda: CNN1DConfig(hidden=(0,)), r"model\.hidden positive ones.*and \[0\]"),
        (lambda: CNN1DConfig(kernel=0), r"model\.kernel must be >= 1, got 0"),
        (lambda: CNN1DConfig(stride=0), r"model\.stride must be >= 1, got 0"),
        (lambda: CNN1DConfig(pool=0), r"model\.pool must be >= 1, got 0"),
        (lambda: CNN1DConfig(padding=-1), r"model\.padding must be >= 0, got -1"),
        (
            lambda: built(DataShape((72,), 7)),
            r"cnn1d needs examples \(channels, time\), .* \(72,\); .*data\.features: raw",
        ),
        (lambda: built(DataShape((9,), 4, 11)), "cnn1d needs features, .* use textcnn or gru"),
        (
            lambda: built(SMALL),
            r"nothing is left of 11 moments after convolution 1 \(kernel 5, stride 1, pool 2\)",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_its_value(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
