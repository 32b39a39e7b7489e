"""The page about a run's uncertainties: values from hand-made tables, and the files it leaves."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from analysis import uncertainty
from analysis.uncertainty import RunData, page_of, read_run, summary
from selffl_ray import load_config, run_experiment

SIZES = {"a": 10, "b": 40, "c": 160}


def run_data(rows, *, sizes=SIZES, clients=None, rounds=None):
    """Rows: (round_index, client_id, group, intra_var, inter_var, shrinkage, num_local_steps)."""
    names = ["round_index", "client_id", "group", "intra_var", "inter_var", "shrinkage"]
    return RunData(
        "folder",
        "selffl-two_tap on made, seed 0",
        pd.Series(sizes),
        pd.DataFrame(rows, columns=[*names, "num_local_steps"]),
        pd.DataFrame() if clients is None else clients,
        pd.DataFrame({"round_index": [0, 1]}) if rounds is None else rounds,
    )


NAN = float("nan")
# b is absent in the last round; a lost its variance there.
ROWS = [
    (0, "c", "model", 1.0, 0.5, 0.1, 30),
    (0, "a", "model", 16.0, 0.5, 0.8, 10),
    (0, "b", "model", 4.0, 0.5, 0.4, 20),
    (1, "c", "model", 2.0, 0.0, 0.2, 31),
    (1, "a", "model", NAN, 0.0, 0.9, 11),
]


def scores(rows):
    names = ["round_index", "client_id", "split", "global_accuracy", "local_accuracy"]
    return pd.DataFrame(rows, columns=names)


def test_each_clients_newest_known_value_counts_in_the_order_of_sizes():
    newest = page_of(run_data(ROWS)).newest
    assert newest["client_id"].tolist() == ["a", "b", "c"]
    assert newest["num_examples"].tolist() == [10, 40, 160]
    assert newest["intra_var"].tolist() == [16.0, 4.0, 2.0]
    assert newest["shrinkage"].tolist() == [0.9, 0.4, 0.2]
    assert newest["num_local_steps"].tolist() == [11, 20, 31]


def test_the_inter_variance_is_that_of_each_round_and_group():
    inter = page_of(run_data(ROWS)).inter
    assert inter["model"].to_dict() == {0: 0.5, 1: 0.0}


def test_one_group_is_shown_by_round_and_absent_clients_are_gaps():
    heat = page_of(run_data(ROWS)).heat
    assert heat.index.tolist() == ["a", "b", "c"]
    assert heat.columns.tolist() == [0, 1]
    np.testing.assert_array_equal(heat, [[0.8, 0.9], [0.4, NAN], [0.1, 0.2]])


def test_several_groups_are_shown_by_layer_in_the_models_order():
    rows = [(0, c, g, 1.0, 1.0, s, 5) for c, s in (("a", 0.9), ("b", 0.5)) for g in ("z", "y")]
    heat = page_of(run_data(rows)).heat
    assert heat.columns.tolist() == ["z", "y"]
    np.testing.assert_array_equal(heat, [[0.9, 0.9], [0.5, 0.5]])


def test_variances_that_go_with_one_over_n_are_fully_correlated():
    rows = [(0, c, "model", 7 / n, 1.0, 0.5, 5) for c, n in SIZES.items()]
    assert page_of(run_data(rows)).correlation["model"] == pytest.approx(1.0)
    rows = [(0, c, "model", 7.0 * n, 1.0, 0.5, 5) for c, n in SIZES.items()]
    assert page_of(run_data(rows)).correlation["model"] == pytest.approx(-1.0)


def test_the_correlation_is_that_of_the_logarithms():
    page = page_of(run_data(ROWS))
    log_var, log_n = np.log([16.0, 4.0, 2.0]), np.log([10.0, 40, 160])
    away, back = log_var - log_var.mean(), -(log_n - log_n.mean())
    expected = (away * back).sum() / np.sqrt((away**2).sum() * (back**2).sum())
    assert page.correlation["model"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"a": 30, "b": 30, "c": 30}, "sizes are equal"),
        ({"a": 30, "b": 31, "c": 59}, "sizes are nearly equal"),
    ],
)
def test_equal_sizes_have_no_correlation_and_the_table_says_so(sizes, said):
    run = run_data(ROWS, sizes=sizes)
    page = page_of(run)
    assert np.isnan(page.correlation["model"])
    assert f"  {said}\n" in summary(run, page)
    assert said in uncertainty.correlations(page)


def test_the_gain_is_local_minus_global_on_the_newest_test_data():
    clients = scores(
        [
            (0, "a", "test", 0.1, 0.9),
            (1, "a", "test", 0.50, 0.75),
            (1, "b", "test", 0.80, 0.70),
            (1, "c", "val", 0.1, 0.9),
        ]
    )
    page = page_of(run_data(ROWS, clients=clients))
    np.testing.assert_allclose(page.newest["gain"], [25.0, -10.0, NAN])
    assert page.gain_unit == "local - global test accuracy (points)"


def test_validation_data_stand_in_and_errors_gain_by_falling():
    clients = scores([(1, "a", "val", 3.0, 1.0)])
    clients.columns = ["round_index", "client_id", "split", "global_mse", "local_mse"]
    page = page_of(run_data(ROWS, clients=clients))
    assert page.newest["gain"][0] == 2.0
    assert page.gain_unit == "global - local val error (MSE)"


def test_alarms_are_those_of_the_probes():
    rounds = pd.DataFrame({"round_index": [0, 1, 2]})
    for name in uncertainty.ALARMS:
        rounds[name] = [0.0, NAN, 1.0 if name.endswith("floor") else 0.0]
    run = run_data(ROWS, rounds=rounds)
    page = page_of(run)
    assert page.alarms.index.tolist() == [0, 2]
    assert "alarms in 2 probes: no information 0, ratio 0, floor 1" in summary(run, page)
    assert "alarms: not recorded" in summary(run_data(ROWS), page_of(run_data(ROWS)))


def test_the_table_has_the_spread_of_the_shrink_factors():
    run = run_data(ROWS)
    text = summary(run, page_of(run))
    assert "3 clients, 10 to 160 training examples" in text
    line = next(line for line in text.splitlines() if line.startswith("model"))
    assert line.split()[1:4] == ["0.200", "0.400", "0.900"]


@pytest.mark.parametrize("rows", [ROWS, [(0, "a", "model", 0.0, 0.0, 1.0, 1)]])
def test_a_page_is_drawn_of_what_there_is(rows, tmp_path):
    run = run_data(rows)
    uncertainty.draw(run, page_of(run)).savefig(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


# -- real runs ----------------------------------------------------------------------------------

RUN = (
    "placement.backend=local",
    "tracking.enabled=false",
    "training.num_rounds=2",
    "training.num_local_steps=2",
    "model.hidden=[2]",
    "method.readout_steps=2",
)


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    """A run with two layers and unequal clients."""
    folder = tmp_path_factory.mktemp("runs") / "layers"
    more = ["method.granularity=layer", "data.partition.sizes={min: 20, max: 110}"]
    run_experiment(load_config(None, [*RUN, *more]), output=folder)
    return folder


def test_a_run_knows_how_many_examples_its_clients_train_on(layers):
    run = read_run(layers)
    newest = page_of(run).newest
    # Training, not test examples: a fifth of what a client has.
    tested = run.clients[run.clients["split"] == "test"].drop_duplicates("client_id")
    tested = tested.set_index("client_id")["num_examples"]
    share = newest.set_index("client_id")["num_examples"] / tested
    assert share.mean() == pytest.approx(0.2 / 0.6, rel=0.15)


def test_the_command_leaves_a_page_and_prints_the_table(layers, tmp_path, capsys):
    assert uncertainty.main([str(layers), "--output", str(tmp_path / "new")]) == 0
    for ending in (".png", ".svg"):
        assert (tmp_path / "new" / f"layers-uncertainty{ending}").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[3:5]] == ["hidden0", "output"]


def test_a_page_goes_into_its_runs_folder_by_default(layers):
    assert uncertainty.pictures([layers], None) == [layers / "uncertainty"]


def refused(capsys, *arguments):
    """The one line that a refused call prints."""
    try:
        status = uncertainty.main(list(arguments))
    except SystemExit as error:
        status = error.code
    found = capsys.readouterr()
    assert status == 2
    assert found.out == ""
    assert found.err.count("\n") == 1
    return found.err


def test_bad_input_is_one_line_and_status_2(layers, tmp_path, capsys):
    assert "RUN_DIR" in refused(capsys)
    assert "there is no config.yaml" in refused(capsys, str(tmp_path))
    fedavg = tmp_path / "fedavg"
    run_experiment(load_config(None, [*RUN[:-1], "method=fedavg"]), output=fedavg)
    assert "(here fedavg)" in refused(capsys, str(fedavg))
    other = tmp_path / "other" / "layers"
    other.mkdir(parents=True)
    for path in layers.glob("*.*"):
        (other / path.name).write_bytes(path.read_bytes())
    both = (str(layers), str(other), "--output", str(tmp_path))
    assert "same folder name" in refused(capsys, *both)
    environment = json.loads((other / "environment.json").read_text())
    del environment["num_train_examples"]
    (other / "environment.json").write_text(json.dumps(environment))
    assert "older version" in refused(capsys, str(other))
    (other / "rounds.parquet").write_bytes(b"half a fi")
    assert "unreadable" in refused(capsys, str(other))


def test_a_run_without_an_estimate_is_refused(tmp_path, capsys):
    # A variance over rounds needs two uploads, and one round has one.
    folder = tmp_path / "short"
    settings = [*RUN, "method.intra=round_window", "training.num_rounds=1"]
    run_experiment(load_config(None, settings), output=folder)
    assert "no shrink factor was estimated" in refused(capsys, str(folder))
