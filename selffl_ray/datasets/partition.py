"""Which examples each client owns.

A partitioner deals row numbers of a store to clients; nothing is copied. All draws come from the
seed, so every process that knows the seed deals the same hand.

``sizes`` is quantity skew, for any partitioner: num_examples log-uniform between min and max.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from selffl_ray.datasets.base import TEST, TRAIN, UNSEEN, VAL, Dataset
from selffl_ray.datasets.piles import Rows, Shares, cut_each_class, take_proportions
from selffl_ray.datasets.store import Store
from selffl_ray.errors import ConfigError, DataError
from selffl_ray.registry import register_partitioner
from selffl_ray.seeding import generator

logger = logging.getLogger(__name__)

NO_ROWS: Rows = np.empty(0, np.int64)


class Hand(NamedTuple):
    """What one client is dealt.

    rows: its own examples; test_rows: examples from the published test part, if the partition
    takes test data from there; quarter_turns: by which its images are turned anticlockwise;
    val_rows: examples from the published validation part; unseen: published as a client that takes
    no part in training, whose own examples are then all in ``rows``.
    """

    client_id: str
    rows: Rows
    test_rows: Rows
    quarter_turns: int = 0
    val_rows: Rows = NO_ROWS
    unseen: bool = False


class Deal(NamedTuple):
    """What a partitioner works with.

    pool: rows that may be dealt (the published training part if test rows are dealt apart);
    labels: class of every row of the store; test_pool: rows of the published test part.
    """

    pool: Rows
    labels: npt.NDArray[Any]
    test_pool: Rows
    rng: np.random.Generator


@dataclass(frozen=True, kw_only=True)
class SizesConfig:
    """Number of examples of each client: round(exp(U(ln min, ln max)))."""

    min: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.max:
            raise ConfigError(
                f"data.partition.sizes needs 1 <= min <= max, got {self.min} and {self.max}"
            )

    def draw(self, rng: np.random.Generator, num_clients: int) -> Rows:
        """(M,) numbers of examples."""
        drawn = np.exp(rng.uniform(math.log(self.min), math.log(self.max), num_clients))
        return np.round(drawn).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class NaturalConfig:
    """The clients that the data come with."""

    sizes: SizesConfig | None = None
    """Thin each client to a drawn number of examples (no more than it has)."""
    min_examples: int = 0
    """Leave out clients with fewer examples than that, all published parts together."""
    max_clients: int | None = None
    """Keep so many of them, drawn with the experiment's seed."""

    def __post_init__(self) -> None:
        if self.min_examples < 0:
            raise ConfigError(f"data.partition.min_examples must be >= 0, got {self.min_examples}")
        if self.max_clients is not None and self.max_clients < 1:
            raise ConfigError(f"data.partition.max_clients must be >= 1, got {self.max_clients}")


@dataclass(frozen=True, kw_only=True)
class PooledConfig:
    """What all partitions of a pool share."""

    num_clients: int = 20
    sizes: SizesConfig | None = None
    """Quantity skew; by default everything is dealt out."""
    test_examples: int = 0
    """Deal so many examples a client from the published test part, in the client's own label
    proportions; 0 takes test data out of the client's own examples."""
    test_labels: Literal["dealt", "drawn"] = "dealt"
    """Which label proportions: of the examples that the client was dealt, or those that it drew
    them with (``dirichlet``, and ``rotation`` with ``alpha``, both with ``sizes``). Few examples
    differ from what they were drawn with by chance, and ``dealt`` tests with the same chance: in
    the study of the prototype local training gains up to 3 points of local accuracy by that."""

    def __post_init__(self) -> None:
        if self.num_clients < 1:
            raise ConfigError(f"data.partition.num_clients must be >= 1, got {self.num_clients}")
        if self.test_examples < 0:
            raise ConfigError(f"data.partition.test_examples must be >= 0: {self.test_examples}")


