"""Configurations: strict, resolved, written back whole, and wrong in one line."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import sys
import types
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selffl_ray.algorithms.selffl import SelfFLConfig
from selffl_ray.config import (
    ExperimentConfig,
    flatten,
    load_config,
    parse_config,
    registry_of,
    resolve,
    to_raw,
    to_yaml,
)
from selffl_ray.errors import ConfigError, SelfFLError
from selffl_ray.registry import (
    Component,
    algorithms,
    inter_estimators,
    intra_estimators,
    models,
    partitioners,
)

NOWHERE = Path("/nowhere")


def parsed(raw: dict[str, Any]) -> ExperimentConfig:
    return parse_config(raw, NOWHERE)


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parsed(raw)
    return str(caught.value)


# -- round trip ---------------------------------------------------------------------------------

ROUND_TRIPS: dict[str, dict[str, Any]] = {
    "default": {},
    "fedavg": {"method": "fedavg"},
    "local": {"method": {"name": "local"}},
    **{
        f"selffl {preset}": {"method": {"preset": preset}}
        for preset in algorithms.get("selffl").presets
    },
    **{f"intra {name}": {"method": {"intra": name}} for name in intra_estimators.names()},
    **{f"inter {name}": {"method": {"inter": name}} for name in inter_estimators.names()},
    "estimators with options": {
        "method": {
            "preset": "as_described",
            "intra": {"name": "round_window", "window": 7},
            "granularity": "layer",
            "beta_intra": 0.25,
            "contraction": 1e-05,
        }
    },
    "gaussian": {"data": {"name": "gaussian", "num_examples": [3, 4, 5], "num_clients": 3}},
    "gaussian identity": {
        "data": {"name": "gaussian", "optima": "identity", "intra_var": [0.5], "inter_var": 2}
    },
    **{f"model {name}": {"model": name} for name in models.names()},
    **{
        f"partition {name}": {"data": {"name": "mnist", "partition": name}}
        for name in partitioners.names()
    },
    "sizes": {
        "data": {
            "name": "fashion_mnist",
            "pool": 2,
            "source": "~/images",
            "partition": {"name": "rotation", "groups": 2, "sizes": {"min": 3, "max": 9}},
        }
    },
    "epochs": {"training": {"num_local_epochs": 2, "clip_norm": 1, "schedule": "cosine"}},
    "stop": {"training": {"stop": {"target": 0.9, "patience": 3, "seconds": 1.5}}},
    "start": {"training": {"start_from": "models/global.safetensors"}},
    "placement": {"placement": {"clients_per_actor": 3, "cpus_per_actor": 0.5, "backend": "local"}},
    "classes": {"placement": {"gpus_per_client": {"form-0*": 0.25, "*": 0}}},
    "evaluation": {"evaluation": {"splits": [0.6, 0.4, 0], "max_clients": 3, "new_clients": 0.2}},
    "store": {"tracking": {"uri": "sqlite:///there/mlflow.db", "enabled": False}},
    "strings that YAML could take for something else": {
        "tracking": {
            "tags": {
                "a": "1e-3",
                "b": "null",
                "c": "yes",
                "d": "2020-01-01",
                "e": "ünï — \n two lines",
                "f": "0.5",
                "g": "",
                "1.5e3": "{}",
            }
        }
    },
}


@pytest.mark.parametrize("raw", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_a_resolved_configuration_reads_back_equal(raw, tmp_path):
    first = parsed(raw)
    path = written(tmp_path, to_yaml(first))
    again = load_config(path, folder=tmp_path)
    assert again == first
    assert to_yaml(again) == to_yaml(first)


def test_reading_does_not_change_what_is_read():
    raw = {"data": {"name": "gaussian"}, "method": {"preset": "exact"}, "model": None}
    before = copy.deepcopy(raw)
    parsed(raw)
    assert raw == before


def test_a_configuration_built_in_python_is_resolved_like_one_from_yaml():
    assert resolve(ExperimentConfig()) == parsed({})
    assert ExperimentConfig().evaluation.splits is None


def test_a_wrong_type_in_a_configuration_built_in_python_is_noticed():
    config = dataclasses.replace(ExperimentConfig(), seed="7")
    with pytest.raises(ConfigError, match="seed must be a valid integer, got '7'"):
        resolve(config)


def test_flattened_parameters_have_dotted_keys_and_every_value():
    flat = flatten(to_raw(parsed({"method": {"intra": "split_half"}})))
    assert flat["method.intra.name"] == "split_half"
    assert flat["evaluation.splits"] == "[0.2, 0.2, 0.6]"
    assert flat["training.stop.target"] == "None"
    assert all(isinstance(value, str) for value in flat.values())


# -- every key ----------------------------------------------------------------------------------


def put(raw: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A copy with a value at a path."""
    out = copy.deepcopy(raw)
    at = out
    for key in path[:-1]:
        at = at.setdefault(key, {})
    at[path[-1]] = value
    return out


