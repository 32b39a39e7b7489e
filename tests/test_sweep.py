"""Sweep files: the configurations and trials that follow from them, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from selffl_ray.algorithms.selffl.config import SelfFLConfig, idle
from selffl_ray.config import load_config, parse_part, to_raw
from selffl_ray.errors import ConfigError, SelfFLError
from selffl_ray.evaluation import ClientScores, metric_names, split_metrics
from selffl_ray.experiment import prepare_experiment
from selffl_ray.raw_config import read_yaml
from selffl_ray.registry import Component, datasets
from selffl_ray.runtime.placement import Node
from selffl_ray.sweep import (
    SweepConfig,
    configurations,
    configure,
    load_sweep,
    references_of,
    trials,
)
from selffl_ray.sweep_plan import plan_sweep
from selffl_ray.tasks import CLASSIFICATION, REGRESSION
from tests.runtime.placements import different, locally, prepared_with

SMALL = {"training": {"num_rounds": 2, "num_local_steps": 2}}
MACHINE = [Node("here", 2.0, 0.0, 2**34)]


def sweep_of(space, **more):
    raw = {"experiment": "test", "base": dict(SMALL), "space": space, **more}
    return parse_part(SweepConfig, raw, "")


def chosen(space, tmp_path, **more):
    return configurations(sweep_of(space, **more), tmp_path)


def plan(space, tmp_path, **more):
    return plan_sweep(sweep_of(space, **more), MACHINE)


# -- configurations --------------------------------------------------------------------------------


def test_settings_reach_the_experiment_whatever_their_order(tmp_path):
    space = {"method.preset": ["exact"], "method": [{"name": "selffl", "kappa": 2.0}]}
    sweep = sweep_of(space)
    (only,) = trials(sweep, configurations(sweep, tmp_path), [7], tmp_path, open_test=False)
    options = only.config.method.options
    assert (options.preset, options.kappa, options.upload) == ("exact", 2.0, "personal")
    assert only.config.seed == 7
    assert only.config.training.num_rounds == 2


def test_repeated_configurations_are_run_once_and_numbered_in_order(tmp_path):
    space = [
        {"method.inter": ["moments", "dl"]},
        {},
        {"method.kappa": [1.0, 2.0]},
        {"method.inter": ["dl"]},
    ]
    found = chosen(space, tmp_path)
    # moments and kappa 1 are the defaults: the base again.
    assert [c.settings for c in found] == [
        {"method.inter": "moments"},
        {"method.inter": "dl"},
        {"method.kappa": 2.0},
    ]
    assert [c.number for c in found] == [0, 1, 2]


def test_labels_are_short_and_tell_configurations_apart(tmp_path):
    space = [
        {"method": [{"name": "selffl", "preset": "exact", "kappa": 0.5}, "fedavg"]},
        {"training.learning_rate": [0.12345678]},
        {"method.inter": [{"name": "dl"}]},
    ]
    assert [c.label for c in chosen(space, tmp_path)] == [
        "method=selffl:exact(kappa=0.5)",
        "method=fedavg",
        "learning_rate=0.1235",
        "inter=dl",
    ]


def test_keys_that_end_alike_are_shown_longer(tmp_path):
    space = {"data.partition.name": ["natural"], "method.name": ["fedavg"]}
    assert chosen(space, tmp_path)[0].label == "partition.name=natural method.name=fedavg"
    tuned = {"method": [{"name": "fedavg_ft", "fine_tune": {"steps": 9, "rate": 0.5}}]}
    assert chosen(tuned, tmp_path)[0].label == "method=fedavg_ft(fine_tune=(steps=9,rate=0.5))"


def test_every_configuration_meets_every_seed_on_the_same_partition_start_and_cohorts(tmp_path):
    space = [{"method": ["fedavg", "local"]}, {"method.kappa": [0.5]}]
    sweep = sweep_of(space, seeds=[3, 5])
    sweep.base["training"]["participation_rate"] = 0.5
    found = trials(sweep, configurations(sweep, tmp_path), sweep.seeds, tmp_path, open_test=False)
    assert [(t.configuration.number, t.seed) for t in found] == [
        (c, s) for s in (3, 5) for c in range(3)
    ]
    assert len({t.name for t in found}) == 6
    for seed in (3, 5):
        prepared = [prepare_experiment(t.config) for t in found if t.seed == seed]
        assert len({p.partition.digest for p in prepared}) == 1
        assert len({p.run_spec.start_params.tobytes() for p in prepared}) == 1
        cohorts = {tuple(tuple(r.cohort.tolist()) for r in p.plans) for p in prepared}
        assert len(cohorts) == 1


def test_the_first_stage_seals_test_data_and_new_clients(tmp_path):
    sweep = sweep_of({"method.kappa": [0.5]})
    sweep.base["evaluation"] = {"new_clients": 0.2}
    for open_test, splits, new in ((False, ("val",), 0), (True, ("val", "test"), 3)):
        (only,) = trials(sweep, configurations(sweep, tmp_path), [0], tmp_path, open_test=open_test)
        evaluation = prepare_experiment(only.config).evaluation
        assert evaluation.splits == splits
        assert len(evaluation.new_index) == new


@pytest.mark.parametrize("cost", ["gradient_steps", "bytes", "virtual_s"])
def test_a_budget_of_cost_reaches_every_trial(cost, tmp_path):
    sweep = sweep_of({"method.kappa": [0.5]}, budget={cost: 100})
    (only,) = trials(sweep, configurations(sweep, tmp_path), [0], tmp_path, open_test=False)
    stop = only.config.training.stop
    given = {name: getattr(stop, name) for name in ("gradient_steps", "bytes", "virtual_s")}
    assert given == {"gradient_steps": None, "bytes": None, "virtual_s": None, cost: 100}


def test_the_reference_is_named_by_its_settings_or_the_first(tmp_path):
    space = {"method.inter": ["dl", "moments"]}
    assert references_of(sweep_of(space), chosen(space, tmp_path))[""].number == 0
    named = sweep_of(space, reference={"method.inter": "moments"})
    assert references_of(named, chosen(space, tmp_path))[""].number == 1
    missing = sweep_of(space, reference={"method.inter": "reml"})
    with pytest.raises(ConfigError, match="reference: no configuration of the space has exactly"):
        references_of(missing, chosen(space, tmp_path))


def test_every_scene_has_a_reference_of_its_own(tmp_path):
    space = {"training.participation_rate": [0.5, 1.0], "method": ["local", "fedavg"]}
    more = {"within": ["training.participation_rate"], "reference": {"method": "fedavg"}}
    sweep = sweep_of(space, **more)
    found = references_of(sweep, configurations(sweep, tmp_path))
    assert {scene: one.number for scene, one in found.items()} == {
        "participation_rate=0.5": 1,
        "participation_rate=1": 3,
    }
    half = [{**space}, {"method.kappa": [0.5]}]
    with pytest.raises(ConfigError, match=r"within: training.participation_rate is not set by"):
        chosen(half, tmp_path, **more)


def test_a_trial_reserves_its_cpus_for_its_driver_and_its_client_actors(tmp_path):
    found = plan({"method.kappa": [0.5]}, tmp_path, actors_per_trial=2, cpus_per_trial=0.9)
    (placement,) = found.first.plans
    assert [len(a.clients) for a in placement.actors] == [7, 7]
    total = placement.driver_cpus + sum(a.cpus for a in placement.actors)
    assert total == pytest.approx(0.9, abs=1e-3)
    assert placement.driver_cpus > 0


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "more", "message"),
    [
        ({"method.kapa": [1]}, {}, r"method.kapa: unknown key \(did you mean 'kappa'\?\)"),
        ({"method.inter": ["mle"]}, {}, "method.inter: unknown inter-client estimator 'mle'"),
        ({"method.kappa": [-1.0]}, {}, r"method.kappa must be >= 0, got -1.0"),
        ({"training.num_rounds": ["x"]}, {}, "training.num_rounds must be"),
        (
            {"method.readout_steps": [50, 100]},
            {},
            r"method.readout_steps has no effect here \(personalization: early_stop",
        ),
        (
            {"method.personalization": ["interpolate"], "method.max_steps": [10]},
            {},
            r"method.max_steps has no effect here .*does not stop early.*with when",
        ),
        ({"method.discount": [0.5]}, {}, "method.discount has no effect here .every client"),
        ({"method.kappa": [0.5]}, {"metric": "test/local_accuracy"}, "metric must be of validati"),
        (
            {"method.kappa": [0.5]},
            {"metric": "val/local_acuracy"},
            r"val/local_acuracy is not measured on digits \(did you mean 'local_accuracy'\?\)",
        ),
        ({"method.kappa": [0.5]}, {"metric": "val/local_mse"}, "val/local_mse is not measured"),
        ({"method.kappa": [0.5]}, {"mode": "min"}, "mode: min seeks the worst val/local_accuracy"),
        (
            {"method.kappa": [0.5]},
            {"metric": "val/local_loss"},
            "mode: max seeks the worst val/local_loss; use min",
        ),
        (
            {"evaluation.splits": [[0.5, 0.0, 0.5]]},
            {},
            r"evaluation.splits \[0.5, 0.0, 0.5\] have no validation examples",
        ),
        (
            {"evaluation.splits": [[0.5, 0.0, 0.5]]},
            {"open_test": True},
            "metric: val/local_accuracy needs validation examples, and splits=.* has none",
        ),
        (
            {"method.kappa": [0.25, 0.5, 1.5]},
            {"budget": {"trials": 2}},
            "budget.trials: the space has 3 configurations, more than 2",
        ),
        (
            {"method.kappa": [0.5]},
            {"scheduler": {"name": "asha", "grace": 3}},
            "scheduler.grace: 3 rounds are more than the 2 of a trial",
        ),
        (
            {"training.stop": [{"metric": "val/local_acuracy", "patience": 1}]},
            {},
            "training.stop.metric: val/local_acuracy is not measured on this data",
        ),
        (
            {"method.kappa": [0.5]},
            {"base": {"seed": 3}},
            "base.seed: seeds pair the configurations",
        ),
        (
            {"method.kappa": [0.5]},
            {"confirm": {"seeds": [9], "per": ["method"]}},
            "confirm.per: method is not set by every configuration of the space",
        ),
    ],
)
def test_a_wrong_sweep_is_one_line_before_anything_starts(space, more, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as caught:
        plan(space, tmp_path, **more)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"seeds": [0, 1, 0]}, r"seeds \[0, 1, 0\] names a seed twice"),
        ({"seeds": []}, "seeds and confirm.seeds need at least one"),
        ({"confirm": {"seeds": []}}, "seeds and confirm.seeds need at least one"),
        ({"confirm": {"seeds": [0, 9]}}, r"confirm.seeds must be fresh ones, but \[0\]"),
        ({"confirm": {"seeds": [9], "top": 0}}, "confirm.top must be >= 1, got 0"),
        ({"confirm": {"seeds": [9]}, "open_test": True}, "open_test: true shows test data before"),
        ({"scheduler": "hyperband"}, "scheduler.name must be"),
        ({"scheduler": {"grace": 3}}, "grace and reduction act with name: asha only"),
        (
            {"scheduler": "asha", "seeds": [0, 1]},
            r"scheduler: asha ends trials by comparing them .* \[0, 1\]",
        ),
        ({"scheduler": "asha", "within": ["data.name"]}, r"scenes \['data.name'\] the easiest"),
        ({"scheduler": "asha", "budget": {"seconds": 9.0}}, "budget.seconds: 9 would end trials"),
        ({"scheduler": {"name": "asha", "grace": 0}}, "scheduler.grace must be >= 1 round, got 0"),
        ({"scheduler": {"name": "asha", "reduction": 1}}, "scheduler.reduction must be >= 2"),
        ({"searcher": "bohb"}, "searcher.name must be"),
        ({"searcher": {"trials": 9}}, "trials, startup and batch act with name: optuna only"),
        ({"searcher": "optuna"}, "searcher.trials must be given with name: optuna, as in"),
        (
            {"searcher": {"name": "optuna", "trials": 10}},
            r"above searcher.startup \(10\), or every",
        ),
        ({"searcher": {"name": "optuna", "trials": 9, "startup": 0}}, "searcher.startup must be"),
        ({"searcher": {"name": "optuna", "trials": 20, "batch": 0}}, "searcher.batch must be >= 1"),
        ({"budget": {"samples": 0}}, "budget.samples must be >= 1, got 0"),
        ({"budget": {"seconds": -1.0}}, "budget.seconds must be > 0, got -1.0"),
        ({"budget": {"virtual_s": 0.0}}, "budget.virtual_s must be > 0, got 0.0"),
        ({"budget": {"time": 3}}, "budget.time: unknown key"),
        ({"concurrent": 0}, "concurrent must be >= 1, got 0"),
        ({"actors_per_trial": 0}, "actors_per_trial must be >= 1, got 0"),
        ({"cpus_per_trial": 0.05}, "cpus_per_trial must be above 0.1"),
        ({"metrics": "val/x"}, r"metrics: unknown key \(did you mean 'metric'\?\)"),
        ({"base": 3}, "base must be"),
    ],
)
def test_a_wrong_option_of_a_sweep_is_one_line(more, message):
    with pytest.raises(ConfigError, match=message) as caught:
        sweep_of({"method.kappa": [0.5]}, **more)
    assert "\n" not in str(caught.value)


def test_a_file_is_read_with_settings_on_top(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("experiment: x\nspace: {method.kappa: [1.0]}\nseeds: [0, 1]\n")
    sweep = load_sweep(file, ["seeds=[4]", "base.training.num_rounds=3"])
    assert sweep.seeds == (4,)
    assert sweep.base == {"training": {"num_rounds": 3}}
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load_sweep(tmp_path / "missing.yaml")


# -- metrics that a sweep can name -----------------------------------------------------------------


@pytest.mark.parametrize("task", [CLASSIFICATION, REGRESSION])
def test_the_names_of_metrics_are_those_that_are_measured(task):
    numbers = np.asarray([1.0, 2.0])
    scores = ClientScores(np.arange(2), np.asarray([4, 5]), *([numbers] * 5))
    assert set(split_metrics(scores, "val", task)) == {
        f"val/{name}" for name in metric_names(task.score_name)
    }


# -- options without effect ------------------------------------------------------------------------

IDLE = [
    ((), "discount", 0.9),
    (("method.contraction=0.05",), "curvature", 2.0),
    (("method.contraction=0.05",), "max_contraction", 0.2),
    (("method.upload=personal",), "readout_rate", 0.5),
    (("method.upload=personal", "method.personalization=interpolate"), "readout_steps", 3),
    ((), "readout_steps", 3),
    (("method.personalization=interpolate",), "min_steps", 3),
    (("method.personalization=interpolate",), "max_steps", 3),
    (("method.personalization=interpolate",), "rounding", "nearest"),
    ((), "map_curvature", 3.0),
    (("method.personalization=map",), "readout_rate", 0.5),
    (("method.personalization=none",), "readout_steps", 3),
    (("method.personalization=none",), "kappa", 0.2),
    (("method.personalization=none",), "tail_average", True),
]
COMMON = (
    "training.num_rounds=3",
    "training.num_local_steps=3",
    "evaluation.every=3",
    "model.hidden=[8]",
    "method.max_steps=25",
)


@pytest.mark.parametrize(("settings", "option", "value"), IDLE)
def test_what_is_called_idle_changes_no_bit_of_models_and_scores(settings, option, value):
    settings = (*COMMON, *settings)
    config = load_config(None, settings)
    assert option in idle(config.method.options, config.training)
    one = locally(prepared_with(*settings), 1, 20)
    other = locally(prepared_with(*settings, f"method.{option}={value}"), 1, 20)
    changed = [name for name in different(one, other) if not name.startswith("uncertainty/")]
    assert not changed


@pytest.mark.parametrize(
    ("settings", "option", "value"),
    [
        (("training.participation_rate=0.5",), "discount", 0.9),
        (("training.trouble.dropout.probability=0.5",), "discount", 0.9),
        ((), "curvature", 0.1),
        ((), "readout_rate", 0.5),
        (("method.personalization=interpolate",), "readout_steps", 3),
        ((), "max_steps", 5),
        (("method.personalization=map",), "map_curvature", 3.0),
        ((), "kappa", 0.2),
        ((), "tail_average", True),
    ],
)
def test_what_is_not_called_idle_there_does_change_something(settings, option, value):
    settings = (*COMMON, *settings)
    config = load_config(None, settings)
    assert option not in idle(config.method.options, config.training)
    one = locally(prepared_with(*settings), 1, 20)
    other = locally(prepared_with(*settings, f"method.{option}={value}"), 1, 20)
    assert [name for name in different(one, other) if not name.startswith("uncertainty/")]


def test_no_option_of_the_presets_is_idle_beside_the_others():
    training = load_config(None, ["training.participation_rate=0.5"]).training
    for preset in ("two_tap", "interpolated", "exact", "as_described"):
        options = load_config(None, [f"method.preset={preset}"]).method.options
        changed = {
            name
            for name in SelfFLConfig.__dataclass_fields__
            if getattr(options, name) != getattr(SelfFLConfig(), name)
        }
        assert not changed & set(idle(options, training)), preset


# -- the files that come along ---------------------------------------------------------------------

FILES = sorted((Path(__file__).parents[1] / "tune_configs").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_of_tune_configs_can_be_run_as_it_stands(file):
    head = file.read_text().partition("\nexperiment:")[0]
    assert head.startswith("# Question: ")
    assert re.search(r"minutes|takes \d", head), "says how long it takes"
    raw = read_yaml(file)
    name = raw.get("base", raw).get("data", {}).get("name", "digits")
    try:
        datasets.make(Component(name)).find(None)
    except SelfFLError as error:
        pytest.skip(str(error))
    if "space" in raw:
        found = plan_sweep(load_sweep(file), MACHINE)
        assert len(found.chosen) > 1
        count = re.search(r"(\d+) configurations x (\d+) seeds", head)
        if count:
            assert [int(n) for n in count.groups()] == [
                len(found.chosen),
                len(found.sweep.seeds),
            ]
    else:
        prepare_experiment(load_config(file))


def test_the_fashion_comparison_runs_what_its_sweep_could_choose():
    """The resolved experiments, each of which is a configuration of ``baselines_fashion.yaml``."""

    def experiments(name):
        sweep = load_sweep(FILES[0].parent / f"{name}.yaml")
        found = []
        for one in configurations(sweep, Path.cwd()):
            config = configure(sweep, one.settings, 0, Path.cwd(), open_test=True)
            raw = to_raw(replace(config, experiment="one"))
            found.append(json.dumps(raw, sort_keys=True))
        return found

    chosen = experiments("compare_fashion")
    assert len(chosen) == len(set(chosen)) == 4 * 22
    assert set(chosen) <= set(experiments("baselines_fashion"))
