"""The Arrow client store: what goes in comes out, and a broken copy is never believed."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selffl_ray.datasets.base import TEST, TRAIN, Dataset, Group, no_files
from selffl_ray.datasets.partition import NaturalConfig, natural
from selffl_ray.datasets.store import POOL_PIECE, Store, prepare, store_root
from selffl_ray.errors import ConfigError, DataError
from selffl_ray.tasks import DataShape

SHAPE = DataShape((1, 4, 3), 10)


def made(groups, *, natural=True, find=no_files, name="toy", depends_on_seed=False):
    """A data set of given groups; called with the seed if they are a function."""
    return Dataset(
        name=name,
        title="Toy",
        licence="none",
        shape=SHAPE,
        find=find,
        read=lambda files, seed: iter(groups(seed) if callable(groups) else groups),
        natural=natural,
        depends_on_seed=depends_on_seed,
    )


def group(client_id, size, *, x_type=np.uint8, y_shape=(), official=None, seed=0):
    rng = np.random.default_rng([seed, size])
    x = rng.integers(256, size=(size, 1, 4, 3)).astype(x_type)
    y = rng.normal(size=(size, *y_shape)) if y_shape else rng.integers(10, size=size)
    return Group(client_id, x, y, official)


CLIENTS = [group("anna", 5), group("bert", 9), group("carl", 2)]


@pytest.fixture
def store(tmp_path):
    return prepare(made(CLIENTS), None, None, 0, tmp_path)


def together(groups):
    return np.concatenate([g.x for g in groups]), np.concatenate([g.y for g in groups])


# -- what goes in comes out -----------------------------------------------------------------------


@pytest.mark.parametrize("x_type", [np.uint8, np.float32, np.int64])
@pytest.mark.parametrize("y_shape", [(), (2, 2, 3)], ids=["labels", "targets"])
def test_rows_come_back_with_their_bits_type_and_shape(tmp_path, x_type, y_shape):
    groups = [group(c, n, x_type=x_type, y_shape=y_shape) for c, n in (("a", 4), ("b", 7))]
    store = prepare(made(groups), None, None, 0, tmp_path)
    x, y = together(groups)
    found = store.read(np.arange(11))
    np.testing.assert_array_equal(found.x, x)
    np.testing.assert_array_equal(found.y, y)
    assert found.x.dtype == x.dtype
    assert found.y.dtype == y.dtype
    np.testing.assert_array_equal(store.labels(), y)


@settings(max_examples=40)
@given(rows=st.lists(st.integers(0, 15), min_size=1, max_size=40))
def test_rows_come_in_the_order_asked_for_repeats_included(stores, rows):
    store = prepare(made(CLIENTS), None, None, 0, stores / "order")
    x, y = together(CLIENTS)
    found = store.read(np.asarray(rows))
    np.testing.assert_array_equal(found.x, x[rows])
    np.testing.assert_array_equal(found.y, y[rows])


def test_what_is_read_is_a_copy(store):
    first = store.read(np.asarray([3]))
    first.x[:] = 0
    first.y[:] = 99
    again = store.read(np.asarray([3]))
    np.testing.assert_array_equal(again.x[0], CLIENTS[0].x[3])
    assert again.y[0] == CLIENTS[0].y[3]


def test_a_natural_client_is_one_record_batch(store):
    assert store.client_ids == ["anna", "bert", "carl"]
    assert store.start_rows.tolist() == [0, 5, 14, 16]
    assert store.manifest.num_rows == 16
    assert store.manifest.num_batches == 3
    assert store.manifest.x_shape == (1, 4, 3)
    assert store.manifest.y_shape == ()


def test_a_pool_is_cut_into_pieces_and_its_official_split_kept(tmp_path):
    sizes, parts = (POOL_PIECE + 10, 40), (TRAIN, TEST)
    groups = [
        group("", n, official=np.full(n, part, np.uint8))
        for n, part in zip(sizes, parts, strict=True)
    ]
    store = prepare(made(groups, natural=False), None, None, 0, tmp_path)
    assert store.client_ids == ["", "", ""]
    assert store.start_rows.tolist() == [0, POOL_PIECE, POOL_PIECE + 10, POOL_PIECE + 50]
    x, y = together(groups)
    rows = np.asarray([POOL_PIECE + 12, 0, POOL_PIECE - 1, POOL_PIECE])
    np.testing.assert_array_equal(store.read(rows).x, x[rows])
    np.testing.assert_array_equal(store.labels(), y)
    np.testing.assert_array_equal(store.official(), np.repeat(parts, sizes))


def test_without_a_published_split_everything_is_for_training(store):
    assert store.official().tolist() == [TRAIN] * 16


def test_a_client_without_examples_keeps_its_place(tmp_path):
    groups = [group("a", 3), group("empty", 0), group("c", 2)]
    store = prepare(made(groups), None, None, 0, tmp_path)
    assert store.client_ids == ["a", "empty", "c"]
    np.testing.assert_array_equal(store.read(np.asarray([4, 2])).x, together(groups)[0][[4, 2]])


# -- how far it is ---------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [None, 3, 5])
def test_each_record_batch_is_told_of_when_it_is_written_and_when_it_is_checked(tmp_path, total):
    given, told = [], []

    def groups(seed):
        for one in CLIENTS:
            given.append(one)
            yield one
            assert len(told) == len(given)  # the last one is written before another is asked for

    dataset = dataclasses.replace(made(groups), num_groups=total and (lambda files: total))
    store = prepare(dataset, None, None, 0, tmp_path, watch=told.append)
    rows = [5, 14, 16]
    assert [e[:4] for e in told] == [
        *(("preparing", k + 1, total, n) for k, n in enumerate(rows)),
        ("preparing", 3, 3, 16),
    ]
    assert [e.finished for e in told] == [False] * 3 + [True]
    told.clear()
    again = prepare(dataset, None, None, 0, tmp_path, watch=told.append)
    assert not told
    again.check(told.append)
    assert [e[:4] for e in told] == [("checking", k + 1, 3, n) for k, n in enumerate(rows)]
    assert [e.finished for e in told] == [False, False, True]
    assert store.folder == again.folder


# -- identity -------------------------------------------------------------------------------------


def digest(root, groups, **options):
    return prepare(made(groups, **options), None, None, 0, root).manifest.digest


def test_the_digest_is_that_of_the_content_wherever_it_lies(tmp_path):
    first = digest(tmp_path / "here", CLIENTS)
    assert digest(tmp_path / "there", CLIENTS) == first
    assert digest(tmp_path / "renamed", CLIENTS, name="other") == first

    pixel = CLIENTS[1].x.copy()
    pixel[8, 0, 3, 2] ^= 1
    label = CLIENTS[1].y.copy()
    label[0] = (label[0] + 1) % 10
    changed = [
        [CLIENTS[0], CLIENTS[1]._replace(x=pixel), CLIENTS[2]],
        [CLIENTS[0], CLIENTS[1]._replace(y=label), CLIENTS[2]],
        [CLIENTS[0], CLIENTS[1]._replace(client_id="berta"), CLIENTS[2]],
        [CLIENTS[0], CLIENTS[1]._replace(official=np.eye(9, dtype=np.uint8)[0]), CLIENTS[2]],
        [CLIENTS[1], CLIENTS[0], CLIENTS[2]],
        CLIENTS[:2],
        [CLIENTS[0], CLIENTS[1]._replace(x=CLIENTS[1].x.astype(np.float32)), CLIENTS[2]],
    ]
    digests = {digest(tmp_path / str(i), groups) for i, groups in enumerate(changed[:-1])}
    assert len(digests) == 6
    assert first not in digests
    floats = [g._replace(x=g.x.astype(np.float32)) for g in CLIENTS]
    assert digest(tmp_path / "floats", floats) != first


def test_a_store_is_built_once_and_again_for_other_options_files_or_seeds(tmp_path):
    read = []

    def groups(seed):
        read.append(seed)
        return [group("a", 3, seed=seed)]

    source = tmp_path / "file"
    source.write_text("one")
    root = tmp_path / "stores"
    fixed = made(groups, find=lambda s: (source,))
    drawn = made(groups, find=lambda s: (source,), depends_on_seed=True)
    first = prepare(fixed, "options", None, 1, root)
    assert prepare(fixed, "options", None, 2, root).folder == first.folder
    assert read == [1]
    assert prepare(fixed, "other options", None, 1, root).folder != first.folder
    by_seed = {prepare(drawn, "options", None, seed, root).manifest.digest for seed in (1, 2, 2)}
    assert len(by_seed) == 2
    assert read == [1, 1, 1, 2]
    source.write_text("other")
    assert prepare(fixed, "options", None, 1, root).folder != first.folder


def test_another_version_of_a_reader_is_another_store_with_the_digest_of_its_content(tmp_path):
    old = dataclasses.replace(made(CLIENTS), version=1)
    new = dataclasses.replace(made([*CLIENTS[:2], CLIENTS[2]._replace(client_id="d")]), version=2)
    first, other = (prepare(d, None, None, 0, tmp_path) for d in (old, new))
    assert other.client_ids == ["anna", "bert", "d"]
    assert prepare(old, None, None, 0, tmp_path).folder == first.folder != other.folder
    same = prepare(dataclasses.replace(old, version=3), None, None, 0, tmp_path)
    assert same.manifest.digest == first.manifest.digest != other.manifest.digest


def test_stores_lie_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("SELFFL_RAY_STORES", str(tmp_path / "given"))
    assert store_root() == tmp_path / "given"
    monkeypatch.delenv("SELFFL_RAY_STORES")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert store_root() == tmp_path / "cache" / "selffl_ray"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store_root() == tmp_path / ".cache" / "selffl_ray"


# -- two at once ----------------------------------------------------------------------------------


def _prepare_with_others(barrier, answers, root):
    def groups(seed):
        yield CLIENTS[0]
        barrier.wait(60)  # nobody is done before all have begun
        yield from CLIENTS[1:]

    store = prepare(made(groups), None, None, 0, root)
    answers.put((str(store.folder), store.read(np.arange(16)).x.sum()))


def test_processes_that_prepare_at_once_end_with_one_good_copy(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    barrier, answers = spawn.Barrier(2), spawn.Queue()
    workers = [
        spawn.Process(target=_prepare_with_others, args=(barrier, answers, tmp_path))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    found = {answers.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    (only,) = tmp_path.iterdir()
    assert found == {(str(only), together(CLIENTS)[0].sum())}


def test_a_build_that_fails_leaves_nothing_behind(tmp_path):
    def groups(seed):
        yield CLIENTS[0]
        raise DataError("the second file is missing")

    with pytest.raises(DataError, match="the second file is missing"):
        prepare(made(groups), None, None, 0, tmp_path)
    assert list(tmp_path.iterdir()) == []


# -- broken copies --------------------------------------------------------------------------------


def flip(path, at):
    """Change one byte, in a new file: the old one may be mapped."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0xFF
    path.unlink()
    path.write_bytes(raw)


