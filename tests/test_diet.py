"""What a client actor does not import: every library there costs memory once an actor."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("pandas", "scipy.stats", "scipy.optimize", "matplotlib", "mlflow", "sklearn", "PIL")

SCRIPT = """
import sys
from selffl_ray import load_config
from selffl_ray.experiment import prepare_experiment
import selffl_ray.runtime.actors
from selffl_ray.host import ClientHost

prepared = prepare_experiment(load_config(None, ["method=selffl"]))
host = ClientHost()
host.load(prepared.data_spec, dict(enumerate(prepared.clients)))
host.begin(prepared.run_spec)
print(",".join(name for name in {heavy} if name in sys.modules))
"""


def imported(script):
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_host_that_reads_a_prepared_store_imports_no_heavy_library():
    script = SCRIPT.format(heavy=HEAVY)
    # The first one prepares the store, for which digits need scikit-learn.
    imported(script)
    assert imported(script) == ""


def test_such_a_library_would_be_seen():
    assert imported("import pandas\n" + SCRIPT.format(heavy=HEAVY)) == "pandas"
