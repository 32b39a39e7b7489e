"""Hands that are dealt: nobody twice, everything where promised, skew as asked for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selffl_ray.client_data import ClientData
from selffl_ray.datasets import splits
from selffl_ray.datasets.base import TEST, TRAIN, UNSEEN, VAL, Dataset, Group, no_files
from selffl_ray.datasets.gaussian import GaussianConfig
from selffl_ray.datasets.partition import (
    DirichletConfig,
    NaturalConfig,
    PooledConfig,
    RotationConfig,
    ShardsConfig,
    SizesConfig,
)
from selffl_ray.datasets.store import prepare, store_root
from selffl_ray.errors import ConfigError, DataError
from selffl_ray.messages import DataSpec
from selffl_ray.registry import Component, datasets, partitioners
from selffl_ray.tasks import DataShape

SHAPE = DataShape((1, 4, 4), 10)
TRAINING, TESTING = 2000, 500


def made(name, groups, *, natural=False, shape=SHAPE):
    return Dataset(
        name=name,
        title="Toy",
        licence="none",
        shape=shape,
        find=no_files,
        read=lambda files, seed: iter(groups),
        natural=natural,
    )


def balanced(number, part, seed, shape=SHAPE):
    """Ten classes equally often, in random order."""
    rng = np.random.default_rng(seed)
    x = rng.integers(256, size=(number, *shape.input_shape)).astype(np.uint8)
    y = rng.permutation(np.arange(number) % 10)
    return Group("", x, y, np.full(number, part, np.uint8))


POOL = made("toy_pool", [balanced(TRAINING, TRAIN, 0), balanced(TESTING, TEST, 1)])
NO_TEST = made("toy_without_test", [balanced(300, TRAIN, 2)._replace(official=None)])
FLAT_SHAPE = DataShape((1, 4, 3), 10)
OBLONG = made("toy_oblong", [balanced(300, TRAIN, 3, FLAT_SHAPE)], shape=FLAT_SHAPE)
NATURAL = made(
    "toy_natural",
    [
        balanced(50, TRAIN, 4)._replace(client_id="anna"),
        balanced(30, TRAIN, 5)._replace(
            client_id="bert", official=np.repeat([TRAIN, TEST], [20, 10]).astype(np.uint8)
        ),
        balanced(4, TRAIN, 6)._replace(client_id="carl", official=None),
    ],
    natural=True,
)

THREE_PARTS = made(
    "toy_three_parts",
    [
        balanced(20, TRAIN, 7)._replace(
            client_id=client_id, official=np.repeat([TRAIN, VAL, TEST], [9, 5, 6]).astype(np.uint8)
        )
        for client_id in ("anna", "bert")
    ],
    natural=True,
)


def store_of(dataset, options=None):
    return prepare(dataset, options, None, 0, store_root())


def deal(name, config, *, dataset=POOL, seed=0):
    store = store_of(dataset)
    return partitioners.make(Component(name, config), dataset, store, seed), store


CONFIGS = {"iid": PooledConfig, "dirichlet": DirichletConfig, "shards": ShardsConfig,
           "rotation": RotationConfig}  # fmt: skip


def counts_of(hands, labels):
    """(M, 10): examples of each class."""
    return np.stack([np.bincount(labels[hand.rows], minlength=10) for hand in hands])


# -- what every partitioner promises --------------------------------------------------------------


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(CONFIGS)),
    num_clients=st.integers(1, 40),
    sizes=st.sampled_from([None, SizesConfig(min=2, max=40), SizesConfig(min=7, max=7)]),
    test_examples=st.sampled_from([0, 12]),
    seed=st.integers(0, 1000),
)
def test_nobody_gets_a_row_twice_and_everything_is_dealt_unless_sizes_say_otherwise(
    stores, name, num_clients, sizes, test_examples, seed
):
    config = CONFIGS[name](num_clients=num_clients, sizes=sizes, test_examples=test_examples)
    hands, store = deal(name, config, seed=seed)
    rows = np.concatenate([hand.rows for hand in hands])
    assert len(hands) == num_clients == len({hand.client_id for hand in hands})
    assert len(set(rows.tolist())) == len(rows)
    mine = TRAINING if test_examples else TRAINING + TESTING
    assert rows.max() < mine
    if sizes is None:
        assert len(rows) == mine
    else:
        assert all(sizes.min <= len(hand.rows) <= sizes.max for hand in hands)
    official = store.official()
    for hand in hands:
        assert (np.diff(hand.rows) > 0).all()
        assert len(set(hand.test_rows.tolist())) == len(hand.test_rows) == test_examples
        assert (official[hand.test_rows] == TEST).all()


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_same_seed_deals_the_same_hand_and_another_one_another(name):
    def dealt(seed):
        config = CONFIGS[name](num_clients=9, test_examples=5)
        hands, _ = deal(name, config, seed=seed)
        return [(h.client_id, h.rows.tolist(), h.test_rows.tolist()) for h in hands]

    assert dealt(1) == dealt(1)
    assert all(a != b for a, b in zip(dealt(1), dealt(2), strict=True))


def test_clients_are_numbered_with_leading_zeros():
    hands, _ = deal("iid", PooledConfig(num_clients=11))
    assert [hand.client_id for hand in hands] == [f"client-{i:02d}" for i in range(11)]


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_sizes_are_log_uniform_between_min_and_max(name):
    sizes = SizesConfig(min=2, max=50)
    logs = []
    for seed in range(12):
        hands, _ = deal(name, CONFIGS[name](num_clients=40, sizes=sizes), seed=seed)
        logs += [math.log(len(hand.rows)) for hand in hands]
    low, high = math.log(2), math.log(50)
    # 480 draws of a uniform variable: standard error of the mean 0.042, of quartiles about 0.07.
    assert np.mean(logs) == pytest.approx((low + high) / 2, abs=0.17)
    for share in (0.25, 0.75):
        assert np.quantile(logs, share) == pytest.approx(low + share * (high - low), abs=0.3)


# -- natural --------------------------------------------------------------------------------------


def test_natural_clients_keep_their_rows_and_their_published_test_part():
    hands, _ = deal("natural", NaturalConfig(), dataset=NATURAL)
    assert [(h.client_id, len(h.rows), len(h.test_rows)) for h in hands] == [
        ("anna", 50, 0),
        ("bert", 20, 10),
        ("carl", 4, 0),
    ]
    assert hands[1].rows.tolist() == list(range(50, 70))
    assert hands[1].test_rows.tolist() == list(range(70, 80))
    assert hands[2].rows.tolist() == list(range(80, 84))


def test_natural_clients_keep_their_published_validation_part():
    hands, _ = deal("natural", NaturalConfig(), dataset=THREE_PARTS)
    for start, hand in zip((0, 20), hands, strict=True):
        parts = [hand.rows, hand.val_rows, hand.test_rows]
        assert [len(part) for part in parts] == [9, 5, 6]
        np.testing.assert_array_equal(np.concatenate(parts), np.arange(start, start + 20))


def test_sizes_thin_the_training_part_only():
    config = NaturalConfig(sizes=SizesConfig(min=3, max=3))
    hands, _ = deal("natural", config, dataset=THREE_PARTS)
    assert [(len(h.rows), len(h.val_rows), len(h.test_rows)) for h in hands] == [(3, 5, 6)] * 2


def test_sizes_thin_natural_clients_at_random_to_no_more_than_they_have():
    config = NaturalConfig(sizes=SizesConfig(min=10, max=10))
    hands, _ = deal("natural", config, dataset=NATURAL)
    assert [len(hand.rows) for hand in hands] == [10, 10, 4]
    assert [len(hand.test_rows) for hand in hands] == [0, 10, 0]
    assert set(hands[0].rows.tolist()) < set(range(50))
    assert hands[0].rows.tolist() != list(range(10))
    other, _ = deal("natural", config, dataset=NATURAL, seed=1)
    assert hands[0].rows.tolist() != other[0].rows.tolist()


UNSEEN_SET = made(
    "toy_unseen",
    [
        balanced(30, TRAIN, 8)._replace(client_id="anna"),
        balanced(12, UNSEEN, 9)._replace(client_id="bert"),
        balanced(0, TRAIN, 10)._replace(client_id="carl"),
    ],
    natural=True,
)


def test_a_client_published_as_unseen_keeps_its_examples_as_its_own():
    hands, _ = deal("natural", NaturalConfig(), dataset=UNSEEN_SET)
    assert [(h.client_id, len(h.rows), len(h.test_rows), h.unseen) for h in hands] == [
        ("anna", 30, 0, False),
        ("bert", 12, 0, True),
        ("carl", 0, 0, False),
    ]
    assert hands[1].rows.tolist() == list(range(30, 42))


def test_a_client_published_both_in_and_out_of_training_is_refused():
    mixed = balanced(4, TRAIN, 11)._replace(
        client_id="dora", official=np.repeat([TRAIN, UNSEEN], 2).astype(np.uint8)
    )
    with pytest.raises(DataError, match="client 'dora' is published both in and out of training"):
        deal("natural", NaturalConfig(), dataset=made("toy_mixed", [mixed], natural=True))


def test_examples_of_unseen_clients_are_dealt_as_test_rows_of_a_pool():
    config = PooledConfig(num_clients=3, test_examples=1)
    hands, _ = deal("iid", config, dataset=UNSEEN_SET)
    assert sorted(np.concatenate([hand.rows for hand in hands])) == list(range(30))
    assert all(set(hand.test_rows.tolist()) <= set(range(30, 42)) for hand in hands)


@pytest.mark.parametrize(
    ("least", "expected"),
    [(0, ["anna", "bert", "carl"]), (1, ["anna", "bert", "carl"]), (5, ["anna", "bert"]),
     (30, ["anna", "bert"]), (31, ["anna"])],
)  # fmt: skip
def test_clients_with_fewer_examples_in_all_parts_together_are_left_out(least, expected):
    hands, _ = deal("natural", NaturalConfig(min_examples=least), dataset=NATURAL)
    assert [hand.client_id for hand in hands] == expected
    everybody, _ = deal("natural", NaturalConfig(), dataset=NATURAL)
    by_id = {hand.client_id: hand for hand in everybody}
    for hand in hands:
        np.testing.assert_array_equal(hand.rows, by_id[hand.client_id].rows)


MANY = made(
    "toy_many",
    [balanced(1 + n % 7, TRAIN, n)._replace(client_id=f"client-{n}") for n in range(40)],
    natural=True,
)


def test_a_number_of_the_large_clients_is_drawn_with_the_seed_and_kept_in_order():
    config = NaturalConfig(min_examples=4, max_clients=9)
    hands, store = deal("natural", config, dataset=MANY)
    assert len(hands) == 9
    assert min(len(hand.rows) for hand in hands) >= 4
    places = [store.client_ids.index(hand.client_id) for hand in hands]
    assert places == sorted(places)
    again, _ = deal("natural", config, dataset=MANY)
    other, _ = deal("natural", config, dataset=MANY, seed=1)
    assert [h.client_id for h in again] == [h.client_id for h in hands]
    assert [h.client_id for h in other] != [h.client_id for h in hands]


def test_natural_clients_are_dealt_without_a_look_at_the_examples():
    store = store_of(MANY)
    (store.folder / "data.arrow").unlink()
    config = Component("natural", NaturalConfig(min_examples=7, max_clients=3))
    assert len(partitioners.make(config, MANY, store, 0)) == 3


def test_every_client_is_drawn_equally_often():
    """Of 400 draws of 10 out of 40 each client is in 100, standard deviation 8.7."""
    store = store_of(MANY)
    counts = np.zeros(40)
    for seed in range(400):
        dealt = partitioners.make(
            Component("natural", NaturalConfig(max_clients=10)), MANY, store, seed
        )
        counts[[store.client_ids.index(hand.client_id) for hand in dealt]] += 1
    assert np.abs(counts - 100).max() < 5 * 8.7


def test_a_number_of_clients_beyond_all_keeps_all():
    hands, _ = deal("natural", NaturalConfig(max_clients=41), dataset=MANY)
    assert len(hands) == 40


def test_asking_for_more_examples_than_anybody_has_is_refused():
    message = "min_examples: none of 3 clients of toy_natural has 51 examples, the largest has 50"
    with pytest.raises(DataError, match=message):
        deal("natural", NaturalConfig(min_examples=51), dataset=NATURAL)


# -- pools ----------------------------------------------------------------------------------------


def test_iid_clients_are_equally_large_with_the_labels_of_the_pool():
    hands, store = deal("iid", PooledConfig(num_clients=12))
    sizes = [len(hand.rows) for hand in hands]
    assert max(sizes) - min(sizes) <= 1
    shares = counts_of(hands, store.labels()) / 208
    # A share of 208 draws without replacement has standard deviation below 0.021.
    assert np.abs(shares - 0.1).max() < 5 * 0.021


@pytest.mark.parametrize("alpha", [0.1, 0.5, 5.0])
def test_label_proportions_have_the_variance_of_a_dirichlet_draw(alpha):
    """Var share = (1/K) (1 - 1/K) / (K alpha + 1), plus the multinomial's share (1 - s) / n."""
    squares = []
    for seed in range(30):
        config = DirichletConfig(num_clients=10, alpha=alpha, sizes=SizesConfig(min=50, max=50))
        hands, store = deal("dirichlet", config, seed=seed)
        shares = counts_of(hands, store.labels()) / 50
        squares.append(((shares - 0.1) ** 2).mean())
    drawn = 0.1 * 0.9 / (10 * alpha + 1)
    expected = drawn + (0.1 * 0.9 - drawn) / 50
    assert np.mean(squares) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("alpha", [0.5, 5.0])
