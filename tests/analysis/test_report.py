"""The report on real MLflow stores: which runs count, what is compared, and what stands there."""

from __future__ import annotations

import base64
import contextlib
import html
import html.parser
import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.report.__main__ import build_parser, gather, main, write_tables
from analysis.report.html import data_uri, page
from analysis.report.plots import pictures
from selffl_ray import load_config, run_experiment
from tests.analysis.made_runs import Made, MadeStore

# See tests/test_tracking.py: MLflow declares its tables with an option that SQLAlchemy will drop.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy is deprecated:sqlalchemy.exc.SADeprecationWarning"
)

T_975_DF2 = 4.302653

# Means over clients by seed: best 0.92, 0.94, 0.96.
BEST = ([0.90, 0.90, 0.94, 0.94], [0.92, 0.92, 0.96, 0.96], [0.94, 0.94, 0.98, 0.98])
# Lower by 0.01, 0.02, 0.00: within the interval (half-width 0.0248).
CLOSE = ([0.91, 0.91, 0.91, 0.91], [0.92, 0.92, 0.92, 0.92], [0.96, 0.96, 0.96, 0.96])
# Lower by 0.10, 0.101, 0.099: outside.
FAR = ([0.82] * 4, [0.839] * 4, [0.861] * 4)


def fill_study(store: MadeStore) -> None:
    """Three methods and three seeds; beside them runs that must not count."""
    old = Made(label="selffl-two_tap", seed=0, local=[0.1] * 4)
    store.add("study", old)
    for seed in range(3):
        store.add("study", Made(label="selffl-two_tap", seed=seed, local=BEST[seed], steps=300))
        store.add("study", Made(label="fedavg", seed=seed, local=CLOSE[seed]))
        store.add("study", Made(label="local", seed=seed, local=FAR[seed], global_=None))
    store.add("study", Made(label="fedavg", seed=7, local=[1.0] * 4, status="FAILED"))
    store.add("study", Made(label="fedavg", seed=8, local=[1.0] * 4, status="KILLED"))
    store.add("study", Made(label="fedavg", seed=9, local=[1.0] * 4, drop_tags=["data_digest"]))


def fill_sweep(store: MadeStore) -> None:
    """An older sweep, then one with two configurations selected and one of them confirmed."""
    older = store.add_parent("sweep", "first-sweep")
    under = {"mlflow.parentRunId": older, "stage": "confirm", "configuration": "intra=old"}
    store.add("sweep", Made(label="selffl-two_tap", seed=0, local=[0.5] * 4, tags=under))
    newer = store.add_parent("sweep", "second-sweep")
    for name, level in (("intra=fisher inter=dl", 0.8), ("intra=known inter=dl", 0.7)):
        for seed in (0, 1):
            tags = {"mlflow.parentRunId": newer, "stage": "select", "configuration": name}
            local = [level + 0.01 * seed] * 4
            made = Made(label="selffl-two_tap", seed=seed, local=local, splits=("val",), tags=tags)
            store.add("sweep", made)
    for seed in (10, 11):
        tags = {"mlflow.parentRunId": newer, "stage": "confirm", "best": "true"}
        tags["configuration"] = "intra=fisher inter=dl"
        store.add("sweep", Made(label="selffl-two_tap", seed=seed, local=[0.9] * 4, tags=tags))
    store.add("sweep", Made(label="fedavg", seed=0, local=[0.9] * 4))


def fill_mixed(store: MadeStore) -> None:
    """Same label, other options; other data; other deals for one seed."""
    for rate in ("0.1", "0.3"):
        for seed in (0, 1):
            params = {"training.learning_rate": rate, "placement.backend": f"b{rate}"}
            store.add("rates", Made(label="fedavg", seed=seed, local=[0.9] * 4, params=params))
    for data, level in (("old-data-x", 0.5), ("new-data-y", 0.9)):
        for label in ("fedavg", "local"):
            store.add("data", Made(label=label, seed=0, local=[level] * 4, data=data))
    for seed in (0, 1):
        store.add("deals", Made(label="fedavg", seed=seed, local=[0.8] * 4))
        made = Made(label="local", seed=seed, local=[0.9] * 4, partition=f"other-{seed}")
        store.add("deals", made)
    store.add("single", Made(label="fedavg", seed=0, local=[0.8] * 4, artifacts=False))
    tags = {"schedule": "pbt", "configuration": "kappa=2 from 001 after 10"}
    store.add("population", Made(label="selffl-two_tap", seed=0, local=[0.9] * 4, tags=tags))
    store.add("population", Made(label="fedavg", seed=0, local=[0.8] * 4))
    store.experiment("empty")
    store.add("unfinished", Made(label="fedavg", seed=0, local=[0.8] * 4, status="FAILED"))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    made = MadeStore(folder=tmp_path_factory.mktemp("store"))
    fill_study(made)
    fill_sweep(made)
    fill_mixed(made)
    return made.uri


