"""Self-FL, FedAvg and training alone on seven data sets, beside what is known of the data.

    python -m analysis.sets [--sets digits,watch] [--source fsdd=FOLDER] [--seeds 0,1,2]
                            [--output FOLDER/NAME] [--resume] [--skip-missing]

What a row of the table is stands in ``tune_configs/sets/<row>.yaml``, its data set there too: one
set may have several rows, which differ in the model. Self-FL is its default realisation.
Writes one CSV row a run and a Markdown page: a table of all sets, and below it what earlier studies
of the same data lead one to expect, beside what was found. With ``--resume`` the rows of OUTPUT.csv
are kept as far as their settings are still those of the files; without it everything is run anew.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from analysis.report.measures import number, shown, signed
from analysis.report.statistics import NOISE, Interval, paired, t_interval
from selffl_ray import ExperimentConfig, run_experiment
from selffl_ray.config import parse_config
from selffl_ray.datasets.base import Dataset
from selffl_ray.describe import describe
from selffl_ray.errors import ConfigError, DataError, UsageError
from selffl_ray.experiment import prepare_experiment
from selffl_ray.flat import digest
from selffl_ray.raw_config import apply_value
from selffl_ray.registry import datasets
from selffl_ray.run_loop import run_identity
from selffl_ray.search_space import expand, read_space
from selffl_ray.sweep import load_sweep
from selffl_ray.tables import write_text

FOLDER = Path(__file__).parents[1] / "tune_configs" / "sets"

KINDS: Mapping[str, str] = {
    "digits": "images",
    "digits_cnn": "images",
    "watch": "motion",
    "mnist": "images",
    "fashion_mnist": "images",
    "spoken_words": "synthetic speech",
    "fsdd": "speech",
    "sotu": "text",
}
"""The rows in the order of the table, and what their examples are."""

NEW = ", new clients"
"""Ends the label of a row whose score is that of the global model on clients that never train."""

ONE = ("fedavg", "global")
ALONE = ("local", "local")
OTHERS = (f"fedavg{NEW}", "global")
NAMES = {
    ONE: "FedAvg's model",
    ALONE: "training alone",
    OTHERS: "FedAvg's model on clients that never trained",
}

Score = tuple[str, str]
"""Label of a row, and ``global`` or ``local``."""

FEW = 3.0
"""Points that a trained model may lie off a figure of another model."""


class Figure(NamedTuple):
    """An accuracy in percent that a study of the same data with other models gives, or a range."""

    score: Score
    low: float
    high: float


class Order(NamedTuple):
    """Of two scores, the one that such a study finds better."""

    better: Score
    worse: Score


DIGITS = (
    Figure(ONE, 99.0, 99.0),
    Figure(ALONE, 97.9, 97.9),
    Figure(OTHERS, 96.9, 96.9),
    Order(ONE, ALONE),
    Order(ONE, OTHERS),
)

EXPECTED: Mapping[str, tuple[str, Sequence[Figure | Order]]] = {
    "digits": (
        "a support vector machine on the pixels, 30 % of each form for test; its order is not "
        "that of every model: scikit-learn's perceptron with 64 units, two seeds of the same "
        "design, has 98.4 together, 98.3 alone and 95.9 for forms that it never saw",
        DIGITS,
    ),
    "digits_cnn": (
        "the same support vector machine; the network was taken because FedAvg's model led "
        "training alone on validation data of three other seeds, 96.4 to 95.4; on one of these the "
        "perceptron trained alone was better than anything of the network; the test part of seed 0 "
        "had been seen before (`tune_configs/sets/digits_cnn.yaml`)",
        DIGITS,
    ),
    "watch": (
        "logistic regression on 72 statistics of a window, split by time",
        [Figure(ONE, 91.3, 91.3), Figure(ALONE, 97.6, 97.6), Figure(OTHERS, 84.7, 84.7),
         Order(ALONE, ONE), Order(ONE, OTHERS)],
    ),
    "spoken_words": (
        "a perceptron on 35 words of 40 voices, 70 clips each: 48 % together, 16 % alone; with "
        "other words and clips only the order can be compared",
        [Order(ONE, ALONE)],
    ),
    "fsdd": (
        "a model on other log-mel features of the same recordings, the range over speakers",
        [Figure(ONE, 90.0, 100.0), Figure(ALONE, 88.0, 100.0), Figure(OTHERS, 50.0, 78.0),
         Order(ONE, OTHERS)],
    ),
    "sotu": (
        "counts of three characters: 2.694 bits a character together, 2.711 alone",
        [Order(ONE, ALONE)],
    ),
}  # fmt: skip
"""By row, where the figures come from and what they are; the others have none."""

NOTE = """Accuracy on test data in percent; local: of each client's own model on its own test
examples, mean over clients; mean ± half-width of the 95 % t interval over seeds (one seed has
none). A seed draws start, batches and which clients never train; of digits and spoken_words the
test part too, of mnist, fashion_mnist and sotu the clients. The sets have different numbers of
classes and sizes of clients: compare methods within a row, not rows. Rates were not tuned here:
they are the sets' own, but training alone on fsdd (0.03) and sotu (0.1) has the better of two by
validation, and each method on digits_cnn the best of three. Steps are not evened out: Self-FL's
default takes 16 % (watch) to twice (sotu) as many gradient steps as FedAvg. Earlier studies of
single sets are in `watch.md`, `fsdd.md`, `spoken_words.md` and `sotu.md`. The global accuracy of
`local` is that of the mean of the clients' parameters."""