def test_without_sizes_each_class_is_cut_between_the_clients_by_dirichlet_shares(alpha):
    """Var of a client's share of one class = (1/M) (1 - 1/M) / (M alpha + 1)."""
    squares = []
    for seed in range(30):
        hands, store = deal("dirichlet", DirichletConfig(num_clients=10, alpha=alpha), seed=seed)
        shares = counts_of(hands, store.labels()) / 250
        np.testing.assert_allclose(shares.sum(0), 1)
        squares.append(((shares - 0.1) ** 2).mean())
    assert np.mean(squares) == pytest.approx(0.1 * 0.9 / (10 * alpha + 1), rel=0.15)


def test_every_client_of_a_skewed_cut_has_at_least_two_examples():
    hands, _ = deal("dirichlet", DirichletConfig(num_clients=20, alpha=0.1))
    assert min(len(hand.rows) for hand in hands) >= 2


def test_what_a_class_lacks_the_others_give():
    """Nearly one class a client and nearly all examples wanted: the classes run out."""
    sizes = SizesConfig(min=490, max=490)
    hands, store = deal("dirichlet", DirichletConfig(num_clients=5, alpha=0.01, sizes=sizes))
    assert [len(hand.rows) for hand in hands] == [490] * 5
    assert (counts_of(hands, store.labels()).sum(0) <= 250).all()