Report = Callable[..., Path]


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory) -> tuple[Path, str]:
    """The command on the study: its folder, and what it prints."""
    folder = tmp_path_factory.mktemp("whole")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["--experiment", "study", "--store", store, "--output", str(folder)]) == 0
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def report(store, tmp_path_factory) -> Report:
    """Makes the tables on an experiment once; their folder."""
    made: dict[tuple[str, ...], Path] = {}

    def make(experiment: str, *more: str) -> Path:
        key = (experiment, *more)
        if key not in made:
            folder = tmp_path_factory.mktemp("report")
            common = ["--experiment", experiment, "--store", store]
            write_tables(folder, *gather(build_parser().parse_args([*common, *more])))
            made[key] = folder
        return made[key]

    return make


def line(folder: Path, row: str, metric: str, which: str = "final", stage: str = "") -> pd.Series:
    table = pd.read_csv(folder / "table.csv")
    table["stage"] = table["stage"].astype(object).where(table["stage"].notna(), "")
    found = table[
        (table["row"] == row)
        & (table["metric"] == metric)
        & (table["round"] == which)
        & (table["stage"] == stage)
    ]
    assert len(found) == 1
    return found.iloc[0]


def markdown(folder: Path) -> str:
    return (folder / "table.md").read_text()


# -- which runs count, and what they give ---------------------------------------------------------


def test_the_newest_finished_run_of_each_row_and_seed_counts(report):
    folder = report("study")
    found = line(folder, "selffl-two_tap", "test/local_accuracy")
    # The run with 0.1 is older, by the same name and seed.
    assert found["mean"] == pytest.approx(0.94)
    assert found["half_width"] == pytest.approx(T_975_DF2 * 0.02 / np.sqrt(3), rel=1e-6)
    assert found["num_seeds"] == 3
    assert line(folder, "fedavg", "test/local_accuracy")["num_seeds"] == 3


def test_what_is_left_out_is_said(report):
    text = markdown(report("study"))
    assert re.search(r"1 run failed \(\S+ seed \d+\)", text)
    assert re.search(r"1 run stopped before the end \(\S+ seed \d+\)", text)
    assert "1 run without the tags of selffl_ray" in text
    assert "Left out: 1 runs with a newer one of the same row and seed" in text


def test_final_and_selected_are_those_of_the_runs(report):
    folder = report("study")
    # The later evaluation is better on validation data too, so both are the same here.
    final, selected = (
        line(folder, "fedavg", "test/local_accuracy", which) for which in ("final", "selected")
    )
    assert final["mean"] == selected["mean"] == pytest.approx(0.93)
    assert "4, 4, 4" in markdown(folder)


def test_costs_are_totals_of_a_run(report):
    folder = report("study")
    cost = {name: line(folder, "selffl-two_tap", f"cost/{name}")["mean"] for name in (
        "total_steps", "rounds", "total_bytes_up", "total_bytes_down", "seconds"
    )}  # fmt: skip
    # 300 training steps and 40 of the last personalization; four rounds of 0.5 s, two of 0.25 s.
    assert cost == {
        "total_steps": 340,
        "rounds": 4,
        "total_bytes_up": 4e6,
        "total_bytes_down": 8e6,
        "seconds": 2.5,
    }


def test_bold_follows_the_paired_interval(report):
    folder = report("study")
    bold = {
        row: bool(line(folder, row, "test/local_accuracy")["bold"])
        for row in ("selffl-two_tap", "fedavg", "local")
    }
    assert bold == {"selffl-two_tap": True, "fedavg": True, "local": False}
    assert re.search(r"\| fedavg .*\*\*93\.0 ± ", markdown(folder))


