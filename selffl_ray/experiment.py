"""From a configuration to a run: what must be known before anything starts, and the run itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from selffl_ray.algorithms.base import Algorithm, Federation
from selffl_ray.config import ExperimentConfig
from selffl_ray.datasets.base import Dataset, KnownVariances
from selffl_ray.datasets.splits import ClientRows, Partition, split_clients
from selffl_ray.datasets.store import Store, prepare, store_root
from selffl_ray.driver import EvaluationPlan
from selffl_ray.errors import ConfigError, DataError, is_lack_of_memory
from selffl_ray.evaluation import CHUNK, metric_names
from selffl_ray.flat import ParamSpec
from selffl_ray.messages import DataSpec, RunSpec, Split
from selffl_ray.models.base import Model
from selffl_ray.models.build import build_model, start_params
from selffl_ray.participation import RoundPlan, plan_rounds, trouble_cautions
from selffl_ray.registry import algorithms, datasets, partitioners
from selffl_ray.seeding import generator
from selffl_ray.stacking import stack_on_cpu, stack_on_gpu
from selffl_ray.whole import write_whole

LONGEST_CAUSE = 200
"""Characters of a library's message that ours repeats."""


@dataclass(frozen=True)
class Prepared:
    """Everything that follows from a configuration before a client is started."""

    config: ExperimentConfig
    dataset: Dataset
    store: Store
    partition: Partition
    model: Model
    federation: Federation
    algorithm: Algorithm
    plans: Sequence[RoundPlan]
    evaluation: EvaluationPlan
    data_spec: DataSpec
    run_spec: RunSpec

    @property
    def clients(self) -> tuple[ClientRows, ...]:
        """All clients in index order: those that take part, then the new ones."""
        return (*self.partition.clients, *self.partition.new_clients)

    @property
    def client_ids(self) -> list[str]:
        """Their names."""
        return [c.client_id for c in self.clients]

    @property
    def cautions(self) -> tuple[str, ...]:
        """What is void or dear about the run, a sentence each."""
        method, name = self.algorithm.cautions, self.config.method.name
        trouble = trouble_cautions(self.config.training, self.plans)
        return (*(f"method {name}: {text}" for text in method), *trouble)

    @property
    def work(self) -> list[float]:
        """Predicted work of each client a round, in padded examples."""
        training = self.config.training
        sizes = [len(c.train) for c in self.clients]
        return [float(training.steps(n) * training.batch_length(n)) for n in sizes]


@contextlib.contextmanager
def enough_memory() -> Iterator[None]:
    """Sizes that no machine like this one can hold are a mistake in the configuration.

    Raises:
        ConfigError: instead of what NumPy and torch say then.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        found = " ".join(str(error).split()) or "out of memory"
        raise ConfigError(
            f"data, model or training.batch_size: too large for the memory of this machine "
            f"({found[:LONGEST_CAUSE]}); lower them"
        ) from error


@enough_memory()
def prepare_experiment(config: ExperimentConfig) -> Prepared:
    """Read or build the data store, deal and split the clients, build model and algorithm.

    Raises:
        UsageError: anything about the configuration or the data that cannot work.
    """
    dataset: Dataset = datasets.make(config.data.component)
    options = datasets.options(config.data.component)
    root = store_root()
    store = prepare(dataset, options, config.data.source, config.seed, root)
    partition = _deal(config, dataset, store)
    model = build_model(config.model, dataset.shape)
    federation = _federation(config, dataset, store, partition, model)
    start = start_params(model, config.seed)
    if config.training.start_from is not None:
        start = read_params(Path(config.training.start_from), model.spec).numpy()
    return Prepared(
        config=config,
        dataset=dataset,
        store=store,
        partition=partition,
        model=model,
        federation=federation,
        algorithm=algorithms.make(config.method, federation),
        plans=plan_rounds(config.seed, config.training, federation.examples_of),
        evaluation=_evaluation_plan(config, federation, partition, dataset.task.score_name),
        data_spec=DataSpec(
            config.data.component,
            config.data.source,
            config.seed,
            str(root),
            store.manifest.digest,
        ),
        run_spec=RunSpec(
            config.method,
            config.model,
            config.training,
            federation,
            config.seed,
            start,
            stack_on_cpu(model)
            if config.placement.stack_size == "auto"
            else config.placement.stack_size,
        ),
    )


def _deal(config: ExperimentConfig, dataset: Dataset, store: Store) -> Partition:
    """Deal the store's rows to clients and split them."""
    chosen, evaluation = config.data.partition, config.evaluation
    hands = partitioners.make(chosen, dataset, store, config.seed)
    assert evaluation.splits is not None, "load_config resolves it"
    shares, new_share = evaluation.splits, evaluation.new_clients
    return split_clients(hands, shares, new_share, config.seed, dataset.overlap)


