"""Writes the trained demo model as a Diffusers folder, in float16.

    python scripts/export_demo.py --vae runs/decoder/params.npz --dit runs/dit [--vace runs/vace]
        --dst FOLDER
    python scripts/export_demo.py --vae runs/long/params.npz --dst FOLDER   # the VAE of one alone
    python scripts/export_demo.py --vace runs/pairs --dst FOLDER            # all but the VAE of one

Diffusers itself makes the folder (it is in the `test` extra), so the layout is its own and it loads
there too.
"""

import argparse
import pathlib
import tempfile

import demo_models
import numpy as np
import torch
import transformers
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from flax import nnx

from kvlock_jax.convert import diffusers as layout
from kvlock_jax.convert.table import LazyTensor, Table, plan
from kvlock_jax.models.text.tokenizer import write_word_tokenizer
from kvlock_jax.models.vae.autoencoder import WanVAE
from kvlock_jax.models.wan.vace import wan_transformer


def publish(module: torch.nn.Module, state: nnx.State, table: Table) -> None:
    """Puts our parameters into a published module: the converter's table, read backwards.

    A table's transforms only move elements, so what one does to an array of positions says where
    each of our elements belongs.
    """
    target = {k: v for k, v in module.state_dict().items() if not k.startswith("encoder.embed")}
    shapes = {k: LazyTensor(tuple(v.shape), np.dtype(np.float32), None) for k, v in target.items()}
    ours = {path: np.asarray(v[...], np.float32) for path, v in nnx.to_flat_state(state)}
    for source in plan(state, shapes, table, "the published module"):
        layers = ours[source.path] if source.stacked else ours[source.path][None]
        for key, layer in zip(source.keys, layers, strict=True):
            shape = shapes[key].shape
            positions = np.arange(np.prod(shape)).reshape(shape)
            flat = np.empty(positions.size, np.float32)
            flat[source.transform(positions).ravel()] = layer.ravel()
            target[key] = torch.from_numpy(flat.reshape(shape))
    module.load_state_dict(target, strict=False)


def published_encoder() -> transformers.UMT5EncoderModel:
    """The text encoder, as published ones are."""
    text = demo_models.TEXT_ENCODER
    encoder = transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=text.vocab_size,
            d_model=text.d_model,
            d_kv=text.d_kv,
            d_ff=text.d_ff,
            num_layers=text.num_layers,
            num_heads=text.num_heads,
        )
    )
    publish(encoder, nnx.state(demo_models.text_encoder()), layout.UMT5)
    return encoder.half()


def write_tokenizer(folder: pathlib.Path) -> None:
    """Writes the tokenizer as `text.Tokenizer` reads it."""
    with tempfile.TemporaryDirectory() as made:
        write_word_tokenizer(made, demo_models.WORDS, demo_models.TEXT_LEN)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((pathlib.Path(made) / name).read_bytes())


def replace(folder: pathlib.Path, published: type, state: nnx.State, table: Table) -> None:
    """Replaces the weights of a model in an exported folder, and keeps its config."""
    config = (folder / "config.json").read_bytes()  # Diffusers would name this machine's folder
    model = published.from_pretrained(folder).float()
    publish(model, state, table)
    model.half().save_pretrained(folder)
    (folder / "config.json").write_bytes(config)


def main() -> None:
    """Parses the flags and exports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=pathlib.Path)
    parser.add_argument("--dit", type=pathlib.Path, help="the run's folder")
    parser.add_argument("--vace", type=pathlib.Path, help="the run's folder, to export it as VACE")
    parser.add_argument("--dst", type=pathlib.Path, required=True)
    flags = parser.parse_args()

    if flags.vae is None:
        params = nnx.state(
            nnx.eval_shape(lambda: wan_transformer(demo_models.VACE, rngs=nnx.Rngs(0)))
        )
        trained = demo_models.load_params(flags.vace / "params.npz", params)
        replace(flags.dst / "transformer", WanVACETransformer3DModel, trained, layout.WAN)
        published_encoder().save_pretrained(flags.dst / "text_encoder")
        write_tokenizer(flags.dst / "tokenizer")
        return
    sizes = demo_models.VAE
    params = nnx.state(nnx.eval_shape(lambda: WanVAE(sizes, rngs=nnx.Rngs(0))))
    trained_vae = demo_models.load_params(flags.vae, params)
    if flags.dit is None:
        replace(flags.dst / "vae", AutoencoderKLWan, trained_vae, layout.VAE)
        return
    if flags.vace:
        wan, run = demo_models.VACE, flags.vace
        published, pipeline = WanVACETransformer3DModel, WanVACEPipeline
        own = {"vace_layers": list(wan.vace_layers), "vace_in_channels": wan.vace_in_channels}
    else:
        wan, run = demo_models.TRANSFORMER, flags.dit
        published, pipeline, own = WanTransformer3DModel, WanPipeline, {}
    stats = np.load(flags.dit / "latent_stats.npz")
    vae = AutoencoderKLWan(
        base_dim=sizes.base_dim,
        z_dim=sizes.z_dim,
        dim_mult=list(sizes.dim_mult),
        num_res_blocks=sizes.num_res_blocks,
        temperal_downsample=list(sizes.temperal_downsample),
        latents_mean=stats["mean"].tolist(),
        latents_std=stats["std"].tolist(),
    )
    publish(vae, trained_vae, layout.VAE)

    transformer = published(
        num_attention_heads=wan.num_attention_heads,
        attention_head_dim=wan.attention_head_dim,
        in_channels=wan.in_channels,
        out_channels=wan.out_channels,
        text_dim=wan.text_dim,
        freq_dim=wan.freq_dim,
        ffn_dim=wan.ffn_dim,
        num_layers=wan.num_layers,
        **own,
    )
    params = nnx.state(nnx.eval_shape(lambda: wan_transformer(wan, rngs=nnx.Rngs(0))))
    trained = demo_models.load_params(run / "params.npz", params)
    publish(transformer, trained, layout.WAN)

    with tempfile.TemporaryDirectory() as folder:
        write_word_tokenizer(folder, demo_models.WORDS, demo_models.TEXT_LEN)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        # As Wan's; the shift is the demo's own (configs/demo.py).
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
        models = [published_encoder(), vae.half(), transformer.half()]
        whole = pipeline(
            tokenizer=tokenizer,
            text_encoder=models[0],
            vae=models[1],
            transformer=models[2],
            scheduler=scheduler,
        )
        whole.save_pretrained(flags.dst)
        write_tokenizer(flags.dst / "tokenizer")
    size = sum(p.stat().st_size for p in flags.dst.rglob("*") if p.is_file())
    print(f"{flags.dst}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
