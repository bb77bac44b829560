"""Networks: layers, and TensorDictModules that read and write the keys of TorchRL's losses."""

from muon_rl.modules.actor_critic import QCritic, TanhNormalActor
from muon_rl.modules.convolution import GridConvolution
from muon_rl.modules.grid_actor_critic import (
    ConvolutionActorCritic,
    GridActorCritic,
    TransformerActorCritic,
)
from muon_rl.modules.latent import MinMaxNorm
from muon_rl.modules.mlp import L2Norm, ResidualMLP, mlp
from muon_rl.modules.muesli_policy import MuesliPolicy
from muon_rl.modules.q_head import QHead
from muon_rl.modules.representation import GridEncoder, representation
from muon_rl.modules.spectral import SpectralLinear, spectral_normalize
from muon_rl.modules.transformer import GridTransformer
from muon_rl.modules.two_hot import SignedHyperbolicTwoHot
from muon_rl.modules.world_model import WorldModel

__all__ = [
    "ConvolutionActorCritic",
    "GridActorCritic",
    "GridConvolution",
    "GridEncoder",
    "GridTransformer",
    "L2Norm",
    "MinMaxNorm",
    "MuesliPolicy",
    "QCritic",
    "QHead",
    "ResidualMLP",
    "SignedHyperbolicTwoHot",
    "SpectralLinear",
    "TanhNormalActor",
    "TransformerActorCritic",
    "WorldModel",
    "mlp",
    "representation",
    "spectral_normalize",
]
