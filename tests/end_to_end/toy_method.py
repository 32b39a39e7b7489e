"""A newcomer's method: FedAvg whose local models are pulled to the global one (FedProx)."""

from dataclasses import dataclass, replace

from selffl_ray.algorithms.base import Empty, Local
from selffl_ray.algorithms.fedavg import FedAvgConfig, Upload, fedavg
from selffl_ray.registry import register_algorithm
from selffl_ray.training import local_sgd


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    pull: float = 0.1


@register_algorithm("toy", ToyConfig)
def toy(config, federation):
    """FedAvg with a pull towards the global model."""

    def local_update(shared, per_client, state, stack):
        pull = lambda theta_AP, active: config.pull * (theta_AP - shared.params_P)  # noqa: E731
        done = local_sgd(stack, start=shared.params_P, extra_grad=pull)
        return Local(state, Upload(done.params_CP), Empty(), done.loss_C, done.num_steps_C)

    return replace(fedavg(FedAvgConfig(), federation), local_update=local_update)
