"""Calibration of every uncertainty estimator against known variances: a table and one picture.

    python -m analysis.calibration [--output analysis/results/calibration] [--replicates 400]
        [--seeds 10]

Four parts, each a module with its setting in its docstring: ``calibration_inter`` (simulated
clients, known intra variances), ``calibration_intra`` (Self-FL run on ``gaussian`` data),
``calibration_regression`` (stacks in linear regression) and ``calibration_collapse`` (estimates fed
with the models that they shrank). Writes OUTPUT.csv with every figure, its Monte Carlo standard
error and the specification's figure where there is one, OUTPUT.md with tables and OUTPUT.png.
The same options give the same numbers. Three minutes on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch

from analysis import (
    calibration_collapse,
    calibration_inter,
    calibration_intra,
    calibration_picture,
    calibration_regression,
    calibration_report,
)
from analysis.calibration_base import Figure

REGRESSION_CLIENTS = 200


def figures(replicates: int, seeds: int) -> pd.DataFrame:
    """All figures, one a row."""
    rows = [
        *calibration_inter.figures(replicates),
        *calibration_intra.figures(seeds),
        *calibration_regression.figures(REGRESSION_CLIENTS),
        *calibration_collapse.figures(),
    ]
    return pd.DataFrame(rows, columns=Figure._fields)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", default="analysis/results/calibration")
    parser.add_argument("--replicates", type=int, default=400, help="simulated draws a setting")
    parser.add_argument("--seeds", type=int, default=10, help="draws of gaussian data for Self-FL")
    options = parser.parse_args()
    # As in a host: sums keep their bits.
    torch.set_num_threads(1)
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    figures(options.replicates, options.seeds).to_csv(
        output.with_suffix(".csv"), index=False, float_format="%.6g"
    )
    # What is told and drawn is what the file says.
    found = pd.read_csv(output.with_suffix(".csv"))
    calibration_picture.draw(found, output.with_suffix(".png"))
    command = (
        f"python -m analysis.calibration --replicates {options.replicates} --seeds {options.seeds}"
    )
    text = calibration_report.text(found, command, output.with_suffix(".png").name)
    output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
