"""A plugin: a storm whose server kills its own process as a chosen round begins.

Importing it has the tables written with checkpoints and at the end only.
"""

import math
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path

from selffl_ray import tables
from selffl_ray.registry import register_algorithm
from tests.runtime.storming import StormConfig, storm

tables.FLUSH_SECONDS = math.inf


@dataclass(frozen=True, kw_only=True)
class DoomedConfig(StormConfig):
    """A storm's options, and the round in which the server's process ends, the first time."""

    dies: int = -1


@register_algorithm("doomed", DoomedConfig)
def doomed(config, federation):
    """A storm that takes its server along."""
    stormy = storm(config, federation)

    def broadcast(server, plan):
        mark = Path(config.notes) / "dead"
        if plan.round_index == config.dies and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return stormy.broadcast(server, plan)

    return replace(stormy, broadcast=broadcast)
