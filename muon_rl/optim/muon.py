"""One optimizer for a whole agent: Muon for its matrices, Adam or AdamW for the rest."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from muon_rl.optim import sharded
from muon_rl.optim.adaptive import step_adam
from muon_rl.optim.compiled import CompiledUpdate
from muon_rl.optim.explain import explanations, table
from muon_rl.optim.groups import (
    check_group,
    count_step,
    fill_group,
    is_scheduled,
    name_of,
)
from muon_rl.optim.matrices import step_matrices
from muon_rl.optim.stacks import Layout

NONFINITE = ("propagate", "raise", "skip")


class Muon(torch.optim.Optimizer):
    r"""Muon for matrices and stacks of matrices, with Adam or AdamW for everything else.

    For a matrix with gradient :math:`g`, momentum :math:`\mu` and rate :math:`\gamma`:

    .. math::
        B \leftarrow \mu B + (1 - \mu) g, \qquad
        U = (1 - \mu) g + \mu B \;\text{(nesterov) or}\; B, \qquad
        p \leftarrow (1 - \gamma \lambda) p - \gamma \, r \, \mathrm{NS}(U)

    The momentum is an exponential moving average. :math:`\mathrm{NS}` is
    :func:`~muon_rl.optim.orthogonalize`, so the rate is the spectral norm of an update, times
    :math:`r`: :math:`\sqrt{\max(1, m/n)}` (``"original"``),
    :math:`0.2 \sqrt{\max(m, n)}` (``"match_rms_adamw"``) or 1 (``None``).

    Args:
        params: parameters, named parameters, or groups (dicts) of them. A group may carry

            - ``algorithm``: ``"muon"`` (default), ``"adamw"`` or ``"adam"``;
            - ``name``: shown in messages and logs;
            - ``batch_dims``: leading dims that stack matrices, default 0; one number, or one a
              parameter. What is left must be a matrix ``(m, n)`` or a convolution kernel
              ``(out, in, *k)``, flattened to ``(out, in * k)``;
            - ``splits``: equal parts along the rows that are matrices of their own (3 for a fused
              query, key, value), default 1; one number, or one a parameter;
            - ``momentum_start_step`` and ``momentum_warmup_steps``: optimizer steps with a
              momentum (or Adam's beta1) of 0 at first, and of a linear rise after them, default 0;
              ``momentum_step`` counts them, ``step`` all steps;
            - Muon groups: every argument below;
            - Adam groups: torch's ``lr`` (1e-3), ``betas`` (0.9, 0.999), ``eps`` (1e-8),
              ``weight_decay`` (0.01 for ``adamw``, 0 for ``adam``) and ``fused``, never Muon's.
        lr: Muon's rate, spectral norm per update, >= 0.
        momentum: share of the old average kept, in [0, 1).
        nesterov: whether the update looks one step ahead.
        weight_decay: decoupled decay, per update and unit of rate, >= 0.
        ns_steps: Newton-Schulz iterations, >= 1.
        coefficients: ``"quintic"``, ``"cubic"``, ``"polar_express"``, a triple, or a list of them.
        eps: smallest Frobenius norm that is scaled up to 1.
        adjust_lr: ``"original"``, ``"match_rms_adamw"`` or ``None``.
        dtype: of the iteration; ``None`` takes bfloat16 where the device computes it natively.
        on_nonfinite: with an infinite or NaN gradient, ``"propagate"`` it (no check, no sync),
            ``"raise"`` before anything changes, or ``"skip"`` the whole step and count it in
            ``skipped_steps``.
        capturable: whether Adam groups keep their step counts on the device, for CUDA graphs; not
            with a momentum schedule or a check of the gradients, which a graph cannot follow.

    Raises:
        ValueError: at construction, for an unknown option or value, a parameter that is no matrix
            in a Muon group, or no parameter at all.
        TypeError: for parameters that are not real floating-point numbers, and for an option of
            another type.
        RuntimeError: in ``step``, for sparse gradients.
        FloatingPointError: in ``step``, for a non-finite gradient if ``on_nonfinite="raise"``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> optimizer = Muon([
        ...     {"params": [net[0].weight], "lr": 0.02},
        ...     {"params": [net[0].bias, *net[2].parameters()], "algorithm": "adamw", "lr": 3e-4},
        ... ])
        >>> net(torch.ones(2, 4)).pow(2).mean().backward()
        >>> optimizer.step()

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks";
    Liu et al. 2025, arXiv:2502.16982 (``match_rms_adamw``).
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        ns_steps: int = 5,
        coefficients: str | Sequence = "quintic",
        eps: float = 1e-7,
        adjust_lr: str | None = "original",
        dtype: torch.dtype | None = None,
        *,
        on_nonfinite: str = "propagate",
        capturable: bool = False,
    ) -> None:
        if on_nonfinite not in NONFINITE:
            raise ValueError(f"on_nonfinite must be one of {NONFINITE}, but is {on_nonfinite!r}.")
        if capturable and on_nonfinite != "propagate":
            raise ValueError(
                f"on_nonfinite={on_nonfinite!r} asks about each gradient, which a captured graph "
                "cannot: with capturable=True it must be 'propagate'."
            )
        self.on_nonfinite = on_nonfinite
        self.capturable = capturable
        self.skipped_steps = 0
        self.reasons: dict[Any, tuple[str, str]] = {}
        self._layout = Layout()
        self._compiled: CompiledUpdate | None = None
        # No `betas` here: schedulers and monitors would take betas[0] for Muon's momentum.
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "nesterov": nesterov,
                "weight_decay": weight_decay,
                "ns_steps": ns_steps,
                "coefficients": coefficients,
                "eps": eps,
                "adjust_lr": adjust_lr,
                "dtype": dtype,
            },
        )
        # Single groups may be empty (a sharded optimizer hands some out), but not all of them.
        if not any(group["params"] for group in self.param_groups):
            raise ValueError("Muon got no parameters in any of its groups.")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking its options and shapes.

        Args:
            param_group: a dict with ``params`` and the options named in the class's docstring.

        Raises:
            ValueError: for an unknown option or value, or a parameter that is no matrix.
            TypeError: for complex parameters.
        """
        group = fill_group(param_group, len(self.param_groups))
        defaults = self.defaults
        if group["algorithm"] != "muon":
            # torch fills a group up from the defaults: Muon's own have no place in an Adam group.
            self.defaults = {}
        try:
            super().add_param_group(group)
        finally:
            self.defaults = defaults
        added = self.param_groups.pop()
        check_group(added)
        if self.capturable and is_scheduled(added):
            raise ValueError(
                f"Group {added['name']!r} has a momentum schedule, which a captured graph would "
                "freeze: set capturable=False, or momentum_start_step and _warmup_steps to 0."
            )
        self.param_groups.append(added)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs: torch's own leaves a subclass's attributes out."""
        mine = ("on_nonfinite", "capturable", "skipped_steps", "reasons")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in mine}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what a copy, or a state that is loaded, brings."""
        super().__setstate__(state)
        self._layout = Layout()
        self.__dict__.setdefault("_compiled", None)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back a state, also one of ``torch.optim.Muon`` over the same matrices.

        Args:
            state_dict: of an optimizer with the same groups; options that it lacks stay as they
                are here.

        Raises:
            ValueError: if the groups hold parameters of other names, or another number of them.
        """
        groups = []
        for saved, ours in zip(state_dict["param_groups"], self.param_groups, strict=False):
            theirs, mine = saved.get("param_names"), ours.get("param_names")
            if theirs and mine and theirs != mine:
                raise ValueError(
                    f"Group {ours['name']!r} holds {', '.join(mine)}, but the state's holds "
                    f"{', '.join(theirs)}: build the optimizer with the settings it was saved with."
                )
            options = {name: value for name, value in ours.items() if name != "params"}
            groups.append({**options, **_from_torch(saved)})
        rest = state_dict["param_groups"][len(groups) :]
        super().load_state_dict({**state_dict, "param_groups": [*groups, *rest]})

    def explain(self) -> None:
        """Print a table of all parameters: name, shape, role, group, and why it is there.

        Roles and reasons are known where :func:`~muon_rl.optim.build_optimizer` made the groups.

        Example:
            >>> import torch
            >>> Muon([("weight", torch.nn.Parameter(torch.eye(2)))]).explain()
            name    shape   role  group   reason
            weight  (2, 2)  -     group0  given to muon
        """
        sys.stdout.write(f"{self.explanation()}\n")

    def explanation(self) -> str:
        """Return the table that :meth:`explain` prints."""
        return table(explanations(self.param_groups, self.reasons))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient; ``grad is None`` leaves it as it is.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The closure's result, or ``None`` without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_sparse_gradients()
        if self.on_nonfinite != "propagate" and not self._gradients_are_finite():
            return loss
        if self._compiled is None:
            self._update()
        else:
            self._compiled(self.param_groups)
        for group in self.param_groups:
            count_step(group)
        return loss

    def _update(self) -> None:
        matrices = [group for group in self.param_groups if group["algorithm"] == "muon"]
        step_matrices(matrices, self.state, self._layout)
        adaptive = [group for group in self.param_groups if group["algorithm"] != "muon"]
        step_adam(adaptive, self.state, capturable=self.capturable)

    def compile(self, **options: Any) -> None:
        """Compile the update of each step from here on, as ``nn.Module.compile`` does a forward.

        It fuses the passes over memory and takes Python out, after 15 to 30 seconds at first.
        Closure and checks of the gradients stay outside, rates may move, and the first step and
        those in which a momentum moves run as they are. A copy of the optimizer is not compiled.

        Args:
            options: of ``torch.compile``.

        Example:
            >>> import torch
            >>> weight = torch.nn.Parameter(torch.eye(2))
            >>> optimizer = Muon([weight])
            >>> optimizer.compile(backend="eager")
            >>> weight.sum().backward()
            >>> optimizer.step()
        """
        self._compiled = CompiledUpdate(self._update, options)

    def _refuse_sparse_gradients(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.layout != torch.strided:
                    raise RuntimeError(
                        f"Muon takes dense gradients only, but {name_of(group, p)!r} has a "
                        f"{p.grad.layout} one."
                    )

    def _gradients_are_finite(self) -> bool:
        """Check all gradients with one sync; raise or count what ``on_nonfinite`` asks for."""
        owners = [(g, p) for g in self.param_groups for p in g["params"] if p.grad is not None]
        if not owners:
            return True
        params = [p for _, p in owners]
        grads = [sharded.local(p.grad) for p in params]
        norm = torch.nn.utils.get_total_norm(grads)
        if bool(sharded.agree(torch.isfinite(norm), params)):
            return True
        # The norm of large finite gradients overflows: only their entries can tell.
        flags = [torch.isfinite(grad).all().to(norm.device) for grad in grads]
        finite = sharded.agree(torch.stack(flags), params)
        if bool(finite.all()):
            return True
        if self.on_nonfinite == "raise":
            group, p = owners[int((~finite).nonzero()[0])]
            raise FloatingPointError(
                f"The gradient of {name_of(group, p)!r} (group {group['name']!r}) is not finite in "
                f"optimizer step {group['step'] + 1}; no parameter was changed. Try a lower rate "
                "(Muon: 0.01 or less), a momentum of 0.9 or clipping by norm, or look for a NaN in "
                "the loss's inputs."
            )
        self.skipped_steps += 1
        return False


def _from_torch(group: dict[str, Any]) -> dict[str, Any]:
    """Return a saved group, with our names for the options of ``torch.optim.Muon``."""
    if "ns_coefficients" not in group:
        return group
    group = dict(group)
    coefficients, adjust_lr = group.pop("ns_coefficients"), group.pop("adjust_lr_fn")
    return {**group, "coefficients": coefficients, "adjust_lr": adjust_lr or "original"}
