"""``muon-rl compare`` on runs that were written with MLflow's own client."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.store.tracking.dbmodels.models import SqlMetric, SqlRun, SqlTag
from plain_store import START
from scipy.stats import trim_mean
from sqlalchemy import create_engine, insert

from muon_rl.cli import ConfigError, main
from muon_rl.cli.compare import main as compare_main

NAN = float("nan")
COLUMNS = (
    "group,runs,seeds,failed,frames,final_iqm,final_iqm_low,final_iqm_high,final_mean,final_median,"
    "auc_iqm,auc_iqm_low,auc_iqm_high,improvement_probability,improvement_low,improvement_high,"
    "frames_to_threshold,seconds_to_threshold,frames_per_second,optimizer_share,remarks"
)


def number(row: dict, column: str) -> float:
    return float(row[column])


def test_the_table_has_the_promised_columns_and_hand_computed_numbers(store):
    """Runs on straight lines: the mean of a curve is 3/5 of its end."""
    muon, adamw = [500.0, 700, 800, 900, 1000, 300], [400.0, 450, 500, 550, 600]
    share = {"train/optimizer_share": [0.2, 0.3]}
    store.group("muon", muon, metrics=share)
    store.group("adamw", adamw, metrics={"train/frames_per_second": [60.0, 80.0]})
    rows = store.compare("--baseline=adamw", "--threshold=480")
    with open("out/summary.csv") as file:
        assert file.readline().rstrip("\n") == COLUMNS
    assert list(rows) == ["adamw", "muon"]  # the baseline first
    for name, finals in (("muon", muon), ("adamw", adamw)):
        row = rows[name]
        assert [row[c] for c in ("runs", "seeds", "failed", "frames")] == [
            str(len(finals)), str(len(finals)), "0", "5000",
        ]  # fmt: skip
        middle = trim_mean(finals, 0.25)
        assert number(row, "final_iqm") == pytest.approx(middle)
        assert number(row, "auc_iqm") == pytest.approx(0.6 * middle)
        assert number(row, "final_mean") == pytest.approx(np.mean(finals))
        assert number(row, "final_median") == pytest.approx(np.median(finals))
        assert min(finals) <= number(row, "final_iqm_low") < middle
        assert middle < number(row, "final_iqm_high") <= max(finals)
        # A straight line's area has the same spread.
        assert number(row, "auc_iqm_low") == pytest.approx(0.6 * number(row, "final_iqm_low"))
    assert number(rows["muon"], "improvement_probability") == pytest.approx(
        np.mean([(m > a) + 0.5 * (m == a) for m in muon for a in adamw])
    )
    low, high = (number(rows["muon"], f"improvement_{end}") for end in ("low", "high"))
    assert 0.3 < low < 0.7 < high <= 1
    assert all(rows["adamw"][f"improvement_{end}"] == "" for end in ("probability", "low", "high"))
    # 480 is first reached at evaluation ceil(5 · 480 / end): 5, 4, 3, 3, 3, never; median 3.5
    assert number(rows["muon"], "frames_to_threshold") == 3500
    assert number(rows["muon"], "seconds_to_threshold") == 35
    assert number(rows["adamw"], "frames_to_threshold") == 5000  # two of five never do
    assert number(rows["muon"], "optimizer_share") == pytest.approx(0.25)
    assert rows["adamw"]["optimizer_share"] == ""
    assert number(rows["muon"], "frames_per_second") == pytest.approx(100)  # 1000 in 10 s
    assert number(rows["adamw"], "frames_per_second") == pytest.approx(70)


def test_what_was_not_asked_for_is_empty(store):
    store.group("muon", [1.0, 2, 3, 4, 5])
    row = store.compare()["muon"]
    asked = ("improvement_probability", "improvement_low", "improvement_high",
             "frames_to_threshold", "seconds_to_threshold", "optimizer_share")  # fmt: skip
    assert all(row[column] == "" for column in asked)


def test_a_threshold_that_half_of_the_seeds_reach_is_empty(store):
    store.group("half", [10.0, 10, 1, 1])
    store.group("most", [10.0, 10, 10, 1])
    rows = store.compare("--threshold=10")
    assert rows["half"]["frames_to_threshold"] == rows["half"]["seconds_to_threshold"] == ""
    assert number(rows["most"], "frames_to_threshold") == 5000
    assert "2 of 4 runs did not reach the threshold" in rows["half"]["remarks"]


def test_the_threshold_itself_is_told(store, capsys):
    store.group("muon", [1.0, 2, 3, 4, 5])
    store.compare("--threshold=2.5")
    assert "Threshold: 2.5." in capsys.readouterr().out
    store.compare()
    assert "Threshold" not in capsys.readouterr().out


def test_runs_that_end_alike_are_remarked(store):
    store.group("alike", [3.0] * 5)
    store.group("other", [3.0, 3, 3, 3, 4])
    store.group("single", [3.0])
    remarks = {name: row["remarks"] for name, row in store.compare().items()}
    assert "all 5 runs end with the same score: do they differ at all?" in remarks["alike"]
    assert "same score" not in remarks["other"] + remarks["single"]


def test_unequal_budgets_share_the_frames_of_the_shortest(store):
    store.run([1, 2, 3, 4, 50, 60], tags={"optimizer": "long"})
    store.run([5, 6, 7], tags={"optimizer": "short"})
    rows = store.compare()
    assert number(rows["long"], "auc_iqm") == 2
    assert number(rows["short"], "auc_iqm") == 6
    assert (rows["long"]["frames"], rows["short"]["frames"]) == ("6000", "3000")
    assert number(rows["long"], "final_iqm") == 60
    said = "budgets differ: 6,000 frames here, 3,000 in other groups"
    assert said in rows["long"]["remarks"]


def test_unequal_budgets_within_a_group_are_said(store):
    store.run([1, 2, 3], tags={"optimizer": "muon"})
    store.run([1, 2], seed=1, tags={"optimizer": "muon"})
    row = store.compare()["muon"]
    assert row["frames"] == "2000"
    assert "budgets differ: 2,000 to 3,000 frames in this group" in row["remarks"]


def test_evaluations_at_other_frames_are_joined_by_lines(store):
    """Frames 1000, 1500, 2000, 3000: 10, 15, 20, 30 on one's own line and 1, 1, 1, 1."""
    store.run([10, 20, 30], tags={"optimizer": "thousands"})
    store.run([1, 1], every=1500, tags={"optimizer": "halves"})
    rows = store.compare()
    # From the first frame that both have, 1500.
    assert number(rows["thousands"], "auc_iqm") == pytest.approx((15 + 20 + 30) / 3)
    assert number(rows["halves"], "auc_iqm") == 1


