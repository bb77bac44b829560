"""A short real run, made once and looked at by many tests."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from torchrl.envs.utils import ExplorationType, set_exploration_type

import muon_rl
from muon_rl.cli import main
from muon_rl.envs import DMControl

# Small enough for seconds, real in all else.
SMALL = [
    "--model.actor.hidden=[32,32]",
    "--model.critic.hidden=[32,32]",
    "--data.batch_size=32",
    "--data.eval_episodes=2",
    "--trainer.log_every_n_steps=10",
    "--trainer.enable_progress_bar=false",
]
CHEETAH = [
    "--config=sac_cheetah", "--env.time_limit=1.0", "--data.init_random_frames=100",
    "--data.eval_every=200", *SMALL,
]  # fmt: skip


@dataclass
class Run:
    """A run's folder and its record in MLflow."""

    folder: Path
    options: tuple[str, ...] = tuple(CHEETAH)

    def fit(self, *options: str) -> None:
        """Run a fit on cheetah-run with small networks."""
        main(["fit", *self.options, *options])

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.folder}/mlflow.db")

    @property
    def records(self):
        ids = [experiment.experiment_id for experiment in self.client.search_experiments()]
        return self.client.search_runs(ids)

    def history(self, metric: str) -> list[tuple[int, float]]:
        """Return the points of a metric of the only run there is."""
        (record,) = self.records
        points = self.client.get_metric_history(record.info.run_id, metric)
        return [(point.step, point.value) for point in points]

    def played(self) -> float:
        """Return the mean of an evaluation's two episodes, played by the last policy in a loop."""
        policy = muon_rl.load_policy(self.checkpoint())
        env = DMControl("cheetah", "run", action_repeat=2, time_limit=1.0)
        with set_exploration_type(ExplorationType.DETERMINISTIC), torch.no_grad():
            rollouts = [env.make(seed=seed).rollout(1000, policy) for seed in range(2)]
        return sum(rollout["next", "reward"].sum().item() for rollout in rollouts) / 2

    def checkpoint(self, name: str = "last") -> Path:
        """Return the checkpoint of the newest run."""
        return sorted(self.folder.glob(f"checkpoints/*/*/*/{name}.ckpt"))[-1]


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Keep torch off the cores of others, in this process and in those that tests start."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(autouse=True)
def _still_one_thread():
    """Undo what a test left: TorchRL's environments of several set the threads of their process."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Skip what needs a device that is not there, saying so."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """A sqlite file with MLflow's tables, which take seconds to make, and no runs."""
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def workspace(tmp_path, monkeypatch, empty_store) -> Run:
    """A new working folder, with an empty store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return Run(tmp_path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, empty_store) -> Run:
    """A fit of 400 frames on cheetah-run, with evaluations at 200 and 400."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copy(empty_store, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        run = Run(folder)
        run.fit("--data.total_frames=400")
    return run
