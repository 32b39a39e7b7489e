"""What a search space means: grids, draws, conditions, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selffl_ray.errors import ConfigError
from selffl_ray.search_space import expand, read_space


def points(space, samples=1, seed=0):
    return expand(read_space(space), samples, seed)


def test_lists_are_a_grid_in_the_order_of_the_file():
    found = points({"a": [1, 2], "b.c": ["x", "y", "z"]})
    assert found == [{"a": a, "b.c": c} for a in (1, 2) for c in ("x", "y", "z")]


def test_a_list_of_mappings_is_their_union_and_an_empty_one_is_the_base():
    assert points([{"a": [1, 2]}, {}, {"b": [3]}]) == [{"a": 1}, {"a": 2}, {}, {"b": 3}]


def test_a_condition_sets_a_key_only_where_it_holds():
    space = {
        "how": ["stop", "interpolate", "map"],
        "steps": {"grid": [50, 200], "when": {"how": ["interpolate", "map"]}},
        "tail": {"grid": [True], "when": {"steps": 200}},
    }
    assert points(space) == [
        {"how": "stop"},
        {"how": "interpolate", "steps": 50},
        {"how": "interpolate", "steps": 200, "tail": True},
        {"how": "map", "steps": 50},
        {"how": "map", "steps": 200, "tail": True},
    ]


def test_a_random_entry_can_depend_on_a_random_one():
    space = {
        "how": {"choice": ["a", "b"]},
        "rate": {"uniform": [1.0, 2.0], "when": {"how": "b"}},
    }
    found = points(space, samples=200)
    assert len(found) == 200
    assert all(("rate" in p) == (p["how"] == "b") for p in found)
    assert 60 < sum(p["how"] == "b" for p in found) < 140


def test_draws_have_the_distributions_that_they_are_named_for():
    space = {
        "u": {"uniform": [2.0, 4.0]},
        "l": {"loguniform": [1e-4, 1.0]},
        "r": {"randint": [3, 6]},
        "c": {"choice": ["x", "y"]},
    }
    found = points(space, samples=4000)
    uniform = np.asarray([p["u"] for p in found])
    assert uniform.min() >= 2
    assert uniform.max() < 4
    assert abs(uniform.mean() - 3) < 5 * math.sqrt(4 / 12 / 4000)
    logs = np.log10([p["l"] for p in found])
    assert logs.min() >= -4
    assert logs.max() <= 0
    assert abs(logs.mean() + 2) < 5 * math.sqrt(16 / 12 / 4000)
    assert {p["r"] for p in found} == {3, 4, 5}
    assert {p["c"] for p in found} == {"x", "y"}


def test_every_point_of_the_grid_gets_the_same_number_of_draws():
    found = points({"a": [1, 2], "u": {"uniform": [0.0, 1.0]}}, samples=3)
    assert [p["a"] for p in found] == [1, 1, 1, 2, 2, 2]
    assert len({p["u"] for p in found}) == 6


@given(seed=st.integers(0, 2**31), samples=st.integers(1, 20))
def test_draws_are_repeated_by_their_seed_and_a_longer_search_begins_with_the_shorter(
    seed, samples
):
    space = {"u": {"loguniform": [0.1, 10.0]}, "n": {"randint": [0, 1000]}}
    shorter, longer = points(space, samples, seed), points(space, samples + 5, seed)
    assert longer[:samples] == shorter
    assert points(space, samples, seed) == shorter
    assert points(space, samples, seed + 1) != shorter


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "space is empty"),
        ([], "space is empty"),
        ([{}, {}], "space is empty"),
        ({"a": []}, r"space: a: grid needs a list of values, got \[\]"),
        ({"a": 3}, "space: a must be a list of values, or one of grid, choice"),
        ({"a": {"normal": [0, 1]}}, "space: a must be a list of values, or one of"),
        ({"a": {"grid": [1], "uniform": [0, 1]}}, "space: a must be a list of values, or one of"),
        ({"a": {"grid": [1], "wen": {}}}, "space: a must be a list of values, or one of"),
        ({"a": {"uniform": [2, 1]}}, r"uniform needs \[low, high\] with low < high, got \[2, 1\]"),
        ({"a": {"uniform": [1]}}, r"uniform needs \[low, high\]"),
        ({"a": {"loguniform": [0, 1]}}, r"loguniform needs .* above 0, got \[0, 1\]"),
        ({"a": {"randint": [0.5, 3]}}, r"randint needs \[low, high\]"),
        ({"a": {"uniform": [False, True]}}, r"uniform needs \[low, high\]"),
        ({"seed": [0, 1]}, "seed is no entry of a space"),
        ({"a": {"grid": [1], "when": {"b": 1}}}, "a: when names b, which is no earlier entry"),
        (
            {"a": ["x"], "b": {"grid": [1], "when": {"a": "y"}}},
            r"b: when a is one of \['y'\], but it is only ever one of \['x'\]",
        ),
        ({"a": ["x"], "b": {"grid": [1], "when": {"a": []}}}, r"b: when a is one of \[\], but"),
        ({"a": {"grid": [1], "when": [1]}}, r"a: when must map keys to values, got \[1\]"),
        (
            {"a": {"uniform": [0, 1]}, "b": {"grid": [1], "when": {"a": 1}}},
            "b is a grid and cannot depend on the random a; use choice",
        ),
    ],
)
def test_a_wrong_space_is_one_line_that_names_the_key(space, message):
    with pytest.raises(ConfigError, match=message) as caught:
        points(space)
    assert "\n" not in str(caught.value)


def test_several_draws_of_nothing_random_are_refused():
    with pytest.raises(ConfigError, match=r"budget.samples: 3 draws of a space without random"):
        points({"a": [1, 2]}, samples=3)
