"""What an algorithm is: a value made of pure functions over rows, one row a client.

State goes in and comes out; nothing is mutated. Servers, shared and per-client messages, states,
payloads and reports are NamedTuples of tensors: per-client ones have the client as first axis, so
they split, travel and are saved by rows.

One round, as the driver and the hosts run it (see ``driver.py`` and ``host.py``):

1. ``broadcast(server, plan)`` -> what all clients get, and a row for each client of the cohort.
2. ``local_update(shared, per_client, state, stack)`` in the hosts, stack by stack.
3. the ``reductions``, in order. A :class:`Mean` comes back with the reports; a :class:`Total` is
   weighed by the server once all have reported, and may sum over every client ever seen; a
   :class:`Gather` brings single rows.
4. ``aggregate(server, sums, reports)`` -> the next server.

Shape letters: C clients of a stack, P parameters, G parameter groups, M all clients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from selffl_ray.datasets.base import KnownVariances
from selffl_ray.flat import FlatParams, Groups, ParamSpec
from selffl_ray.participation import RoundPlan
from selffl_ray.training import Stack, TrainingConfig

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Federation:
    """What driver and hosts know about the clients before the first round.

    client_ids: M names of the clients that take part, in index order; num_examples_M: their
    training examples; num_examples_new: (N,) those of clients held out as new, whose indices
    follow from M; known: the variances behind synthetic data, of the M.
    """

    client_ids: tuple[str, ...]
    num_examples_M: Indices
    num_examples_new: Indices
    spec: ParamSpec
    training: TrainingConfig
    num_outputs: int
    known: KnownVariances | None = None

    @property
    def examples_of(self) -> dict[str, int]:
        """Training examples of those that take part, by name, in index order."""
        return dict(zip(self.client_ids, self.num_examples_M.tolist(), strict=True))

    @property
    def num_clients(self) -> int:
        """M."""
        return len(self.client_ids)

    @property
    def num_all(self) -> int:
        """M + N."""
        return len(self.client_ids) + len(self.num_examples_new)


class Empty(NamedTuple):
    """No message, no state or no report."""


class Local(NamedTuple):
    """What a local update leaves, row by row.

    state: kept by the client for the next round. payload: what the reductions read; the host
    keeps it only if one needs it after all have reported. report: numbers for the server. loss_C:
    mean training loss. gradients_C: mini-batch gradients computed, the unit of cost.
    """

    state: Any
    payload: Any
    report: Any
    loss_C: Tensor
    gradients_C: Tensor


class Personal(NamedTuple):
    """Personalized models (C, P), and the mini-batch gradients that they cost: (C,)."""

    params_CP: Tensor
    gradients_C: Tensor


class Reports(NamedTuple):
    """What the server knows once the cohort has answered.

    plan: the round's. client_index: clients whose updates were accepted, ascending. rows: the
    reports of these clients, stacked in that order.
    """

    plan: RoundPlan
    client_index: Indices
    rows: Any


class Weights(NamedTuple):
    """Weights of a :class:`Total`: client indices (K,), and (K,) or (K, G) float64 weights."""

    client_index: Indices
    weight: Floats


Sums = tuple[Tensor, ...]
"""Results of the reductions so far, in their order: (P',) float64, or (K, P') rows of a Gather."""


@dataclass(frozen=True)
class Mean:
    """Mean over the accepted clients of rows(payload), weighted by examples or uniformly."""

    rows: Callable[[Any], Tensor]
    by: Literal["num_examples", "uniform"] = "num_examples"


@dataclass(frozen=True)
class Total:
    """Sum of weight * rows, with weights that the server knows only after all have reported.

    of: ``payload`` sums over this round's accepted clients, ``state`` over any client that ever
    took part (absent clients' rows are those that they kept). weigh: (server, reports, sums) ->
    (server, weights). groups: set if the weights are (K, G).
    """

    rows: Callable[[Any], Tensor]
    weigh: Callable[[Any, Reports, Sums], tuple[Any, Weights]]
    of: Literal["payload", "state"] = "payload"
    groups: Groups | None = None


@dataclass(frozen=True)
class Gather:
    """Single rows of the accepted clients at the server. The factory must check their number."""

    rows: Callable[[Any], Tensor]


Reduction = Mean | Total | Gather


class UncertaintyRows(NamedTuple):
    """Rows of ``uncertainty.parquet``: one a client and parameter group; all of one length."""

    client_index: Indices
    group: npt.NDArray[np.str_]
    intra_var: Floats
    inter_var: Floats
    shrinkage: Floats
    num_local_steps: Floats
    learning_rate: Floats
    agg_weight: Floats


class Alarm(NamedTuple):
    """Something about a round that a person should know, or that it was looked for and not found.

    metric: 1 if raised and 0 if not; text: what it means and what to do, in one line, None if it is
    not raised. A run says each alarm once, as a warning.
    """

    metric: str
    text: str | None


class Record(NamedTuple):
    """What an aggregation tells the tables: metrics by their contract names, rows, and alarms."""

    metrics: Mapping[str, float]
    uncertainty: UncertaintyRows | None = None
    alarms: tuple[Alarm, ...] = ()


class Traffic(NamedTuple):
    """Numbers that the method would send over a network for each participant of a round."""

    down: int
    up: int


@dataclass(frozen=True)
class NotAvailable:
    """There is no global model, and why."""

    reason: str


NOTHING = Record({})


def at_no_cost(params_CP: Tensor) -> Personal:
    """Personalized models that are there already."""
    return Personal(params_CP, torch.zeros(len(params_CP), dtype=torch.int64))


def stateless(params_P: FlatParams, num_clients: int) -> Empty:
    """Clients remember nothing."""
    return Empty()


def use_global_params(shared: Any, per_client: Any, state: Any, stack: Stack) -> Personal:
    """The client predicts with the global model: the first field of what is shared."""
    return at_no_cost(shared[0].expand(stack.num_clients, -1))


def the_params(server: Any) -> FlatParams:
    """The server's first field is the global model."""
    params: FlatParams = server[0]
    return params


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """Everything that the driver and the hosts know about an algorithm.

    init: start of the global model -> server state.
    broadcast: (server, plan) -> (shared, per_client rows of the cohort); also called to evaluate,
        with the evaluated clients as cohort.
    local_update: (shared, per_client, state, stack) -> Local.
    reductions: what the server asks of payloads and states, in order.
    aggregate: (server, sums, reports) -> (server, record).
    init_client: (start of the global model, C) -> state rows of clients that never took part.
    global_params: server -> the global model, or why there is none.
    personalize: (shared, per_client, state, stack) -> Personal, from the newest broadcast and the
        newest state.
    adapt: (shared, per_client, state, stack) -> state of a client that was never seen, before it
        is personalized. The state that one local update leaves, by default.
    traffic: plan -> numbers sent a participant.
    cautions: what the options make void or equal to another method, a sentence each; said before
        the run starts.
    """

    init: Callable[[FlatParams], Any]
    broadcast: Callable[[Any, RoundPlan], tuple[Any, Any]]
    local_update: Callable[[Any, Any, Any, Stack], Local]
    reductions: tuple[Reduction, ...]
    aggregate: Callable[[Any, Sums, Reports], tuple[Any, Record]]
    traffic: Callable[[RoundPlan], Traffic]
    init_client: Callable[[FlatParams, int], Any] = stateless
    global_params: Callable[[Any], FlatParams | NotAvailable] = the_params
    personalize: Callable[[Any, Any, Any, Stack], Personal] = use_global_params
    adapt: Callable[[Any, Any, Any, Stack], Any] | None = None
    cautions: tuple[str, ...] = ()

    @property
    def means(self) -> tuple[Mean, ...]:
        """The reductions whose weights are known before anybody trains."""
        return tuple(r for r in self.reductions if isinstance(r, Mean))

    @property
    def keeps_payloads(self) -> bool:
        """Whether the server asks for payloads again once all have reported."""
        return any(
            isinstance(r, Gather) or (isinstance(r, Total) and r.of == "payload")
            for r in self.reductions
        )

    def adapted(self, shared: Any, per_client: Any, state: Any, stack: Stack) -> Any:
        """State of clients that were never seen, ready to be personalized."""
        if self.adapt is not None:
            return self.adapt(shared, per_client, state, stack)
        return self.local_update(shared, per_client, state, stack).state
