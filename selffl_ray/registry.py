"""Names of algorithms, data sets, models and estimators, and what they stand for.

An entry registers itself with a decorator at its definition. The built-in ones are found by
importing every module of their package on first use, so adding one is adding a file. A user's
entries come in by name through ``plugins: [my_module]``.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from selffl_ray.errors import ConfigError, SelfFLError, shown

Factory = TypeVar("Factory", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry:
    """One registered name.

    factory: makes the thing from its config (and what its kind passes along).
    config_type: frozen dataclass of the entry's options.
    presets: preset name -> option values that differ from the dataclass's own defaults.
    idle: (options, training options) -> options that have no effect beside the others, and why.
    changeable: options that may change between two rounds of a run: no state's shape and nothing
        that is decided before the first round depends on them.
    """

    name: str
    factory: Callable[..., Any]
    config_type: type
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    idle: Callable[[Any, Any], Mapping[str, str]] = lambda options, training: {}
    changeable: frozenset[str] = frozenset()

    @property
    def summary(self) -> str:
        """First line of the factory's docstring."""
        return (self.factory.__doc__ or "").strip().partition("\n")[0]


@dataclass(frozen=True)
class Component:
    """A name from a registry and the options of that entry; None stands for its defaults."""

    name: str
    options: Any = None


class Registry:
    """All entries of one kind.

    Args:
        kind: what an entry is, in words for messages, for example ``"model"``.
        key: the configuration key that selects one, for example ``"model.name"``.
        package: the package whose modules hold the built-in entries.
    """

    def __init__(self, kind: str, key: str, package: str) -> None:
        self.kind = kind
        self.key = key
        self._package = package
        self._entries: dict[str, Entry] = {}
        self._discovered = False

    def register(
        self,
        name: str,
        config_type: type,
        presets: Mapping[str, Mapping[str, Any]] | None = None,
        idle: Callable[[Any, Any], Mapping[str, str]] = lambda options, training: {},
        changeable: Iterable[str] = (),
    ) -> Callable[[Factory], Factory]:
        """Decorator for a factory; the same name twice is refused, naming both places."""

        def decorate(factory: Factory) -> Factory:
            known = self._entries.get(name)
            # A module that is imported again may bring its own entry again.
            if known is not None and _place(known.factory) != _place(factory):
                raise ConfigError(
                    f"{self.kind} {name!r} is registered by both {_place(known.factory)} and "
                    f"{_place(factory)}; rename one"
                )
            self._entries[name] = Entry(
                name, factory, config_type, presets or {}, idle, frozenset(changeable)
            )
            return factory

        return decorate

    def names(self) -> list[str]:
        """All names, sorted."""
        self._discover()
        return sorted(self._entries)

    def get(self, name: str) -> Entry:
        """The entry of that name.

        Raises:
            ConfigError: unknown, with the nearest name and the list.
        """
        self._discover()
        if name in self._entries:
            return self._entries[name]
        raise ConfigError(
            f"{self.key}: unknown {self.kind} {shown(name)}{nearest(name, self._entries)}; "
            f"known: {', '.join(self.names())}"
        )

    def options(self, component: Component) -> Any:
        """The component's options, the entry's defaults if it has none."""
        return (
            self.get(component.name).config_type()
            if component.options is None
            else (component.options)
        )

    def make(self, component: Component, *args: Any) -> Any:
        """What the entry's factory makes of the options and of further arguments."""
        return self.get(component.name).factory(self.options(component), *args)

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")


def _place(factory: Callable[..., Any]) -> str:
    return f"{factory.__module__}.{factory.__qualname__}"


def nearest(name: str, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"``, or nothing if no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


algorithms = Registry("method", "method.name", "selffl_ray.algorithms")
datasets = Registry("data set", "data.name", "selffl_ray.datasets")
models = Registry("model", "model.name", "selffl_ray.models")
partitioners = Registry("partitioner", "data.partition.name", "selffl_ray.datasets")
intra_estimators = Registry("intra-client estimator", "method.intra", "selffl_ray.estimators.intra")
server_optimizers = Registry("server optimizer", "method.server", "selffl_ray.algorithms.server")
inter_estimators = Registry("inter-client estimator", "method.inter", "selffl_ray.estimators.inter")
availabilities = Registry(
    "availability law", "training.trouble.availability", "selffl_ray.availability"
)

register_algorithm = algorithms.register
register_dataset = datasets.register
register_model = models.register
register_partitioner = partitioners.register
register_intra_estimator = intra_estimators.register
register_inter_estimator = inter_estimators.register
register_server_optimizer = server_optimizers.register
register_availability = availabilities.register


def load_plugins(modules: Iterable[str], folder: str) -> None:
    """Import a user's modules so that their entries are registered.

    Args:
        modules: names as in ``plugins: [my_module]``.
        folder: absolute folder that they may lie in, besides what is installed.

    Raises:
        ConfigError: a module that cannot be found or that fails while it is imported.
    """
    for name in modules:
        if folder not in sys.path:
            sys.path.append(folder)
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = error.name if error.name != name else f"{name!r} in {folder}"
            raise ConfigError(
                f"plugins: cannot import {name!r}: no module {missing}; give the name of a module "
                "that is installed or lies in the folder that the command is run in"
            ) from error
        except SelfFLError:
            raise
        except (Exception, SystemExit) as error:
            raise ConfigError(
                f"plugins: {name!r} failed while it was imported: {type(error).__name__}: {error}"
            ) from error
