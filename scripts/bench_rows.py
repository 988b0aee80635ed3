"""The rows of `bench.py`: pairs of programs, ours and a peer's or another of ours.

Each is made by itself, so that its memory can be measured in a process of its own.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import kvlock_jax as kvl
from kvlock_jax import lock
from kvlock_jax.estimate import costs
from kvlock_jax.grid import Grid
from kvlock_jax.models.vae import autoencoder
from kvlock_jax.models.vae.config import VAEConfig
from kvlock_jax.models.wan.config import WanConfig
from kvlock_jax.models.wan.vace import VACEContext, wan_transformer
from kvlock_jax.sampling import solvers
from kvlock_jax.sampling.edits import Edits, bucket
from kvlock_jax.sampling.loop import Program, sample
from kvlock_jax.settings.schema import run_config

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "2")


DEMO = pathlib.Path(kvl.__file__).parent / "demo"
WIDE = WanConfig(12, 128, 2, 8960)  # the widths of 1.3B, and two of its 30 layers
GRIDS = {195: (5, 6, 26), 1950: (5, 30, 52), 8000: (5, 64, 100)}
"""Latent frames, rows and columns for each number of tokens."""
TEXT, STEPS, THREADS = 512, 50, 2

Run = Callable[[], None]
"""Runs a program once and waits for its result."""


@dataclasses.dataclass(frozen=True)
class Row:
    """Two programs to compare.

    Attributes:
      name: what of.
      bar: what the ratio of their times must not be over; or under, where `least`. Without one the
        row is there to compare with.
      ours: makes ours.
      peer: makes the other.
      scale: what the ratio is multiplied with, such as 1 / edits.
      least: whether the ratio is the peer's time over ours, and more is better.
      memory: bar of the ratio of peak memory, if that is measured.
    """

    name: str
    bar: float | None
    ours: Callable[[], Run]
    peer: Callable[[], Run]
    scale: float = 1.0
    least: bool = False
    memory: float | None = None


def normal(*shape: int) -> jax.Array:
    """Random numbers of a shape; no row depends on their values."""
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def torch_with_threads():
    """Torch, on as many threads as XLA has."""
    import torch

    torch.set_num_threads(THREADS)
    return torch


# --- the transformer ----------------------------------------------------------------------------


def passes(tokens: int, layers: int) -> Run:
    """Our transformer over two rows, as in one sampling step."""
    grid = Grid.of(GRIDS[tokens])
    model = wan_transformer(dataclasses.replace(WIDE, num_layers=layers), rngs=nnx.Rngs(0))
    condition = jax.jit(lambda m, t: m.condition(t, grid))(model, normal(2, TEXT, 4096))
    time = jax.jit(lambda m, t: m.times(t))(model, jnp.full(2, 500.0))
    z, run = normal(2, grid.length, 4, 16), jax.jit(lambda m, *given: m(*given))
    return lambda: jax.block_until_ready(run(model, z, time, condition))


def peers_passes(tokens: int, layers: int) -> Run:
    """Diffusers'."""
    torch = torch_with_threads()
    from diffusers import WanTransformer3DModel

    sizes = {"num_attention_heads": 12, "num_layers": layers, "ffn_dim": 8960}
    peer = WanTransformer3DModel(**sizes).eval()
    given = torch.randn(2, 16, *GRIDS[tokens]), torch.full((2,), 500.0), torch.randn(2, TEXT, 4096)

    def run() -> None:
        with torch.no_grad():
            peer(*given)

    return run


def products(library: str) -> Run:
    """Bare feed-forward products with the operations of `passes(1950, 2)`."""
    flops = costs.pass_flops(costs.Workload(WIDE, 17, 240, 416), 2).total
    sizes = (3900, 1536), (1536, 8960)
    times = round(flops / (2 * 3900 * 1536 * 8960))
    if library == "XLA":
        x, w = (normal(*size) for size in sizes)
        product = jax.jit(jnp.matmul)
    else:
        x, w = (torch_with_threads().randn(*size) for size in sizes)
        product = torch_with_threads().matmul

    def run() -> None:
        for _ in range(times):
            y = product(x, w)
        if library == "XLA":
            jax.block_until_ready(y)

    return run