@pytest.mark.parametrize("per_client", [1, 2, 4])
def test_shards_give_a_client_few_classes(per_client):
    config = ShardsConfig(num_clients=25, shards_per_client=per_client)
    hands, store = deal("shards", config)
    found = counts_of(hands, store.labels())
    assert [len(hand.rows) for hand in hands] == [100] * 25
    # A shard of 100 / per_client rows of the sorted 2,500 touches at most two classes.
    classes = (found > 0).sum(1)
    assert classes.max() <= 2 * per_client
    assert classes.mean() < 10 * (1 - 0.9**per_client) + 1
    assert len({tuple(row) for row in (found > 0).tolist()}) > 5


def test_sizes_thin_shards_at_random():
    config = ShardsConfig(num_clients=10, sizes=SizesConfig(min=100, max=100))
    hands, _ = deal("shards", config)
    whole, _ = deal("shards", ShardsConfig(num_clients=10))
    for some, all_ in zip(hands, whole, strict=True):
        assert len(some.rows) == 100
        assert set(some.rows.tolist()) < set(all_.rows.tolist())


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_rotation_turns_each_group_of_clients_by_another_quarter(groups):
    hands, _ = deal("rotation", RotationConfig(num_clients=9, groups=groups))
    assert [hand.quarter_turns for hand in hands] == [m % groups for m in range(9)]
    even, _ = deal("iid", PooledConfig(num_clients=9))
    assert [h.rows.tolist() for h in hands] == [h.rows.tolist() for h in even]
    assert {hand.quarter_turns for hand in even} == {0}


