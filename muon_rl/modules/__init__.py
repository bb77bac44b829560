"""Networks: TensorDictModules that read and write the keys of TorchRL's losses."""

from muon_rl.modules.actor_critic import QCritic, TanhNormalActor

__all__ = ["QCritic", "TanhNormalActor"]