def test_the_last_evaluations_count_as_final(store):
    store.run([0, 1, 2, 6], tags={"optimizer": "muon"})
    assert number(store.compare()["muon"], "final_mean") == 6
    assert number(store.compare("--last=3")["muon"], "final_mean") == 3
    assert "1 run with fewer than 9 evaluations" in store.compare("--last=9")["muon"]["remarks"]


def test_a_smaller_budget_leaves_out_what_came_later(store, capsys):
    store.run([1, 5, 3, 9, 8, 9], tags={"optimizer": "fast"})
    store.run([0, 2, 8, 8], every=1500, tags={"optimizer": "slow"})
    store.run([7], every=6000, tags={"optimizer": "late"})
    rows = store.compare("--until=3_000", "--threshold=6")
    assert [rows[name]["frames"] for name in ("fast", "slow")] == ["3000", "3000"]
    assert [number(rows[name], "final_mean") for name in ("fast", "slow")] == [3, 2]
    # Frames 1500, 2000 and 3000 are shared: 3, 5 and 3 on one's lines.
    assert number(rows["fast"], "auc_iqm") == pytest.approx(11 / 3)
    assert rows["fast"]["frames_to_threshold"] == ""  # 9 came after
    assert "budgets differ" not in rows["fast"]["remarks"] + rows["slow"]["remarks"]
    assert "1 run without eval/return up to frame 3,000 left out" in rows["late"]["remarks"]
    assert "the last evaluation of a run up to frame 3,000" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        store.compare("--until=999")
    error = capsys.readouterr().err
    assert "No finished run has a number for 'eval/return' up to frame 999 (--until)" in error


