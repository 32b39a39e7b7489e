"""Text for people: progress lines and small tables. Nothing here prints."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from selffl_ray.datasets.store import StoreProgress
from selffl_ray.run_loop import Progress
from selffl_ray.sweep_progress import SweepProgress
from selffl_ray.sweep_results import Ranked, interval, shown

if TYPE_CHECKING:
    import pandas as pd

Row = Mapping[str, Any]


def progress_line(event: Progress) -> str:
    """Round, accuracies, participants and the time that is left, of one run."""
    done = event.round_index + 1
    left = event.seconds / done * (event.num_rounds - done)
    parts = [f"{event.label}  round {done}/{event.num_rounds}"]
    for split in ("test", "val"):
        for score, factor, unit in (("accuracy", 100, " %"), ("mse", 1, "")):
            found = [event.metrics.get(f"{split}/{who}_{score}") for who in ("global", "local")]
            if found[0] is not None or found[1] is not None:
                shown = ", ".join(
                    f"{who} {_number(value, factor)}{unit}"
                    for who, value in zip(("global", "local"), found, strict=True)
                    if value is not None
                )
                parts.append(f"{split} {shown}")
                break
        else:
            continue
        break
    parts.append(f"{event.participants} clients")
    parts.append(f"{duration(left)} left" if left else f"{duration(event.seconds)}")
    return "  ".join(parts)


def sweep_line(event: SweepProgress) -> str:
    """Trials done and failed, the best value so far, and the time that is left."""
    parts = [f"{event.stage}  {event.done}/{event.total} trials"]
    if event.failed:
        parts.append(f"{event.failed} failed")
    if event.best is not None:
        value, label = event.best
        percent = "accuracy" in event.metric
        shown = _number(value, 100 if percent else 1)
        parts.append(f"best {event.metric} {shown}{' %' if percent else ''} ({label})")
    left = event.seconds / max(event.started_done, 1) * (event.total - event.done)
    known = event.started_done > 0 and left > 0
    parts.append(f"{duration(left)} left" if known else duration(event.seconds))
    return "  ".join(parts)


BAR = 20
"""Characters of a full bar."""


def store_line(event: StoreProgress) -> str:
    """What is done to a store, a bar if its size is known, and the time that is left."""
    parts = [event.stage]
    left = 0.0
    if event.total:
        share = min(event.done / event.total, 1.0)
        full = int(BAR * share)
        parts.append(f"[{'#' * full}{'.' * (BAR - full)}] {int(100 * share)} %")
        left = event.seconds / event.done * max(event.total - event.done, 0)
    parts.append(f"{event.num_rows} examples")
    parts.append(f"{duration(left)} left" if left else duration(event.seconds))
    return "  ".join(parts)


def _number(value: float, factor: float) -> str:
    return f"{value * factor:.1f}" if factor != 1 else f"{value:.5g}"


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 10 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(num_bytes: float) -> str:
    """``512 B``, ``1.2 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    raise AssertionError("the last unit always returns")


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: bool = False) -> str:
    """Columns aligned: the first to the left, the others to the right unless ``left``."""
    widths = [max(len(r[c]) for r in (header, *rows)) for c in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        rest = zip(cells[1:], widths[1:], strict=True)
        padded = [c.ljust(w) if left else c.rjust(w) for c, w in rest]
        return "  ".join([cells[0].ljust(widths[0]), *padded]).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])


COLUMNS = (
    ("global", "global_{score}"),
    ("local", "local_{score}"),
    ("worst 10 %", "local_{score}_worst10"),
    ("harmed", "clients_harmed_vs_global"),
)


def comparison_table(summaries: Sequence[Row]) -> str:
    """Method, global and local score, worst 10 %, share harmed, gradient steps, seconds.

    Several seeds of a method become mean and sample standard deviation. What was not measured is a
    dash.
    """
    labels = list(dict.fromkeys(s["label"] for s in summaries))
    split = "test" if any(k.startswith("test/") for k in summaries[0]["final"]) else "val"
    score = "mse" if f"{split}/local_mse" in summaries[0]["final"] else "accuracy"
    header = ["method", *(title for title, _ in COLUMNS), "gradient steps", "seconds"]
    rows = []
    for label in labels:
        own = [s for s in summaries if s["label"] == label]
        cells = [label]
        for _, name in COLUMNS:
            metric = name.format(score=score)
            percent = score == "accuracy" or "harmed" in name
            cells.append(_cell([s["final"].get(f"{split}/{metric}") for s in own], percent))
        cells.append(_cell([_steps(s["final"]) for s in own], percent=False, digits=0))
        cells.append(f"{np.mean([s['wall_s'] for s in own]):.1f}")
        rows.append(cells)
    seeds = sorted({s["seed"] for s in summaries})
    unit = "percent" if score == "accuracy" else "squared error a coordinate"
    note = f"{split} data, {unit}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    lines = [text_table(header, rows), f"({note})"]
    steps = {label: _mean_steps(summaries, label) for label in labels}
    known = [value for value in steps.values() if value is not None]
    if known and max(known) > UNEQUAL * min(known):
        lines.append("(gradient steps differ: more of them help, whatever the method)")
    return "\n".join(lines)


