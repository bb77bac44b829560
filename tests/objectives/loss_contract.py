"""What every loss of ours must satisfy, as pytorch/rl demands it of its own.

A suite derives from :class:`LossContract` and says what is special about its loss. One that leaves
something out, or takes a test away, is refused when its module is imported.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from tensordict import TensorDict
from torch.testing import assert_close
from torchrl.objectives import LossModule, SoftUpdate

MISSING: Any = object()


class LossContract:
    """Base of the suites.

    Attributes:
        reaches: for each ``loss_*`` the names of the networks that get its gradient.
        writes: keys that ``forward`` may add to the data.
        renames: names in ``set_keys`` of keys that the loss itself reads or writes, each with
            another key.
        coefficients: for each schedulable buffer the ``loss_*`` that is proportional to it.
    """

    reaches: ClassVar[dict[str, set[str]]] = MISSING
    writes: ClassVar[set] = MISSING
    renames: ClassVar[dict[str, Any]] = MISSING
    coefficients: ClassVar[dict[str, str]] = MISSING

    make: Any = MISSING  # (**options) -> LossModule of small networks, on CPU
    make_shared: Any = MISSING  # () -> LossModule whose networks share parameters
    data: Any = MISSING  # (*batch) -> TensorDict with all that the loss may read
    test_ends_of_episodes: Any = MISSING  # what the loss does at terminated and truncated steps

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        missing = [name for name in vars(LossContract) if getattr(cls, name) is MISSING]
        taken = [
            name
            for name in vars(LossContract)
            if name.startswith("test_") and name not in missing and not callable(getattr(cls, name))
        ]
        if missing or taken:
            raise TypeError(f"{cls.__name__} must define {', '.join(missing + taken)}.")

    def run(self, loss: LossModule, data: TensorDict) -> TensorDict:
        """Return what the loss says with the noise of seed 1."""
        torch.manual_seed(1)
        return loss(data)

    def pair(self, **options: Any) -> tuple[LossModule, LossModule]:
        """Return two losses with the same parameters."""
        one, other = self.make(**options), self.make(**options)
        other.load_state_dict(one.state_dict())
        return one, other

    @staticmethod
    def gradients(loss: LossModule) -> list[torch.Tensor | None]:
        return [p.grad if p.grad is None else p.grad.clone() for p in loss.parameters()]

    def test_each_loss_reaches_its_own_networks_only(self):
        loss, data = self.make(), self.data(4)
        names = list(loss._has_update_associated)
        parameters = dict(loss.named_parameters())
        assert len({id(p) for p in parameters.values()}) == len(parameters) > 0
        out = self.run(loss, data)
        terms = {key for key in out.keys() if key.startswith("loss_")}  # noqa: SIM118
        assert terms == set(self.reaches)
        for term in terms:
            loss.zero_grad()
            out[term].backward(retain_graph=True)
            found = {
                name
                for name in names
                for key, p in parameters.items()
                if key.startswith(f"{name}_params") and p.grad is not None and p.grad.any()
            }
            assert found == self.reaches[term]
            for key, p in parameters.items():
                if key.startswith(tuple(f"{name}_params" for name in found)):
                    assert p.grad is not None, key
        assert not any(b.requires_grad for b in loss.buffers())

    def test_metrics_are_detached_and_named(self):
        loss = self.make()
        out = self.run(loss, self.data(4))
        assert set(out.keys()) == set(loss.out_keys)
        for key, value in out.items():
            assert value.shape == ()
            assert value.isfinite(), key
            assert value.requires_grad == key.startswith("loss_"), key

    def test_the_data_stay_as_they_are(self):
        data = self.data(4)
        before = data.clone()
        self.run(self.make(), data)
        added = set(data.keys(True, True)) - set(before.keys(True, True))
        assert added <= self.writes
        assert not any(data[key].requires_grad for key in added)
        kept = data.select(*before.keys(True, True))
        assert (kept == before).all()

    def test_no_gradient_reaches_a_target(self):
        loss = self.make()
        before = {k: v.clone() for k, v in loss.state_dict().items() if k.startswith("target_")}
        sum(v for k, v in self.run(loss, self.data(4)).items() if k.startswith("loss_")).backward()
        for key, value in loss.state_dict(keep_vars=True).items():
            if key.startswith("target_"):
                assert value.grad is None
                assert torch.equal(value, before[key])

    def test_the_state_dict_restores_it(self):
        one, other = self.make(), self.make()
        for p in one.parameters():
            p.data.add_(0.1)
        for _ in range(2):
            self.run(one, self.data(4))
        other.load_state_dict(one.state_dict(), strict=True)
        data = self.data(4)
        assert_close(self.run(one, data.clone()), self.run(other, data.clone()))

    def test_networks_may_share_parameters(self):
        loss = self.make_shared()
        names = [name for name, _ in loss.named_parameters()]
        assert len(names) == len(set(names)) == len({id(p) for p in loss.parameters()})
        pairs = [
            (k.removeprefix("target_"), k)
            for k, _ in loss.named_children()
            if k.startswith("target_")
        ]
        if not pairs:
            return
        update = SoftUpdate(loss, tau=0.25)
        start = {name: getattr(loss, name).data.clone() for names in pairs for name in names}
        for p in loss.parameters():
            p.data.add_(1.0)
        update.step()
        for online, target in pairs:
            moved = getattr(loss, target).data - start[target]
            assert_close(moved, 0.25 * (getattr(loss, online).data - start[online]))

    def test_keys_can_be_renamed(self):
        one, other = self.pair()
        data = self.data(4)
        renamed, written = data.clone(), {}
        for name, key in self.renames.items():
            default = getattr(other.default_keys(), name)
            if renamed.get(default, None) is not None:
                renamed.rename_key_(default, key)
            else:
                written[default] = key
            other.set_keys(**{name: key})
        assert_close(self.run(one, data), self.run(other, renamed))
        for default, key in written.items():
            assert (data.get(default, None) is None) == (renamed.get(key, None) is None)
            assert renamed.get(default, None) is None
        with pytest.raises(ValueError, match="not an accepted tensordict key"):
            other.set_keys(nonsense="a")

    def test_it_runs_without_a_tensordict(self):
        one, other = self.pair()
        data = self.data(4).select(*one.in_keys)
        expected = self.run(one, data.clone())
        flat = {key if isinstance(key, str) else "_".join(key): data[key] for key in other.in_keys}
        torch.manual_seed(1)
        found = other(**flat)
        for key, value in zip(other.out_keys, found, strict=True):
            assert_close(value, expected[key])
        term = next(iter(self.reaches))
        other.select_out_keys(term)
        selected = other(**flat)
        assert isinstance(selected, torch.Tensor)
        selected.backward()

    def test_reductions(self):
        data, found = self.data(3, 4), {}
        for reduction in ("none", "mean", "sum"):
            torch.manual_seed(2)
            found[reduction] = self.run(self.make(reduction=reduction), data.clone())
        for term in self.reaches:
            each = found["none"][term]
            assert each.shape == (3, 4)
            assert_close(found["mean"][term], each.mean())
            assert_close(found["sum"][term], each.sum())
        with pytest.raises(ValueError, match="reduction must be"):
            self.make(reduction="median")

    def test_double_precision(self):
        loss = self.make().double()
        data = self.data(4)
        data = data.apply(lambda x: x.double() if x.is_floating_point() else x)
        for key, value in self.run(loss, data).items():
            if key in self.reaches:
                assert value.dtype == torch.float64
                value.backward(retain_graph=True)

    @pytest.mark.parametrize("fill", [7.0, float("nan")])
    @pytest.mark.parametrize("key", [("collector", "mask"), "shifted_valid"])
    def test_masked_steps_change_nothing(self, key, fill):
        one, other = self.pair()
        data = self.data(3, 4)
        mask = torch.rand(3, 4, 1) > 0.4
        data[key] = mask
        garbage = data.clone()
        for name, value in data.items(True, True):
            if value.is_floating_point():
                where = mask.reshape(3, 4, *(1,) * (value.ndim - 2))
                garbage[name] = torch.where(where, value, 30.0 * value + fill)
        outs = [self.run(one, data), self.run(other, garbage)]
        assert_close(outs[0], outs[1])
        for loss, out in zip((one, other), outs, strict=True):
            sum(out[term] for term in self.reaches).backward()
            assert any(g is not None and g.any() for g in self.gradients(loss))
        for left, right in zip(self.gradients(one), self.gradients(other), strict=True):
            assert (left is None) == (right is None)
            if left is not None:
                assert_close(left, right, atol=1e-6, rtol=1e-4)

    def test_all_masked_is_zero(self):
        loss, data = self.make(), self.data(3, 4)
        data["collector", "mask"] = torch.zeros(3, 4, 1, dtype=torch.bool)
        out = self.run(loss, data)
        assert all(value.isfinite() for value in out.values())
        for term in self.reaches:
            assert out[term].item() == 0
            out[term].backward(retain_graph=True)
        assert not any(g is not None and g.any() for g in self.gradients(loss))
        data["priority_weight"] = torch.ones(3, 4)
        out = self.run(loss, data)
        assert [out[term].item() for term in self.reaches] == [0.0] * len(self.reaches)

    @pytest.mark.parametrize("masked", [False, True])
    def test_priority_weights_weigh(self, masked):
        data = self.data(3, 4)
        if masked:
            data["collector", "mask"] = torch.rand(3, 4, 1) > 0.4
        each = self.run(self.make(reduction="none"), data.clone())
        for shape in ((3, 4), (3, 4, 1)):  # as replay has it, and with the axis of rewards
            weighed, weight = data.clone(), torch.rand(shape)
            weighed["priority_weight"] = weight
            weight = weight.reshape(3, 4)
            if masked:
                weight = weight * data["collector", "mask"].squeeze(-1)
            found = self.run(self.make(), weighed)
            for term in self.reaches:
                assert_close(found[term], (weight * each[term]).sum() / weight.sum())

    @pytest.mark.parametrize("batch", [(1,), (1, 1), (3, 1), (1, 5)])
    def test_small_batches(self, batch):
        out = self.run(self.make(), self.data(*batch))
        assert all(value.isfinite() for value in out.values())

    def test_coefficients_can_be_scheduled(self):
        assert set(self.coefficients) == set(self.make()._schedulable_buffers)
        for name, term in self.coefficients.items():
            one, other = self.pair()
            data, buffer = self.data(4), getattr(other, name)
            setattr(other, name, 0.5 * buffer.item())
            assert getattr(other, name) is buffer
            whole, half = (self.run(loss, data.clone())[term] for loss in (one, other))
            assert whole.item() != 0
            assert_close(half, 0.5 * whole)

    def test_parameters_can_be_reset(self):
        loss = self.make()
        before = [p.clone() for p in loss.parameters()]
        loss.reset_parameters_recursive()
        changed = [not torch.equal(p, b) for p, b in zip(loss.parameters(), before, strict=True)]
        assert any(changed)
        assert all(value.isfinite() for value in self.run(loss, self.data(4)).values())

    def test_the_randomness_of_vmap_can_be_set(self):
        loss = self.make()
        loss.set_vmap_randomness("different")
        assert all(value.isfinite() for value in self.run(loss, self.data(4)).values())