def test_a_claim_at_a_smaller_budget_says_so_and_needs_equal_whole_ones(store):
    for seed in range(5):
        store.run([seed, 50 + seed], seed=seed, tags={"optimizer": "a"})
        store.run([10 + seed, 40 - seed], seed=seed, tags={"optimizer": "b"})
    claim = "shown on walk with 5 seeds each and equal budgets{}: final eval/return {} a's in 100%"
    early = store.compare("--baseline=a", "--until=1000")["b"]["remarks"]
    assert claim.format(" up to frame 1,000", "above") in early
    assert claim.format("", "below") in store.compare("--baseline=a")["b"]["remarks"]
    for seed in range(5):
        store.run([20 + seed, 30] + [30] * (seed > 3), seed=seed, tags={"optimizer": "c"})
    rows = store.compare("--baseline=a", "--until=1000")
    assert "whole budgets differ: 2,000 to 3,000 frames in this group" in rows["c"]["remarks"]
    assert "whole budgets differ: 2,000 frames here, 2,000 to 3,000" in rows["b"]["remarks"]
    for row in rows.values():
        assert "; budgets differ" not in "; " + row["remarks"]
        assert "shown on" not in row["remarks"]
    assert "whole" not in store.compare("--baseline=a")["c"]["remarks"]


def test_failed_and_unfinished_runs_are_counted_and_left_out(store):
    store.group("muon", [10.0] * 5)
    for seed, status in enumerate(["FAILED", "KILLED", None], start=5):
        store.run([999.0] * 5, seed=seed, status=status, tags={"optimizer": "muon"})
    store.run([1.0], seed=0, status="FAILED", tags={"optimizer": "lost"})
    rows = store.compare()
    row = rows["muon"]
    assert (row["runs"], row["seeds"], row["failed"]) == ("5", "5", "3")
    assert number(row, "final_mean") == 10
    for words in ("1 failed run left out", "1 killed run left out", "1 running run left out"):
        assert words in row["remarks"]
    assert (rows["lost"]["runs"], rows["lost"]["failed"], rows["lost"]["final_iqm"]) == (
        "0", "1", "",
    )  # fmt: skip
    assert "pilot: no claim" in rows["lost"]["remarks"]


def test_of_a_doubled_seed_the_newest_finished_run_counts(store):
    tags = {"optimizer": "muon"}
    store.run([2.0], seed=3, start=START + 1000, tags=tags)
    store.run([1.0], seed=3, start=START, tags=tags)
    store.run([9.0], seed=3, start=START + 2000, status="FAILED", tags=tags)
    row = store.compare()["muon"]
    assert (row["runs"], row["seeds"], row["failed"]) == ("2", "1", "1")
    assert number(row, "final_mean") == 2
    assert "seed 3 twice: the newest finished run counts" in row["remarks"]


def test_points_of_a_sweep_that_fall_into_one_group_are_told_apart_by_a_key(store):
    for point in ("lr=0.01", "lr=0.02"):
        for seed in (0, 1):
            store.run([1.0], seed=seed, tags={"optimizer": "muon", "point": point})
    store.run([1.0], seed=2, tags={"optimizer": "muon"})  # of no sweep
    words = "2 points of a sweep in one: --group-by point parts them"
    assert words in store.compare()["muon"]["remarks"]
    rows = store.compare("--group-by", "point")
    assert len(rows) == 3
    assert not any("--group-by" in row["remarks"] for row in rows.values())


def test_a_seed_may_be_a_tag_or_a_param_or_missing(store):
    tags = {"optimizer": "muon"}
    store.run([1.0], seed=None, params={"seed": 7}, tags=tags)
    store.run([2.0], seed=7, start=START + 1, tags=tags)
    row = store.compare()["muon"]
    assert (row["runs"], row["seeds"], row["final_mean"]) == ("2", "1", "2.0")
    store.run([5.0], seed=None, tags=tags)
    store.run([5.0], seed=None, tags=tags)
    row = store.compare()["muon"]
    assert (row["runs"], row["seeds"], row["final_mean"]) == ("4", "3", "4.0")
    assert "2 runs without the tag or param seed: each counts as a seed" in row["remarks"]


def test_deleted_runs_parents_and_comparisons_are_never_counted(store):
    tags = {"optimizer": "muon"}
    parent = store.run([50.0], seed=8, tags=tags)
    store.run([50.0], seed=9, tags={"muon_rl.kind": "sweep", **tags})
    store.run([50.0], seed=10, tags={"muon_rl.kind": "comparison", **tags})
    store.client.delete_run(store.run([50.0], seed=11, tags=tags))
    store.run([1.0], seed=0, tags={"mlflow.parentRunId": parent, **tags})
    row = store.compare()["muon"]
    assert (row["runs"], row["seeds"], row["failed"], row["final_mean"]) == ("1", "1", "0", "1.0")