@dataclass(frozen=True, kw_only=True)
class DirichletConfig(PooledConfig):
    """Label skew by Dirichlet draws."""

    alpha: float = 0.5
    """Concentration: 0.1 leaves one or two classes a client, 100 is nearly identical."""

    def __post_init__(self) -> None:
        PooledConfig.__post_init__(self)
        _check_alpha(self.alpha)


@dataclass(frozen=True, kw_only=True)
class ShardsConfig(PooledConfig):
    """Label skew by shards of the sorted labels."""

    shards_per_client: int = 2

    def __post_init__(self) -> None:
        PooledConfig.__post_init__(self)
        if self.shards_per_client < 1:
            raise ConfigError(
                f"data.partition.shards_per_client must be >= 1, got {self.shards_per_client}"
            )


@dataclass(frozen=True, kw_only=True)
class RotationConfig(PooledConfig):
    """Feature shift: client m sees images turned by (m mod groups) quarter turns."""

    groups: int = 4
    alpha: float | None = None
    """Dirichlet label skew besides; null deals without regard to labels."""

    def __post_init__(self) -> None:
        PooledConfig.__post_init__(self)
        if not 1 <= self.groups <= 4:
            raise ConfigError(f"data.partition.groups must lie in 1..4, got {self.groups}")
        if self.alpha is not None:
            _check_alpha(self.alpha)


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < math.inf:
        raise ConfigError(f"data.partition.alpha must be > 0, got {alpha}")


@register_partitioner("natural", NaturalConfig)
def natural(config: NaturalConfig, dataset: Dataset, store: Store, seed: int) -> list[Hand]:
    """The data set's own clients."""
    if not dataset.natural:
        raise ConfigError(
            f"data.partition.name: {dataset.name} has no clients of its own; use dirichlet, "
            "shards, rotation or iid"
        )
    client_ids = store.client_ids
    chosen = _chosen(config, dataset, store, seed)
    hands = [_natural_hand(store, batch, client_ids[batch]) for batch in chosen]
    if config.sizes is None:
        return hands
    rng = generator(seed, "partition")
    thinned = []
    for hand in hands:
        size = min(int(config.sizes.draw(rng, 1)[0]), len(hand.rows))
        thinned.append(hand._replace(rows=np.sort(rng.permutation(hand.rows)[:size])))
    return thinned


def _chosen(config: NaturalConfig, dataset: Dataset, store: Store, seed: int) -> list[int]:
    """Record batches of clients that are large enough, and of these a drawn number; in order."""
    sizes = np.diff(store.start_rows)
    large = np.flatnonzero(sizes >= config.min_examples)
    if not len(large):
        raise DataError(
            f"data.partition.min_examples: none of {len(sizes)} clients of {dataset.name} has "
            f"{config.min_examples} examples, the largest has {sizes.max()}; lower it"
        )
    kept = large
    if config.max_clients is not None and config.max_clients < len(large):
        rng = generator(seed, "partition/clients")
        kept = np.sort(rng.choice(large, size=config.max_clients, replace=False))
    if len(kept) < len(sizes):
        logger.info(
            "%s: %d of %d clients take part; %d have fewer than min_examples=%d",
            dataset.name, len(kept), len(sizes), len(sizes) - len(large), config.min_examples,
        )  # fmt: skip
    return [int(batch) for batch in kept]


def _natural_hand(store: Store, batch: int, client_id: str) -> Hand:
    """What the client of a record batch has; its examples are not read."""
    own = np.arange(store.start_rows[batch], store.start_rows[batch + 1])
    part = store.official([batch])
    unseen = bool(len(own)) and bool((part == UNSEEN).all())
    if (part == UNSEEN).any() and not unseen:
        raise DataError(
            f"{store.folder}: client {client_id!r} is published both in and out of training; its "
            "reader must mark all of its examples as UNSEEN, or none"
        )
    train = own if unseen else own[part == TRAIN]
    return Hand(client_id, train, own[part == TEST], val_rows=own[part == VAL], unseen=unseen)