def test_rotation_may_be_joined_with_label_skew():
    skewed, store = deal("rotation", RotationConfig(num_clients=10, alpha=0.2))
    plain, _ = deal("rotation", RotationConfig(num_clients=10))
    spread = [counts_of(hands, store.labels()).std(0).mean() for hands in (skewed, plain)]
    assert spread[0] > 5 * spread[1]
    dirichlet, _ = deal("dirichlet", DirichletConfig(num_clients=10, alpha=0.2))
    assert [h.rows.tolist() for h in skewed] == [h.rows.tolist() for h in dirichlet]


def test_images_of_a_turned_client_are_turned_anticlockwise(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "_entries", dict(datasets._entries))
    datasets.register("toy_pool", NaturalConfig)(lambda config: POOL)
    hands, _ = deal("rotation", RotationConfig(num_clients=4))
    partition = splits.split_clients(hands, (1.0, 0.0, 0.0), 0.0, 0)
    store = prepare(POOL, NaturalConfig(), None, 0, tmp_path)
    component = Component("toy_pool", NaturalConfig())
    spec = DataSpec(component, None, 0, str(tmp_path), store.manifest.digest)
    clients = dict(enumerate(partition.clients))
    train = ClientData(spec, clients, torch.device("cpu")).rows(torch.float32)["train"]
    for client, rows in clients.items():
        start = int(train.start_C[client])
        for at in range(0, len(rows.train), 50):
            image = train.x[start + at, 0].numpy()
            upright = store.read(rows.train[at : at + 1]).x[0, 0]
            turned = [[upright[j, 3 - i] for j in range(4)] for i in range(4)]  # one quarter
            expected = {0: upright, 1: np.asarray(turned), 2: upright[::-1, ::-1]}.get(client)
            if expected is None:
                expected = np.asarray(turned)[::-1, ::-1]
            np.testing.assert_array_equal(image, expected)