MOST_RANKED = 15
"""Configurations that the table on the terminal shows."""


def ranking_table(ranking: Sequence[Ranked], rows: pd.DataFrame, metric: str) -> str:
    """The best configurations of a sweep, with intervals over seeds."""
    if not ranking:
        return "no configuration has finished with all of its seeds"
    tests = [m for m in ("test/local_accuracy", "test/global_accuracy") if m in rows]
    header = ["configuration", metric, "minus reference", *tests]
    table = []
    for one in ranking[:MOST_RANKED]:
        own = rows[rows["configuration"] == one.configuration]
        difference = one.difference
        table.append(
            [
                one.label,
                shown(one.value, metric),
                "-" if difference is None else shown(difference, metric, signed=True),
                *(shown(interval(own[name].tolist()), name) for name in tests),
            ]
        )
    lines = [text_table(header, table)]
    if len(ranking) > MOST_RANKED:
        lines.append(f"(the best {MOST_RANKED} of {len(ranking)})")
    seeds = ", ".join(map(str, ranking[0].seeds))
    lines.append(f"(mean ± 95 % interval over seeds {seeds}; differences paired by seed)")
    return "\n".join(lines)


UNEQUAL = 1.5
"""Ratio of gradient steps from which a comparison says that they differ."""


def _mean_steps(summaries: Sequence[Row], label: str) -> float | None:
    found = [_steps(s["final"]) for s in summaries if s["label"] == label]
    known = [value for value in found if value is not None]
    return float(np.mean(known)) if known else None


def _steps(final: Row) -> float | None:
    train = final.get("cost/gradient_steps")
    return None if train is None else train + final.get("cost/personalization_steps", 0.0)


def _cell(values: Sequence[float | None], percent: bool, digits: int = 1) -> str:
    known = [v for v in values if v is not None and not math.isnan(v)]
    if not known:
        return "-"
    numbers = np.asarray(known) * (100 if percent else 1)
    if not percent and digits == 1 and numbers.max() < 1:
        return f"{numbers.mean():.5f}"
    text = f"{numbers.mean():.{digits}f}"
    if len(numbers) > 1:
        text += f" ±{numbers.std(ddof=1):.{digits}f}"
    return text


LIVE_S = 0.1
"""Seconds between two looks of a live line that would otherwise change more often."""


class ProgressPrinter:
    """Turns events into one live line on a terminal, and into plain lines elsewhere.

    Args:
        write: prints text as it is, without a line end.
        live: whether the output is a terminal.
    """

    def __init__(self, write: Any, live: bool | None = None) -> None:
        self._write = write
        self._live = sys.stderr.isatty() if live is None else live
        self._open = False
        self._trials_done = -1
        self._store_seconds = -math.inf

    def __call__(self, event: Any) -> None:
        """Show a Progress, a SweepProgress, a StoreProgress or a Message."""
        if isinstance(event, Progress):
            last = event.round_index + 1 == event.num_rounds
            self._show(progress_line(event), last, last or "time/eval_s" in event.metrics)
        elif isinstance(event, SweepProgress):
            last = event.done == event.total
            news = event.done != self._trials_done
            self._trials_done = event.done
            self._show(sweep_line(event), last, news)
        elif isinstance(event, StoreProgress):
            self._show_store(event)
        else:
            self.end()
            self._write(f"{event.text}\n")

    def _show_store(self, event: StoreProgress) -> None:
        """A store may have thousands of clients a second: no more lines than an eye can follow."""
        if event.finished:
            self._store_seconds = -math.inf
        elif event.seconds - self._store_seconds < LIVE_S or not self._live:
            return
        else:
            self._store_seconds = event.seconds
        self._show(store_line(event), event.finished, news=event.finished)

    def _show(self, line: str, last: bool, news: bool) -> None:
        """Rewrite the live line; elsewhere a line of its own, if it is news."""
        if self._live:
            self._write(f"\r\x1b[2K{line}" + ("\n" if last else ""))
            self._open = not last
        elif news:
            self._write(f"{line}\n")

    def end(self) -> None:
        """Leave the live line as it stands."""
        if self._open:
            self._write("\n")
            self._open = False