def test_what_was_not_measured_is_absent_with_a_reason_and_never_zero(report):
    folder = report("study")
    found = line(folder, "local", "test/global_accuracy")
    assert pd.isna(found["mean"])
    assert found["reason"] == "the method has no global model"
    row = next(r for r in markdown(folder).splitlines() if r.startswith("| local "))
    assert row.split("|")[2].strip() == "n/a"


def test_unequal_budgets_are_said(report):
    assert "UNEQUAL BUDGETS: 140 gradient steps (fedavg) to 340" in markdown(report("study"))


def test_clients_harmed_are_counted_against_the_same_partition(report):
    folder = report("study")
    # Seed 0: twice 0.90 below FedAvg's 0.91; seed 1: none; seed 2: twice 0.94 below 0.96.
    shares = [0.5, 0.0, 0.5]
    found = line(folder, "selffl-two_tap", "test/clients_harmed_vs_fedavg")
    assert found["mean"] == pytest.approx(np.mean(shares))
    assert line(folder, "fedavg", "test/clients_harmed_vs_local")["mean"] == 0
    assert pd.isna(line(folder, "fedavg", "test/clients_harmed_vs_fedavg")["mean"])


def test_differences_to_the_reference_are_paired_by_seed(report):
    found = pd.read_csv(report("study") / "differences.csv")
    own = found[(found["row"] == "selffl-two_tap") & (found["metric"] == "test/local_accuracy")]
    assert own["reference"].tolist() == ["fedavg"]
    assert own["mean"].item() == pytest.approx(0.01)
    assert own["half_width"].item() == pytest.approx(T_975_DF2 * 0.01 / np.sqrt(3), rel=1e-6)


def test_another_reference_can_be_asked_for(report):
    found = pd.read_csv(report("study", "--reference", "local") / "differences.csv")
    assert set(found["reference"]) == {"local"}


def test_the_answer_claims_no_difference_where_the_interval_includes_zero(report):
    text = markdown(report("study"))
    assert "selffl-two_tap has the highest mean local accuracy: 94.0 ± 5.0 %" in text
    assert (
        "Its lead over the next, fedavg, is 1.0 points (95 % interval of the paired difference "
        "\N{MINUS SIGN}1.5 to +3.5): the interval includes 0, so no difference is shown" in text
    )


def test_curves_hold_every_evaluated_round(report):
    curves = pd.read_csv(report("study") / "curves.csv")
    own = curves[(curves["row"] == "local") & (curves["metric"] == "val/local_accuracy")]
    assert own["round_index"].tolist() == [1, 3]
    assert own["mean"].tolist() == pytest.approx([0.73, 0.83])


def test_clients_table_has_the_final_round_of_every_client_and_seed(report):
    clients = pd.read_csv(report("study") / "clients.csv")
    own = clients[(clients["row"] == "selffl-two_tap") & (clients["seed"] == 1)]
    assert own["client_id"].tolist() == ["ann", "bob", "cid", "dee"]
    assert own["value"].tolist() == pytest.approx(BEST[1])


def test_schedules_of_a_population_are_not_told_as_configurations(report):
    text = markdown(report("population"))
    assert "each a schedule and not a configuration" in text
    assert "changed during the run): kappa=2 from 001 after 10." in text
    assert "schedule" not in markdown(report("single"))


# -- one seed, missing artifacts ------------------------------------------------------------------


def test_one_run_without_artifacts_gives_numbers_without_interval_or_bold(report):
    folder = report("single")
    text = markdown(folder)
    assert "one seed (0), hence no interval" in text
    assert "Nothing is bold" in text
    assert "there is no other row to compare it with" in text
    assert "**" not in text
    assert pd.isna(line(folder, "fedavg", "test/local_accuracy")["half_width"])


# -- sweeps ---------------------------------------------------------------------------------------


def test_the_newest_sweep_is_reported_and_its_stages_are_apart(report):
    folder = report("sweep")
    fisher = "intra=fisher inter=dl"
    tested = line(folder, fisher, "test/local_accuracy", stage="confirm")
    assert (tested["mean"], tested["num_seeds"]) == (pytest.approx(0.9), 2)
    val = line(folder, fisher, "val/local_accuracy", stage="select")
    assert val["mean"] == pytest.approx(0.795)
    text = markdown(folder)
    assert "intra=old" not in text
    assert "3 runs outside of second-sweep" in text


