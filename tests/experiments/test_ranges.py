"""The ranges of a search, and that all that the shipped ones allow can be built."""

from __future__ import annotations

import json
import math
import random

import pytest

from muon_rl.cli import recipes
from muon_rl.cli.recipe_cli import RecipeCLI
from muon_rl.cli.training import with_recipe_paths
from muon_rl.experiments import (
    Choice,
    Interval,
    corner_points,
    draw_point,
    expand,
    read_ranges,
    read_sweep,
)

SHIPPED = {name: read_sweep(path) for name, path in recipes.sweeps().items()}
SEARCHES = {name: sweep for name, sweep in SHIPPED.items() if sweep.ranges}


def only(**fields) -> Interval:
    (found,) = read_ranges({"a.lr": fields}).values()
    return found


def test_a_range_is_a_number_between_two_or_one_of_a_list():
    ranges = read_ranges({"lr": {"low": "1e-4", "high": 1, "log": True}, "heads": [2, 4, 8]})
    assert ranges == {"lr": Interval(0.0001, 1, log=True), "heads": Choice((2, 4, 8))}
    assert only(low=2, high=8, int=True) == Interval(2, 8, step=1, whole=True)
    assert only(low=32, high=128, step=32) == Interval(32, 128, step=32, whole=True)
    assert only(low=0.0, high=0.3, step=0.1) == Interval(0.0, 0.3, step=0.1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"low": 2, "high": 2}, r"low must be below high, but a.lr has low 2 and high 2"),
        ({"low": 0, "high": 1, "log": True}, r"log needs a low above 0, but a.lr has low 0"),
        ({"low": 0.5, "high": 8, "int": True}, r"a.lr has int: true, but 0.5, 8 are not whole"),
        ({"low": 1, "high": 8, "step": 2}, r"step must divide .* a.lr has low 1, high 8 and step"),
        ({"low": 1, "high": 8, "step": 0}, r"step must divide"),
        ({"low": 1, "high": 8, "step": 1, "log": True}, r"a.lr has both log and step"),
        ({"low": "small", "high": 8}, r"low of a.lr must be a number, but is 'small'"),
        ({"low": 1, "high": math.inf}, r"high of a.lr must be finite"),
        ({"low": 1, "high": 8, "log": "yes please"}, r"log of a.lr must be true or false"),
        ({"low": 1, "heigh": 8}, r"range of a.lr must be a list of values, or have low and high"),
        (3, r"range of a.lr must be a list"),
        ([], r"range of a.lr is a list, but an empty one"),
    ],
)
def test_a_range_that_is_none_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        read_ranges({"a.lr": given})


def test_draws_fill_a_range_and_stay_in_it():
    generator = random.Random(0)

    def drawn(interval):
        return [interval.draw(generator) for _ in range(4000)]

    assert set(drawn(only(low=2, high=5, int=True))) == {2, 3, 4, 5}
    assert set(drawn(only(low=32, high=128, step=32))) == {32, 64, 96, 128}
    assert set(drawn(only(low=1, high=4, int=True, log=True))) == {1, 2, 3, 4}
    assert set(drawn(Choice(("a", "b")))) == {"a", "b"}
    rates = drawn(only(low=0.0001, high=0.01, log=True))
    assert 0.0001 <= min(rates) < max(rates) <= 0.01
    # Half of the draws lie below the geometric mean.
    assert sum(rate < 0.001 for rate in rates) / 4000 == pytest.approx(0.5, abs=0.03)
    clips = drawn(only(low=0.1, high=0.3))
    assert 0.1 <= min(clips) < max(clips) <= 0.3
    assert sum(clip < 0.2 for clip in clips) / 4000 == pytest.approx(0.5, abs=0.03)


def build(sweep, point):
    values = [f"--{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in point.items()]
    return RecipeCLI(with_recipe_paths(["fit", f"--config={sweep.config}", *values]))


@pytest.mark.parametrize("name", SEARCHES)
def test_corners_and_draws_of_a_shipped_search_build(name, workspace):
    sweep = SEARCHES[name]
    generator = random.Random(name)
    corners = [expand(point) for point in corner_points(sweep.ranges)]
    assert len(corners) == 2 ** len(sweep.ranges)
    points = [corners[0], corners[-1], *generator.sample(corners, 4)]
    points += [expand(draw_point(sweep.ranges, generator)) for _ in range(4)]
    for point in points:
        cli = build(sweep, point)
        groups = {group["name"]: group for group in cli.model.build_optimizer().param_groups}
        rate = point["model.optimizer.actor.lr"]
        for group in set(groups) - {"trunk/muon"}:
            assert groups[group]["lr"] == pytest.approx(rate)
        if "trunk/muon" in groups:
            assert groups["trunk/muon"]["lr"] == point["model.optimizer.trunk.muon.lr"]
            assert groups["trunk/muon"]["momentum"] == point["model.optimizer.trunk.muon.momentum"]
        data = cli.datamodule
        assert data.updates_per_rate == point["data.epochs"] * point["data.minibatches"]
        assert data.steps_per_rollout % data.minibatches == 0
    # What they move is what was to be tuned, no more and no less in either.
    assert {"muon": 10, "adam": 9}[name.split("_")[-1]] == len(sweep.ranges)
