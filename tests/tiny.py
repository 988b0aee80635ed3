"""A tiny Wan 2.1 in a Diffusers folder, written by Diffusers, and clips to edit with it."""

from pathlib import Path

import numpy as np

SHAPE = (5, 32, 48)  # frames, height, width: 2 x 4 x 6 latent cells, 12 tokens
WORDS = "a red blue star circle square on the".split()


SIZES = dict(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=8,
    ffn_dim=20,
)


def make_pipeline(folder: Path):
    """Text-to-video of 2 layers, random weights, float32.

    `folder` takes the tokenizer's files. Torch and Diffusers load only where this is called.
    """
    from diffusers import WanPipeline, WanTransformer3DModel

    return _assemble(folder, WanPipeline, lambda: WanTransformer3DModel(**SIZES, num_layers=2))


def make_vace_pipeline(folder: Path):
    """VACE of 3 layers with hints after two of them; the rest is as in `make_pipeline`."""
    from diffusers import WanVACEPipeline, WanVACETransformer3DModel

    return _assemble(
        folder,
        WanVACEPipeline,
        lambda: WanVACETransformer3DModel(
            **SIZES, num_layers=3, vace_layers=[0, 2], vace_in_channels=4 + 4 + 64
        ),
    )


def make_experts_pipeline(folder: Path):
    """Text-to-video of two experts, which differ."""
    from diffusers import WanPipeline, WanTransformer3DModel

    def make():
        return WanTransformer3DModel(**SIZES, num_layers=2)

    rest = {"transformer_2": make, "boundary_ratio": 0.875}
    return _assemble(folder, WanPipeline, make, **rest)


def make_vace_experts_pipeline(folder: Path):
    """VACE of two experts, which differ."""
    from diffusers import WanVACEPipeline, WanVACETransformer3DModel

    def make():
        sizes = {"num_layers": 3, "vace_layers": [0, 2], "vace_in_channels": 4 + 4 + 64}
        return WanVACETransformer3DModel(**SIZES, **sizes)

    rest = {"transformer_2": make, "boundary_ratio": 0.875}
    return _assemble(folder, WanVACEPipeline, make, **rest)


def make_ti2v_pipeline(folder: Path):
    """Wan 2.2's 5B: the VAE of 16x16 pixels a cell, and a timestep for every token."""
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

    def make_vae():
        pixels = {"in_channels": 12, "out_channels": 12, "patch_size": 2, "is_residual": True}
        sizes = {"base_dim": 4, "z_dim": 4, "num_res_blocks": 1, "decoder_base_dim": 6}
        statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
        return AutoencoderKLWan(**sizes, **statistics, **pixels, scale_factor_spatial=16)

    def make():
        return WanTransformer3DModel(**SIZES, num_layers=2)

    rest = {"vae": make_vae, "expand_timesteps": True}
    return _assemble(folder, WanPipeline, make, **rest)


def _assemble(folder: Path, pipeline: type, make_transformer, **rest):
    import torch
    import transformers
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler

    from kvlock_jax.models.text import tokenizer

    torch.manual_seed(0)
    tokenizer.write_word_tokenizer(folder / "words", WORDS, 12)
    rest = {name: make() if callable(make) else make for name, make in rest.items()}
    rest.setdefault(
        "vae",
        AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            num_res_blocks=1,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
    )
    return pipeline(
        **rest,
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder / "words"),
        text_encoder=transformers.UMT5EncoderModel(
            transformers.UMT5Config(
                vocab_size=16, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2
            )
        ),
        transformer=make_transformer(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def write_folder(folder: Path) -> Path:
    """The folder of `make_pipeline`, in shards."""
    make_pipeline(folder).save_pretrained(folder / "wan", max_shard_size="20KB")
    return folder / "wan"


def write_vace_folder(folder: Path) -> Path:
    """The folder of `make_vace_pipeline`, in shards."""
    make_vace_pipeline(folder).save_pretrained(folder / "wan", max_shard_size="20KB")
    return folder / "wan"


def clip(frames: int = SHAPE[0], height: int = SHAPE[1], width: int = SHAPE[2]) -> np.ndarray:
    """A smooth picture that moves."""
    t, y, x = np.mgrid[:frames, :height, :width]
    picture = np.stack([60 + 3 * y + 4 * t, 200 - 2 * x + t, 40 + y + x], axis=-1)
    return picture.clip(0, 255).astype(np.uint8)


def mask(frames: int = SHAPE[0], height: int = SHAPE[1], width: int = SHAPE[2]) -> np.ndarray:
    """A box of 8x8 pixels at (8, 8), white on black, as RGB frames."""
    region = np.zeros((frames, height, width, 3), np.uint8)
    region[:, 8:16, 8:16] = 255
    return region
