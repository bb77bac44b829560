"""Rules that tell a run which goes wrong from its losses: pure functions of what was measured."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

TERM, GRADIENT = "term/", "gradient_norm/"
HALF = 0.5  # of log A, from which an entropy falls fast
NOTHING = 1e-9  # nats


@dataclass(frozen=True)
class Limits:
    """Where healthy ends. Numbers of a tuning guide, but for the counts, which are ours.

    Args:
        term_ratio: of the largest term to the second largest, medians of their absolute values.
        model_ratio: of the model's policy loss to the policy loss, in absolute value.
        entropy_low: share of log A below which an entropy that fell fast is flagged: from a half of
            log A or more, within a window.
        entropy_high: share of log A above which a policy stays random.
        cmpo_kl: nats between CMPO's policy and the policy.
        advantage_std: of CMPO's advantages, in units of return; below, no action stands out.
        spike: of a term's gradient norm to its median.
        window: measurements that medians are taken over, and that a fast fall takes at most.
        patience: measurements in a row that a lasting fault needs.

    Raises:
        ValueError: if a number is out of its range.
    """

    term_ratio: float = 10.0
    model_ratio: float = 1000.0
    entropy_low: float = 0.2
    entropy_high: float = 0.8
    cmpo_kl: float = 0.1
    advantage_std: float = 1e-4
    spike: float = 10.0
    window: int = 10
    patience: int = 30

    def __post_init__(self) -> None:
        for name in ("term_ratio", "model_ratio", "spike"):
            if not getattr(self, name) > 1.0:
                raise ValueError(f"limits.{name} must be above 1, but is {getattr(self, name)}.")
        if not 0.0 <= self.entropy_low < self.entropy_high <= 1.0:
            raise ValueError(
                "limits.entropy_low and limits.entropy_high must be shares, the first below the "
                f"second, but are {self.entropy_low} and {self.entropy_high}."
            )
        for name in ("cmpo_kl", "advantage_std"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"limits.{name} must be above 0, but is {getattr(self, name)}.")
        for name in ("window", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"limits.{name} must be at least 1, but is {getattr(self, name)}.")


class Flag(NamedTuple):
    """A rule that was broken.

    Args:
        name: of the rule.
        text: the number, the limit and what to try.
    """

    name: str
    text: str


def not_finite(measured: Mapping[str, float]) -> Flag | None:
    """Return the flag of the first term or gradient that is no finite number, if one is.

    Args:
        measured: as of :meth:`RedFlags.look`.
    """
    for name, value in measured.items():
        if name.startswith((TERM, GRADIENT)) and not math.isfinite(value):
            return Flag(
                "not_finite",
                f"{name} is {value} (limit: any finite number). Lower the rate, or clip gradients "
                "(max_grad_norm) or importance ratios; see that observations and rewards are "
                "finite.",
            )
    return None


class RedFlags:
    """Keeps what was measured, and says which rules are broken.

    Args:
        limits: where healthy ends.

    Example:
        >>> flags = RedFlags(Limits(window=2))
        >>> terms = {"term/loss_policy": 0.01, "term/loss_value": 0.5}
        >>> flags.look(terms)
        []
        >>> [flag.name for flag in flags.look(terms)]
        ['term_dominates']

    Source: the rules are those of ``docs/muesli_tuning.md``, Red flags.
    """

    def __init__(self, limits: Limits = Limits()) -> None:
        self.limits = limits
        kept = max(limits.window, limits.patience) + 1
        self._seen: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=kept))

    def look(self, measured: Mapping[str, float]) -> list[Flag]:
        """Return the rules that are broken now.

        Args:
            measured: ``term/<loss>`` after its coefficient, ``gradient_norm/<loss>``, and, where
                the loss tells them, ``model_ratio``, ``entropy_share``, ``explained_variance``,
                ``cmpo_kl`` and ``cmpo_adv_std``.
        """
        for name in self._seen.keys() - measured.keys():
            del self._seen[name]  # a loss that was switched off
        for name, value in measured.items():
            if not math.isnan(value):  # which has no place in a median
                self._seen[name].append(abs(value) if name.startswith(TERM) else value)
        rules = (
            self._term_dominates, self._model_dominates, self._entropy_collapses,
            self._entropy_stays, self._value_explains_nothing, self._gradient_spikes,
            self._policy_does_not_follow, self._nothing_to_follow, self._actions_alike,
        )  # fmt: skip
        found = [not_finite(measured), *(rule() for rule in rules)]
        return [flag for flag in found if flag is not None]

    def state_dict(self) -> dict[str, list[float]]:
        """Return what was measured, as far as the rules look back."""
        return {name: list(values) for name, values in self._seen.items()}

    def load_state_dict(self, state_dict: Mapping[str, Sequence[float]]) -> None:
        """Take back what :meth:`state_dict` returned.

        Args:
            state_dict: by name, the oldest first.
        """
        self._seen.clear()
        for name, values in state_dict.items():
            self._seen[name].extend(values)

    # -- what was measured ---------------------------------------------------------------------

    def _typical(self, name: str) -> float | None:
        """Return the median over the window; ``None`` before it is full."""
        values = list(self._seen.get(name, ()))[-self.limits.window :]
        return median(values) if len(values) >= self.limits.window else None

    def _lasting(self, name: str) -> list[float]:
        """Return the last values as far as patience reaches; none before there are as many."""
        values = list(self._seen.get(name, ()))[-self.limits.patience :]
        return values if len(values) >= self.limits.patience else []

    # -- the rules -----------------------------------------------------------------------------

    def _term_dominates(self) -> Flag | None:
        sizes = {name: self._typical(name) for name in self._seen if name.startswith(TERM)}
        known = sorted(((v, k) for k, v in sizes.items() if v is not None), reverse=True)
        if len(known) < 2 or known[0][0] <= self.limits.term_ratio * known[1][0]:
            return None
        ratio = known[0][0] / known[1][0] if known[1][0] else math.inf
        return Flag(
            "term_dominates",
            f"{known[0][1].removeprefix(TERM)} is {known[0][0]:.3g}, {ratio:.3g} times the next "
            f"largest term (limit {self.limits.term_ratio:g}). Compare its gradient norm with the "
            "others'; if that is as large, lower its coefficient.",
        )

    def _model_dominates(self) -> Flag | None:
        ratio = self._typical("model_ratio")
        if ratio is None or ratio <= self.limits.model_ratio:
            return None
        return Flag(
            "model_dominates",
            f"The model's policy loss is {ratio:.3g} times the policy loss (limit "
            f"{self.limits.model_ratio:g}, healthy is 1 to 10). Lower policy_pred_coef, or take "
            "the KL in place of a cross-entropy.",
        )

    def _entropy_collapses(self) -> Flag | None:
        values = list(self._seen.get("entropy_share", ()))[-self.limits.window - 1 :]
        if not values or values[-1] >= self.limits.entropy_low or max(values) < HALF:
            return None
        return Flag(
            "entropy_collapses",
            f"The entropy fell from {max(values):.2f} to {values[-1]:.2f} of log A within "
            f"{len(values) - 1} measurements (limit {self.limits.entropy_low:g}, coming from "
            f"{HALF:g} or more). Take a slower prior (tau=0.01), a lower rate, or more entropy "
            "bonus.",
        )

    def _entropy_stays(self) -> Flag | None:
        values = self._lasting("entropy_share")
        if not values or min(values) <= self.limits.entropy_high:
            return None
        return Flag(
            "entropy_stays",
            f"The entropy has been above {min(values):.2f} of log A for {len(values)} measurements "
            f"(limit {self.limits.entropy_high:g}): the policy stays random. Look at cmpo_tv and "
            "at the explained variance; raise the rate or kl_coef.",
        )

    def _value_explains_nothing(self) -> Flag | None:
        values = self._lasting("explained_variance")
        if not values or max(values) >= 0.0:
            return None
        return Flag(
            "value_explains_nothing",
            f"The explained variance has been below 0 for {len(values)} measurements, at best "
            f"{max(values):.2g} (limit 0, healthy is above 0.5). Raise the critic's rate or "
            "value_coef, or take fresher data.",
        )

    def _gradient_spikes(self) -> Flag | None:
        for name in [name for name in self._seen if name.startswith(GRADIENT)]:
            usual = self._typical(name)
            now = self._seen[name][-1]
            if usual is not None and now > self.limits.spike * usual > 0.0:
                return Flag(
                    "gradient_spikes",
                    f"The gradient of {name.removeprefix(GRADIENT)} has norm {now:.3g}, "
                    f"{now / usual:.3g} times its median (limit {self.limits.spike:g}). Clip "
                    "gradients (max_grad_norm), or importance ratios; look at ratio_max.",
                )
        return None

    def _policy_does_not_follow(self) -> Flag | None:
        divergence = self._typical("cmpo_kl")
        if divergence is None or divergence <= self.limits.cmpo_kl:
            return None
        return Flag(
            "policy_does_not_follow",
            f"CMPO's KL is {divergence:.3g} nats (limit {self.limits.cmpo_kl:g}, healthy is 0.01 "
            "to 0.1). Raise kl_coef, or lower what pulls against it.",
        )

    def _nothing_to_follow(self) -> Flag | None:
        values = self._lasting("cmpo_kl")
        if not values or max(values) > NOTHING:
            return None
        return Flag(
            "nothing_to_follow",
            f"CMPO's KL has been {max(values):.1g} nats for {len(values)} measurements (limit "
            f"{NOTHING:g}): its policy is the policy itself. See that SoftUpdate steps, that the "
            "prior lags (use_target_network=True), and that advantages differ between actions.",
        )

    def _actions_alike(self) -> Flag | None:
        spread = self._typical("cmpo_adv_std")
        if spread is None or spread >= self.limits.advantage_std:
            return None
        return Flag(
            "actions_alike",
            f"CMPO's advantages have a spread of {spread:.2g} (limit "
            f"{self.limits.advantage_std:g}): the values tell no action from another. Look at the "
            "explained variance and at the model's losses.",
        )
