"""Tables of the publisher's own layouts (Wan-Video/Wan2.1 and Wan-Video/Wan2.2)."""

from kvlock_jax.convert.table import (
    Row,
    Table,
    Transform,
    kernel,
    patches,
    per_channel,
    pointwise,
    unbatched,
)
from kvlock_jax.models.vae.config import VAEConfig


def _biased(path: str, key: str, transform: Transform = kernel) -> Table:
    """A linear layer or a convolution."""
    weight = Row(rf"{path}\.kernel", f"{key}.weight", transform)
    return weight, Row(rf"{path}\.bias", f"{key}.bias")


def _attention(path: str, key: str) -> Table:
    """One of the two attentions of every block of the transformer."""
    return (
        # `to_out` is `o`
        *_biased(rf"(\w*blocks)\.{path}\.to_([qkvo])\w*", rf"\1.*.{key}.\2"),
        Row(rf"(\w*blocks)\.{path}\.(norm_[qk])\.scale", rf"\1.*.{key}.\2.weight"),
    )


WAN: Table = (
    *_biased(r"(\w*patch_embedding)", r"\1", patches),
    *_biased(r"condition_embedder\.(time|text)_embedder\.linear_1", r"\1_embedding.0"),
    *_biased(r"condition_embedder\.(time|text)_embedder\.linear_2", r"\1_embedding.2"),
    *_biased(r"condition_embedder\.time_proj", "time_projection.1"),
    *_attention("attn1", "self_attn"),
    *_attention("attn2", "cross_attn"),
    Row(r"(\w*blocks)\.norm2\.scale", r"\1.*.norm3.weight"),  # Diffusers' norm3 has no weights
    Row(r"(\w*blocks)\.norm2\.bias", r"\1.*.norm3.bias"),
    *_biased(r"(\w*blocks)\.ffn\.net_([02])", r"\1.*.ffn.\2"),
    Row(r"(\w*blocks)\.scale_shift_table", r"\1.*.modulation", unbatched),
    Row(r"scale_shift_table", "head.modulation", unbatched),
    *_biased("vace_proj_in", "vace_blocks.0.before_proj"),
    *_biased(r"vace_blocks\.proj_out", "vace_blocks.*.after_proj"),
    *_biased("proj_out", "head.head"),
)
"""`diffusion_pytorch_model*.safetensors` of text-to-video and of VACE."""


def _residual(path: str, key: str) -> Table:
    """A residual block of the VAE; the numbers that `residual` skips have no weights."""
    return (
        Row(rf"{path}\.norm1\.gamma", f"{key}.residual.0.gamma", per_channel),
        *_biased(rf"{path}\.conv1", f"{key}.residual.2"),
        Row(rf"{path}\.norm2\.gamma", f"{key}.residual.3.gamma", per_channel),
        *_biased(rf"{path}\.conv2", f"{key}.residual.6"),
        *_biased(rf"{path}\.conv_shortcut", f"{key}.shortcut", pointwise),
    )


def _resample(path: str, key: str) -> Table:
    """A `Downsample` or `Upsample` of the VAE."""
    return (
        *_biased(rf"{path}\.resample", f"{key}.resample.1"),
        *_biased(rf"{path}\.time_conv", f"{key}.time_conv"),
    )


def vae(config: VAEConfig) -> Table:
    """`Wan2.1_VAE.pth` or, with shortcuts around its levels, `Wan2.2_VAE.pth`."""
    levels = _nested_levels if config.is_residual else _flat_levels
    return (
        *levels(config),
        *_residual(r"(.+)\.mid_block\.resnets\.0", r"\1.middle.0"),
        Row(r"(.+)\.mid_block\.attentions\.0\.norm\.gamma", r"\1.middle.1.norm.gamma", per_channel),
        *_biased(r"(.+)\.mid_block\.attentions\.0\.(to_qkv|proj)", r"\1.middle.1.\2", pointwise),
        *_residual(r"(.+)\.mid_block\.resnets\.1", r"\1.middle.2"),
        *_biased(r"(.+)\.conv_in", r"\1.conv1"),
        Row(r"(.+)\.norm_out\.gamma", r"\1.head.0.gamma", per_channel),
        *_biased(r"(.+)\.conv_out", r"\1.head.2"),
        *_biased("quant_conv", "conv1", pointwise),
        *_biased("post_quant_conv", "conv2", pointwise),
    )


def _nested_levels(config: VAEConfig) -> Table:
    """The levels of Wan 2.2's VAE: a level numbers its modules from 0, its resampling last."""
    down, up = (rf"{name}\.(\d+)" for name in (r"encoder\.down_blocks", r"decoder\.up_blocks"))
    downs, ups = r"encoder.downsamples.\1.downsamples", r"decoder.upsamples.\1.upsamples"
    return (
        *_residual(rf"{down}\.resnets\.(\d+)", rf"{downs}.\2"),
        *_resample(rf"{down}\.downsampler", f"{downs}.{config.num_res_blocks}"),
        *_residual(rf"{up}\.resnets\.(\d+)", rf"{ups}.\2"),
        *_resample(rf"{up}\.upsampler", f"{ups}.{config.num_res_blocks + 1}"),
    )


def _flat_levels(config: VAEConfig) -> Table:
    """The levels of Wan 2.1's VAE, whose modules are numbered across levels: the sizes matter."""
    encoder = (r"encoder\.down_blocks\.(\d+)", r"encoder.downsamples.\1")
    rows = [*_residual(*encoder), *_resample(*encoder)]
    count = 0
    for level in range(len(config.dim_mult)):
        for block in range(config.num_res_blocks + 1):
            path = rf"decoder\.up_blocks\.{level}\.resnets\.{block}"
            rows += _residual(path, f"decoder.upsamples.{count}")
            count += 1
        path = rf"decoder\.up_blocks\.{level}\.upsamplers\.0"
        rows += _resample(path, f"decoder.upsamples.{count}")  # the last level has none
        count += 1
    return tuple(rows)


UMT5: Table = (
    Row(r"shared\.embedding", "token_embedding.weight"),
    Row(r"final_layer_norm\.scale", "norm.weight"),
    Row(r"block\.layer\.0\.layer_norm\.scale", "blocks.*.norm1.weight"),
    Row(r"block\.layer\.1\.layer_norm\.scale", "blocks.*.norm2.weight"),
    Row(
        r"block\.layer\.0\.SelfAttention\.relative_attention_bias\.embedding",
        "blocks.*.pos_embedding.embedding.weight",
    ),
    Row(r"block\.layer\.0\.SelfAttention\.([qkvo])\.kernel", r"blocks.*.attn.\1.weight", kernel),
    Row(r"block\.layer\.1\.DenseReluDense\.wi_0\.kernel", "blocks.*.ffn.gate.0.weight", kernel),
    Row(r"block\.layer\.1\.DenseReluDense\.wi_1\.kernel", "blocks.*.ffn.fc1.weight", kernel),
    Row(r"block\.layer\.1\.DenseReluDense\.wo\.kernel", "blocks.*.ffn.fc2.weight", kernel),
)
"""`models_t5_umt5-xxl-enc-bf16.pth`: gelu applies to `gate.0`, and `fc1` multiplies the result."""