def read_all(folder):
    store = Store(folder)
    return store.read(np.arange(store.manifest.num_rows)), store.client_ids, store.official()


def remedy(folder):
    return f"delete {folder} and prepare it again"


def test_a_changed_example_is_noticed_and_its_client_named(store):
    path = store.folder / "data.arrow"
    x = CLIENTS[1].x.tobytes()
    flip(path, path.read_bytes().index(x) + len(x) // 2)
    broken = Store(store.folder)
    np.testing.assert_array_equal(broken.read(np.arange(5)).x, CLIENTS[0].x)
    with pytest.raises(DataError, match=r"record batch 1 \(client 'bert'\) is not what") as error:
        broken.read(np.asarray([14, 5]))
    assert remedy(store.folder) in str(error.value)
    for look in (broken.labels, broken.check):
        with pytest.raises(DataError, match="'bert'"):
            look()


@pytest.mark.parametrize("name", ["data.arrow", "index.arrow", "manifest.json"])
@pytest.mark.parametrize("keep", [0, 0.3, 0.9])
def test_a_truncated_file_is_noticed(store, name, keep):
    path = store.folder / name
    raw = path.read_bytes()
    path.unlink()
    path.write_bytes(raw[: int(keep * len(raw))])
    with pytest.raises(DataError) as error:
        read_all(store.folder)
    assert remedy(store.folder) in str(error.value)


@pytest.mark.parametrize("name", ["data.arrow", "index.arrow", "manifest.json"])
def test_a_missing_file_is_noticed(store, name):
    (store.folder / name).unlink()
    with pytest.raises(DataError) as error:
        read_all(store.folder)
    assert name in str(error.value)
    assert remedy(store.folder) in str(error.value)


def test_a_folder_without_manifest_is_in_the_way_of_building_the_store(store):
    (store.folder / "manifest.json").unlink()
    with pytest.raises(DataError) as error:
        prepare(made(CLIENTS), None, None, 0, store.folder.parent)
    assert remedy(store.folder) in str(error.value)
    assert list(store.folder.parent.iterdir()) == [store.folder]


def test_another_schema_version_is_named(store):
    path = store.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "schema_version": 3, "something_new": 1}))
    with pytest.raises(DataError, match="schema version 3, this release reads 2") as error:
        Store(store.folder)
    assert remedy(store.folder) in str(error.value)