def test_a_nan_is_left_out_and_said_never_read_as_zero(store):
    tags = {"optimizer": "muon"}
    store.run([4.0, NAN, 8.0], tags=tags)
    store.run([4.0, 6.0, NAN], seed=1, tags=tags)
    store.run([NAN, NAN], seed=2, tags=tags)
    row = store.compare("--threshold=-1")["muon"]
    assert (row["runs"], row["seeds"], row["frames"]) == ("3", "2", "3000")
    assert number(row, "final_mean") == 7
    assert number(row, "auc_iqm") == pytest.approx(((4 + 6 + 8) / 3 + (4 + 6 + 6) / 3) / 2)
    assert "2 values were NaN and left out" in row["remarks"]
    assert "1 run ended without a number" in row["remarks"]
    assert "1 run without a finite value left out" in row["remarks"]


def test_a_finished_run_without_the_metric_is_counted_left_out_and_said(store):
    store.run([1.0, 2.0], tags={"optimizer": "muon"})
    store.run([9.0], seed=1, metric="train/loss", tags={"optimizer": "muon"})
    row = store.compare()["muon"]
    assert (row["runs"], row["seeds"], row["final_mean"]) == ("2", "1", "2.0")
    assert "1 run without eval/return left out" in row["remarks"]


def test_an_infinite_value_is_left_out_and_said(store):
    store.run([1.0, math.inf, 3.0], tags={"optimizer": "muon"})
    row = store.compare()["muon"]
    assert number(row, "auc_iqm") == 2
    assert "1 value was infinite and left out" in row["remarks"]


def test_of_two_values_at_a_frame_the_newest_counts(store):
    run = store.run([1.0, 2.0], tags={"optimizer": "muon"})
    store.client.log_metric(run, "eval/return", 7.0, timestamp=START + 50_000, step=2000)
    store.client.log_metric(run, "eval/return", 9.0, timestamp=START + 15_000, step=2000)
    assert number(store.compare()["muon"], "final_mean") == 7


def test_one_seed_has_no_interval_and_is_a_pilot(store):
    store.group("muon", [3.0])
    row = store.compare()["muon"]
    assert (row["final_iqm"], row["final_iqm_low"], row["auc_iqm_high"]) == ("3.0", "", "")
    assert "pilot: no claim (1 seed)" in row["remarks"]


def test_five_seeds_are_no_pilot_and_the_interval_is_said_to_be_short(store):
    store.group("five", [1.0, 2, 3, 4, 5])
    store.group("four", [1.0, 2, 3, 4])
    store.group("fifty", range(50))
    rows = store.compare()
    assert "covers" not in rows["fifty"]["remarks"]
    assert "pilot" not in rows["five"]["remarks"]
    assert "5 seeds: the 95% interval covers about 89%" in rows["five"]["remarks"]
    assert "pilot: no claim (4 seeds)" in rows["four"]["remarks"]


def test_overlapping_intervals_are_said(store):
    store.group("a", [1.0, 2, 3, 4, 5])
    store.group("b", [2.0, 3, 4, 5, 6])
    store.group("c", [100.0, 101, 102, 103, 104])
    rows = store.compare("--baseline=a")
    assert "interval overlaps the baseline's" in rows["b"]["remarks"]
    assert "holds 0.5: no difference shown" in rows["b"]["remarks"]
    assert "overlaps" not in rows["c"]["remarks"]
    assert "overlaps that of b" in store.compare()["a"]["remarks"]


def test_unequal_tuning_and_other_seeds_are_said(store):
    store.group("a", [1.0, 2, 3, 4, 5], tags={"tuning_trials": 10})
    store.group("b", [2.0, 3, 4, 5, 6], tags={"tuning_trials": 2}, first_seed=1)
    rows = store.compare("--baseline=a")
    assert "tuning trials differ: 2 here, 10 in other groups" in rows["b"]["remarks"]
    assert "seeds differ from the baseline's" in rows["b"]["remarks"]


CLAIM = "shown on walk with 5 seeds each and equal budgets: final eval/return above a's in 100%"


def test_a_claim_is_made_where_nothing_speaks_against_it(store):
    store.group("a", [1.0, 2, 3, 4, 5])
    store.group("b", [11.0, 12, 13, 14, 15])
    rows = store.compare("--baseline=a")
    assert CLAIM in rows["b"]["remarks"]
    assert "shown" not in rows["a"]["remarks"]
    assert "below b's in 100%" in store.compare("--baseline=b")["a"]["remarks"]