def _federation(
    config: ExperimentConfig, dataset: Dataset, store: Store, partition: Partition, model: Model
) -> Federation:
    return Federation(
        client_ids=tuple(c.client_id for c in partition.clients),
        num_examples_M=np.asarray([len(c.train) for c in partition.clients], np.int64),
        num_examples_new=np.asarray([len(c.train) for c in partition.new_clients], np.int64),
        spec=model.spec,
        training=config.training,
        num_outputs=dataset.shape.num_outputs,
        known=_known_for(dataset, store, partition),
    )


def _known_for(dataset: Dataset, store: Store, partition: Partition) -> KnownVariances | None:
    """True variances of the clients that take part, in their order."""
    if dataset.known is None:
        return None
    known = dataset.known()
    by_id = dict(zip(store.client_ids, known.intra_var_M.tolist(), strict=True))
    return KnownVariances(
        known.inter_var, np.asarray([by_id[c.client_id] for c in partition.clients])
    )


def _evaluation_plan(
    config: ExperimentConfig, federation: Federation, partition: Partition, score_name: str
) -> EvaluationPlan:
    splits = config.evaluation.splits
    assert splits is not None
    index = np.arange(federation.num_clients)
    new = np.arange(federation.num_clients, federation.num_all)
    most = config.evaluation.max_clients
    if most is not None and most < len(index):
        rng = generator(config.seed, "evaluation")
        index = np.sort(rng.choice(len(index), size=most, replace=False))
    open_splits: tuple[Split, ...] = ("val", "test") if config.evaluation.score_test else ("val",)
    wanted = tuple(
        split for split in open_splits if any(len(getattr(c, split)) for c in partition.clients)
    )
    if not wanted:
        raise ConfigError(
            f"evaluation.splits {list(splits)} have no validation examples, and with "
            "evaluation.score_test: false (as in a sweep that selects) nothing is left to "
            "evaluate; give validation a share"
        )
    if not config.evaluation.score_test:
        new = new[:0]
    stop, known = config.training.stop, metric_names(score_name)
    if (stop.target, stop.patience) != (None, None) and stop.metric[len("val/") :] not in known:
        raise ConfigError(
            f"training.stop.metric: {stop.metric} is not measured on this data; there are "
            f"{', '.join(f'val/{k}' for k in known)}"
        )
    rounds = config.evaluation.rounds(config.training.num_rounds)
    return EvaluationPlan(rounds, index.astype(np.int64), new.astype(np.int64), wanted)


def fit_stacks(prepared: Prepared, memory_bytes: Sequence[int]) -> Prepared:
    """The same with stacks that fit GPUs, if all client actors have one and the size is left open.

    Args:
        memory_bytes: device memory of each client actor; 0 of one that trains on a processor.
    """
    open_ = prepared.config.placement.stack_size == "auto"
    if not open_ or min(memory_bytes, default=0) == 0:
        return prepared
    training = prepared.config.training
    batch = max(training.batch_length(len(c.train)) for c in prepared.clients)
    # Evaluation takes a stack's clients together too, in batches of its own length.
    most = max(len(rows) for c in prepared.clients for rows in (c.train, c.val, c.test))
    length = max(batch, min(CHUNK, 1 << (most - 1).bit_length()))
    size = stack_on_gpu(prepared.model, prepared.dataset.task, length, min(memory_bytes))
    return replace(prepared, run_spec=replace(prepared.run_spec, stack_size=size))


def read_params(path: Path, spec: ParamSpec) -> torch.Tensor:
    """A flat vector from a safetensors file with the model's parameter names.

    Raises:
        DataError: missing file, missing or extra names, another shape.
    """
    try:
        named = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"training.start_from: {path} is not a readable safetensors file: {error}"
        ) from error
    if extra := sorted(set(named) - set(spec.names)):
        raise DataError(
            f"training.start_from: {path} has {', '.join(extra)}, which the model has not; it has "
            f"{', '.join(spec.names)}"
        )
    for name, shape in zip(spec.names, spec.shapes, strict=True):
        found = tuple(named[name].shape) if name in named else None
        if found != shape:
            raise DataError(
                f"training.start_from: {path} has {name} of shape {found}, the model needs {shape}"
            )
    return spec.flatten([named[name] for name in spec.names])


def write_params(path: Path, theta_P: torch.Tensor, spec: ParamSpec) -> None:
    """A model's parameters by name as safetensors, written whole."""
    named = {k: v.contiguous() for k, v in spec.named(theta_P.cpu()).items()}
    # Not save_file, which has an error of its own for a full disk.
    write_whole(path, lambda draft: draft.write_bytes(save(named)))
