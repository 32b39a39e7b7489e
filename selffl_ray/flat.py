"""One flat vector a model, one row a client: names, slices, groups, and sums that keep their bits.

Shape letters: P parameters, C clients of a stack, G parameter groups.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from selffl_ray.errors import ModelError

Granularity = Literal["model", "layer", "parameter"]

FlatParams = Tensor
"""All parameters of one model: (P,)."""


@dataclass(frozen=True)
class ParamSpec:
    """Where each named parameter of a model lies in its flat vector.

    A layer is the name up to the last dot: ``hidden0.weight`` and ``hidden0.bias`` are ``hidden0``.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if len(self.names) != len(self.shapes):
            raise ModelError(f"{len(self.names)} parameter names but {len(self.shapes)} shapes")
        if len(set(self.names)) != len(self.names):
            raise ModelError(f"parameter names must differ, got {list(self.names)}")
        if not self.names:
            raise ModelError("the model has no parameters to train")

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of coordinates of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Start of each parameter in the flat vector, and its end as last entry."""
        return tuple(int(o) for o in np.concatenate([[0], np.cumsum(self.sizes)]))

    @property
    def num_params(self) -> int:
        """P."""
        return self.offsets[-1]

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Layer names in order of first appearance."""
        return tuple(dict.fromkeys(name.rpartition(".")[0] or name for name in self.names))

    def views(self, theta_CP: Tensor) -> tuple[Tensor, ...]:
        """The parameters of every row, (C, *shape) each; views, nothing is copied."""
        rows = theta_CP.shape[0]
        parts = theta_CP.split_with_sizes(self.sizes, 1)
        return tuple(
            part.view(rows, *shape) for part, shape in zip(parts, self.shapes, strict=True)
        )

    def named(self, theta_P: Tensor) -> dict[str, Tensor]:
        """The parameters of one flat vector by name, for export."""
        return dict(zip(self.names, (v[0] for v in self.views(theta_P.unsqueeze(0))), strict=True))

    def flatten(self, params: Sequence[Tensor]) -> FlatParams:
        """One flat vector from the parameters in the order of ``names``."""
        return torch.cat([p.detach().reshape(-1).to(self.dtype) for p in params])

    def mask(self, layers: Iterable[str]) -> Tensor:
        """(P,) bool: True at the coordinates of the named layers.

        Raises:
            ModelError: a layer that the model does not have, with the list.
        """
        wanted = set(layers)
        if unknown := wanted - set(self.layers):
            raise ModelError(f"unknown layers {sorted(unknown)}; the model has {list(self.layers)}")
        mask_P = torch.zeros(self.num_params, dtype=torch.bool)
        for index, name in enumerate(self.names):
            if (name.rpartition(".")[0] or name) in wanted:
                mask_P[self.offsets[index] : self.offsets[index + 1]] = True
        return mask_P

    def groups(self, granularity: Granularity) -> Groups:
        """The coordinates that share one variance: the whole model, a layer, or each its own."""
        if granularity == "model":
            return Groups(("model",), (self.num_params,), (0,))
        if granularity == "layer":
            owner = tuple(self.layers.index(n.rpartition(".")[0] or n) for n in self.names)
            return Groups(self.layers, self.sizes, owner)
        count = self.num_params
        return Groups(tuple(str(i) for i in range(count)), (1,) * count, tuple(range(count)))


