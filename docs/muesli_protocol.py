"""Four configurations on CartPole-v1: python docs/muesli_protocol.py ppo (or model, cmpo, full)"""

import sys

import torch
from torchrl.collectors import Collector
from torchrl.envs import GymEnv
from torchrl.modules import MLP, QValueActor
from torchrl.objectives import ClipPPOLoss, DQNLoss, SoftUpdate, ValueEstimators

from muon_rl.modules import MuesliPolicy, WorldModel
from muon_rl.objectives import CMPOLoss, DynamicsLoss, LossSequence, MuesliModelLoss
from muon_rl.objectives.presets import CONSERVATIVE as PRESET
from muon_rl.specs import Specs

CONFIGURATION, FRAMES = sys.argv[1], 10_000
torch.manual_seed(0)
env = GymEnv("CartPole-v1", categorical_action_encoding=True)
env.set_seed(0)
specs = Specs(env.observation_spec["observation"], env.action_spec)
widths = {"hidden": [64], "dynamics_hidden": [64], "head_hidden": [64]}
policy = MuesliPolicy(WorldModel(specs, latent=64, **widths))
q_network = QValueActor(MLP(4, 2), in_keys=["observation"], action_space="categorical")

ppo = ClipPPOLoss(policy, policy.world_model)
ppo.set_keys(value="value_pred")
ppo.make_value_estimator(ValueEstimators.GAE, gamma=0.99, lmbda=0.95)
losses = {"ppo": ppo}
if CONFIGURATION in ("cmpo", "full"):
    losses["q_head"] = DQNLoss(q_network, action_space="categorical", delay_value=True)
    losses["cmpo"] = CMPOLoss(policy, q_network, **PRESET["cmpo"])
if CONFIGURATION == "full":
    losses["dynamics"] = DynamicsLoss(policy, **PRESET["dynamics"])
if CONFIGURATION != "ppo":
    losses["model"] = MuesliModelLoss(
        policy,
        own_unroll=CONFIGURATION != "full",  # else DynamicsLoss's
        policy_target="current" if CONFIGURATION == "model" else "cmpo",
        **PRESET["muesli_model"],
    )
loss = LossSequence(losses)
taus = {"q_head": 0.01, "cmpo": 0.1, "dynamics": 0.1}
if CONFIGURATION in ("model", "cmpo"):
    taus["model"] = 0.1  # it has values to bootstrap from
targets = [SoftUpdate(losses[name], tau=tau) for name, tau in taus.items() if name in losses]
optimizer = torch.optim.AdamW(loss.parameters(), lr=1e-3, weight_decay=0.0)

collector = Collector(
    env, policy, frames_per_batch=500, total_frames=FRAMES, auto_register_policy_transforms=False
)
for number, data in enumerate(collector, 1):
    data = data.exclude("value_pred")  # TorchRL's GAE stumbles over a value without a next one
    now, prior = ppo.critic_network_params, ppo.target_critic_network_params
    ppo.value_estimator(data, params=now, target_params=prior)
    for _ in range(5):
        sequences = data.reshape(-1, 20)
        for batch in sequences[torch.randperm(len(sequences))].split(5):
            out = loss(batch)
            sum(value for key, value in out.items() if key.startswith("loss")).backward()
            torch.nn.utils.clip_grad_norm_(loss.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            for target in targets:
                target.step()
    if number in (1, FRAMES // 500):
        print(f"after {500 * number} frames")
        print("\n".join(f"  {key:<24}{value.mean():8.4f}" for key, value in out.items()))