def get(value: Any, path: tuple[str, ...]) -> Any:
    raw = to_raw(value)
    for key in path:
        raw = raw[key]
    return raw


def leaves(kind: type, base: dict[str, Any], prefix: tuple[str, ...]):
    """(raw that is needed, path, its resolved value) of every field, entry by entry."""
    hints = get_type_hints(kind, include_extras=True)
    for spec in dataclasses.fields(kind):
        hint, path = hints[spec.name], (*prefix, spec.name)
        options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        nested = [o for o in options if dataclasses.is_dataclass(o)]
        if get_origin(hint) is Annotated and get_args(hint)[0] is Component:
            registry = registry_of(hint)
            at = prefix if spec.name == "component" else path
            for name in registry.names():
                chosen = put(base, (*at, "name"), name)
                yield chosen, (*at, "name"), name
                yield from leaves(registry.get(name).config_type, chosen, at)
        elif nested:
            needs = {"min": 1, "max": 2} if "sizes" in path else {}
            yield from leaves(nested[0], put(base, path, needs), path)
        else:
            yield base, path, None


def fitted(base: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """Other parts that a component at this path needs, so that the whole is valid."""
    if path[:2] == ("data", "partition") and "name" not in base["data"]:
        return put(base, ("data", "name"), "mnist")
    return base


FIELDS = {
    f"{'.'.join(path)} of {base.get(path[0], {}).get('name', '')}".removesuffix(" of "): (
        fitted(base, path),
        path,
    )
    for base, path, _ in leaves(ExperimentConfig, {}, ())
    if path[-1] != "name"
}


def test_the_walk_over_the_fields_finds_all_levels():
    paths = {path for _, path in FIELDS.values()}
    assert {
        ("seed",),
        ("training", "stop", "patience"),
        ("data", "partition", "sizes", "max"),
        ("method", "intra", "window"),
        ("method", "preset"),
        ("model", "hidden"),
        ("model", "convert_norm"),
        ("tracking", "uri"),
    } <= paths


@pytest.mark.parametrize(("base", "path"), FIELDS.values(), ids=FIELDS)
def test_every_field_is_accepted_from_yaml_and_its_neighbour_is_refused(base, path):
    value = get(parsed(base), path)
    given = parsed(put(base, path, value))
    assert given == parsed(base)
    assert get(given, path) == value
    wrong = (*path[:-1], f"{path[-1]}s")
    message = refusal(put(base, wrong, value))
    assert f"{'.'.join(wrong)}: unknown key (did you mean '{path[-1]}'?); known: " in message


@pytest.mark.parametrize(("base", "path"), FIELDS.values(), ids=FIELDS)
def test_no_field_takes_a_nested_list_and_the_message_says_where(base, path):
    assert refusal(put(base, path, [[]])).startswith(".".join(path))


# -- types and null -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("seed", "3", "seed must be a valid integer, got '3'"),
        ("seed", True, "seed must be a valid integer, got True"),
        ("seed", 3.0, "seed must be a valid integer, got 3.0"),
        ("seed", None, "seed must be a valid integer, got None"),
        ("experiment", 3, "experiment must be a valid string, got 3"),
        ("experiment", None, "experiment must be a valid string, got None"),
        ("export_models", 1, "export_models must be a valid boolean, got 1"),
        ("export_models", "yes", "export_models must be a valid boolean, got 'yes'"),
        ("training.num_rounds", "3", "training.num_rounds must be a valid integer, got '3'"),
        ("training.learning_rate", "0.1", "training.learning_rate must be a valid number"),
        ("training.learning_rate", True, "training.learning_rate must be a valid number"),
        ("training.learning_rate", -0.1, "training.learning_rate must be > 0, got -0.1; usual"),
        ("training.learning_rate", float("nan"), "training.learning_rate must be > 0, got nan"),
        ("training.learning_rate", float("inf"), "training.learning_rate must be > 0, got inf"),
        ("training.sampling", "epochs", "training.sampling must be 'epoch' or 'replacement'"),
        ("training.stop", 3, "training.stop must be a mapping of keys, got 3"),
        ("training", [1], "training must be a mapping of keys, got [1]"),
        ("evaluation.splits", 0.5, "evaluation.splits must be a valid array, got 0.5"),
        ("evaluation.splits", [1, 0], "evaluation.splits must be longer, got [1, 0]"),
        ("evaluation.splits", [1, 1, 0], "evaluation.splits must be shares"),
        ("model.hidden", 64, "model.hidden must be a valid array, got 64"),
        ("model.hidden", ["64"], "model.hidden must be a valid integer, got ['64']"),
        ("tracking.tags", {"a": 1}, "tracking.tags must be a valid string, got {'a': 1}"),
        ("placement.clients_per_actor", "all", "placement.clients_per_actor must be"),
        ("placement.cpus_per_actor", 0, "placement.cpus_per_actor must be > 0 or auto, got 0"),
        ("plugins", "my_module", "plugins must be a list of module names, got 'my_module'"),
        ("plugins", [""], "plugins must be module names as in my_module, got ''"),
        ("plugins", ["..up"], "plugins must be module names as in my_module, got '..up'"),
        ("plugins", ["no_such_plugin"], "plugins: cannot import 'no_such_plugin'"),
        ("data", 3, "data must be a mapping of keys, got 3"),
        ("data.name", 3, "data.name must be a name, got 3"),
        ("method.intra", 3, "method.intra must be a mapping of keys, got 3"),
        ("seed", datetime.date(2020, 1, 1), "is not a plain value; quote it"),
        ("seed", b"1", "is not a plain value; quote it"),
        ("seed", {1, 2}, "is not a plain value; quote it"),
    ],
)
def test_a_value_of_another_type_is_refused_naming_key_and_value(path, value, message):
    found = refusal(put({}, tuple(path.split(".")), value))
    assert message in found
    assert "\n" not in found


