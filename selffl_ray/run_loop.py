"""One run on a pool, from its start or a checkpoint to its end, getting up when hosts are lost."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import torch

from selffl_ray.algorithms.base import NotAvailable
from selffl_ray.checkpoint import Counters, latest_checkpoint, load_checkpoint, save_checkpoint
from selffl_ray.config import to_raw
from selffl_ray.driver import RoundRecord, Run, run_rounds
from selffl_ray.errors import RunError
from selffl_ray.experiment import Prepared, write_params
from selffl_ray.flat import digest
from selffl_ray.participation import RoundPlan
from selffl_ray.pool import ClientPool, StateLostError
from selffl_ray.run_writer import RunWriter
from selffl_ray.runtime.actors import Control

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


def run_digest(prepared: Prepared) -> str:
    """Names what a checkpoint belongs to: everything that results depend on, not the placement."""
    raw = to_raw(prepared.config)
    parts = {k: raw[k] for k in ("seed", "data", "model", "method", "training")}
    parts["data"] = {k: v for k, v in parts["data"].items() if k != "source"}
    text = json.dumps(parts, sort_keys=True)
    return digest([], [text, prepared.store.manifest.digest, prepared.partition.digest])


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
        self._digest = run_digest(prepared)
        self._checkpoints = writer.folder / "checkpoints"
        self._all_states_next = True
        self._lost_clients = 0
        self._run = Run(
            prepared.algorithm,
            prepared.federation,
            pool,
            prepared.plans,
            prepared.evaluation,
            prepared.config.faults,
            prepared.dataset.task,
        )

    def go(self) -> str:
        """Run to the end; the status. Lost hosts are replaced and their rounds replayed.

        Raises:
            RunError: hosts were lost too often, or too few clients answered.
        """
        self._pool.begin(self._prepared.run_spec, self._prepared.algorithm)
        place, losses, furthest = self._restore(), 0, -1
        while True:
            try:
                return self._rounds(place)
            except StateLostError as error:
                newest = self._writer.tables.last_round()
                reached = -1 if newest is None else int(newest["round_index"])
                losses = 1 if reached > furthest else losses + 1
                furthest = max(furthest, reached)
                place = self._get_up(error, losses)

    def _get_up(self, error: StateLostError, losses: int) -> _Place:
        causes = "; ".join(f"host {item.host}: {item.cause}" for item in error.lost)
        if losses > self._prepared.config.faults.max_retries:
            raise RunError(
                f"hosts were lost {losses} times without progress ({causes}); "
                f"the last checkpoint is {latest_checkpoint(self._checkpoints)}"
            ) from error
        hosts = {item.host for item in error.lost}
        self._lost_clients += int(np.isin(self._pool.homes, list(hosts)).sum())
        logger.warning("lost %s; replacing and replaying", causes)
        self._control.emit(Message(f"lost {causes}; replacing it and replaying its rounds"))
        self._pool.revive(error.lost)
        return self._restore()

    def _restore(self) -> _Place:
        """The newest checkpoint's state in server and hosts, or the start."""
        algorithm, spec = self._prepared.algorithm, self._prepared.run_spec
        start_P = torch.from_numpy(np.array(spec.start_params))
        path = latest_checkpoint(self._checkpoints)
        self._all_states_next = True
        if path is None:
            self._writer.tables.restore(-1)
            self._pool.import_states([])
            return _Place(0, algorithm.init(start_P), 0)
        saved = load_checkpoint(
            path, self._digest, algorithm.init(start_P), algorithm.init_client(start_P, 1)
        )
        self._writer.tables.restore(saved.counters.round_index)
        self._pool.import_states(saved.states)
        return _Place(saved.counters.round_index + 1, saved.server, saved.counters.gradient_steps)

    def _rounds(self, place: _Place) -> str:
        began, stop = time.monotonic(), _StopRule(self._prepared)
        rounds = run_rounds(
            self._run,
            place.server,
            first_round=place.next_round,
            gradient_steps=place.gradient_steps,
        )
        record = None
        for record in rounds:
            if self._lost_clients:
                record.metrics["clients/faults"] += self._lost_clients
                self._lost_clients = 0
            self._writer.add(record)
            self._control.emit(self._progress(record, time.monotonic() - began))
            enough = stop.reached(record, time.monotonic() - began)
            if self._control.stopping or self._due(record.plan.round_index):
                self._save(record)
            if self._control.stopping:
                return "STOPPED"
            if enough:
                break
        if record is not None and self._prepared.config.export_models:
            self._export(record)
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
        everything = first or self._all_states_next
        changed = self._pool.export_states(changed_only=not everything)
        counters = Counters(record.plan.round_index, record.gradient_steps, self._digest)
        keep = self._prepared.config.checkpoint.keep
        try:
            save_checkpoint(self._checkpoints, counters, record.server, changed, keep)
            self._writer.tables.flush()
            self._all_states_next = False
        except OSError as error:
            self._all_states_next = True
            logger.warning("no checkpoint after round %d: %s", record.plan.round_index, error)
            self._control.emit(Message(f"no checkpoint could be written: {error}"))

    def _export(self, record: RoundRecord) -> None:
        """The global model, and the model that each client predicts with."""
        spec, folder = self._prepared.federation.spec, self._writer.folder / "models"
        params = self._prepared.algorithm.global_params(record.server)
        if not isinstance(params, NotAvailable):
            write_params(folder / "global.safetensors", params, spec)
        everybody = RoundPlan(
            record.plan.round_index,
            np.arange(len(self._prepared.client_ids), dtype=np.int64),
            record.plan.learning_rate,
        )
        message = self._prepared.algorithm.broadcast(record.server, everybody)
        for index, theta in self._pool.personal_models(everybody, message).items():
            name = quote(self._prepared.client_ids[index], safe="")
            write_params(folder / "clients" / f"{name}.safetensors", torch.from_numpy(theta), spec)


class _StopRule:
    """The ``training.stop`` part of a configuration, over the evaluations of a run."""

    def __init__(self, prepared: Prepared) -> None:
        self._config = prepared.config.training.stop
        lower = not prepared.dataset.task.higher_is_better or self._config.metric.endswith("loss")
        self._sign = -1 if lower else 1
        self._best = -np.inf
        self._since = 0

    def reached(self, record: RoundRecord, seconds: float) -> bool:
        """Whether this round was the last one."""
        config = self._config
        if config.seconds is not None and seconds >= config.seconds:
            return True
        value = record.metrics.get(config.metric)
        if value is None:
            return False
        if config.target is not None and self._sign * value >= self._sign * config.target:
            return True
        better = self._sign * value > self._best
        self._best, self._since = (
            max(self._best, self._sign * value),
            0 if better else (self._since + 1),
        )
        return config.patience is not None and self._since >= config.patience
