"""Retrace against a walk in numpy, TorchRL's on-policy estimators, exact means; in losses."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import CompositeDistribution, NormalParamExtractor, TensorDictModule
from torch import nn
from torch.distributions import Categorical, Independent, Normal
from torch.testing import assert_close
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import A2CLoss, ClipPPOLoss, SACLoss
from torchrl.objectives.value import GAE, TD1Estimator, TDLambdaEstimator
from torchrl.objectives.value.functional import vtrace_advantage_estimate

from muon_rl.objectives import RetraceEstimator

OBSERVATION, ACTIONS = 3, 4


def make_actor(**options) -> ProbabilisticActor:
    module = TensorDictModule(nn.Linear(OBSERVATION, ACTIONS), ["observation"], ["logits"])
    return ProbabilisticActor(
        module, in_keys=["logits"], distribution_class=Categorical, return_log_prob=True, **options
    )


def make_critic() -> ValueOperator:
    return ValueOperator(nn.Linear(OBSERVATION, 1), in_keys=["observation"])


def make_data(*batch: int, ends: float = 0.25, on_policy: ProbabilisticActor | None = None):
    """Return a batch whose next observations are the following ones, but at the ends."""
    observation = torch.randn(*batch, OBSERVATION)
    terminated, truncated = torch.rand(2, *batch, 1) < ends
    done = terminated | truncated
    following = torch.where(done, torch.randn_like(observation), observation.roll(-1, -2))
    following[..., -1, :] = torch.randn(OBSERVATION)
    td = TensorDict(
        {
            "observation": observation,
            "action": torch.randint(ACTIONS, batch),
            "action_log_prob": torch.rand(batch).log(),
            "next": {
                "observation": following,
                "reward": torch.randn(*batch, 1),
                "done": done,
                "terminated": terminated,
            },
        },
        batch,
    )
    if on_policy is not None:
        with torch.no_grad():
            on_policy(td)
    return td


def by_walking(td, actor, critic, q_table=None, *, gamma, lmbda, valid=None):
    """Return Retrace's returns of one sequence, from the definition."""
    with torch.no_grad():
        value_next = critic.module(td["next", "observation"]).squeeze(-1).double().numpy()
        log_pi = actor.module[0].module(td["observation"]).log_softmax(-1)
        log_pi = log_pi.gather(-1, td["action"].unsqueeze(-1)).squeeze(-1)
    ratio = (log_pi - td["action_log_prob"]).exp().clamp(max=1).double().numpy()
    reward = td["next", "reward"].squeeze(-1).double().numpy()
    terminated = td["next", "terminated"].squeeze(-1).numpy()
    done = td["next", "done"].squeeze(-1).numpy()
    found = np.zeros(len(reward))
    for t in reversed(range(len(reward))):
        if terminated[t]:
            found[t] = reward[t]
            continue
        found[t] = value_next[t]
        last = t + 1 == len(reward) or done[t] or (valid is not None and not valid[t + 1])
        if not last:
            q = value_next[t] if q_table is None else q_table[t + 1].item()
            found[t] += lmbda * ratio[t + 1] * (found[t + 1] - q)
        found[t] = reward[t] + gamma * found[t]
    return torch.as_tensor(found, dtype=torch.float32).unsqueeze(-1)


@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
@pytest.mark.parametrize("q", ["none", "taken", "all"])
def test_returns_are_those_of_a_walk_with_ends_in_the_middle(batch, steps, q):
    torch.manual_seed(steps)
    actor, critic, td = make_actor(), make_critic(), make_data(*batch, steps)
    estimator = RetraceEstimator(gamma=0.9, lmbda=0.8, value_network=critic, actor_network=actor)
    q_all = torch.randn(*batch, steps, ACTIONS)
    q_taken = q_all.gather(-1, td["action"].unsqueeze(-1))
    if q != "none":
        td["q"] = q_all if q == "all" else q_taken
        estimator.set_keys(state_action_value="q")
    found = estimator(td)
    for index in np.ndindex(*batch):
        table = None if q == "none" else q_taken[index]
        wanted = by_walking(td[index], actor, critic, table, gamma=0.9, lmbda=0.8)
        assert_close(found["value_target"][index], wanted, rtol=1e-5, atol=1e-5)
    assert_close(found["advantage"], found["value_target"] - critic.module(td["observation"]))
    assert not found["advantage"].requires_grad
    assert td["next", "done"][..., :-1, :].any() or steps < 9