def test_an_integer_does_for_a_float_and_a_list_for_a_tuple():
    config = parsed({"training": {"learning_rate": 1}, "evaluation": {"splits": [1, 0, 0]}})
    assert isinstance(config.training.learning_rate, float)
    assert config.evaluation.splits == (1.0, 0.0, 0.0)


def test_a_long_wrong_value_is_cut_in_the_message():
    assert len(refusal({"seed": "x" * 10_000})) < 250


def test_null_is_a_value_where_it_means_something_and_an_empty_part_is_the_default():
    assert parsed({"training": {"clip_norm": None}}).training.clip_norm is None
    empty = {"data": None, "model": None, "method": None, "training": None, "tracking": None}
    assert parsed(empty) == parsed({})


def test_an_empty_part_keeps_what_suits_the_data_set():
    raw = {"data": {"name": "gaussian"}, "model": None, "training": None, "evaluation": None}
    assert parsed(raw) == parsed({"data": "gaussian"})
    assert parsed(raw).model.component.name == "linear"
    assert parsed({"evaluation": {"splits": None}}).evaluation.splits == (0.2, 0.2, 0.6)


def test_an_option_that_must_be_given_is_named():
    raw = {"data": {"name": "mnist", "partition": {"name": "iid", "sizes": {"min": 3}}}}
    assert refusal(raw) == "data.partition.sizes: max must be given"