@dataclass(frozen=True)
class Groups:
    """A partition of the flat vector into parameter groups.

    ``piece_sizes`` are the lengths of consecutive slices, ``owners`` the group of each slice.
    """

    names: tuple[str, ...]
    piece_sizes: tuple[int, ...]
    owners: tuple[int, ...]

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.names)

    @cached_property
    def sizes_G(self) -> np.ndarray:
        """Number of coordinates of each group: (G,) int64."""
        sizes = np.zeros(self.num_groups, dtype=np.int64)
        np.add.at(sizes, np.asarray(self.owners), np.asarray(self.piece_sizes))
        return sizes

    @cached_property
    def _single(self) -> bool:
        return len(self.piece_sizes) == self.num_groups == sum(self.piece_sizes)

    def spread(self, values_CG: Tensor) -> Tensor:
        """A value a group, repeated over the group's coordinates: (C, G) -> (C, 1) or (C, P).

        One group stays (C, 1): it broadcasts.
        """
        if self.num_groups == 1 or self._single:
            return values_CG
        owners = torch.tensor(self.owners, device=values_CG.device)
        lengths = torch.tensor(self.piece_sizes, device=values_CG.device)
        return values_CG[:, owners].repeat_interleave(lengths, dim=1)

    def sum(self, rows_CP: Tensor) -> Tensor:
        """Sum over each group's coordinates in float64: (C, P) -> (C, G)."""
        rows = rows_CP.to(torch.float64)
        if self._single:
            return rows
        sums_CG = rows.new_zeros((rows.shape[0], self.num_groups))
        start = 0
        for size, owner in zip(self.piece_sizes, self.owners, strict=True):
            sums_CG[:, owner] += rows[:, start : start + size].sum(1)
            start += size
        return sums_CG

    def mean_square(self, rows_CP: Tensor) -> Tensor:
        """Mean of the squares over each group's coordinates in float64: (C, P) -> (C, G)."""
        sums = [self.sum(rows.double().square()) for rows in in_blocks(rows_CP)]
        return torch.cat(sums) / torch.from_numpy(self.sizes_G).to(rows_CP.device)


BLOCK_BYTES = 2**20
"""Several passes over so many bytes stay in a processor's cache."""


