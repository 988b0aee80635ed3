"""Chooses how devices share a model: mesh, spread weights, kind of attention, VAE tiles."""

import dataclasses
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from kvlock_jax.checkpoints.format import Contents
from kvlock_jax.checkpoints.registry import FAMILIES
from kvlock_jax.errors import ConfigError
from kvlock_jax.grid import Grid
from kvlock_jax.lock import KVCache, X0Window
from kvlock_jax.models.attention.sharded import Attend, gathered, overlapped, ring
from kvlock_jax.parallel import sharding
from kvlock_jax.parallel.mesh import make_mesh, parse_mesh
from kvlock_jax.runtime import trees
from kvlock_jax.runtime.compile_cache import CachingCompiler, Compiler, cache_folder
from kvlock_jax.sampling.edits import Edits
from kvlock_jax.sampling.loop import SampleState, Trace
from kvlock_jax.sampling.passes import StepInputs, Texts
from kvlock_jax.sampling.solvers import SolverState, SolverTable

ATTENTION = {"auto": overlapped, "gathered": gathered, "ring": ring}

RESULTS = (
    *(KVCache, X0Window, SolverState, SolverTable),
    *(Edits, Texts, StepInputs, SampleState, Trace),
)
"""The classes in the results of an edit's programs, which a cached program has to name; a family
adds its own (`Family.results`)."""

STATICS = (Grid, *ATTENTION.values())
"""The classes and functions among the static fields of `RESULTS`."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """The arguments of `load` that say how devices share a model.

    Attributes:
      mesh: mesh of the devices; `None` is the first device alone.
      spread: whether the mesh's `frames` axis shares the transformer's weights.
      attend: self-attention between tokens on several devices.
      vae_tiles: number of column tiles of a frame that the VAE processes one by one.
      weights: kind of 8-bit values for the kernels of the transformers' blocks, if any.
      weights_on: memory of those kernels, `"device"` or `"host"`.
    """

    mesh: Mesh | None
    spread: bool
    attend: Attend
    vae_tiles: int = 1
    weights: str | None = None
    weights_on: str = "device"

    def __str__(self) -> str:
        kept = f", blocks in {self.weights}" if self.weights else ""
        kept += ", blocks in the host's memory" if self.weights_on == "host" else ""
        if self.mesh is None:
            return f"{jax.devices()[0].device_kind}{kept}"
        sizes = ", ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())
        hosts = f" of {jax.process_count()} hosts" if jax.process_count() > 1 else ""
        weights = ", weights spread" if self.spread else ""
        return f"{self.mesh.size} devices{hosts}: {sizes}{weights}{kept}"


def choose_placement(
    contents: Contents,
    *,
    many: bool,
    mesh: str | None = None,
    spread: bool | None = None,
    attention: str = "auto",
    vae_tiles: int = 1,
    **weights: Any,
) -> Placement:
    """Chooses the placement of a checkpoint's transformer and VAE.

    Args:
      contents: description of the checkpoint.
      many: whether the devices share many edits, or one.
      mesh: sizes of the axes, such as `"frames=8"`; by default one axis has all devices.
      spread: whether to spread the transformer's weights; by default where they are large.
      attention: a key of `ATTENTION`.
      vae_tiles: column tiles of a frame in the VAE, 1 or more.
      weights: `weights` and `weights_on` of the placement.

    Raises:
      ConfigError: the mesh is impossible or does not divide the heads, or `vae_tiles` is under 1.
    """
    if vae_tiles < 1:
        raise ConfigError(f"--vae_tiles must be 1 or more, found {vae_tiles}")
    config = contents.configs.transformer
    if spread is None:
        stats: Any = jax.local_devices()[0].memory_stats() or {}
        memory = stats.get("bytes_limit", float("inf"))
        spread = sharding.worth_spreading(contents.models["transformer"].size, memory)
    if mesh:
        devices = parse_mesh(mesh)
    else:  # `frames` shares spread weights, so weights that must be spread decide
        devices = make_mesh(**{"data" if many and not spread else "frames": jax.device_count()})
    ways = devices.shape["model"]
    heads, wide = config.num_attention_heads, config.ffn_dim
    if heads % ways or wide % ways:
        fitting = [n for n in range(1, heads + 1) if heads % n == 0 and wide % n == 0]
        raise ConfigError(
            f"--mesh model={ways} does not divide the model's {heads} heads: "
            f"use one of {', '.join(map(str, fitting))}"
        )
    if devices.size == 1:
        return Placement(None, False, overlapped, vae_tiles, **weights)
    spread = spread and devices.shape["frames"] > 1
    return Placement(devices, spread, ATTENTION[attention], vae_tiles, **weights)


def compiler_for(placed: Placement, cache_dir: str | None) -> Compiler:
    """A compiler for programs of a placement, which caches traces where one device runs them.

    Args:
      placed: of the model. What is kept of a trace knows nothing of the host's memory.
      cache_dir: folder of compiled programs; `None` is the user's own cache folder, whatever JAX's
        settings name, and an empty name is no cache.
    """
    on_host = placed.weights_on == "host"
    if placed.mesh or on_host or cache_dir == "" or not jax.config.jax_enable_compilation_cache:
        return Compiler()
    of_families = dict.fromkeys(kind for family in FAMILIES for kind in family.results)
    trees.register((*RESULTS, *of_families), STATICS)
    return CachingCompiler(epath.Path(cache_dir or cache_folder()) / "traced")