def _deal_from(config: PooledConfig, dataset: Dataset, store: Store, seed: int) -> Deal:
    if dataset.task.score_name != "accuracy":
        raise ConfigError(
            f"data.partition.name: {dataset.name} has no class labels to deal by; use natural"
        )
    if dataset.overlap:
        # What one client trains on another would be tested on.
        raise ConfigError(
            f"data.partition.name: examples of {dataset.name} overlap with up to {dataset.overlap} "
            "after them, which dealing would spread over clients and parts; use natural"
        )
    official = store.official()
    if (official == VAL).any():
        # Such parts may be cut by time from what overlaps; dealing anew would leak test into train.
        raise ConfigError(
            f"data.partition.name: {dataset.name} is published as training, validation and test "
            "parts, which dealing would mix; use natural"
        )
    rows = np.arange(len(official), dtype=np.int64)
    test_pool = rows[(official == TEST) | (official == UNSEEN)]
    if config.test_examples:
        if not len(test_pool):
            raise ConfigError(
                f"data.partition.test_examples: {dataset.name} has no published test part; set it "
                "to 0"
            )
        rows = rows[official == TRAIN]
    return Deal(rows, store.labels(), test_pool, generator(seed, "partition"))


@register_partitioner("iid", PooledConfig)
def iid(config: PooledConfig, dataset: Dataset, store: Store, seed: int) -> list[Hand]:
    """Examples dealt out at random, equally or by ``sizes``."""
    deal = _deal_from(config, dataset, store, seed)
    return _finish(config, deal, _split_evenly(config, deal))


@register_partitioner("dirichlet", DirichletConfig)
def dirichlet(config: DirichletConfig, dataset: Dataset, store: Store, seed: int) -> list[Hand]:
    """Label proportions from a Dirichlet distribution, for each client or for each class.

    With ``sizes``, each client draws label proportions and a multinomial number of each class.
    Without, each class is cut between the clients by Dirichlet shares (Hsu, Qi, Brown 2019), so
    that everything is dealt out and sizes follow from the draw.
    """
    deal = _deal_from(config, dataset, store, seed)
    return _finish(config, deal, *_by_dirichlet(config, deal, config.alpha))


@register_partitioner("shards", ShardsConfig)
def shards(config: ShardsConfig, dataset: Dataset, store: Store, seed: int) -> list[Hand]:
    """Rows sorted by label, cut into equal shards, a few shards each (McMahan et al. 2017)."""
    deal = _deal_from(config, dataset, store, seed)
    order = deal.rng.permutation(deal.pool)
    order = order[np.argsort(deal.labels[order], kind="stable")]
    count = config.num_clients * config.shards_per_client
    if len(order) < count:
        raise DataError(
            f"data.partition: {len(order)} examples cannot make {count} shards; lower num_clients "
            "or shards_per_client"
        )
    pieces = np.array_split(order, count)
    dealt = deal.rng.permutation(count).reshape(config.num_clients, -1)
    hands = [np.concatenate([pieces[p] for p in own]) for own in dealt]
    if config.sizes is not None:
        sizes = config.sizes.draw(deal.rng, config.num_clients)
        pairs = list(zip(hands, sizes, strict=True))
        short = [(h, n) for h, n in pairs if n > len(h)]
        if short:
            raise DataError(
                f"data.partition.sizes ask for {short[0][1]} examples of a client whose shards "
                f"hold {len(short[0][0])}; lower sizes.max or num_clients"
            )
        hands = [deal.rng.permutation(h)[:n] for h, n in pairs]
    return _finish(config, deal, hands)


