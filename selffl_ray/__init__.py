"""Self-FL and other personalized federated learning on Ray.

``load_config`` reads an experiment, ``run_experiment`` and ``run_comparison`` run it; the results
hold the summary, the run's folder and its tables as pandas frames. ``load_sweep`` and ``run_sweep``
do the same for a sweep.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selffl_ray.api import Result, run_comparison, run_experiment
    from selffl_ray.config import ExperimentConfig, load_config
    from selffl_ray.errors import SelfFLError
    from selffl_ray.sweep import load_sweep
    from selffl_ray.sweep_run import run_sweep

__all__ = [
    "ExperimentConfig",
    "Result",
    "SelfFLError",
    "load_config",
    "load_sweep",
    "run_comparison",
    "run_experiment",
    "run_sweep",
]

_HOMES = {
    "ExperimentConfig": "config",
    "Result": "api",
    "SelfFLError": "errors",
    "load_config": "config",
    "load_sweep": "sweep",
    "run_comparison": "api",
    "run_experiment": "api",
    "run_sweep": "sweep_run",
}


def __getattr__(name: str) -> Any:
    """Public names, imported on first use: a client actor needs none of what is above it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from selffl_ray.importing import uncollected

    with uncollected():
        home = import_module(f"selffl_ray.{_HOMES[name]}")
    return getattr(home, name)
