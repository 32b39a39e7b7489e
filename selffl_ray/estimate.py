"""What a run will cost, before it starts: steps, traffic, memory, time."""

from __future__ import annotations

import time

import numpy as np
import torch

from selffl_ray.console import duration, size
from selffl_ray.experiment import Prepared
from selffl_ray.gradients import RowEngine
from selffl_ray.runtime.placement import PlacementPlan
from selffl_ray.tasks import REGRESSION


def estimate_run(prepared: Prepared, plan: PlacementPlan) -> list[str]:
    """Lines for a person. Time is extrapolated from one gradient step tried here."""
    training, federation = prepared.config.training, prepared.federation
    cohorts = [plan_.cohort for plan_ in prepared.plans]
    steps_M = np.asarray([training.steps(int(n)) for n in federation.num_examples_M])
    steps = int(sum(steps_M[cohort].sum() for cohort in cohorts))
    traffic = [prepared.algorithm.traffic(p) for p in prepared.plans]
    width = torch.empty(0, dtype=federation.spec.dtype).element_size()
    sent = sum((t.down + t.up) * width * len(c) for t, c in zip(traffic, cohorts, strict=True))
    # Each actor computes with one thread, and all of them together on the cores that they share.
    cores = max(1, round(sum(a.cpus for a in plan.actors)))
    workers = min(len(plan.actors), cores)
    seconds = steps * _step_seconds(prepared) / workers
    rows = sum(len(c.train) + len(c.val) + len(c.test) for c in prepared.clients)
    data = rows * int(np.prod(prepared.dataset.shape.input_shape)) * 4
    return [
        f"{training.num_rounds} rounds, {steps} local steps in all, model of "
        f"{federation.spec.num_params} parameters, stacks of {prepared.run_spec.stack_size}",
        f"traffic of the method {size(sent)}, data in the hosts {size(data)}",
        f"training about {duration(seconds)} on {workers} cores, besides start-up and evaluation",
    ]


def _step_seconds(prepared: Prepared) -> float:
    """One client's gradient step, the best of three."""
    model, task = prepared.model, prepared.dataset.task
    engine = RowEngine(model, task, torch.device("cpu"))
    size_ = max(len(c.train) for c in prepared.clients)
    length = prepared.config.training.batch_length(size_)
    shape = model.shape
    x = torch.zeros((1, length, *shape.input_shape))
    if shape.num_tokens is not None:
        x = x.long()
    y = torch.zeros((1, length), dtype=torch.int64)
    if task is REGRESSION:
        y = torch.zeros((1, length, 2, 2, shape.num_outputs), dtype=model.spec.dtype)
    theta = torch.from_numpy(prepared.run_spec.start_params)[None]
    weight = torch.full((1, length), 1.0 / length, dtype=model.spec.dtype)
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        engine.loss_and_grad(theta, x, y, weight)
        best = min(best, time.perf_counter() - began)
    return best
