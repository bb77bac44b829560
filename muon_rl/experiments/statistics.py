"""Interquartile means, bootstrap intervals and the probability of improvement, over few seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import trim_mean

Floats = NDArray[np.float64]

# How often the 95% percentile-bootstrap interval of the IQM holds the true one, by number of
# seeds: measured on normal scores by `python benchmarks/interval_coverage.py`.
COVERAGE = {3: 0.75, 5: 0.89, 10: 0.93, 20: 0.94, 50: 0.95}


class Interval(NamedTuple):
    """The lower and the upper end of an interval."""

    low: float
    high: float


def iqm(scores: ArrayLike, axis: int | None = -1) -> Floats:
    """Return the interquartile mean: the mean of the middle half of the scores.

    The ``floor(n / 4)`` lowest and as many of the highest of ``n`` scores are left out, so that
    below four scores it is their mean.

    Args:
        scores: any unit, shape ``(*batch, n)``.
        axis: over which; ``None`` is over all scores.

    Returns:
        The unit of the scores, shape ``(*batch,)``.

    Example:
        >>> float(iqm([0.0, 1.0, 2.0, 100.0]))
        1.5

    Source: Agarwal et al. 2021, arXiv:2108.13264, section 4.3.
    """
    return np.asarray(trim_mean(np.asarray(scores, float), 0.25, axis=axis))


def stratified_bootstrap(
    scores: Sequence[ArrayLike],
    statistic: Callable[[Floats], Floats],
    *,
    resamples: int,
    generator: np.random.Generator,
) -> Floats:
    """Return a statistic on resampled scores, each task's drawn from its own with replacement.

    Args:
        scores: of each task, shape ``(seeds of the task,)``; tasks may differ in their seeds.
        statistic: takes ``(resamples, seeds of all tasks)`` to ``(resamples,)``, as :func:`iqm`.
        resamples: how often.
        generator: of the random numbers: the same one gives the same samples.

    Returns:
        One value a resample, shape ``(resamples,)``.

    Raises:
        ValueError: if there is no score, or a task without any.

    Source: Agarwal et al. 2021, arXiv:2108.13264, section 4.1.
    """
    drawn = [_drawn(task, resamples, generator) for task in _tasks(scores)]
    return statistic(np.concatenate(drawn, axis=1))


def percentile_interval(samples: ArrayLike, level: float = 0.95) -> Interval:
    """Return the interval between two percentiles that holds this share of the samples.

    Args:
        samples: of a bootstrap, shape ``(resamples,)``.
        level: share inside, between 0 and 1.

    Example:
        >>> percentile_interval(range(101), 0.5)
        Interval(low=25.0, high=75.0)

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    low, high = np.quantile(np.asarray(samples, float), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def probability_of_improvement(scores: Sequence[ArrayLike], baseline: Sequence[ArrayLike]) -> float:
    """Return how probably a run scores above one of the baseline, ties counted half.

    The mean over tasks of ``mean over i, j of [x_i > y_j] + [x_i = y_j] / 2``, which is the
    Mann-Whitney statistic U over the number of pairs.

    Args:
        scores: ``x``, of each task, shape ``(seeds,)``.
        baseline: ``y``, of the same tasks, shape ``(seeds of the baseline,)``.

    Raises:
        ValueError: if they have not the same number of tasks, or a task has no score.

    Example:
        >>> probability_of_improvement([[1.0, 3.0]], [[2.0, 3.0]])
        0.375

    Source: Agarwal et al. 2021, arXiv:2108.13264, section 4.3.
    """
    return float(np.mean([wins.mean() for wins in _wins(scores, baseline)]))


def bootstrap_improvement(
    scores: Sequence[ArrayLike],
    baseline: Sequence[ArrayLike],
    *,
    resamples: int,
    generator: np.random.Generator,
) -> Floats:
    """Return the probability of improvement on resampled runs, both sides drawn within each task.

    Args:
        scores: of each task, shape ``(seeds,)``.
        baseline: of the same tasks, shape ``(seeds of the baseline,)``.
        resamples: how often.
        generator: of the random numbers.

    Returns:
        One probability a resample, shape ``(resamples,)``.

    Raises:
        ValueError: if they have not the same number of tasks, or a task has no score.
    """
    total = np.zeros(resamples)
    wins = _wins(scores, baseline)
    for win in wins:
        # How often each run is drawn says all: no resample has to be laid out.
        rows, columns = (
            generator.multinomial(n, np.full(n, 1 / n), size=resamples) for n in win.shape
        )
        total += ((rows @ win) * columns).sum(axis=1) / win.size
    return total / len(wins)


def performance_profile(scores: Sequence[ArrayLike], thresholds: ArrayLike) -> Floats:
    """Return which share of the runs scores above each threshold, as a mean over tasks.

    Args:
        scores: of each task, normalised so that tasks share a scale, shape ``(seeds,)``.
        thresholds: in the scores' unit, shape ``(thresholds,)``.

    Returns:
        Shares between 0 and 1, shape ``(thresholds,)``.

    Raises:
        ValueError: if there is no score, or a task without any.

    Example:
        >>> performance_profile([[0.2, 0.8], [0.5]], [0.1, 0.6]).tolist()
        [1.0, 0.25]

    Source: Agarwal et al. 2021, arXiv:2108.13264, section 4.2, eq. 1.
    """
    limits = np.asarray(thresholds, float)
    return np.mean([(task[:, None] > limits).mean(axis=0) for task in _tasks(scores)], axis=0)


def bootstrap_curves(
    tasks: Sequence[ArrayLike],
    statistic: Callable[[Floats], Floats],
    *,
    resamples: int,
    generator: np.random.Generator,
    level: float = 0.95,
) -> tuple[Floats, Floats]:
    """Return the percentile interval of a statistic at each point of several runs' curves.

    A resample draws whole runs of each task, the same ones at every point.

    Args:
        tasks: of each task its runs' values, shape ``(seeds, points)``.
        statistic: takes ``(resamples, seeds of all tasks)`` to ``(resamples,)``.
        resamples: how often.
        generator: of the random numbers.
        level: share of the samples inside.

    Returns:
        Lower and upper ends, each of shape ``(points,)``.
    """
    curves = [np.asarray(task, float) for task in tasks]
    drawn = [generator.integers(len(task), size=(resamples, len(task))) for task in curves]
    ends = [
        percentile_interval(
            statistic(
                np.concatenate(
                    [task[:, point][runs] for task, runs in zip(curves, drawn, strict=True)], axis=1
                )
            ),
            level,
        )
        for point in range(curves[0].shape[1])
    ]
    return np.array([end.low for end in ends]), np.array([end.high for end in ends])


def coverage(seeds: int) -> float | None:
    """Return about how often the interval over so many seeds holds the true IQM, as measured.

    Args:
        seeds: of a group; between two measured numbers the lower one counts.

    Returns:
        A share, or ``None`` below the lowest measured number.
    """
    return next((COVERAGE[n] for n in sorted(COVERAGE, reverse=True) if n <= seeds), None)


def _tasks(scores: Sequence[ArrayLike]) -> list[Floats]:
    tasks = [np.asarray(task, float) for task in scores]
    if not tasks or any(task.ndim != 1 or not task.size for task in tasks):
        shapes = [task.shape for task in tasks]
        raise ValueError(f"Each task needs its scores, of shape (seeds,), but they have {shapes}.")
    return tasks


def _drawn(task: Floats, resamples: int, generator: np.random.Generator) -> Floats:
    return task[generator.integers(task.size, size=(resamples, task.size))]


def _wins(scores: Sequence[ArrayLike], baseline: Sequence[ArrayLike]) -> list[Floats]:
    ours, theirs = _tasks(scores), _tasks(baseline)
    if len(ours) != len(theirs):
        raise ValueError(
            f"Both sides need the same tasks, but have {len(ours)} and {len(theirs)} of them."
        )
    return [(x[:, None] > y) + 0.5 * (x[:, None] == y) for x, y in zip(ours, theirs, strict=True)]