@pytest.mark.parametrize("lmbda", [0.0, 0.7, 1.0])
def test_on_policy_it_is_td_lambda_and_gae(lmbda):
    actor, critic = make_actor(), make_critic()
    td = make_data(4, 12, ends=0.1, on_policy=actor)
    common = {"gamma": 0.9, "value_network": critic}
    found = RetraceEstimator(lmbda=lmbda, actor_network=actor, **common)(td.clone())
    wanted = TDLambdaEstimator(lmbda=lmbda, vectorized=False, **common)(td.clone())
    for key in ("advantage", "value_target"):
        assert_close(found[key], wanted[key], rtol=1e-4, atol=1e-5)
    wanted = GAE(lmbda=lmbda, vectorized=False, **common)(td.clone())
    assert_close(found["advantage"], wanted["advantage"], rtol=1e-4, atol=1e-5)
    # (TorchRL's vectorised estimators raise an IndexError at 0.)
    if lmbda == 1.0:
        wanted = TD1Estimator(**common)(td.clone())
        assert_close(found["value_target"], wanted["value_target"])


def test_the_state_target_off_policy_is_v_trace():
    actor, critic, td = make_actor(), make_critic(), make_data(5, 12, ends=0.1)
    found = RetraceEstimator(
        gamma=0.9, lmbda=1.0, value_network=critic, actor_network=actor, target="state_value"
    )(td)
    log_pi = actor.get_dist(td).log_prob(td["action"]).unsqueeze(-1)
    following = (td["next", key] for key in ("state_value", "reward", "done", "terminated"))
    advantage, target = vtrace_advantage_estimate(
        0.9, log_pi, td["action_log_prob"].unsqueeze(-1), td["state_value"], *following
    )
    assert_close(found["value_target"], target, rtol=1e-4, atol=1e-5)
    ratio = (log_pi - td["action_log_prob"].unsqueeze(-1)).exp().clamp(max=1)
    assert_close(ratio * found["advantage"], advantage, rtol=1e-4, atol=1e-5)


def test_with_the_true_q_its_mean_is_the_true_q_whoever_acts():
    """Two steps, two actions each, summed over the behaviour's choice of the second."""
    reward = torch.tensor([[1.0, -2.0], [3.0, 0.5]])  # of the second step, after each first action
    policy, behaviour, gamma = torch.tensor([0.7, 0.3]), torch.tensor([0.2, 0.8]), 0.5
    later_v = reward @ policy
    true_q = torch.tensor([0.4, -0.1]) + gamma * later_v
    means = {"true": torch.zeros(2), "state": torch.zeros(2), "stands": torch.zeros(2)}
    for first, second in itertools.product(range(2), range(2)):
        td = TensorDict(
            {
                "policy_log_prob": policy[[first, second]].log(),
                "action_log_prob": behaviour[[first, second]].log(),
                "state_value": torch.stack([true_q @ policy, later_v[first]]).unsqueeze(-1),
                "q": torch.stack([true_q[first], reward[first, second]]).unsqueeze(-1),
                "next": {
                    "state_value": torch.stack([later_v[first], torch.tensor(99.0)]).unsqueeze(-1),
                    "reward": torch.tensor([[[0.4], [-0.1]][first], [reward[first, second]]]),
                    "done": torch.tensor([[False], [True]]),
                },
            },
            [2],
        )
        for name, target in (("true", "action_value"), ("state", "state_value"), ("stands", None)):
            estimator = RetraceEstimator(gamma=gamma, target=target or "action_value")
            if target:
                estimator.set_keys(state_action_value="q")
            means[name][first] += behaviour[second] * estimator(td)["value_target"][0, 0]
    assert_close(means["true"], true_q)
    assert_close(means["state"] @ behaviour, true_q @ policy)
    assert not torch.allclose(means["stands"], true_q, atol=0.05)


def test_the_probability_is_of_the_action_taken():
    actor, critic, td = make_actor(), make_critic(), make_data(2, 6, ends=0.0)
    td["action_log_prob"] = torch.zeros(2, 6)
    estimator = RetraceEstimator(gamma=0.9, value_network=critic, actor_network=actor)
    before = estimator(td.clone())["value_target"]
    td["action"][:, 3] = (td["action"][:, 3] + 1) % ACTIONS
    after = estimator(td)["value_target"]
    assert (before != after).squeeze(-1)[:, :3].all()
    assert torch.equal(before[:, 3:], after[:, 3:])


