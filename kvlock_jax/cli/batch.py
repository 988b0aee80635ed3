"""`kvlock batch`: many edits from one manifest."""

import argparse
from collections.abc import Sequence
from typing import Any

from kvlock_jax.batch import manifest, resume
from kvlock_jax.batch.fingerprint import checkpoint_identity
from kvlock_jax.batch.manifest import Common, Failure, Request
from kvlock_jax.batch.resume import Job, find_work
from kvlock_jax.batch.runner import follow, run, run_group
from kvlock_jax.cli.flags import (
    EDIT_INPUTS,
    add_shared,
    checkpoint,
    gather_files,
    gather_loras,
    gather_settings,
)
from kvlock_jax.cli.fleet import add_cluster, cluster_of
from kvlock_jax.cli.loading import dtype_name, join, load_model, place
from kvlock_jax.cli.terminal import SOME_FAILED, counting, interruptibly, say, warnings_as_lines
from kvlock_jax.media import storage
from kvlock_jax.parallel import agreement
from kvlock_jax.pipeline.api import Result
from kvlock_jax.pipeline.load import Model, describe
from kvlock_jax.pipeline.settings import default_config_name, resolve_settings


def add(commands: Any) -> None:
    """Adds the command to the program's parser."""
    about = "Edit many videos: one JSON object to a line of a manifest, keys named as the flags."
    tail = (
        "Flags of an edit are the defaults of every line; paths in lines are relative to the "
        "manifest. A line may have an id and a save_file of its own. Paths may be gs:// or of any "
        "scheme that fsspec knows. Run again, it does the edits that are missing or changed. "
        "Several runs may write to one folder, each to its own files. Exit status: 0, 1 if edits "
        "failed (DIR/failed.jsonl says which and why), 2 if the batch could not start or go on."
    )
    parser = commands.add_parser("batch", description=about, epilog=tail, allow_abbrev=False)
    parser.set_defaults(command=_command)
    add = parser.add_argument
    add("--manifest", required=True, metavar="EDITS.jsonl", help="the edits")
    add("--save_dir", required=True, metavar="DIR", help="folder of videos, and a JSON beside each")
    about = "edits that run together, at most; by default one for each device of the mesh's data"
    add("--batch_size", type=int, help=about)
    add("--num_shards", type=int, default=1, help="machines that share the manifest")
    add("--shard_index", type=int, default=0, help="which of them this is, from 0")
    add("--overwrite", action="store_true", help="do finished edits again")
    add_shared(parser)
    add_cluster(parser)


def _command(args: argparse.Namespace, others: list[str]) -> int:
    if args.ray is None:
        join(args)
    folder, files = checkpoint(args), gather_files(args)
    contents = describe(folder, files)
    cluster = cluster_of(args, contents)
    if cluster is not None:
        dtype, size = cluster.facts(args.dtype, args.batch_size)
    else:
        placed, dtype = place(args, contents, many=True), dtype_name(args)
        size = args.batch_size
        if size is None:
            size = placed.mesh.shape["data"] if placed.mesh else 1
    settings = gather_settings(args, others, default_config_name(folder, contents.configs))
    resolve_settings(settings)  # an error in the flags is one of every line
    names = [*(names.split()[0] for names in EDIT_INPUTS), "lossless"]
    defaults = {name: value for name in names if (value := getattr(args, name))}
    job = Job(
        manifest=storage.resolve(args.manifest),
        save_dir=storage.resolve(args.save_dir),
        common=Common(settings, manifest.resolved(defaults, ".")),
        checkpoint=checkpoint_identity(folder, files, gather_loras(args))
        | {"dtype": dtype}
        | ({"weights": args.weights} if args.weights else {}),
        batch_size=size,
        shard=(args.shard_index, args.num_shards),
        overwrite=args.overwrite,
        unit=contents.configs.unit,
    )
    work = resume.agree_on_work(find_work(job))
    total, groups = len(work.missing), len(work.pending)
    edits = total + len(work.finished) + len(work.failures)
    say("edits", f"{edits}, of which {len(work.failures)} cannot run as they stand")
    say("skipped", f"{len(work.finished)} finished before, unchanged")
    say("to do", f"{total} in {groups} groups of up to {size}")

    def loaded() -> Model:
        """Loads the model when the first group needs it."""
        return load_model(args, contents, placed)

    def runner(*group: Any) -> Sequence[Result | Exception]:
        """Runs a group so that Ctrl-C is heeded."""
        return interruptibly(lambda: run_group(*group))

    with warnings_as_lines(), counting(total) as count:

        def on_end(request: Request, failure: Failure | None) -> None:
            """Prints the outcome of an edit."""
            count(f"{request.id} failed: {failure.reason}" if failure else f"{request.id} done")

        if cluster is not None:
            summary = cluster.run(work, count)
        elif agreement.is_writer():
            summary = run(work, loaded, runner, on_end)
        else:
            summary = follow(work, loaded, runner)
    where = f": {summary.failures}" if summary.failures else ""
    done = f"{summary.done} done, {summary.skipped} skipped, {summary.failed} failed{where}"
    say("batch", done)
    return SOME_FAILED if summary.failed else 0
