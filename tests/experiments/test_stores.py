"""Stores of every kind, and in every state that a writer leaves them in."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
from plain_store import Store

from muon_rl.cli import ConfigError, main
from muon_rl.cli.compare import main as compare_main
from muon_rl.turns import one_process_at_a_time

WALK = ["walk", "--group-by=optimizer", "--resamples=10"]


def test_a_folder_of_files_gives_the_table_of_a_database(store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    files = Store(tmp_path, f"file://{tmp_path}/runs")
    for kept in (store, files):
        kept.group("a", [1.0, 3.0, float("nan"), 2.0, 1e308])
        kept.group("b", [4.0, 2.5, 3.0], metrics={"train/optimizer_share": [0.25]})
    options = {"baseline": "a", "thresholds": {"": 2.0}}
    assert store.rows(**options) == files.rows(**options)


@pytest.mark.parametrize("scheme", ["file://", ""])
def test_a_folder_that_is_missing_is_not_made(tmp_path, monkeypatch, scheme):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    with pytest.raises(ConfigError, match="no tracking store"):
        compare_main(["compare", *WALK, f"--tracking-uri={scheme}{tmp_path}/runs"])
    assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_half_written_is_not_read(store):
    """Its journal is there still: whoever reads next has to undo it first."""
    store.group("a", [1.0, 2.0])
    before = store.rows()
    code = (
        "import os, sqlite3; c = sqlite3.connect('mlflow.db', isolation_level=None)\n"
        "c.execute('pragma cache_size = 1'); c.execute('begin')\n"
        "c.execute('update metrics set value = 9'); c.execute('update params set value = 9')\n"
        "for i in range(300): c.execute('insert into experiment_tags values (?, ?, 0)',"
        " (str(i), 'x' * 3000))\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-S", "-c", code], check=False)
    assert (store.folder / "mlflow.db-journal").stat().st_size > 0
    assert store.rows() == before


def test_a_comparison_is_logged_when_the_store_s_writer_has_done(store):
    store.group("a", [1.0, 2.0])
    comparing = threading.Thread(target=main, args=(["compare", *WALK, "--output=out"],))
    with one_process_at_a_time(store.uri):
        comparing.start()
        until = time.monotonic() + 120
        while not (store.folder / "out" / "report.html").exists() and time.monotonic() < until:
            time.sleep(0.05)
        comparing.join(1)
        assert comparing.is_alive()
        assert len(store.client.search_runs([store.experiments["walk"]])) == 2
    comparing.join(60)
    kinds = [run.data.tags.get("muon_rl.kind")
             for run in store.client.search_runs([store.experiments["walk"]])]  # fmt: skip
    assert not comparing.is_alive() and kinds.count("comparison") == 1


def test_in_which_order_the_runs_lie_makes_no_difference(store):
    """Runs without a seed are told apart by random ids; floating-point sums know their order."""
    finals = [1e16, 1.0, -1e16, 3.0, 7e15, -5.0, 0.1]
    rows = []
    for name in ("one", "two", "three"):
        for final in finals:
            store.run([final], seed=None, experiment=name, tags={"optimizer": "a"})
        rows.append(store.rows(name))
    assert rows[0] == rows[1] == rows[2]
