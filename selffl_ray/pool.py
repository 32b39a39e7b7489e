"""All clients of a run, wherever their hosts live.

:class:`ClientPool` splits a round's requests by home, asks all hosts at once, and puts the answers
together in client order. How a host is reached is a :class:`Transport`: in this process, or Ray
actors (``runtime/ray_pool.py``). The same code above both is what makes their bits the same.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from selffl_ray import trees
from selffl_ray.algorithms.base import Algorithm, Federation, Mean, Weights
from selffl_ray.datasets.splits import ClientRows
from selffl_ray.errors import SelfFLError
from selffl_ray.evaluation import ClientScores, join_scores
from selffl_ray.events import HostKind, Whereabouts
from selffl_ray.flat import exact_value
from selffl_ray.host import ClientHost
from selffl_ray.messages import (
    ClientFailure,
    Commit,
    DataSpec,
    EvalAnswer,
    EvalRequest,
    LocalAnswer,
    LocalRequest,
    ReduceRequest,
    RunSpec,
    Shapes,
    Split,
    StateRows,
)
from selffl_ray.participation import RoundPlan
from selffl_ray.states import joined_rows, rows_at
from selffl_ray.updates import agreeing, mean_shares

logger = logging.getLogger(__name__)

Indices = npt.NDArray[np.int64]


class HostLost(NamedTuple):
    """A host that gave no answer or is to be replaced, and why, in words and as a kind."""

    host: int
    cause: str
    kind: HostKind = "died"


class Transport(Protocol):
    """How hosts are reached."""

    @property
    def num_hosts(self) -> int:
        """Number of hosts."""
        ...

    def call(
        self, method: str, arguments: Mapping[int, tuple[Any, ...]], shared: Any = None
    ) -> dict[int, Any]:
        """Call a method of several hosts at once: host -> its answer, or :class:`HostLost`.

        ``shared``, if given, is the first argument of all; unless small, it travels to each
        machine once.
        """
        ...

    def restart(self, hosts: Sequence[int]) -> None:
        """Replace lost hosts by fresh ones."""
        ...

    def place(self, host: int) -> str:
        """Where a host is, in words."""
        ...

    def kind(self, host: int) -> str:
        """Hosts of one kind give any client the same bits, whoever shares its stack."""
        ...

    def close(self) -> None:
        """End the hosts."""
        ...


class LocalTransport:
    """Hosts in this process, asked one after the other."""

    def __init__(self, num_hosts: int = 1, device: torch.device | None = None) -> None:
        self._device = device
        self._hosts = [ClientHost(device) for _ in range(num_hosts)]

    @property
    def num_hosts(self) -> int:
        """Number of hosts."""
        return len(self._hosts)

    def call(
        self, method: str, arguments: Mapping[int, tuple[Any, ...]], shared: Any = None
    ) -> dict[int, Any]:
        """Answers in host order."""
        first = () if shared is None else (shared,)
        return {
            h: getattr(self._hosts[h], method)(*first, *arguments[h]) for h in sorted(arguments)
        }

    def restart(self, hosts: Sequence[int]) -> None:
        """Fresh hosts without data or state."""
        for host in hosts:
            self._hosts[host] = ClientHost(self._device)

    def place(self, host: int) -> str:  # noqa: ARG002
        """All of them are here."""
        return f"process {os.getpid()}"

    def kind(self, host: int) -> str:
        """All alike on the processor; on a GPU bits depend on the whole stack."""
        on_cpu = self._device is None or self._device.type == "cpu"
        return "this processor" if on_cpu else f"{self._device} of host {host}"

    def close(self) -> None:
        """Nothing to end."""


class StateLostError(Exception):
    """Client state went with a host: the run must go back to a checkpoint (or its start).

    Args:
        lost: the hosts and why.
    """

    def __init__(self, lost: Sequence[HostLost]) -> None:
        super().__init__(tuple(lost))
        self.lost = tuple(lost)


@dataclass
class RoundAnswers:
    """What a cohort answered so far, over one or several attempts.

    reports: of each client that answered: the tree that holds its report, and the row there.
    host_seconds: longest answer of each host. shapes: of the updates that are taken.
    """

    reports: dict[int, tuple[Any, int]]
    loss: dict[int, float]
    gradients: dict[int, int]
    mean_totals: list[Tensor | None]
    failing: dict[int, ClientFailure] = field(default_factory=dict)
    faults: int = 0
    host_seconds: dict[int, float] = field(default_factory=dict)
    shapes: Shapes | None = None

    @property
    def accepted(self) -> Indices:
        """Clients that answered, ascending."""
        return np.asarray(sorted(self.reports), np.int64)

    @property
    def seconds(self) -> float:
        """Longest time that a host took."""
        return max(self.host_seconds.values(), default=0.0)


class ClientPool:
    """The clients of an experiment and their homes.

    Args:
        transport: reaches the hosts.
        homes: host of every client, by client index (those that take part, then new ones).

    Attributes:
        load_s: seconds that reading the examples took.
    """

    def __init__(self, transport: Transport, homes: Sequence[int]) -> None:
        self.transport = transport
        self.homes = np.asarray(homes, np.int64)
        self.load_s = 0.0
        self._half_moved: set[int] = set()
        self._data: tuple[DataSpec, Sequence[ClientRows]] | None = None
        self._run: RunSpec | None = None
        self._algorithm: Algorithm | None = None
        self._commits: dict[int, list[Commit]] = {}
        self._memory: dict[int, int] = {}

    @property
    def kinds(self) -> list[str]:
        """Of every host: clients move between hosts of one kind."""
        return [self.transport.kind(host) for host in range(self.transport.num_hosts)]

    @property
    def movable(self) -> bool:
        """Whether there is more than one host, and one that several clients are at home at."""
        return 1 < self.transport.num_hosts < len(self.homes)

    # -- set-up ---------------------------------------------------------------------------------

    def load(self, spec: DataSpec, clients: Sequence[ClientRows]) -> None:
        """Have every host read its clients' examples."""
        self._data = (spec, clients)
        began = time.perf_counter()
        self._load(range(self.transport.num_hosts))
        self.load_s = time.perf_counter() - began

    def _load(self, hosts: Sequence[int] | range) -> None:
        assert self._data is not None
        spec, clients = self._data
        arguments = {
            h: (spec, {i: clients[i] for i in np.flatnonzero(self.homes == h).tolist()})
            for h in hosts
        }
        self._all(self.transport.call("load", arguments))
        self._half_moved -= set(hosts)

    def begin(self, spec: RunSpec, algorithm: Algorithm) -> None:
        """Start a run of a method: hosts forget the last one."""
        self._run, self._algorithm = spec, algorithm
        self._commits = {}
        if self._half_moved:
            self._load(sorted(self._half_moved))
        hosts = range(self.transport.num_hosts)
        self._all(self.transport.call("begin", dict.fromkeys(hosts, ()), spec))

    def revive(self, lost: Sequence[HostLost]) -> None:
        """Replace lost hosts and bring them to the start of the run."""
        assert self._run is not None
        fresh = {item.host for item in lost}
        self.transport.restart(sorted(fresh))
        hosts = sorted(fresh | self._half_moved)
        self._load(hosts)
        self._all(self.transport.call("begin", dict.fromkeys(hosts, ()), self._run))

    def _all(self, answers: Mapping[int, Any]) -> dict[int, Any]:
        """The answers, or StateLostError if a host gave none."""
        lost = [a for a in answers.values() if isinstance(a, HostLost)]
        if lost:
            raise StateLostError(lost)
        return dict(answers)

    def _by_home(self, index: Indices) -> dict[int, Indices]:
        """Positions within ``index`` of the clients of each host."""
        homes = self.homes[index]
        return {int(h): np.flatnonzero(homes == h) for h in np.unique(homes)}

    def move(self, index: Indices, to: Indices) -> None:
        """Give clients other homes between two rounds: examples are read there, states go along.

        What may fail comes first, while nothing has been taken from anywhere: if examples cannot be
        read, clients stay where they are.

        Args:
            index: clients; to: the new home of each.

        Raises:
            StateLostError: a host was lost, or states did not get where they should. All clients
                are at home where they were, and hosts that this concerns are to read them anew.
        """
        assert self._data is not None, "load() comes first"
        index, to = index[elsewhere := self.homes[index] != to], to[elsewhere]
        clients, after = self._data[1], self.homes.copy()
        after[index] = to
        hosts = {int(h): index[to == h] for h in np.unique(to)}
        arriving = {h: ({i: clients[i] for i in own.tolist()},) for h, own in hosts.items()}
        leaving = {h: (index[at],) for h, at in self._by_home(index).items()}
        self._ask("admit", arriving)
        self._half_moved |= {*arriving, *leaving}
        try:
            released = [rows for rows in self._ask("release", leaving).values() if rows is not None]
            parts = {h: [p for r in released if (p := rows_at(r, after == h))] for h in hosts}
            if bringing := {h: (joined_rows(own),) for h, own in parts.items() if own}:
                self._ask("take", bringing)
        except (SelfFLError, OSError, MemoryError) as error:
            cause = f"states of clients did not get there: {error}"
            raise StateLostError([HostLost(h, cause) for h in hosts]) from error
        self.homes = after
        self._half_moved = set()

    # -- one round ------------------------------------------------------------------------------

    def local_update(
        self,
        plan: RoundPlan,
        index: Indices,
        message: tuple[Any, Any],
        federation: Federation,
        so_far: RoundAnswers | None = None,
    ) -> RoundAnswers:
        """Have clients of the cohort train; answers add to those of earlier attempts.

        Args:
            index: the clients asked now, all or some of the plan's cohort.
            message: shared, and per-client rows in the order of the plan's cohort.
        """
        means = self._means()
        shares = [mean_shares(m.by, plan.cohort, federation) for m in means]
        shared = trees.to_arrays(message[0])
        rows = np.searchsorted(plan.cohort, index)
        arguments = {}
        for host, at in self._by_home(index).items():
            own = torch.from_numpy(rows[at])
            per_client = trees.to_arrays(trees.take_rows(message[1], own))
            own_shares = tuple(share[rows[at]] for share in shares)
            arguments[host] = (LocalRequest(plan, index[at], per_client, own_shares),)
        answers = so_far or RoundAnswers({}, {}, {}, [None] * len(means))
        answers.failing = {i: f for i, f in answers.failing.items() if i not in set(index.tolist())}
        found = self._ask("local_update", arguments, shared)
        self._memory |= {host: answer.memory_bytes for host, answer in found.items()}
        for host, answer in agreeing(found, answers.shapes).items():
            _add(answers, host, answer)
        return answers

    def whereabouts(self, host: int) -> Whereabouts:
        """Where a host is, and how much memory it took when it last told."""
        return Whereabouts(host, self.transport.place(host), self._memory.get(host))

    def mean_results(
        self, answers: RoundAnswers, plan: RoundPlan, federation: Federation
    ) -> list[Tensor]:
        """Weighted means over the accepted clients, float64, one for each Mean."""
        results = []
        means = self._means()
        rows = np.searchsorted(plan.cohort, answers.accepted)
        for mean, total in zip(means, answers.mean_totals, strict=True):
            share = mean_shares(mean.by, plan.cohort, federation)[rows].sum()
            assert total is not None, "somebody answered"
            results.append(exact_value(total).div_(share))
        return results

    def accept(self, commit: Commit) -> None:
        """The clients of a round whose updates count; each host learns with its next call."""
        for host, at in self._by_home(commit.accepted).items():
            own = Commit(commit.round_index, commit.accepted[at])
            self._commits.setdefault(host, []).append(own)

    def _ask(
        self, method: str, arguments: Mapping[int, tuple[Any, ...]], shared: Any = None
    ) -> dict[int, Any]:
        """Call hosts, telling each the commits that it has not heard of."""
        told = {h: (tuple(self._commits.pop(h, ())), *own) for h, own in arguments.items()}
        return self._all(self.transport.call(method, told, shared))

    def total(self, which: int, weights: Weights) -> Tensor:
        """A weighted sum over clients, float64; empty if nobody has a weight."""
        if not len(weights.client_index):
            return torch.empty(0, dtype=torch.float64)
        arguments = {
            host: (ReduceRequest(which, weights.client_index[at], weights.weight[at]),)
            for host, at in self._by_home(weights.client_index).items()
        }
        parts = self._ask("reduce", arguments).values()
        total = torch.from_numpy(sum(np.asarray(p) for p in parts))
        return exact_value(total)

    def gather(self, which: int, accepted: Indices) -> Tensor:
        """Single rows of the accepted clients, ascending."""
        homes = self._by_home(accepted)
        arguments = {host: (which, accepted[at]) for host, at in homes.items()}
        answers = self._ask("gather", arguments)
        rows = np.concatenate([answers[host] for host in homes])
        order = np.argsort(np.concatenate(list(homes.values())), kind="stable")
        return torch.from_numpy(rows[order])

    def evaluate(
        self,
        plan: RoundPlan,
        message: tuple[Any, Any],
        global_params: npt.NDArray[Any] | None,
        splits: tuple[Split, ...],
    ) -> tuple[dict[Split, ClientScores], int, float]:
        """Scores by split of the clients in ``plan.cohort``, gradients spent, longest seconds."""
        shared = trees.to_arrays(message[0])
        arguments = self._for_everybody(plan, message[1], splits)
        answers: list[EvalAnswer] = list(
            self._ask("evaluate", arguments, (shared, global_params)).values()
        )
        scores = {s: join_scores([a.scores[s] for a in answers]) for s in splits}
        return scores, sum(a.gradients for a in answers), max(a.seconds for a in answers)

    def personal_models(
        self, plan: RoundPlan, message: tuple[Any, Any]
    ) -> dict[int, npt.NDArray[Any]]:
        """What each client of ``plan.cohort`` predicts with; {} if that is the global model."""
        arguments = self._for_everybody(plan, message[1], ())
        answers = self._ask("personal_models", arguments, trees.to_arrays(message[0]))
        found: dict[int, npt.NDArray[Any]] = {}
        for models in answers.values():
            found |= models
        return dict(sorted(found.items()))

    def _for_everybody(
        self, plan: RoundPlan, per_client: Any, splits: tuple[Split, ...]
    ) -> dict[int, tuple[EvalRequest]]:
        """The clients of a plan by home, each with its row."""
        arguments = {}
        for host, at in self._by_home(plan.cohort).items():
            rows = trees.to_arrays(trees.take_rows(per_client, torch.from_numpy(at)))
            arguments[host] = (EvalRequest(plan, plan.cohort[at], rows, splits),)
        return arguments

    # -- checkpoints ----------------------------------------------------------------------------

    def export_states(self, *, changed_only: bool) -> list[StateRows]:
        """Committed state rows of all hosts."""
        hosts = range(self.transport.num_hosts)
        answers = self._ask("export_states", dict.fromkeys(hosts, (changed_only,)))
        return [rows for rows in answers.values() if rows is not None]

    def import_states(self, saved: Sequence[StateRows]) -> None:
        """Replace the states of all clients, wherever they live now."""
        self._commits = {}
        arguments: dict[int, tuple[Any, ...]] = {}
        for host in range(self.transport.num_hosts):
            here = self.homes == host
            parts = [part for rows in saved if (part := rows_at(rows, here)) is not None]
            arguments[host] = (joined_rows(parts),)
        self._all(self.transport.call("import_states", arguments))

    def close(self) -> None:
        """End the hosts."""
        self.transport.close()

    def _means(self) -> tuple[Mean, ...]:
        assert self._algorithm is not None, "begin() comes first"
        return self._algorithm.means


def _add(answers: RoundAnswers, host: int, answer: LocalAnswer) -> None:
    if answer.reports is not None:
        reports = trees.to_tensors(answer.reports)
        for row, index in enumerate(answer.client_index.tolist()):
            answers.reports[index] = (reports, row)
            answers.loss[index] = float(answer.loss[row])
            answers.gradients[index] = int(answer.gradients[row])
        for at, part in enumerate(answer.means):
            new, old = torch.from_numpy(np.array(part)), answers.mean_totals[at]
            answers.mean_totals[at] = new if old is None else old + new
        answers.shapes = answer.shapes
    answers.failing |= {failure.client_index: failure for failure in answer.failures}
    answers.faults += len(answer.failures)
    answers.host_seconds[host] = max(answers.host_seconds.get(host, 0.0), answer.seconds)
