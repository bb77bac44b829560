"""A world model unrolled along actions: for the model itself, and for the losses that train it."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDict
from torch import Tensor


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    r"""Return its argument, whose gradient comes back times a factor.

    .. math::
        y = x, \qquad \partial L / \partial x = s \, \partial L / \partial y

    Args:
        x: floating point, finite, any shape and unit.
        scale: :math:`s`, dimensionless.

    Example:
        >>> import torch
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> scale_gradient(x, 0.5).square().backward()
        >>> x.grad
        tensor(3.)

    Source: Schrittwieser et al. 2020, arXiv:1911.08265, appendix G.
    """
    return x.detach() + scale * (x - x.detach())


def unroll(model: Any, hidden_state: Tensor, actions: Tensor, *, grad_scale: float) -> TensorDict:
    r"""Return what a world model predicts along actions, from its parts.

    :math:`(h_k, \hat r_k) = g(h_{k-1}, a_{k-1})` and :math:`(\hat v_k, \hat\pi_k) = p(h_k)` for
    :math:`k = 1, \dots, K`; what flows back from step :math:`k + 1` into :math:`h_k`,
    :math:`k \ge 1`, is scaled.

    Args:
        model: with TensorDictModules ``dynamics`` and ``prediction``.
        hidden_state: :math:`h_0`, ``(*batch, H)``.
        actions: ``(*batch, K, *action)``, K >= 1; the first is taken in :math:`h_0`.
        grad_scale: of the recurrent path, dimensionless.

    Returns:
        A tensordict ``(*batch, K)`` with all that the two parts write, the rewards' keys and
        ``hidden_state`` of the state that each step leads to.

    Example:
        >>> import torch
        >>> from torchrl.data import Categorical, Unbounded
        >>> from muon_rl.modules import WorldModel
        >>> from muon_rl.specs import Specs
        >>> model = WorldModel(Specs(Unbounded(4), Categorical(3)), latent=16)
        >>> actions = torch.zeros(7, 5, dtype=torch.int64)
        >>> unroll(model, torch.rand(7, 16), actions, grad_scale=0.5)["reward_pred"].shape
        torch.Size([7, 5, 1])

    Source: Hessel et al. 2021, arXiv:2104.06159, eq. 13.
    """
    dim, steps = hidden_state.ndim - 1, []
    for action in actions.unbind(dim):
        step = TensorDict({"hidden_state": hidden_state, "action": action}, action.shape[:dim])
        step = model.dynamics(step)
        following = step.get(("next", "hidden_state"))
        steps.append(step.exclude("action", "next").set("hidden_state", following))
        hidden_state = scale_gradient(following, grad_scale)
    along = TensorDict.stack(steps, dim)
    return along.update(model.prediction(along.select("hidden_state")))
