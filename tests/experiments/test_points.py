"""The points of a sweep, from its grid."""

from __future__ import annotations

import pytest

from muon_rl.experiments import grid_points, read_sweep


def test_a_grid_is_every_combination_in_the_order_of_its_keys():
    points = grid_points({"a": [1, 2], "b": ["x", "y"]})
    assert points == [
        {"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"},
    ]  # fmt: skip


def test_several_grids_are_one_after_the_other():
    assert grid_points([{"a": [1]}, {"b": [2, 3]}]) == [{"a": 1}, {"b": 2}, {"b": 3}]


def test_braces_move_keys_together():
    points = grid_points({"m.{actor,critic}.{lr,eps}": [0.1, 0.2]})
    keys = ["m.actor.lr", "m.actor.eps", "m.critic.lr", "m.critic.eps"]
    assert points == [dict.fromkeys(keys, 0.1), dict.fromkeys(keys, 0.2)]


def test_a_value_may_be_a_list():
    assert grid_points({"betas": [[0.9, 0.999]]}) == [{"betas": [0.9, 0.999]}]


@pytest.mark.parametrize("values", ["muon", [], 3, None])
def test_values_that_are_no_list_are_refused(values):
    with pytest.raises(ValueError, match=r"values of case must be a list of at least one"):
        grid_points({"case": values})


def test_a_file_without_its_keys_is_refused(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text("config: sac_layers\ngrids: {a: [1]}\n")
    with pytest.raises(ValueError, match=r"one of grid, points and ranges.* but has config, grids"):
        read_sweep(path)
    path.write_text("- 1\n")
    with pytest.raises(ValueError, match="no keys"):
        read_sweep(path)


def test_a_list_of_points_and_tasks_on_top(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "config: sac_layers\ntasks: [walker_walk]\n"
        "points:\n  - {'m.{actor,critic}.lr': 0.1}\n  - {clip: 0.2, betas: [0.9, 0.99]}\n"
    )
    sweep = read_sweep(path)
    assert (sweep.config, sweep.tasks, dict(sweep.ranges)) == ("sac_layers", ("walker_walk",), {})
    assert sweep.points == [
        {"m.actor.lr": 0.1, "m.critic.lr": 0.1}, {"clip": 0.2, "betas": [0.9, 0.99]},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("varied", "message"),
    [
        ("grid: {a: [1]}\npoints: [{a: 1}]", r"one of grid, points and ranges.* but has config, g"),
        ("points: {a: 1}", r"sweep.yaml: points must be a list of at least one"),
        ("points: [3]", r"A point must be values by dotted key, not 3"),
        ("points: [{'{a,b}': 1, b: 2}]", r"sets b twice"),
        ("grid: {a: [1", r"sweep.yaml is no YAML"),
    ],
)
def test_what_is_varied_is_checked(varied, message, tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(f"config: sac_layers\n{varied}\n")
    with pytest.raises(ValueError, match=message):
        read_sweep(path)
