"""``python -m selffl_ray``: the same as ``selffl``."""

from selffl_ray.cli import entry

entry()
