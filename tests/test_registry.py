"""Names and what they stand for: found by importing, nearest names, no duplicates, plugins."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest

from selffl_ray.errors import ConfigError
from selffl_ray.registry import (
    Component,
    Registry,
    datasets,
    inter_estimators,
    intra_estimators,
    load_plugins,
    models,
    nearest,
    partitioners,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    size: int = 3


@pytest.fixture(autouse=True)
def imports(monkeypatch):
    """Modules, search path and entries as they were."""
    models.names()
    monkeypatch.setattr(models, "_entries", dict(models._entries))
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def toy(name, *modules):
    """A registry over a package of the given (file name, source) modules."""
    return Registry("toy", "toy.name", name)


ENTRY = """
from dataclasses import dataclass
from {package} import toys

@dataclass(frozen=True)
class Config:
    size: int = 2

@toys.register({name!r}, Config, presets={{"big": {{"size": 9}}}})
def make(config, factor):
    '''Makes {name}.

    More words.
    '''
    return ({name!r}, config.size * factor)
"""

INIT = """
from selffl_ray.registry import Registry
toys = Registry("toy", "box.toy", __name__)
"""


def package(folder, name, **modules):
    home = folder / name
    home.mkdir()
    (home / "__init__.py").write_text(INIT)
    for module, source in modules.items():
        (home / f"{module}.py").write_text(source)
    sys.path.insert(0, str(folder))
    return __import__(name).toys


# -- finding --------------------------------------------------------------------------------------


def test_every_module_of_the_package_is_imported_on_first_use(tmp_path):
    toys = package(
        tmp_path,
        "toy_shop",
        kite=ENTRY.format(package="toy_shop", name="kite"),
        ball=ENTRY.format(package="toy_shop", name="ball"),
        helpers="VALUE = 1\n",
    )
    assert "toy_shop.kite" not in sys.modules
    assert toys.names() == ["ball", "kite"]
    entry = toys.get("kite")
    assert entry.summary == "Makes kite."
    assert entry.presets == {"big": {"size": 9}}


def test_the_built_in_entries_are_found():
    assert {"digits", "fashion_mnist", "mnist", "gaussian"} <= set(datasets.names())
    assert {"linear", "mlp", "cnn"} <= set(models.names())
    assert {"natural", "iid", "dirichlet", "shards", "rotation"} <= set(partitioners.names())
    assert {"gradient_chunks", "fisher", "known"} <= set(intra_estimators.names())
    assert {"moments", "reml", "known"} <= set(inter_estimators.names())


def test_a_component_is_made_with_its_options_or_the_entrys_defaults():
    toys = Registry("toy", "box.toy", "selffl_ray.models")

    @toys.register("top", Options)
    def top(config, factor):
        return config.size * factor

    assert toys.make(Component("top"), 10) == 30
    assert toys.make(Component("top", Options(size=5)), 10) == 50
    assert toys.options(Component("top")) == Options()


# -- names ----------------------------------------------------------------------------------------


def test_an_unknown_name_is_answered_with_the_nearest_and_the_list(tmp_path):
    toys = package(
        tmp_path,
        "toy_store",
        kite=ENTRY.format(package="toy_store", name="kite"),
        ball=ENTRY.format(package="toy_store", name="ball"),
    )
    with pytest.raises(ConfigError) as error:
        toys.get("kitte")
    assert str(error.value) == (
        "box.toy: unknown toy 'kitte' (did you mean 'kite'?); known: ball, kite"
    )
    with pytest.raises(ConfigError, match=r"^box\.toy: unknown toy 'zzz'; known: ball, kite$"):
        toys.get("zzz")


def test_nothing_is_suggested_where_nothing_is_near():
    assert nearest("momentun", ["momentum", "batch_size"]) == " (did you mean 'momentum'?)"
    assert nearest("xyz", ["momentum"]) == ""
    assert nearest("anything", []) == ""


# -- duplicates -----------------------------------------------------------------------------------


def test_a_name_that_two_modules_register_is_refused_naming_both(tmp_path):
    toys = package(
        tmp_path,
        "toy_attic",
        first=ENTRY.format(package="toy_attic", name="kite"),
        second=ENTRY.format(package="toy_attic", name="kite"),
    )
    message = r"toy 'kite' .*both toy_attic\.first\.make and toy_attic\.second\.make; rename one"
    with pytest.raises(ConfigError, match=message):
        toys.names()


def test_a_name_that_one_module_gives_to_two_things_is_refused():
    toys = Registry("toy", "box.toy", "selffl_ray.models")

    @toys.register("top", Options)
    def top(config):
        return 1

    with pytest.raises(ConfigError, match=r"both .*<locals>\.top and .*<locals>\.other_top"):

        @toys.register("top", Options)
        def other_top(config):
            return 2

    assert toys.make(Component("top")) == 1


def test_a_module_may_be_imported_again(tmp_path):
    toys = package(tmp_path, "toy_cellar", kite=ENTRY.format(package="toy_cellar", name="kite"))
    assert toys.names() == ["kite"]
    del sys.modules["toy_cellar.kite"]
    __import__("toy_cellar.kite")
    assert toys.make(Component("kite"), 4) == ("kite", 8)


# -- plugins --------------------------------------------------------------------------------------

PLUGIN = """
from dataclasses import dataclass
from selffl_ray.registry import register_model

@dataclass(frozen=True, kw_only=True)
class Config:
    width: int = 4

@register_model("{name}", Config)
def make(config, shape):
    "A model of one's own."
    return config.width
"""


def test_a_plugin_in_the_folder_adds_its_entries(tmp_path):
    (tmp_path / "my_own_models.py").write_text(PLUGIN.format(name="my_model"))
    assert "my_model" not in models.names()
    load_plugins(["my_own_models"], str(tmp_path))
    assert "my_model" in models.names()
    assert models.make(Component("my_model"), None) == 4
    load_plugins(["my_own_models"], str(tmp_path))  # a host of the same process asks again
    assert sys.path.count(str(tmp_path)) == 1


def test_a_plugin_that_takes_a_built_in_name_is_refused(tmp_path):
    (tmp_path / "greedy_models.py").write_text(PLUGIN.format(name="mlp"))
    message = r"model 'mlp' .*both selffl_ray\.models\.mlp\.mlp and greedy_models\.make; rename"
    with pytest.raises(ConfigError, match=message):
        load_plugins(["greedy_models"], str(tmp_path))


def test_a_missing_plugin_is_named_with_its_folder(tmp_path):
    with pytest.raises(ConfigError) as error:
        load_plugins(["no_such_plugin"], str(tmp_path))
    assert str(error.value).startswith(
        f"plugins: cannot import 'no_such_plugin': no module 'no_such_plugin' in {tmp_path};"
    )


def test_a_plugin_whose_own_import_is_missing_names_that_one(tmp_path):
    (tmp_path / "needs_more.py").write_text("import not_installed_anywhere\n")
    message = "cannot import 'needs_more': no module not_installed_anywhere"
    with pytest.raises(ConfigError, match=message):
        load_plugins(["needs_more"], str(tmp_path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def broken(:\n", "'broken_plugin' failed while it was imported: SyntaxError: "),
        ("1 / 0\n", "failed while it was imported: ZeroDivisionError: division by zero"),
        ("from math import nothing\n", "failed while it was imported: ImportError: cannot import"),
    ],
)
def test_a_plugin_that_fails_while_it_is_imported_says_why(tmp_path, source, message):
    (tmp_path / "broken_plugin.py").write_text(source)
    with pytest.raises(ConfigError, match=message):
        load_plugins(["broken_plugin"], str(tmp_path))