@register_partitioner("rotation", RotationConfig)
def rotation(config: RotationConfig, dataset: Dataset, store: Store, seed: int) -> list[Hand]:
    """Images turned by quarter turns, a group of clients for each; otherwise dealt like iid."""
    shape = dataset.shape.input_shape
    if len(shape) != 3 or shape[1] != shape[2]:
        raise ConfigError(
            f"data.partition.name rotation needs square images, {dataset.name} has {shape}"
        )
    deal = _deal_from(config, dataset, store, seed)
    if config.alpha is None:
        dealt, shares = _split_evenly(config, deal), None
    else:
        dealt, shares = _by_dirichlet(config, deal, config.alpha)
    return [
        hand._replace(quarter_turns=client % config.groups)
        for client, hand in enumerate(_finish(config, deal, dealt, shares))
    ]


def _split_evenly(config: PooledConfig, deal: Deal) -> list[Rows]:
    order = deal.rng.permutation(deal.pool)
    if len(order) < config.num_clients:
        raise DataError(
            f"data.partition: {len(order)} examples are not enough for {config.num_clients} "
            "clients; lower num_clients"
        )
    if config.sizes is None:
        return list(np.array_split(order, config.num_clients))
    sizes = _affordable(config.sizes.draw(deal.rng, config.num_clients), len(order))
    return np.split(order[: sizes.sum()], np.cumsum(sizes)[:-1])


def _affordable(sizes: Rows, available: int) -> Rows:
    if sizes.sum() > available:
        raise DataError(
            f"data.partition.sizes ask for {sizes.sum()} examples, there are {available}; lower "
            "sizes.max or num_clients"
        )
    return sizes


def _by_dirichlet(
    config: PooledConfig, deal: Deal, alpha: float
) -> tuple[list[Rows], list[Shares] | None]:
    """Rows of each client, and the label proportions that it drew, if it drew some."""
    labels = deal.labels[deal.pool]
    classes = np.unique(labels)
    piles = [deal.rng.permutation(deal.pool[labels == c]) for c in classes]
    if config.sizes is None:
        return cut_each_class(deal.rng, piles, config.num_clients, alpha), None
    sizes = _affordable(config.sizes.draw(deal.rng, config.num_clients), len(deal.pool))
    dealt, shares = [], []
    for n in sizes:
        shares.append(deal.rng.dirichlet(np.full(len(piles), alpha)))
        dealt.append(take_proportions(deal.rng, piles, int(n), shares[-1]))
    return dealt, shares


def _finish(
    config: PooledConfig, deal: Deal, dealt: list[Rows], shares: list[Shares] | None = None
) -> list[Hand]:
    """Names, and test rows in each client's own label proportions."""
    if config.test_labels == "drawn" and (shares is None or not config.test_examples):
        raise ConfigError(
            "data.partition.test_labels: drawn needs test_examples and label proportions drawn for "
            "each client, so dirichlet or rotation with alpha, with sizes; or take dealt"
        )
    width = len(str(config.num_clients - 1))
    hands = []
    for client, rows in enumerate(dealt):
        test = NO_ROWS
        if config.test_examples:
            share = shares[client] if shares and config.test_labels == "drawn" else None
            test = _test_rows(config.test_examples, deal, rows, share)
        hands.append(Hand(f"client-{client:0{width}d}", np.sort(rows), test))
    return hands


def _test_rows(number: int, deal: Deal, rows: Rows, share: Shares | None) -> Rows:
    """Multinomial numbers of each class from the published test part, no row twice a client.

    The proportions are ``share`` of the pool's classes; None: those of the client's own ``rows``.
    """
    own, counts = np.unique(deal.labels[rows], return_counts=True)
    if share is None:
        share = counts / counts.sum()
    else:
        own = np.unique(deal.labels[deal.pool])
    test_labels = deal.labels[deal.test_pool]
    taken = []
    for label, wanted in zip(own, deal.rng.multinomial(number, share), strict=True):
        pile = deal.test_pool[test_labels == label]
        if wanted > len(pile):
            raise DataError(
                f"data.partition.test_examples: {number} need {wanted} of class {label} for one "
                f"client, the published test part has {len(pile)}; lower test_examples"
            )
        taken.append(deal.rng.permutation(pile)[:wanted])
    return np.sort(np.concatenate(taken))
