"""A row's numbers and remarks, on runs that differ in what they lack."""

from __future__ import annotations

import pytest

NAN = float("nan")


def test_a_tag_counts_before_a_param_of_its_name(store):
    store.run([1.0], seed=3, params={"seed": 4, "optimizer": "adamw"}, tags={"optimizer": "muon"})
    store.run([2.0], seed=4, params={"seed": 4}, tags={"optimizer": "muon"})
    assert {label: row.seeds for label, row in store.rows().items()} == {"muon": 2}


def test_a_parent_whose_children_the_filter_leaves_out_is_a_parent_still(store):
    parent = store.run([50.0], seed=8, tags={"optimizer": "muon"})
    store.run([1.0], tags={"mlflow.parentRunId": parent, "optimizer": "adamw"})
    store.run([2.0], tags={"optimizer": "muon"})
    row = store.rows(where="tags.optimizer = 'muon'")["muon"]
    assert (row.runs, row.final_mean) == (1, 2.0)


def test_a_failed_run_is_left_out_once(store):
    store.group("muon", [1.0, 2.0])
    store.run([9.0], seed=2, status="FAILED", tags={"optimizer": "muon"})
    said = store.rows()["muon"].remarks
    assert "1 failed run left out" in said and "without eval/return" not in said


def test_tasks_are_normalised_by_their_lowest_and_highest_evaluation(store):
    """Walk goes from -30 to -10, hop is 7 throughout: a constant one is 0."""
    store.run([-30.0, -15.0], tags={"optimizer": "muon"})
    store.run([-20.0, -10.0], tags={"optimizer": "adamw"})
    for name in ("muon", "adamw"):
        store.run([7.0, 7.0], experiment="hop", tags={"optimizer": name})
    rows = store.rows("walk", "hop")
    assert rows["muon"].final_mean == pytest.approx((15 / 20 + 0) / 2)
    assert rows["adamw"].final_mean == pytest.approx((1 + 0) / 2)
    assert rows["adamw"].auc_iqm == pytest.approx((0.75 + 0) / 2)


def test_groups_that_are_tasks_keep_their_unit(store):
    store.run([500.0], tags={"optimizer": "muon", "task": "walk"})
    store.run([3.0], experiment="hop", tags={"optimizer": "muon", "task": "hop"})
    rows = store.rows("walk", "hop", group_by=["task"])
    assert {label: row.final_iqm for label, row in rows.items()} == {"hop": 3.0, "walk": 500.0}


def test_one_seed_has_an_improvement_without_an_interval(store):
    store.group("a", [1.0, 2.0, 3.0])
    store.group("b", [2.5])
    row = store.rows(baseline="a")["b"]
    assert row.improvement_probability == pytest.approx(2 / 3)
    assert row.improvement_low is row.improvement_high is None
    assert store.rows(baseline="b")["a"].improvement_low is None


def test_speed_is_the_median_over_runs(store):
    for seed, seconds in enumerate([10.0, 20.0, 100.0]):
        share = {"train/optimizer_share": [0.1 * 2**seed]}
        store.run([1.0], seed=seed, seconds=seconds, metrics=share, tags={"optimizer": "a"})
    row = store.rows()["a"]
    assert (row.frames_per_second, row.optimizer_share) == (50.0, 0.2)


def test_tuning_trials_that_differ_within_a_group_are_said(store):
    for seed, trials in enumerate([2, 10]):
        store.run([1.0], seed=seed, tags={"optimizer": "a", "tuning_trials": trials})
    assert "tuning trials differ: 2 and 10 in this group" in store.rows()["a"].remarks


@pytest.mark.parametrize("finals", [[1.0, 2, 3, 4, 5], [1.0, 2, 3, 4, 5, NAN]])
def test_a_nan_of_the_baseline_s_forbids_the_claim(store, finals):
    store.group("a", finals[:5])
    store.group("b", [11.0, 12, 13, 14, 15])
    if len(finals) > 5:  # a sixth evaluation of one of its runs
        (run, *_) = store.client.search_runs([store.experiments["walk"]], "tags.optimizer = 'a'")
        store.client.log_metric(run.info.run_id, "eval/return", NAN, step=4500)
    assert ("shown on" in store.rows(baseline="a")["b"].remarks) == (len(finals) == 5)


def test_tasks_with_unequal_seeds_are_said(store):
    store.group("a", [1.0, 2, 3])
    store.group("a", [1.0, 2], experiment="hop")
    row = store.rows("walk", "hop")["a"]
    assert row.seeds == 2 and "tasks have 2 to 3 seeds" in row.remarks
