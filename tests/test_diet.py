"""What a client actor does not import: every library there costs memory once an actor."""

from __future__ import annotations

import subprocess
import sys

import pytest

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


def imported(script, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_host_that_reads_a_prepared_store_imports_no_heavy_library():
    script = SCRIPT.format(heavy=HEAVY)
    # The first one prepares the store, for which digits need scikit-learn.
    imported(script)
    assert imported(script) == ""


@pytest.mark.parametrize(
    ("module", "heavy"),
    [("cli", ("torch", "ray", "numpy")), ("commands", ("pandas", "scipy.stats", "mlflow", "ray"))],
)
def test_a_command_imports_what_it_needs_only(module, heavy):
    script = "import sys\nfrom selffl_ray import {}\nprint([m for m in {} if m in sys.modules])"
    assert imported(script.format(module, heavy)) == "[]"


def test_such_a_library_would_be_seen():
    assert imported("import pandas\n" + SCRIPT.format(heavy=HEAVY)) == "pandas"


def test_a_run_of_self_fl_takes_its_distributions_from_scipy_special(tmp_path):
    """scipy.stats is half a second of its first round, and 35 MB."""
    settings = ["placement.backend=local", "tracking.enabled=false", "training.num_rounds=2"]
    # Clients of unequal sizes: their variances are held against them.
    settings.append("data.partition={name: dirichlet, num_clients: 10, alpha: 0.3}")
    script = f"""
import sys
from selffl_ray import load_config, run_experiment
run_experiment(load_config(None, {settings}), output={str(tmp_path)!r} + sys.argv[1])
print("scipy.special" in sys.modules, "scipy.stats" in sys.modules)
"""
    # The first one prepares the store, for which digits need scikit-learn, and that scipy.stats.
    imported(script, "/first")
    assert imported(script, "/second") == "True False"


COLLECTIONS = """
import gc

found = []
gc.callbacks.append(lambda phase, info: found.append(info["generation"]))
{imports}
# Those of the two older generations walk what has stayed so far.
print(sum(generation > 0 for generation in found), gc.isenabled())
"""


def collections(imports):
    count, enabled = imported(COLLECTIONS.format(imports=imports)).split()
    assert enabled == "True"
    return int(count)


def test_the_collector_does_not_walk_torch_while_it_is_imported():
    guarded = "import selffl_ray.runtime.actors", "from selffl_ray import run_experiment"
    assert max(map(collections, guarded)) < collections("import torch") / 5


def test_a_collector_that_was_off_stays_off():
    script = "import gc\ngc.disable()\nfrom selffl_ray import run_experiment\nprint(gc.isenabled())"
    assert imported(script) == "False"


def test_collections_in_an_actor_pass_over_what_was_imported():
    script = """
import gc
from selffl_ray.runtime.actors import DriverActor
assert gc.get_freeze_count() == 0
DriverActor()
print(gc.get_freeze_count() > 100_000, len(gc.get_objects()) < 1000)
"""
    assert imported(script) == "True True"


def test_a_round_is_not_the_first_to_import_pandas(tmp_path):
    """pyarrow does with its first array, so the tables make one before the first round."""
    script = f"""
import sys
from pathlib import Path
from selffl_ray.tables import RunTables
before = "pandas" in sys.modules
RunTables(Path({str(tmp_path)!r}), ["a"], "accuracy")
print(before, "pandas" in sys.modules)
"""
    assert imported(script) == "False True"
