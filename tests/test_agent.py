"""The agent: one step on the sum of the terms, targets after it, and what is logged."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from muon_rl.recipes.sac import SAC, SACData, SACOptimizers
from torch.nn.utils import get_total_norm
from torch.optim import lr_scheduler

from muon_rl.envs import DMControl
from muon_rl.modules import TanhNormalActor
from muon_rl.optim import OptimizerConfig

ENV = DMControl("cartpole", "swingup", action_repeat=2)


def fit(
    agent: SAC, *callbacks: Callback, kind: type[SACData] = SACData, batches_per_step=1, **options
) -> SACData:
    data = kind(
        ENV, total_frames=140, init_random_frames=80, batch_size=16, eval_episodes=1, **options
    )
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=list(callbacks),
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, log_every_n_steps=7, accumulate_grad_batches=batches_per_step,
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


@pytest.mark.parametrize(
    "option", [{"num_critics": 1}, {"tau": 2.0}, {"tau": 0.0}, {"gamma": -0.1}]
)
def test_a_number_out_of_range_is_refused(option):
    with pytest.raises(ValueError, match=f"model.{next(iter(option))} must be"):
        SAC(ENV, **option)


class Norms(Callback):
    """Keeps the norm of the gradients that each update was made with, by network."""

    def __init__(self):
        self.norms: dict[str, list[float]] = {}

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        networks: dict[str, list[torch.Tensor]] = {}
        for group in optimizer.param_groups:
            grads = [p.grad for p in group["params"] if p.grad is not None]
            networks.setdefault(group["name"].split("/")[0], []).extend(grads)
        networks["all"] = [grad for grads in networks.values() for grad in grads]
        for name, grads in networks.items():
            if grads:
                self.norms.setdefault(name, []).append(get_total_norm(grads).item())


def test_gradients_are_clipped_together():
    norms = Norms()
    fit(SAC(ENV, max_grad_norm=1e-3), norms)
    assert max(norms.norms["all"]) <= 1e-3 * (1 + 1e-4)
    assert max(norms.norms["all"]) > 0.9e-3  # the bound is reached


def test_gradients_are_clipped_by_network():
    norms = Norms()
    fit(SAC(ENV, max_grad_norm={"actor": 1e-3, "critic": 1e-4}), norms)
    for name, bound in (("actor", 1e-3), ("critic", 1e-4)):
        assert 0.9 * bound < max(norms.norms[name]) <= bound * (1 + 1e-4)
    assert min(norms.norms["alpha"]) > 1e-2  # left as it is


@pytest.mark.parametrize("max_grad_norm", [None, 1.0, {"actor": 1.0, "alpha": 1.0}])
def test_a_gradient_that_is_not_finite_stops_the_run_and_changes_nothing(max_grad_norm):
    agent = SAC(ENV, max_grad_norm=max_grad_norm)

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


class Rates(Callback):
    """Keeps the rates of all groups at each step of the optimizer, and what was logged."""

    def __init__(self, agent: SAC):
        self.applied: list[dict[str, float]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        agent.track = self.note_logged

    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_post_hook(self.note_applied)

    def note_applied(self, optimizer, args, kwargs):
        self.applied.append({group["name"]: group["lr"] for group in optimizer.param_groups})

    def note_logged(self, metrics):
        if "train/loss_actor" in metrics:
            # The step that is being made, counted from 0: noted before it is applied.
            self.logged.append((len(self.applied), metrics))


def fit_with_rates(kind: type[SACData] = SACData, **options) -> Rates:
    optimizer = SACOptimizers(critic=OptimizerConfig(case="adamw"))
    agent = SAC(ENV, optimizer=optimizer, **options)
    rates = Rates(agent)
    fit(agent, rates, kind=kind)
    assert len(rates.applied) == 30
    return rates


INITIAL = {"actor/muon": 0.02, "actor/aux": 3e-4, "critic/adamw": 3e-4, "alpha/adam": 3e-4}


class Slow(Callback):
    """Makes each update take at least 30 ms more, in the optimizer's step or before it."""

    def __init__(self, where: str):
        self.where = where

    def on_train_start(self, trainer, pl_module):
        if self.where == "step":
            trainer.optimizers[0].register_step_post_hook(lambda *_: time.sleep(0.03))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.where == "backward":
            time.sleep(0.03)


