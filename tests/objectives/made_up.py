"""Sequences and world models, made up: for the losses that unroll a model."""

from __future__ import annotations

import itertools

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded, Categorical, OneHot, Unbounded
from torchrl.objectives import SoftUpdate

from muon_rl.modules import MuesliPolicy, WorldModel
from muon_rl.objectives.unrolling import UnrollLoss
from muon_rl.specs import Specs

SMALL = {"latent": 8, "hidden": (8,), "dynamics_hidden": (8,), "head_hidden": (8,)}
ACTIONS = {
    "categorical": Categorical(3),
    "one-hot": OneHot(3),
    "box": Bounded(-2 * torch.ones(2), 2 * torch.ones(2)),
}
# The parts of a WorldModel, by what their parameters' names contain.
PARTS = {
    "encoder": "representation.",
    "transition": "dynamics.module.network.",
    "reward": "dynamics.module.reward.",
    "value": "prediction.module.value.",
    "policy": "prediction.module.policy.",
}


def small_model(kind: str = "categorical", **options) -> WorldModel:
    model = WorldModel(Specs(Unbounded(4), ACTIONS[kind]), **{**SMALL, **options})
    with torch.no_grad():  # heads as large as any, or their gradients vanish beside the others
        for head in (model.dynamics.module.reward, model.prediction.module.value):
            head.network[-1].weight.mul_(100.0)
        model.prediction.module.policy[-1].weight.mul_(100.0)
    return model


def sequences(*batch: int, kind: str = "categorical", samples: int = 5) -> TensorDict:
    """Return made-up data with all that a loss may read, where no episode ends."""
    action = ACTIONS[kind].rand(torch.Size(batch))

    def state() -> dict:
        if kind == "box":
            actions = ACTIONS[kind].rand(torch.Size((*batch, samples)))
            cmpo = {"action": actions, "weight": torch.rand(*batch, samples)}
        else:
            cmpo = {"log_prob": torch.randn(*batch, 3).log_softmax(-1)}
        return {"observation": torch.randn(*batch, 4), "cmpo": cmpo}

    flags = {key: torch.zeros(*batch, 1, dtype=torch.bool) for key in ("done", "terminated")}
    after = {**state(), "reward": torch.randn(*batch, 1), **flags}
    now = {**state(), "action": action, "value_target": torch.randn(*batch, 1), "next": after}
    return TensorDict(now, batch)


def end(data: TensorDict, *, terminated: tuple = (), truncated: tuple = ()) -> TensorDict:
    """Set the flags of steps, and return the data."""
    for index in (*terminated, *truncated):
        data["next", "done"][index] = True
    for index in terminated:
        data["next", "terminated"][index] = True
    return data


def parts_with_gradient(loss: nn.Module) -> set[str]:
    found = {
        part
        for key, p in loss.named_parameters()
        for part, name in PARTS.items()
        if name in key and p.grad is not None and p.grad.any()
    }
    assert all(any(name in key for name in PARTS.values()) for key, _ in loss.named_parameters())
    return found


class OfOneModel:
    """What the suites of losses of one world model share, beside the contract of all.

    Attributes:
        loss: the class of the loss.
        kind: of the actions.
        model: options of the model.
        options: of the loss.
    """

    loss: type[UnrollLoss]
    kind = "categorical"
    model: dict = {}  # noqa: RUF012
    options: dict = {}  # noqa: RUF012

    def make(self, **options) -> UnrollLoss:
        torch.manual_seed(0)
        loss = self.loss(small_model(self.kind, **self.model), **{**self.options, **options})
        SoftUpdate(loss, tau=0.5)
        for p in loss.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
        return loss

    def make_shared(self) -> UnrollLoss:
        return self.loss(MuesliPolicy(small_model(self.kind, **self.model)), **self.options)

    def data(self, *batch: int) -> TensorDict:
        return sequences(*batch, kind=self.kind)

    def test_each_loss_reaches_its_own_networks_only(self):
        """One network, of which each loss reaches three parts."""
        loss = self.make()
        out = self.run(loss, self.data(4))
        assert {key for key in out.keys() if key.startswith("loss_")} == set(self.reaches)  # noqa: SIM118
        for term, parts in self.reaches.items():
            loss.zero_grad()
            out[term].backward(retain_graph=True)
            assert parts_with_gradient(loss) == parts
        assert not any(b.requires_grad for b in loss.buffers())


def steps_ahead(model: WorldModel, data: TensorDict, steps: int):
    """Unroll a model from each state, one step at a time, to the end of its episode.

    Yields:
        Of each step what the model says, the transition, and the one after it: ``None`` where the
        sequence breaks off.
    """
    batch, length = data.shape
    for b, t in itertools.product(range(batch), range(length)):
        state = model.encode(data[b, t].select("observation"))["hidden_state"]
        for now in range(t, min(t + steps, length)):
            step = data[b, now]
            out = model.step(state, step["action"])
            state = out["hidden_state"]
            broken = step["next", "done"] or now == length - 1
            yield out.update(model.predict(state)), step, None if broken else data[b, now + 1]
            if broken:
                break


def line(now: dict, after: dict, *, terminated: tuple = (), truncated: tuple = ()) -> TensorDict:
    """Return six steps of action 0 with these entries, and with these ends."""
    flags = {key: torch.zeros(6, 1, dtype=torch.bool) for key in ("done", "terminated")}
    action = torch.zeros(6, dtype=torch.int64)
    data = TensorDict({**now, "action": action, "next": {**after, **flags}}, [6])
    return end(data, terminated=terminated, truncated=truncated)