MET = f"""A figure is met within {FEW:g} points, or so near to its range; an order is met if the
mean difference, seed by seed, has its sign."""


class Job(NamedTuple):
    """One run. settings: digest of all that its result depends on, where the data lie left out."""

    name: str
    label: str
    config: ExperimentConfig
    settings: str


# -- what is to be run ----------------------------------------------------------------------------


def data_set(name: str) -> str:
    """The data set of a row, as its file has it."""
    return str(load_sweep(FOLDER / f"{name}.yaml").base["data"]["name"])


def jobs(name: str, source: str | None, seeds: Sequence[int]) -> list[Job]:
    """All runs of a row, in the order of its file."""
    sweep = load_sweep(FOLDER / f"{name}.yaml")
    return [
        _job(name, sweep.base, {**settings, "data.source": source, "seed": seed})
        for settings in expand(read_space(sweep.space), 1, 0)
        for seed in seeds
    ]


def _job(name: str, base: Mapping[str, Any], settings: Mapping[str, Any]) -> Job:
    raw = json.loads(json.dumps(base))
    fixed = {"placement.backend": "local", "tracking.enabled": False}
    for key, value in {**settings, **fixed}.items():
        if value is not None:
            apply_value(raw, key, value)
    config = parse_config(raw, Path.cwd())
    new = NEW if config.evaluation.new_clients else ""
    identity = {**run_identity(config), "evaluation": asdict(config.evaluation)}
    own = digest([], [json.dumps(identity, sort_keys=True)])[:12]
    return Job(name, config.method_label + new, config, own)


def missing(config: ExperimentConfig) -> str | None:
    """Why a set's files cannot be read here, with the remedy; None if they are there."""
    dataset: Dataset = datasets.make(config.data.component)
    try:
        dataset.find(config.data.source)
    except DataError as error:
        return str(error)
    return None


def read_sources(given: Sequence[str], wanted: Sequence[str]) -> dict[str, str]:
    """``set=FOLDER`` options as a mapping; wanted: the data sets that are run.

    Raises:
        ConfigError: no such form, a set that is not run, a set twice.
    """
    sources: dict[str, str] = {}
    for text in given:
        name, _, folder = text.partition("=")
        if not folder or name not in wanted:
            raise ConfigError(
                f"--source must be SET=FOLDER with one of {', '.join(wanted)}, got {text!r}"
            )
        if name in sources:
            raise ConfigError(f"--source names {name} twice; keep one")
        sources[name] = folder
    return sources


# -- runs -----------------------------------------------------------------------------------------

COLUMNS = ("set", "label", "seed", "settings", "source", "clients", "examples", "model", "weights",
           "rounds", "global", "local", "data_digest")  # fmt: skip


NO_ROWS = pd.DataFrame(columns=list(COLUMNS))


def run(job: Job) -> dict[str, Any]:
    """A CSV row: the run's accuracies, shares in [0, 1], and what it was run on."""
    prepared = prepare_experiment(job.config)
    with tempfile.TemporaryDirectory() as folder:
        final = run_experiment(job.config, output=folder).summary["final"]
    split = "new" if job.label.endswith(NEW) else "test"
    sizes = describe(prepared).sizes_M
    values = (
        job.name,
        job.label,
        job.config.seed,
        job.settings,
        "found" if job.config.data.source is None else "given",
        len(sizes),
        int(sizes.sum()),
        job.config.model.component.name,
        prepared.model.spec.num_params,
        job.config.training.num_rounds,
        final.get(f"{split}/global_accuracy"),
        final.get(f"{split}/local_accuracy"),
        prepared.store.manifest.digest[:16],
    )
    return dict(zip(COLUMNS, values, strict=True))