def test_test_examples_follow_the_clients_own_label_proportions():
    """Chi-square of the dealt test labels against the client's own shares, over many clients."""
    config = DirichletConfig(num_clients=20, alpha=0.5, test_examples=40)
    total = freedom = 0.0
    for seed in range(5):
        hands, store = deal("dirichlet", config, seed=seed)
        labels = store.labels()
        for hand in hands:
            own = np.bincount(labels[hand.rows], minlength=10) / len(hand.rows)
            test = np.bincount(labels[hand.test_rows], minlength=10)
            assert not test[own == 0].any()
            wanted = 40 * own[own > 0]
            total += ((test[own > 0] - wanted) ** 2 / wanted).sum()
            freedom += (own > 0).sum() - 1
    # Mean of a chi-square is its degrees of freedom, its variance at least twice that.
    assert total == pytest.approx(freedom, rel=0.25)


DRAWN = {"alpha": 2.0, "num_clients": 20, "sizes": SizesConfig(min=20, max=20)}


def homogeneity(name, config):
    """Chi-square that own and test examples share their proportions, a degree of freedom."""
    total = freedom = 0.0
    for seed in range(5):
        hands, store = deal(name, config, seed=seed)
        own_MK = counts_of(hands, store.labels())
        test_MK = np.stack([np.bincount(store.labels()[h.test_rows], minlength=10) for h in hands])
        for own_K, test_K in zip(own_MK, test_MK, strict=True):
            both_K = own_K + test_K
            pooled_K = both_K[both_K > 0] / both_K.sum()
            gap_K = (own_K / own_K.sum() - test_K / test_K.sum())[both_K > 0]
            spread = 1 / own_K.sum() + 1 / test_K.sum()
            total += (gap_K**2 / (pooled_K * spread)).sum()
            freedom += (both_K > 0).sum() - 1
    return total / freedom


