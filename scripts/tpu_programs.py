"""The real programs for TPUs, lowered and compiled without one, and the compiler's figures.

They are lowered from abstract weights of the published sizes and compiled by libtpu's own compiler
for a topology; its memory analysis is what a chip would hold.
"""

import collections
import dataclasses
import math
import os
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvlock_jax import lock
from kvlock_jax.checkpoints import registry
from kvlock_jax.estimate import costs, roofline
from kvlock_jax.grid import Grid
from kvlock_jax.models.attention.sharded import gathered, overlapped
from kvlock_jax.models.text.config import UMT5Config
from kvlock_jax.models.text.prompts import encode_ids
from kvlock_jax.models.vae import autoencoder
from kvlock_jax.models.vae.config import VAEConfig
from kvlock_jax.models.wan.config import WanConfig
from kvlock_jax.models.wan.vace import VACEContext
from kvlock_jax.parallel import padding, sharding
from kvlock_jax.parallel.mesh import make_mesh
from kvlock_jax.sampling import solvers
from kvlock_jax.sampling.edits import Edits, bucket
from kvlock_jax.sampling.loop import Program, sample
from kvlock_jax.sampling.windows import Windows
from kvlock_jax.settings.schema import LockConfig

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")


T2V = {
    "1.3B": WanConfig(12, 128, 30, 8960),
    "14B": WanConfig(40, 128, 40, 13824),
}
VACE_LAYERS = {"1.3B": tuple(range(0, 30, 2)), "14B": tuple(range(0, 40, 5))}
MODELS = {f"T2V {name}": config for name, config in T2V.items()} | {
    f"VACE {name}": dataclasses.replace(config, vace_layers=VACE_LAYERS[name])
    for name, config in T2V.items()
}
MODELS["TI2V 5B"] = WanConfig(24, 128, 30, 14336, 48, 48)
STRIDES = {"TI2V 5B": (4, 16, 16)}
"""Of VAEs other than Wan 2.1's."""
TEXT_ENCODER = UMT5Config(256_384, 4096, 64, 10_240, 24, 64)
VAE = VAEConfig()
TOPOLOGIES = {"v5e-8": "v5e:2x4", "v6e-8": "v6e:2x4", "v5p-8": "v5p:2x2x1"}
"""v5p counts cores, two to a chip: v5p-8 is four chips, each one device."""
STEPS = 50


@dataclasses.dataclass(frozen=True)
class Row:
    """One compilation.

    Attributes:
      model: a key of `MODELS`.
      height: in pixels.
      width: in pixels.
      frames: of the video, 4n + 1.
      slice: a key of `TOPOLOGIES`.
      batch: edits.
      mesh: sizes of `data`, `frames`, `model`; all chips on `frames` where it is empty.
      gathered: whether each chip gathers all keys and values, which otherwise go round a ring.
      cache: of the lock, `"fused"` or `"carried"`.
      preset: the model's own where it is empty.
    """

    model: str
    height: int
    width: int
    frames: int
    slice: str
    batch: int = 1
    mesh: tuple[int, ...] = ()
    gathered: bool = False
    cache: str = "fused"
    preset: str = ""

    @property
    def name(self) -> str:
        """The name of its file."""
        parts = [*dataclasses.astuple(self)[:-2], self.preset]
        parts += [self.cache] if self.cache == "carried" else []
        return re.sub(r"[^a-z0-9.]+", "_", "_".join(map(str, parts)).lower()).strip("_")

    @property
    def workload(self) -> costs.Workload:
        """The workload of the roofline."""
        size = (self.frames, self.height, self.width)
        strides = STRIDES.get(self.model, VAE.strides)
        return costs.Workload(MODELS[self.model], *size, batch=self.batch, strides=strides)


def spreads(row: Row) -> bool:
    """Whether `kvlock` spreads the weights by default."""
    size = row.workload.weight_bytes * costs.parameters(MODELS[row.model]).total
    return sharding.worth_spreading(size, chip_of(row).memory)