def test_a_number_too_large_to_compute_with_is_a_refusal():
    raw = {"data": {"name": "gaussian", "num_examples": [10**30]}}
    assert refusal(raw).startswith("data.num_examples must be at most 100000000, got [1")


# -- names, defaults, presets -------------------------------------------------------------------


def test_a_bare_name_is_short_for_a_mapping_with_that_name():
    short = {"data": "mnist", "model": "cnn", "method": "fedavg"}
    assert parsed(short) == parsed({key: {"name": value} for key, value in short.items()})
    assert parsed({"method": {"intra": "fisher"}}) == parsed(
        {"method": {"intra": {"name": "fisher"}}}
    )


def test_an_unknown_name_is_refused_with_the_nearest_one_and_the_list():
    message = refusal({"method": "fedavgs"})
    assert "method.name: unknown method 'fedavgs' (did you mean 'fedavg'?); known: " in message
    assert all(name in message for name in algorithms.names())


def test_a_data_set_brings_what_suits_it_under_the_users_keys():
    config = parsed({"data": "gaussian", "training": {"num_rounds": 7}})
    assert config.model == parsed({"data": "gaussian", "model": {"bias": False}}).model
    assert config.model.component.name == "linear"
    assert not config.model.component.options.bias
    assert config.training.learning_rate == 0.1
    assert config.training.num_rounds == 7
    assert config.evaluation.splits == (1.0, 0.0, 0.0)
    assert (
        parsed({"data": "gaussian", "training": {"learning_rate": 0.5}}).training.learning_rate
        == 0.5
    )


def test_another_model_drops_the_options_that_were_meant_for_the_first():
    config = parsed({"data": "gaussian", "model": "mlp"})
    assert config.model == parsed({"model": "mlp"}).model
    assert parsed({"data": "gaussian", "model": "linear"}).model.component.options.bias is False


@pytest.mark.parametrize("data", ["fashion_mnist", {"name": "fashion_mnist"}])
def test_the_partition_of_a_data_set_without_clients_takes_options_without_its_name(data):
    config = parsed({"data": data})
    assert config.data.partition.name == "dirichlet"
    assert load_config(None, ["data=fashion_mnist", "data.partition.alpha=0.25"]).data == (
        parsed({"data": {"name": "fashion_mnist", "partition": {"alpha": 0.25}}}).data
    )


def test_without_splits_of_its_own_a_data_set_has_the_usual_ones():
    assert parsed({"data": "mnist"}).evaluation.splits == (0.6, 0.2, 0.2)
    assert parsed({}).evaluation.splits == (0.2, 0.2, 0.6)


def method(raw: dict[str, Any]) -> SelfFLConfig:
    options = parsed({"method": raw}).method.options
    assert isinstance(options, SelfFLConfig)
    return options


def test_explicit_keys_win_over_a_preset():
    preset, own = method({"preset": "exact"}), method({"preset": "exact", "discount": 0.25})
    assert preset.discount == 1.0
    assert own == dataclasses.replace(preset, discount=0.25)


def test_options_of_a_presets_estimator_can_be_set_without_naming_it():
    preset = method({"preset": "as_described"})
    own = method({"preset": "as_described", "intra": {"window": 9}})
    assert own.intra.name == preset.intra.name == "round_window"
    assert own.intra.options == dataclasses.replace(preset.intra.options, window=9)


def test_an_unknown_preset_is_refused_with_the_list():
    message = refusal({"method": {"preset": "two_taps"}})
    assert "method.preset: unknown preset 'two_taps' (did you mean 'two_tap'?)" in message
    assert all(name in message for name in algorithms.get("selffl").presets)


def test_the_method_is_labelled_with_its_preset():
    assert parsed({}).method_label == "selffl-two_tap"
    assert parsed({"method": {"preset": "exact"}}).method_label == "selffl-exact"
    assert parsed({"method": "fedavg"}).method_label == "fedavg"


