"""Measures `kvlock batch --ray` beside `kvlock batch`: 40 edits of the demo model on this machine.

    python scripts/bench_fleet.py --rounds 3

Prints medians of wall times, of one replica beside the command without Ray, and of two replicas of
one thread each beside one; and the pace once each replica has done an edit, which leaves out what
starting and compiling take. Checks that all made the same videos. The node is a process of its own,
and runs before the clock starts, as a cluster does. The limit of two replicas is what two commands
without Ray reach side by side, which share the memory of one machine.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import ray
from ray.cluster_utils import Cluster

from kvlock_jax.demo.world import caption, random_scene, render
from kvlock_jax.media import decode, encode

CLIPS, EDITS = 10, 40
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
STORE = 200_000_000


def write_manifest(folder: pathlib.Path, steps: int) -> None:
    """Clips of the demo's world, four edits of each."""
    rows = []
    for n in range(CLIPS):
        clip = render(random_scene(700_000_000 + n, held_out=True))
        encode.write_video(folder / f"{n}.mkv", clip.video, 8, lossless=True)
        np.save(folder / f"{n}.npy", clip.mask.astype(np.uint8) * 255)
    for n in range(EDITS):
        prompt = caption(("circle", "square")[n % 2], ("red", "blue", "green", "yellow")[n % 4])
        clip = n * CLIPS // EDITS
        row = {"id": f"{n}", "src_video": f"{clip}.mkv", "src_mask": f"{clip}.npy"}
        rows.append({**row, "prompt": prompt, "sample_steps": steps, "dilate": 6})
    lines = (json.dumps({**row, "save_file": f"{row['id']}.mkv", "lossless": True}) for row in rows)
    (folder / "edits.jsonl").write_text("\n".join(lines))


def batch(
    folder: pathlib.Path, flags: str, threads: str = "", replicas: int = 1
) -> tuple[float, float]:
    """Seconds of one run of the command, and edits an hour once each replica has done one."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        start = time.monotonic()
        given = f"batch --manifest {folder}/edits.jsonl --save_dir {out} {flags}".split()
        command = [sys.executable, "-m", "kvlock_jax.cli.main", *given]
        environment = {**os.environ, "XLA_FLAGS": threads, "PYTHONUNBUFFERED": "1"}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=environment, **pipes) as run:
            done = [time.monotonic() for line in run.stderr if f" of {EDITS}: " in line]
        took = time.monotonic() - start
        if run.returncode or len(done) != EDITS:
            raise RuntimeError(f"the command ended with {run.returncode}, {len(done)} edits")
        compare(folder, pathlib.Path(out), threads)
    return took, (EDITS - replicas) * 3600 / (done[-1] - done[replicas - 1])


def compare(folder: pathlib.Path, out: pathlib.Path, threads: str) -> None:
    """Checks that a run made what the first run made."""
    made = [decode.read_video(out / f"{n}.mkv").frames for n in range(EDITS)]
    first = folder / f"first-{len(threads)}.npy"
    if not first.exists():
        np.save(first, made)
    different = int((np.load(first) != np.array(made)).any(axis=(1, 2, 3, 4)).sum())
    if different:
        print(f"{different} of {EDITS} videos differ from those of the first run")


def limit(folder: pathlib.Path) -> float:
    """How much faster two commands of one thread each go together than one alone."""
    alone = pace(folder, [""])
    together = pace(folder, [f"--num_shards 2 --shard_index {n}" for n in range(2)])
    return together / alone


def pace(folder: pathlib.Path, parts: list[str]) -> float:
    """Edits an hour of some commands of one thread, side by side, once each has done one."""
    with tempfile.TemporaryDirectory(dir=folder) as out, ThreadPoolExecutor(2) as pool:

        def done(flags: str) -> list[float]:
            """When each edit of a command was done."""
            given = f"batch --manifest {folder}/edits.jsonl --save_dir {out} {flags}".split()
            command = [sys.executable, "-m", "kvlock_jax.cli.main", *given]
            pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
            environment = {**os.environ, "XLA_FLAGS": ONE_THREAD}
            with subprocess.Popen(command, env=environment, **pipes) as run:
                return [time.monotonic() for line in run.stderr if line.endswith(" done\n")]

        times = sorted(itertools.chain(*pool.map(done, parts)))
    return (EDITS - len(parts)) * 3600 / (times[-1] - times[len(parts) - 1])


@contextlib.contextmanager
def nodes(replicas: int, threads: str):
    """A cluster of one node with room for some replicas."""
    kept = os.environ.get("XLA_FLAGS", "")
    os.environ |= {"XLA_FLAGS": threads, "RAY_AUTH_MODE": "disabled"}
    head = {"num_cpus": 1, "resources": {"room": replicas}, "object_store_memory": STORE}
    cluster = Cluster(True, head_node_args=head)
    try:
        yield cluster.address
    finally:
        os.environ["XLA_FLAGS"] = kept
        cluster.shutdown()


def on_ray(folder: pathlib.Path, replicas: int, threads: str = "") -> tuple[float, float]:
    """`batch` on a cluster."""
    with nodes(replicas, threads) as address:
        room = """--ray_resources {"room":1}"""
        flags = f"--ray {address} --replicas {replicas} {room} --dtype float32 --batch_size 1"
        return batch(folder, flags, threads, replicas)


def main() -> None:
    """Runs each in turn, and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--only", choices=("overhead", "replicas", "limit"))
    args = parser.parse_args()
    print(f"Ray {ray.__version__}, {os.cpu_count()} CPUs, {EDITS} edits of {args.steps} steps")
    with tempfile.TemporaryDirectory() as made:
        folder = pathlib.Path(made)
        write_manifest(folder, args.steps)
        if args.only in (None, "limit"):
            found = statistics.median(limit(folder) for _ in range(args.rounds))
            print(f"limit: two commands / one, without Ray: {found:.2f} of the pace")
        if args.only == "limit":
            return
        ways = {}
        if args.only != "replicas":
            ways["kvlock batch"] = functools.partial(batch, folder, "")
            ways["--ray, one replica"] = functools.partial(on_ray, folder, 1)
        if args.only != "overhead":
            ways["--ray, one replica of one thread"] = functools.partial(
                on_ray, folder, 1, ONE_THREAD
            )
            ways["--ray, two of one thread"] = functools.partial(on_ray, folder, 2, ONE_THREAD)
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, way in ways.items():
                taken[name].append(way())
                print(f"{name}: {taken[name][-1][0]:.1f} s", flush=True)
        medians = []
        for name, runs in taken.items():
            medians.append([statistics.median(column) for column in zip(*runs, strict=True)])
            print(f"{name}: {medians[-1][0]:.1f} s, then {medians[-1][1]:.0f} edits an hour")
        if args.only != "replicas":
            (plain, pace), (ray_, other) = medians[:2]
            print(
                f"one replica / kvlock batch: {ray_ / plain:.2f} of the time, "
                f"{other / pace:.2f} of the pace"
            )
        if args.only != "overhead":
            (one, pace), (two, other) = medians[-2:]
            print(
                f"two replicas / one: {one / two:.2f} of the speed of all, "
                f"{other / pace:.2f} of the pace"
            )


if __name__ == "__main__":
    main()
