"""Watches how the terms of a loss stand to each other, and raises red flags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from tensordict import TensorDictBase
from torch import Tensor, nn

from muon_rl.callbacks.red_flags import Limits, RedFlags

# What losses call the policy's own term, and what of their metrics is watched.
POLICY_TERMS = ("loss_policy", "loss_objective", "loss_actor")
MODEL_TERM = "loss_muesli_policy"
WATCHED = ("explained_variance", "cmpo_kl", "cmpo_tv", "cmpo_adv_std")


class RedFlagError(RuntimeError):
    """A red flag that was to stop the run."""


class LossHealth(Callback):
    r"""Measures the terms of the loss, and warns where a rule of thumb is broken.

    Logs, against frames, ``diag/term/<loss>`` (after its coefficient), ``diag/ratio/<loss>`` (to
    the policy's term, in absolute value), ``diag/gradient_norm/<loss>`` (on the parameters that
    more than one term reaches, or on all it reaches where none are), ``diag/entropy`` in nats and
    ``diag/entropy_share`` of log A, ``diag/explained_variance``, ``diag/cmpo_kl`` in nats,
    ``diag/cmpo_tv`` and ``diag/cmpo_adv_std``, as far as the loss tells them; and
    ``diag/red_flags``, the number of rules that are broken. A flag is warned of once, with its
    number, its limit and what to try, in a run that goes on from a checkpoint too. Training is the
    same, bit by bit, without it.

    Args:
        enabled: whether to watch at all.
        every_n_updates: updates (optimizer steps) from one measurement to the next; of several that
            fall on the same frames, the first is made.
        stop: whether a red flag ends the run; a run that goes on from there ends again as long as
            the flag stands.
        limits: where healthy ends.

    Raises:
        ValueError: if ``every_n_updates`` is below 1.
        RedFlagError: at a flag, with ``stop``.
    """

    def __init__(
        self,
        enabled: bool = False,
        every_n_updates: int = 100,
        stop: bool = False,
        limits: Limits = Limits(),  # noqa: B008
    ) -> None:
        if every_n_updates < 1:
            raise ValueError(
                f"loss_health.every_n_updates must be at least 1, but is {every_n_updates}."
            )
        self.enabled = enabled
        self.every_n_updates = every_n_updates
        self.stop = stop
        self.limits = limits
        self.flags = RedFlags(limits)
        self.warned: set[str] = set()
        self._last_frames = -1

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        """Measure if this is an N-th update, at most once a frame."""
        due = self.enabled and (trainer.global_step + 1) % self.every_n_updates == 0
        if not due or not trainer.is_global_zero or pl_module.frames == self._last_frames:
            return
        self._last_frames = pl_module.frames
        actions = getattr(trainer.datamodule.env.specs.action.space, "n", None)
        found = measure(pl_module.loss, pl_module.output, actions=actions)
        flags = self.flags.look(found)
        metrics = {f"diag/{name}": value for name, value in found.items()}
        pl_module.track(metrics | {"diag/red_flags": float(len(flags))})
        for flag in flags:
            text = f"Red flag {flag.name} at {pl_module.frames:,} frames. {flag.text}"
            if self.stop:
                raise RedFlagError(text)
            if flag.name not in self.warned:
                self.warned.add(flag.name)
                rank_zero_warn(text)

    def state_dict(self) -> dict[str, Any]:
        """Return what the rules look back on, and what was warned of."""
        if not self.enabled:
            return {}
        return {
            "seen": self.flags.state_dict(), "warned": sorted(self.warned),
            "last_frames": self._last_frames,
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned.

        Args:
            state_dict: of a run that was watched.
        """
        self.flags.load_state_dict(state_dict["seen"])
        self.warned = set(state_dict["warned"])
        self._last_frames = state_dict["last_frames"]


def measure(
    loss: nn.Module, output: TensorDictBase, *, actions: int | None = None
) -> dict[str, float]:
    """Return what is watched of a loss's output, before its backward.

    Args:
        loss: whose parameters are trained.
        output: its terms, with their graph, and its metrics.
        actions: number A of discrete actions, if they are.

    Example:
        >>> from tensordict import TensorDict
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> nn.init.constant_(layer.weight, 3.0).shape
        torch.Size([1, 2])
        >>> total = layer(torch.tensor([3.0, 4.0])).sum()
        >>> output = TensorDict({"loss_policy": 2 * total, "loss_value": total})
        >>> found = measure(layer, output)
        >>> found["ratio/loss_value"], found["gradient_norm/loss_policy"]
        (0.5, 10.0)
    """
    terms = {name: x for name, x in output.items() if name.startswith("loss_")}
    policy = next((terms[name].detach().abs() for name in POLICY_TERMS if name in terms), None)
    found: dict[str, Tensor] = {f"term/{name}": x.detach() for name, x in terms.items()}
    if policy is not None:
        found |= {f"ratio/{name}": x.detach().abs() / policy for name, x in terms.items()}
        if MODEL_TERM in terms:
            found["model_ratio"] = found[f"ratio/{MODEL_TERM}"]
    found |= {f"gradient_norm/{name}": x for name, x in gradient_norms(loss, terms).items()}
    if "entropy" in output:
        found["entropy"] = output["entropy"].detach().mean()
        if actions is not None and actions > 1:
            log_actions = torch.tensor(float(actions)).log()
            found["entropy_share"] = found["entropy"] / log_actions.to(found["entropy"].device)
    found |= {name: output[name].detach().mean() for name in WATCHED if name in output}
    return dict(zip(found, torch.stack([x.float() for x in found.values()]).tolist(), strict=True))


def gradient_norms(loss: nn.Module, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the norm of each term's gradient on the parameters that several terms reach.

    Args:
        loss: whose parameters are trained; their ``grad`` stays as it is.
        terms: scalars with their graph, which is kept.

    Returns:
        Of each term that has a graph; of a term that shares nothing, the norm on all it reaches.
    """
    parameters = [p for p in loss.parameters() if p.requires_grad]
    gradients = {
        name: torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        for name, term in terms.items()
        if term.requires_grad
    }
    reached = [sum(g is not None for g in each) for each in zip(*gradients.values(), strict=True)]
    norms = {}
    for name, each in gradients.items():
        shared = [g for g, n in zip(each, reached, strict=True) if g is not None and n > 1]
        own = shared or [g for g in each if g is not None]
        norms[name] = torch.nn.utils.get_total_norm(own)
    return norms
