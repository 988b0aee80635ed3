"""The families of Wan: text-to-video and VACE of 2.1, and of 2.2 with their two experts."""

from collections.abc import Callable
from typing import Any

from kvlock_jax.models.family import Conditioner, Family, Network, TextOnly
from kvlock_jax.models.layout import ParameterRules
from kvlock_jax.models.text import config as text_config
from kvlock_jax.models.text.config import UMT5Config
from kvlock_jax.models.text.umt5 import UMT5Encoder
from kvlock_jax.models.vae.autoencoder import WanVAE
from kvlock_jax.models.vae.config import VAEConfig
from kvlock_jax.models.wan.block import Positions
from kvlock_jax.models.wan.conditioning import VACEConditioner, on_canvas_of_fun
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

_TEXT_ONLY = TextOnly()

_LARGE = 5120
"""Width of the 14B models."""


def _describes(
    *, vace: bool = False, experts: bool = False, residual: bool = False
) -> Callable[[Any], bool]:
    """Whether configs are of a transformer with context blocks, of experts, of Wan 2.2's VAE."""

    def describes(configs: Any) -> bool:
        """Whether they are."""
        config = configs.transformer
        if not isinstance(config, WanConfig):
            return False
        found = bool(config.vace_layers), bool(configs.experts), configs.vae.is_residual
        return found == (vace, experts, residual)

    return describes


def _settings(kind: str) -> Callable[[Any], str]:
    """The settings of Wan 2.1 for a size of model.

    The size of the video is not known yet: 14B gets the settings for 720p, which the publisher's
    generate.py takes at 480p too; `t2v_14b_480p` is its README's milder shift.
    """

    def settings(configs: Any) -> str:
        """The name of the settings."""
        return f"{kind}_{'14b_720p' if configs.transformer.dim >= _LARGE else '1_3b_480p'}"

    return settings


def _wan(
    name: str,
    describes: Callable[[Any], bool],
    settings: Callable[[Any], str],
    conditioner: Conditioner = _TEXT_ONLY,
    *,
    takes_known_tokens: bool = False,
) -> Family:
    """A family of Wan: they differ in what they are shown and in how they are sampled."""
    kinds = {"networks": _NETWORKS, "results": _RESULTS, "takes_known_tokens": takes_known_tokens}
    return Family(name, describes=describes, settings=settings, conditioner=conditioner, **kinds)


TEXT_TO_VIDEO = _wan("wan2.1-t2v", _describes(), _settings("t2v"))

VACE = _wan("wan2.1-vace", _describes(vace=True), _settings("vace"), VACEConditioner())

TEXT_TO_VIDEO_EXPERTS = _wan("wan2.2-t2v", _describes(experts=True), lambda _: "t2v_a14b")

KNOWN_TOKENS = _wan(
    "wan2.2-ti2v", _describes(residual=True), lambda _: "ti2v_5b_720p", takes_known_tokens=True
)

VACE_FUN = _wan(
    "wan2.2-vace-fun",
    _describes(vace=True, experts=True),
    lambda _: "vace_fun_a14b",
    VACEConditioner(canvas=on_canvas_of_fun, newest_first=False),
)