# --- the VAE ------------------------------------------------------------------------------------


def decode(frames: int, height: int, width: int, demo: bool) -> Run:
    """Our decoder, at the demo model's widths or the published ones."""
    z = normal(1, (frames - 1) // 4 + 1, height // 8, width // 8, 16)
    network = (
        kvl.load("demo").checkpoint.vae
        if demo
        else autoencoder.WanVAE(VAEConfig(), rngs=nnx.Rngs(0))
    )
    return lambda: jax.block_until_ready(autoencoder.decode(network, z))


def peers_decode(frames: int, height: int, width: int, demo: bool) -> Run:
    """Diffusers'."""
    torch = torch_with_threads()
    from diffusers import AutoencoderKLWan

    published = AutoencoderKLWan() if not demo else None
    peer = published or AutoencoderKLWan.from_pretrained(DEMO / "weights", subfolder="vae")
    peer = peer.float().eval()
    z = torch.randn(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)

    def run() -> None:
        with torch.no_grad():
            peer.decode(z)

    return run


# --- whole pipelines ----------------------------------------------------------------------------


@functools.cache
def text_to_video() -> str:
    """The demo model without its context blocks, in Diffusers' layout."""
    from diffusers import WanPipeline, WanTransformer3DModel, WanVACEPipeline

    whole = WanVACEPipeline.from_pretrained(DEMO / "weights")
    sizes = {k: v for k, v in whole.transformer.config.items() if "vace" not in k}
    plain = WanTransformer3DModel.from_config(sizes)
    left = [n for n in whole.transformer.state_dict() if n.startswith("vace")]
    kept = {k: v.float() for k, v in whole.transformer.state_dict().items() if k not in left}
    plain.load_state_dict(kept)
    rest = {"tokenizer": whole.tokenizer, "text_encoder": whole.text_encoder, "vae": whole.vae}
    folder = tempfile.mkdtemp(prefix="kvlock-bench-")
    WanPipeline(**rest, transformer=plain, scheduler=whole.scheduler).save_pretrained(folder)
    return folder


def pipeline() -> Run:
    """Our pipeline, with a mask of the whole video."""
    model = kvl.load(text_to_video())
    config = run_config("cfg", steps=STEPS, shift=3.0, guidance_scale=5.0, solver="unipc")
    blank, mask = np.zeros((9, 96, 96, 3), np.uint8), np.ones((96, 96), bool)
    return lambda: kvl.edit(model, blank, mask, "a blue square", config=config)


def peers_pipeline() -> Run:
    """Diffusers'."""
    torch_with_threads()
    import torch
    from diffusers import UniPCMultistepScheduler, WanPipeline

    peer = WanPipeline.from_pretrained(text_to_video(), torch_dtype=torch.float32)
    peer.set_progress_bar_config(disable=True)
    settings = {"use_flow_sigmas": True, "flow_shift": 3.0, "num_train_timesteps": 1000}
    peer.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", **settings)
    size = {"height": 96, "width": 96, "num_frames": 9, "max_sequence_length": 8}
    run = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "np"}
    return lambda: peer(prompt="a blue square", negative_prompt="", **size, **run)


# --- the lock -----------------------------------------------------------------------------------


def loop(
    preset: str,
    context: bool,
    count: int = 1,
    tokens: int = 195,
    steps: int = STEPS,
    branches: int = 2,
) -> Run:
    """A whole sampling loop over edits of one source that edit a fifth of the tokens."""
    config = dataclasses.replace(WIDE, vace_layers=(0,)) if context else WIDE
    grid = Grid.of(GRIDS[tokens])
    model = wan_transformer(config, rngs=nnx.Rngs(0))
    shape = (grid.length, 4)
    own = jnp.arange(grid.length) < round(0.2 * grid.length)
    foreground = jnp.broadcast_to(own[None, :, None], (count, *shape))
    texts, source_texts = normal(2 * count, TEXT, 4096), normal(1, TEXT, 4096)
    if context:
        control = normal(1, *shape, 96)
        many = jnp.repeat(control, count, axis=0)
        texts = VACEContext(texts, many, jnp.ones(count))
        source_texts = VACEContext(source_texts, control, jnp.ones(1))
    source, noise = normal(1, *shape, 16), normal(1, *shape, 16) + 1
    edits = Edits(source, noise, foreground, texts, source_texts, grid)
    settings = lock.preset(preset, 5.0)
    args = edits, solvers.unipc(steps, 5.0), lock.knobs(settings, 5.0)
    program = Program.of(settings, bucket(int(own.sum()), grid), branches=branches)

    def run() -> None:
        start = jnp.array(edits.spread(edits.noise), copy=True)
        jax.block_until_ready(sample(model, start, *args, program=program))

    return run


