"""``uncertainty.parquet`` as users read it: filled by every estimator at every granularity."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from selffl_ray.config import load_config
from selffl_ray.experiment import prepare_experiment
from selffl_ray.registry import inter_estimators, intra_estimators
from selffl_ray.tables import RunTables
from tests.contract import harness

KEYS = ["round_index", "client_id", "group"]
FILLED = ["intra_var", "inter_var", "shrinkage", "num_local_steps", "learning_rate", "agg_weight"]
GRANULARITY = pytest.mark.parametrize("granularity", ["model", "layer", "parameter"])

SMALL = (
    "training.num_rounds=3",
    "training.num_local_steps=4",
    "evaluation.every=100",
    "method.probe_every=1",
    "method.readout_steps=2",
)
DIGITS = (
    *SMALL,
    "data.partition={name: dirichlet, alpha: 10, num_clients: 4, sizes: {min: 20, max: 60}}",
    "model.hidden=[1]",
)
KNOWN = (
    *SMALL,
    "data={name: gaussian, num_clients: 4, num_examples: [8, 32], dimension: 6}",
    "training.learning_rate=0.2",
)


def table_of(tmp_path, *settings):
    """The file of a run in this process, the names of its clients, and of the model's layers."""
    data = KNOWN if any(s.endswith("=known") for s in settings) else DIGITS
    prepared = prepare_experiment(load_config(None, [*data, *settings]))
    tables = RunTables(tmp_path, prepared.client_ids, prepared.dataset.task.score_name)
    for record in harness.finish(prepared).records:
        tables.add(record)
    tables.flush()
    federation = prepared.federation
    table = pd.read_parquet(tmp_path / "uncertainty.parquet")
    return table, federation.client_ids, federation.spec.groups("layer").names


def assert_filled(tmp_path, granularity, *settings, from_round=0):
    table, client_ids, layers = table_of(tmp_path, f"method.granularity={granularity}", *settings)
    assert list(table.columns) == [*KEYS, *FILLED]
    groups = ["model"] if granularity == "model" else list(layers)
    expected = pd.MultiIndex.from_product([range(3), client_ids, groups], names=KEYS)
    assert list(table[KEYS].itertuples(index=False, name=None)) == list(expected)
    later = table[table["round_index"] >= from_round]
    empty = later[FILLED].isna().sum()
    assert not empty.any(), f"empty cells: {empty[empty > 0].to_dict()}"
    assert (later[["intra_var", "inter_var"]] >= 0).all(axis=None)
    assert later["shrinkage"].between(0, 1).all()
    weights = later.groupby(["round_index", "group"])["agg_weight"].sum()
    np.testing.assert_allclose(weights, 1.0, rtol=1e-9)


@GRANULARITY
@pytest.mark.parametrize("intra", intra_estimators.names())
def test_every_intra_estimator_fills_the_table(tmp_path, intra, granularity):
    # A variance over rounds needs two uploads.
    first = 1 if intra == "round_window" else 0
    assert_filled(tmp_path, granularity, f"method.intra={intra}", from_round=first)


@GRANULARITY
@pytest.mark.parametrize("inter", inter_estimators.names())
def test_every_inter_estimator_fills_the_table(tmp_path, inter, granularity):
    assert_filled(tmp_path, granularity, f"method.inter={inter}")


def test_a_layer_is_the_mean_of_its_parameters_that_have_a_variance():
    """De-shrinking leaves out the parameters that hardly moved from their start."""
    settings = ("method.preset=exact", "method.intra=sample_size", "method.granularity=parameter")
    settings = (*DIGITS, *settings, "method.probe_every=1", "training.num_local_steps=20")
    prepared = prepare_experiment(load_config(None, settings))
    record = harness.finish(prepared).records[-1]
    partly, expected = False, []
    for row in record.server.raw_intra_MG.numpy():
        edges = np.cumsum(prepared.federation.spec.groups("layer").sizes_G)
        for own in np.split(row, edges[:-1]):
            known = own[~np.isnan(own)]
            partly |= 0 < len(known) < len(own)
            expected.append(known.mean() if len(known) else np.nan)
    assert partly, "the case is there"
    np.testing.assert_allclose(record.uncertainty.intra_var, expected, rtol=1e-12)
