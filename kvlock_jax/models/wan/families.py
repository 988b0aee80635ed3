"""The families of Wan 2.1: text-to-video and VACE, 1.3B and 14B."""

from kvlock_jax.models.family import Family, Network, TextOnly
from kvlock_jax.models.layout import ParameterRules
from kvlock_jax.models.text import config as text_config
from kvlock_jax.models.text.config import UMT5Config
from kvlock_jax.models.text.umt5 import UMT5Encoder
from kvlock_jax.models.vae.autoencoder import WanVAE
from kvlock_jax.models.vae.config import VAEConfig
from kvlock_jax.models.wan.block import Positions
from kvlock_jax.models.wan.conditioning import VACEConditioner
from kvlock_jax.models.wan.config import WanConfig
from kvlock_jax.models.wan.parameters import PARAMETERS
from kvlock_jax.models.wan.transformer import Conditioning, Time
from kvlock_jax.models.wan.vace import VACEConditioning, VACEContext, wan_transformer

_NETWORKS = {
    "transformer": Network(WanConfig, wan_transformer, PARAMETERS),
    # in float32 as the publisher and Diffusers run it
    "vae": Network(VAEConfig, WanVAE, ParameterRules(), float32=True),
    "text_encoder": Network(UMT5Config, UMT5Encoder, text_config.PARAMETERS),
}

_RESULTS = (Positions, Time, Conditioning, VACEConditioning, VACEContext)

_LARGE = 5120
"""Width of the 14B models."""


def _settings(kind: str, config: WanConfig) -> str:
    # The size of the video is not known yet: 14B gets the settings for 720p, which the publisher's
    # generate.py takes at 480p too; `t2v_14b_480p` is its README's milder shift.
    return f"{kind}_{'14b_720p' if config.dim >= _LARGE else '1_3b_480p'}"


TEXT_TO_VIDEO = Family(
    name="wan2.1-t2v",
    networks=_NETWORKS,
    describes=lambda config: isinstance(config, WanConfig) and not config.vace_layers,
    conditioner=TextOnly(),
    settings=lambda config: _settings("t2v", config),
    results=_RESULTS,
)

VACE = Family(
    name="wan2.1-vace",
    networks=_NETWORKS,
    describes=lambda config: isinstance(config, WanConfig) and bool(config.vace_layers),
    conditioner=VACEConditioner(),
    settings=lambda config: _settings("vace", config),
    results=_RESULTS,
)