def test_validation_tables_say_so_and_hold_no_test_figure(report):
    text = markdown(report("sweep"))
    first, second = text.split("### Scores, toys, stage that selects (VALIDATION DATA)")
    assert "### Scores, toys, confirmed with fresh seeds (TEST DATA)" in first
    assert "TEST DATA" not in second
    assert "flattered" in second
    assert "★" in first.split("### Cost")[0]


def test_an_older_sweep_can_be_asked_for_by_name(report):
    table = pd.read_csv(report("sweep", "--parent", "first-sweep") / "table.csv")
    assert set(table["row"]) == {"intra=old"}


# -- rows and sections ----------------------------------------------------------------------------


def test_rows_of_one_label_are_told_apart_by_the_options_that_differ(report):
    table = pd.read_csv(report("rates") / "table.csv")
    # The placement differs too, and changes no result.
    assert set(table["row"]) == {"fedavg learning_rate=0.1", "fedavg learning_rate=0.3"}


def test_runs_on_other_data_stand_in_a_section_of_their_own(report):
    table = pd.read_csv(report("data") / "table.csv")
    own = table[(table["metric"] == "test/local_accuracy") & (table["round"] == "final")]
    found = own.groupby("data")["mean"].unique().map(list).to_dict()
    assert found == {"toys (data old-data)": [0.5], "toys (data new-data)": [0.9]}


def test_methods_on_different_partitions_are_not_compared_and_that_is_said(report):
    folder = report("deals")
    text = markdown(folder)
    assert "Seed 0 was run on 2 different partitions" in text
    assert "It shares no seed and partition with the next, fedavg." in text
    assert "Nothing is bold" in text
    found = pd.read_csv(folder / "differences.csv")
    assert found["mean"].isna().all()
    assert pd.isna(
        pd.read_csv(folder / "table.csv")
        .set_index(["row", "metric", "round"])["mean"]
        .get(("local", "test/clients_harmed_vs_fedavg", "final"), np.nan)
    )


# -- the files ------------------------------------------------------------------------------------


