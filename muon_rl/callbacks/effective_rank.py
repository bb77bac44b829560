"""How many directions a critic's features span, and how many of its units are dormant."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.data import ReplayBuffer
from torchrl.objectives import LossModule

from muon_rl.data import AgentData
from muon_rl.diagnostics import TOP_K, measures
from muon_rl.optim import parameter_roles

# How TorchRL's losses call their critics; where one has two of them, the first is meant.
CRITICS = ("qvalue_network", "critic_network", "value_network")


class EffectiveRank(Callback):
    """Measures ranks and dormant units of the critics' penultimate features while they train.

    After every ``every_n_updates``-th update, on states and actions from the replay buffer, for
    each critic the input of its last layers, in evaluation mode. Logs, against frames,
    ``repr/q1_effective_rank``, ``repr/q1_top10_mass``, ``repr/q1_stable_rank`` and
    ``repr/q1_dormant_share`` (see :mod:`muon_rl.diagnostics`), ``q2`` for the second critic, and
    ``repr/q_effective_rank_mean`` over all critics. Training is the same, bit by bit, without it.

    Args:
        enabled: whether to measure at all.
        every_n_updates: updates (optimizer steps) from one measurement to the next.
        max_samples: transitions measured on, drawn without replacement; all of a smaller buffer.
        top_k: largest singular values whose share of the sum is logged, as ``top<k>_mass``.

    Raises:
        ValueError: if a number is below 1; at the beginning of a fit, if the loss has no critic
            or the data module no replay buffer.
    """

    def __init__(
        self,
        enabled: bool = False,
        every_n_updates: int = 1000,
        max_samples: int = 512,
        top_k: int = TOP_K,
    ) -> None:
        for name, number in (
            ("every_n_updates", every_n_updates), ("max_samples", max_samples), ("top_k", top_k),
        ):  # fmt: skip
            if number < 1:
                raise ValueError(f"effective_rank.{name} must be at least 1, but is {number}.")
        self.enabled = enabled
        self.every_n_updates = every_n_updates
        self.max_samples = max_samples
        self.top_k = top_k
        self._last = (0, -1)  # update and frames of the last measurement

    def check(self, loss: LossModule, data: AgentData) -> None:
        """Raise if there is nothing to measure.

        Args:
            loss: of the agent.
            data: of the agent.

        Raises:
            ValueError: if the loss has no critic, or the data module no replay buffer.
        """
        find_critic(loss)
        if not hasattr(data, "buffer"):
            raise ValueError(
                f"effective_rank.enabled needs a replay buffer, but {type(data).__name__} has no "
                "buffer: set it to false."
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See that there is something to measure."""
        if self.enabled:
            self.check(pl_module.loss, trainer.datamodule)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the updates before a resume as measured."""
        self._last = (trainer.global_step, -1)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Measure if this was an N-th update, at most once a frame."""
        now = trainer.global_step, pl_module.frames
        due = self.enabled and now[0] % self.every_n_updates == 0 and trainer.is_global_zero
        # Gradient accumulation repeats an update's number, several updates a step their frame.
        if due and now[0] != self._last[0] and now[1] != self._last[1]:
            self._last = now
            pl_module.track(self.measure(pl_module.loss, trainer.datamodule.buffer, now[0]))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so if the run was too short for a measurement."""
        if self.enabled and trainer.global_step < self.every_n_updates:
            rank_zero_warn(
                f"The run made {trainer.global_step} updates, and the effective rank is measured "
                f"every {self.every_n_updates}: lower effective_rank.every_n_updates."
            )

    def measure(self, loss: LossModule, buffer: ReplayBuffer, update: int = 0) -> dict[str, float]:
        """Return the metrics of all critics, changing nothing, random states included.

        Args:
            loss: with the critics.
            buffer: holds at least one transition with what they read.
            update: number that alone decides, with the buffer's size, which transitions are drawn.
        """
        critic = find_critic(loss)
        device = next(loss.parameters()).device
        count = min(len(buffer), self.max_samples)
        # A generator of its own; not torch's, whose permutation would be as long as the buffer.
        indices = random.Random(update).sample(range(len(buffer)), count)
        with torch.no_grad(), _random_states_kept(device):
            batch = buffer[torch.tensor(indices)].select(*critic.network.in_keys).to(device)
            found = measures(torch.stack(list(critic.features(batch))), k=self.top_k)
        found[f"top{self.top_k}_mass"] = found.pop("topk_mass")
        metrics = {"repr/q_effective_rank_mean": found["effective_rank"].mean().item()}
        for name, values in found.items():
            for number, value in enumerate(values.tolist(), start=1):
                metrics[f"repr/q{number}_{name}"] = value
        return metrics


@dataclass(frozen=True)
class Critic:
    """The critics of a loss.

    Args:
        network: that reads its inputs from a tensordict; the loss calls it with ``parameters``.
        parameters: of one critic, or of several along its batch dims, detached.
        last: the network's last layers, of parallel heads each one.
    """

    network: TensorDictModuleBase
    parameters: TensorDictBase
    last: list[nn.Module]

    def features(self, batch: TensorDictBase) -> Iterator[Tensor]:
        """Yield each critic's penultimate features, ``(samples, width)``.

        What parallel heads read stands side by side, once if it is the same.

        Args:
            batch: of shape ``(samples,)``, with what the network reads.
        """
        with _in_evaluation(self.network):
            # One by one: under vmap, a hook would be handed all critics' features as one tensor.
            for parameters in self.parameters.reshape(-1).unbind(0):
                read: list[Tensor] = []
                hooks = [layer.register_forward_pre_hook(_keep_in(read)) for layer in self.last]
                try:
                    # A clone: whatever a forward writes, such as statistics, is thrown away.
                    with parameters.clone().to_module(self.network):
                        self.network(batch.copy())
                finally:
                    for hook in hooks:
                        hook.remove()
                yield torch.cat([features.flatten(1) for features in read], -1)


def find_critic(loss: LossModule) -> Critic:
    """Return the critics of a loss.

    Args:
        loss: any TorchRL loss with a ``qvalue_network``, ``critic_network`` or ``value_network``.

    Raises:
        ValueError: if it has none of them, or none with a layer.
    """
    for name in CRITICS:
        network, parameters = (getattr(loss, key, None) for key in (name, f"{name}_params"))
        if network is None or parameters is None:
            continue
        prefix = f"{name}_params."
        # Of a parametrized layer, the parameter lies below the layer's own parametrizations.
        paths = {
            re.sub(r"\.(parametrizations\..+|\w+)$", "", parameter.removeprefix(prefix)): None
            for parameter, role in parameter_roles(loss).items()
            if role.role == "last" and parameter.startswith(prefix)
        }
        if paths:
            return Critic(network, parameters.data, [network.get_submodule(p) for p in paths])
    raise ValueError(
        f"effective_rank.enabled needs a critic, but {type(loss).__name__} has neither "
        f"{', '.join(CRITICS[:-1])} nor {CRITICS[-1]} with a last layer: set it to false."
    )


def _keep_in(read: list[Tensor]) -> Any:
    """Return a hook that keeps what a layer is given, unless another was given the same."""

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if all(inputs[0] is not other for other in read):
            read.append(inputs[0])

    return hook


@contextmanager
def _in_evaluation(network: nn.Module) -> Iterator[None]:
    """Put every part of a network into evaluation mode, and back into the one it was in."""
    training = {part: part.training for part in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for part, mode in training.items():
            part.training = mode


@contextmanager
def _random_states_kept(device: torch.device) -> Iterator[None]:
    """Let torch's random states be afterwards as they were, for layers and transforms that draw."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield
