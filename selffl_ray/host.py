"""One host: the data and state of one or several clients, trained and evaluated in stacks.

A plain class. ``runtime/actors.py`` puts it into Ray actors, ``pool.py`` runs it in process.

What a round produces is *staged* and becomes the clients' state only when the driver names the
accepted clients, so a retried, refused or uncounted update never advances a state. A client that is
asked twice for one round answers from what was staged; where the method needs its payload for
nothing but means, that was not kept, and it trains again, to the same bits.

Indices are those of the federation: M clients that take part, then the new ones.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor

from selffl_ray import trees
from selffl_ray.algorithms.base import (
    Algorithm,
    Empty,
    Gather,
    Personal,
    Total,
    use_global_params,
)
from selffl_ray.allocator import keep_freed_memory
from selffl_ray.client_data import ClientData
from selffl_ray.datasets.splits import ClientRows
from selffl_ray.errors import ClientError
from selffl_ray.evaluation import ClientScores, join_scores, score_clients
from selffl_ray.flat import exact_sum
from selffl_ray.gradients import RowEngine
from selffl_ray.messages import (
    ClientFailure,
    Commits,
    DataSpec,
    EvalAnswer,
    EvalRequest,
    LocalAnswer,
    LocalRequest,
    ReduceRequest,
    RunSpec,
    Split,
    StateRows,
)
from selffl_ray.models.build import build_model
from selffl_ray.participation import RoundPlan
from selffl_ray.registry import algorithms
from selffl_ray.staged import Staged
from selffl_ray.states import MemoryStates, States, open_states, put_rows, saved_rows
from selffl_ray.training import Stack
from selffl_ray.updates import Tally, check_rows, failure_kind, usable_rows

logger = logging.getLogger(__name__)

Indices = npt.NDArray[np.int64]


class _Asked(NamedTuple):
    """A round's request: row of each client in ``per_client``, and where the updates go."""

    at: dict[int, int]
    plan: RoundPlan
    shared: Any
    per_client: Any
    tally: Tally


