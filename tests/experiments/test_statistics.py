"""The statistics of a comparison against hand-computed answers, scipy and rliable 1.2.0.

rliable's numbers were made by its own functions (numpy 2.4.6, pandas 2.3.3) on ``made(...)``:
``metrics.aggregate_iqm``, ``metrics.probability_of_improvement`` and
``library.get_interval_estimates`` with 100,000 (the IQM) and 20,000 resamples.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from muon_rl.experiments.statistics import (
    bootstrap_curves,
    bootstrap_improvement,
    coverage,
    iqm,
    percentile_interval,
    performance_profile,
    probability_of_improvement,
    stratified_bootstrap,
)


def made(seeds: int, tasks: int, shift: float = 0.0) -> np.ndarray:
    """Scores that need no random numbers, a row a task."""
    seed, task = np.arange(seeds), np.arange(tasks)[:, None]
    return np.sin(1.7 * seed + 2.3 * task) + 0.5 * task + shift


# seeds, tasks: IQM, its interval; probability over made(seeds + 2, tasks, -0.4), its interval;
# profile at -0.5, 0, 0.5, 1
RLIABLE = [
    (5, 1, 0.07952408303725898, (-0.70239016, 0.82581432),
     0.6571428571428571, (0.31428571, 0.94285714), (0.8, 0.4, 0.2, 0.0)),
    (5, 3, 0.4540249695686731, (0.05345702, 0.87959389),
     0.638095238095238, (0.43809524, 0.81904762), (14 / 15, 2 / 3, 7 / 15, 4 / 15)),
    (20, 2, 0.28624112891922543, (-0.03566306, 0.58785604),
     0.6670454545454545, (0.54659091, 0.77613636), (0.825, 0.55, 0.375, 0.15)),
]  # fmt: skip
case = pytest.mark.parametrize(
    ("seeds", "tasks", "middle", "interval", "chance", "chances", "profile"), RLIABLE
)


@case
def test_the_numbers_are_those_of_rliable(seeds, tasks, middle, interval, chance, chances, profile):
    ours, theirs = made(seeds, tasks), made(seeds + 2, tasks, -0.4)
    generator = np.random.default_rng(0)
    options = {"resamples": 20_000, "generator": generator}
    assert iqm(ours, axis=None) == pytest.approx(middle, abs=1e-12)
    assert probability_of_improvement(ours, theirs) == pytest.approx(chance, abs=1e-12)
    assert performance_profile(ours, [-0.5, 0, 0.5, 1]) == pytest.approx(profile, abs=1e-12)
    # Two bootstraps differ by their random numbers: 1.5% of the interval's width.
    found = percentile_interval(stratified_bootstrap(ours, iqm, **options))
    assert list(found) == pytest.approx(list(interval), abs=0.015 * (interval[1] - interval[0]))
    found = percentile_interval(bootstrap_improvement(ours, theirs, **options))
    assert list(found) == pytest.approx(list(chances), abs=0.03)


def test_the_iqm_is_the_mean_of_the_middle_half():
    assert iqm([7, -1e9, 1, 2, 3, 4, 1e9, 5]) == (2 + 3 + 4 + 5) / 4
    assert iqm([1.0, 2.0, 9.0]) == 4.0  # too few to leave any out
    assert iqm([[0, 1, 2, 99], [4, 4, 4, 4]]).tolist() == [1.5, 4.0]


def test_two_scores_are_resampled_as_the_binomial_says():
    samples = stratified_bootstrap(
        [[0.0, 1.0]], lambda x: x.mean(axis=1), resamples=20_000,
        generator=np.random.default_rng(1),
    )  # fmt: skip
    shares = [(samples == value).mean() for value in (0.0, 0.5, 1.0)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.01)


def test_each_task_keeps_its_number_of_seeds():
    """Unstratified, the share of the second task's scores would vary."""
    samples = stratified_bootstrap(
        [[0.0, 0.0, 0.0], [1.0]], lambda x: x.mean(axis=1), resamples=100,
        generator=np.random.default_rng(0),
    )  # fmt: skip
    assert (samples == 0.25).all()


def test_the_probability_is_the_mann_whitney_statistic_and_a_mean_over_tasks():
    x, y = np.array([1.0, 2, 2, 5, 9]), np.array([0.0, 2, 3, 5])
    u = mannwhitneyu(x, y).statistic / 20
    assert probability_of_improvement([x], [y]) == pytest.approx(u)
    both = probability_of_improvement([x, y], [y, np.array([-1.0])])
    assert both == pytest.approx((u + 1) / 2)


def test_the_same_generator_gives_the_same_interval():
    def interval(seed: int):
        options = {"resamples": 500, "generator": np.random.default_rng(seed)}
        return percentile_interval(stratified_bootstrap(made(6, 1), iqm, **options))

    assert interval(3) == interval(3)
    assert interval(3) != interval(4)


@pytest.mark.parametrize("seeds", [5, 20])
def test_the_interval_covers_what_is_said_of_it(seeds):
    """Of 2000 samples of a normal, whose IQM is 0; two standard errors are 1.4% and 1%."""
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        samples = stratified_bootstrap(
            [generator.normal(size=seeds)], iqm, resamples=1000, generator=generator
        )
        low, high = percentile_interval(samples)
        inside += low <= 0 <= high
    assert inside / 2000 == pytest.approx({5: 0.90, 20: 0.95}[seeds], abs=0.02)
    assert inside / 2000 == pytest.approx(coverage(seeds), abs=0.015)


@pytest.mark.parametrize(("seeds", "said"), [(5, 0.08), (20, 0.06)])
def test_groups_that_are_alike_are_told_apart_as_often_as_the_docs_say(seeds, said):
    """By an interval of the probability of improvement without 0.5; two standard errors are 2%."""
    generator = np.random.default_rng(0)
    shown = 0
    for _ in range(800):
        ours, theirs = generator.normal(size=(2, 1, seeds))
        samples = bootstrap_improvement(ours, theirs, resamples=400, generator=generator)
        low, high = percentile_interval(samples)
        shown += not low <= 0.5 <= high
    assert shown / 800 == pytest.approx(said, abs=0.02)


def test_curves_have_the_interval_of_each_point():
    rows = made(6, 3).T  # runs by points
    options = {"resamples": 20_000, "generator": np.random.default_rng(0)}
    low, high = bootstrap_curves([rows[:4], rows[4:]], iqm, **options)
    for point in range(3):
        options = {"resamples": 20_000, "generator": np.random.default_rng(1)}
        alone = percentile_interval(
            stratified_bootstrap([rows[:4, point], rows[4:, point]], iqm, **options)
        )
        assert [low[point], high[point]] == pytest.approx(list(alone), abs=0.06)


@pytest.mark.parametrize("scores", [[], [[]], [[1.0], []], [[[1.0]]]])
def test_no_score_is_an_error(scores):
    with pytest.raises(ValueError, match=r"Each task needs its scores, of shape \(seeds,\)"):
        stratified_bootstrap(scores, iqm, resamples=2, generator=np.random.default_rng(0))


def test_sides_with_different_tasks_are_an_error():
    with pytest.raises(ValueError, match="Both sides need the same tasks, but have 2 and 1"):
        probability_of_improvement([[1.0], [2.0]], [[1.0]])
