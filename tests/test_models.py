"""The built-in networks against nn.Modules, and what a lifted module may and may not be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from selffl_ray.errors import ConfigError, ModelError
from selffl_ray.models.base import lift
from selffl_ray.models.build import ModelConfig, build_model, start_params
from selffl_ray.models.cnn import CNNConfig
from selffl_ray.models.linear import LinearConfig
from selffl_ray.models.mlp import MLPConfig
from selffl_ray.registry import Component, models, register_model
from selffl_ray.tasks import DataShape

MNIST = DataShape((1, 28, 28), 10)
SMALL = DataShape((3, 9, 9), 4)


def built(name, options, shape, **part):
    return build_model(ModelConfig(component=Component(name, options), **part), shape)


def rows_and_inputs(model, rows=3, batch=5):
    rng = np.random.default_rng(1)
    theta_CP = torch.from_numpy(rng.normal(scale=0.2, size=(rows, model.spec.num_params)))
    x = torch.from_numpy(rng.normal(size=(rows, batch, *model.shape.input_shape))).float()
    return theta_CP.to(model.spec.dtype), x


def load_dense(layer, named, name):
    """Weights are stored (inputs, outputs); nn.Linear has them the other way round."""
    with torch.no_grad():
        layer.weight.copy_(named[f"{name}.weight"].T)
        if f"{name}.bias" in named:
            layer.bias.copy_(named[f"{name}.bias"])
    return layer


@pytest.fixture
def own_models(monkeypatch):
    """Entries registered by a test go with it."""
    models.names()
    monkeypatch.setattr(models, "_entries", dict(models._entries))


# -- built-in networks ----------------------------------------------------------------------------


def test_the_linear_model_is_one_dense_layer():
    model = built("linear", LinearConfig(), SMALL)
    assert dict(zip(model.spec.names, model.spec.shapes, strict=True)) == {
        "output.weight": (243, 4),
        "output.bias": (4,),
    }
    theta_CP, x = rows_and_inputs(model)
    outputs = model.apply(model.spec.views(theta_CP), x)
    for row in range(3):
        net = load_dense(nn.Linear(243, 4), model.spec.named(theta_CP[row]), "output")
        torch.testing.assert_close(outputs[row], net(x[row].flatten(1)))


def test_the_linear_model_without_bias_in_float64_is_a_matrix_product():
    model = built("linear", LinearConfig(bias=False, dtype="float64"), SMALL)
    assert model.spec.names == ("output.weight",)
    assert model.spec.num_params == 243 * 4
    theta_CP, x = rows_and_inputs(model)
    outputs = model.apply(model.spec.views(theta_CP), x)
    assert outputs.dtype == torch.float64
    expected = x.flatten(2).double() @ theta_CP.view(3, 243, 4)
    torch.testing.assert_close(outputs, expected)


@pytest.mark.parametrize("hidden", [(), (7,), (7, 5)])
def test_the_mlp_is_dense_layers_with_relu_between_them(hidden):
    model = built("mlp", MLPConfig(hidden=hidden), SMALL)
    names = [*(f"hidden{i}" for i in range(len(hidden))), "output"]
    assert model.spec.layers == tuple(names)
    theta_CP, x = rows_and_inputs(model)
    outputs = model.apply(model.spec.views(theta_CP), x)
    widths = (243, *hidden, 4)
    for row in range(3):
        named = model.spec.named(theta_CP[row])
        layers = [nn.Flatten()]
        for index, name in enumerate(names):
            layers += [nn.ReLU()] if index else []
            layers.append(load_dense(nn.Linear(widths[index], widths[index + 1]), named, name))
        torch.testing.assert_close(outputs[row], nn.Sequential(*layers)(x[row]))


CNNS = {
    "default": (CNNConfig(hidden=(12,)), MNIST),
    "two channels": (CNNConfig(channels=(5, 6), kernel=2, hidden=(7, 8)), SMALL),
    "log-mel, more bands than frames": (
        CNNConfig(channels=(4, 6), hidden=(9,)),
        DataShape((1, 40, 30), 10),
    ),
    "stride, padding, no pooling": (
        CNNConfig(channels=(5,), kernel=4, stride=2, padding=2, pool=1, hidden=()),
        SMALL,
    ),
}


@pytest.mark.parametrize(("config", "shape"), CNNS.values(), ids=CNNS)
def test_the_cnn_is_convolutions_with_relu_and_pooling_then_dense_layers(config, shape):
    model = built("cnn", config, shape)
    convs = [f"conv{i}" for i in range(len(config.channels))]
    dense = [*(f"hidden{i}" for i in range(len(config.hidden))), "output"]
    assert model.spec.layers == (*convs, *dense)
    theta_CP, x = rows_and_inputs(model)
    outputs = model.apply(model.spec.views(theta_CP), x)
    assert outputs.shape == (3, 5, shape.num_outputs)
    for row in range(3):
        named = model.spec.named(theta_CP[row])
        z = x[row]
        for name in convs:
            weight, bias = named[f"{name}.weight"], named[f"{name}.bias"]
            conv = nn.Conv2d(weight.shape[1], weight.shape[0], config.kernel,
                             stride=config.stride, padding=config.padding)  # fmt: skip
            conv.load_state_dict({"weight": weight, "bias": bias})
            z = F.max_pool2d(conv(z).relu(), config.pool)
        z = z.flatten(1)
        for index, name in enumerate(dense):
            weight = named[f"{name}.weight"]
            z = load_dense(nn.Linear(*weight.shape), named, name)(z.relu() if index else z)
        torch.testing.assert_close(outputs[row], z, rtol=1e-4, atol=1e-5)


def test_sizes_are_those_of_the_literature():
    # 2NN of one hidden layer: 784 * 100 + 100 + 100 * 10 + 10.
    assert built("mlp", MLPConfig(hidden=(100,)), MNIST).spec.num_params == 79_510
    # 832 + 51,264 + (64 * 4 * 4) * 512 + 512 + 5,130: McMahan's CNN without padding.
    assert built("cnn", CNNConfig(), MNIST).spec.num_params == 582_026


# -- the start ------------------------------------------------------------------------------------


def test_the_mlp_starts_at_he_scale_with_a_quieter_last_layer_and_no_biases():
    model = built("mlp", MLPConfig(hidden=(300, 200)), MNIST)
    named = model.spec.named(torch.from_numpy(start_params(model, 0)))
    for name, variance in (("hidden0", 2 / 784), ("hidden1", 2 / 300), ("output", 1 / 200)):
        weight = named[f"{name}.weight"]
        # The relative error of a variance of n draws is sqrt(2 / n): 3 % for the 2,000 of output.
        assert float(weight.var()) == pytest.approx(variance, rel=0.12)
        assert abs(float(weight.mean())) < 4 * np.sqrt(variance / weight.numel())
        assert not named[f"{name}.bias"].any()


def test_the_cnn_starts_at_he_scale_of_its_fan_in():
    model = built("cnn", CNNConfig(), MNIST)
    named = model.spec.named(torch.from_numpy(start_params(model, 0)))
    fans = {"conv0": 25, "conv1": 32 * 25, "hidden0": 1024}
    for name, fan_in in fans.items():
        assert float(named[f"{name}.weight"].var()) == pytest.approx(2 / fan_in, rel=0.15)
        assert not named[f"{name}.bias"].any()
    assert float(named["output.weight"].var()) == pytest.approx(1 / 512, rel=0.15)


def test_the_start_depends_on_the_seed_alone():
    model = built("mlp", MLPConfig(), SMALL)
    torch.manual_seed(1)
    first = start_params(model, 0)
    torch.manual_seed(2)
    np.testing.assert_array_equal(first, start_params(model, 0))
    other = start_params(model, 1)
    assert np.abs(other - first).max() > 0.1 * np.abs(first).max()


def test_a_linear_model_starts_at_zero():
    assert not start_params(built("linear", LinearConfig(), SMALL), 0).any()


# -- lifted modules -------------------------------------------------------------------------------


def residual():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.into = nn.Linear(6, 8)
            self.norm = nn.LayerNorm(8)
            self.out = nn.Linear(8, 3, bias=False)

        def forward(self, x):
            z = self.into(x)
            return self.out(z + torch.tanh(self.norm(z)))

    return Residual()


FLAT = DataShape((6,), 3)


def test_a_lifted_module_computes_what_the_module_computes():
    model = lift(residual, FLAT)
    assert model.spec.names == (
        "into.weight", "into.bias", "norm.weight", "norm.bias", "out.weight"
    )  # fmt: skip
    theta_CP, x = rows_and_inputs(model)
    outputs = model.apply(model.spec.views(theta_CP), x)
    for row in range(3):
        net = residual()
        net.load_state_dict(model.spec.named(theta_CP[row]))
        torch.testing.assert_close(outputs[row], net(x[row]))


def test_the_start_of_a_lifted_module_is_its_own_drawn_from_the_seed():
    model = lift(residual, FLAT)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = (start_params(model, seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    np.testing.assert_array_equal(first, again)
    named = model.spec.named(torch.from_numpy(first))
    assert named["norm.weight"].eq(1).all()
    assert 0 < float(named["into.weight"].abs().max()) <= 1 / np.sqrt(6)
    assert np.abs(other - first).max() > 0.1 * np.abs(first).max()


def test_lifting_leaves_torchs_generator_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    lift(residual, FLAT)
    assert torch.equal(before, torch.random.get_rng_state())


def with_norm(norm):
    return lambda: nn.Sequential(
        nn.Conv2d(3, 48, 3), norm(48), nn.ReLU(), nn.Flatten(), nn.Linear(48 * 49, 4)
    )


class WithBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Linear(6, 3)
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x):
        return self.scale(x) + self.shift


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


def frozen_head():
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    net[1].requires_grad_(False)
    return net


REFUSED = {
    "BatchNorm": (
        with_norm(nn.BatchNorm2d),
        r"layer '1' \(BatchNorm2d\) keeps running statistics.*set model.convert_norm: group",
    ),
    "BatchNorm without statistics": (
        with_norm(lambda c: nn.BatchNorm2d(c, track_running_stats=False)),
        r"layer '1' \(BatchNorm2d\) mixes the examples.*set model.convert_norm: group",
    ),
    "InstanceNorm with statistics": (
        with_norm(lambda c: nn.InstanceNorm2d(c, track_running_stats=True)),
        r"layer '1' \(InstanceNorm2d\) keeps running statistics.*use GroupNorm or LayerNorm",
    ),
    "Dropout": (
        lambda: nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5)),
        r"layer '1' \(Dropout\) draws from torch's global generator.*set its p to 0",
    ),
    "a buffer": (WithBuffer, "buffer 'shift' is not a parameter .* make it a parameter"),
    "shared parameters": (Shared, "parameters are shared between layers; give each layer its own"),
    "frozen parameters": (
        frozen_head,
        r"parameter '1.weight' is frozen \(requires_grad is False\).*make it trainable",
    ),
}


@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED)
def test_a_module_that_cannot_be_a_row_is_refused_by_layer_and_remedy(build, message):
    with pytest.raises(ModelError, match=message):
        lift(build, SMALL)


def test_a_module_without_parameters_is_refused():
    with pytest.raises(ModelError, match="no parameters to train"):
        lift(nn.Flatten, FLAT)


@pytest.mark.parametrize("build", [
    lambda: nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.0)),
    lambda: nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (3, 2)), nn.InstanceNorm1d(3),
                          nn.Flatten(), nn.Linear(6, 3)),
], ids=["dropout of nothing", "InstanceNorm without statistics"])  # fmt: skip
def test_layers_that_keep_nothing_and_draw_nothing_are_welcome(build):
    model = lift(build, FLAT)
    theta_CP, x = rows_and_inputs(model)
    assert model.apply(model.spec.views(theta_CP), x).shape == (3, 5, 3)


def test_convert_norm_puts_group_norm_of_at_most_32_channels_a_group_in_place():
    model = lift(with_norm(nn.BatchNorm2d), SMALL, convert_norm="group")
    theta_CP, x = rows_and_inputs(model)
    outputs = model.apply(model.spec.views(theta_CP), x)
    expected_net = with_norm(lambda c: nn.GroupNorm(2, c))()
    assert model.spec.names == tuple(name for name, _ in expected_net.named_parameters())
    for row in range(3):
        expected_net.load_state_dict(model.spec.named(theta_CP[row]))
        torch.testing.assert_close(outputs[row], expected_net(x[row]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("channels", "groups"), [(1, 1), (16, 1), (32, 1), (33, 3), (48, 2), (64, 2), (37, 37)]
)
def test_groups_divide_the_channels_into_as_few_as_hold_32(channels, groups):
    """Seen from outside: a shift of one whole group's inputs leaves the outputs as they are."""
    shape = DataShape((channels, 2, 2), channels)
    model = lift(
        lambda: nn.Sequential(nn.BatchNorm2d(channels), nn.Flatten(), nn.Linear(channels * 4, 2)),
        shape,
        convert_norm="group",
    )
    theta_CP, x = rows_and_inputs(model, rows=1)
    leaves = model.spec.views(theta_CP)
    size = channels // groups

    def changed(number):
        shifted = x.clone()
        shifted[:, :, :number] += 3.0
        return not torch.allclose(model.apply(leaves, shifted), model.apply(leaves, x), atol=1e-3)

    assert not changed(size)
    assert size == 1 or changed(size - 1)


