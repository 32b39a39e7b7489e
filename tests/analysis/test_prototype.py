"""The study of the prototype: its file, its figures, and what counts as within the tolerance."""

from __future__ import annotations

import pandas as pd
import pytest

from analysis import prototype
from selffl_ray.config import parse_config
from selffl_ray.sweep import load_sweep


def test_every_entry_of_the_file_stands_under_the_name_of_its_method():
    variants = prototype.variants()
    assert len(variants) == len(prototype.EXPECTED)
    for variant in variants:
        assert list(variant.choices) == list(prototype.SCENARIOS)
        methods = [s["method"] for choices in variant.choices.values() for s in choices]
        names = {m if isinstance(m, str) else m["name"] for m in methods}
        assert names == {variant.label.replace(",", "").split()[0]}
        assert all(m.get("preset", "") in variant.label for m in methods if isinstance(m, dict))


def test_scenarios_are_the_partitions_that_their_names_say():
    (first,) = [v for v in prototype.variants() if v.label == "selffl two_tap"]
    partitions = {k: choices[0][prototype.SCENE] for k, choices in first.choices.items()}
    skews = {k: (p["name"], p["alpha"]) for k, p in partitions.items()}
    assert skews == {
        "dir01": ("dirichlet", 0.1),
        "dir05": ("dirichlet", 0.5),
        "rot": ("rotation", 100.0),
        "iid": ("dirichlet", 100.0),
    }


def test_choices_are_at_most_nine_as_the_prototype_had():
    counts = {len(c) for v in prototype.variants() for c in v.choices.values()}
    assert counts == {1, 2, 6}


def test_the_base_is_the_prototypes_setting(tmp_path):
    config = parse_config(load_sweep(prototype.CONFIG).base, tmp_path)
    training, model = config.training, config.model.component
    assert (training.num_rounds, training.num_local_steps, training.batch_size) == (50, 20, 20)
    assert (training.sampling, model.name, config.evaluation.last) == ("replacement", "mlp", 5)


def test_test_labels_are_drawn_in_the_proportions_of_the_client_as_the_prototypes_were():
    partitions = [
        settings[prototype.SCENE]
        for variant in prototype.variants()
        for choices in variant.choices.values()
        for settings in choices
    ]
    assert {p["test_labels"] for p in partitions} == {"drawn"}


@pytest.mark.parametrize(("found", "verdict"), [(83.0, "yes"), (83.7, "**no**")])
def test_a_mean_beyond_the_tolerance_is_marked(found, verdict):
    rows = pd.DataFrame(
        {
            "scenario": "dir05",
            "variant": "fedavg",
            "global": [found, found + 1.0],
            "local": [81.1, 81.1],
        }
    )
    lines = prototype.table(rows).splitlines()[2:]
    assert [line.split(" | ")[-1].removesuffix(" |") for line in lines] == [verdict, "yes"]
    assert f"| {found + 0.5 - 81.1:+.1f} |" in lines[0]


def labelled(label):
    (variant,) = [v for v in prototype.variants() if v.label == label]
    return variant


def test_every_choice_is_the_prototypes_whole_grid():
    grids = {
        "local, rate and length chosen": ("training.num_rounds", {5, 25, 50}),
        "fedrep": ("method.head_steps", {5, 10, 20}),
    }
    for label, (key, values) in grids.items():
        choices = prototype.every_choice(labelled(label)).choices
        for settings in choices.values():
            pairs = [(s[key], s[prototype.RATE]) for s in settings]
            assert sorted(pairs) == [(v, r) for v in sorted(values) for r in (0.03, 0.1, 0.3)]
    single = prototype.every_choice(labelled("selffl as_described, eta 0.1, rho 0.01"))
    assert all(len(choices) == 1 for choices in single.choices.values())


def rows_of(*found):
    names = {"scenario": "rot", "variant": "local, rate and length chosen"}
    return pd.DataFrame([names | dict(zip(ROW, one, strict=True)) for one in found])


ROW = ("chosen", "seed", "global", "local")


def test_a_choice_is_within_if_the_means_of_both_measures_are():
    """The prototype's figures are 31.4 and 67.5, the tolerance 2.5."""
    rows = rows_of(
        ("a", 0, 30.0, 66.5), ("a", 1, 34.0, 70.5),  # means 32.0 and 68.5
        ("b", 0, 31.4, 70.1),
        ("c", 0, 28.8, 67.5),
    )  # fmt: skip
    lines = prototype.every_choice_table(rows).splitlines()[2:]
    assert [line.split(" | ")[2:] for line in lines] == [
        ["a", "2", "32.0", "68.5", "+0.6, +1.0", "yes |"],
        ["b", "1", "31.4", "70.1", "+0.0, +2.6", "no |"],
        ["c", "1", "28.8", "67.5", "-2.6, +0.0", "no |"],
    ]


def test_a_resumed_study_runs_the_seeds_that_a_choice_lacks():
    variant = labelled("local, rate and length chosen")
    settings = prototype.every_choice(variant).choices["rot"]
    shown = [" ".join(f"{k}={v}" for k, v in s.items() if k not in ("data.partition", "method"))
             for s in settings]  # fmt: skip
    done = rows_of((shown[0], 0, 1, 1), (shown[0], 1, 1, 1), (shown[1], 1, 1, 1))
    todo = prototype.jobs([variant], ["rot"], [0, 1], done, every=True)
    assert [(list(v.choices.values()), list(seeds)) for _, v, seeds in todo] == [
        ([[one]], [0] if one == settings[1] else [0, 1]) for one in settings[1:]
    ]
    assert prototype.jobs([variant], ["rot"], [0, 1], done, every=False) == []
    ((scenario, same, seeds),) = prototype.jobs([variant], ["rot"], [0, 2], done, every=False)
    assert (scenario, same, seeds) == ("rot", variant, [0, 2])


@pytest.mark.parametrize(("flag", "value"), [("--seeds", "0,a"), ("--processes", "0")])
def test_wrong_numbers_are_one_line(flag, value, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "sys.argv", ["prototype", flag, value, "--output", str(tmp_path / "x" / "y")]
    )
    with pytest.raises(SystemExit) as end:
        prototype.main()
    assert end.value.code == 2
    assert value in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "x").exists()