def test_an_index_that_does_not_belong_to_the_data_is_noticed(tmp_path):
    ours, theirs = (
        prepare(made(groups), None, None, 0, tmp_path / name)
        for name, groups in (("ours", CLIENTS), ("theirs", [CLIENTS[1], CLIENTS[0], CLIENTS[2]]))
    )
    path = ours.folder / "index.arrow"
    path.unlink()
    path.write_bytes((theirs.folder / "index.arrow").read_bytes())
    with pytest.raises(DataError, match=r"index\.arrow is not what was written"):
        Store(ours.folder)


FLIP_EVERY_THIRD = """
import sys, numpy as np
from pathlib import Path
from selffl_ray.datasets.store import Store
from selffl_ray.errors import DataError

folder = Path(sys.argv[1])

def read_all():
    store = Store(folder)
    x, y = store.read(np.arange(16))
    return [*store.client_ids, x.tobytes(), y.tobytes(), store.official().tobytes()]

def outcome(expected):
    try:
        return "the same" if read_all() == expected else "believed"
    except DataError:
        return "refused"

expected = read_all()
for name in ("data.arrow", "index.arrow"):
    path = folder / name
    good = path.read_bytes()
    found = set()
    for at in range(0, len(good), 3):
        changed = bytearray(good)
        changed[at] ^= 0xFF
        path.unlink()
        path.write_bytes(changed)
        found.add(outcome(expected))
    path.unlink()
    path.write_bytes(good)
    print(name, sorted(found))
"""


