"""A sweep from its file to its tables: plan, first stage, ranking, confirmation, MLflow.

The sweep's folder holds ``sweep.yaml`` (repeats it), ``trials/<name>/`` (each a run's folder),
``results.csv`` and ``results.md``, with a second stage also ``confirm.csv`` and ``confirm.md``,
with a searcher ``search.json`` (what it was told), with population-based training
``population.json`` (who was replaced by a copy of whom), and ``tune/`` with Tune's own files,
readable by TensorBoard. Whoever resumes it repeats no trial that is done.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selffl_ray.api import make_job
from selffl_ray.config import ExperimentConfig, dump_yaml, flatten, to_raw
from selffl_ray.local_ray import is_ray_ours
from selffl_ray.run_loop import Message
from selffl_ray.run_writer import Job
from selffl_ray.runtime.cluster import check_shared, cluster, this_machine
from selffl_ray.runtime.placement import Node, PlacementPlan
from selffl_ray.sweep import (
    Configuration,
    SweepConfig,
    Trial,
    schedule_text,
    trials,
)
from selffl_ray.sweep_folder import check_folder, check_origin, new_folder, note_end
from selffl_ray.sweep_plan import (
    Stage,
    SweepPlan,
    plan_confirmation,
    plan_members,
    plan_selection,
    plan_sweep,
)
from selffl_ray.sweep_population import LOG, Population
from selffl_ray.sweep_progress import StageProgress, Watch
from selffl_ray.sweep_results import Ranked, best_of_each_scene, finals, markdown, rank, trial_rows
from selffl_ray.sweep_scheduler import SchedulerConfig
from selffl_ray.sweep_search import Search, values_to_tell
from selffl_ray.tables import write_json, write_text
from selffl_ray.tracking import close_sweep, open_sweep, resolve_uri

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepResult:
    """A sweep that has ended.

    ranking: of the last stage that ran; rows: a row a trial, by stage; complete: nothing is left to
    be resumed; failed: trials that ended with an error; tracked: MLflow has a parent run of it.
    """

    folder: Path
    ranking: list[Ranked]
    rows: dict[str, pd.DataFrame]
    complete: bool
    failed: int
    tracked: bool


def run_sweep(
    sweep: SweepConfig,
    *,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    watch: Watch = lambda event: None,
    command: str = "run_sweep",
) -> SweepResult:
    """Run a sweep, or go on with one.

    Args:
        command: what the tables say that they were made with.
        output: folder of the sweep; ``runs/<experiment>/sweep-<time>`` by default.
        resume: a sweep's folder; ``sweep`` must be the one in its ``sweep.yaml``.
        watch: called with every :class:`SweepProgress` and ``Message``.

    Raises:
        UsageError: something about the sweep cannot work; nothing was started.
        RunError: Ray Tune failed. A trial that fails is counted, and the others go on.
    """
    folder = Path(resume or output or new_folder(sweep)).absolute()
    check_folder(sweep, folder, resume=resume is not None)
    if resume is not None:
        check_origin(folder)
    if is_ray_ours():
        plan_sweep(sweep, this_machine())
    with cluster() as ray_cluster:
        plan = plan_sweep(sweep, ray_cluster.nodes)
        check_shared(folder)
        if resume is None:
            write_text(folder / "sweep.yaml", dump_yaml(to_raw(sweep)))
            write_json(folder / "origin.json", {"command": command, "folder": str(Path.cwd())})
        return _Sweep(plan, folder, ray_cluster.nodes, watch).run()


class _Sweep:
    """A planned sweep in its folder."""

    def __init__(self, plan: SweepPlan, folder: Path, nodes: Sequence[Node], watch: Watch) -> None:
        self._plan = plan
        self._sweep = plan.sweep
        self._folder = folder
        self._nodes = nodes
        self._watch = watch
        self._store = self._store_of(plan.prepared[0].config)
        self._parent = self._open_parent()

    @staticmethod
    def _store_of(config: ExperimentConfig) -> str | None:
        return resolve_uri(config.tracking, Path.cwd()) if config.tracking.enabled else None

    def _open_parent(self) -> str | None:
        """The parent run in MLflow: the one before, or a new one; None if it cannot be had."""
        if self._store is None:
            return None
        note = self._folder / "parent.json"
        if note.exists():
            return str(json.loads(note.read_text())["run_id"])
        try:
            run_id = open_sweep(
                self._store,
                self._sweep.experiment,
                self._folder.name,
                flatten(to_raw(self._sweep)),
                {},
            )
        except Exception as error:
            # Whatever a store may raise: tracking is never worth a sweep.
            self._say(f"MLflow has no parent run for this sweep: {type(error).__name__}: {error}")
            return None
        write_json(note, {"run_id": run_id})
        return run_id

    def _say(self, text: str) -> None:
        logger.warning("%s", text)
        self._watch(Message(" ".join(text.split())[:300]))

    # -- stages ---------------------------------------------------------------------------------

    def run(self) -> SweepResult:
        """Both stages, the tables, and what MLflow is told at the end."""
        sweep = self._sweep
        chosen, selected, complete = self._first_stage()
        rows = {"select": selected}
        references = {scene: one.number for scene, one in self._plan.references.items()}
        ranking = self._write(selected, "select", references)
        if sweep.confirm is not None and complete and not ranking:
            self._say("nothing is confirmed: no configuration has finished with all of its seeds")
        if sweep.confirm is not None and complete and ranking:
            best = finals(
                ranking,
                chosen,
                self._plan.references,
                top=sweep.confirm.top,
                per=sweep.confirm.per,
            )
            stage = plan_confirmation(sweep, best.chosen, self._nodes)
            rows["confirm"] = self._run_stage(stage)
            ranking = self._write(rows["confirm"], "confirm", best.references)
            complete = _complete(rows["confirm"], stage.scheduler)
        failed = sum(int((r["status"] == "FAILED").sum()) for r in rows.values())
        result = SweepResult(
            self._folder, ranking, rows, complete, failed, self._parent is not None
        )
        self._close_parent(result)
        return result

    def _first_stage(self) -> tuple[Sequence[Configuration], pd.DataFrame, bool]:
        """Configurations, rows of the trials, and whether nothing is left."""
        if self._sweep.scheduler.name == "pbt":
            return self._evolve()
        return self._select() if self._sweep.searcher.name == "variants" else self._search()

    def _select(self) -> tuple[Sequence[Configuration], pd.DataFrame, bool]:
        """The first stage of a sweep whose configurations are all known."""
        rows = self._run_stage(self._plan.first)
        return self._plan.chosen, rows, _complete(rows, self._sweep.scheduler)

    def _search(self) -> tuple[Sequence[Configuration], pd.DataFrame, bool]:
        """The first stage with a searcher: batches, until all is told or something is left."""
        sweep = self._sweep
        search = Search(sweep, Path.cwd(), self._folder / "search.json")
        progress = StageProgress("select", sweep, self._watch)
        while search.left and progress.seconds < (sweep.budget.seconds or math.inf):
            values: Mapping[int, float | None] = {}
            if batch := search.ask():
                stage, _ = plan_selection(sweep, batch, self._nodes)
                rows = self._run_stage(stage, progress, search.later * len(sweep.seeds))
                if not _complete(rows, stage.scheduler):
                    break
                values = values_to_tell(rows, sweep.metric)
            search.tell(values)
        found = search.configurations
        whole = trials(sweep, found, sweep.seeds, Path.cwd(), open_test=sweep.open_test)
        return found, trial_rows(whole, self._folder / "trials"), not search.left

    def _evolve(self) -> tuple[Sequence[Configuration], pd.DataFrame, bool]:
        """The first stage of a population: to the next comparison, until the runs end."""
        sweep, root = self._sweep, self._folder / "trials"
        population = Population(sweep, self._plan.first.trials, self._folder, Path.cwd())
        while population.ends:
            until = population.ends[0]
            name = "select" if until is None else f"select to round {until}"
            stage = plan_members(sweep, population.members, self._nodes, until)
            self._run_stage(stage, StageProgress(name, sweep, self._watch))
            if until is None or not population.held():
                break
            population.compare()
        rows = trial_rows(population.trials, root)
        found = [t.configuration for t in population.trials]
        return found, rows, _complete(rows, sweep.scheduler)

    def _run_stage(
        self, stage: Stage, progress: StageProgress | None = None, later: int = 0
    ) -> pd.DataFrame:
        """Run what is left of a stage, or of a batch of it with ``later`` trials to follow."""
        # Imported here: Tune takes more than a second, and a dry run needs none of it.
        from selffl_ray.tuning import is_done, run_trials

        root = self._folder / "trials"
        left = [
            (t, plan)
            for t, plan in zip(stage.trials, stage.plans, strict=True)
            if stage.scheduler.name != "none" or not is_done(root / t.name, stage.until)
        ]
        specs = {t.name: self._spec(stage, t, plan) for t, plan in left}
        progress = progress or StageProgress(stage.name, self._sweep, self._watch)
        progress.begin(stage.trials, finished=len(stage.trials) - len(left), later=later)

        def watch(event: Any) -> None:
            note_end(event, root, held=stage.until is not None)
            progress(event)

        seconds = self._sweep.budget.seconds
        if specs and not (stage.scheduler.name != "none" and self._done(stage)):
            run_trials(
                specs,
                folder=self._tune_folder(stage),
                scheduler=stage.scheduler,
                metric=self._sweep.metric,
                mode=self._sweep.mode,
                num_rounds=max(t.config.training.num_rounds for t in stage.trials),
                concurrent=self._sweep.concurrent,
                # Tune takes no budget of 0.
                seconds=None if seconds is None else max(seconds - progress.seconds, 1e-3),
                watch=watch,
            )
        return trial_rows(stage.trials, root)

    def _spec(self, stage: Stage, trial: Trial, plan: PlacementPlan) -> Any:
        from selffl_ray.tuning import TrialSpec

        settings = trial.configuration.settings
        return TrialSpec(self._job(stage, trial), plan, settings, self._reported(), stage.until)

    def _job(self, stage: Stage, trial: Trial) -> Job:
        folder = self._folder / "trials" / trial.name
        job = make_job(
            trial.config,
            folder,
            resume=(folder / "config.yaml").exists(),
            tags=self._tags(stage, trial),
        )
        # The store that the sweep began in, wherever it is gone on with.
        name = f"{trial.configuration.label} s{trial.seed}"
        return replace(job, name=name, store=self._store, schedule=trial.schedule)

    def _done(self, stage: Stage) -> bool:
        return _complete(trial_rows(stage.trials, self._folder / "trials"), stage.scheduler)

    def _tune_folder(self, stage: Stage) -> Path:
        """Tune's folder of a stage: the one before where Tune must know its past, else a new one.

        Without a scheduler trials do not depend on each other, and a new Tuner gets what is left.
        """
        first = self._folder / "tune" / stage.name
        if stage.scheduler.name != "none":
            return first
        count = len(list(first.parent.glob(f"{stage.name}*"))) if first.parent.exists() else 0
        return first if count == 0 else first.with_name(f"{stage.name}-{count + 1}")

    def _reported(self) -> tuple[str, ...]:
        """A handful: Tune's own files are not the place for more."""
        names = [
            f"{s}/{who}_{score}"
            for s in ("val", "test")
            for who in ("global", "local")
            for score in ("accuracy", "mse")
        ]
        return tuple(dict.fromkeys([self._sweep.metric, *names]))

    def _tags(self, stage: Stage, trial: Trial) -> dict[str, str]:
        tags = {"stage": stage.name, "configuration": trial.configuration.label}
        for key, value in trial.configuration.settings.items():
            tags[f"space.{key}"] = str(value)
        if trial.schedule:
            # Filter by it: what such a run comes to is not what its parameters come to.
            tags |= {"schedule": "pbt", "options": schedule_text(trial.schedule)}
        if self._parent is not None:
            tags["mlflow.parentRunId"] = self._parent
        return tags

    # -- results --------------------------------------------------------------------------------

    def _write(self, rows: pd.DataFrame, stage: str, references: Mapping[str, int]) -> list[Ranked]:
        sweep = self._sweep
        name = "results" if stage == "select" else stage
        write_text(self._folder / f"{name}.csv", rows.to_csv(index=False))
        text = markdown(
            rows,
            sweep.metric,
            sweep.mode,
            references,
            title=f"{sweep.experiment}: {stage}",
            command=json.loads((self._folder / "origin.json").read_text())["command"],
        )
        write_text(self._folder / f"{name}.md", text)
        return rank(rows, sweep.metric, sweep.mode, references)

    def _close_parent(self, result: SweepResult) -> None:
        if self._store is None or self._parent is None:
            return
        metrics: dict[str, float] = {}
        marks: dict[str, Mapping[str, str]] = {}
        best = best_of_each_scene(result.ranking) if result.complete else []
        if len(best) == 1:
            metrics[f"best/{self._sweep.metric}"] = best[0].value.mean
        for one in best:
            marks |= self._marks(one.configuration)
        status = "FAILED" if result.failed else "FINISHED"
        names = (
            "sweep.yaml",
            "search.json",
            LOG,
            "results.csv",
            "results.md",
            "confirm.csv",
            "confirm.md",
        )
        try:
            close_sweep(
                self._store,
                self._parent,
                status if result.complete else "KILLED",
                metrics=metrics,
                files=[self._folder / n for n in names if (self._folder / n).exists()],
                marks=marks,
            )
        except Exception as error:
            self._say(f"MLflow did not take in the sweep's end: {type(error).__name__}: {error}")

    def _marks(self, best: int) -> Mapping[str, Mapping[str, str]]:
        """``best`` for the runs of the best configuration, in either stage."""
        found = {}
        for note in sorted((self._folder / "trials").glob(f"{best:03d}-*/tracking.json")):
            run_id = json.loads(note.read_text())["run_id"]
            if run_id is not None:
                found[run_id] = {"best": "true"}
        return found


def _complete(rows: pd.DataFrame, scheduler: SchedulerConfig) -> bool:
    """Nothing is left: with a scheduler, trials that it stopped are done as well."""
    done = {"FINISHED", "FAILED"} | ({"STOPPED"} if scheduler.name != "none" else set())
    return bool(rows["status"].isin(done).all())