# -- paths and names ----------------------------------------------------------------------------


def test_relative_paths_start_at_the_given_folder_and_become_absolute(tmp_path):
    raw = {
        "data": {"name": "mnist", "source": "images"},
        "training": {"start_from": "a/global.safetensors"},
        "tracking": {"uri": "sqlite:///stores/mlflow.db"},
    }
    config = parse_config(raw, tmp_path)
    assert config.data.source == str(tmp_path / "images")
    assert config.training.start_from == str(tmp_path / "a/global.safetensors")
    assert config.tracking.uri == f"sqlite:///{tmp_path}/stores/mlflow.db"
    assert parse_config(to_raw(config), NOWHERE) == config


def test_a_path_in_the_home_folder_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    config = parsed({"data": {"name": "mnist", "source": "~/images"}})
    assert config.data.source == "/home/somebody/images"


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/a", ".hidden", "-x", "a b", "a\n", "a\x00", "ä"]
)
def test_an_experiment_whose_name_would_leave_its_folder_is_refused(name):
    assert refusal({"experiment": name}).startswith("experiment must be letters, digits")


def test_usual_experiment_names_are_taken():
    assert parsed({"experiment": "digits.v2_A-1"}).experiment == "digits.v2_A-1"


# -- files and --set ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must hold a mapping of keys, found a list"),
        ("3", "must hold a mapping of keys, found a int"),
        ("{1: 2}", "the configuration must be a mapping of keys, got {1: 2}"),
        ("training: {1: 2}", "training must be a mapping of keys, got {1: 2}"),
        ("a: [1", "is not valid YAML"),
        ("a: b: c", "is not valid YAML"),
        ("experiment: 2024-02-30", "is not valid YAML: day is out of range"),
        ("seed: 1\nseed: 2\n", "the key 'seed' is given twice; keep one"),
        ("training: {momentum: 0.1, momentum: 0.2}", "the key 'momentum' is given twice"),
        (bytes(range(256)), "cannot read the configuration"),
        ("\x00", "is not valid YAML"),
        ("x: !!python/object/apply:os.mkdir [pwned]", "could not determine a constructor"),
        ("x: !!python/name:os.system", "could not determine a constructor"),
        ("model: {hidden: " + "[" * 3000 + "]" * 3000 + "}", "is not valid YAML"),
        ("a: " + "{a: " * 3000 + "1" + "}" * 3000, "is not valid YAML"),
        ("model: {hidden: " + "[" * 150 + "]" * 150 + "}", "more than 50 brackets"),
        ("model: &m {name: mlp, hidden: *m}", "an alias in itself"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_broken_file_is_refused_in_one_line(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match=f"cannot read the configuration {path}"):
            load_config(path)


def test_an_empty_file_is_the_default_experiment(tmp_path):
    assert load_config(written(tmp_path, "# nothing\n")) == load_config()


def test_anchors_and_merged_mappings_are_not_keys_given_twice(tmp_path):
    text = "training: &t {momentum: 0.5, num_rounds: 7}\nfaults: {}\n"
    assert load_config(written(tmp_path, text)).training.momentum == 0.5
    merged = (
        "checkpoint: &c {every: 3, keep: 4}\nevaluation:\n  <<: {every: 7, last: 3}\n  last: 2\n"
    )
    config = load_config(written(tmp_path, merged))
    assert (config.evaluation.every, config.evaluation.last) == (7, 2)


@pytest.mark.parametrize(
    ("sets", "path", "value"),
    [
        (["training.num_rounds=5"], "training.num_rounds", 5),
        (["training.learning_rate=1e-3"], "training.learning_rate", 0.001),
        (["training.learning_rate=.5E-1"], "training.learning_rate", 0.05),
        (["training.learning_rate=5"], "training.learning_rate", 5.0),
        (["model.hidden=[8, 4]"], "model.hidden", [8, 4]),
        (["method=fedavg"], "method.name", "fedavg"),
        (["method={name: selffl, kappa: 2.0}"], "method.kappa", 2.0),
        (["method.intra=fisher", "method.kappa=0.5"], "method.intra.name", "fisher"),
        (["data=gaussian", "data.num_clients=3"], "data.num_clients", 3),
        (["experiment=a", "experiment=b"], "experiment", "b"),
        (["training.clip_norm=null"], "training.clip_norm", None),
        (["training.clip_norm="], "training.clip_norm", None),
        (["export_models=true"], "export_models", True),
        (["tracking.tags.note='a=b'"], "tracking.tags", {"note": "a=b"}),
        (["tracking.tags={note: a=b}"], "tracking.tags", {"note": "a=b"}),
    ],
)
def test_settings_are_read_as_yaml_and_the_later_one_wins(sets, path, value):
    assert get(load_config(None, sets), tuple(path.split("."))) == value


def test_a_setting_wins_over_the_file_and_leaves_its_neighbours(tmp_path):
    path = written(tmp_path, "method: fedavg\ntraining: {num_rounds: 3, momentum: 0.5}\n")
    config = load_config(path, ["training.num_rounds=4"])
    assert (config.training.num_rounds, config.training.momentum) == (4, 0.5)
    assert config.method.name == "fedavg"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.num_rounds", "write dotted.key=value"),
        ("=5", "write dotted.key=value"),
        ("training..num_rounds=5", "write dotted.key=value"),
        ("seed=[", "--set seed: the value '[' is not valid YAML"),
        ("experiment=2024-02-30", "--set experiment: the value '2024-02-30' is not valid YAML"),
        ("seed=" + "[" * 3000, "is not valid YAML"),
        ("trainin.num_rounds=5", "trainin: unknown key (did you mean 'training'?)"),
        ("training.rounds=5", "training.rounds: unknown key (did you mean 'num_rounds'?)"),
        ("seed.x=5", "seed must be a valid integer"),
    ],
    ids=lambda value: value[:30],
)
def test_a_wrong_setting_is_refused_in_one_line(setting, message):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [setting])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# -- anything at all ----------------------------------------------------------------------------

