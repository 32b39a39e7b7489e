"""The recurrent network against torch.nn.GRU, what padding may change (nothing), and its start."""

from __future__ import annotations

import math

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
from selffl_ray.models.gru import GRUConfig
from selffl_ray.registry import Component
from selffl_ray.tasks import CLASSIFICATION, DataShape

TEXT = DataShape((9,), 4, num_tokens=11)
WINDOW = DataShape((6, 12), 5)
LOG_MEL = DataShape((1, 5, 8), 3)
CPU = torch.device("cpu")


def built(shape=TEXT, **options):
    config = GRUConfig(**{"units": (7,), "embedding": 3, **options})
    return build_model(ModelConfig(component=Component("gru", config)), shape)


def rows_and_inputs(model, rows=3, batch=4, low=1):
    rng = np.random.default_rng(1)
    theta_CP = torch.from_numpy(rng.normal(scale=0.4, size=(rows, model.spec.num_params))).float()
    size = (rows, batch, *model.shape.input_shape)
    if model.shape.num_tokens is None:
        return theta_CP, torch.from_numpy(rng.normal(size=size)).float()
    return theta_CP, torch.from_numpy(rng.integers(low, model.shape.num_tokens, size=size))


class Reference(nn.Module):
    """torch's own layers for one client, with the weights of a row."""

    def __init__(self, named, units):
        super().__init__()
        self.table = named.get("embedding.weight")
        inputs = named["gru0.weight_ih"].shape[1]
        self.layers = nn.ModuleList()
        for index, own in enumerate(units):
            layer = nn.GRU(inputs, own, batch_first=True)
            layer.load_state_dict(
                {f"{part}_l0": named[f"gru{index}.{part}"]
                 for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
            )  # fmt: skip
            self.layers.append(layer)
            inputs = own
        self.output = nn.Linear(inputs, len(named["output.bias"]))
        self.output.load_state_dict({part: named[f"output.{part}"] for part in ("weight", "bias")})

    def forward(self, x):
        states = x.flatten(1, -2).transpose(1, 2) if self.table is None else self.table[x]
        for layer in self.layers:
            states, _ = layer(states)
        return self.output(states[:, -1])


CASES = {
    "text": (TEXT, (7,)),
    "text, two layers": (TEXT, (7, 4)),
    "windows of motion": (WINDOW, (7,)),
    "log-mel, two layers": (LOG_MEL, (3, 6)),
}


@pytest.mark.parametrize(("shape", "units"), CASES.values(), ids=CASES)
def test_outputs_are_those_of_torchs_recurrent_layers_and_a_dense_one(shape, units):
    model = built(shape, units=units)
    first = ("embedding",) if shape.num_tokens else ()
    assert model.spec.layers == (*first, *(f"gru{i}" for i in range(len(units))), "output")
    theta_CP, x = rows_and_inputs(model)
    outputs = model.apply(model.spec.views(theta_CP), x)
    assert outputs.shape == (3, 4, shape.num_outputs)
    for row in range(3):
        expected = Reference(model.spec.named(theta_CP[row]), units)(x[row])
        torch.testing.assert_close(outputs[row], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shape", "units"), CASES.values(), ids=CASES)
def test_gradients_of_a_stack_are_those_of_torchs_layers_row_by_row(shape, units):
    model = built(shape, units=units)
    theta_CP, x = rows_and_inputs(model)
    y = torch.arange(12).view(3, 4) % shape.num_outputs
    loss_C, grad_CP = RowEngine(model, CLASSIFICATION, CPU).loss_and_grad(
        theta_CP, x, y, torch.full((3, 4), 0.25)
    )
    for row in range(3):
        named = model.spec.named(theta_CP[row])
        net = Reference(named, units)
        if net.table is not None:
            net.table = nn.Parameter(named["embedding.weight"].clone())
        loss = F.cross_entropy(net(x[row]), y[row])
        loss.backward()
        torch.testing.assert_close(loss_C[row], loss, rtol=1e-5, atol=1e-5)
        found = model.spec.named(grad_CP[row])
        expected = {f"gru{i}.{name.removesuffix('_l0')}": p.grad
                    for i, layer in enumerate(net.layers)
                    for name, p in layer.named_parameters()}  # fmt: skip
        expected |= {f"output.{name}": p.grad for name, p in net.output.named_parameters()}
        if net.table is not None:
            expected["embedding.weight"] = net.table.grad
        assert expected.keys() == found.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("units", [(64,), (16,), (5, 3)])
@pytest.mark.parametrize("shape", [TEXT, WINDOW], ids=["text", "windows"])
def test_a_row_has_the_same_bits_alone_and_among_others(shape, units):
    """Also where the units of a batch fill no whole vectors of the processor."""
    model = built(shape, units=units)
    engine = RowEngine(model, CLASSIFICATION, CPU)
    theta_CP, x = rows_and_inputs(model, rows=6, batch=5, low=0)
    y, weight = torch.zeros((6, 5), dtype=torch.int64), torch.full((6, 5), 0.2)
    outputs = engine.outputs(theta_CP, x)
    _, grad_CP = engine.loss_and_grad(theta_CP, x, y, weight)
    for pick in ([0], [4], [5, 1, 3]):
        assert torch.equal(engine.outputs(theta_CP[pick], x[pick]), outputs[pick])
        _, own = engine.loss_and_grad(theta_CP[pick], x[pick], y[pick], weight[pick])
        assert torch.equal(own, grad_CP[pick])


@settings(max_examples=30, deadline=None)
@given(length=st.integers(0, 6), front=st.integers(0, 6), behind=st.integers(1, 6))
def test_padding_changes_no_output(length, front, behind):
    """In front or behind, as much as one likes; a text of nothing has the output of its biases."""
    text = torch.from_numpy(np.random.default_rng(length).integers(1, 11, size=(1, 1, length)))
    alone = built(DataShape((length + 1,), 4, 11))
    padded = built(DataShape((length + front + behind,), 4, 11))
    theta_CP, _ = rows_and_inputs(alone, rows=1)
    leaves = alone.spec.views(theta_CP)
    first = alone.apply(leaves, F.pad(text, (0, 1)))
    torch.testing.assert_close(padded.apply(leaves, F.pad(text, (front, behind))), first)
    if not length:
        torch.testing.assert_close(first[0, 0], leaves[-1][0])


def test_the_vector_of_padding_and_those_of_absent_tokens_have_no_gradient():
    model = built()
    theta_CP, x = rows_and_inputs(model, rows=2, low=0)
    x[0], x[1] = x[0] % 4, x[1] % 4 + 5
    x[:, :, :2] = 0
    _, grad_CP = RowEngine(model, CLASSIFICATION, CPU).loss_and_grad(
        theta_CP, x, torch.zeros((2, 4), dtype=torch.int64), torch.full((2, 4), 0.25)
    )
    gradient = model.spec.views(grad_CP)[0].abs().sum(2)
    for row in range(2):
        expected = sorted(set(x[row].flatten().tolist()) - {0})
        assert torch.nonzero(gradient[row]).flatten().tolist() == expected


def test_all_starts_uniform_in_one_by_the_root_of_the_units_and_vectors_normal():
    model = built(DataShape((9,), 30, num_tokens=200), units=(64, 40), embedding=20)
    named = model.spec.named(torch.from_numpy(start_params(model, 0)))
    assert float(named.pop("embedding.weight").var()) == pytest.approx(1.0, rel=0.1)
    for name, weights in named.items():
        bound = 1 / math.sqrt(64 if name.startswith("gru0") else 40)
        assert 0.9 * bound < float(weights.abs().max()) <= bound, name
        # The variance of a uniform one is bound^2 / 3; of n draws its relative error is
        # sqrt(0.8 / n): 16 % for the 30 of output.bias.
        relative = 4 * math.sqrt(0.8 / weights.numel())
        assert float(weights.var()) == pytest.approx(bound**2 / 3, rel=relative), name


@pytest.mark.parametrize(
    ("option", "names"),
    [({"units": (9,)}, {"gru0.weight_hh": (27, 9)}),
     ({"units": (9, 5)}, {"gru1.weight_ih": (15, 9), "output.weight": (4, 5)}),
     ({"embedding": 6}, {"embedding.weight": (11, 6), "gru0.weight_ih": (21, 6)})],
)  # fmt: skip
def test_options_set_the_sizes(option, names):
    spec = built(**option).spec
    found = dict(zip(spec.names, spec.shapes, strict=True))
    assert {name: found[name] for name in names} == names


def test_it_learns_to_remember_the_first_of_eight_tokens():
    """No model that sees the last few tokens can: they say nothing of the first."""
    shape = DataShape((8,), 6, num_tokens=6)
    model = built(shape, units=(32,), embedding=8)
    engine = RowEngine(model, CLASSIFICATION, CPU)
    theta_CP = torch.from_numpy(start_params(model, 0))[None]
    rng = np.random.default_rng(0)
    for _ in range(300):
        x = torch.from_numpy(rng.integers(1, 6, size=(1, 20, 8)))
        _, grad_CP = engine.loss_and_grad(theta_CP, x, x[:, :, 0], torch.full((1, 20), 0.05))
        theta_CP = theta_CP - 1.0 * grad_CP
    x = torch.from_numpy(rng.integers(1, 6, size=(1, 300, 8)))
    assert (engine.outputs(theta_CP, x).argmax(-1) == x[:, :, 0]).float().mean() > 0.95


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GRUConfig(units=()), r"model\.units needs at least one .*got \[\]"),
        (lambda: GRUConfig(units=(8, 0)), r"model\.units needs .*got \[8, 0\]"),
        (lambda: GRUConfig(embedding=0), r"model\.embedding must be >= 1, got 0"),
        (
            lambda: built(DataShape((72,), 7)),
            r"gru needs examples \(channels, time\), .*\(72,\); .*data\.features: raw",
        ),
        (lambda: built(DataShape((3, 3), 4, 7)), r"gru needs a row of tokens.*\(3, 3\)"),
    ],
)
def test_what_cannot_work_is_refused_with_its_value(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
