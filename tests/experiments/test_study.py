"""A study's runs in a real store, its lock, its processes and its search."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from muon_rl.experiments import read_ranges
from muon_rl.experiments.jobs import Job, Point, jobs_of
from muon_rl.experiments.launch import LocalLauncher
from muon_rl.experiments.live_table import Lines, frames_of, spell, time_left
from muon_rl.experiments.lock import StudyLock
from muon_rl.experiments.schedule import Listed, Schedule, State, Stop, tail
from muon_rl.experiments.study import Study, StudyDiffers
from muon_rl.experiments.sweep_results import ranking, rows_of

A, B = Point.of({"lr": 0.1}), Point.of({"lr": 0.2}, task="walk")
SPEC = {"options of fit": ["--data.total_frames=9"]}


@pytest.fixture
def study(workspace) -> Study:
    made = new(workspace)
    made.open(SPEC, "muon-rl sweep")
    return made


def new(workspace) -> Study:
    store = f"sqlite:///{workspace.folder}/mlflow.db"
    return Study("study", store, workspace.folder / "sweeps" / "study")


def train(study: Study, job: Job, status: str | None, **metrics: float) -> str:
    """Leave a run behind as a training does."""
    (experiment,) = study.client.search_experiments(filter_string="name = 'study'")
    tags = {**study.tags(job), "seed": str(job.seed)}
    run = study.client.create_run(experiment.experiment_id, tags=tags).info.run_id
    for name, value in metrics.items():
        study.client.log_metric(run, name, value, step=64)
    if status is not None:
        study.client.set_terminated(run, status)
    return run


def test_the_runs_of_a_study_are_found_by_their_jobs(study, workspace):
    trial = Point.of({"lr": 0.1}, trial=3)
    ids = {job: train(study, job, "FINISHED") for job in jobs_of([A, B, trial], [0, 5])}
    again = new(workspace)
    again.open(SPEC, "muon-rl sweep")
    assert again.parent_id == study.parent_id
    assert {job: run.info.run_id for job, run in again.runs().items()} == ids


def test_of_two_runs_of_a_job_the_newest_counts_and_deleted_ones_do_not(study):
    old = train(study, Job(A, 0), "FAILED")
    time.sleep(0.01)
    newest = train(study, Job(A, 0), None)
    assert study.runs()[Job(A, 0)].info.run_id == newest
    study.discard(study.runs()[Job(A, 0)])
    assert study.runs()[Job(A, 0)].info.run_id == old


def test_a_study_keeps_its_points_and_seeds_and_takes_new_ones(study):
    assert study.plan([A], [0, 1]) == ([A], [0, 1])
    assert study.plan([B], [5]) == ([A, B], [0, 1, 5])
    assert study.plan([A], [0]) == ([A, B], [0, 1, 5])


def test_a_task_whose_file_has_changed_is_refused_and_new_tasks_are_taken(study, workspace):
    study.open(SPEC, "muon-rl sweep", {"walk": "walk 1"})
    study.plan([B], [0])
    study.close("KILLED")
    with pytest.raises(StudyDiffers, match=r"file of the task walk has changed .*--name"):
        new(workspace).open(SPEC, "muon-rl sweep", {"hop": "hop 1", "walk": "walk 2"})
    assert study.client.get_run(study.parent_id).info.status == "KILLED"
    again = new(workspace)
    again.open(SPEC, "muon-rl sweep", {"hop": "hop 1"})
    again.plan([Point.of({}, task="hop")], [0])
    with pytest.raises(StudyDiffers, match="task walk"):
        new(workspace).open(SPEC, "muon-rl sweep", {"walk": "walk 2"})


def test_the_store_is_told_no_password(study, workspace):
    uri = "http://ada:secret@host"
    made = Study("other", study.client.tracking_uri, workspace.folder / "sweeps" / "other")
    for command in ("first", "again"):  # the same study both times
        made.open({"options of fit": [f"--trainer.logger.tracking_uri={uri}"]}, f"{command} {uri}")
    tags = made.client.get_run(made.parent_id).data.tags
    assert tags["muon_rl.command"] == "again http://ada:***@host"
    assert "http://ada:***@host" in tags["muon_rl.spec"]
    assert "secret" not in "".join(tags.values())


def test_another_spec_under_the_name_is_refused(study, workspace):
    with pytest.raises(StudyDiffers, match=r"=9 before, --data.total_frames=8 now\n.*--name"):
        new(workspace).open({"options of fit": ["--data.total_frames=8"]}, "muon-rl sweep")
    moved = Study("study", study.tracking_uri, workspace.folder / "elsewhere")
    study.folder.mkdir(parents=True)
    with pytest.raises(StudyDiffers, match=r"has its logs and checkpoints in .*sweeps/study"):
        moved.open(SPEC, "muon-rl sweep")


def test_a_deleted_experiment_is_told(study, workspace):
    (experiment,) = study.client.search_experiments(filter_string="name = 'study'")
    study.client.delete_experiment(experiment.experiment_id)
    with pytest.raises(StudyDiffers, match=r"study was deleted in MLflow: restore it, or"):
        new(workspace).open(SPEC, "muon-rl sweep")


def save(study: Study, job: Job, stamp: str, run: str) -> Path:
    path = study.checkpoints(job) / "walk" / "seed_0" / stamp / "last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save({"muon_rl": {"mlflow_run_id": run}}, path)
    return path


def test_a_run_goes_on_from_its_newest_checkpoint_that_can_be_read(study):
    job = Job(A, 0)
    run = train(study, job, "KILLED")
    assert study.last_checkpoint(job, study.runs()[job]) is None
    save(study, job, "2026-01-01", run)
    newest = save(study, job, "2026-01-02", run)
    save(study, job, "2026-01-03", "another run")
    save(study, job, "2026-01-04", run).write_bytes(b"half of it")
    assert study.last_checkpoint(job, study.runs()[job]) == newest


def test_a_run_whose_process_was_lost_ended_when_it_last_wrote(study):
    lost, done = (train(study, Job(A, seed), status) for seed, status in ((0, None), (1, "FAILED")))
    study.client.log_metric(lost, "eval/return", 1.0, timestamp=1_234_567_890_123, step=64)
    for run in study.runs().values():
        study.end(run, "KILLED")
    info = study.client.get_run(lost).info
    assert (info.status, info.end_time) == ("KILLED", 1_234_567_890_123)
    assert study.client.get_run(done).info.status == "FAILED"


# -- schedule ------------------------------------------------------------------------------------


def schedule(study, jobs, code, *, retries=1, stop=None, at_a_time=2):
    """Run jobs whose processes are a line of Python each."""
    return Schedule(
        study, Listed(jobs, study.runs()), LocalLauncher({}),
        lambda job, checkpoint: [sys.executable, "-c", code],
        runs=study.runs(), view=Lines(study, "eval/return"), stop=stop or Stop(),
        jobs=at_a_time, retries=retries,
    )  # fmt: skip


def test_a_job_that_fails_is_run_again_and_then_reported(study, capsys):
    jobs = jobs_of([A], [0, 1])
    train(study, jobs[0], "FINISHED")
    state = schedule(study, jobs, "import sys; print('it broke'); sys.exit(3)", retries=2).run()
    assert state.failed == {jobs[1]: 3} and state.done == 1 and not state.running
    assert study.log_file(jobs[1]).read_text() == "it broke\n" * 3
    assert not study.log_file(jobs[0]).exists()
    assert capsys.readouterr().out.count("exit code 3, it is run again") == 2


def test_a_checkpoint_that_is_refused_is_no_failure_and_an_end_without_a_run_is(study):
    job = Job(A, 0)
    run = train(study, job, "KILLED")
    save(study, job, "2026-01-01", run)
    state = Schedule(
        study, Listed([job], study.runs()), LocalLauncher({}),
        lambda job, checkpoint: ["sh", "-c", "echo with; exit 2" if checkpoint else "echo without"],
        runs=study.runs(), view=Lines(study, "eval/return"), stop=Stop(), jobs=1, retries=0,
    ).run(pause=0.02)  # fmt: skip
    assert study.log_file(job).read_text() == "with\nwithout\n"
    assert state.failed == {job: 0} and not study.runs()


def test_no_more_jobs_run_than_were_asked_for(study, tmp_path):
    code = (
        "import os, time; p = 'n/' + str(os.getpid()); open(p, 'w').close()\n"
        "print(len(os.listdir('n')), flush=True); time.sleep(0.3); os.remove(p)"
    )
    (tmp_path / "n").mkdir()
    jobs = jobs_of([A, B], [0, 1, 2])
    schedule(study, jobs, code, retries=0, at_a_time=2).run(pause=0.02)
    counts = [int(study.log_file(job).read_text()) for job in jobs]
    assert max(counts) == 2


@pytest.mark.parametrize(
    ("signals", "code", "expected"),
    [
        (1, "import time; time.sleep(60)", []),
        (2, "import signal, time; signal.signal(15, lambda *_: print('saving', flush=True))\n"
            "print('up', flush=True)\nwhile True: time.sleep(0.1)", ["up", "saving"]),
    ],
)  # fmt: skip
def test_a_stop_ends_what_runs_and_starts_nothing(signals, code, expected, study):
    jobs, stop = jobs_of([A], [0, 1]), Stop()
    running = schedule(study, jobs, code, stop=stop, at_a_time=1)
    log = study.log_file(jobs[0])
    run = train(study, jobs[0], None)
    running.state.total = 2

    class Watch(Lines):
        def tick(self, state):
            up = log.exists() and (not expected or "up" in log.read_text())
            if (up and not stop.count) or (
                stop.count == 1 < signals and "saving" in log.read_text()
            ):
                stop(signal.SIGINT, None)

    running._view = Watch(study, "eval/return")
    running._runs = {}
    state = running.run()
    assert (stop.signum, stop.count) == (signal.SIGINT, signals)
    assert state.done == 0 and not state.failed and not study.log_file(jobs[1]).exists()
    assert log.read_text().split() == expected
    assert study.client.get_run(run).info.status == "KILLED"


def test_processes_end_with_the_one_that_started_them(tmp_path):
    child = (
        "from muon_rl.experiments.launch import end_with_parent; end_with_parent()\n"
        "import time; print('up', flush=True); time.sleep(60)"
    )
    parent = (
        "import sys, time; from pathlib import Path\n"
        "from muon_rl.experiments.launch import LocalLauncher\n"
        "from muon_rl.experiments.lock import StudyLock\n"
        "lock = StudyLock(Path('study')); launcher = LocalLauncher({}, [lock.inherited])\n"
        f"launcher.start(0, [sys.executable, '-c', {child!r}], Path('log')); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path)
    until = time.monotonic() + 30
    while not ((tmp_path / "log").exists() and (tmp_path / "log").read_text()):
        assert time.monotonic() < until
        time.sleep(0.05)
    with pytest.raises(BlockingIOError, match=f"it is being run by process {process.pid}"):
        StudyLock(tmp_path / "study")
    process.kill()
    process.wait()
    StudyLock(tmp_path / "study", patience=10).release()  # held until the child has ended


def test_trainings_of_a_killed_sweep_are_waited_for_but_not_for_ever(tmp_path, capsys):
    lock = StudyLock(tmp_path)
    sleeper = subprocess.Popen(["sleep", "60"], pass_fds=[lock.inherited])
    lock.release()
    try:
        with pytest.raises(BlockingIOError, match="trainings of a sweep that was killed still run"):
            StudyLock(tmp_path, patience=0.3)
        assert "Waiting for the trainings" in capsys.readouterr().err
    finally:
        sleeper.kill()
        sleeper.wait()
    StudyLock(tmp_path, patience=0.3).release()


# -- search --------------------------------------------------------------------------------------

RANGES = read_ranges(
    {"a.{x,y}": {"low": 0.001, "high": 1, "log": True}, "n": {"low": 2, "high": 9, "int": True},
     "betas": [[0.9, 0.99], [0.5, 0.9]]}
)  # fmt: skip


def search(study, trials, sampler="tpe", seeds=(0, 1), **options):
    pytest.importorskip("optuna", reason="Optuna is an extra: pip install 'muon-rl[search]'")
    from muon_rl.experiments.search import Search

    return Search(
        RANGES, sampler=sampler, trials=trials, seeds=seeds, metric="eval/return",
        runs=study.runs(), **options,
    )  # fmt: skip


def worth(job: Job) -> float:
    values = dict(job.point.values)
    return -abs(float(values["a.x"]) - 0.03) - 0.01 * float(values["n"]) + 0.001 * job.seed


def go(study, source, limit=1000) -> list[Job]:
    ran = []
    while len(ran) < limit and (job := source.next()) is not None:
        train(study, job, "FINISHED", **{"eval/return": worth(job)})
        source.ended(job, study.runs()[job])
        ran.append(job)
    return ran


def test_a_search_that_was_killed_goes_on_as_if_it_had_not_been(study):
    whole = go(study, search(study, 14))
    assert Counter(job.point.trial for job in whole) == dict.fromkeys(range(14), 2)
    for job, run in study.runs().items():
        if job.point.trial >= 12 or (job.point.trial == 11 and job.seed == 1):
            study.discard(run)
    resumed = search(study, 14)
    assert resumed.total == 28
    assert go(study, resumed) == whole[23:]
    means = [value for value, _ in resumed.ranking()]
    expected = [worth(Job(job.point, 0)) + 0.0005 for job in whole[::2]]
    assert means == pytest.approx(sorted(expected, reverse=True))
    smallest = search(study, 14, minimize=True).ranking()[0][0]
    assert smallest == pytest.approx(min(expected))


def test_draws_are_in_the_ranges_and_keys_in_braces_move_together(study):
    source = search(study, 30, "random", seeds=[0])
    points = [dict(source.next().point.values) for _ in range(30)]
    assert source.next() is None
    assert all(p["a.x"] == p["a.y"] and 0.001 <= float(p["a.x"]) <= 1 for p in points)
    assert {p["n"] for p in points} >= {"2", "9"}
    assert {p["betas"] for p in points} == {"[0.9,0.99]", "[0.5,0.9]"}
    other = search(study, 1, "random", seeds=[0], seed=1).next()
    assert dict(other.point.values) != points[0]


def test_a_trial_with_a_seed_that_failed_has_no_worth(study):
    source = search(study, 1)
    first, second = source.next(), source.next()
    train(study, first, "FINISHED", **{"eval/return": 1.0})
    source.ended(first, study.runs()[first])
    source.ended(second, None)
    assert source.ranking() == []


# -- what is told --------------------------------------------------------------------------------


def test_results_rank_points_by_the_mean_of_their_finished_seeds(study):
    values = {Job(A, 0): 1.0, Job(A, 1): 4.0, Job(B, 0): 3.0}
    for job, value in values.items():
        train(study, job, "FINISHED", **{"eval/return": value})
    train(study, Job(B, 1), "FAILED", **{"eval/return": 100.0})
    train(study, Job(B, 2), "FINISHED", **{"eval/return": float("nan")})
    jobs = jobs_of([A, B], [0, 1, 2])
    ranked = ranking(jobs, study.runs(), "eval/return")
    assert ranked == [(B, {0: 3.0}), (A, {0: 1.0, 1: 4.0})]
    assert ranking(jobs, study.runs(), "eval/return", minimize=True)[0][0] == A
    rows = rows_of(jobs, study.runs(), "eval/return")
    assert Counter(row["status"] for row in rows) == {"FINISHED": 4, "FAILED": 1, "NOT RUN": 1}


def test_the_log_tells_frames_and_its_last_lines(tmp_path):
    log = tmp_path / "log"
    assert frames_of(log) is None and tail(log) == ""
    log.write_bytes(b"a\nTraining 1%| 5/2,000 frames\rTraining 50%| 1,024/2,000 frames\r\nb\n\n")
    assert frames_of(log) == (1024, 2000)
    assert tail(log, 2) == "Training 50%| 1,024/2,000 frames\nb"


def test_the_time_left_is_what_jobs_took_over_those_that_run_at_a_time():
    jobs = jobs_of([A], range(4))
    state = State(total=10, done=4, running=dict.fromkeys(jobs[:2], 0.0), seconds=[90.0, 110.0])
    # 4 wait with 100 s each, 2 run since 40 and 60 s; two at a time.
    assert time_left(state, [(40.0, None), (60.0, None)], 2) == (400 + 60 + 40) / 2
    state.seconds = []
    assert time_left(state, [(40.0, None)], 1) is None
    assert time_left(State(total=1, running={jobs[0]: 0.0}), [(40.0, (20, 100))], 1) == 160
    assert spell(3725) == "1 h 2 min"