# -- from a configuration -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OwnConfig:
    width: int = 5
    norm: bool = False


def test_a_users_factory_that_returns_a_module_is_lifted(own_models):
    @register_model("own", OwnConfig)
    def own(config, shape):
        """A network of one's own."""
        inputs = int(np.prod(shape.input_shape))
        norm = [nn.BatchNorm1d(config.width)] if config.norm else []
        return nn.Sequential(
            nn.Flatten(), nn.Linear(inputs, config.width), *norm, nn.Linear(config.width, 4)
        )

    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    model = built("own", OwnConfig(width=6), SMALL)
    start = start_params(model, 0)
    assert torch.equal(before, torch.random.get_rng_state())
    assert start.shape == (243 * 6 + 6 + 6 * 4 + 4,)
    theta_CP, x = rows_and_inputs(model)
    assert model.apply(model.spec.views(theta_CP), x).shape == (3, 5, 4)
    with pytest.raises(ModelError, match=r"'2' \(BatchNorm1d\) keeps running statistics"):
        built("own", OwnConfig(norm=True), SMALL)
    converted = built("own", OwnConfig(norm=True), SMALL, convert_norm="group")
    assert converted.spec.names[2:4] == ("2.weight", "2.bias")
    with pytest.raises(ConfigError, match=r"model.convert_norm: own has no BatchNorm to convert"):
        built("own", OwnConfig(), SMALL, convert_norm="group")