@pytest.mark.parametrize("where", ["step", "backward"])
def test_the_optimizers_share_is_its_own_time_alone(where, monkeypatch):
    tracked = []
    monkeypatch.setattr(SAC, "track", lambda self, metrics: tracked.append(dict(metrics)))
    fit(SAC(ENV), Slow(where))
    readings = [m for m in tracked if "train/optimizer_share" in m]
    assert len(readings) == 4  # 30 updates, every 7th; 7 updates of 2 frames lie between two
    for reading in readings[1:]:
        seconds = 14 / reading["train/frames_per_second"]
        step = seconds * reading["train/optimizer_share"]
        assert 0 < step < seconds
        assert (step if where == "step" else seconds - step) >= 7 * 0.03


def test_annealed_rates_fall_to_0_over_the_updates_of_the_run():
    rates = fit_with_rates(anneal_lr=True)
    for update, applied in enumerate(rates.applied):
        assert applied == {name: lr * (1 - update / 30) for name, lr in INITIAL.items()}


def test_annealed_rates_fall_to_0_over_the_steps_that_several_batches_share():
    agent = SAC(ENV, anneal_lr=True)
    rates = Rates(agent)
    fit(agent, rates, batches_per_step=4)
    assert [applied["actor/muon"] for applied in rates.applied] == [
        0.02 * (1 - step / 8)
        for step in range(8)  # 30 batches: the last step has two
    ]


