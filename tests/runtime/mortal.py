"""A plugin: Ditto whose server kills its own process as chosen rounds begin, once each."""

import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path

from selffl_ray.algorithms.ditto import DittoConfig, ditto
from selffl_ray.registry import register_algorithm


@dataclass(frozen=True, kw_only=True)
class MortalConfig(DittoConfig):
    """Ditto's options, and when the process ends: a round twice is two deaths in it."""

    dies: tuple[int, ...] = ()
    marks: str = ""
    """Folder where each death leaves a file, so that it is not repeated; "" is every time."""


@register_algorithm("mortal", MortalConfig)
def mortal(config, federation):
    """Ditto with a server that dies."""
    honest = ditto(config, federation)

    def broadcast(server, plan):
        deaths = config.dies.count(plan.round_index)
        if any(_for_the_first_time(config, f"{plan.round_index}-{n}") for n in range(deaths)):
            os.kill(os.getpid(), signal.SIGKILL)
        return honest.broadcast(server, plan)

    return replace(honest, broadcast=broadcast)


def _for_the_first_time(config, death):
    if not config.marks:
        return True
    mark = Path(config.marks) / death
    if mark.exists():
        return False
    mark.touch()
    return True