def test_a_factory_must_return_a_model_or_a_module(own_models):
    @register_model("wrong", OwnConfig)
    def wrong(config, shape):
        return 3

    with pytest.raises(ModelError, match="model 'wrong' made a int; its factory must return"):
        built("wrong", None, SMALL)


def test_a_conversion_without_effect_is_refused():
    with pytest.raises(
        ConfigError, match=r"model.convert_norm: mlp has no BatchNorm.*leave it out"
    ):
        built("mlp", MLPConfig(), SMALL, convert_norm="group")


def test_an_unknown_model_is_named_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"unknown model 'mpl' \(did you mean 'mlp'\?\)"):
        built("mpl", None, SMALL)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLPConfig(hidden=(64, 0)), r"model.hidden must hold positive.*\[64, 0\]"),
        (lambda: CNNConfig(channels=()), r"model.channels needs at least one.*got \[\]"),
        (lambda: CNNConfig(channels=(8, -1)), r"model.channels needs .*got \[8, -1\]"),
        (lambda: CNNConfig(hidden=(0,)), r"model.hidden positive ones.*and \[0\]"),
        (lambda: CNNConfig(kernel=0), "model.kernel must be >= 1, got 0"),
        (lambda: CNNConfig(stride=0), "model.stride must be >= 1, got 0"),
        (lambda: CNNConfig(pool=0), "model.pool must be >= 1, got 0"),
        (lambda: CNNConfig(padding=-1), "model.padding must be >= 0, got -1"),
    ],
)
def test_a_wrong_option_of_a_network_is_named_with_its_value(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_cnn_needs_images():
    with pytest.raises(ConfigError, match=r"cnn needs images .* shape \(6,\); use mlp or linear"):
        built("cnn", CNNConfig(), FLAT)


@pytest.mark.parametrize(
    ("config", "at"), [(CNNConfig(), 1), (CNNConfig(kernel=10), 0), (CNNConfig(pool=9), 0)]
)
def test_a_cnn_that_leaves_nothing_of_the_image_is_refused(config, at):
    message = rf"nothing is left of \(3, 9, 9\) images after convolution {at} .*padding"
    with pytest.raises(ConfigError, match=message):
        built("cnn", config, SMALL)
