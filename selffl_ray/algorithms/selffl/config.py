"""Options and presets of Self-FL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from selffl_ray.errors import ConfigError
from selffl_ray.flat import Granularity
from selffl_ray.registry import Component, inter_estimators, intra_estimators
from selffl_ray.training import TrainingConfig

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "two_tap": {},
    "interpolated": {
        "personalization": "interpolate",
        "readout_rate": 1 / 3,
        "tail_average": True,
    },
    "exact": {
        "init": "global",
        "aggregation": "uniform",
        "upload": "personal",
        "contraction": 0.1,
        "discount": 1.0,
    },
    "as_described": {
        "intra": "round_window",
        "intra_pooling": "own",
        "inter": "empirical",
        "upload": "personal",
        "contraction": 0.01,
        "rounding": "nearest",
        "warm_up_rounds": 3,
        "probe_every": 1,
        "beta": 0.0,
    },
}
"""What each preset changes of the defaults below, which are those of ``two_tap``."""

CHANGEABLE = (
    "kappa",
    "curvature",
    "contraction",
    "max_contraction",
    "min_steps",
    "max_steps",
    "readout_rate",
    "readout_steps",
    "map_curvature",
    "discount",
    "beta",
    "beta_intra",
)
"""Options that may change between rounds; the variances that were smoothed until then stay."""


@dataclass(frozen=True, kw_only=True)
class SelfFLConfig:
    """Options of ``method: {name: selffl, preset: ...}``.

    The two uncertainties, what is made of them, and the three local factors (initial model,
    learning rate, early stop). A preset fills in what is not given.
    """

    preset: Literal["two_tap", "interpolated", "as_described", "exact"] = "two_tap"

    intra: Annotated[Component, intra_estimators] = Component("gradient_chunks")
    """Estimator of intra-client uncertainty, with its own options."""
    intra_pooling: Literal["pooled", "own"] = "pooled"
    """pooled: a client's variance is the mean of n_k var_k over the probe's participants, divided
    by its own n; own: as estimated. Known variances are never pooled."""
    inter: Annotated[Component, inter_estimators] = Component("moments")
    """Estimator of inter-client uncertainty."""
    granularity: Granularity = "model"
    """Coordinates that share one variance."""
    probe_every: int = 5
    """Rounds between estimates."""
    beta: float = 0.5
    """Memory of the smoothed variances, in [0, 1): 0.5 suits a probe every 5 rounds, 0.9 every
    round."""
    beta_intra: float | None = None
    """Memory of the clients' variances; beta if not given."""
    warm_up_rounds: int = 0
    """First rounds in which no estimate is used."""

    init: Literal["loo", "global"] = "loo"
    """Initial model of a client: the mean without its own part, or the global model."""
    aggregation: Literal["precision", "uniform", "sample_size", "deshrunk"] = "precision"
    """Weights of the uploads; deshrunk: precision weights on uploads with early stopping undone."""
    discount: float = 0.5
    """Factor on an absent client's weight for every round since its last upload, in [0, 1]."""
    upload: Literal["common_tap", "personal"] = "common_tap"
    """What is uploaded: the model after the same steps for all, or the personalized one."""

    personalization: Literal["early_stop", "interpolate", "learning_rate", "map", "none"] = (
        "early_stop"
    )
    """How a shrink factor becomes a personalized model; none predicts with the global model."""
    kappa: float = 1.0
    """Factor on intra-client variances in the shrink factor (not in the weights); 0 is none."""
    curvature: float = 2 / 3
    """Assumed curvature h of the local losses."""
    contraction: float | None = None
    """Share of the way to the local optimum that a step goes, in (0, 1), whatever its rate;
    learning rate times curvature if not given."""
    max_contraction: float = 0.05
    """Largest learning rate times curvature; not applied to a given contraction."""
    rounding: Literal["ceil", "nearest"] = "ceil"
    """ceil: whole steps upwards, with the rate lowered so that they land exactly."""
    min_steps: int = 1
    max_steps: int = 200
    """Bounds of early-stopped steps."""
    readout_rate: float = 0.1
    """Rate of the readout over the training rate; not used with upload: personal."""
    readout_steps: int = 200
    """Steps of interpolated and learning-rate readouts; with upload: personal the round's."""
    tail_average: bool = False
    """Take the mean of the second half of the iterates for the last one."""
    map_curvature: float = 0.3
    """Assumed curvature in the pull of the persistent personal model (personalization: map)."""

    def __post_init__(self) -> None:
        self._check_ranges()
        if self.upload == "personal" and self.personalization in ("map", "none"):
            raise ConfigError(
                f"method.upload: personal needs a personalization that one round can realise, got "
                f"{self.personalization!r}; use early_stop, interpolate or learning_rate, or "
                "upload: common_tap"
            )
        if self.init == "loo" and self.discount == 0:
            raise ConfigError(
                "method.init: loo needs the uploads of absent clients, and method.discount: 0 "
                "drops them; use init: global"
            )

    def _check_ranges(self) -> None:
        rules = (
            ("probe_every", self.probe_every >= 1, ">= 1"),
            ("warm_up_rounds", self.warm_up_rounds >= 0, ">= 0"),
            ("beta", 0 <= self.beta < 1, "in [0, 1)"),
            ("beta_intra", self.beta_intra is None or 0 <= self.beta_intra < 1, "in [0, 1)"),
            ("discount", 0 <= self.discount <= 1, "in [0, 1]"),
            ("kappa", self.kappa >= 0, ">= 0"),
            ("curvature", self.curvature > 0, "> 0"),
            ("contraction", self.contraction is None or 0 < self.contraction < 1, "in (0, 1)"),
            ("max_contraction", 0 < self.max_contraction < 1, "in (0, 1)"),
            ("min_steps", self.min_steps >= 0, ">= 0"),
            ("max_steps", self.max_steps >= max(1, self.min_steps), ">= min_steps and >= 1"),
            ("readout_rate", self.readout_rate > 0, "> 0"),
            ("readout_steps", self.readout_steps >= 1, ">= 1"),
            ("map_curvature", self.map_curvature > 0, "> 0"),
        )
        for name, good, rule in rules:
            if not good:
                raise ConfigError(f"method.{name} must be {rule}, got {getattr(self, name)}")

    def probes(self, round_index: int) -> bool:
        """Whether the uncertainties are estimated in a round."""
        return round_index % self.probe_every == 0

    def assumed_curvature(self, rate: float) -> float:
        """H for steps at a rate, from contraction or from curvature with its cap."""
        if self.contraction is not None:
            return self.contraction / rate
        return min(self.curvature, self.max_contraction / rate)


def idle(config: SelfFLConfig, training: TrainingConfig) -> dict[str, str]:
    """Options that change nothing beside the others, and why; what is not named may act."""
    found: dict[str, str] = {}

    def add(why: str, *names: str) -> None:
        found.update((name, found.get(name, why)) for name in names)

    if training.everybody_trains:
        add("every client takes part in every round", "discount")
    if config.contraction is not None:
        add("contraction is given", "curvature", "max_contraction")
    if config.upload == "personal":
        add("upload: personal trains at the round's rate and steps", "readout_rate")
        add("upload: personal trains the round's steps", "readout_steps")
    realised = f"personalization: {config.personalization}"
    if config.personalization != "early_stop":
        add(f"{realised} does not stop early", "min_steps", "max_steps", "rounding")
    if config.personalization not in ("interpolate", "learning_rate"):
        add(f"{realised} has no fixed number of steps", "readout_steps")
    if config.personalization != "map":
        add(f"{realised} keeps no personal model", "map_curvature")
    if config.personalization in ("map", "none"):
        add(f"{realised} has no readout", "readout_rate")
    if config.personalization == "none":
        add("personalization: none predicts with the global model", "kappa", "tail_average")
    return found