class _Page(html.parser.HTMLParser):
    """Collects addresses and open tags."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.addresses += [v for k, v in attrs if k in ("src", "href") and v]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_asks_nothing_of_the_network(whole):
    text = (whole[0] / "report.html").read_text()
    page = _Page()
    page.feed(text)
    assert page.open == []
    inside = [a for a in page.addresses if not a.startswith("#")]
    assert len(inside) == 10
    for address in inside:
        head, _, body = address.partition(",")
        assert head == "data:image/svg+xml;base64"
        svg = base64.b64decode(body).decode()
        # Namespaces and the document type are names; nothing is fetched.
        assert 'href="http' not in svg
    assert "url(http" not in text
    assert "<script" not in text


def test_the_page_shows_the_answer_first_and_which_data_it_is_of(whole):
    text = (whole[0] / "report.html").read_text()
    assert text.index("TEST DATA") < text.index("has the highest mean local accuracy")
    assert text.index("has the highest mean local accuracy") < text.index("<table>")


def test_labels_are_text_on_the_page_and_not_markup(store, tmp_path):
    label = "<script>alert(1)</script> a_b 50 % & more"
    client = MadeStore(store=store, folder=tmp_path)
    client.add("odd", Made(label="fedavg", seed=0, local=[0.9] * 4, tags={"configuration": label}))
    about, parts = gather(build_parser().parse_args(["--experiment", "odd", "--store", store]))
    text = page(about, parts, [[]])
    assert "<script" not in text
    assert html.unescape(text).count(label) >= 2
    write_tables(tmp_path, about, parts)
    assert r"a\_b 50 \% \& more" in (tmp_path / "table.tex").read_text()


def test_a_figure_drawn_twice_is_the_same_byte_for_byte(store):
    _, (part,) = gather(build_parser().parse_args(["--experiment", "study", "--store", store]))
    one, two = (data_uri(pictures(part.summary)[0].figure) for _ in range(2))
    assert one == two


def test_latex_rows_have_the_columns_that_the_tabular_declares(report):
    text = (report("study") / "table.tex").read_text()
    found = re.findall(r"\\begin\{tabular\}\{(l r*|lr*)\}\n(.*?)\\end\{tabular\}", text, re.DOTALL)
    assert len(found) == 4
    for columns, body in found:
        rows = [r for r in body.splitlines() if r.endswith(r"\\")]
        assert len(rows) >= 3
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(columns)}
    plain = re.sub(r"\\[{}]", "", text)
    assert plain.count("{") == plain.count("}")
    # Nothing that LaTeX would read as a comment, a subscript or an end of the line.
    body = "\n".join(own for own in text.splitlines() if not own.startswith("%"))
    outside = re.sub(r"\\label\{.*?\}", "", body)
    assert not re.search(r"(?<!\\)[_%#]", outside)


def test_latex_holds_no_sign_that_an_engine_may_lack(report):
    assert (report("study") / "table.tex").read_text().isascii()
    text = (report("sweep") / "table.tex").read_text()
    assert text.isascii()
    assert r"$\star$" in text


def test_every_figure_is_a_png_beside_the_page(whole):
    names = sorted(path.name for path in whole[0].glob("*.png"))
    assert "toys-plane.png" in names
    assert len(names) == 10


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--experiment", "studi"], "nearest: study"),
        (["--experiment", "empty"], "is empty"),
        (["--experiment", "unfinished"], "no finished run"),
        (["--experiment", "study", "--reference", "fedavgg"], "nearest: fedavg"),
        (["--experiment", "sweep", "--parent", "secnd-sweep"], "nearest: second-sweep"),
        (["--experiment", "study", "--parent", "x"], "there are none at all"),
    ],
)
def test_a_mistake_is_one_line_with_the_remedy_and_status_two(
    arguments, says, store, tmp_path, capsys
):
    out = tmp_path / "out"
    assert main([*arguments, "--store", store, "--output", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert says in captured.err
    assert not out.exists()


def test_a_store_that_is_not_there_is_not_created(tmp_path, capsys):
    path = tmp_path / "none" / "mlflow.db"
    assert main(["--experiment", "study", "--store", f"sqlite:///{path}"]) == 2
    captured = capsys.readouterr()
    assert "there is no such file" in captured.err
    assert captured.err.count("\n") == 1
    assert not path.parent.exists()


def test_the_result_is_printed_with_the_place(whole):
    folder, printed = whole
    assert (folder / "table.md").read_text() in printed
    assert f"report: {folder / 'report.html'}" in printed


# -- a run of the system itself -------------------------------------------------------------------


def test_regression_runs_are_reported_with_lower_is_better(store, tmp_path):
    own = [
        "experiment=errors",
        "data.name=gaussian",
        "data.num_clients=5",
        "placement.backend=local",
        "training.num_rounds=4",
        "evaluation.every=2",
        f"tracking.uri={store}",
    ]
    final = {}
    for method in ("fedavg", "local"):
        for seed in (0, 1):
            config = load_config(None, [*own, f"method={method}", f"seed={seed}"])
            result = run_experiment(config, output=tmp_path / f"{method}-{seed}")
            final[method, seed] = result.summary["final"]["test/local_mse"]
    options = build_parser().parse_args(["--experiment", "errors", "--store", store])
    text = write_tables(tmp_path, *gather(options))
    for method in ("fedavg", "local"):
        expected = (final[method, 0] + final[method, 1]) / 2
        found = line(tmp_path, method, "test/local_mse")
        assert found["mean"] == pytest.approx(expected, rel=1e-12)
    best, other = sorted(("fedavg", "local"), key=lambda m: final[m, 0] + final[m, 1])
    assert f"{best} has the lowest mean local mse" in text
    assert text.index(f"| {best} ") < text.index(f"| {other} ")
    lead = (final[other, 0] + final[other, 1] - final[best, 0] - final[best, 1]) / 2
    shown = re.search(
        r"is ([\d.]+) \(95 % interval of the paired difference (\S+) to (\S+)\)", text
    )
    assert float(shown.group(1)) == pytest.approx(lead, abs=6e-4)
    low, high = (float(end.replace("\N{MINUS SIGN}", "-")) for end in shown.groups()[1:])
    assert (low + high) / 2 == pytest.approx(lead, abs=1e-3)
    assert "n/a: the run has no validation data to select a round with" in text