def settings_of(row: Row) -> LockConfig:
    """The settings of the lock: those of the row's preset, or of the model's default."""
    default = "kvlock" if MODELS[row.model].vace_layers else "kvlock_anchor"
    settings = lock.preset(row.preset or default, 5.0)
    return dataclasses.replace(settings, cache=row.cache)


def chip_of(row: Row) -> roofline.Chip:
    """The published peaks of a row's chips."""
    return roofline.CHIPS[row.slice.split("-")[0]]


def mesh_of(row: Row) -> Mesh:
    """The mesh of a row, over devices that only the compiler knows."""
    os.environ["TPU_ACCELERATOR_TYPE"] = row.slice.replace("v5e", "v5litepod")
    devices = topologies.get_topology_desc(TOPOLOGIES[row.slice], platform="tpu").devices
    return make_mesh(*(row.mesh or (1, len(devices), 1)), devices=devices)


def abstract(mesh: Mesh, config, dtype, spread: bool) -> nnx.Module:
    """An abstract model whose parameters lie on a mesh, matrices in `dtype` as converted ones."""
    graph, state = nnx.split(registry.abstract(config, dtype))
    rules, flat = registry.network(config).parameters, []
    for path, leaf in nnx.to_flat_state(state):
        shape = leaf.get_value().shape
        place = rules.sharding(mesh, ".".join(map(str, path)), shape, spread=spread)
        kept = jnp.float32 if len(shape) < 2 or path[-1] == "scale_shift_table" else dtype
        flat.append((path, leaf.replace(jax.ShapeDtypeStruct(shape, kept, sharding=place))))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def array(mesh: Mesh, shape, letters: str, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    """An abstract array laid out as its letters say."""
    place = NamedSharding(mesh, sharding.spec(letters))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def loop(
    mesh: Mesh,
    row: Row,
    spread: bool,
    kind: str = "",
    share: float = 0.0,
    model: nnx.Module | None = None,
    window: tuple[int, int] | None = None,
):
    """The lowered sampling loop, of bfloat16 weights or of an abstract `model`.

    Every step of `kind`, if it is given, is that kind of pass; `"foreground"` computes a `share` of
    the tokens. A `window` has latent frames of its own and of an overlap.
    """
    config, latent = MODELS[row.model], row.workload.latent_shape
    model = model or abstract(mesh, config, jnp.bfloat16, spread)
    model.attend = gathered if row.gathered else overlapped
    grid = Grid(latent, padding.padded(Grid.of(latent).tokens, sharding.shards("L")))
    batch = row.batch

    def patches(channels: int):
        return array(mesh, (batch, grid.length, 4, channels), "B L cells C")

    def texts(rows: int):
        text = array(mesh, (rows, costs.TEXT_TOKENS, config.text_dim), "B S text")
        if not config.vace_layers:
            return text
        return VACEContext(text, patches(config.vace_in_channels), array(mesh, (batch,), "B"))

    foreground = array(mesh, (batch, grid.length, 4), "B L cells", jnp.bool_)
    z = patches(config.in_channels)
    edits = Edits(z, z, foreground, texts(2 * batch), texts(batch), grid)
    settings = settings_of(row)
    knobs = jax.eval_shape(lambda: lock.knobs(settings, 5.0))
    everywhere = NamedSharding(mesh, PartitionSpec())
    table, knobs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=everywhere),
        (solvers.unipc(STEPS, 5.0), knobs),
    )
    program = Program.of(settings, windows=window and Windows.of(grid, 0, *window))
    if kind:
        tokens = bucket(round(share * grid.tokens), grid) if kind == "foreground" else None
        program = dataclasses.replace(program, passes=(kind,), tokens=tokens)
    return sample.lower(model, z, edits, table, knobs, program=program)