def test_a_step_that_reaches_into_the_next_rollout_is_refused_where_rates_are_annealed():
    class Rollouts(SACData):
        updates_per_rate = 6

    agent = SAC(ENV, anneal_lr=True)
    with pytest.raises(ValueError, match="accumulate_grad_batches=4 must divide the 6 batches"):
        fit(agent, kind=Rollouts, batches_per_step=4)
    agent = SAC(ENV, anneal_lr=True)
    rates = Rates(agent)
    fit(agent, rates, kind=Rollouts, batches_per_step=3)
    assert [applied["actor/muon"] for applied in rates.applied] == [
        0.02 * (1 - step // 2 / 5) for step in range(10)
    ]


def test_rates_are_constant_unless_annealed():
    assert fit_with_rates().applied == [INITIAL] * 30


def test_the_updates_of_a_rollout_share_their_rates():
    class Rollouts(SACData):
        updates_per_rate = 7

    rates = fit_with_rates(kind=Rollouts, anneal_lr=True)
    for update, applied in enumerate(rates.applied):
        share = 1 - update // 7 / 5  # 30 updates are 5 times 7, the last ones cut short
        assert applied == {name: lr * share for name, lr in INITIAL.items()}


def test_a_scheduler_of_torch_is_stepped_after_each_update():
    make = partial(lr_scheduler.CosineAnnealingLR, T_max=30, eta_min=1e-5)
    rates = fit_with_rates(anneal_lr=make)
    other = SAC(ENV, optimizer=SACOptimizers(critic=OptimizerConfig(case="adamw")))
    optimizer = other.build_optimizer()
    scheduler = make(optimizer)
    for applied in rates.applied:
        assert applied == {group["name"]: group["lr"] for group in optimizer.param_groups}
        optimizer.step()
        scheduler.step()


def test_logged_rates_are_those_of_the_same_step():
    rates = fit_with_rates(anneal_lr=True)
    assert [step for step, _ in rates.logged] == [6, 13, 20, 27]
    for step, metrics in rates.logged:
        applied = rates.applied[step]
        logged = {name: value for name, value in metrics.items() if "learning_rate" in name}
        assert logged == {
            "train/learning_rate": applied["actor/muon"],
            "train/aux_learning_rate": applied["actor/aux"],
            "train/learning_rate/actor": applied["actor/muon"],
            "train/aux_learning_rate/actor": applied["actor/aux"],
            "train/learning_rate/critic": applied["critic/adamw"],
            "train/learning_rate/alpha": applied["alpha/adam"],
        }


def test_without_muon_there_is_no_auxiliary_rate():
    case = OptimizerConfig(case="adam", lr=1e-3)
    agent = SAC(ENV, optimizer=SACOptimizers(case, case), anneal_lr=True)
    rates = Rates(agent)
    fit(agent, rates)
    step, metrics = rates.logged[-1]
    assert not any("aux" in name for name in metrics)
    assert metrics["train/learning_rate"] == 1e-3 * (1 - step / 30)


def test_the_logged_momentum_is_that_of_the_same_step():
    class WarmedUp(SAC):
        def build_optimizer(self):
            optimizer = super().build_optimizer()
            for group in optimizer.param_groups:
                group |= {"momentum_start_step": 5, "momentum_warmup_steps": 20}
            return optimizer

    agent = WarmedUp(ENV)
    rates = Rates(agent)
    fit(agent, rates)
    for (step, metrics), share in zip(rates.logged, (1 / 20, 8 / 20, 15 / 20, 1.0), strict=True):
        assert step in (6, 13, 20, 27)
        assert metrics["train/momentum/actor/muon"] == pytest.approx(0.95 * share)
        assert metrics["train/momentum/critic/aux"] == pytest.approx(0.9 * share)


@pytest.mark.parametrize(
    ("anneal_lr", "message"),
    [
        (partial(lr_scheduler.StepLR, step_size=0), "no scheduler that works: integer .* by zero"),
        (partial(lr_scheduler.LinearLR, start_factor=-1), "no scheduler that works: Starting"),
        (lr_scheduler.StepLR, "no scheduler that works: .* missing .* 'step_size'"),
        (partial(lr_scheduler.ConstantLR, last_epoch=5), "no scheduler that works: .*initial_lr"),
        (lr_scheduler.ReduceLROnPlateau, "needs no metric, but makes ReduceLROnPlateau"),
        (lambda optimizer: None, "but makes NoneType"),
        (0.5, "no scheduler that works: 'float' object is not callable"),
    ],
)
def test_a_scheduler_that_does_not_fit_shows_when_the_agent_is_made(anneal_lr, message):
    with pytest.raises(ValueError, match=f"model.anneal_lr .*{message}"):
        SAC(ENV, anneal_lr=anneal_lr)


def test_a_scheduler_that_ends_before_the_run_is_refused():
    one_cycle = partial(lr_scheduler.OneCycleLR, max_lr=0.01)
    with pytest.raises(ValueError, match="total_steps=29, but the run makes 30 updates"):
        fit(SAC(ENV, anneal_lr=partial(one_cycle, total_steps=29)))
    fit(SAC(ENV, anneal_lr=partial(one_cycle, total_steps=30)))


@pytest.mark.parametrize(
    ("max_grad_norm", "message"),
    [
        (0.0, "above 0, but is 0.0"),
        ({"critic": -1.0}, "critic's norm must be above 0, but is -1.0"),
        ({"critc": 1.0}, "no network 'critc' .* there are actor, critic, alpha"),
    ],
)
def test_a_bound_that_does_not_fit_shows_when_the_agent_is_made(max_grad_norm, message):
    with pytest.raises(ValueError, match=f"model.max_grad_norm: .*{message}"):
        SAC(ENV, max_grad_norm=max_grad_norm)


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


def test_a_move_leaves_policy_and_loss_one_network():
    actor = partial(TanhNormalActor, hidden=[8, 8], spectral_norm=True)
    agent = SAC(ENV, actor=actor).double()
    of_loss = agent.loss.actor_network_params
    tensors = dict(agent.policy.named_parameters()) | dict(agent.policy.named_buffers())
    assert sum(name.endswith(".u") for name in tensors) == 2
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float64
        assert tensor.data_ptr() == of_loss[tuple(name.split("."))].data_ptr()
    fit(agent.float())
    for name, tensor in agent.policy.named_buffers():
        assert torch.equal(tensor, agent.loss.actor_network_params[tuple(name.split("."))])