def test_a_terminal_state_and_padding_are_not_read():
    actor, critic, td = make_actor(), make_critic(), make_data(1, 8, ends=0.0)
    valid = torch.tensor([True] * 6 + [False] * 2)
    td["next", "terminated"][0, 2] = td["next", "done"][0, 2] = True
    td["next", "observation"][0, 2] = math.nan
    td["collector", "mask"] = valid.reshape(1, 8, 1)
    td["action_log_prob"][0, 6:] = math.nan
    td["next", "reward"][0, 6:] = math.nan
    estimator = RetraceEstimator(gamma=0.9, value_network=critic, actor_network=actor)
    found = estimator(td)["value_target"][0, :6]
    wanted = by_walking(td[0], actor, critic, gamma=0.9, lmbda=0.95, valid=valid)[:6]
    assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert found[2] == td["next", "reward"][0, 2]


@pytest.mark.parametrize("kind", ["class", "for_loss"])
@pytest.mark.parametrize("loss_class", [ClipPPOLoss, A2CLoss])
def test_losses_of_states_take_it_and_follow_the_policy_that_they_train(loss_class, kind):
    torch.manual_seed(0)
    actor, critic, td = make_actor(), make_critic(), make_data(4, 6)
    loss = loss_class(actor, critic)
    loss.set_keys(advantage="adv", value_target="goal")
    names, keys = dict(loss.named_parameters()).keys(), loss.state_dict().keys()
    if kind == "class":
        loss.make_value_estimator(
            RetraceEstimator, gamma=0.9, value_network=critic, actor_network=actor
        )
        loss.set_keys(advantage="adv", value_target="goal")  # TorchRL hands on what is set later
    else:
        loss.make_value_estimator(RetraceEstimator.for_loss(loss, gamma=0.9))
    assert dict(loss.named_parameters()).keys() == names
    added = loss.state_dict().keys() - keys
    assert added == {"_value_estimator.gamma", "_value_estimator.lmbda"}
    optimizer = torch.optim.SGD(loss.parameters(), 0.5)
    for _ in range(2):
        data = td.clone()
        losses = loss(data)
        params = loss.critic_network_params
        loss.value_estimator(data, params=params, target_params=params)
        assert {"adv", "goal"} <= set(data.keys())
        with torch.no_grad():
            for i in range(4):
                wanted = by_walking(td[i], actor, critic, gamma=0.9, lmbda=0.95)
                assert_close(data["goal"][i], wanted, rtol=1e-4, atol=1e-5)
        sum(value.sum() for key, value in losses.items() if key.startswith("loss_")).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_next_values_are_the_target_networks():
    actor, critic, td = make_actor(), make_critic(), make_data(2, 5)
    other = make_critic()
    params, targets = TensorDict.from_module(critic), TensorDict.from_module(other)
    estimator = RetraceEstimator(gamma=0.9, value_network=critic, actor_network=actor)
    found = estimator(td.clone(), params=params, target_params=targets)
    returns = torch.stack([by_walking(td[i], actor, other, gamma=0.9, lmbda=0.95) for i in (0, 1)])
    assert_close(found["value_target"], returns, rtol=1e-5, atol=1e-5)
    assert_close(found["advantage"], returns - critic.module(td["observation"]))
    assert_close(estimator.value_estimate(td, target_params=targets), found["value_target"])


class JointLinear(nn.Linear):
    def forward(self, observation, action):
        return super().forward(torch.cat([observation, action], -1))


