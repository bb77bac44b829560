"""A soft actor-critic of small networks on made-up transitions."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch.optim import Adam, Optimizer
from torchrl.data import Bounded, Unbounded
from torchrl.objectives import SACLoss, SoftUpdate

from muon_rl.modules import QCritic, TanhNormalActor
from muon_rl.optim import build_optimizer
from muon_rl.specs import Specs


class SAC:
    """A loss, its targets and its optimizer, trained on random transitions."""

    specs = Specs(Unbounded(5), Bounded(-torch.ones(2), torch.ones(2)))

    def __init__(self, case: str = "adamw", *, critics: int = 3, **options) -> None:
        self.actor = TanhNormalActor(self.specs, **options)
        networks = [QCritic(self.specs, **options) for _ in range(critics)]
        self.loss = SACLoss(self.actor, networks, num_qvalue_nets=critics)
        self.loss.make_value_estimator(gamma=0.9)
        _ = self.loss.target_entropy
        self.targets = SoftUpdate(self.loss, tau=0.1)
        self.optimizer: Optimizer = (
            Adam(self.loss.parameters(), 3e-4)
            if case == "adam"
            else build_optimizer(
                self.loss, actor={"case": case}, critic={"case": case}, alpha={"case": "adam"}
            )
        )
        self.critics = self.loss.qvalue_network_params

    def batch(self, size: int = 64) -> TensorDict:
        observation, following = torch.randn(2, size, 5)
        ends = {key: torch.zeros(size, 1, dtype=torch.bool) for key in ("done", "terminated")}
        after = {"observation": following, "reward": observation[:, :1], **ends}
        now = {"observation": observation, "action": 2 * torch.rand(size, 2) - 1}
        return TensorDict({**now, "next": TensorDict(after, [size])}, [size])

    def update(self, times: int = 1) -> None:
        for _ in range(times):
            losses = self.loss(self.batch())
            self.optimizer.zero_grad()
            sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
            self.optimizer.step()
            self.targets.step()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def sac() -> type[SAC]:
    """Makes one from the optimizer's case and the options of actor and critics."""
    return SAC
