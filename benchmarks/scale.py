"""How cost grows with clients, parameters, actors and evaluation, and the rules that it must keep.

    python -m benchmarks.scale [--parts a,b] [--passes 3] [--output FILE.csv]

Parts:
  clients     W1, W3 and W4 train the same 16,000 examples a round with 20, 200 and 1000 clients
  evaluation  W1 with local and global evaluation after every round, and without
  memory      what the driver holds with 100, 1000 and 10,000 clients, and what an idle client adds
  actors      two client actors against one, and W3s against W3 on two, on Ray, a round of each in
              turn, 4 (W2) to 60 (W1) rounds a pass; clock time: needs two cores to itself; "within
              the actors" is the slowest actor's own time
  large       10,000 clients with state in memory, 100,000 with state on disk (4 GiB of disk)

Everything but ``actors`` and ``large`` is processor time of one thread in this process, as other
work on the machine slows the clock much more. Figures are medians over the passes; of rounds, over
the steady ones (all but the first). "Beyond the steps" is what a round takes apart from local SGD;
drawing batches counts as beyond.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pandas as pd

from benchmarks import scale_memory
from benchmarks.command_line import chosen, from_one, save
from benchmarks.in_process import Bench
from benchmarks.workloads import workload_config
from selffl_ray import training
from selffl_ray.algorithms import fedavg

KILO, MEGA = 1e3, 2**20


class Finding(NamedTuple):
    """A rule: what was measured, and the most that it may be (None: there is no bound)."""

    rule: str
    measured: float
    bound: float | None
    unit: str

    @property
    def verdict(self) -> str:
        """Whether the rule is kept."""
        if self.bound is None:
            return ""
        return "kept" if self.measured <= self.bound else "BROKEN"


class _Steps:
    """Processor seconds within local SGD, drawing batches apart, while it is entered."""

    PLACES = ((fedavg, "local_sgd", 1), (training, "plan_batches", -1))

    def __enter__(self) -> _Steps:
        self.seconds = 0.0
        self._patches = [
            mock.patch.object(module, name, self._timed(getattr(module, name), sign))
            for module, name, sign in self.PLACES
        ]
        for patch in self._patches:
            patch.start()
        return self

    def _timed(self, function: Callable[..., Any], sign: int) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += sign * (time.process_time() - began)

        return timed

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.stop()


def clients(passes: int) -> list[Finding]:
    """The same examples dealt to more and more clients."""
    benches = {name: Bench(workload_config(name)) for name in ("W1", "W3", "W4")}
    round_s: dict[str, list[float]] = {name: [] for name in ("W1", "W3", "W3s", "W4")}
    beyond_ms: dict[str, list[float]] = {name: [] for name in benches}
    for _ in range(passes):
        for name, values in round_s.items():
            bench = benches["W3" if name == "W3s" else name]
            rounds = list(bench.rounds(workload_config(name)))
            values.append(statistics.median(r.cpu_s for r in rounds[1:]))
        for name, bench in benches.items():
            beyond_ms[name].append(_beyond(bench, name))
    median = {name: statistics.median(values) for name, values in round_s.items()}
    found = [
        Finding(f"{name}, a client beyond the steps", statistics.median(values), 0.3, "ms")
        for name, values in beyond_ms.items()
    ]
    shown = [
        Finding(f"{name}, a round", seconds * KILO, None, "ms") for name, seconds in median.items()
    ]
    return [
        *shown,
        *found,
        Finding("W4 over W3: 1000 clients over 200", median["W4"] / median["W3"], 2.5, "x"),
        Finding("W3s over W3: a tenth of 200", median["W3s"] / median["W3"], 0.2, "x"),
    ]


def _beyond(bench: Bench, name: str) -> float:
    """Milliseconds a client and round that are no steps."""
    with _Steps() as steps:
        rounds, spent = bench.rounds(workload_config(name)), []
        for done in rounds:
            spent.append(done.cpu_s - steps.seconds)
            steps.seconds = 0.0
    return statistics.median(spent[1:]) * KILO / len(bench.prepared.clients)


def evaluation(passes: int) -> list[Finding]:
    """What evaluating everybody after every round adds."""
    config = workload_config("W1")
    bench = Bench(config)
    added = []
    for _ in range(passes):
        spent = [
            statistics.median(r.cpu_s for r in list(bench.rounds(config, evaluated))[1:])
            for evaluated in ((), range(config.training.num_rounds))
        ]
        added.append(spent[1] / spent[0] - 1)
    return [Finding("W1, evaluation after every round adds", statistics.median(added), 0.2, "x")]


def memory_rules(passes: int) -> Iterator[Finding]:
    """What clients cost the driver, and clients that are never asked."""
    model = ("model.hidden=[200]", "method=selffl", "training.num_rounds=2")
    driver = []
    for count in (100, 1000, 10_000):
        driver.append(
            scale_memory.alone(scale_memory.in_driver, scale_memory.federation(count, *model))
        )
        yield Finding(f"driver, Self-FL, {count} clients", driver[-1].peak / MEGA, None, "MiB")
    few, many = driver[0], driver[-1]
    growth = (many.peak - few.peak) / (many.clients - few.clients) / many.model
    yield Finding("driver, Self-FL, a client over the model's size", growth, 0.1, "x")
    wide = [
        scale_memory.alone(
            scale_memory.in_driver, scale_memory.federation(100, f"model.hidden=[{w}]", *model[1:])
        )
        for w in (1000, 4000)
    ]
    growth = (wide[1].peak - wide[0].peak) / (wide[1].model - wide[0].model)
    yield Finding("driver, Self-FL, 100 clients, a parameter more", growth, 20, "x")
    idle = []
    for count in (1000, 11_000):
        asked = (f"training.participation_rate={20 / count}", "training.num_rounds=3")
        config = scale_memory.federation(count, *asked, "method=ditto", "model.hidden=[10]")
        idle.append(scale_memory.alone(scale_memory.in_all, config, None))
    more = idle[1].unique - idle[1].data - (idle[0].unique - idle[0].data)
    each = more / (idle[1].clients - idle[0].clients) / KILO
    yield Finding("an idle client adds, beside its data", each, 1.0, "kB")


def actors(passes: int) -> Iterator[Finding]:
    """Two client actors against one, and a tenth of the clients against all of them."""
    # Imported here: the processes that measure memory import this module, too.
    from benchmarks.scale_actors import tenth_over_all, two_over_one

    for name, bound in (("W1", 0.6), ("W3", 0.6), ("W4", 0.6), ("W2", 0.55)):
        ratio = two_over_one(name, passes)
        yield Finding(f"{name}, two actors over one", ratio.clock, bound, "x")
        yield Finding(f"{name}, two actors over one, within the actors", ratio.in_hosts, None, "x")
    ratio = tenth_over_all(passes)
    yield Finding("W3s over W3, on two actors", ratio.clock, 0.2, "x")
    yield Finding("W3s over W3, on two actors, within the actors", ratio.in_hosts, None, "x")


def large(passes: int) -> Iterator[Finding]:
    """Federations that must run at all on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        for count, rate, where in ((10_000, 0.1, None), (100_000, 0.01, Path(folder))):
            taken = scale_memory.large(count, rate, where)
            store = "memory" if where is None else "disk"
            name = f"{count} clients, state in {store}, {rate:.0%} a round"
            yield Finding(f"{name}: a round", taken.round_s, None, "s")
            yield Finding(f"{name}: everything", taken.whole_s, None, "s")
            yield Finding(f"{name}: own memory", taken.unique / 2**30, None, "GiB")


PARTS: dict[str, Callable[[int], Iterable[Finding]]] = {
    "clients": clients,
    "evaluation": evaluation,
    "memory": memory_rules,
    "actors": actors,
    "large": large,
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", default=None, help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--passes", type=from_one, default=3)
    parser.add_argument("--output", default=None)
    options = parser.parse_args()
    rows = []
    for part in chosen(parser, "--parts", options.parts, PARTS):
        for found in PARTS[part](options.passes):
            bound = "" if found.bound is None else f"<= {found.bound:g}"
            print(
                f"{found.rule:60} {found.measured:10.3f} {found.unit:7} {bound:8} {found.verdict}"
            )
            rows.append({"part": part, **found._asdict(), "verdict": found.verdict})
    save(pd.DataFrame(rows), options.output)


if __name__ == "__main__":
    main()