def test_losses_of_action_values_take_it():
    """SAC writes the next value, its own soft one, before it asks for the estimate."""
    module = nn.Sequential(nn.Linear(OBSERVATION, 4), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(module, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=lambda loc, scale: Independent(Normal(loc, scale), 1),
        return_log_prob=True,
    )
    critic = ValueOperator(JointLinear(OBSERVATION + 2, 1), in_keys=["observation", "action"])
    loss = SACLoss(actor, critic, target_entropy=-2.0)
    loss.make_value_estimator(RetraceEstimator.for_loss(loss, gamma=0.9))
    td = make_data(3, 7, ends=0.0, on_policy=actor)
    before = loss(td)["loss_qvalue"]
    before.backward()
    assert all(p.grad.abs().sum() > 0 for p in loss.qvalue_network_params.flatten_keys().values())
    td["next", "reward"][:, 6] += 10
    one_step = loss(td.clone())["loss_qvalue"]
    assert one_step != before
    values = torch.randn(3, 7, 1)
    estimator = loss.value_estimator
    plain = td["next", "reward"] + 0.9 * values
    further = estimator.value_estimate(td, next_value=values)
    assert (further != plain).squeeze(-1)[:, :-1].all()
    assert_close(further[:, -1], plain[:, -1])


def test_a_composite_policy_counts_all_its_parts():
    def parts(params, name_map=None):
        maps = {"a": Categorical, "b": Normal}
        return CompositeDistribution(params, distribution_map=maps, log_prob_key="lp")

    actor = ProbabilisticActor(
        TensorDictModule(
            lambda o: (o, o[..., 0], o[..., 1].exp()),
            ["observation"],
            [("params", "a", "logits"), ("params", "b", "loc"), ("params", "b", "scale")],
        ),
        in_keys=["params"],
        distribution_class=parts,
    )
    td = make_data(2, 5)
    td["a"], td["b"] = torch.randint(OBSERVATION, (2, 5)), torch.randn(2, 5)
    td["policy_log_prob"] = Categorical(logits=td["observation"]).log_prob(td["a"]) + Normal(
        td["observation"][..., 0], td["observation"][..., 1].exp()
    ).log_prob(td["b"])
    td["parts"] = TensorDict(first=torch.rand(2, 5).log(), second=torch.randn(2, 5))
    td["action_log_prob"] = td["parts", "first"] + td["parts", "second"]
    critic = make_critic()
    wanted = RetraceEstimator(gamma=0.9, value_network=critic)(td.clone())["value_target"]
    estimator = RetraceEstimator(gamma=0.9, value_network=critic, actor_network=actor)
    estimator.set_keys(sample_log_prob="parts")
    assert_close(estimator(td)["value_target"], wanted)


def test_agents_have_returns_of_their_own():
    """Rewards (*batch, T, agents, 1), one log-probability an agent."""
    td = make_data(3, 5, 2).apply(lambda x: x, batch_size=[3, 5])
    td["policy_log_prob"], td["state_value"] = torch.rand(3, 5, 2).log(), torch.randn(3, 5, 2, 1)
    td["next", "state_value"] = torch.randn(3, 5, 2, 1)
    estimator = RetraceEstimator(gamma=0.9)
    found = estimator(td.clone())["value_target"]
    for agent in range(2):
        alone = td.apply(lambda x, agent=agent: x[:, :, agent])
        assert_close(found[:, :, agent], estimator(alone)["value_target"])


def test_without_done_the_other_flags_say_where_episodes_end():
    td = make_data(3, 9)
    networks = {"value_network": make_critic(), "actor_network": make_actor()}
    wanted = RetraceEstimator(gamma=0.9, **networks)(td.clone())["value_target"]
    td["next", "truncated"] = td["next"].pop("done") & ~td["next", "terminated"]
    assert td["next", "truncated"].any()
    assert_close(RetraceEstimator(gamma=0.9, **networks)(td)["value_target"], wanted)


def test_time_may_be_another_axis():
    actor, critic, td = make_actor(), make_critic(), make_data(2, 5)
    networks = {"value_network": critic, "actor_network": actor}
    wanted = RetraceEstimator(gamma=0.9, **networks)(td.clone())["value_target"]
    first = td.transpose(0, 1).contiguous()
    found = RetraceEstimator(gamma=0.9, time_dim=0, **networks)(first.clone())["value_target"]
    assert_close(found.transpose(0, 1), wanted)
    first.names = ["time", None]
    found = RetraceEstimator(gamma=0.9, **networks)(first)["value_target"]
    assert_close(found.transpose(0, 1), wanted)


@pytest.mark.parametrize("kind", [torch.int64, torch.float64])
def test_rewards_of_another_type_leave_values_as_they_are(kind):
    td = make_data(2, 5)
    td["next", "reward"] = torch.randint(-3, 4, (2, 5, 1)).float()
    networks = {"value_network": make_critic(), "actor_network": make_actor()}
    estimator = RetraceEstimator(gamma=0.9, **networks)
    wanted = estimator(td.clone())
    td["next", "reward"] = td["next", "reward"].to(kind)
    found = estimator(td)
    for key in ("advantage", "value_target"):
        assert_close(found[key].float(), wanted[key])
    for key in ("state_value", "policy_log_prob"):
        td[key] = torch.zeros(2, 5, 1, dtype=kind)
    td["next", "state_value"] = torch.ones(2, 5, 1, dtype=kind)
    bare = RetraceEstimator(gamma=0.5)(
        td.select("state_value", "policy_log_prob", "action_log_prob", "next")
    )
    last = td["next", "reward"][:, -1] + 0.5 * ~td["next", "terminated"][:, -1]
    assert_close(bare["value_target"][:, -1], last, check_dtype=False)


def test_a_q_network_reads_the_action_and_leaves_the_data_alone():
    actor, critic, td = make_actor(), make_critic(), make_data(2, 5)
    q_network = TensorDictModule(
        nn.Linear(OBSERVATION, ACTIONS), ["observation"], ["state_action_value"]
    )
    networks = {"value_network": critic, "actor_network": actor}
    estimator = RetraceEstimator(gamma=0.9, q_network=q_network, **networks)
    found = estimator(td.clone())
    assert "state_action_value" not in found
    td["q"] = q_network.module(td["observation"]).detach()
    td["action"] = nn.functional.one_hot(td["action"], ACTIONS)
    estimator = RetraceEstimator(gamma=0.9, value_network=critic)
    estimator.set_keys(state_action_value="q")
    td["policy_log_prob"] = actor.get_dist(td).log_prob(td["action"].argmax(-1)).detach()
    assert_close(estimator(td)["value_target"], found["value_target"])


def test_it_takes_tensors_too():
    actor, critic, td = make_actor(), make_critic(), make_data(2, 5)
    estimator = RetraceEstimator(gamma=0.9, value_network=critic, actor_network=actor)
    names = {key if isinstance(key, str) else "_".join(key): key for key in estimator.in_keys}
    advantage, target = estimator(**{name: td[key] for name, key in names.items()})
    wanted = estimator(td)
    assert torch.equal(advantage, wanted["advantage"])
    assert torch.equal(target, wanted["value_target"])


@pytest.mark.parametrize(
    "missing, message",
    [
        ("action_log_prob", "return_log_prob=True"),
        ("policy_log_prob", "Give RetraceEstimator actor_network=..."),
        ("state_value", "Give RetraceEstimator value_network=..."),
        (("next", "state_value"), "Give RetraceEstimator value_network=..."),
        ("q", "Give RetraceEstimator q_network=..."),
    ],
)
def test_what_is_missing_is_named(missing, message):
    td = make_data(2, 3)
    for key in ("policy_log_prob", "state_value", ("next", "state_value"), "q"):
        td[key] = torch.zeros(2, 3) if key == "policy_log_prob" else torch.zeros(2, 3, 1)
    estimator = RetraceEstimator(gamma=0.9)
    estimator.set_keys(state_action_value="q")
    estimator(td.clone())
    with pytest.raises(KeyError, match=re.escape(f"hold no {missing!r}") + f".*{message}"):
        estimator(td.exclude(missing))


def test_what_does_not_fit_is_refused():
    for name in ("gamma", "lmbda"):
        with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\], but is 1.5"):
            RetraceEstimator(**{"gamma": 0.9, name: 1.5})
    with pytest.raises(ValueError, match="one of action_value, state_value, but is 'q'"):
        RetraceEstimator(gamma=0.9, target="q")
    td = make_data(2, 3)
    td["steps_to_next_obs"] = torch.ones(2, 3, 1)
    with pytest.raises(ValueError, match="Take MultiStep away"):
        RetraceEstimator(gamma=0.9, value_network=make_critic(), actor_network=make_actor())(td)
    td = make_data(2, 5)
    td["q"] = torch.zeros(2, 5, ACTIONS)
    td["action"] = torch.zeros(2, 5, 2)
    estimator = RetraceEstimator(gamma=0.9, value_network=make_critic())
    estimator.set_keys(state_action_value="q")
    with pytest.raises(ValueError, match="need an action of shape"):
        estimator(td)
