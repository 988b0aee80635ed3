"""Divides the edits of a manifest over machines, and into groups that run together."""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from kvlock_jax.batch.manifest import Manifest, Request
from kvlock_jax.pipeline.settings import Settings

_T = TypeVar("_T")


def shard(manifest: Manifest, index: int, count: int) -> Manifest:
    """The part of one of several machines; all edits of one source are in one part.

    Each source in turn goes to the part with the fewest edits so far, so the parts depend on the
    manifest alone. Lines that are no edits are divided by their number.
    """
    edits = collections.Counter(request.source for request in manifest.requests)
    loads, owner = [0] * count, {}
    for source, number in edits.items():
        owner[source] = loads.index(min(loads))
        loads[owner[source]] += number
    return Manifest(
        [request for request in manifest.requests if owner[request.source] == index],
        [failure for failure in manifest.failures if (failure.line - 1) % count == index],
    )


def group(
    requests: Sequence[Request], shape: Callable[[Request], Hashable], batch_size: int
) -> list[list[Request]]:
    """Groups of up to `batch_size` edits that may run as one batch.

    They have one shape, the same number of references, and all settings in common but for texts,
    masks and seeds. Edits of one source are neighbours, and among them those of one noise. Groups
    do not depend on which edits are finished, so a run that resumes has the same batches.

    Args:
      requests: in the manifest's order.
      shape: returns the shape of the video that the model works on.
      batch_size: 1 or more.
    """
    alike = _grouped(requests, lambda r: (shape(r), len(r.references), shared_settings(r.settings)))
    groups = []
    for members in alike:
        sources = _grouped(members, lambda r: r.footage)
        drawn = [one for source in sources for one in _grouped(source, _noise)]
        ordered = list(itertools.chain(*drawn))
        groups += [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    return groups


def shared_settings(settings: Settings) -> Settings:
    """The settings, with defaults for those that may differ within a batch."""
    edit = dataclasses.replace(
        settings.edit,
        negative_prompt="",
        source_prompt="",
        invert_mask=False,
        dilate=0,
        composite=False,
        size="",
        fit="crop",
        frame_num=0,
        fps=0.0,
        no_audio=False,
    )
    sample = dataclasses.replace(settings.sample, seed=0)
    return dataclasses.replace(settings, preset="", sample=sample, edit=edit)


def _noise(request: Request) -> Hashable:
    return request.settings.sample.seed, request.noise_id


def _grouped(items: Iterable[_T], key: Callable[[_T], Hashable]) -> list[list[_T]]:
    """Items of one key together, in the order of the first of each."""
    groups: dict[Hashable, list[_T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())
