"""What ``muon-rl sweep`` takes, and what it says to what it does not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from muon_rl.cli import ConfigError, main, sweep_options
from muon_rl.cli.sweep_plan import plan_of
from muon_rl.experiments.jobs import Point


def plan(*words):
    return plan_of(*sweep_options.read(words))


def test_a_grid_and_listed_points_are_combined():
    made = plan("sac_cheetah", "--grid", "model.{a,b}.lr=1e-3,0.01", "betas=[0.0,0.9],[0.9, 0.99]",
                "--point", "clip=0.1 eps='a,b'", "--point", "clip=0.2")  # fmt: skip
    assert made.name == "sac_cheetah_sweep"
    assert len(made.points) == 8
    assert made.points[1] == Point.of(
        {"model.a.lr": "1e-3", "model.b.lr": "1e-3", "betas": "[0.9, 0.99]", "clip": "0.1",
         "eps": "a,b"}
    )  # fmt: skip
    assert Point.of(
        {"model.a.lr": "0.01", "model.b.lr": "0.01", "betas": "[0.0,0.9]", "clip": "0.2"}
    ) in made.points  # fmt: skip


def test_a_shipped_sweep_and_a_task_on_top():
    made = plan("sac_momentum", "--config", "walker_walk", "--data.total_frames=9")
    assert made.name == "sac_momentum_walker_walk"
    assert len(made.points) == 8
    options = made.fit_options(made.points[0])
    assert [word.rpartition("/")[2] for word in options[:2]] == [
        "sac_momentum.yaml", "walker_walk.yaml",
    ]  # fmt: skip
    assert options[2:] == ["--data.total_frames=9", *made.points[0].options()]


def test_a_name_of_both_is_the_sweep_unless_the_command_says_what_is_varied():
    assert len(plan("sac_momentum").points) == 8
    made = plan("sac_momentum", "--grid", "model.gamma=0.9,0.99")
    assert made.name == "sac_momentum_sweep" and len(made.points) == 2


def test_tasks_are_an_axis_and_go_below_other_configs():
    made = plan("sac_layers", "--tasks", "walker_walk,cheetah_run", "-c", "reacher_easy")
    assert len(made.points) == 8
    assert {point.task for point in made.points} == {"walker_walk", "cheetah_run"}
    names = [word.rpartition("/")[2] for word in made.fit_options(made.points[-1])[:3]]
    assert names == ["sac_layers.yaml", "cheetah_run.yaml", "reacher_easy.yaml"]


def test_older_points_on_tasks_that_are_not_named_again_find_their_files(tmp_path):
    made = plan("sac_layers", "--tasks", "walker_walk")
    older = made.fit_options(Point.of({}, task="cheetah_run"))
    assert older[1].endswith("tasks/cheetah_run.yaml")
    with pytest.raises(ConfigError, match=r"the task mine as well: give its file with --tasks"):
        made.fit_options(Point.of({}, task="mine"))
    assert list(made.task_digests()) == ["walker_walk"]


def test_two_tasks_called_alike_are_refused(tmp_path):
    files = [tmp_path / folder / "walk.yaml" for folder in "ab"]
    for file in files:
        file.parent.mkdir()
        file.write_text("env.task: walk\n")
    with pytest.raises(ConfigError, match=r"called alike, .*a/walk.yaml and .*b/walk.yaml"):
        plan("sac_cheetah", "--tasks", f"{files[0]},{files[1]}")
    made = plan("sac_cheetah", "--tasks", f"{files[0]},{files[0]}")
    digests = made.task_digests()
    files[0].write_text("env.task: run\n")
    assert len(made.points) == 1 and made.task_digests() != digests


def test_a_file_of_ones_own(tmp_path):
    (tmp_path / "mine.yaml").write_text("seed_everything: 1\n")
    path = tmp_path / "study.yaml"
    path.write_text("config: mine.yaml\npoints: [{'{a,b}': 1}, {c: 2}]\ntasks: walker_walk\n")
    made = plan(str(path), "--grid", "d=3,4")
    assert made.configs == [str(tmp_path / "mine.yaml")]
    assert made.name == "study"
    assert made.points[0] == Point.of({"a": 1, "b": 1, "d": 3}, task="walker_walk")
    assert len(made.points) == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0:3", [0, 1, 2]), ("7", [7]), ("0,3,7", [0, 3, 7]), ("1:3,0,2", [1, 2, 0])],
)
def test_seeds(text, expected):
    assert sweep_options.read(["x", "--seeds", text])[0].seeds == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--grid", "a=1"], "needs a recipe or a sweep's file as its first word"),
        (["sac_chetah"], "did you mean sac_cheetah"),
        (["sac_cheetah", "--seeds", "3:1"], r"--seeds: must be seeds such as 0:5"),
        (["sac_cheetah", "--seeds", "a"], r"--seeds: must be seeds such as 0:5"),
        (["sac_cheetah", "--jobs", "0"], r"--jobs: must be at least 1, but is 0"),
        (["sac_cheetah", "--grid", "a"], r"--grid a: it must be KEY=VALUE"),
        (["sac_cheetah", "--grid", "a=1,,2"], r"a value is empty, or a bracket or quote is open"),
        (["sac_cheetah", "--grid", "a=[1,2"], r"a value is empty, or a bracket or quote is open"),
        (["sac_cheetah", "--grid", "a=1", "--grid", "a=2"], r"--grid has a twice"),
        (["sac_cheetah", "--grid", "a=1", "{a,b}=2"], r"sets a twice"),
        (["sac_cheetah", "--grid", "a=1", "--point", "a=2"], r"the file set a twice"),
        (["sac_cheetah", "--seed_everything=3"], r"give seeds with --seeds"),
        (["sac_cheetah", "--ckpt_path", "last"], r"sets ckpt_path itself"),
        (["sac_cheetah", "--trainer.logger.init_args.tags", "x"], r"give tags with --tag"),
        (["sac_cheetah", "--tag", "seed=3"], r"--tag seed: this tag is set by the training"),
        (["sac_cheetah", "--name", "a/b"], r"--name names a folder, so it takes no slash"),
        (["sac_cheetah", "--search", "tpe", "--trials", "3"], r"has none: .*ppo_snake_muon"),
        (["ppo_snake_muon"], r"has ranges to search in: give --search"),
        (["ppo_snake_muon", "--search", "tpe"], r"has ranges to search in: give --search"),
        (["ppo_snake_muon", "--search", "tpe", "--trials", "2", "--tasks", "walker_walk"],
         r"A search is for one task"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_at_once(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["sweep", *words])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    with pytest.raises(ConfigError, match=message):
        plan(*words)


def test_a_mistake_in_a_key_is_found_before_anything_is_run(workspace, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["sweep", "ppo_snake_adam_small", "--grid", "model.clip=0.1,0.2,-1"])
    error = capsys.readouterr().err
    assert "model.clip must be above 0, but is -1" in error and "at the point clip=-1" in error
    assert not (workspace.folder / "sweeps").exists()
    with pytest.raises(SystemExit, match="2"):
        main(["sweep", "ppo_snake_adam_small", "--trainer.logger=false"])
    assert "finds its trainings by their MLflow runs" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_told_in_a_line(workspace, capsys):
    (workspace.folder / "sweeps").write_text("in the way")
    with pytest.raises(SystemExit, match="2"):
        main(["sweep", "ppo_snake_adam_small", "--name=study"])
    error = capsys.readouterr().err
    assert "sweeps/study, where logs and checkpoints go, cannot be written" in error
    assert not workspace.records


def test_a_dry_run_prints_commands_that_fit_takes(workspace, capsys):
    main(["sweep", "ppo_snake_adam_small", "--grid", "model.{clip,gamma}=0.5,0.25",
          "--seeds", "0:2", "--dry-run", "--threads", "3"])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    commands = [line for line in lines if "muon-rl fit" in line]
    assert len(commands) == 4 and all(line.startswith("OMP_NUM_THREADS=3 ") for line in commands)
    assert "--model.clip=0.25 --model.gamma=0.25 --seed_everything=1" in commands[-1]
    assert not (workspace.folder / "sweeps").exists()


@pytest.mark.parametrize(
    ("said", "options", "threads"),
    [("5", [], 5), ("5", ["--threads=3"], 3), ("", [], None), ("many", [], None)],
)
def test_threads_are_those_asked_for_or_the_shells(said, options, threads, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    main(["sweep", "ppo_snake_adam_small", "--dry-run", *options])
    (command,) = [x for x in capsys.readouterr().out.splitlines() if "muon-rl fit" in x]
    wanted = threads or sweep_options.processors()
    assert command.startswith(f"OMP_NUM_THREADS={wanted} ")


def test_a_missing_extra_is_named():
    """Optuna and Ray are taken away from a process of its own."""
    code = (
        "import sys; sys.modules['optuna'] = sys.modules['ray'] = None\n"
        "from muon_rl.cli import main\n"
        "for words in (['ppo_snake_muon', '--search', 'tpe', '--trials', '1'],\n"
        "              ['ppo_snake_muon_small', '--launcher', 'ray']):\n"
        "    try: main(['sweep', *words])\n"
        "    except SystemExit as stop: assert stop.code == 2\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install 'muon-rl[search]'" in done.stderr
    assert "pip install 'muon-rl[ray]'" in done.stderr


def test_help_teaches_and_needs_no_heavy_import():
    code = (
        "import sys; from muon_rl.cli import main; main(['sweep', '--help'])\n"
        "sys.exit(str({'torch', 'lightning', 'mlflow'} & set(sys.modules) or ''))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}
    )
    assert done.stdout.count("\n  muon-rl sweep") == 3
    assert done.stderr.strip() == ""
