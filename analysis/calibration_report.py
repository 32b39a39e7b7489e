"""The calibration in words: every number in them is read from the figures."""

from __future__ import annotations

from types import ModuleType

import pandas as pd

from analysis import calibration_base as base
from analysis import calibration_collapse as collapse
from analysis import calibration_inter as inter
from analysis import calibration_intra as intra
from analysis import calibration_regression as regression
from analysis import calibration_tables as tables

INTRODUCTION = f"""\
Every estimator of the package against variances that are known. **Bias** and **RMSE** are of the
estimate. **Coverage** is the share of the clients' true parameters inside the nominal 90 %
posterior interval, with the estimates plugged in. **Risk** is the mean squared error of the
posterior mean over that of the Bayes rule, which knows the variances, on the same draws (1: nothing
lost). ± is one Monte Carlo standard error.

The column *specification* has the figures of the project's method specification, sections 5.1 to
5.3. *within*: the difference is at most the tolerance plus {tables.STANDARD_ERRORS} standard
errors. The tolerances (15 % of an RMSE or a ratio, 10 % of a bias or 0.05, 15 % of a risk's excess
over 1 or 0.012, 0.001 of a fixed point) allow for the Monte Carlo error of the specification's own
figures, which it does not tell. All figures, with tolerances: the CSV file of the same name.
"""
REFERENCES = (
    f"`{inter.EQUAL}` knows the variance between clients but takes all intra variances for their "
    f"mean; `{inter.BAYES}` is the Bayes rule."
)
BATCHES = (
    "Batches are drawn with replacement, as the theory of 5.1 assumes, and in a second block by "
    "epochs, the package's default, for the estimators that look at training. The last column is "
    "what `moments` makes of the estimator's vectors and variances, over the true inter_var."
)
POOLED = "*pooled* is the package's default: mean over clients of n times the variance, over n."


def text(found: pd.DataFrame, command: str, picture: str) -> str:
    """The whole Markdown file."""
    sections = [
        f"Command: `{command}`",
        "# Calibration of the uncertainty estimators",
        INTRODUCTION.strip(),
        _agreement(found),
        f"![Calibration]({picture})",
        "## What the figures show",
        "\n".join(f"- {line}" for line in (*_inter_findings(found), *_intra_findings(found))),
        "## Between clients",
        _setting(inter),
        REFERENCES,
        "### Beside the specification",
        tables.specification_table(found, "inter"),
        "### All settings",
        tables.inter_tables(found),
        "## Within a client, in Self-FL",
        _setting(intra),
        "### Ratio to the truth, and slope against log 1 / n (1 is right, 0 is flat)",
        tables.ratio_table(found),
        BATCHES,
        "### Coverage and risk with `moments`",
        tables.intra_posterior_table(found),
        POOLED,
        "## Within a client, in linear regression",
        _setting(regression),
        "Mean of the estimate over the true variance:",
        tables.regression_table(found),
        "## Collapse under shrinkage",
        _setting(collapse),
        tables.collapse_table(found),
        "`empirical` inside Self-FL, with the true intra variances beside shrunk uploads:",
        tables.system_table(found),
    ]
    return "\n\n".join(sections) + "\n"


def _setting(part: ModuleType) -> str:
    """The module's own description, without its first line and its legend."""
    description = (part.__doc__ or "").strip().partition("\n\n")[2]
    return description.partition("\n\nShape letters")[0].replace("``", "`")


def _agreement(found: pd.DataFrame) -> str:
    compared = found[found["specification"].notna()]
    good = sum(tables.within(row) for _, row in compared.iterrows())
    return f"{good} of {len(compared)} figures of the specification are within."


def _inter_findings(found: pd.DataFrame) -> list[str]:
    known = inter.Setting(inter_var=0).variant

    def at(name: str, quantity: str, inter_var: float, clients: int = 20) -> pd.Series:
        return tables.one(
            found,
            part="inter",
            estimator=name,
            quantity=quantity,
            inter_var=inter_var,
            num_clients=clients,
            variant=known,
        )

    biases = ", ".join(tables.number(at("empirical", "bias", v), 2) for v in inter.AT)
    others = [n for n in base.INTER if n not in ("empirical", "ml")]
    largest = max(abs(at(n, "bias", v)["value"]) for n in others for v in inter.AT)
    costs = ", ".join(
        f"{n} {at(n, 'risk', 0.03)['value']:.2f}" for n in base.INTER if n != "empirical"
    )
    lows = {n: at(n, "coverage", 0.1)["value"] for n in base.INTER}
    listed = ", ".join(f"{n} {100 * share:.0f} %" for n, share in lows.items())
    return [
        f"`empirical` is too large by the mean intra variance, 1: its bias is {biases} at "
        f"inter_var {', '.join(f'{v:g}' for v in inter.AT)}. The bias of {', '.join(others)} is at "
        f"most {largest:.2f} in size there. `ml` is low with few clients: "
        f"{tables.number(at('ml', 'bias', 4.0, 5), 2)} of 4 with five, "
        f"{tables.number(at('ml', 'bias', 4.0), 2)} with twenty.",
        f"Plugging `empirical` in costs {at('empirical', 'risk', 0.03)['value']:.2f} times the "
        f"Bayes error at inter_var 0.03 and {at('empirical', 'risk', 3.0)['value']:.3f} times at 3;"
        f" the others at 0.03: {costs}.",
        f"Coverage of the 90 % interval at inter_var 0.1: {listed}. The interval knows "
        "nothing of the estimate's own error; `empirical` makes it too wide.",
    ]