# --- a process of its own -----------------------------------------------------------------------


def first_step(warm: bool) -> Run:
    """`kvlock edit` of the demo clip, from its start to its first step."""
    folder = tempfile.mkdtemp(prefix="kvlock-bench-")
    numbers = itertools.count()

    def run(until: str = "step 1 ") -> None:
        programs = f"{folder}/{0 if warm else next(numbers)}"
        argv = [sys.executable, "-m", "kvlock_jax.cli.main", "edit", "--prompt", "a blue square"]
        argv += ["--src_video", str(DEMO / "clip.mp4"), "--src_mask", str(DEMO / "mask.mp4")]
        argv += ["--save_file", f"{folder}/out.mp4", "--jax_cache_dir", programs]
        argv += ["--sample_steps", "10"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(argv, **quiet) as process:
            with contextlib.suppress(StopIteration):
                next(line for line in process.stderr if line.startswith(until))
            process.kill()

    if warm:
        run(until="no such line")  # to its end
    return run


ROWS = [
    Row(
        f"a block of 1.3B, {tokens:,} tokens, batch 2 / Diffusers",
        None,
        functools.partial(passes, tokens, 1),
        functools.partial(peers_passes, tokens, 1),
        memory=1.1 if tokens == 8000 else None,
    )
    for tokens in (1950, 8000)
]
ROWS += [
    Row(
        f"VAE's decoder, {widths}, {'x'.join(map(str, size))} / Diffusers",
        0.35,
        functools.partial(decode, *size, demo),
        functools.partial(peers_decode, *size, demo),
        memory=None if demo or size[0] == 9 else 1.1,
    )
    for widths, demo in (("the demo model's", True), ("published widths", False))
    for size in ((9, 96, 96), (17, 240, 416))
]
ROWS += [
    Row("demo, text to video, whole pipeline, warm / Diffusers", 0.5, pipeline, peers_pipeline),
    *(
        Row(
            f"rate of a pass, 1.3B's width, 1,950 tokens / of bare products by {library}",
            bar,
            functools.partial(passes, 1950, 2),
            functools.partial(products, library),
            least=True,
        )
        for library, bar in (("PyTorch", 0.8), ("XLA", None))
    ),
    Row(
        "kvlock / cfg, VACE, 195 tokens",
        1.25,
        functools.partial(loop, "kvlock", True),
        functools.partial(loop, "cfg", True),
    ),
    *(
        Row(
            f"hard_lock, a fifth edited, {tokens:,} tokens / cfg",
            0.75,
            functools.partial(loop, "hard_lock", False, tokens=tokens),
            functools.partial(loop, "cfg", False, tokens=tokens),
        )
        for tokens in (1950, 195)
    ),
    Row(
        "fast, a fifth edited, 1,950 tokens, VACE, 10 steps / cfg",
        0.37,
        functools.partial(loop, "fast", True, tokens=1950, steps=10),
        functools.partial(loop, "cfg", True, tokens=1950, steps=10),
    ),
    Row(
        "guidance 1, 1,950 tokens, 10 steps / cfg",
        0.55,
        functools.partial(loop, "cfg", False, tokens=1950, steps=10, branches=1),
        functools.partial(loop, "cfg", False, tokens=1950, steps=10),
    ),
    Row(
        "hard_lock, a fifth edited, 195 tokens, 4 prompts of one source, each / cfg",
        0.40,
        functools.partial(loop, "hard_lock", False, 4),
        functools.partial(loop, "cfg", False),
        scale=1 / 4,
    ),
    Row(
        "to the first step, second process / first process",
        0.3,
        functools.partial(first_step, True),
        functools.partial(first_step, False),
    ),
]