ODD = st.sampled_from(
    [
        None,
        True,
        False,
        0,
        -1,
        3,
        10**30,
        0.5,
        -2.5,
        float("nan"),
        float("inf"),
        "",
        "x",
        "auto",
        "1e-3",
        "../x",
        "\ud800",
        "selffl",
        "fedavg",
        "gaussian",
        "mnist",
        "cnn",
        "dirichlet",
        "fisher",
        "as_described",
        [],
        [1, 2],
        [[]],
        ["x"],
        {},
        {"name": "fisher"},
        {"name": "gaussian", "optima": "identity"},
        {1: 2},
        {"*": 0.25},
        datetime.date(2020, 1, 1),
        b"\xff",
        {1, 2},
    ]
)
KEYS = st.sampled_from(["name", "preset", "component", "x", "num_rounds", "", "options", 3, None])


def places(raw: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(raw, dict):
        for key, value in raw.items():
            found += places(value, (*path, key))
    return found


@st.composite
def mutated(draw: st.DrawFn) -> dict[Any, Any]:
    """The default configuration with up to four keys dropped, replaced or added."""
    raw = to_raw(parsed({}))
    for _ in range(draw(st.integers(1, 4))):
        *parents, last = draw(st.sampled_from(places(raw)[1:]))
        at = raw
        for key in parents:
            at = at[key]
        match draw(st.sampled_from(["drop", "replace", "insert", "insert beside"])):
            case "drop":
                del at[last]
            case "replace":
                at[last] = copy.deepcopy(draw(ODD))
            case "insert" if isinstance(at[last], dict):
                at[last][draw(KEYS)] = copy.deepcopy(draw(ODD))
            case _:
                at[draw(KEYS)] = copy.deepcopy(draw(ODD))
        if not raw:
            break
    return raw


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(raw=mutated())
def test_no_configuration_raises_anything_but_our_own_errors(raw):
    path = list(sys.path)
    try:
        config = parsed(raw)
    except SelfFLError:
        return
    finally:
        sys.path[:] = path
    assert parsed(to_raw(config)) == config