@pytest.mark.parametrize(
    "doubt",
    [
        {"finals": [11.0, 12, 13, 14]},  # four seeds
        {"first_seed": 1},
        {"every": 2000},  # a larger budget
        {"tags": {"tuning_trials": 50}},
        {"finals": [11.0, 12, 13, 14, NAN]},
        {"finals": [1.1, 2.1, 3.1, 4.1, 5.1]},  # no difference
    ],
    ids=["pilot", "other seeds", "budget", "tuning", "nan", "overlap"],
)
def test_no_claim_is_made_where_something_speaks_against_it(store, doubt):
    store.group("a", [1.0, 2, 3, 4, 5])
    options = {"finals": [11.0, 12, 13, 14, 15], **doubt}
    store.group("b", options.pop("finals"), **options)
    assert "shown on" not in store.compare("--baseline=a")["b"]["remarks"]


@pytest.mark.parametrize("where", ["a", "b"])
def test_a_failed_run_of_either_side_forbids_the_claim(store, where):
    store.group("a", [1.0, 2, 3, 4, 5])
    store.group("b", [11.0, 12, 13, 14, 15])
    store.run([1.0], seed=5, status="FAILED", tags={"optimizer": where})
    assert "shown on" not in store.compare("--baseline=a")["b"]["remarks"]


def test_the_same_data_and_seed_give_the_same_file_whatever_the_order(store, tmp_path):
    finals = [3.0, 1, 4, 1.5, 9, 2.6]
    store.group("muon", finals)
    store.compare("--seed=1")
    first = (tmp_path / "out" / "summary.csv").read_bytes()
    store.compare("--seed=1")
    assert (tmp_path / "out" / "summary.csv").read_bytes() == first
    store.compare("--seed=2")
    assert (tmp_path / "out" / "summary.csv").read_bytes() != first
    for seed in reversed(range(6)):  # written the other way round
        store.run(
            [finals[seed] * i / 5 for i in range(1, 6)], seed=seed, experiment="again",
            tags={"optimizer": "muon"},
        )  # fmt: skip
    store.compare("--seed=1", experiments=["again"])
    assert (tmp_path / "out" / "summary.csv").read_bytes() == first


def test_groups_by_several_keys_and_params(store):
    for index, (optimizer, lr) in enumerate([("muon", 0.02), ("muon", 0.1), ("adamw", 0.02)]):
        store.run(
            [1.0 + index], tags={"optimizer": optimizer}, params={"model.optimizer.critic.lr": lr}
        )
    store.run([9.0], tags={"optimizer": "sgd"})
    rows = store.compare("--group-by", "model.init_args.optimizer.critic.lr")
    assert set(rows) == {
        "optimizer=muon, model.optimizer.critic.lr=0.02",
        "optimizer=muon, model.optimizer.critic.lr=0.1",
        "optimizer=adamw, model.optimizer.critic.lr=0.02",
        "optimizer=sgd, model.optimizer.critic.lr=(none)",
    }
    row = rows["optimizer=sgd, model.optimizer.critic.lr=(none)"]
    assert "these runs lack what is grouped by" in row["remarks"]
    rows = store.compare("--group-by", "model.optimizer.critic.lr", "--baseline=adamw,0.02")
    assert next(iter(rows)) == "optimizer=adamw, model.optimizer.critic.lr=0.02"


def test_groups_by_method_where_nothing_is_said(store, tmp_path):
    store.run([1.0], tags={"optimizer": "muon", "method": "sac_muon"})
    main(["compare", "walk", "--no-log", "--output=here"])
    with (tmp_path / "here" / "summary.csv").open() as file:
        assert [row["group"] for row in csv.DictReader(file)] == ["sac_muon"]


def test_several_tasks_are_normalised_and_count_together(store):
    """Walk from 0 to 100, hop from 0 to 2: as shares 0.5, 1 and 0.25, 0.75."""
    for seed, (walk, hop) in enumerate([(50.0, 0.5), (100.0, 1.5)]):
        store.run([0.0, walk], seed=seed, tags={"optimizer": "muon"})
        store.run([0.0, hop], seed=seed, experiment="hop", tags={"optimizer": "muon"})
    store.run([0.0, 0.0], experiment="hop", tags={"optimizer": "adamw"})
    rows = store.compare("--normalize", "hop=0:2", experiments=["walk", "hop"])
    assert number(rows["muon"], "final_mean") == pytest.approx((0.5 + 1 + 0.25 + 0.75) / 4)
    assert (rows["muon"]["runs"], rows["muon"]["seeds"]) == ("4", "2")
    assert "no run on walk" in rows["adamw"]["remarks"]
    rows = store.compare("--baseline=adamw", experiments=["walk", "hop"])
    assert number(rows["muon"], "improvement_probability") == 1  # on hop, which both have
    rows = store.compare("--normalize=0:200")
    assert number(rows["muon"], "final_mean") == pytest.approx(0.375)


