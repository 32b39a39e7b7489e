"""One run on a pool, from its start or a checkpoint to its end, getting up when hosts are lost."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from selffl_ray import trees
from selffl_ray.algorithms.base import NotAvailable
from selffl_ray.checkpoint import (
    Counters,
    latest_checkpoint,
    load_checkpoint,
    rounds_done,
    save_checkpoint,
    tidy,
)
from selffl_ray.config import ExperimentConfig, to_raw
from selffl_ray.driver import RoundRecord, Run, evaluate, run_rounds
from selffl_ray.errors import RunError
from selffl_ray.event_log import latest
from selffl_ray.events import Event, EventBook, Outcome, driver_died
from selffl_ray.experiment import Prepared
from selffl_ray.exported_models import write_models
from selffl_ray.flat import digest
from selffl_ray.participation import RoundPlan, plan_digest
from selffl_ray.pool import ClientPool, HostLost, StateLostError
from selffl_ray.rebalancer import Rebalancer
from selffl_ray.run_writer import RunWriter, changed
from selffl_ray.runtime.actors import Control
from selffl_ray.stopping import StopRule, seconds_of
from selffl_ray.tables import events_after

logger = logging.getLogger(__name__)


class Progress(NamedTuple):
    """An event: a finished round of a run."""

    label: str
    round_index: int
    num_rounds: int
    participants: int
    metrics: Mapping[str, float]
    seconds: float


class Message(NamedTuple):
    """An event: something to tell the user."""

    text: str


def run_identity(config: ExperimentConfig) -> dict[str, Any]:
    """The parts of a configuration that results depend on, as plain values; not the placement."""
    raw = to_raw(config)
    parts = {k: raw[k] for k in ("seed", "data", "model", "method", "training")}
    parts["data"] = {k: v for k, v in parts["data"].items() if k != "source"}
    return parts


def run_digest(prepared: Prepared, schedule: Sequence[Mapping[str, Any]] = ()) -> str:
    """Names what a checkpoint belongs to: everything that results depend on, not the placement.

    Args:
        schedule: of the run's job; it counts if options were changed on the way.
    """
    text = json.dumps(run_identity(prepared.config), sort_keys=True)
    past = [json.dumps(list(schedule), sort_keys=True)] if changed(schedule) else []
    # A trace is a file, and may have changed since.
    if prepared.config.training.simulates:
        past.append(plan_digest(prepared.plans))
    return digest([], [text, prepared.store.manifest.digest, prepared.partition.digest, *past])


@dataclass
class _Place:
    """Where a run stands: before ``next_round``, with this server."""

    next_round: int
    server: Any
    gradient_steps: int


class RunLoop:
    """One run on a pool, from its start or a checkpoint to its end."""

    def __init__(
        self, prepared: Prepared, pool: ClientPool, writer: RunWriter, control: Control
    ) -> None:
        self._prepared = prepared
        self._pool = pool
        self._writer = writer
        self._control = control
        self._digest = run_digest(prepared, writer.schedule)
        self._checkpoints = writer.folder / "checkpoints"
        on_disk = prepared.config.placement.state_store == "disk"
        folder = str(writer.folder.absolute()) if on_disk else None
        self._spec = replace(prepared.run_spec, state_folder=folder)
        self._all_states_next = True
        self._events = EventBook()
        self._reached, self._now = -1, 0
        self._take_over()
        self._run = Run(
            prepared.algorithm,
            prepared.federation,
            pool,
            prepared.plans,
            prepared.evaluation,
            prepared.config.faults,
            prepared.dataset.task,
            self._note,
            rebalancer=self._rebalancer(),
        )

    def _rebalancer(self) -> Rebalancer | None:
        if not (self._prepared.config.placement.rebalance and self._pool.movable):
            return None
        start_P = torch.from_numpy(np.array(self._spec.start_params))
        state = self._prepared.algorithm.init_client(start_P, 1)
        return Rebalancer(
            self._pool,
            self._prepared.federation,
            sum(leaf.nbytes for _, leaf in trees.leaves(state)),
            lambda text: self._control.emit(Message(text)),
        )

    def _note(self, event: Event) -> None:
        """Take in what went wrong, so that a kill in the next moment does not take it away."""
        self._writer.event_log.add(self._events.note(event))

    def go(self) -> str:
        """Run to the end; the status. Lost hosts are replaced and their rounds replayed.

        Raises:
            RunError: hosts were lost too often, or too few clients answered.
        """
        try:
            return self._go()
        finally:
            unrecorded = self._events.outside_rows()
            self._writer.unrecorded = [event._asdict() for event in unrecorded]
            if self._run.rebalancer is not None:
                self._writer.clients_moved = self._run.rebalancer.num_moved

    def _go(self) -> str:
        lost: tuple[HostLost, ...] = ()
        losses, furthest = 0, -1
        while True:
            try:
                if lost:
                    self._pool.revive(lost)
                else:
                    self._pool.begin(self._spec, self._prepared.algorithm)
                place, lost = self._restore(), ()
                return self._rounds(place)
            except StateLostError as error:
                # Another host may be lost while the first ones are replaced.
                lost = (*lost, *error.lost)
                losses = 1 if self._reached > furthest else losses + 1
                furthest = self._reached
                self._note_loss(error, losses)

    def _take_over(self) -> None:
        """Events of an earlier part of the run, driver actors that died among them.

        What an actor has noted is in its log, but not why it died, so the next one is told of all.
        """
        rows, earlier = events_after(self._writer.folder, -1), self._writer.unrecorded
        done = rounds_done(self._checkpoints)
        # A summary is as old as the last orderly end, a log as the last checkpoint: rows that stay
        # may have their events by now.
        final = {Event(**row).key for row in rows if row["round_index"] < done}
        again = [row for row in rows if row["round_index"] >= done]
        more = [row for row in earlier if Event(**row).key not in final]
        self._events.recall(latest([*again, *more]), -1)
        restart = self._writer.restart
        if restart is None:
            return
        written = {(row["attempt"], row["cause"]) for row in [*rows, *earlier]}
        at = min(done, len(self._prepared.plans) - 1)
        for number, cause in (*restart.earlier, (restart.number, restart.cause)):
            if (number, cause) not in written:
                self._note(driver_died(cause, at, number))

    def _note_loss(self, error: StateLostError, losses: int) -> None:
        """Events of lost hosts, in the round in which they were lost, and a warning.

        Raises:
            RunError: too many in a row.
        """
        last = len(self._prepared.plans) - 1
        at = min(self._reached + 1, last)
        enough = losses > self._prepared.config.faults.max_retries
        causes = []
        for item in error.lost:
            where = self._pool.whereabouts(item.host)
            causes.append(f"host {item.host}: {item.cause} ({where})")
            # A lack of memory belongs to the round that is done, maybe again; a host that is found
            # lost while rounds are done again went with the one that was lost before it.
            now = min(self._now, last) if item.kind == "memory" else at
            asked = self._pool.homes[self._prepared.plans[now].cohort]
            # What a finished round's checkpoint holds no loss takes away.
            kept = rounds_done(self._checkpoints) > now
            here = 0 if kept else int((asked == item.host).sum())
            done: Outcome = "aborted" if enough else "replaced"
            self._note(Event(now, losses, item.kind, None, here, item.cause, *where, done))
            if item.kind == "memory":
                clients = np.flatnonzero(self._pool.homes == item.host).tolist()
                renewed = self._run.renewed | {(now, client) for client in clients}
                self._run = dataclasses.replace(self._run, renewed=renewed)
        why = "; ".join(causes)
        if enough:
            raise RunError(
                f"round {at}: hosts were lost {losses} times without progress ({why})"
            ) from error
        logger.warning("lost %s; replacing it and replaying its rounds", why)

    def _restore(self) -> _Place:
        """The newest checkpoint's state in server and hosts, or the start."""
        algorithm, spec = self._prepared.algorithm, self._prepared.run_spec
        start_P = torch.from_numpy(np.array(spec.start_params))
        tidy(self._checkpoints, self._prepared.config.checkpoint.keep)
        path = latest_checkpoint(self._checkpoints)
        self._all_states_next = True
        if path is None:
            self._events.recall(self._writer.restore(-1), -1)
            self._pool.import_states([])
            return _Place(0, algorithm.init(start_P), 0)
        saved = load_checkpoint(
            path, self._digest, algorithm.init(start_P), algorithm.init_client(start_P, 1)
        )
        self._now = saved.counters.round_index + 1
        self._reached = max(self._reached, saved.counters.round_index)
        last_round = saved.counters.round_index
        self._events.recall(self._writer.restore(last_round), last_round)
        self._pool.import_states(saved.states)
        return _Place(saved.counters.round_index + 1, saved.server, saved.counters.gradient_steps)

    def _rounds(self, place: _Place) -> str:
        past = self._writer.tables.rows()
        task = self._prepared.dataset.task
        stop = StopRule(
            self._prepared.config.training.stop, past, higher_is_better=task.higher_is_better
        )
        began = time.monotonic() - sum(seconds_of(row) for row in past)
        rounds = run_rounds(
            self._run,
            place.server,
            first_round=place.next_round,
            gradient_steps=place.gradient_steps,
        )
        last_round, server = place.next_round - 1, place.server
        self._now = place.next_round
        self._reached = max(self._reached, last_round)
        for record in [] if stop.enough else rounds:
            last_round, server = record.plan.round_index, record.server
            self._now = last_round + 1
            record.events = self._events.for_row(last_round)
            record.metrics["clients/faults"] = float(sum(e.num_clients for e in record.events))
            self._reached = max(self._reached, last_round)
            stop.take(record.metrics, time.monotonic() - began)
            if self._prepared.config.training.simulates:
                record.metrics["cost/virtual_s"] = stop.virtual_s
            if stop.enough and not record.scores:
                # What the run ends with is what it is judged by.
                evaluate(self._run, record)
            self._writer.add(record)
            self._control.emit(self._progress(record, time.monotonic() - began))
            if self._control.stopping or self._due(last_round):
                self._save(record)
            if stop.enough or last_round + 1 == len(self._prepared.plans):
                break
            if self._control.stopping:
                return "STOPPED"
        if self._prepared.config.export_models:
            self._export(last_round, server)
        return "FINISHED"

    def _progress(self, record: RoundRecord, seconds: float) -> Progress:
        shown = {k: v for k, v in record.metrics.items() if k.count("/") == 1}
        config = self._prepared.config
        return Progress(
            f"{config.method_label} seed {config.seed}",
            record.plan.round_index,
            config.training.num_rounds,
            int(record.metrics["clients/participants"]),
            shown,
            seconds,
        )

    def _due(self, round_index: int) -> bool:
        return (round_index + 1) % self._prepared.config.checkpoint.every == 0

    def _save(self, record: RoundRecord) -> None:
        """Write a checkpoint; a full disk is said and does not end the run."""
        first = latest_checkpoint(self._checkpoints) is None
        changed = self._pool.export_states(changed_only=not (first or self._all_states_next))
        counters = Counters(record.plan.round_index, record.gradient_steps, self._digest)
        keep = self._prepared.config.checkpoint.keep
        self._all_states_next = True
        try:
            # First the tables: whoever goes on from the checkpoint finds all of its rounds there.
            self._writer.tables.flush()
            save_checkpoint(self._checkpoints, counters, record.server, changed, keep)
            self._all_states_next = False
            self._events.forget(record.plan.round_index)
            self._writer.event_log.keep(self._events.all())
        except OSError as error:
            logger.warning("no checkpoint after round %d: %s", record.plan.round_index, error)

    def _export(self, round_index: int, server: Any) -> None:
        """The global model, and the model that each client predicts with."""
        params = self._prepared.algorithm.global_params(server)
        everybody = RoundPlan(
            round_index,
            np.arange(len(self._prepared.client_ids), dtype=np.int64),
            self._prepared.config.training.rate(round_index),
        )
        message = self._prepared.algorithm.broadcast(server, everybody)
        personal = self._pool.personal_models(everybody, message)
        write_models(
            self._writer.folder,
            self._prepared.federation.spec,
            None if isinstance(params, NotAvailable) else params,
            {self._prepared.client_ids[i]: torch.from_numpy(m) for i, m in personal.items()},
        )