class ClientHost:
    """Data, state and computation of some clients.

    Args:
        device: where stacks are computed.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        # Two threads give a stack of one other bits, and lose badly to any other load.
        torch.set_num_threads(1)
        keep_freed_memory()
        self.device = device or torch.device("cpu")
        self._states: States = MemoryStates()
        self._changed: set[int] = set()
        self._staged = Staged()
        # Kept: finding out about a process again takes ten times as long as asking it.
        self._process = psutil.Process()

    # -- set-up ---------------------------------------------------------------------------------

    def load(self, spec: DataSpec, clients: dict[int, ClientRows]) -> int:
        """Read the given clients' examples; returns their bytes.

        Raises:
            DataError: the store on this machine holds other data than the driver's.
        """
        self._data = ClientData(spec, clients, self.device)
        return self._data.num_bytes

    def begin(self, spec: RunSpec) -> None:
        """Forget the last run and get ready for another on the same data."""
        self._spec = spec
        model = build_model(spec.model, self._data.dataset.shape)
        self._engine = RowEngine(model, self._data.dataset.task, self.device)
        self._rows = self._data.rows(model.spec.dtype)
        self._algorithm: Algorithm = algorithms.make(spec.method, spec.federation)
        self._start_P = torch.from_numpy(np.array(spec.start_params)).to(self.device)
        self._forget()

    def _forget(self) -> None:
        """No client has a state."""
        self._staged, self._changed = Staged(), set()
        self._states = open_states(self._spec.state_folder, self._data.clients, self.device)

    # -- one round ------------------------------------------------------------------------------

    def local_update(
        self, shared_arrays: Any, commits: Commits, request: LocalRequest
    ) -> LocalAnswer:
        """Train the asked clients, stage what they produced, and return reports and means."""
        began = time.perf_counter()
        self._commit(commits)
        self._staged.begin(request.plan.round_index)
        shared = trees.to_tensors(shared_arrays, self.device)
        per_client = trees.to_tensors(request.per_client)
        at = {int(index): row for row, index in enumerate(request.client_index)}
        tally = Tally(self._algorithm.means, request.client_index, request.mean_shares)
        asked = _Asked(at, request.plan, shared, per_client, tally)
        kept = [i for i in at if i in self._staged and self._algorithm.keeps_payloads]
        for i in kept:
            tally.add([i], self._staged.local(i))
        failures: list[ClientFailure] = []
        for members in self._stacks(at.keys() - kept):
            failures += self._train(members, asked)
        good, shapes, totals, refused = tally.majority()
        failures += refused
        told = self._staged.told(good)
        return LocalAnswer(
            np.asarray(good, np.int64),
            told.report,
            told.loss_C,
            told.gradients_C,
            tuple(np.asarray(total.cpu().numpy()) for total in totals),
            tuple(failures),
            shapes,
            time.perf_counter() - began,
            int(self._process.memory_info().rss),
        )

    def reduce(self, commits: Commits, request: ReduceRequest) -> npt.NDArray[np.int64]:
        """This host's part of a Total, on the integer grid of exact sums."""
        self._commit(commits)
        total = self._algorithm.reductions[request.which]
        assert isinstance(total, Total)
        weights = torch.from_numpy(np.array(request.weight))
        if total.groups is not None:
            weights = total.groups.spread(weights)
        rows = []
        for index in request.client_index.tolist():
            own = total.of == "state"
            tree = self._states[index] if own else self._staged.payload(index)
            rows.append(total.rows(tree)[0])
        return np.asarray(exact_sum(rows, weights).cpu().numpy())

    def gather(self, commits: Commits, which: int, accepted: Indices) -> npt.NDArray[Any]:
        """Rows of a Gather of this host's accepted clients, ascending."""
        self._commit(commits)
        gather = self._algorithm.reductions[which]
        assert isinstance(gather, Gather)
        rows = [gather.rows(self._staged.payload(i)) for i in accepted.tolist()]
        return np.asarray(torch.cat(rows).cpu().numpy())

    def evaluate(
        self,
        models: tuple[Any, npt.NDArray[Any] | None],
        commits: Commits,
        request: EvalRequest,
    ) -> EvalAnswer:
        """Scores of the asked clients' personalized models and of the global model.

        Args:
            models: what is broadcast, and the global model if there is one.
        """
        began = time.perf_counter()
        self._commit(commits)
        shared = trees.to_tensors(models[0], self.device)
        per_client = trees.to_tensors(request.per_client)
        global_1P = None
        if models[1] is not None:
            global_1P = torch.from_numpy(np.array(models[1])).to(self.device)[None]
        at = {int(index): row for row, index in enumerate(request.client_index)}
        found: dict[Split, list[ClientScores]] = {split: [] for split in request.splits}
        gradients = 0
        for members in self._stacks(at):
            stack = self._stack(members, request.plan)
            rows = trees.take_rows(per_client, torch.tensor([at[i] for i in members]))
            personal_CP, cost = self._personal(members, shared, rows, stack)
            gradients += cost
            for split in request.splits:
                name = "test" if split == "new" else split
                own = self._rows[name].select(self._data.places(members))
                found[split].append(
                    score_clients(
                        self._engine,
                        members,
                        own,
                        personal_CP=personal_CP,
                        global_1P=global_1P,
                        stack_size=self._spec.stack_size,
                    )
                )
        scores = {split: join_scores(parts) for split, parts in found.items()}
        return EvalAnswer(scores, gradients, time.perf_counter() - began)

    def personal_models(
        self, shared_arrays: Any, commits: Commits, request: EvalRequest
    ) -> dict[int, npt.NDArray[Any]]:
        """What each asked client predicts with; {} where it is the global model."""
        self._commit(commits)
        shared = trees.to_tensors(shared_arrays, self.device)
        per_client = trees.to_tensors(request.per_client)
        at = {int(index): row for row, index in enumerate(request.client_index)}
        found: dict[int, npt.NDArray[Any]] = {}
        for members in self._stacks(at):
            rows = trees.take_rows(per_client, torch.tensor([at[i] for i in members]))
            params, _ = self._personal(members, shared, rows, self._stack(members, request.plan))
            if params is not None:
                found |= {i: params[row].cpu().numpy() for row, i in enumerate(members)}
        return found

    # -- checkpoints ----------------------------------------------------------------------------

    def export_states(self, commits: Commits, changed_only: bool) -> StateRows | None:
        """Committed state rows, of the clients that changed since the last export or of all."""
        self._commit(commits)
        index = sorted(self._changed) if changed_only else self._states.indices()
        self._changed = set()
        return saved_rows(self._states, index)

    def import_states(self, rows: StateRows | None) -> None:
        """Replace all states by saved rows of this host's clients."""
        self._forget()
        if rows is not None:
            put_rows(self._states, rows, self.device)

    # -- between two rounds ---------------------------------------------------------------------

    def release(self, commits: Commits, index: Indices) -> StateRows | None:
        """Let clients go to another home; the state rows of those that have one."""
        self._commit(commits)
        kept = [i for i in index.tolist() if i in self._states]
        rows = saved_rows(self._states, kept)
        for i in index.tolist():
            self._states.remove(i)
            self._changed.discard(i)
        self._data.release(index.tolist())
        self._rows = self._data.rows(self._engine.model.spec.dtype)
        return rows

    def admit(self, commits: Commits, clients: dict[int, ClientRows]) -> None:
        """Read the examples of clients that come, and have room for their states.

        Raises:
            DataError: the store on this machine holds other data than the driver's.
        """
        self._commit(commits)
        self._data.admit(clients)
        self._rows = self._data.rows(self._engine.model.spec.dtype)
        self._states.admit(clients)

    def take(self, commits: Commits, rows: StateRows) -> None:
        """The states that clients bring along."""
        self._commit(commits)
        put_rows(self._states, rows, self.device)
        # Whether the last checkpoint has them only their last home knew.
        self._changed |= set(rows.client_index.tolist())

    # -- inside ---------------------------------------------------------------------------------

    def _commit(self, commits: Commits) -> None:
        """Make the accepted clients' staged states theirs; the rest stays until the next round."""
        for commit in commits:
            for index in commit.accepted.tolist():
                assert self._staged.has(index, commit.round_index), "accepted, so it answered"
                self._states.put(index, self._staged.state(index))
                self._changed.add(index)

    def _stacks(self, index: Iterable[int]) -> list[list[int]]:
        return self._data.stacks(index, self._spec.training, self._spec.stack_size)

    def _stack(self, members: Sequence[int], plan: RoundPlan) -> Stack:
        train = self._rows["train"].select(self._data.places(members))
        return Stack(
            tuple(self._data.clients[i].client_id for i in members),
            train,
            self._spec.training.batch_length(int(train.num_C[0])),
            self._engine,
            self._spec.training,
            self._spec.seed,
            plan.round_index,
            plan.learning_rate,
            plan.most_steps(members),
        )

    def _state_rows(self, members: Sequence[int]) -> Any:
        """States of the members; clients that never took part have their first one."""
        unseen = any(i not in self._states for i in members)
        first = self._algorithm.init_client(self._start_P, 1) if unseen else None
        return trees.concatenate([self._states.get(i, first) for i in members])

    def _train(self, members: list[int], asked: _Asked) -> list[ClientFailure]:
        """Train a stack, add usable updates to the tally and stage them; failures of the others."""
        rows = trees.take_rows(asked.per_client, torch.tensor([asked.at[i] for i in members]))
        stack = self._stack(members, asked.plan)
        try:
            before = self._state_rows(members)
            local = self._algorithm.local_update(asked.shared, rows, before, stack)
            check_rows(local, before, len(members))
        except Exception as error:
            if len(members) > 1:
                # One client's failure must not take its stack along.
                return [failure for i in members for failure in self._train([i], asked)]
            logger.warning("client %s failed: %r", stack.client_ids[0], error)
            cause, kind = failure_kind(error)
            return [ClientFailure(members[0], "local_update", cause, kind)]
        good_C = usable_rows(local)
        if not bool(good_C.all()):
            local = trees.take_rows(local, good_C)
        good = [i for i, usable in zip(members, good_C.tolist(), strict=True) if usable]
        asked.tally.add(good, local)
        if not self._algorithm.keeps_payloads:
            local = local._replace(payload=Empty())
        self._staged.put(good, local)
        cause = "its update holds NaN, infinity or values of 32768 and more: it diverged"
        bad = sorted(set(members) - set(good))
        return [ClientFailure(i, "local_update", cause, "diverged") for i in bad]

    def _personal(
        self, members: Sequence[int], shared: Any, per_client: Any, stack: Stack
    ) -> tuple[Tensor | None, int]:
        """Personalized models (None: the global one), and the gradients that they cost."""
        if self._algorithm.personalize is use_global_params:
            return None, 0
        personal = self._read_out(members, shared, per_client, stack)
        return personal.params_CP, int(personal.gradients_C.sum())

    def _read_out(
        self, members: Sequence[int], shared: Any, per_client: Any, stack: Stack
    ) -> Personal:
        """Personalized models.

        Raises:
            ClientError: naming the client that failed, alone as in its stack.
        """
        try:
            return self._adapt_and_read(members, shared, per_client, stack)
        except Exception as error:
            if len(members) == 1:
                name, now = stack.client_ids[0], stack.round_index
                raise ClientError(repr(error), name, now, "personalize") from error
        plan = RoundPlan(stack.round_index, np.empty(0, np.int64), stack.learning_rate)
        parts = []
        for row, i in enumerate(members):
            own = trees.take_rows(per_client, slice(row, row + 1))
            parts.append(self._read_out([i], shared, own, self._stack([i], plan)))
        personal: Personal = trees.concatenate(parts)
        return personal

    def _adapt_and_read(
        self, members: Sequence[int], shared: Any, per_client: Any, stack: Stack
    ) -> Personal:
        """Personalized models; clients that never took part adapt first."""
        state = self._state_rows(members)
        unseen = [row for row, i in enumerate(members) if i not in self._states]
        if unseen:
            pick = torch.tensor(unseen)
            part = self._stack(
                [members[row] for row in unseen],
                RoundPlan(stack.round_index, np.empty(0, np.int64), stack.learning_rate),
            )
            adapted = self._algorithm.adapted(
                shared, trees.take_rows(per_client, pick), trees.take_rows(state, pick), part
            )
            state = trees.map_tree(
                lambda old, new: old.clone().index_copy_(0, pick.to(old.device), new),
                state,
                adapted,
            )
        return self._algorithm.personalize(shared, per_client, state, stack)
