"""Losses, made up: they read and write what they are told."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from tensordict import TensorDict
from torch import nn
from torchrl.objectives import LossModule

from muon_rl.objectives.acting import next_key


class Fake(LossModule):
    """Reads and writes what it is told, and adds the mean of the data to a parameter."""

    @dataclass
    class _AcceptedKeys:
        unused: str | None = None
        several: list = field(default_factory=lambda: ["first", "second"])
        cmpo_log_prob: tuple = ("cmpo", "log_prob")

    default_keys = _AcceptedKeys

    def __init__(self, term, reads=(), writes=(), metrics=()):
        super().__init__()
        self.term, self.reads, self.writes = term, reads, writes
        self.out_keys = [f"loss_{term}", *metrics]
        self.weight = nn.Parameter(torch.ones(()))

    def named(self, names):
        return [vars(self.tensor_keys).get(name, name) for name in names]

    @property
    def in_keys(self):
        return ["observation", *self.named(self.reads)]

    @property
    def written_keys(self):
        return self.named(self.writes)

    def forward(self, tensordict):
        total = sum(tensordict.get(key).mean() for key in self.in_keys)
        for key in self.written_keys:
            tensordict.set(key, tensordict["observation"] + 1.0)
        out = {key: total.detach() for key in self.out_keys}
        return TensorDict({**out, f"loss_{self.term}": self.weight * total}, [])


class CMPO(Fake):
    def __init__(self, *, next_targets=True):
        super().__init__("cmpo", writes=["cmpo_log_prob"])
        self.next_targets = next_targets

    @property
    def written_keys(self):
        now = super().written_keys
        return [*now, *(map(next_key, now) if self.next_targets else ())]


class Unrolls(Fake):
    @dataclass
    class _AcceptedKeys(Fake._AcceptedKeys):
        cmpo_log_prob: tuple = ("cmpo", "log_prob")
        unroll_logits: tuple = ("unroll", "logits")

    default_keys = _AcceptedKeys


class Dynamics(Unrolls):
    def __init__(self):
        super().__init__("dynamics", writes=["unroll_logits"])


class Model(Unrolls):
    def __init__(self):
        super().__init__("model", reads=["cmpo_log_prob", "unroll_logits"])


class Alone(Unrolls):
    """Reads an unroll where one is, and else the reward and returns a term more."""

    def __init__(self):
        super().__init__("model", reads=["cmpo_log_prob", "reward"], metrics=["entropy"])

    def keys_after(self, written):
        unroll = self.tensor_keys.unroll_logits
        if unroll not in written:
            return self.in_keys, self.out_keys
        return ["observation", *self.named(["cmpo_log_prob"]), unroll], ["loss_model"]


def td(*batch):
    torch.manual_seed(3)
    return TensorDict(observation=torch.randn(*batch, 4), batch_size=batch)


RIGHT = ["cmpo", "dynamics", "muesli_model"]


def fakes(*names):
    made = {"cmpo": CMPO, "dynamics": Dynamics, "muesli_model": Model}
    return {name: made[name]() for name in names}
