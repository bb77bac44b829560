"""Muesli on CartPole-v1 in a plain TorchRL loop: python docs/muesli_cartpole.py SEED"""

import sys
from statistics import fmean

import torch
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs import GymEnv, RewardSum, TransformedEnv
from torchrl.objectives import SoftUpdate

from muon_rl.modules import MuesliPolicy, WorldModel
from muon_rl.objectives import (
    CMPOLoss,
    DynamicsLoss,
    LossSequence,
    MuesliModelLoss,
    MuesliPolicyLoss,
    OneStepLookahead,
)
from muon_rl.specs import Specs

SEED, FRAMES = int(sys.argv[1]), 50_000
torch.manual_seed(SEED)
env = TransformedEnv(GymEnv("CartPole-v1", categorical_action_encoding=True), RewardSum())
env.set_seed(SEED)
specs = Specs(env.observation_spec["observation"], env.action_spec)
widths = {"hidden": [64], "dynamics_hidden": [64], "head_hidden": [64]}
policy = MuesliPolicy(WorldModel(specs, latent=64, **widths))
actor_critic = MuesliPolicyLoss(policy)
cmpo = CMPOLoss(policy, OneStepLookahead(policy))
dynamics = DynamicsLoss(policy, unroll_steps=3)
model = MuesliModelLoss(policy, unroll_steps=3, own_unroll=False)
loss = LossSequence({"policy": actor_critic, "cmpo": cmpo, "dynamics": dynamics, "model": model})
targets = [SoftUpdate(each, tau=0.1) for each in (actor_critic, cmpo, dynamics)]
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)

collector = Collector(
    env, policy, frames_per_batch=200, total_frames=FRAMES, auto_register_policy_transforms=False
)
buffer = ReplayBuffer(storage=LazyTensorStorage(500), batch_size=8)  # sequences of 20 frames
returns, frames = [], 0
for data in collector:
    frames += data.numel()
    returns += data["next", "episode_reward"][data["next", "done"]].tolist()
    fresh = data.select(*loss.in_keys, strict=False).reshape(-1, 20)
    buffer.extend(fresh)
    for _ in range(10):
        batch = torch.cat([fresh[torch.randperm(len(fresh))[:2]], buffer.sample()])
        prior = actor_critic.target_critic_network_params
        actor_critic.value_estimator(batch, params=prior, target_params=prior)  # Retrace
        out = loss(batch)
        sum(value for key, value in out.items() if key.startswith("loss_")).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for target in targets:
            target.step()
    if frames % (FRAMES // 10) == 0:
        print(f"{frames:6d} frames  return {fmean(returns[-20:]):5.1f}")
