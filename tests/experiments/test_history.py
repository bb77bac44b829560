"""Reading metrics from a database and from a tracking server, and clocks that leave pauses out."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from mlflow import MlflowClient
from plain_store import START, Store, free_port

from muon_rl.experiments.history import active_seconds, read_histories, read_means
from muon_rl.experiments.runs import ComparisonError, find_experiments, find_runs, open_store
from muon_rl.tags import PAUSES
from muon_rl.tracking import MLflow

NAN = float("nan")


def seconds_of(store, run: str, pauses=()) -> list[float]:
    history = read_histories(store.client, [run], "eval/return")[run]
    return active_seconds(history, START, pauses).tolist()


def noted_pauses(store, run: str) -> list[tuple[int, int]]:
    experiments = find_experiments(store.client, ["walk"])
    return next(r.pauses for r in find_runs(store.client, experiments) if r.run_id == run)


def test_without_a_pause_times_are_those_since_the_start(store):
    times = [12.0, 20, 31, 39, 52]
    assert seconds_of(store, store.run([1.0] * 5, seconds=times)) == times


@pytest.mark.parametrize("gap", [91, 200, 86_400])
def test_a_gap_of_ten_times_the_usual_counts_as_usual(store, gap):
    """Evaluated every 10 s; the fourth comes ``gap`` seconds late."""
    times = [10.0, 20, 30, 40 + gap, 50 + gap, 60 + gap]
    run = store.run([1.0] * 6, seconds=times)
    assert seconds_of(store, run) == [10, 20, 30, 40, 50, 60]


def test_a_gap_below_ten_times_the_usual_is_the_run_s_own_time(store):
    times = [10.0, 20, 30, 129, 139, 149]
    assert seconds_of(store, store.run([1.0] * 6, seconds=times)) == times


def test_a_longer_interval_with_more_frames_is_no_pause(store):
    """The last interval is 20 times as long and has 20 times the frames."""
    run = store.run([1.0] * 4, seconds=[10.0, 20, 30, 40])
    store.client.log_metric(run, "eval/return", 1.0, timestamp=START + 240_000, step=24_000)
    assert seconds_of(store, run)[-1] == 240


def test_fast_evaluations_before_training_make_it_no_pause(store):
    """Nine evaluations while nothing is trained, a second each, then four of 30 seconds."""
    times = np.cumsum([1.0] * 9 + [30.0] * 4).tolist()
    assert seconds_of(store, store.run([1.0] * 13, seconds=times)) == times


def test_setting_up_belongs_to_the_run(store):
    times = [500.0, 510, 520, 530, 540]
    assert seconds_of(store, store.run([1.0] * 5, seconds=times)) == times


def test_noted_pauses_are_left_out_even_short_ones(store):
    """The run stood still from 22 to 37 s and from 41 to 42 s."""
    noted = [(START + 22_000, START + 37_000), (START + 41_000, START + 42_000)]
    run = store.run([1.0] * 4, seconds=[10.0, 20, 40, 50])
    assert seconds_of(store, run, noted) == [10, 20, 25, 34]
    before = [(START + 2000, START + 5000)]  # and before the first evaluation
    assert seconds_of(store, run, before) == [7, 17, 37, 47]


def test_a_start_after_the_first_point_is_not_believed(store):
    run = store.run([1.0, 1.0], seconds=[0.0, 10.0])
    history = read_histories(store.client, [run], "eval/return")[run]
    assert active_seconds(history, START + 999_000).tolist() == [0, 10]


def test_a_resumed_run_notes_when_it_stood_still(store):
    """Killed at 30 s by its clock, long ago, and resumed now."""
    run = store.run([1.0] * 3, status="KILLED", tags={"optimizer": "muon"})
    store.client.update_run(run, status="KILLED")
    end = store.client.get_run(run).info.end_time
    before = int(time.time() * 1000)
    logger = MLflow("walk", tracking_uri=store.uri)
    logger.resume(run)
    (pause,) = noted_pauses(store, run)
    assert pause[0] == end  # later than its last point
    assert before <= pause[1] <= int(time.time() * 1000)
    now = int(time.time() * 1000)
    store.client.log_metric(run, "eval/return", 1.0, timestamp=now, step=4000)
    logger.resume(run)  # lost this time: it has no end after its last point
    pauses = noted_pauses(store, run)
    assert pauses[0] == pause
    assert pauses[1][0] >= now
    assert PAUSES in store.client.get_run(run).data.tags


def test_a_pause_that_was_noted_is_left_out_of_the_time_to_a_threshold(store):
    noted = f"[[{START + 21_000}, {START + 36_000}]]"
    store.run([1.0, 2, 3, 4], seconds=[10.0, 20, 45, 55],
              tags={"optimizer": "muon", PAUSES: noted})  # fmt: skip
    row = store.compare("--threshold=3")["muon"]
    assert float(row["seconds_to_threshold"]) == 30
    assert float(row["frames_per_second"]) == 4000 / 40


def test_the_clock_of_a_plain_resumed_run_leaves_its_gap_out(store):
    store.run([1.0, 2, 3, 4, 5], seconds=[10.0, 20, 30, 7240, 7250], tags={"optimizer": "muon"})
    row = store.compare("--threshold=4")["muon"]
    assert float(row["seconds_to_threshold"]) == 40


def test_means_leave_out_what_is_no_number(store):
    run = store.run([1.0], metrics={"a": [1.0, NAN, 3.0, -math.inf], "b": [NAN]})
    assert read_means(store.client, [run], "a") == {run: 2.0}
    assert read_means(store.client, [run], "b") == {}


def test_a_tracking_server_gives_the_table_of_its_database(server, tmp_path, monkeypatch):
    folder, address = server
    monkeypatch.chdir(tmp_path)
    served = Store(tmp_path, address)
    served.group("muon", [3.0, 5, 4, 1, 9], metrics={"train/optimizer_share": [0.1, NAN]})
    served.group("adamw", [1.0, 2, NAN, 4, 5])
    served.run([1.0], seed=9, status="FAILED", tags={"optimizer": "muon"})
    there = [experiment.name for experiment in MlflowClient(address).search_experiments()]
    rows = served.compare("--threshold=2", "--baseline=adamw")
    direct = Store(tmp_path, f"sqlite:///{folder}/mlflow.db")
    assert direct.compare("--threshold=2", "--baseline=adamw") == rows
    early = served.compare("--until=2999")
    assert early == direct.compare("--until=2999") != direct.compare()
    assert early["muon"]["frames"] == "2000"
    assert "1 run without a finite value left out" in rows["adamw"]["remarks"]
    after = [experiment.name for experiment in MlflowClient(address).search_experiments()]
    assert after == there


def test_a_server_that_is_not_there_is_told_in_a_line():
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(ComparisonError, match="cannot be read"),
    ):
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        open_store(f"http://127.0.0.1:{free_port()}")
