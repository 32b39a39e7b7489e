"""What must not happen: code from a file, a file out of place, an open port, a secret shown."""

from __future__ import annotations

import ast
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import selffl_ray
from selffl_ray import commands, safe_yaml
from selffl_ray.checkpoint import latest_checkpoint
from selffl_ray.sweep import Configuration, trial_name
from tests.mutations import selffl, state_of

PACKAGE = Path(selffl_ray.__file__).parent
ROOT = PACKAGE.parent
SECRET = "s3cr3t"
RUN = [
    f"--set={setting}"
    for setting in (
        "data={name: gaussian, num_clients: 3, dimension: 2, num_examples: [5]}",
        *("placement.backend=local", "tracking.enabled=false", "training.num_rounds=1"),
        *("method=fedavg", "checkpoint.every=1"),
    )
]


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """An empty current folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return folder


# -- nothing in a file is executed ----------------------------------------------------------------


class Touch:
    """Unpickled, it makes a file."""

    def __reduce__(self):
        return Path.touch, (Path("owned"),)


EXECUTES = re.compile(
    r"(?<!inert_)(pickle|marshal|shelve|dill|joblib|cloudpickle)\.(load|loads|Unpickler|open)|torch\.load|"
    r"(np|numpy)\.load$|read_pickle|yaml\.(unsafe_load|full_load|load_all)|(?<![\w.])(eval|exec)$"
)


def calls() -> list[tuple[str, str]]:
    return [
        (str(path.relative_to(PACKAGE)), ast.unparse(node.func))
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]


def test_no_module_calls_what_executes_a_files_content():
    assert [(path, call) for path, call in calls() if EXECUTES.search(call)] == []
    for bad in ("pickle.load", "torch.load", "np.load", "eval", "yaml.full_load"):
        assert EXECUTES.search(bad)
    bases = [
        ast.unparse(base)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        for base in node.bases
    ]
    # One reader of pickles, which knows no name that does anything: tests/datasets/test_cifar.py.
    assert bases.count("pickle.Unpickler") == 1
    assert [call for _, call in calls() if call.startswith("yaml.load")] == ["yaml.load"]
    assert issubclass(safe_yaml._Loader, yaml.SafeLoader)


def test_a_pickle_in_the_place_of_any_file_of_a_run_is_not_executed(work):
    assert selffl("run", *RUN, "--output", "good").code == 0
    newest = latest_checkpoint(work / "good" / "checkpoints")
    assert newest is not None
    names = [f.relative_to(work / "good") for f in (work / "good").rglob("*") if f.is_file()]
    assert len(names) > 5
    for name in names:
        folder = work / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(work / "good", folder)
        (folder / name).write_bytes(pickle.dumps(Touch()))
        selffl("run", "--resume", "run")
        assert not Path("owned").exists(), name
    pickle.loads(pickle.dumps(Touch()))
    assert Path("owned").exists()


@pytest.mark.parametrize("tag", ["python/object/apply:os.system [touch owned]",
                                 "python/name:os.system", "python/module:os"])  # fmt: skip
@pytest.mark.parametrize("command", ["run", "tune"])
def test_a_tag_of_yaml_that_asks_for_code_is_refused(work, tag, command):
    Path("c.yaml").write_text(f"experiment: !!{tag}\n")
    assert selffl(command, "c.yaml", "--dry-run").code == 2
    assert selffl("run", "--dry-run", f"--set=experiment=!!{tag}").code == 2
    assert not Path("owned").exists()


def test_only_plugins_that_are_named_are_imported_and_none_takes_a_modules_place(work):
    for name in ("my_plugin", "fedavg", "numpy", "json", "sitecustomize"):
        Path(f"{name}.py").write_text(f"from pathlib import Path\nPath('owned-{name}').touch()")
    assert selffl("run", "--dry-run", *RUN).code == 0
    assert selffl("run", "--dry-run", *RUN, "--set=plugins=[numpy, json]").code == 0
    assert not list(work.glob("owned-*"))
    for name in ("../my_plugin", "/tmp/x", "my-plugin", "my_plugin.py/", "..my_plugin", "a b"):
        assert selffl("run", "--dry-run", f"--set=plugins=['{name}']").code == 2
    assert selffl("run", "--dry-run", *RUN, "--set=plugins=[my_plugin]").code == 0
    assert [p.name for p in work.glob("owned-*")] == ["owned-my_plugin"]


# -- nothing is written elsewhere -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", ".", "", "~", "a\\b", "-x", "x\0"])
def test_an_experiments_name_leads_nowhere_else(work, name):
    before = state_of(work.parent)
    for command in ("run", "tune"):
        Path("c.yaml").write_text(yaml.safe_dump({"experiment": name, "space": {"seed": [0]}}))
        before = state_of(work.parent)
        assert selffl(command, "c.yaml").code == 2
        assert state_of(work.parent) == before


def test_a_clients_name_leads_nowhere_else(work):
    names = ["../../x", "/tmp/x", "..", "a/b"]
    rows = [(client, n % 3) for client in names for n in range(9)]
    columns = {"client_id": [c for c, _ in rows], "label": [n for _, n in rows]}
    pq.write_table(pa.table({**columns, "a": [float(n) for _, n in rows]}), "t.parquet")
    data = "data={name: parquet, source: t.parquet, features: [a], shape: [1], num_classes: 3}"
    before = state_of(work.parent, work / "out")
    chosen = [f"--set={data}", "--set=export_models=true", "--set=method=local"]
    said = selffl("run", *RUN, *chosen, "--output", "out")

    assert said.code == 0, said.err
    found = sorted(p.name for p in (work / "out" / "models" / "clients").rglob("*"))
    assert len(found) == len(names)
    assert "..%2F..%2Fx.safetensors" in found
    assert {k: v for k, v in state_of(work.parent, work / "out").items() if k != str(work)} == {
        k: v for k, v in before.items() if k != str(work)
    }


def test_a_trials_folder_is_one_name_whatever_is_varied():
    for label in ("x=../../y", "x=/etc", "..", "/", "x=\0", "é/ü"):
        name = trial_name(Configuration(0, {}, label), 0)
        assert re.fullmatch(r"000-[A-Za-z0-9_.=-]*-s0", name)


# -- ports ----------------------------------------------------------------------------------------


def test_the_pages_of_mlflow_are_served_on_loopback_only(work, monkeypatch):
    served: list[list[str]] = []
    monkeypatch.setattr(commands, "serve", lambda command: served.append(command) or 0)
    Path("m.db").touch()
    assert selffl("ui", "m.db").code == 0
    (command,) = served
    assert command[command.index("--host") + 1] == "127.0.0.1"


def test_no_source_names_an_address_of_all_interfaces():
    files = [*PACKAGE.rglob("*.py"), *ROOT.glob("cluster*.yaml"), ROOT / "Makefile"]
    for path in files:
        code = [line.partition("#")[0] for line in path.read_text().splitlines()]
        open_ = [line for line in code if re.search(r"--?host[= ]+[\"']?0\.0\.0\.0", line)]
        assert not open_, path


# -- secrets --------------------------------------------------------------------------------------


def test_secrets_in_the_environment_reach_no_file_and_no_output(work, monkeypatch):
    for name in ("MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:9")
    for said in (
        selffl("run", *RUN, "--output", "out"),
        selffl("run", *RUN, "--dry-run"),
        selffl("run", *RUN, "--verbose", "--output", "out"),
    ):
        assert SECRET not in said.out + said.err
    assert (work / "out" / "summary.json").exists()
    for path in work.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    "settings",
    [
        [f"--set=tracking.uri=http://me:{SECRET}@host/"],
        [f"--set=tracking.uri=[http://me:{SECRET}@host/]"],
        [f"--set=tracking.uri=file://me:{SECRET}@host/"],
        [f"--set=tracking.url=http://me:{SECRET}@host/"],
        [f"--set=tracking=http://me:{SECRET}@host/"],
        [f"--set=http://me:{SECRET}@host/"],
        [f"--set=tracking.uri='http://me:{SECRET}@host/"],
    ],
)
def test_a_password_in_a_setting_that_is_refused_is_not_repeated(work, settings):
    said = selffl("run", *settings)
    assert said.code == 2
    assert SECRET not in said.out + said.err


# -- packages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-lowest.txt"])
def test_constraints_are_exact(name):
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    for line in filter(None, lines):
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.+]*", line), line


def test_ci_installs_under_the_constraints_and_checks_what_it_installed():
    make = (ROOT / "Makefile").read_text()
    installs = [line for line in make.splitlines() if "pip install" in line]
    assert installs
    assert all("-c constraints" in line for line in installs)
    target = make[make.index("\ntest:") : make.index("\ntest-fast:")]
    assert "pip check" in target
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
