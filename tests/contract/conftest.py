"""Entries of a user's own modules take part: SELFFL_RAY_TEST_PLUGINS=my_module,other."""

from __future__ import annotations

import os
from pathlib import Path

from selffl_ray.registry import load_plugins

if os.environ.get("SELFFL_RAY_TEST_PLUGINS"):
    load_plugins(os.environ["SELFFL_RAY_TEST_PLUGINS"].split(","), str(Path.cwd()))