def read_rows(path: Path) -> pd.DataFrame:
    """Rows of an earlier, perhaps interrupted, study; none if there is no such file."""
    if not path.exists():
        return NO_ROWS
    return pd.read_csv(path, dtype={"settings": str, "data_digest": str})


def study(wanted: Sequence[Job], rows: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """All rows after each run; what was run with the same settings is not run again."""
    for job in wanted:
        if job.settings in set(rows["settings"]):
            continue
        rows = pd.DataFrame([*rows.to_dict("records"), run(job)], columns=list(COLUMNS))
        yield rows


def current(rows: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """The runs of other rows, and of the named rows those with the settings of today's files."""
    seeds = sorted(set(rows["seed"].astype(int)))
    settings = {job.settings for name in names for job in jobs(name, None, seeds)}
    return rows[~rows["set"].isin(names) | rows["settings"].isin(settings)]


# -- the page -------------------------------------------------------------------------------------


def values_of(rows: pd.DataFrame, name: str, score: Score) -> dict[int, float]:
    """Accuracies by seed; empty where nothing was measured."""
    label, measure = score
    own = rows[(rows["set"] == name) & (rows["label"] == label)].dropna(subset=[measure])
    return dict(zip(own["seed"].astype(int), own[measure].astype(float), strict=True))


def _cell(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    # Seeds that agree but for rounding have no interval worth showing.
    even = interval.half is not None and interval.half < NOISE
    return shown(interval._replace(half=None) if even else interval, 100.0, 1)


def _interval(values: Mapping[int, float]) -> Interval | None:
    return t_interval(list(values.values())) if values else None


def sets_table(rows: pd.DataFrame) -> str:
    """Markdown: a row a file, global and local accuracy of each method."""
    labels = [label for label in dict.fromkeys(rows["label"]) if not label.endswith(NEW)]
    header = ["set", "kind", "clients", "examples", "model", "rounds", "seeds"]
    header += [f"{label} {measure}" for label in labels for measure in ("global", "local")]
    lines = [_line(header), _line(["---"] * len(header))]
    for name in (name for name in KINDS if name in set(rows["set"])):
        own = rows[rows["set"] == name]
        first = own.iloc[0]
        cells = [
            name,
            KINDS[name],
            number(first["clients"], 0),
            number(own["examples"].mean(), 0),
            f"{first['model']}, {number(first['weights'], 0)} weights",
            number(first["rounds"], 0),
            number(own["seed"].nunique(), 0),
        ]
        scores = [(label, measure) for label in labels for measure in ("global", "local")]
        cells += [_cell(_interval(values_of(rows, name, score))) for score in scores]
        lines.append(_line(cells))
    return "\n".join(lines)


def expectations_table(rows: pd.DataFrame) -> str:
    """Markdown: what was expected of each set, what was found, and whether it was met."""
    found = [
        [name, *cells]
        for name, (_, expected) in EXPECTED.items()
        for one in expected
        if (cells := _expected(rows, name, one)) is not None
    ]
    return "\n".join(map(_line, [["set", "expected", "found", "met"], ["---"] * 4, *found]))


def _expected(rows: pd.DataFrame, name: str, one: Figure | Order) -> list[str] | None:
    return _figure(rows, name, one) if isinstance(one, Figure) else _order(rows, name, one)


def _figure(rows: pd.DataFrame, name: str, figure: Figure) -> list[str] | None:
    found = _interval(values_of(rows, name, figure.score))
    if found is None:
        return None
    least, most = figure.low - FEW, figure.high + FEW
    ends = dict.fromkeys(number(end, 1) for end in (figure.low, figure.high))
    met = least <= 100 * found.mean <= most
    return [f"{NAMES[figure.score]} {' to '.join(ends)}", _cell(found), _yes(met)]


def _order(rows: pd.DataFrame, name: str, order: Order) -> list[str] | None:
    better, worse = (values_of(rows, name, score) for score in order)
    difference = paired(better, worse)
    if difference is None:
        return None
    half = "" if difference.half is None else f" ± {number(100 * difference.half, 1)}"
    text = f"{signed(difference.mean, 100.0, 1)}{half}"
    expected = f"{NAMES[order.better]} above {NAMES[order.worse]}"
    return [expected, text, _yes(difference.mean > 0)]


def _yes(met: bool) -> str:
    return "yes" if met else "**no**"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def page(rows: pd.DataFrame, skipped: Sequence[str]) -> str:
    """The whole Markdown page."""
    data = {name: data_set(name) for name in dict.fromkeys(rows["set"])}
    count = len(set(data.values()))
    parts = ["# Seven data sets", f"Command: `{command(rows)}`", sets_table(rows)]
    if count < len(data):
        parts.append(f"{len(data)} rows, {count} sets: rows of one set differ in the model.")
    parts.append(NOTE)
    if rows.groupby("set")["seed"].nunique().nunique() > 1:
        parts.append("Not every set has all seeds yet; the command with `--resume` adds the rest.")
    if skipped:
        parts.append(f"Not run, their files were not there: {', '.join(skipped)}.")
    there = [name for name in EXPECTED if name in set(rows["set"])]
    if there:
        sources = [f"- {name}: {EXPECTED[name][0]}." for name in there]
        parts += ["## Beside what is known of the data", expectations_table(rows), MET]
        parts += ["The figures are of earlier studies with other models:\n" + "\n".join(sources)]
    named = rows.assign(data=rows["set"].map(data))
    digests = named.drop_duplicates(["data", "data_digest"]).groupby("data", sort=False)
    lines = [f"- {name}: {', '.join(own['data_digest'])}" for name, own in digests]
    parts.append("Data digests:\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def command(rows: pd.DataFrame) -> str:
    """What makes these rows from nothing; folders of this machine are not named."""
    names = [name for name in KINDS if name in set(rows["set"])]
    given = {data_set(name) for name in set(rows[rows["source"] == "given"]["set"])}
    parts = ["python -m analysis.sets"]
    parts += [f"--sets {','.join(names)}"] if len(names) < len(KINDS) else []
    parts += [
        f"--source {name}=FOLDER" for name in dict.fromkeys(map(data_set, names)) if name in given
    ]
    return " ".join([*parts, f"--seeds {','.join(map(str, sorted(set(rows['seed']))))}"])


# -- command line ---------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.sets", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--sets", default=",".join(KINDS), help="rows of the table; default: all")
    parser.add_argument(
        "--source", action="append", default=[], metavar="SET=FOLDER", help="once a set"
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--output", default="analysis/results/sets", help="without .md and .csv")
    parser.add_argument("--resume", action="store_true", help="keep the rows that OUTPUT.csv has")
    parser.add_argument(
        "--skip-missing", action="store_true", help="leave out sets whose files are not there"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study.

    Returns:
        0; or, after one line that says what to mend, 2.
    """
    try:
        _main(build_parser().parse_args(arguments))
    except UsageError as error:
        print(f"sets: {error}", file=sys.stderr)
        return 2
    return 0


def _main(options: argparse.Namespace) -> None:
    names, seeds = options.sets.split(","), _seeds(options.seeds)
    if unknown := [name for name in names if name not in KINDS]:
        raise ConfigError(f"--sets: unknown {', '.join(unknown)}; there are {', '.join(KINDS)}")
    data = {name: data_set(name) for name in KINDS if name in names}
    sources = read_sources(options.source, list(dict.fromkeys(data.values())))
    wanted = {name: jobs(name, sources.get(own), seeds) for name, own in data.items()}
    skipped = _skip({name: own[0].config for name, own in wanted.items()}, options.skip_missing)
    to_do = [job for name, own in wanted.items() if name not in skipped for job in own]
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.with_suffix(".csv")
    kept = current(read_rows(path), names) if options.resume else NO_ROWS
    if kept.empty and not to_do:
        raise DataError("nothing to run: the files of no set are there; see above")
    rows = kept
    for rows in study(to_do, kept):
        write_text(path, rows.to_csv(index=False, float_format="%.6f"))
        print(rows.tail(1).to_string(index=False, header=False), flush=True)
    text = page(rows, [name for name in skipped if name not in set(rows["set"])])
    write_text(output.with_suffix(".md"), text)
    print(text)


def _seeds(text: str) -> list[int]:
    if not all(part.isdigit() for part in text.split(",")):
        raise ConfigError(f"--seeds must be numbers with commas between them, got {text!r}")
    return [int(part) for part in text.split(",")]


def _skip(configs: Mapping[str, ExperimentConfig], allowed: bool) -> list[str]:
    """Names of the sets whose files are not there, each said; an error unless that is allowed."""
    skipped = []
    for name, config in configs.items():
        if (why := missing(config)) is None:
            continue
        if not allowed:
            raise DataError(
                f"{why} (here: --source {config.data.component.name}=FOLDER), or leave the set out "
                "with --skip-missing"
            )
        print(f"sets: {name} is skipped: {why}", file=sys.stderr)
        skipped.append(name)
    return skipped


if __name__ == "__main__":
    sys.exit(main())