@pytest.mark.parametrize(
    ("name", "config"), [("dirichlet", DirichletConfig), ("rotation", RotationConfig)]
)
def test_drawn_test_labels_vary_beside_the_clients_own_as_two_samples_do(name, config):
    """With 20 of each ``dealt`` lacks half of that: only the test labels vary."""
    drawn = config(**DRAWN, test_examples=20, test_labels="drawn")
    dealt = config(**DRAWN, test_examples=20)
    assert homogeneity(name, drawn) == pytest.approx(1.0, abs=0.15)
    assert homogeneity(name, dealt) < 0.7
    pairs = zip(deal(name, drawn)[0], deal(name, dealt)[0], strict=True)
    assert all(np.array_equal(one.rows, other.rows) for one, other in pairs)


def test_without_test_examples_the_published_test_part_is_dealt_too():
    hands, _ = deal("iid", PooledConfig(num_clients=5))
    assert sum(len(hand.rows) for hand in hands) == TRAINING + TESTING
    assert not any(len(hand.test_rows) for hand in hands)


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SizesConfig(min=0, max=5), r"sizes needs 1 <= min <= max, got 0 and 5"),
        (lambda: SizesConfig(min=6, max=5), r"sizes needs 1 <= min <= max, got 6 and 5"),
        (lambda: NaturalConfig(min_examples=-1), r"partition\.min_examples must be >= 0, got -1"),
        (lambda: NaturalConfig(max_clients=0), r"partition\.max_clients must be >= 1, got 0"),
        (lambda: PooledConfig(num_clients=0), r"partition\.num_clients must be >= 1, got 0"),
        (lambda: PooledConfig(test_examples=-1), r"partition\.test_examples must be >= 0: -1"),
        (lambda: DirichletConfig(alpha=0.0), r"partition\.alpha must be > 0, got 0\.0"),
        (lambda: DirichletConfig(alpha=-1.0), r"partition\.alpha must be > 0, got -1\.0"),
        (lambda: DirichletConfig(alpha=math.inf), r"partition\.alpha must be > 0, got inf"),
        (lambda: DirichletConfig(num_clients=0), r"partition\.num_clients must be >= 1, got 0"),
        (lambda: ShardsConfig(shards_per_client=0), r"shards_per_client must be >= 1, got 0"),
        (lambda: ShardsConfig(num_clients=0), r"partition\.num_clients must be >= 1, got 0"),
        (lambda: RotationConfig(groups=5), r"partition\.groups must lie in 1\.\.4, got 5"),
        (lambda: RotationConfig(groups=0), r"partition\.groups must lie in 1\.\.4, got 0"),
        (lambda: RotationConfig(alpha=0.0), r"partition\.alpha must be > 0, got 0\.0"),
        (lambda: RotationConfig(num_clients=0), r"partition\.num_clients must be >= 1, got 0"),
    ],
)
def test_a_wrong_option_is_named_with_its_value(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


TOO_MUCH = {
    "natural without clients": (
        "natural", NaturalConfig(), POOL, ConfigError,
        "toy_pool has no clients of its own; use dirichlet, shards, rotation or iid",
    ),
    "rotation of oblong images": (
        "rotation", RotationConfig(), OBLONG, ConfigError,
        r"rotation needs square images, toy_oblong has \(1, 4, 3\)",
    ),
    "parts that dealing would mix": (
        "iid", PooledConfig(num_clients=2), THREE_PARTS, ConfigError,
        "toy_three_parts is published as training, validation and test parts, .*; use natural",
    ),
    "no published test part": (
        "iid", PooledConfig(test_examples=5), NO_TEST, ConfigError,
        "test_examples: toy_without_test has no published test part; set it to 0",
    ),
    "drawn test labels of iid": (
        "iid", PooledConfig(sizes=SizesConfig(min=9, max=9), test_examples=5, test_labels="drawn"),
        POOL, ConfigError, "test_labels: drawn needs test_examples and label proportions drawn for",
    ),
    "drawn test labels where classes are cut": (
        "dirichlet", DirichletConfig(test_examples=5, test_labels="drawn"), POOL, ConfigError,
        "test_labels: drawn needs .* dirichlet or rotation with alpha, with sizes; or take dealt",
    ),
    "drawn test labels without test examples": (
        "dirichlet", DirichletConfig(sizes=SizesConfig(min=9, max=9), test_labels="drawn"), POOL,
        ConfigError, "test_labels: drawn needs test_examples",
    ),
    "more test examples than published": (
        "iid", PooledConfig(num_clients=2, test_examples=490), POOL, DataError,
        r"test_examples: 490 need \d\d of class \d for one client, .* has 50; lower test_examples",
    ),
    "fewer examples than clients": (
        "iid", PooledConfig(num_clients=301), NO_TEST, DataError,
        "300 examples are not enough for 301 clients; lower num_clients",
    ),
    "fewer examples than clients of a rotation": (
        "rotation", RotationConfig(num_clients=2001, test_examples=5), POOL, DataError,
        "2000 examples are not enough for 2001 clients; lower num_clients",
    ),
    "fewer examples than shards": (
        "shards", ShardsConfig(num_clients=200), NO_TEST, DataError,
        "300 examples cannot make 400 shards; lower num_clients or shards_per_client",
    ),
    "fewer than two examples a client": (
        "dirichlet", DirichletConfig(num_clients=151), NO_TEST, DataError,
        "alpha=0.5 leaves some of 151 clients without examples.*lower num_clients",
    ),
    "sizes of iid": (
        "iid", PooledConfig(num_clients=3, sizes=SizesConfig(min=101, max=101)), NO_TEST,
        DataError, r"sizes ask for 303 examples, there are 300; lower sizes\.max or num_clients",
    ),
    "sizes of dirichlet": (
        "dirichlet", DirichletConfig(num_clients=3, sizes=SizesConfig(min=101, max=101)), NO_TEST,
        DataError, r"sizes ask for 303 examples, there are 300; lower sizes\.max or num_clients",
    ),
    "sizes of shards": (
        "shards", ShardsConfig(num_clients=3, sizes=SizesConfig(min=101, max=101)), NO_TEST,
        DataError, r"sizes ask for 101 examples of a client whose shards hold 100; lower sizes",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "config", "dataset", "kind", "message"), TOO_MUCH.values(), ids=TOO_MUCH
)
def test_what_the_data_cannot_give_is_refused_in_one_line(name, config, dataset, kind, message):
    with pytest.raises(kind, match=message) as error:
        deal(name, config, dataset=dataset)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("data.partition")


@pytest.mark.parametrize("name", ["iid", "dirichlet", "shards"])
def test_targets_of_a_regression_cannot_be_dealt_by_label(name):
    dataset = datasets.make(Component("gaussian", GaussianConfig(num_clients=3)))
    with pytest.raises(ConfigError, match="gaussian has no class labels to deal by; use natural"):
        deal(name, CONFIGS[name](), dataset=dataset)
