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