def state_bytes(mesh: Mesh, row: Row) -> int:
    """Bytes on a chip of what grows with the clip from step to step, in float32.

    Latents, the solver's history, and the clean estimates of the statistic.
    """
    latent, channels = row.workload.latent_shape, MODELS[row.model].in_channels
    length = padding.padded(Grid.of(latent).tokens, sharding.shards("L"))
    shape = (row.batch, length, 4, channels)
    cells = math.prod(array(mesh, shape, "B L cells C").sharding.shard_shape(shape))
    solver = jax.eval_shape(solvers.init, jax.ShapeDtypeStruct(shape, jnp.float32))
    history = sum(leaf.size for leaf in jax.tree.leaves(solver)) // math.prod(shape)
    return 4 * cells * (1 + history + settings_of(row).window)


def text_encoder(mesh: Mesh, row: Row):
    """The lowered text encoder, over three texts for each edit."""
    model = abstract(mesh, TEXT_ENCODER, jnp.bfloat16, True)
    shape = (3 * row.batch, costs.TEXT_TOKENS)
    tokens = (array(mesh, shape, "R S", kind) for kind in (jnp.int32, jnp.bool_))
    return encode_ids.lower(model, *tokens)


def networks(mesh: Mesh):
    """The abstract VAE."""
    return abstract(mesh, VAE, jnp.float32, False)


def encoder(mesh: Mesh, row: Row):
    """The lowered encoder of the VAE, of a clip of uint8 levels."""
    w = row.workload
    video = array(mesh, (row.batch, w.frames, w.height, w.width, 3), "b T H W C", jnp.uint8)
    return autoencoder.encode.lower(networks(mesh), video)


def decoder(mesh: Mesh, row: Row):
    """The lowered decoder of the VAE."""
    latents = array(mesh, (row.batch, *row.workload.latent_shape, VAE.z_dim), "b T H W C")
    return autoencoder.decode.lower(networks(mesh), latents)


def collectives(text: str) -> dict[str, list[int]]:
    """The number of collectives of each kind and the bytes of their results; loops count once."""
    found = collections.defaultdict(lambda: [0, 0])
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    sizes = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "u8": 1, "s8": 1, "f16": 2}
    for line in text.splitlines():
        if match := re.search(rf" = (.*?) ({kinds})(-start)?\(", line):
            shapes = re.findall(r"([a-z0-9]+)\[([0-9,]*)\]", match[1])
            if match[3] and len(shapes) > 1:  # operands, results, and at times a semaphore
                shapes = [s for s in shapes if s != ("u32", "")]
                shapes = shapes[len(shapes) // 2 :]
            found[match[2]][0] += 1
            found[match[2]][1] += sum(
                sizes.get(kind, 0) * math.prod(int(n) for n in shape.split(",") if n)
                for kind, shape in shapes
            )
    return dict(found)


def measure(lowered) -> dict:
    """Compiles a lowered program; returns its bytes on a chip, or the compiler's refusal."""
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
        seconds = time.perf_counter() - start
    except jax.errors.JaxRuntimeError as error:
        lacking = re.search(r"required for HLO temporaries \(([0-9.]+)G\)", str(error))
        if lacking is None:
            raise
        size = float(lacking[1]) * 2**30
        facts = {"arguments": 0, "outputs": 0, "temporaries": size, "collectives": {}}
        return {"seconds": time.perf_counter() - start, "refused": True, **facts}
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:  # the compiler's version is newer than the reader's
        text = None
    memory = compiled.memory_analysis()
    return {
        "seconds": seconds,
        "refused": False,
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "collectives": text and collectives(text),
    }


def held(mesh: Mesh, spread: bool, config: WanConfig) -> dict[str, int]:
    """The bytes of each network's weights on a chip."""
    networks = {
        "transformer": (config, jnp.bfloat16),
        "text_encoder": (TEXT_ENCODER, jnp.bfloat16),
        "vae": (VAE, jnp.float32),
    }
    found = {}
    for name, (sizes, dtype) in networks.items():
        model = abstract(mesh, sizes, dtype, spread)
        leaves = jax.tree.leaves(nnx.state(model))
        found[name] = sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves
        )
    return found


PROGRAMS = {
    "loop": lambda mesh, row: loop(mesh, row, spreads(row)),
    "text": text_encoder,
    "encode": encoder,
    "decode": decoder,
}
