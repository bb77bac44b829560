"""Networks: layers, and TensorDictModules that read and write the keys of TorchRL's losses."""

from muon_rl.modules.actor_critic import QCritic, TanhNormalActor
from muon_rl.modules.mlp import L2Norm, ResidualMLP, mlp
from muon_rl.modules.spectral import SpectralLinear, spectral_normalize

__all__ = [
    "L2Norm",
    "QCritic",
    "ResidualMLP",
    "SpectralLinear",
    "TanhNormalActor",
    "mlp",
    "spectral_normalize",
]
