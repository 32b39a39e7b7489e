"""Recurrent network: gated recurrent units over text or signals; the last state gives the outputs.

Of text it predicts the next token or a class, of signals (channels, time) a class. A module of
torch, lifted to stacks (``selffl_ray.models.base.lift``). ``torch.nn.GRU`` itself cannot be: its
kernel takes one set of weights and has no rule under ``vmap``. The units are therefore written as
matrix products. Their weights, names and start are those of ``torch.nn.GRUCell`` (gates in the
order reset, update, candidate):

    r = sigmoid(W_r x + b_r + U_r h + c_r)        z = sigmoid(W_z x + b_z + U_z h + c_z)
    n = tanh(W_n x + b_n + r * (U_n h + c_n))     h' = n + z * (h - n)

Source: Cho et al. 2014, "Learning phrase representations using RNN encoder-decoder for statistical
machine translation"; with the reset gate behind the product, as cuDNN and torch have it.

Token 0 is padding: the state passes it unchanged, so outputs do not depend on how far a text was
padded, in front or behind, and its vector is never trained.

Time steps run one after the other, each a small product for the whole stack; on a CPU a batch of 80
characters costs some fifty times what ``textcnn`` does with its eight.

Shape letters: B examples, L time steps, E inputs of a layer, H units, G = 3 H gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selffl_ray.errors import ConfigError
from selffl_ray.models.base import channels_by_time
from selffl_ray.registry import register_model
from selffl_ray.tasks import DataShape


@dataclass(frozen=True, kw_only=True)
class GRUConfig:
    """Options of ``model: {name: gru}``."""

    units: tuple[int, ...] = (64,)
    """Units of each recurrent layer, the first one nearest to the input."""
    embedding: int = 16
    """Coordinates of a token's vector; only tokens have one."""

    def __post_init__(self) -> None:
        if not self.units or any(units < 1 for units in self.units):
            raise ConfigError(
                f"model.units needs at least one positive number, got {list(self.units)}"
            )
        if self.embedding < 1:
            raise ConfigError(f"model.embedding must be >= 1, got {self.embedding}")


@register_model("gru", GRUConfig)
def gru(config: GRUConfig, shape: DataShape) -> nn.Module:
    """Layers ``embedding`` (of tokens), ``gru0``, ``gru1``, ..., ``output``.

    Start: embeddings N(0, 1), all else uniform in +-1 / sqrt(units), as in torch.

    Raises:
        ConfigError: neither a row of tokens nor (channels, time).
    """
    if shape.num_tokens is None:
        return Recurrent(channels_by_time("gru", shape)[0], config.units, shape.num_outputs)
    if len(shape.input_shape) != 1:
        raise ConfigError(
            "model.name gru needs a row of tokens, but the examples are tokens of shape "
            f"{shape.input_shape}; give texts of one line"
        )
    embedding = nn.Embedding(shape.num_tokens, config.embedding)
    return Recurrent(config.embedding, config.units, shape.num_outputs, embedding)


class Recurrent(nn.Module):
    """Recurrent layers and one dense layer on the last state: (B, ...) -> (B, K)."""

    def __init__(
        self,
        inputs: int,
        units: Sequence[int],
        outputs: int,
        embedding: nn.Embedding | None = None,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.depth = len(units)
        for index, (before, own) in enumerate(zip((inputs, *units), units, strict=False)):
            # Holds the weights and their start; its own kernel is not called.
            self.add_module(f"gru{index}", nn.GRUCell(before, own))
        self.output = nn.Linear(units[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Of tokens (B, L) or signals (B, channels..., L): outputs (B, K)."""
        if self.embedding is None:
            hidden_BLE, counts_BL = x.flatten(1, -2).transpose(1, 2), None
        else:
            hidden_BLE, counts_BL = self.embedding(x), x != 0
        for index in range(self.depth):
            cell = self.get_submodule(f"gru{index}")
            assert isinstance(cell, nn.GRUCell)
            hidden_BLE = _run_layer(cell, hidden_BLE, counts_BL)
        outputs: Tensor = self.output(hidden_BLE[:, -1])
        return outputs


def _run_layer(cell: nn.GRUCell, x_BLE: Tensor, counts_BL: Tensor | None) -> Tensor:
    """The states of one layer after every step, from a state of zeros: (B, L, H).

    Args:
        counts_BL: False where a step leaves the state as it is; None if all count.
    """
    # Taken apart at once: a slice a step would cost a gradient of all steps' size each.
    gates_LBG = F.linear(x_BLE, cell.weight_ih, cell.bias_ih).unbind(1)
    counts_LB = [None] * len(gates_LBG) if counts_BL is None else counts_BL.unbind(1)
    state_BH = x_BLE.new_zeros((x_BLE.shape[0], cell.weight_hh.shape[1]))
    states = []
    for gates_BG, counts_B in zip(gates_LBG, counts_LB, strict=True):
        new_BH = _unit(cell, gates_BG, state_BH)
        if counts_B is not None:
            new_BH = torch.where(counts_B.unsqueeze(-1), new_BH, state_BH)
        state_BH = new_BH
        states.append(state_BH)
    return torch.stack(states, 1)


def _unit(cell: nn.GRUCell, gates_BG: Tensor, state_BH: Tensor) -> Tensor:
    """The next state, from what the input adds to the gates and the state before."""
    own_BG = F.linear(state_BH, cell.weight_hh, cell.bias_hh)
    in_r, in_z, in_n = gates_BG.chunk(3, -1)
    own_r, own_z, own_n = own_BG.chunk(3, -1)
    reset, update = torch.sigmoid(in_r + own_r), torch.sigmoid(in_z + own_z)
    candidate = torch.tanh(in_n + reset * own_n)
    return candidate + update * (state_BH - candidate)
