"""The agent: one step on the sum of the terms, targets after it, and what is logged."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from muon_rl.recipes.sac import SAC, SACData, SACOptimizers

from muon_rl.envs import DMControl
from muon_rl.optim import OptimizerConfig

ENV = DMControl("cartpole", "swingup", action_repeat=2)


def fit(agent: SAC, *callbacks: Callback, **options) -> SACData:
    data = SACData(
        ENV, total_frames=140, init_random_frames=80, batch_size=16, eval_episodes=1, **options
    )
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=list(callbacks),
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(agent, data)
    return data


class Steps(Callback):
    """Keeps the batches, and the parameters after each update."""

    def __init__(self):
        self.batches, self.states, self.random = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch.clone())
        self.random.append(torch.get_rng_state())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.states.append({k: v.clone() for k, v in pl_module.state_dict().items()})


@pytest.mark.parametrize("case", ["muon", "adamw"])
def test_training_equals_a_plain_torchrl_loop(case):
    """The same batches and random numbers, by hand: forward, backward, step, soft update."""
    torch.manual_seed(0)
    optimizer = SACOptimizers(OptimizerConfig(case=case), OptimizerConfig(case=case))
    agent, other = SAC(ENV, optimizer=optimizer), SAC(ENV, optimizer=optimizer)
    other.load_state_dict(agent.state_dict())
    steps = Steps()
    fit(agent, steps)
    assert len(steps.batches) == 30

    plain = other.build_optimizer()
    for batch, random, expected in zip(steps.batches, steps.random, steps.states, strict=True):
        torch.set_rng_state(random)
        losses = other.loss(batch)
        plain.zero_grad()
        (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_alpha"]).backward()
        plain.step()
        other.targets[0].step()
        for name, value in other.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_every_network_is_trained_and_targets_follow_slowly():
    agent = SAC(ENV, tau=0.5)
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    fit(agent)
    after = agent.state_dict()
    trained = [name for name, p in agent.named_parameters() if p.requires_grad]
    assert {name.split(".")[1] for name in trained} == {
        "actor_network_params", "qvalue_network_params", "log_alpha",
    }  # fmt: skip
    for name in trained:
        assert not torch.equal(before[name], after[name]), f"{name} was not trained"
    for name, value in after.items():
        if "target_qvalue" in name:
            assert not torch.equal(before[name], value)


@pytest.mark.parametrize("num_critics", [2, 5])
def test_each_of_the_critics_is_trained_and_differs(num_critics):
    agent = SAC(ENV, num_critics=num_critics)
    fit(agent)
    weights = [p for p in agent.loss.qvalue_network_params.parameters() if p.ndim == 3]
    assert {len(p) for p in weights} == {num_critics}
    assert all(not torch.equal(p[0], p[-1]) for p in weights)


@pytest.mark.parametrize("option", [{"num_critics": 1}, {"tau": 2.0}, {"gamma": -0.1}])
def test_a_number_out_of_range_is_refused(option):
    with pytest.raises(ValueError, match=f"model.{next(iter(option))} must be"):
        SAC(ENV, **option)


def test_gradients_are_clipped_together():
    norms = []

    class Norm(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            grads = [p.grad for p in pl_module.loss.parameters() if p.grad is not None]
            norms.append(torch.nn.utils.get_total_norm(grads).item())

    fit(SAC(ENV, max_grad_norm=1e-3), Norm())
    assert max(norms) <= 1e-3 * (1 + 1e-4)
    assert max(norms) > 0.9e-3  # the bound is reached


def test_a_gradient_that_is_not_finite_stops_the_run_and_changes_nothing():
    agent = SAC(ENV)

    class Poison(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 5:
                self.before = {k: v.clone() for k, v in pl_module.state_dict().items()}
                pl_module.loss.log_alpha.grad.fill_(float("nan"))

    poison = Poison()
    with pytest.raises(FloatingPointError, match="log_alpha"):
        fit(agent, poison)
    for name, value in agent.state_dict().items():
        assert torch.equal(value, poison.before[name])


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"actor": {}, "critic": {}, "trunk": {}}, "No trainable network named trunk"),
        ({"actor": {}}, "No optimizer config for .* critic"),
        ({"actor": {"case": "sgd"}, "critic": {}}, "actor.case must be one of muon, adamw, adam"),
    ],
)
def test_a_mistake_in_the_optimizers_shows_when_the_agent_is_made(optimizer, message):
    from muon_rl.agent import Agent

    sac = SAC(ENV)
    with pytest.raises(ValueError, match=message):
        Agent(loss=sac.loss, policy=sac.policy, optimizer=optimizer)