def test_a_filter_leaves_runs_out(store):
    store.group("muon", [1.0, 2.0])
    assert store.compare("--filter", "tags.seed = '1'")["muon"]["final_mean"] == "2.0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["wlak"], "no experiment 'wlak' .* did you mean walk"),
        (["empty"], "There is no run in empty"),
        (["dead"], "None of the 1 runs is FINISHED: they are RUNNING"),
        (["walk", "--metric=eval/retrun"], "'eval/retrun'; they have eval/return"),
        (["walk", "--group-by=optimiser"], "'optimiser': did you mean optimizer"),
        (["walk", "--baseline=moun"], "no group 'moun': did you mean muon"),
        (["walk", "--threshold=high"], "--threshold must be a number"),
        (["walk", "--threshold=run=3"], "--threshold names the task 'run', but runs have walk"),
        (["walk", "--normalize=3:1"], "LOW below HIGH, but is '3:1'"),
        (["walk", "--normalize=run=1:3"], "--normalize names the task 'run'"),
        (["walk", "--until=3e3"], "--until: must be a whole number from 1 on, but is '3e3'"),
        (["walk", "--last=0"], "--last: must be a whole number from 1 on, but is '0'"),
        (["walk", "--filter=nonsense"], "--filter='nonsense'"),
        # A number may be negative: what is told is the baseline's name.
        (["walk", "--threshold", "-1.5e2", "--baseline=moun"], "no group 'moun'"),
        (["walk", "--normalize", "-1600:0", "--baseline=moun"], "no group 'moun'"),
        (["walk", "--base=muon"], "unrecognized arguments: --base=muon"),
        ([], "required: EXPERIMENT"),
    ],
)
def test_a_mistake_is_told_in_a_line(store, arguments, message):
    store.group("muon", [1.0, 2.0])
    store.run([1.0], experiment="dead", status=None)
    store.client.create_experiment("empty")
    with pytest.raises(ConfigError, match=message):
        compare_main(["compare", *arguments])


@pytest.mark.parametrize("content", [None, b"", b"no database"])
def test_a_store_that_is_none_is_neither_made_nor_filled(tmp_path, content):
    file = tmp_path / "mlflow.db"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match="no tracking store"):
        compare_main(["compare", "walk", f"--tracking-uri=sqlite:///{file}"])
    assert (file.read_bytes() if file.exists() else None) == content
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"] * (content is not None)


def test_reading_makes_no_experiment_and_writes_nothing(store):
    store.group("muon", [1.0, 2.0])

    def everything():
        client = MlflowClient(store.uri)
        experiments = client.search_experiments()
        runs = client.search_runs([e.experiment_id for e in experiments])
        return [e.name for e in experiments], [run.to_dictionary() for run in runs]

    before = everything()
    store.compare()
    assert everything() == before
    with pytest.raises(ConfigError):
        compare_main(["compare", "nothing"])
    assert everything() == before


def test_more_than_a_thousand_runs_are_paged(store):
    store.run([1.0], tags={"optimizer": "muon"})
    experiment = store.experiments["walk"]
    engine = create_engine(store.uri)
    with engine.begin() as connection:
        ids = [f"{index:032x}" for index in range(1100)]
        connection.execute(insert(SqlRun.__table__), [
            {"run_uuid": i, "experiment_id": int(experiment), "status": "FINISHED",
             "start_time": START, "lifecycle_stage": "active", "source_type": "LOCAL",
             "user_id": "me"}
            for i in ids
        ])  # fmt: skip
        connection.execute(insert(SqlTag.__table__), [
            {"run_uuid": i, "key": key, "value": value}
            for n, i in enumerate(ids) for key, value in (("optimizer", "muon"), ("seed", f"s{n}"))
        ])  # fmt: skip
        connection.execute(insert(SqlMetric.__table__), [
            {"run_uuid": i, "key": "eval/return", "value": 1.0, "timestamp": START, "step": 1000,
             "is_nan": False} for i in ids
        ])  # fmt: skip
    engine.dispose()
    assert store.compare()["muon"]["seeds"] == "1101"
