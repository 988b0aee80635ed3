"""What a command runs on: hosts that work together, the mesh of their devices, how weights lie."""

import argparse
import dataclasses
from typing import Any

import jax
import platformdirs
from etils import epath
from jax.sharding import Mesh

from kvlock_jax import sharding
from kvlock_jax.checkpoint import Contents
from kvlock_jax.errors import ConfigError
from kvlock_jax.models.sharded_attention import Attend, gathered, ring
from kvlock_jax.programs import Kept, Programs

ATTENTION = {"gathered": gathered, "ring": ring}


@dataclasses.dataclass(frozen=True)
class Placement:
    """How a model lies on devices; what `edit.load` takes.

    Attributes:
      mesh: of the devices; `None` is the first alone.
      spread: whether the transformer's weights are spread over the mesh's `frames`.
      attend: how tokens on several devices attend to each other.
      vae_tiles: of columns that the VAE makes a frame in.
    """

    mesh: Mesh | None
    spread: bool
    attend: Attend
    vae_tiles: int = 1

    def __str__(self) -> str:
        if self.mesh is None:
            return str(jax.devices()[0].device_kind)
        sizes = ", ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())
        hosts = f" of {jax.process_count()} hosts" if jax.process_count() > 1 else ""
        weights = ", weights spread" if self.spread else ""
        return f"{self.mesh.size} devices{hosts}: {sizes}{weights}"


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of devices and hosts to a command's parser."""
    group = parser.add_argument_group("devices and hosts")
    add = group.add_argument
    mesh = "devices by axis; all on frames for one edit, on data for many, by default"
    add("--mesh", metavar="data=1,frames=8,model=1", help=mesh)
    about = "between devices: keys and values gathered by each, or passed round a ring"
    add("--attention", choices=ATTENTION, default="gathered", help=about)
    about = "spread the weights over frames and gather them layer by layer; by default where large"
    add("--spread_weights", action=argparse.BooleanOptionalAction, help=about)
    about = "tiles of columns that the VAE makes a frame in, for the memory of one: %(default)s"
    add("--vae_tiles", type=int, default=1, help=about)
    add("--distributed", action="store_true", help="several hosts, which Cloud TPU knows by itself")
    add("--coordinator", metavar="HOST:PORT", help="of the first host, where nothing else knows it")
    add("--num_processes", type=int, help="how many hosts there are, with --coordinator")
    add("--process_id", type=int, help="which of them this is, from 0")
    about = "where compiled programs are kept for the next run ('' for nowhere): %(default)s"
    add("--jax_cache_dir", metavar="DIR", default=cache_folder(), help=about)


def cache_folder() -> str:
    """Where JAX keeps compiled programs: where its own setting says, or the user's cache folder."""
    own = platformdirs.user_cache_path("kvlock_jax") / "programs"
    return jax.config.jax_compilation_cache_dir or str(own)


def join(args: argparse.Namespace) -> None:
    """Meets the other hosts, if there are any; before anything else happens in JAX.

    Programs that are compiled from here on are kept, by their content, for the next run.

    Raises:
      ConfigError: flags are missing, or the others cannot be reached.
    """
    jax.config.update("jax_compilation_cache_dir", args.jax_cache_dir or None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    named = {
        "coordinator": args.coordinator,
        "num_processes": args.num_processes,
        "process_id": args.process_id,
    }
    absent = [f"--{name}" for name, value in named.items() if value is None]
    if len(absent) == len(named) and not args.distributed:
        return
    if absent and len(absent) < len(named):
        raise ConfigError(f"{', '.join(absent)} must be given too: --coordinator takes all three")
    if not absent and not 0 <= args.process_id < args.num_processes:
        raise ConfigError(
            f"--process_id must be from 0 to {args.num_processes - 1}, found {args.process_id}"
        )
    try:
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"the hosts cannot meet: {reason}") from error


def place(args: argparse.Namespace, contents: Contents, *, many: bool) -> Placement:
    """How a checkpoint's transformer is laid out.

    Args:
      args: of a parser of `add`.
      contents: of the checkpoint.
      many: whether the devices are for many edits, or for one.

    Raises:
      ConfigError: the mesh cannot be, or does not divide the heads; or there would be no tile.
    """
    if args.vae_tiles < 1:
        raise ConfigError(f"--vae_tiles must be 1 or more, found {args.vae_tiles}")
    config, spread = contents.configs.transformer, args.spread_weights
    if spread is None:
        stats: Any = jax.local_devices()[0].memory_stats() or {}
        memory = stats.get("bytes_limit", float("inf"))
        spread = sharding.worth_spreading(contents.models["transformer"].size, memory)
    if args.mesh:
        mesh = sharding.parse_mesh(args.mesh)
    else:  # weights are spread over `frames`, so those that must be decide for it
        mesh = sharding.make_mesh(
            **{"data" if many and not spread else "frames": jax.device_count()}
        )
    ways = mesh.shape["model"]
    heads, wide = config.num_attention_heads, config.ffn_dim
    if heads % ways or wide % ways:
        known = [n for n in range(1, heads + 1) if heads % n == 0 and wide % n == 0]
        raise ConfigError(
            f"--mesh model={ways} does not divide the model's {heads} heads: "
            f"use one of {', '.join(map(str, known))}"
        )
    if mesh.size == 1:
        return Placement(None, False, gathered, args.vae_tiles)
    spread = spread and mesh.shape["frames"] > 1
    return Placement(mesh, spread, ATTENTION[args.attention], args.vae_tiles)


def programs(args: argparse.Namespace, placed: Placement) -> Programs:
    """How programs are compiled: where one device runs them, as a run before has traced them."""
    if placed.mesh or not args.jax_cache_dir or not jax.config.jax_enable_compilation_cache:
        return Programs()
    return Kept(epath.Path(args.jax_cache_dir) / "traced")
