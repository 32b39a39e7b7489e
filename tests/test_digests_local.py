"""Same seed, same bits: in one process, whatever the number of hosts and the height of stacks.

Every method, estimator, granularity and preset; clients of unequal size, half of them a round. The
bits are those of the server (digests), of every metric and of every client's personalized model.
The same on Ray's actors: ``runtime/test_digests.py``.
"""

from __future__ import annotations

import pytest

from selffl_ray.registry import algorithms, inter_estimators, intra_estimators
from tests.contract.harness import as_allowed
from tests.runtime.placements import different, locally, moved, prepared_with

pytestmark = pytest.mark.slow

HOSTS = (1, 2, 3, 7, 14)
STACKS = (1, 3, 20)

COMMON = (
    "training.num_rounds=3",
    "training.participation_rate=0.5",
    "training.num_local_steps=3",
    "evaluation.every=3",
)
DIGITS = (*COMMON, "data.partition.sizes={min: 20, max: 110}", "model.hidden=[8]")
KNOWN = (
    *COMMON,
    "data={name: gaussian, num_clients: 14, dimension: 12, num_examples: [10, 90]}",
)
CNN = (*DIGITS[:-1], "model={name: cnn, channels: [4], kernel: 3, pool: 1, hidden: [16]}")
PROBING = ("method.probe_every=2", "method.readout_steps=6", "method.max_steps=25")

SOME_PLACEMENTS = ((2, 3), (3, 1), (7, 20), (14, 3))
"""Each number of hosts and each height at least once, beside the reference: one host, 20."""


def assert_same_bits_everywhere(settings, placements=SOME_PLACEMENTS):
    prepared = prepared_with(*settings)
    assert len(prepared.clients) == 14
    reference = locally(prepared, 1, 20)
    assert moved(reference)
    for num_hosts, stack_size in placements:
        found = locally(prepared, num_hosts, stack_size)
        wrong = different(reference, found)
        assert not wrong, f"{num_hosts} hosts, stacks of {stack_size}: {wrong[:5]}"


def data_for(*estimators):
    """Known variances come with synthetic data only."""
    return KNOWN if "known" in estimators else DIGITS


@pytest.mark.parametrize("num_hosts", HOSTS)
@pytest.mark.parametrize("stack_size", STACKS)
@pytest.mark.parametrize("model", [DIGITS, CNN], ids=["mlp", "cnn"])
def test_hosts_and_stacks_do_not_change_a_bit_of_selffl(num_hosts, stack_size, model):
    settings = (*model, *PROBING)
    assert_same_bits_everywhere(settings, [(num_hosts, stack_size)])


@pytest.mark.parametrize("method", algorithms.names())
def test_hosts_and_stacks_do_not_change_a_bit_of_a_method(method):
    assert_same_bits_everywhere((*as_allowed(method, DIGITS), f"method={method}"))


@pytest.mark.parametrize("method", algorithms.names())
def test_hosts_and_stacks_do_not_change_a_bit_when_clients_make_unequal_numbers_of_steps(method):
    """Rows that have finished stand beside rows that go on."""
    steps = [s for s in DIGITS if "num_local_steps" not in s]
    epochs = [*steps, "training.num_local_epochs=1", "training.batch_size=5"]
    settings = (*as_allowed(method, epochs), f"method={method}")
    prepared = prepared_with(*settings)
    found = {prepared.config.training.steps(len(client.train)) for client in prepared.clients}
    assert len(found) > 4, "clients must differ, or this is the test above"
    assert_same_bits_everywhere(settings, [(3, 1), (7, 20)])


@pytest.mark.parametrize("method", ["selffl", "scaffold", "fedprox", "ditto"])
def test_hosts_and_stacks_do_not_change_a_bit_under_simulated_trouble(method):
    """Clients of a stack are cut at different steps, and some rounds have few of them."""
    trouble = "dropout: {probability: 0.3}, stragglers: {spread: 1.0}, deadline: 7, late: partial"
    settings = (
        *DIGITS,
        "training.num_local_steps=8",
        f"method={method}",
        f"training.trouble={{{trouble}}}",
    )
    steps = {k for plan in prepared_with(*settings).plans for k in plan.trouble.steps.tolist()}
    assert len(steps) > 4
    assert_same_bits_everywhere(settings, [(3, 1), (7, 20), (14, 3)])


@pytest.mark.parametrize("inter", ["moments", "reml"])
@pytest.mark.parametrize("intra", intra_estimators.names())
def test_hosts_and_stacks_do_not_change_a_bit_of_an_intra_estimator(intra, inter):
    settings = (*data_for(intra), *PROBING, f"method.intra={intra}", f"method.inter={inter}")
    assert_same_bits_everywhere(settings)


@pytest.mark.parametrize("inter", inter_estimators.names())
def test_hosts_and_stacks_do_not_change_a_bit_of_an_inter_estimator(inter):
    settings = (*data_for(inter), *PROBING, "method.intra=gradient_chunks", f"method.inter={inter}")
    assert_same_bits_everywhere(settings)


@pytest.mark.parametrize("inter", ["moments", "reml"])
@pytest.mark.parametrize("granularity", ["model", "layer", "parameter"])
def test_hosts_and_stacks_do_not_change_a_bit_of_a_granularity(granularity, inter):
    # A variance a parameter takes a likelihood each: a smaller model has fewer.
    settings = (*DIGITS, "model.hidden=[1]", *PROBING, f"method.granularity={granularity}")
    assert_same_bits_everywhere((*settings, f"method.inter={inter}"))


@pytest.mark.parametrize("preset", list(algorithms.get("selffl").presets))
def test_hosts_and_stacks_do_not_change_a_bit_of_a_preset(preset):
    # as_described uses its estimates from the fourth round on.
    settings = (*DIGITS, "training.num_rounds=6", *PROBING, f"method.preset={preset}")
    assert_same_bits_everywhere(settings)


@pytest.mark.parametrize("personalization", ["map", "learning_rate", "none"])
def test_hosts_and_stacks_do_not_change_a_bit_of_a_personalization(personalization):
    settings = (*DIGITS, *PROBING, f"method.personalization={personalization}")
    assert_same_bits_everywhere(settings)


def test_another_seed_has_other_bits():
    """The comparison above can tell: it does not hold between runs that differ."""
    one = locally(prepared_with(*DIGITS, *PROBING), 1, 20)
    other = locally(prepared_with(*DIGITS, *PROBING, "seed=1"), 1, 20)
    assert len(different(one, other)) > len(one.digests)
