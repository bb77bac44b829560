"""Random and TPE search through Optuna, whose trials are rebuilt from the study's runs."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from mlflow.entities import Run
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState

from muon_rl.experiments.jobs import Job, Point, jobs_of, written
from muon_rl.experiments.points import expand
from muon_rl.experiments.ranges import Interval, Ranges
from muon_rl.experiments.study import final_value, is_finished

SAMPLERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, constant_liar=True),
}


class Search:
    """Draws trials and learns from them: a trial's worth is its mean over all seeds.

    What a trial was is read from the tags of its runs, so a search that was killed goes on with
    the same trials. A draw depends on ``seed``, the trial's number and the trials before it.

    Args:
        ranges: that values are drawn from.
        sampler: random or tpe.
        trials: of the whole search.
        seeds: that each trial is run with.
        metric: whose last value is to be large.
        runs: that there are already.
        minimize: whether it is to be small.
        seed: of the draws.
    """

    def __init__(
        self,
        ranges: Ranges,
        *,
        sampler: str,
        trials: int,
        seeds: Sequence[int],
        metric: str,
        runs: Mapping[Job, Run],
        minimize: bool = False,
        seed: int = 0,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._ranges, self._make, self._seed = ranges, SAMPLERS[sampler], seed
        self._distributions = {key: _distribution(given) for key, given in ranges.items()}
        self._trials, self._seeds, self._metric = trials, list(seeds), metric
        self._study = optuna.create_study(direction="minimize" if minimize else "maximize")
        self._asked: dict[int, optuna.Trial] = {}
        self._values: dict[int, dict[int, float | None]] = {}
        self._queue: deque[Job] = deque()
        self._next = 0
        self.total = trials * len(self._seeds)
        self._rebuild(runs)

    def next(self) -> Job | None:
        """Return the next job: of a trial that has begun, or of a new one."""
        if not self._queue and self._next < self._trials:
            # Seeded anew for each draw, so that a resumed search draws what it would have drawn.
            self._study.sampler = self._make(self._seed * 1_000_003 + self._next)
            number, self._next = self._next, self._next + 1
            trial = self._study.ask(self._distributions)
            self._asked[number] = trial
            self._values[number] = {}
            self._queue += jobs_of([Point.of(expand(trial.params), trial=number)], self._seeds)
        return self._queue.popleft() if self._queue else None

    def ended(self, job: Job, run: Run | None) -> None:
        """Tell the sampler of a trial whose seeds have all ended."""
        number = job.point.trial
        if number not in self._asked:
            return
        value = final_value(run, self._metric) if is_finished(run) else None
        values = self._values[number]
        values[job.seed] = None if value is None or math.isnan(value) else value
        if set(values) >= set(self._seeds):
            known = [value for value in values.values() if value is not None]
            if len(known) == len(values):
                self._study.tell(self._asked[number], sum(known) / len(known))
            else:
                self._study.tell(self._asked[number], state=TrialState.FAIL)

    def ranking(self) -> list[tuple[float, dict[str, Any]]]:
        """Return the complete trials' means and values, the best first."""
        done = self._study.get_trials(states=[TrialState.COMPLETE])
        sign = -1 if self._study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
        ordered = sorted(done, key=lambda trial: sign * float(trial.value or 0.0))
        return [(float(t.value or 0.0), dict(t.params)) for t in ordered]

    def _rebuild(self, runs: Mapping[Job, Run]) -> None:
        """Take up the trials that have runs; their missing seeds are next."""
        points = {job.point.trial: job.point for job in runs if job.point.trial is not None}
        for number in sorted(points):
            point = points[number]
            self._next = max(self._next, number + 1)
            self._study.enqueue_trial(self._params(point))
            self._asked[number] = self._study.ask(self._distributions)
            self._values[number] = {}
            for job in jobs_of([point], self._seeds):
                run = runs.get(job)
                if is_finished(run):
                    self.ended(job, run)
                else:
                    self._queue.append(job)
        self.total = max(self._trials, self._next) * len(self._seeds)

    def _params(self, point: Point) -> dict[str, Any]:
        """Return what Optuna drew for a point: numbers of intervals, texts of choices."""
        values = dict(point.values)
        params: dict[str, Any] = {}
        for key, given in self._ranges.items():
            text = values[next(iter(expand({key: None})))]
            if isinstance(given, Interval):
                params[key] = int(text) if given.whole else float(text)
            else:
                params[key] = text
        return params


def _distribution(given: Any) -> BaseDistribution:
    if not isinstance(given, Interval):
        return CategoricalDistribution([written(value) for value in given.values])
    if given.whole:
        step = 1 if given.step is None else int(given.step)
        return IntDistribution(int(given.low), int(given.high), log=given.log, step=step)
    return FloatDistribution(given.low, given.high, log=given.log, step=given.step)
