"""A tracking store for each test."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from plain_store import Store, free_port


@pytest.fixture
def store(empty_store, tmp_path, monkeypatch) -> Store:
    """A new store in a new working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return Store(tmp_path)


@pytest.fixture(scope="session")
def server(empty_store, tmp_path_factory):
    """A tracking server: the folder of its store, and its address."""
    folder, port = tmp_path_factory.mktemp("served"), free_port()
    shutil.copy(empty_store, folder / "mlflow.db")
    command = [
        sys.executable, "-W", "ignore", "-m", "mlflow", "server", f"--port={port}", "--workers=1",
        f"--backend-store-uri=sqlite:///{folder}/mlflow.db",
        f"--artifacts-destination={folder}/artifacts",
    ]  # fmt: skip
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        for _ in range(600):  # seconds, or minutes where the machine is busy
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None:
                    break
                time.sleep(0.3)
        else:
            process.kill()
        if process.poll() is not None:
            pytest.fail((folder / "log").read_text())
        yield folder, f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
