"""A Ray that starts while a command is imported, and a mistake in the request meanwhile."""

from __future__ import annotations

import re
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.runtime.processes import Sandbox

pytestmark = pytest.mark.ray

LONG = (
    "--set=training.num_rounds=3000",
    "--set=placement.clients_per_actor=14",
    "--set=tracking.enabled=false",
)
SELFFL = Path(sys.executable).with_name("selffl")


@pytest.fixture
def sandbox(tmp_path):
    """Commands of a test; none of them outlives it."""
    box = Sandbox(tmp_path)
    yield box
    box.end_all()


PRELUDE = """
import psutil
from selffl_ray import local_ray
from selffl_ray.local_ray import is_ray_ours, ray_is_running, ray_meanwhile

def children():
    return {child.pid for child in psutil.Process().children(recursive=True)}

assert is_ray_ours() and not ray_is_running() and not children()
"""
DONE_ONCE = """
seen = []

def work():
    # Ray's processes are there, and it is not up.
    seen.append((bool(children()), ray_is_running(), is_ray_ours()))
    return 7

with ray_meanwhile(work) as found:
    assert found == 7
    assert ray_is_running() and not is_ray_ours() and children()
assert seen == [(True, False, True)]
assert not ray_is_running() and not children()
"""
AGAIN_AFTER_A_FAILURE = """
def work():
    raise ValueError("mine")

try:
    with ray_meanwhile(work):
        raise AssertionError("it went on")
except ValueError as error:
    assert str(error) == "mine"
assert not ray_is_running() and not children()
with ray_meanwhile(list) as found:
    assert found == [] and ray_is_running()
assert not children()
"""
SOMEBODY_ELSES = """
local_ray.start_ray()
import ray
try:
    local_ray.start_ray()
except RuntimeError as error:
    assert "twice" in str(error)
assert ray_is_running() and ray.get(ray.put(1)) == 1
ray.shutdown()
"""
OTHER_METHODS = """
local_ray.LAST_STARTED = "no_such_method"
up = []
with ray_meanwhile(lambda: up.append(ray_is_running())):
    assert up == [True]
assert not ray_is_running() and not children()
"""


@pytest.mark.parametrize(
    "script",
    [DONE_ONCE, AGAIN_AFTER_A_FAILURE, SOMEBODY_ELSES, OTHER_METHODS],
    ids=["done once", "another after a failure", "a connection stays", "a Ray of other methods"],
)
def test_work_is_done_while_ray_comes_up_and_ray_ends_with_the_context(sandbox, script):
    # In a process of its own: this one may be connected to a Ray.
    process = sandbox.start(sys.executable, "-c", PRELUDE + script)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0


FAILS = """
import time
from selffl_ray.local_ray import ray_meanwhile

def work():
    # Till Ray is up by itself, and its agents run.
    time.sleep({seconds})
    raise SystemExit(3)

with ray_meanwhile(work):
    print("it went on")
"""


@pytest.mark.parametrize("seconds", [0, 5])
def test_work_that_fails_leaves_no_process_and_no_folder(sandbox, seconds):
    """Neither while Ray's processes start, nor when each of them has started its own."""
    folders = sessions()
    process = sandbox.start(sys.executable, "-c", FAILS.format(seconds=seconds))
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 3
    assert sandbox.all_gone(within_s=1)
    assert not [f for f in sessions() - folders if f.name.endswith(f"_{process.pid}")]


def sessions():
    return set(Path("/tmp/ray").glob("session_2*"))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["raylet", "torch"])
def test_a_command_that_is_ended_while_ray_starts_leaves_no_process(sandbox, when, sent):
    process = sandbox.start(str(SELFFL), "run")
    maps = Path(f"/proc/{process.pid}/maps")
    deadline = time.monotonic() + 60
    while not (
        "libtorch" in maps.read_text()
        if when == "torch"
        else any("raylet" in other.name() for other in sandbox.alive())
    ):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(sent)
    said = process.communicate(timeout=30)
    assert (process.returncode, *said) == (130, "", "")
    assert sandbox.all_gone(within_s=1)
    assert not (sandbox.folder / "runs").exists()


@pytest.mark.parametrize("early", [True, False], ids=["early", "by cluster()"])
def test_sigterm_ends_a_run_after_its_round(sandbox, early):
    """``ray.init`` puts a handler in the place of ours, whichever comes first."""
    command = [str(SELFFL)]
    if not early:
        script = "from selffl_ray import cli; cli._starts_ray = lambda o: False; exit(cli.main())"
        command = [sys.executable, "-c", script]
    process = sandbox.start(*command, "run", *LONG)
    # The first round is over.
    assert "round" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopping after this round" in said[1]
    assert re.match(r"stopped after \d+ rounds; go on with", said[0])
    assert sandbox.all_gone(within_s=10)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["run", "--set=training.num_roundz=3"],
            r"selffl: training.num_roundz: unknown key .*'num_rounds'.*\n",
        ),
        (["run", "--set=placement.cpus_per_actor=99"], r"selffl: .*ask for 1386 CPUs.*\n"),
        (["compare", "--methods=fedavg,fedavg"], r"selffl: --methods names a method twice.*\n"),
    ],
)
def test_a_mistake_is_told_once_and_leaves_no_process_and_no_folder(sandbox, arguments, told):
    done = sandbox.selffl(*arguments)
    assert done.status == 2
    assert re.fullmatch(told, done.err), done.err
    assert not done.out
    assert sandbox.all_gone(within_s=1)
    assert not (sandbox.folder / "runs").exists()


def test_for_a_broken_file_no_ray_is_started(sandbox):
    (sandbox.folder / "broken.yaml").write_text("seed: [1")
    # Lists on standard error what is imported.
    done = sandbox.selffl("run", "broken.yaml", PYTHONPROFILEIMPORTTIME="1")
    assert done.status == 2
    assert "broken.yaml is not valid YAML" in done.err
    assert not re.search(r"\| +ray$", done.err, re.MULTILINE)