def in_blocks(rows_CP: Tensor) -> tuple[Tensor, ...]:
    """Views of some rows each, as many as fit a processor's cache in float64; at least one.

    For what takes several passes over rows that do not depend on each other: one pass after the
    other over all rows would go through memory each time. On a GPU all rows together.
    """
    if rows_CP.device.type != "cpu":
        return (rows_CP,)
    return torch.split(rows_CP, max(1, BLOCK_BYTES // max(1, 8 * rows_CP.shape[1])))


# ---------------------------------------------------------------------------------------------
# Sums over clients. Every term is rounded once to a fixed grid and added as an integer, so a sum
# has the same bits in whatever order and grouping its terms arrive: placement, retries and
# completion order cannot show in it, and a host may add up all of its clients before it sends.

GRID = 2.0**-36
"""Spacing of the grid: 1.5e-11, three orders below the resolution of a float32 weight of 0.05."""

LIMIT = 2.0**15
"""Terms must be smaller in magnitude than this, or the integer form cannot hold them."""

_MAGIC = 1.5 * 2.0**52
# Adding _MAGIC to |v| < 2**51 leaves round(v) in the low bits of the float64: its bit pattern,
# read as an integer, is _BIAS + round(v). Cheaper than a conversion, and rounds to nearest.
_BIAS = int(np.float64(_MAGIC).view(np.int64))

SUMMED_TOGETHER = 16
"""Rows that are summed in one go; those of a list are copied side by side first."""

SIDE_BY_SIDE = 32
"""The same where rows lie side by side on a processor: nothing is copied then, and lower stretches
would be more calls. So many rows leave a stretch of 4096 columns in the cache."""

LINE = 8
"""Numbers of 64 bits in a line of the cache."""


def exact_sum(rows: Sequence[Tensor] | Tensor, weights: Sequence[float] | Tensor) -> Tensor:
    """Sum of weight * row on the integer grid: (P,) int64, or of whatever shape a row has.

    Args:
        rows: (C, P) or C tensors of shape (P,), finite, |weight * row| < 2**15 (see
            :func:`representable`).
        weights: C numbers, or a tensor (C,), (C, 1) or (C, P).

    Returns:
        Integers; add those of other hosts, then :func:`exact_value`.

    Raises:
        ValueError: there are not as many weights as rows.
    """
    if len(rows) != len(weights):
        raise ValueError(f"{len(rows)} rows and {len(weights)} weights")
    first = rows[0]
    total_P = torch.empty(first.shape, dtype=torch.int64, device=first.device)
    weight = torch.as_tensor(weights, dtype=torch.float64).reshape(len(rows), -1)
    beside = isinstance(rows, Tensor) and first.device.type == "cpu"
    together = SIDE_BY_SIDE if beside else SUMMED_TOGETHER
    for at in range(0, len(rows), together):
        some = slice(at, at + together)
        part = rows[some] if isinstance(rows, Tensor) else torch.stack(tuple(rows[some]))
        # The grid is a power of two: scaling the weights by it rounds nothing.
        weight_C = weight[some].to(first.device) / GRID
        _add_terms(total_P.view(-1), part.flatten(1), weight_C, first=at == 0)
    return total_P


def _add_terms(total_P: Tensor, rows_CP: Tensor, weight: Tensor, *, first: bool) -> None:
    """Add rounded products, by stretches of columns that stay in the cache; ``first``: to nothing.

    Args:
        weight: (C, 1) or (C, P), float64, in steps of the grid.
    """
    rows, size = rows_CP.shape
    # Whole lines, or a wide register would touch two of them each time; and an odd number of
    # lines, or the beginnings of all rows would compete for the same few places of the cache.
    lines = (BLOCK_BYTES // (8 * rows * LINE) - 1) | 1
    most = max(LINE, size if rows_CP.device.type != "cpu" else lines * LINE)
    room_CS = torch.empty((rows, min(most, size)), dtype=torch.float64, device=rows_CP.device)
    # Wraps like the additions do, so the biases cancel exactly.
    bias = (_BIAS * rows + 2**63) % 2**64 - 2**63
    # Views of all stretches at once: made one by one they take as long as a pass.
    stretches = zip(
        torch.split(rows_CP, most, 1),
        torch.split(weight.expand(rows, size), most, 1),
        torch.split(total_P, most),
        strict=True,
    )
    for rows_CS, weight_CS, total_S in stretches:
        term_CS = room_CS[:, : len(total_S)].copy_(rows_CS).mul_(weight_CS).add_(_MAGIC)
        sum_S = total_S if first else torch.empty_like(total_S)
        torch.sum(term_CS.view(torch.int64), 0, out=sum_S).sub_(bias)
        if not first:
            total_S.add_(sum_S)


def exact_value(total_P: Tensor) -> Tensor:
    """The sum behind the integers of :func:`exact_sum`: (P,) float64."""
    return total_P.to(torch.float64, copy=True).mul_(GRID)


def representable(rows_CP: Tensor) -> Tensor:
    """(C,) bool: rows that are finite and within the limit of an exact sum of weights <= 1."""
    if rows_CP.shape[1] == 0:
        return torch.ones(rows_CP.shape[0], dtype=torch.bool)
    # One pass tells of nearly all rows: no sum of squares is below the largest of them, however it
    # is added up and rounded, and NaN compares false.
    good_C: Tensor = (torch.linalg.vector_norm(rows_CP, dim=1) < LIMIT).cpu()
    if bool(good_C.all()):
        return good_C
    # NaN compares false, and the largest and least of a row with NaN are NaN. Magnitudes would be
    # another pass, and memory for them.
    return ((rows_CP.amax(1) < LIMIT) & (rows_CP.amin(1) > -LIMIT)).cpu()


def digest(tensors: Iterable[Tensor], numbers: Iterable[int | str] = ()) -> str:
    """SHA-256 over the bits of tensors (with shape and dtype) and over integers or strings."""
    sha = hashlib.sha256()
    for tensor in tensors:
        array = tensor.detach().cpu().contiguous().numpy()
        sha.update(f"{array.dtype.str}{array.shape}|".encode())
        sha.update(array.reshape(-1).data)
    sha.update("|".join(str(n) for n in numbers).encode())
    return sha.hexdigest()
