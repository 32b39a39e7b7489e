"""What a data set holds and how unequal its clients are: numbers and one picture."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from selffl_ray.console import text_table
from selffl_ray.experiment import Prepared

MOST_NAMED = 20
"""Names of more labels than that would overlap in the picture."""


class Description(NamedTuple):
    """Clients by labels, and lines for a person.

    counts_MK: examples of each client and class, empty for regression; sizes_M: of each client;
    label_names: of the K classes.
    """

    sizes_M: npt.NDArray[np.int64]
    counts_MK: npt.NDArray[np.int64]
    label_names: tuple[str, ...]
    lines: list[str]


def describe(prepared: Prepared) -> Description:
    """Numbers of clients, examples and labels, label and size skew under the partition."""
    dataset, manifest = prepared.dataset, prepared.store.manifest
    clients = prepared.clients
    own = [np.concatenate([c.train, c.val, c.test]) for c in clients]
    sizes = np.asarray([len(rows) for rows in own])
    train = np.asarray([len(c.train) for c in clients])
    lines = [
        f"{dataset.name}: {manifest.title}",
        f"licence   {manifest.licence}",
        f"source    {manifest.source or 'comes with a library, or is generated'}",
        f"store     {prepared.store.folder} (data digest {manifest.digest[:16]})",
        f"examples  {manifest.num_rows} of shape {manifest.x_shape}",
        f"partition {prepared.config.data.partition.name}: {len(clients)} clients "
        f"(digest {prepared.partition.digest[:16]}), {len(prepared.partition.new_clients)} of them "
        "held out as new",
        f"a client  min {sizes.min()}, median {np.median(sizes):g}, max {sizes.max()} examples; "
        f"for training min {train.min()}, median {np.median(train):g}, max {train.max()}",
        f"size skew {_gini(sizes):.2f} (Gini: 0 equal, near 1 one client has all)",
    ]
    counts = np.empty((len(clients), 0), np.int64)
    names: tuple[str, ...] = ()
    if dataset.task.score_name == "accuracy":
        labels = prepared.store.labels()
        classes = dataset.shape.num_outputs
        counts = np.stack([np.bincount(labels[rows], minlength=classes) for rows in own])
        names = dataset.label_names or tuple(str(k) for k in range(classes))
        lines += _label_lines(counts, names)
    return Description(sizes, counts, names, lines)


def _label_lines(counts: npt.NDArray[np.int64], names: tuple[str, ...]) -> list[str]:
    total = counts.sum(axis=0)
    share = counts / counts.sum(axis=1, keepdims=True)
    distance = 0.5 * np.abs(share - total / total.sum()).sum(axis=1)
    rows = [
        [str(name), str(n), f"{100 * n / total.sum():.1f} %", str(int((counts[:, k] > 0).sum()))]
        for k, (name, n) in enumerate(zip(names, total, strict=True))
    ]
    return [
        f"label skew {distance.mean():.2f} (mean distance of a client's label shares from the "
        "whole's: 0 equal, near 1 disjoint)",
        "",
        text_table(["label", "examples", "share", "clients with it"], rows),
    ]


def _gini(sizes: npt.NDArray[np.int64]) -> float:
    ordered = np.sort(sizes).astype(np.float64)
    count = len(ordered)
    ranks = np.arange(1, count + 1)
    return float((2 * ranks - count - 1) @ ordered / (count * ordered.sum()))


def draw(description: Description, title: str, path: Path) -> None:
    """Sizes of the clients, and label shares as a heat map, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with_labels = description.counts_MK.shape[1] > 0
    columns = 2 if with_labels else 1
    figure, axes = pyplot.subplots(1, columns, figsize=(5.5 * columns, 4), squeeze=False)
    sizes = description.sizes_M
    axes[0, 0].bar(np.arange(len(sizes)), sizes, color="#4477aa")
    axes[0, 0].set(xlabel="client", ylabel="examples", title="Examples of each client")
    axes[0, 0].xaxis.get_major_locator().set_params(integer=True)
    if with_labels:
        counts = description.counts_MK
        share = counts / counts.sum(axis=1, keepdims=True)
        image = axes[0, 1].imshow(
            share.T, aspect="auto", origin="lower", cmap="viridis", vmin=0, interpolation="nearest"
        )
        axes[0, 1].set(xlabel="client", ylabel="label", title="Share of each label")
        axes[0, 1].xaxis.get_major_locator().set_params(integer=True)
        if counts.shape[1] <= MOST_NAMED:
            axes[0, 1].set_yticks(np.arange(counts.shape[1]), description.label_names)
        figure.colorbar(image, ax=axes[0, 1])
    figure.suptitle(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