def run_alone(script, *arguments):
    """What a script prints; in a process of its own, because Arrow can end the one it is in."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_changed_byte_is_ever_believed_or_ends_the_process(store):
    expected = "data.arrow ['refused', 'the same']\nindex.arrow ['refused']\n"
    assert run_alone(FLIP_EVERY_THIRD, store.folder) == expected


# -- refusals while building ----------------------------------------------------------------------


def test_a_client_that_occurs_twice_is_refused(tmp_path):
    groups = [group("anna", 3), group("bert", 2), group("anna", 4)]
    with pytest.raises(DataError, match="toy: client 'anna' occurs twice; merge its files or"):
        prepare(made(groups), None, None, 0, tmp_path)


def test_counts_that_disagree_are_refused(tmp_path):
    wrong = [group("anna", 3), group("bert", 4)._replace(y=np.zeros(3, np.int64))]
    with pytest.raises(DataError, match="toy: 4 inputs but 3 labels of client 'bert'"):
        prepare(made(wrong), None, None, 0, tmp_path)


def test_a_source_without_examples_is_refused(tmp_path):
    with pytest.raises(DataError, match="toy: no examples in the source"):
        prepare(made([]), None, None, 0, tmp_path)


def test_a_source_for_a_set_that_reads_no_files_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.source: this data set reads no files, got '/x'"):
        prepare(made(CLIENTS), None, "/x", 0, tmp_path)


def test_asking_for_no_rows_is_refused(store):
    with pytest.raises(DataError, match="asked for no rows"):
        store.read(np.asarray([], dtype=np.int64))


# -- memory ---------------------------------------------------------------------------------------

MEASURE = """
import sys, numpy as np
from pathlib import Path
from selffl_ray.datasets.store import Store

def private_bytes():
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return 1024 * int(line.split()[1])