class Table(nn.Module):
    """A linear world model: of one-hot observations, a table."""

    def __init__(self, states: int, actions: int, *, bins: nn.Module | None = None) -> None:
        super().__init__()
        self.specs, self.code = Specs(Unbounded(states), Categorical(actions)), bins
        width = 1 if bins is None else len(bins.bins)
        self.representation = TensorDictModule(
            nn.Identity(), in_keys=["observation"], out_keys=["hidden_state"]
        )
        names = ["value_pred", "value_logits"] if bins else ["value_pred"]
        self.prediction = TensorDictModule(
            TablePrediction(states, actions, width, bins), ["hidden_state"], [*names, "logits"]
        )
        names = ["reward_pred", "reward_logits"] if bins else ["reward_pred"]
        self.dynamics = TensorDictModule(
            TableDynamics(states, actions, width, bins),
            ["hidden_state", "action"],
            [("next", "hidden_state"), *names],
        )


class TableDynamics(nn.Module):
    def __init__(self, states: int, actions: int, width: int, code: nn.Module | None) -> None:
        super().__init__()
        self.following = nn.Parameter(torch.zeros(actions, states, states))
        self.reward = nn.Parameter(torch.zeros(actions, states, width))
        self.code = code

    def forward(self, hidden_state, action):
        def of(table):
            return torch.einsum("...s,...sx->...x", hidden_state, table[action])

        out = of(self.reward)
        rewards = (out,) if self.code is None else (self.code(out), out)
        return (of(self.following), *rewards)


class TablePrediction(nn.Module):
    def __init__(self, states: int, actions: int, width: int, code: nn.Module | None) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(states, width))
        self.policy = nn.Parameter(torch.zeros(states, actions))
        self.code = code

    def forward(self, hidden_state):
        out = hidden_state @ self.value
        values = (out,) if self.code is None else (self.code(out), out)
        return (*values, hidden_state @ self.policy)


class Toy:
    """A deterministic MDP of three states and an end, two actions, and its exact values.

    ``following[s, a]`` is the next state, 3 the end, worth 0; observations are one-hot.
    """

    following = torch.tensor([[1, 2], [0, 2], [1, 3]])
    reward = torch.tensor([[1.0, -1.0], [0.5, 2.0], [0.0, 3.0]])
    policy = torch.tensor([[0.5, 0.5], [0.2, 0.8], [0.9, 0.1]])
    gamma = 0.9

    def __init__(self) -> None:
        transition = torch.zeros(3, 4)
        transition.scatter_add_(1, self.following, self.policy)
        mean = (self.policy * self.reward).sum(-1)
        value = torch.linalg.solve(torch.eye(3) - self.gamma * transition[:, :3], mean)
        self.value = torch.cat([value, torch.zeros(1)])

    def optimal(self) -> torch.Tensor:
        """Return the values of all actions ``(3, 2)`` under the best policy, by value iteration."""
        value = torch.zeros(4)
        for _ in range(500):
            action_value = self.reward + self.gamma * value[self.following]
            value[:3] = action_value.amax(-1)
        return action_value

    def data(self, batch: int, steps: int, limit: int = 1000) -> TensorDict:
        """Return sequences of random actions; episodes are truncated after ``limit`` steps."""
        state, age, rows = torch.randint(3, (batch,)), torch.zeros(batch), []
        eye = torch.eye(4)
        log_policy = torch.cat([self.policy, torch.full((1, 2), 0.5)]).log()
        for _ in range(steps):
            action = torch.randint(2, (batch,))
            following, age = self.following[state, action], age + 1
            terminated = following == 3
            done = terminated | (age == limit)
            after = {
                "observation": eye[following], "cmpo": {"log_prob": log_policy[following]},
                "reward": self.reward[state, action].unsqueeze(-1),
                "done": done.unsqueeze(-1), "terminated": terminated.unsqueeze(-1),
            }  # fmt: skip
            now = {
                "observation": eye[state], "cmpo": {"log_prob": log_policy[state]},
                "action": action, "value_target": self.value[state].unsqueeze(-1), "next": after,
            }  # fmt: skip
            rows.append(TensorDict(now, [batch]))
            state = torch.where(done, torch.randint(3, (batch,)), following)
            age = torch.where(done, 0.0, age)
        return TensorDict.stack(rows, 1)

    def exact(self, *, bins: nn.Module | None = None) -> Table:
        """Return the model that is right."""
        model = Table(4, 2, bins=bins)
        with torch.no_grad():
            for state in range(3):
                for action in range(2):
                    after = self.following[state, action]
                    model.dynamics.module.following[action, state, after] = 1.0
            code = (lambda x: x.unsqueeze(-1)) if bins is None else self.coded(bins)
            model.dynamics.module.reward[:, :3] = code(self.reward.T)
            model.prediction.module.value.copy_(code(self.value))
            model.prediction.module.policy[:3] = self.policy.log()
        return model

    def learned(self, kind: type[UnrollLoss], lr: float) -> list[TensorDict]:
        """Return what a loss says of a model at random, and of one that it has trained."""
        specs = Specs(Unbounded(4), Categorical(2))
        loss = kind(WorldModel(specs, latent=32, bins=None), unroll_steps=3)
        targets, optimizer = SoftUpdate(loss, tau=0.1), torch.optim.Adam(loss.parameters(), lr)
        test = self.data(64, 8, 5)
        outs = [loss(test.clone())]
        for _ in range(300):
            out = loss(self.data(16, 8, 5))
            optimizer.zero_grad()
            sum(value for key, value in out.items() if key.startswith("loss_")).backward()
            optimizer.step()
            targets.step()
        return [*outs, loss(test.clone())]

    @staticmethod
    def coded(bins: nn.Module):
        # A logit of -60 is a probability of 0, and 60 * 0 no infinity.
        return lambda x: bins.encode(x).log().clamp_min(-60.0)
