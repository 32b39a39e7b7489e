"""Simulated trouble: the laws that it is drawn from, and what is refused.

Counts of independent draws are held against their binomial law: five standard deviations either
way, which a right law leaves once in two million times; the seeds are fixed.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest

from selffl_ray.api import Interrupt, run_experiment
from selffl_ray.availability.diurnal import DiurnalConfig, diurnal, probability
from selffl_ray.availability.markov import MarkovConfig, markov
from selffl_ray.availability.trace import traced
from selffl_ray.config import load_config
from selffl_ray.errors import CheckpointError, ConfigError, DataError, RunError
from selffl_ray.experiment import prepare_experiment
from selffl_ray.registry import Component, availabilities
from selffl_ray.run_loop import Progress
from selffl_ray.trouble import (
    DropoutConfig,
    StragglersConfig,
    TroubleConfig,
    draw_luck,
    dropout_rates,
)

IDS = [f"client-{i:04d}" for i in range(1500)]
FEW = IDS[:40]


def within(count, number, p):
    """Whether a count of successes is within five standard deviations of its law."""
    return abs(count - number * p) <= 5 * math.sqrt(number * p * (1 - p))


# -- dropouts --------------------------------------------------------------------------------------


def test_clients_drop_out_with_the_probability_given_each_and_in_each_round():
    config = TroubleConfig(dropout=DropoutConfig(probability=0.3))
    drops_MR = draw_luck(config, 0, FEW, 1000).drops_MR
    assert all(within(row.sum(), 1000, 0.3) for row in drops_MR)
    assert all(within(column.sum(), 40, 0.3) for column in drops_MR.T)
    # A streak is as long as chance has it: no round is like the one before.
    twice = (drops_MR[:, 1:] & drops_MR[:, :-1])[:, ::2]
    assert within(twice.sum(), twice.size, 0.09)


def test_own_probabilities_follow_the_beta_law_and_stay():
    config = DropoutConfig(probability=0.3, concentration=4.0)
    own_M = dropout_rates(config, 0, IDS)
    variance = 0.3 * 0.7 / (4 + 1)
    assert abs(own_M.mean() - 0.3) < 5 * math.sqrt(variance / len(IDS))
    assert own_M.var() == pytest.approx(variance, rel=0.15)
    rounds = 2000
    drops_MR = draw_luck(TroubleConfig(dropout=config), 0, FEW, rounds).drops_MR
    for row, own in zip(drops_MR, dropout_rates(config, 0, FEW), strict=True):
        assert within(row.sum(), rounds, own)
        assert within(row[: rounds // 2].sum(), rounds // 2, own)


def test_a_higher_probability_adds_dropouts_and_takes_none_back():
    low, high = (
        draw_luck(TroubleConfig(dropout=DropoutConfig(probability=p)), 0, FEW, 200).drops_MR
        for p in (0.2, 0.5)
    )
    assert (high | ~low).all()
    assert high.sum() > 1.5 * low.sum()


# -- stragglers ------------------------------------------------------------------------------------


def test_speed_is_log_normal_between_clients_and_between_rounds():
    slow = StragglersConfig(seconds_per_step=3.0, spread=0.8, jitter=0.4)
    log_MR = np.log(draw_luck(TroubleConfig(stragglers=slow), 0, IDS, 60).step_s_MR / 3.0)
    own_M = log_MR.mean(axis=1)
    assert abs(own_M.mean()) < 5 * 0.8 / math.sqrt(len(IDS))
    assert own_M.std() == pytest.approx(math.hypot(0.8, 0.4 / math.sqrt(60)), rel=0.1)
    assert (log_MR - own_M[:, None]).std() == pytest.approx(0.4 * math.sqrt(59 / 60), rel=0.02)


def test_without_spread_and_jitter_all_are_equally_fast():
    step_s_MR = draw_luck(TroubleConfig(), 0, FEW, 5).step_s_MR
    assert (step_s_MR == 1.0).all()


# -- availability ----------------------------------------------------------------------------------


def test_a_chain_is_stationary_from_the_first_round_with_the_stays_given():
    config = MarkovConfig(mean_up=6.0, mean_down=3.0)
    there_MR = markov(config, 0, IDS, 50)
    assert all(within(column.sum(), len(IDS), 6 / 9) for column in there_MR.T)
    before, after = there_MR[:, :-1], there_MR[:, 1:]
    assert within((before & ~after).sum(), before.sum(), 1 / 6)
    assert within((~before & after).sum(), (~before).sum(), 1 / 3)


def test_a_chain_with_stays_of_one_round_takes_turns():
    there_MR = markov(MarkovConfig(mean_up=1.0, mean_down=1.0), 0, FEW, 10)
    assert (there_MR[:, 1:] == ~there_MR[:, :-1]).all()


def test_by_day_as_many_are_there_as_the_sine_says():
    config = DiurnalConfig(period=8, mean=0.5, amplitude=0.4, phase_spread=0.0)
    there_MR = diurnal(config, 0, IDS, 16)
    expected = 0.5 + 0.4 * np.sin(2 * np.pi * np.arange(16) / 8)
    for column, p in zip(there_MR.T, expected, strict=True):
        assert within(column.sum(), len(IDS), p)
    np.testing.assert_allclose(probability(config, 0.0, np.arange(16)), expected)


def test_around_the_world_always_as_many_are_there():
    config = DiurnalConfig(period=8, mean=0.4, amplitude=0.4, phase_spread=1.0)
    there_MR = diurnal(config, 0, IDS, 16)
    # Rounds of one day are dependent through the phases, but each by itself is binomial.
    assert all(within(column.sum(), len(IDS), 0.4) for column in there_MR.T)
    shares = there_MR.mean(axis=1)
    assert shares.std() == pytest.approx(math.sqrt(0.4 * 0.6 / 16 - 0.16 / 2 / 16), rel=0.1)


@pytest.mark.parametrize("name", availabilities.names())
def test_a_law_gives_each_client_its_own_rounds_whoever_else_there_is(name):
    """Contract of every registered law: shape, seed, prefix, and independence of the others."""
    entry = availabilities.get(name)
    assert entry.summary
    assert entry.config_type.__dataclass_params__.frozen
    assert all(f.kw_only for f in dataclasses.fields(entry.config_type))

    def drawn(seed, ids, rounds):
        found = availabilities.make(Component(name), seed, ids, rounds)
        assert found.shape == (len(ids), rounds)
        assert found.dtype == bool
        return found

    whole = drawn(0, FEW, 30)
    np.testing.assert_array_equal(whole, drawn(0, FEW, 30))
    np.testing.assert_array_equal(whole[:, :10], drawn(0, FEW, 10))
    np.testing.assert_array_equal(whole[5:9][::-1], drawn(0, FEW[5:9][::-1], 30))
    if not whole.all():
        assert (whole != drawn(1, FEW, 30)).any()


def test_all_of_luck_belongs_to_the_client_and_the_seed():
    config = TroubleConfig(
        availability=Component("markov"),
        dropout=DropoutConfig(probability=0.4, concentration=1.0),
        stragglers=StragglersConfig(spread=1.0, jitter=0.3),
    )
    whole, part = draw_luck(config, 0, FEW, 30), draw_luck(config, 0, FEW[7:11], 12)
    other = draw_luck(config, 1, FEW, 30)
    for name in whole._fields:
        np.testing.assert_array_equal(getattr(whole, name)[7:11, :12], getattr(part, name))
        assert (getattr(whole, name) != getattr(other, name)).any(), name


# -- traces ----------------------------------------------------------------------------------------

STAYS = "client_id,first_round,last_round\n007,0,1\nb,2,2\n007,1,3\n"


def by_hand():
    there_MR = np.zeros((3, 6), bool)
    there_MR[0, 0:4] = True
    there_MR[1, 2] = True
    return there_MR


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_trace_says_when_each_client_is_there(tmp_path, kind):
    path = tmp_path / f"stays.{kind}"
    path.write_text(STAYS)
    if kind == "parquet":
        rows = [("007", 0, 1), ("b", 2, 2), ("007", 1, 3)]
        frame = pd.DataFrame(rows, columns=["client_id", "first_round", "last_round"])
        frame[["last_round", "client_id", "first_round"]].to_parquet(path)
    np.testing.assert_array_equal(traced(path, ["007", "b", "c"], 6), by_hand())
    # Rounds that the run does not reach are no error, however many.
    np.testing.assert_array_equal(traced(path, ["007", "b", "c"], 2), by_hand()[:, :2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("client_id,first_round\na,1\n", "must have the columns client_id, first_round, last_roun"),
        (STAYS.replace("_id", ""), "must have the columns .* found client, first_round"),
        (STAYS + "b,4,3\n", r"row 3: rounds 4 to 3 of client 'b' are no stay"),
        (STAYS + "b,-1,3\n", r"row 3: rounds -1 to 3 of client 'b' are no stay"),
        (STAYS + "B,4,4\n", r"names clients that do not take part: B; "),
        (
            STAYS + "bb,4,4\n",
            r"do not take part: bb \(did you mean 'b'\?\); their names are as in '007'",
        ),
        (STAYS + "b,soon,4\n", "is not a readable trace .*soon"),
        (STAYS + "b,4,\n", "row 3: last_round is empty"),
        (STAYS + "b,4\n", "is not a readable trace"),
        (STAYS.splitlines()[0] + "\n", "has no rows"),
        ("", "is not a readable trace"),
    ],
)
def test_a_trace_that_is_wrong_is_refused_with_place_and_value(tmp_path, text, message):
    path = tmp_path / "stays.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"training\.trouble\.trace: .*{message}"):
        traced(path, ["007", "b"], 6)


def test_a_stay_without_end_ends_with_the_run(tmp_path):
    path = tmp_path / "stays.csv"
    path.write_text(f"client_id,first_round,last_round\na,2,{2**63 - 1}\n")
    assert traced(path, ["a"], 4).tolist() == [[False, False, True, True]]


def test_a_trace_that_is_not_there_or_no_table_is_refused(tmp_path):
    for name, content in (("no.csv", None), ("torn.parquet", b"PAR1 and no more")):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match=rf"trace: .*{name} is not a readable trace"):
            traced(path, ["a"], 3)
    path = tmp_path / "float.parquet"
    frame = pd.DataFrame({"client_id": ["a"], "first_round": [0.5], "last_round": [1]})
    frame.to_parquet(path)
    with pytest.raises(DataError, match="column first_round must hold whole numbers: found double"):
        traced(path, ["a"], 3)


# -- configurations --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("dropout={probability: 1.0}", r"dropout\.probability must lie in \[0, 1\), got 1"),
        ("dropout={probability: -0.1}", r"dropout\.probability must lie in \[0, 1\), got -0\.1"),
        ("dropout={concentration: 2}", r"concentration \(2.*\) has no effect while probability"),
        ("dropout={probability: 0.1, concentration: 0}", "concentration must be > 0, got 0"),
        ("stragglers={seconds_per_step: 0}", "seconds_per_step must be > 0, got 0"),
        ("stragglers={spread: -1}", r"stragglers\.spread must lie in \[0, 5\], got -1"),
        ("stragglers={jitter: 5.5}", r"stragglers\.jitter must lie in \[0, 5\], got 5\.5"),
        ("over_selection=0.9", r"over_selection must be >= 1, got 0\.9"),
        (
            "over_selection=1.5",
            r"over_selection \(1\.5\) has nobody left to ask while training\.pa",
        ),
        ("wait_for=0", r"wait_for must lie in \(0, 1\], got 0"),
        ("deadline=0", "deadline must be > 0, got 0"),
        ("late=partial", "late: partial has no effect without a deadline"),
        ("late=early", "late must be 'drop' or 'partial', got 'early'"),
        ("availability={name: markov, mean_up: 0.5}", r"mean_up must be >= 1 rounds, got 0\.5"),
        ("availability={name: markov, mean_down: 0}", "mean_down must be >= 1 rounds, got 0"),
        ("availability={name: diurnal, period: 1}", "period must be >= 2 rounds, got 1"),
        ("availability={name: diurnal, mean: 1}", r"mean must be in \(0, 1\), got 1"),
        (
            "availability={name: diurnal, mean: 0.3, amplitude: 0.4}",
            r"amplitude must be > 0 and <= 0\.3 at this mean, got 0\.4",
        ),
        ("availability={name: diurnal, amplitude: 0}", "amplitude must be > 0"),
        ("availability={name: diurnal, phase_spread: 2}", r"phase_spread must be in \[0, 1\], got"),
        ("availability=dayly", "unknown availability law 'dayly'"),
        ("availability={name: markov, up: 3}", r"availability\.up: unknown key"),
        ("dropouts=0.1", r"trouble\.dropouts: unknown key .did you mean 'dropout'"),
    ],
)
def test_what_is_void_or_contradictory_is_refused_by_field_and_value(setting, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"training.trouble.{setting}"])


def test_a_trace_is_found_from_the_folder_of_the_configuration(tmp_path):
    found = load_config(None, ["training.trouble.trace=stays.csv"], tmp_path)
    assert found.training.trouble.trace == str(tmp_path / "stays.csv")


def test_no_trouble_is_told_from_some():
    assert TroubleConfig().is_none
    assert load_config(None).training.trouble.is_none
    assert not load_config(None).training.simulates
    slow = TroubleConfig(stragglers=StragglersConfig(spread=1.0))
    assert not slow.is_none
    assert not slow.keeps_away
    for some in (
        TroubleConfig(availability=Component("markov")),
        TroubleConfig(trace="stays.csv"),
        TroubleConfig(dropout=DropoutConfig(probability=0.1)),
        TroubleConfig(over_selection=1.5),
        TroubleConfig(wait_for=0.9),
        TroubleConfig(deadline=9.0),
    ):
        assert not some.is_none
        assert some.keeps_away


# -- whole runs ------------------------------------------------------------------------------------

RUN = (
    "placement.backend=local",
    "tracking.enabled=false",
    "training.num_rounds=12",
    "training.num_local_steps=4",
    "training.participation_rate=0.6",
    "checkpoint.every=4",
    "evaluation.every=12",
    "method=fedavg",
    "model.hidden=[4]",
    "training.trouble={availability: {name: markov, mean_up: 3, mean_down: 3}, "
    "stragglers: {spread: 0.9, jitter: 0.3}, dropout: {probability: 0.2}, deadline: 6, "
    "over_selection: 1.4, late: partial}",
)


def test_who_was_asked_who_dropped_and_who_was_late_stands_in_the_tables(tmp_path):
    config = load_config(None, RUN)
    prepared = prepare_experiment(config)
    result = run_experiment(config, output=tmp_path / "run")
    rounds, rows = result.rounds, result.participation
    assert [*rows] == ["round_index", "client_id", "outcome", "num_local_steps", "virtual_s"]
    assert set(rows["outcome"]) == {"answered", "partial", "late", "dropped"}
    for plan in prepared.plans:
        found, own = plan.trouble, rows[rows["round_index"] == plan.round_index]
        assert own["client_id"].tolist() == [prepared.client_ids[i] for i in found.asked]
        assert own["outcome"].tolist() == found.outcome.tolist()
        assert own["num_local_steps"].tolist() == found.steps.tolist()
        np.testing.assert_array_equal(own["virtual_s"], found.ends_s)
        row = rounds.loc[plan.round_index]
        for word in ("partial", "late", "dropped"):
            assert row[word] == row[f"clients/{word}"] == (own["outcome"] == word).sum()
        assert (row["asked"], row["available"]) == (len(own), found.num_available)
        assert row["participants"] == own["outcome"].isin(["answered", "partial"]).sum()
        assert row["virtual_s"] == found.virtual_s
    np.testing.assert_allclose(rounds["cost/virtual_s"], rounds["virtual_s"].cumsum())
    final = result.summary["final"]
    assert final["cost/virtual_s"] == pytest.approx(
        sum(p.trouble.virtual_s for p in prepared.plans)
    )


def test_without_trouble_the_tables_know_none(tmp_path):
    plain = [s for s in RUN if "trouble" not in s]
    result = run_experiment(load_config(None, plain), output=tmp_path / "run")
    assert not (tmp_path / "run" / "participation.parquet").exists()
    assert result.participation.empty
    assert not [name for name in result.rounds if "virtual" in name or "late" in name]


def test_a_run_under_trouble_goes_on_to_the_same_rounds_and_tables(tmp_path):
    # Rounds enough for the interruption to be noticed while there are some left.
    config = load_config(None, [*RUN, "training.num_rounds=300", "evaluation.every=300"])
    straight = run_experiment(config, output=tmp_path / "straight")
    interrupt = Interrupt()

    def after_five(event):
        if isinstance(event, Progress) and event.round_index == 4:
            interrupt.set()

    half = run_experiment(config, output=tmp_path / "run", watch=after_five, interrupt=interrupt)
    assert half.summary["status"] == "STOPPED"
    whole = run_experiment(config, resume=tmp_path / "run")
    pd.testing.assert_frame_equal(whole.participation, straight.participation)
    names = [n for n in straight.rounds if "digest" in n or "virtual" in n or "clients/" in n]
    pd.testing.assert_frame_equal(whole.rounds[names], straight.rounds[names])


def test_a_trace_that_has_changed_is_noticed_when_a_run_goes_on(tmp_path):
    path = tmp_path / "stays.csv"
    rows = [f"form-{i:02d},0,{i}" for i in range(14)]
    path.write_text("\n".join(["client_id,first_round,last_round", *rows]) + "\n")
    config = load_config(None, [*RUN[:-1], f"training.trouble.trace={path}"])
    whole = run_experiment(config, output=tmp_path / "run")
    assert whole.rounds["available"].tolist() == list(range(14, 2, -1))
    assert run_experiment(config, resume=tmp_path / "run").summary["rounds"] == 12
    path.write_text(path.read_text().replace("form-13,0,13", "form-13,0,4"))
    with pytest.raises(CheckpointError, match=r"belongs to another run: .* or the trace differ"):
        run_experiment(config, resume=tmp_path / "run")


def test_a_run_that_has_lost_who_took_part_cannot_go_on(tmp_path):
    config = load_config(None, RUN)
    run_experiment(config, output=tmp_path / "run")
    (tmp_path / "run" / "participation.parquet").unlink()
    with pytest.raises(CheckpointError, match=r"participation\.parquet is missing"):
        run_experiment(config, resume=tmp_path / "run")


MISBEHAVING = (
    *RUN[:5],
    "plugins=[tests.runtime.misbehaving]",
    "faults.min_participants=1.0",
    "faults.max_retries=0",
    "training.trouble={dropout: {probability: 0.6}}",
)


def test_who_drops_out_by_simulation_is_no_fault(tmp_path):
    """All that are left must answer, and do; then one of them fails in earnest."""
    calm = load_config(None, [*MISBEHAVING, "method=misbehaving"])
    rounds = run_experiment(calm, output=tmp_path / "calm").rounds
    assert rounds["faults"].sum() == 0
    assert rounds["dropped"].sum() > 0.3 * rounds["asked"].sum()
    plan = prepare_experiment(calm).plans[0]
    left, first = len(plan.cohort), f"form-{plan.cohort[0]:02d}"
    bad = load_config(None, [*MISBEHAVING, f"method={{name: misbehaving, raising: [{first}]}}"])
    with pytest.raises(RunError, match=f"round 0: only {left - 1} of {left} clients answered"):
        run_experiment(bad, output=tmp_path / "bad")
    assert left < plan.num_asked


def test_selffl_says_that_deshrinking_does_not_know_of_partial_work():
    trouble = ("training.trouble={late: partial, deadline: 5.0, stragglers: {}}",)
    shrunk = ("method={name: selffl, preset: exact, aggregation: deshrunk}",)

    def said(*settings):
        return any(
            "deshrunk" in c for c in prepare_experiment(load_config(None, settings)).cautions
        )

    assert said(*shrunk, *trouble)
    assert not said(*shrunk)
    assert not said(*trouble)


def test_a_client_whose_work_is_whole_takes_all_steps_that_its_method_plans(tmp_path):
    """Ditto's own model takes more steps than the training has, whatever befalls a neighbour."""
    trouble = "training.trouble={{stragglers: {{spread: {spread}}}, deadline: 4.5, late: partial}}"
    method = "method={name: ditto, personal_steps: 12}"
    settings = [s for s in RUN if "trouble" not in s and "method" not in s]

    def losses(spread):
        config = load_config(
            None, [*settings, method, trouble.format(spread=spread), "training.num_rounds=1"]
        )
        plan = prepare_experiment(config).plans[0].trouble
        run = run_experiment(config, output=tmp_path / str(spread))
        whole = {plan.asked[i] for i in np.flatnonzero(plan.outcome == "answered")}
        test = run.clients[run.clients["split"] == "test"]
        return whole, test.set_index("client_id")["local_loss"]

    (everybody, quiet), (some, late) = losses(1e-9), losses(0.9)
    assert 0 < len(some) < len(everybody)
    names = prepare_experiment(load_config(None, settings)).client_ids
    assert len(quiet) == len(names)
    for index in some:
        assert quiet[names[index]] == late[names[index]]
