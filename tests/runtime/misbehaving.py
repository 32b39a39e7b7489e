"""A plugin: FedAvg whose clients of chosen names do not do what they should."""

import os
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from selffl_ray.algorithms.base import Personal
from selffl_ray.algorithms.fedavg import FedAvgConfig, fedavg
from selffl_ray.registry import register_algorithm
from selffl_ray.trees import map_tree

TARDY_S = 0.1
"""Seconds more for each client of a slow process."""


@dataclass(frozen=True, kw_only=True)
class MisbehavingConfig:
    """Clients that raise, diverge, end their process, or fail when they are evaluated.

    tardy: a folder; the process that trains first takes longer for every client from then on.
    """

    raising: tuple[str, ...] = ()
    diverging: tuple[str, ...] = ()
    dying: tuple[str, ...] = ()
    mute: tuple[str, ...] = ()
    from_round: int = 0
    tardy: str = ""


@register_algorithm("misbehaving", MisbehavingConfig)
def misbehaving(config, federation):
    """FedAvg with clients that fail."""
    honest = fedavg(FedAvgConfig(), federation)

    def local_update(shared, per_client, state, stack):
        if config.tardy and is_tardy(Path(config.tardy)):
            time.sleep(TARDY_S * stack.num_clients)
        if stack.round_index >= config.from_round:
            if set(config.dying) & set(stack.client_ids):
                os._exit(3)
            if set(config.raising) & set(stack.client_ids):
                raise ValueError("the dog ate the gradient")
        local = honest.local_update(shared, per_client, state, stack)
        bad_C = torch.tensor([i in config.diverging for i in stack.client_ids])
        if stack.round_index < config.from_round:
            return local
        spoil = lambda rows: torch.where(bad_C[:, None], torch.nan, rows)  # noqa: E731
        return local._replace(payload=map_tree(spoil, local.payload))

    def personalize(shared, per_client, state, stack):
        if set(config.mute) & set(stack.client_ids):
            raise ValueError("no comment")
        rows = shared.params_P.expand(stack.num_clients, -1)
        return Personal(rows, torch.zeros(stack.num_clients, dtype=torch.int64))

    changed = replace(honest, local_update=local_update)
    return replace(changed, personalize=personalize) if config.mute else changed


def is_tardy(folder):
    """Whether this process is the one that was here first."""
    with suppress(FileExistsError):
        (folder / "tardy").symlink_to(str(os.getpid()))
    return (folder / "tardy").readlink() == Path(str(os.getpid()))
