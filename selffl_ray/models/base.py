"""What a model is to the rest of the package, and how any ``nn.Module`` becomes one.

A model is applied to a stack: parameters (C, *shape) each and inputs (C, B, *input_shape) give
outputs (C, B, K), where row c of the outputs depends on row c of the inputs only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from selffl_ray.errors import ConfigError, ModelError
from selffl_ray.flat import FlatParams, ParamSpec
from selffl_ray.tasks import DataShape

Leaves = tuple[Tensor, ...]

PullBack = Callable[[Tensor, Leaves], None]
"""(gradient of the outputs (C, B, K), where to write those of the parameters (C, *shape) each)."""


@dataclass(frozen=True)
class Model:
    """A stackable model.

    apply: (parameters in the order of spec.names, (C, *shape) each; x_CB...) -> outputs_CBK.
    init: generator -> the start of training, (P,).
    stacks_on_cpu: False if a taller stack is slower on a CPU (convolutions); rows then go one by
        one there.
    forward: what ``apply`` gives, bit for bit, and how a gradient of the outputs goes back to the
        parameters, on any device and without waiting for it. Between the two it keeps no more than
        automatic differentiation would, so its stacks may be taller. None leaves the way back to
        that, which allocates each gradient.
    """

    spec: ParamSpec
    shape: DataShape
    apply: Callable[[Leaves, Tensor], Tensor]
    init: Callable[[np.random.Generator], FlatParams]
    stacks_on_cpu: bool = True
    forward: Callable[[Leaves, Tensor], tuple[Tensor, PullBack]] | None = None


def refuse_tokens(name: str, shape: DataShape) -> None:
    """Of a model that takes numbers: token ids are names, not quantities.

    Raises:
        ConfigError: the examples are tokens.
    """
    if shape.num_tokens is not None:
        raise ConfigError(
            f"model.name {name} needs features, but the examples are tokens out of "
            f"{shape.num_tokens}; use textcnn or gru"
        )


def channels_by_time(name: str, shape: DataShape) -> tuple[int, int]:
    """Numbers of channels and of moments, of a model whose examples have time as their last axis.

    Raises:
        ConfigError: the examples have one axis only.
    """
    if len(shape.input_shape) < 2:
        raise ConfigError(
            f"model.name {name} needs examples (channels, time), but they have shape "
            f"{shape.input_shape}; give raw signals (watch: data.features: raw) or use mlp"
        )
    return math.prod(shape.input_shape[:-1]), shape.input_shape[-1]


ModuleFactory = Callable[[], nn.Module]


def lift(build: ModuleFactory, shape: DataShape, *, convert_norm: str | None = None) -> Model:
    """A stackable model from any ``nn.Module`` without buffers, by ``functional_call`` + ``vmap``.

    Args:
        build: makes the module; its initial weights are drawn from the experiment's ``init``
            stream, with torch's global generator put back afterwards.
        shape: what the module maps from and to; it is called with (B, *input_shape).
        convert_norm: ``"group"`` replaces BatchNorm by GroupNorm.

    Raises:
        ModelError: BatchNorm or other running statistics, other buffers, dropout, or parameters
            that are frozen or shared between layers; each names the layer and the remedy.
    """

    def prepared() -> nn.Module:
        module = build()
        if convert_norm == "group":
            module = _batch_to_group_norm(module)
        return module

    with torch.random.fork_rng(devices=[]):
        skeleton = prepared()
    _refuse_unstackable(skeleton)
    names = tuple(name for name, _ in skeleton.named_parameters())
    spec = ParamSpec(names, tuple(tuple(p.shape) for p in skeleton.parameters()))

    def one(leaves: Leaves, x: Tensor) -> Tensor:
        named = dict(zip(names, leaves, strict=True))
        outputs: Tensor = torch.func.functional_call(skeleton, named, (x,))
        return outputs

    def init(rng: np.random.Generator) -> FlatParams:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**63)))
            return spec.flatten(list(prepared().parameters()))

    return Model(spec, shape, torch.func.vmap(one, randomness="error"), init)


def _named_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name or type(module).__name__, layer) for name, layer in module.named_modules())


def _refuse_unstackable(module: nn.Module) -> None:
    for name, layer in _named_layers(module):
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.track_running_stats:
            raise ModelError(
                f"layer {name!r} ({type(layer).__name__}) keeps running statistics, which are "
                "neither parameters nor data of a client; set model.convert_norm: group, or use "
                "GroupNorm or LayerNorm"
            )
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise ModelError(
                f"layer {name!r} ({type(layer).__name__}) mixes the examples of a batch, of which "
                "some are padding; set model.convert_norm: group, or use GroupNorm or LayerNorm"
            )
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0:
            raise ModelError(
                f"layer {name!r} ({type(layer).__name__}) draws from torch's global generator, so "
                "results would depend on placement; set its p to 0 or leave it out"
            )
    for name, _ in module.named_buffers():
        raise ModelError(
            f"buffer {name!r} is not a parameter and would be shared between clients; compute it "
            "in forward() or make it a parameter"
        )
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            raise ModelError(
                f"parameter {name!r} is frozen (requires_grad is False), but every parameter of a "
                "lifted module is trained; make it trainable"
            )
    shared = len(list(module.named_parameters(remove_duplicate=False)))
    if shared != len(list(module.parameters())):
        raise ModelError("parameters are shared between layers; give each layer its own")


def has_batch_norm(module: nn.Module) -> bool:
    """Whether any layer is a BatchNorm."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())


def _batch_to_group_norm(module: nn.Module) -> nn.Module:
    """The same module with every BatchNorm replaced by GroupNorm over groups of <= 32 channels."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        channels = module.num_features
        groups = next(g for g in range(-(-channels // 32), channels + 1) if channels % g == 0)
        return nn.GroupNorm(groups, channels, eps=module.eps, affine=module.affine)
    for name, child in module.named_children():
        setattr(module, name, _batch_to_group_norm(child))
    return module
