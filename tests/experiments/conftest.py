"""A tracking store for each test: MLflow takes seconds to make its tables, so they are copied."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from plain_store import Store


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """A sqlite file with MLflow's tables and its default experiment."""
    store = Store(tmp_path_factory.mktemp("empty"))
    store.client.search_experiments()
    return store.folder / "mlflow.db"


@pytest.fixture
def store(empty_store, tmp_path, monkeypatch) -> Store:
    """A new store in a new working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return Store(tmp_path)
