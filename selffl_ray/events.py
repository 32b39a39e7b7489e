"""What went wrong in a run: events for the tables, and failures in words.

They stand in the column ``events`` of ``rounds.parquet``: a JSON list of :class:`Event` in each
row. An event of a round that is replayed stands there once, and one that does not come back when
the round is replayed stands there too. ``clients/faults`` is the sum of their ``num_clients``.
Events that no row has, of a round that was not finished or of what came after the last one, stand
in ``summary.json``. Until either is written they are in ``events.jsonl``, see ``event_log.py``.

Which events are the same, so that one of them is kept (:attr:`Event.key`): of a client round,
attempt, kind and client, for the same streams bring the same failure back, on whatever host; of a
slow host round and host; of a lost host or driver actor round, number, kind, host and cause. A loss
does not come back. One that reads as a loss that an earlier command or driver actor noted is
another one, and gets the next number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from selffl_ray.messages import ClientFailure, FailureKind

HostKind = Literal["died", "silent", "memory"]
"""It ended or its node did, did not answer in time, or its clients ran out of memory in it."""
Outcome = Literal["retried", "left out", "replaced", "restarted", "kept", "aborted"]
"""The client was asked again, or the round went on without it; its host was replaced and rounds
replayed; so was the driver actor; its update was taken all the same; the run ended."""
NO_HOST = -1
"""Host of an event of the driver actor."""

COUNTS = ("round_index", "attempt", "num_clients", "host")
TEXTS = ("kind", "cause", "place", "outcome")


class Whereabouts(NamedTuple):
    """Where a host is, and how much memory it took when it last told (None: it never did)."""

    host: int
    place: str
    memory_bytes: int | None

    def __str__(self) -> str:
        used = self.memory_bytes
        memory = "unknown" if used is None else f"{used / 2**20:.0f} MiB"
        return f"host {self.host}, {self.place}, last memory reading {memory}"


class Event(NamedTuple):
    """Something that went wrong in a round, and what was done about it.

    attempt: of the round, from 0; of a lost host the number of losses without progress, from 1,
    driver actors before this one counted where the rest is the same.
    kind: see ``faults.py``. client_id: None if it was a host with all of its clients. num_clients:
    clients that gave no update because of it. host, place, memory_bytes: as in
    :class:`Whereabouts`.
    """

    round_index: int
    attempt: int
    kind: FailureKind | HostKind | Literal["slow", "driver"]
    client_id: str | None
    num_clients: int
    cause: str
    host: int
    place: str
    memory_bytes: int | None
    outcome: Outcome

    @property
    def is_loss(self) -> bool:
        """Whether a host or the driver actor was lost."""
        return self.client_id is None and self.kind != "slow"

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for the same event of a round that is replayed."""
        # On another number of actors a client has another host.
        host = self.host if self.client_id is None else None
        why = self.cause if self.is_loss else None
        return (self.round_index, self.attempt, self.kind, host, self.client_id, why)


class EventBook:
    """Events by round: those of rounds that are replayed are kept, and none is kept twice."""

    def __init__(self) -> None:
        self._events: dict[tuple[Any, ...], Event] = {}
        self._in_rows: set[tuple[Any, ...]] = set()

    def note(self, event: Event) -> Event:
        """Take in what happened now; the event as it is kept, a loss with a number of its own."""
        while event.is_loss and event.key in self._events:
            event = event._replace(attempt=event.attempt + 1)
        self._events[event.key] = event
        return event

    def recall(self, rows: Iterable[Mapping[str, Any]], last_round: int) -> None:
        """Go back to a round: take in what was written of later ones, unless it is known."""
        self._in_rows = {key for key in self._in_rows if key[0] <= last_round}
        for row in rows:
            event = Event(**row)
            self._events.setdefault(event.key, event)

    def all(self) -> list[Event]:
        """The events of rounds that may be replayed, and those that no row has."""
        return list(self._events.values())

    def of(self, round_index: int) -> list[Event]:
        """The events of a round, as they happened."""
        return [event for event in self._events.values() if event.round_index == round_index]

    def for_row(self, round_index: int) -> list[Event]:
        """The events of a round, which are written with it now."""
        found = self.of(round_index)
        self._in_rows |= {event.key for event in found}
        return found

    def outside_rows(self) -> list[Event]:
        """The events that no row has."""
        return [event for key, event in self._events.items() if key not in self._in_rows]

    def forget(self, last_round: int) -> None:
        """Drop the events in rows up to this one, which will never be replayed."""
        done = {key for key in self._in_rows if key[0] <= last_round}
        self._in_rows -= done
        self._events = {k: e for k, e in self._events.items() if k not in done}


def well_formed(events: Any) -> list[dict[str, Any]]:
    """Events as they were read, without what a damaged file holds in their place.

    Raises:
        TypeError: not a list.
    """
    return [
        event
        for event in events
        if isinstance(event, dict)
        and set(event) == set(Event._fields)
        and all(isinstance(event[name], int) for name in COUNTS)
        and all(isinstance(event[name], str) for name in TEXTS)
        and isinstance(event["client_id"], str | None)
        and isinstance(event["memory_bytes"], int | None)
    ]


def client_failed(
    failure: ClientFailure,
    client_id: str,
    at: tuple[int, int],
    where: Whereabouts,
    outcome: Outcome,
) -> Event:
    """An event of one client.

    Args:
        at: round and attempt.
    """
    host, place, memory = where
    return Event(*at, failure.kind, client_id, 1, failure.cause, host, place, memory, outcome)


def host_was_slow(seconds: float, limit_s: float, round_index: int, where: Whereabouts) -> Event:
    """An event of a host that came near the limit, ``faults.client_timeout_s``."""
    cause = f"it took {seconds:.1f} s, faults.client_timeout_s is {limit_s:g}"
    host, place, memory = where
    return Event(round_index, 0, "slow", None, 0, cause, host, place, memory, "kept")


def driver_died(cause: str, round_index: int, count: int) -> Event:
    """An event of the driver actor, of which it is the ``count``-th in the run, from 1.

    Args:
        round_index: with which its successor goes on.
    """
    return Event(
        *(round_index, count, "driver", None, 0, cause),
        *(NO_HOST, "the driver actor", None, "restarted"),
    )


def named(failure: ClientFailure, client_ids: Sequence[str], where: Whereabouts) -> str:
    """A failure in words: which client, where and why."""
    who = client_ids[failure.client_index]
    return f"client {who!r}, {failure.stage}: {failure.cause} ({where})"