store = Store(Path(sys.argv[1]))
before = private_bytes()
few = store.read(np.asarray([3, 1500, 3]))
middle = private_bytes()
every = store.read(np.arange(store.manifest.num_rows))
print(middle - before, private_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux counts pages")
def test_reading_a_few_rows_costs_no_memory_of_the_size_of_the_store(tmp_path):
    sizes = [1000] * 12
    rng = np.random.default_rng(0)
    groups = (
        Group(f"c{i}", rng.integers(256, size=(n, 4096)).astype(np.uint8), np.zeros(n, np.int64))
        for i, n in enumerate(sizes)
    )
    store = prepare(made(groups), None, None, 0, tmp_path)
    whole = sum(sizes) * 4096
    few, every = (int(number) for number in run_alone(MEASURE, store.folder).split())
    assert few < 0.1 * whole
    assert every > 0.9 * whole


def test_a_host_and_the_dealing_touch_no_other_client(tmp_path):
    """What they do not read may be broken, and is refused only when somebody asks for it."""
    sizes = [int(n) for n in np.random.default_rng(0).integers(3, 9, size=12)]
    parts = [np.arange(n, dtype=np.uint8) % 2 for n in sizes]  # TRAIN and TEST in turn
    groups = [
        group(f"c{k}", n, official=part, seed=k)
        for k, (n, part) in enumerate(zip(sizes, parts, strict=True))
    ]
    dataset = made(groups)
    store = prepare(dataset, None, None, 0, tmp_path)
    own = [2, 7]
    path = store.folder / "data.arrow"
    for k, other in enumerate(groups):
        if k not in own:
            flip(path, path.read_bytes().index(other.x.tobytes()))
    store = Store(store.folder)

    hands = natural(NaturalConfig(), dataset, store, 0)
    np.testing.assert_array_equal(store.official(), np.concatenate(parts))
    for k in own:
        found = store.read(hands[k].rows)
        np.testing.assert_array_equal(found.x, groups[k].x[parts[k] == TRAIN])
        np.testing.assert_array_equal(found.y, groups[k].y[parts[k] == TRAIN])
    for k in set(range(12)) - set(own):
        with pytest.raises(DataError, match=f"'c{k}'"):
            store.read(hands[k].test_rows)


HOST = """
import sys, numpy as np, pandas, torch  # pandas: Arrow imports it on first use
from pathlib import Path
from selffl_ray.client_data import ClientData
from selffl_ray.datasets.base import Dataset, Group, no_files
from selffl_ray.datasets.partition import NaturalConfig, natural
from selffl_ray.datasets.splits import split_clients
from selffl_ray.datasets.store import prepare
from selffl_ray.messages import DataSpec
from selffl_ray.registry import Component, datasets, register_dataset
from selffl_ray.tasks import DataShape
from selffl_ray.training import TrainingConfig

datasets.names()  # imports them, as any run has before it reads data

def pictures(files, seed):
    rng = np.random.default_rng(0)
    for k in range(1000):
        yield Group(f"c{k}", rng.random((20, 784), np.float32), np.zeros(20, np.int64))

@register_dataset("pictures", TrainingConfig)
def make(config):
    return Dataset(name="pictures", title="Pictures", licence="none", natural=True,
                   shape=DataShape((784,), 10), find=no_files, read=pictures)

def held():
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return 1024 * int(line.split()[1])

root, dataset, options = Path(sys.argv[1]), make(None), TrainingConfig()
sizes = [held()]
store = prepare(dataset, options, None, 0, root)
sizes.append(held())
hands = natural(NaturalConfig(), dataset, store, 0)
clients = split_clients(hands, (0.6, 0.2, 0.2), 0.0, 0).clients
sizes.append(held())
spec = DataSpec(Component("pictures", options), None, 0, str(root), store.manifest.digest)
ClientData(spec, {0: clients[0]}, torch.device("cpu"))  # libraries take memory on first use
sizes.append(held())
data = ClientData(spec, {k: clients[k] for k in range(0, 1000, 5)}, torch.device("cpu"))
sizes.append(held())
print(*np.diff(sizes), data.num_bytes, store.manifest.num_rows * 784 * 4)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux counts pages")
def test_writing_and_dealing_take_no_memory_for_examples_and_a_host_its_own_clients(tmp_path):
    wrote, dealt, _, host, own, whole = (int(n) for n in run_alone(HOST, tmp_path).split())
    assert own == pytest.approx(0.2 * whole, rel=0.01)
    assert wrote < 0.3 * whole
    assert dealt < 0.1 * whole
    assert 0.9 * own < host < 1.2 * own


@pytest.mark.parametrize(("number", "shown"), [(2, "each"), (12, "each"), (13, "together")])
def test_the_manifest_names_few_files_and_counts_many(tmp_path, number, shown):
    files = tuple(tmp_path / "set" / str(k) / "clip" for k in range(number))
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_bytes(b"")
    store = prepare(made(CLIENTS, find=lambda s: files), None, "set", 0, tmp_path / "stores")
    together = f"{tmp_path / 'set'} ({number} files)"
    each = ", ".join(map(str, files))
    assert store.manifest.source == {"each": each, "together": together}[shown]