def _intra_findings(found: pd.DataFrame) -> list[str]:
    own = found[found["part"] == "intra"]

    def slope(name: str) -> str:
        row = tables.one(own, estimator=name, variant="replacement, own", quantity="slope")
        return f"{name} {tables.number(row, 2)}"

    def cost(name: str, pooling: str) -> str:
        rows = own[(own["quantity"] == "risk") & (own["variant"] == f"replacement, {pooling}")]
        return f"{tables.one(rows, estimator=name, num_examples=None)['value']:.2f}"

    def ratios(name: str, sampling: str) -> str:
        rows = own[(own["quantity"] == "ratio") & (own["variant"] == f"{sampling}, own")]
        found_at = [tables.one(rows, estimator=name, num_examples=n) for n in intra.SIZES]
        return ", ".join(f"{row['value']:.2f}" for row in found_at)

    names = intra.SAMPLINGS["replacement"]
    sizes = ", ".join(str(n) for n in intra.SIZES)
    return [
        "Slope of the log estimate against log 1 / n inside Self-FL (1 is right, 0 is flat): "
        f"{'; '.join(slope(n) for n in names)}.",
        f"`trajectory` is {ratios('trajectory', 'replacement')} times the truth at {sizes} "
        f"examples, `round_window` {ratios('round_window', 'replacement')}, `gradient` "
        f"{ratios('gradient', 'replacement')}. `split_half` is "
        f"{ratios('split_half', 'replacement')} with independent batches and "
        f"{ratios('split_half', 'epoch')} by epochs: batch noise adds to it.",
        "By epochs, variance over time depends on where in an epoch training ends (100 examples: "
        f"exactly 8 epochs): `round_window` {ratios('round_window', 'epoch')}, `trajectory` "
        f"{ratios('trajectory', 'epoch')} times the truth.",
        "Risk of plugging both in, with `moments`, own estimates (pooled in brackets): "
        + "; ".join(f"{n} {cost(n, 'own')} ({cost(n, 'pooled')})" for n in names)
        + ". Pooling puts the slope right, not the level.",
        _regression_finding(found[found["part"] == "regression"]),
        *_collapse_findings(found[found["part"] == "collapse"]),
    ]


def _regression_finding(part: pd.DataFrame) -> str:
    def ratios(name: str, variant: str) -> str:
        rows = part[part["variant"] == variant]
        found_at = [tables.one(rows, estimator=name, num_examples=n) for n in regression.SIZES]
        return ", ".join(f"{row['value']:.2f}" for row in found_at)

    sizes = ", ".join(str(n) for n in regression.SIZES)
    return (
        f"In linear regression at {sizes} examples, over the truth: `trajectory` "
        f"{ratios('trajectory', regression.FROM_TRUTH)}; `gradient` at the fitted optimum "
        f"{ratios('gradient', regression.AT_OPTIMUM)}, at the true parameters "
        f"{ratios('gradient', regression.FROM_TRUTH)}."
    )


def _collapse_findings(part: pd.DataFrame) -> list[str]:
    def ends(name: str, variant: str, quantity: str) -> str:
        rows = part[(part["variant"] == variant) & (part["quantity"] == quantity)]
        found_at = [tables.one(rows, estimator=name, inter_var=v) for v in collapse.INTER_VARS]
        return ", ".join(tables.number(row) for row in found_at)

    values = ", ".join(f"{v:g}" for v in collapse.INTER_VARS)
    exact = "Self-FL, exact"
    return [
        f"Fed with uploads that its own estimate shrank, `empirical` ends at "
        f"{ends('empirical', collapse.SHRUNK, 'fixed_point')} at inter_var {values} (intra "
        f"variance 1), `moments` at {ends('moments', collapse.SHRUNK, 'fixed_point')}; on "
        f"de-shrunk uploads `moments` stays at "
        f"{ends('moments', collapse.DESHRUNK, 'fixed_point')}. Runs of Self-FL with true "
        "intra variances beside shrunk uploads: `exact` ends at "
        f"{ends('empirical', exact, 'last_round')}, where the closed form for its own draw says "
        f"{ends('empirical', exact, 'closed_form')}. `as_described`, which starts from the "
        "leave-one-out mean instead of the mean, ends at "
        f"{ends('empirical', 'Self-FL, as_described', 'last_round')}."
    ]
