"""Self-FL: two uncertainties set each client's start, rate, steps, and its weight at the server.

Reference: Chen, Ding, Tramel, Wu, Sahu, Avestimehr, Zhang, "Self-Aware Personalized Federated
Learning" (NeurIPS 2022), and the Amazon Science article on it. The hierarchical model, the two
uncertainties and the three local factors are theirs; the publication's full text was not at hand.
The preset ``as_described`` is our most literal reading. ``two_tap`` (the default),
``interpolated`` and ``exact`` are this project's own realisations; none of their results are the
published ones.

Equations: ``selffl_ray.hierarchy`` (1) to (12). Round: a client starts from the mean of the others'
uploads (or the global model), uploads the model after the training steps (or its personalized one),
and on a probe also its mean gradient at the global model and the variance of it. The server turns
these into both variances, from them weights, and takes the weighted sum of the last uploads of all
clients ever seen. Predictions come from a readout: shrunk towards the start by B (or lambda).

Options: see ``SelfFLConfig``. Usual ranges: contraction .01 to .1, kappa .5 to 2, readout_rate 1/10
to 1/3, readout_steps 50 to 200, beta 0 to .9, discount 0 to 1.

Metrics: ``uncertainty/inter_var`` and ``uncertainty/intra_var_mean`` (raw, on the estimator's
scale), ``uncertainty/shrinkage_mean``, ``uncertainty/num_local_steps_mean`` (of the early stop or
readout), means over the clients seen. Alarms, 1 if raised and 0 if not, each said once a run as a
warning with its remedy: ``uncertainty/alarm_floor`` (an estimate cut off at 0),
``uncertainty/alarm_ratio`` (variances too unequal to be of use) and
``uncertainty/alarm_no_information`` (the intra-client estimator does not tell who is uncertain);
rules and bounds in ``alarms.py``. They are absent in rounds without a probe and in warm-up rounds,
whose estimates nobody uses.
"""

from __future__ import annotations

from functools import partial

from selffl_ray.algorithms.base import Algorithm, Federation, Gather, Mean, Total, use_global_params
from selffl_ray.algorithms.selffl import client, server
from selffl_ray.algorithms.selffl.config import CHANGEABLE, PRESETS, SelfFLConfig, idle
from selffl_ray.algorithms.selffl.context import build_context
from selffl_ray.registry import register_algorithm

__all__ = ["SelfFLConfig", "selffl"]


@register_algorithm("selffl", SelfFLConfig, presets=PRESETS, idle=idle, changeable=CHANGEABLE)
def selffl(config: SelfFLConfig, federation: Federation) -> Algorithm:
    """Self-FL (NeurIPS 2022): personalization and weights from two uncertainties."""
    context = build_context(config, federation)
    groups = context.groups if context.groups.num_groups > 1 else None
    predicts_globally = config.personalization == "none"
    return Algorithm(
        init=partial(server.init, context),
        broadcast=partial(server.broadcast, context),
        local_update=partial(client.local_update, context),
        reductions=(
            Gather(client.probe_vector)
            if context.inter.needs_rows
            else Mean(client.probe_vector, by="uniform"),
            Total(client.last_upload, partial(server.weigh, context), of="state", groups=groups),
            Total(client.last_upload, server.weigh_others, of="state", groups=groups),
        ),
        aggregate=partial(server.aggregate, context),
        init_client=partial(client.init_client, context),
        personalize=use_global_params
        if predicts_globally
        else partial(client.personalize, context),
        adapt=None if context.keeps_personal else client.keep_state,
        traffic=partial(server.traffic, context),
        cautions=_cautions(config, federation),
    )


def _cautions(config: SelfFLConfig, federation: Federation) -> tuple[str, ...]:
    if config.aggregation == "deshrunk" and federation.training.trouble.late == "partial":
        return (
            "aggregation deshrunk undoes the early stop that was planned; of clients that hand in "
            "partial work (training.trouble.late) it undoes too little",
        )
    return ()
