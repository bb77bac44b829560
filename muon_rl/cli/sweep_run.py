"""Runs the study that ``muon-rl sweep`` asks for."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mlflow.exceptions import MlflowException

from muon_rl.cli import ConfigError, sweep_options
from muon_rl.cli.sweep_plan import Plan
from muon_rl.cli.sweep_tracking import check_points
from muon_rl.cli.training import quieten
from muon_rl.experiments import corner_points, expand
from muon_rl.experiments.jobs import Job, Point, jobs_of
from muon_rl.experiments.launch import Launcher, LocalLauncher
from muon_rl.experiments.live_table import view_of
from muon_rl.experiments.lock import StudyLock
from muon_rl.experiments.schedule import Listed, Schedule, Source, State, Stop, tail
from muon_rl.experiments.study import Study, StudyDiffers
from muon_rl.experiments.sweep_results import log_results, ranking

FOLDER = Path("sweeps")  # of all studies, in the working folder
_SHOWN = 5  # best points, and lines of a log, at the end


class SweepRun:
    """A study's run from the check of its points to what it leaves.

    Args:
        plan: what is run.
        options: of the command line.
        command_line: as it was given, quoted for a shell.
    """

    def __init__(self, plan: Plan, options: argparse.Namespace, command_line: str) -> None:
        quieten()
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        self.plan, self.options, self.command_line = plan, options, command_line
        self.threads = sweep_options.threads(options)
        self.seeds = options.seeds or [0]
        if options.search:
            _require("optuna", "--search", "search")
        if options.launcher == "ray":
            _require("ray", "--launcher ray", "ray")
        checked = {point.name: plan.fit_options(point) for point in self._to_check()}
        self.tracking = check_points(checked)
        self.study = Study(plan.name, self.tracking.uri, FOLDER / plan.name)

    def _to_check(self) -> list[Point]:
        """Return all points; of a search the first draw, the smallest and the largest values."""
        if not self.plan.ranges:
            return self.plan.points
        *_, largest = corners = list(corner_points(self.plan.ranges))
        drawn = self._search({}, self.seeds).next()
        ends = [Point.of(expand(corner)) for corner in (corners[0], largest)]
        return [*ends, *([drawn.point] if drawn else [])]

    def run(self) -> None:
        """Run what is not finished.

        Raises:
            ConfigError: if the study cannot be begun.
            SystemExit: with 1 if a training failed, 130 or 143 after a stop.
        """
        if self.options.dry_run:
            self._print_commands()
            return
        try:
            lock = StudyLock(self.study.folder)
        except BlockingIOError as error:
            raise ConfigError(
                f"The study {self.plan.name} cannot be run twice at a time: {error}. Wait for it, "
                "or name another study with --name."
            ) from error
        except OSError as error:
            raise ConfigError(
                f"{self.study.folder}, where logs and checkpoints go, cannot be written: {error}"
            ) from error
        try:
            self._run(lock)
        except (OSError, MlflowException) as error:
            with suppress(Exception):
                self.study.close("FAILED")
            sys.stderr.write(f"The sweep broke off: {error}\n{self._how_to_go_on()}")
            raise SystemExit(1) from error
        finally:
            lock.release()

    def _run(self, lock: StudyLock) -> None:
        try:
            digests = self.plan.task_digests()
            self.study.open(self.plan.spec(self.options), self.command_line, digests)
        except StudyDiffers as error:
            raise ConfigError(str(error)) from error
        points, seeds = self.study.plan(self.plan.points, self.seeds)
        try:
            for point in points:
                self.plan.fit_options(point)
        except ConfigError:
            self.study.close("KILLED")
            raise
        runs = self.study.runs()
        for run in runs.values():
            self.study.end(run, "KILLED")  # what a killed sweep left as running
        source: Source
        if self.plan.ranges:
            source = self._search(runs, seeds)
        else:
            source = Listed(jobs_of(points, seeds), runs)
        view = view_of(self.study, self.options.metric, self.options.jobs)
        launcher, stop = self._launcher(lock), Stop()
        handlers = {number: signal.getsignal(number) for number in _signals()}
        for number in handlers:
            signal.signal(number, stop)
        try:
            with view:
                schedule = Schedule(
                    self.study, source, launcher, self._command, runs=runs, view=view,
                    stop=stop, jobs=self.options.jobs, retries=self.options.retries,
                )  # fmt: skip
                self._say_what_begins(schedule.state)
                state = schedule.run()
            self._end(state, points, seeds, stop)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            launcher.close()

    def _search(self, runs: dict, seeds: Sequence[int]) -> Source:
        from muon_rl.experiments.search import Search

        options = self.options
        return Search(
            self.plan.ranges, sampler=options.search, trials=options.trials, seeds=seeds,
            metric=options.metric, runs=runs, minimize=options.minimize, seed=options.search_seed,
        )  # fmt: skip

    def _launcher(self, lock: StudyLock) -> Launcher:
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        environment = dict.fromkeys(names, str(self.threads))
        if self.options.launcher == "local":
            return LocalLauncher(environment, keep_open=[lock.inherited])
        from muon_rl.experiments.ray_launcher import RayLauncher

        return RayLauncher(environment, threads=self.threads, jobs=self.options.jobs)

    def _command(self, job: Job, checkpoint: Path | None) -> list[str]:
        """Return the command that trains a job."""
        return [sys.executable, "-m", "muon_rl.cli", *self._fit(job, checkpoint)]

    def _fit(self, job: Job, checkpoint: Path | None = None) -> list[str]:
        tags = {**self.options.tag, **self.study.tags(job)}
        words = [
            "fit",
            *self.plan.fit_options(job.point),
            f"--seed_everything={job.seed}",
            f"--checkpoint.folder={self.study.checkpoints(job)}",
            *self.tracking.options(experiment=self.study.name, run=job.name, tags=tags),
        ]
        return words if checkpoint is None else [*words, f"--ckpt_path={checkpoint}"]

    # -- what is told --------------------------------------------------------------------------

    def _print_commands(self) -> None:
        jobs = jobs_of(self.plan.points, self.seeds)
        if self.plan.ranges:
            source = self._search({}, self.seeds)
            first = [source.next() for _ in range(min(self.options.trials, 2) * len(self.seeds))]
            jobs = [job for job in first if job is not None]
            print(f"{self.options.trials} trials are drawn; the first of them:")
        else:
            print(f"{len(self.plan.points)} points with {len(self.seeds)} seeds each:")
        for job in jobs:
            print(f"\n# {job.name}")
            print(f"OMP_NUM_THREADS={self.threads} {shlex.join(['muon-rl', *self._fit(job)])}")

    def _say_what_begins(self, state: State) -> None:
        done = f", {state.done} of them finished already" if state.done else ""
        print(
            f"Study {self.study.name}: {state.total} trainings{done}; {self.options.jobs} at a "
            f"time, threads of each: {self.threads}. Logs are in {self.study.folder}/.",
            flush=True,
        )

    def _end(self, state: State, points: Sequence[Point], seeds: Sequence[int], stop: Stop) -> None:
        """Log the results, say what came out, and exit as it went."""
        runs = self.study.runs()
        jobs = jobs_of(points, seeds) if not self.plan.ranges else sorted(runs, key=_by_trial)
        if jobs:
            log_results(self.study, jobs, runs, self.options.metric, self.options.minimize)
        left = state.total - state.done
        self.study.close("KILLED" if stop.count and left else "FAILED" if left else "FINISHED")
        print(f"{state.done} of {state.total} trainings of {self.study.name} are finished.")
        best = ranking(jobs, runs, self.options.metric, self.options.minimize)[:_SHOWN]
        for point, values in best:
            mean = sum(values.values()) / len(values)
            seeds_of = "1 seed" if len(values) == 1 else f"{len(values)} seeds"
            print(f"  {self.options.metric} {mean:8.4g}, mean of {seeds_of}  {point.name}")
        for job, code in state.failed.items():
            log = self.study.log_file(job)
            print(f"FAILED {job.name} (exit code {code}), {log}:")
            print("\n".join(f"    {line}" for line in tail(log, _SHOWN).splitlines()))
        print(f"  MLflow run   {self.study.parent_id} in {self.tracking.uri}")
        print(f"  to compare   muon-rl compare {self.study.name} --group-by point", flush=True)
        if stop.count and left:
            sys.stderr.write(f"Stopped. {self._how_to_go_on()}")
            raise SystemExit(128 + stop.signum)
        if left:
            sys.stderr.write(
                f"{left} of {state.total} trainings failed. The same command runs them again.\n"
            )
            raise SystemExit(1)

    def _how_to_go_on(self) -> str:
        return f"To go on, the same command again:\n  {self.command_line}\n"


def _by_trial(job: Job) -> tuple[int, int]:
    return job.point.trial or 0, job.seed


def _signals() -> list[signal.Signals]:
    """Return the signals that stop a sweep; one that nohup has put off is left so."""
    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return [number for number in wanted if signal.getsignal(number) != signal.SIG_IGN]


def _require(package: str, option: str, extra: str) -> None:
    try:
        __import__(package)
    except ImportError as error:
        raise ConfigError(
            f"{option} needs {package}, which is not installed: pip install 'muon-rl[{extra}]'"
        ) from error
