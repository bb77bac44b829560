"""The policy that is a world model: acting, masks, distributions, environments."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import Bounded, Categorical, OneHot, Unbounded
from torchrl.envs import Compose, GymEnv, InitTracker, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import set_recurrent_mode
from torchrl.modules.utils import get_primers_from_module

from muon_rl.modules import MuesliPolicy, WorldModel
from muon_rl.optim import parameter_roles
from muon_rl.specs import Specs

OBSERVATION = Unbounded(4)
INDEX, ONE_HOT = Categorical(3), OneHot(3, dtype=torch.int64)
BOX = Bounded(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 4.0]))
WIDTHS = {"latent": 8, "hidden": [12], "dynamics_hidden": [12], "head_hidden": [10]}
ACTIONS = pytest.mark.parametrize("action", [INDEX, ONE_HOT, BOX], ids=["index", "one-hot", "box"])


def policy_of(action=INDEX, *, lstm=False, bins=11, observation=OBSERVATION, **options):
    torch.manual_seed(0)
    model = WorldModel(Specs(observation, action), lstm=lstm, bins=bins, **WIDTHS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return MuesliPolicy(model, **options)


def observations(*batch: int) -> TensorDict:
    return TensorDict(observation=torch.randn(*batch, 4), batch_size=batch)


@ACTIONS
@pytest.mark.parametrize("batch", [(), (6,), (6, 3)], ids=str)
@pytest.mark.parametrize("bins", [None, 11])
def test_one_forward_writes_all_keys(action, bins, batch):
    policy = policy_of(action, bins=bins)
    with set_exploration_type(ExplorationType.RANDOM):
        out = policy(observations(*batch))
    params = {"loc", "scale"} if action is BOX else {"logits"}
    heads = {"value_logits", "reward_logits"} if bins else set()
    assert set(policy.out_keys) == {
        "hidden_state", "value_pred", "action", "action_log_prob", "reward_pred", *params, *heads,
    }  # fmt: skip
    assert set(out.keys(True, True)) == {"observation", *policy.out_keys}
    assert policy.in_keys == ["observation"]
    assert all(action.is_in(one) for one in out["action"].reshape(-1, *action.shape))
    assert out["reward_pred"].shape == out["value_pred"].shape == (*batch, 1)
    assert out["action_log_prob"].shape == batch


@ACTIONS
def test_the_reward_is_that_of_the_sampled_action(action):
    policy = policy_of(action)
    with set_exploration_type(ExplorationType.RANDOM):
        out = policy(observations(64))
    step = policy.world_model.step(out["hidden_state"], out["action"])
    torch.testing.assert_close(out["reward_pred"], step["reward_pred"])
    torch.testing.assert_close(out["reward_logits"], step["reward_logits"])
    other = policy.world_model.step(out["hidden_state"], out["action"].roll(1, 0))
    assert not torch.allclose(out["reward_pred"], other["reward_pred"])


@ACTIONS
def test_its_distribution_gives_the_log_probability_that_it_wrote(action):
    policy = policy_of(action)
    with set_exploration_type(ExplorationType.RANDOM):
        out = policy(observations(64))
    dist = policy.get_dist(out.select("observation"))
    # Near a bound a tanh cannot be undone exactly.
    near = {"rtol": 1e-4, "atol": 1e-4} if action is BOX else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(dist.log_prob(out["action"]), out["action_log_prob"], **near)
    torch.testing.assert_close(policy.log_prob(out.clone()), out["action_log_prob"], **near)
    if action is not BOX:
        index = out["action"].long().argmax(-1) if action is ONE_HOT else out["action"]
        expected = out["logits"].log_softmax(-1).gather(-1, index[:, None])[:, 0]
        torch.testing.assert_close(out["action_log_prob"], expected)


def test_actions_follow_the_probabilities_and_deterministically_the_mode():
    policy = policy_of()
    data = observations(1).expand(20_000).clone()
    with set_exploration_type(ExplorationType.RANDOM):
        out = policy(data.clone())
    shares = out["action"].bincount(minlength=3) / 20_000
    expected = out["logits"][0].softmax(-1)
    torch.testing.assert_close(shares, expected, atol=0.015, rtol=0)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert (policy(data)["action"] == expected.argmax()).all()


@pytest.mark.parametrize("action", [INDEX, ONE_HOT], ids=["index", "one-hot"])
@pytest.mark.parametrize("kind", [ExplorationType.RANDOM, ExplorationType.DETERMINISTIC])
def test_a_masked_action_is_never_taken_and_the_rest_is_renormalised(action, kind):
    policy = policy_of(action, action_mask=True)
    assert set(policy.in_keys) == {"observation", "action_mask"}
    data = observations(200)
    unmasked = policy.world_model(data.clone())["logits"]
    mask = unmasked < unmasked.amax(-1, keepdim=True)  # all but the favourite
    data.set("action_mask", mask)
    with set_exploration_type(kind):
        out = policy(data.clone())
    index = out["action"].long().argmax(-1) if action is ONE_HOT else out["action"]
    assert mask.gather(-1, index[:, None]).all()
    masked = out["logits"].masked_fill(~mask, -torch.inf).log_softmax(-1)
    expected = masked.gather(-1, index[:, None])[:, 0]
    torch.testing.assert_close(out["action_log_prob"], expected)
    torch.testing.assert_close(out["logits"], unmasked)


def test_a_continuous_action_takes_no_mask():
    with pytest.raises(ValueError, match=r"action_mask=True needs a discrete action, but .* Bound"):
        policy_of(BOX, action_mask=True)


@pytest.mark.parametrize("lstm", [False, True], ids=["", "lstm"])
@pytest.mark.parametrize(
    ("env", "options"),
    [
        ("CartPole-v1", {}),
        ("CartPole-v1", {"categorical_action_encoding": True}),
        ("Pendulum-v1", {}),
    ],
    ids=["one-hot", "index", "box"],
)
def test_a_collector_drives_it_and_a_loss_reads_the_same_from_the_data(env, options, lstm):
    env = GymEnv(env, **options)
    specs = env.observation_spec["observation"], env.action_spec
    policy = policy_of(specs[1], lstm=lstm, observation=specs[0])
    env.set_seed(0)
    if lstm:
        env = TransformedEnv(env, Compose(InitTracker(), get_primers_from_module(policy)))
    collector = Collector(env, policy, frames_per_batch=100, total_frames=100)
    (data,) = collector
    collector.shutdown()
    if "Pendulum" not in str(env):
        assert data["next", "done"].any()
    with set_recurrent_mode(True), torch.no_grad():
        again = policy.world_model(data.clone().exclude("hidden_state", "reward_pred"))
        dist = policy.get_dist(data.select(*policy.in_keys))
    for key in ("hidden_state", "value_pred", "reward_pred"):
        torch.testing.assert_close(again[key], data[key], rtol=1e-4, atol=1e-4)
    log_prob = dist.log_prob(data["action"])
    torch.testing.assert_close(log_prob, data["action_log_prob"], rtol=1e-3, atol=1e-4)


@ACTIONS
def test_the_parameters_are_the_world_model_s_and_so_are_the_roles(action):
    policy = policy_of(action, lstm=True)
    own = {id(parameter) for parameter in policy.parameters()}
    assert own == {id(parameter) for parameter in policy.world_model.parameters()}
    roles = parameter_roles(policy.world_model)
    assert parameter_roles(policy) == {f"module.0.{name}": role for name, role in roles.items()}


@pytest.mark.parametrize(
    "twin_of", [copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))]
)
def test_a_copy_predicts_rewards_with_its_own_parameters(twin_of):
    policy = policy_of()
    data = observations(8)
    reward = policy(data.clone())["reward_pred"]
    twin = twin_of(policy)
    with torch.no_grad():
        for parameter in policy.world_model.dynamics.parameters():
            parameter.zero_()
    torch.testing.assert_close(twin(data.clone())["reward_pred"], reward)
    assert not torch.allclose(policy(data.clone())["reward_pred"], reward)


def test_the_log_probability_can_be_left_out():
    policy = policy_of(return_log_prob=False)
    assert "action_log_prob" not in policy.out_keys
    assert "action_log_prob" not in policy(observations(3))
