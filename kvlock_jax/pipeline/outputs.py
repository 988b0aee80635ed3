"""Writes the files of one edit: the video, its trace and plot, and a comparison with the source."""

import dataclasses
import os
import posixpath
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvlock_jax.errors import Error, InputError
from kvlock_jax.evaluate.metrics import EditMetrics
from kvlock_jax.media import encode, storage
from kvlock_jax.media.storage import FilePath
from kvlock_jax.pipeline import report
from kvlock_jax.pipeline.api import Result

SUFFIXES: Mapping[str, Sequence[str]] = {
    "save_file": tuple(encode.CONTAINERS),
    "trace": (".json",),
    "plot": (".png",),
    "compare": tuple(encode.CONTAINERS),
}
"""Endings that the name of each of `Outputs` may have."""


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Files to write for an edit, local or remote; `None` for those that are not wanted.

    Attributes:
      save_file: the video.
      trace: what each step did, as JSON.
      plot: the same, as a picture.
      compare: a video of source, mask and edit side by side.
      lossless: whether `save_file` keeps every bit of the frames.
    """

    save_file: FilePath
    trace: FilePath | None = None
    plot: FilePath | None = None
    compare: FilePath | None = None
    lossless: bool = False

    @property
    def paths(self) -> dict[str, FilePath]:
        """Paths of the wanted files, by the names of `SUFFIXES`."""
        return {name: getattr(self, name) for name in SUFFIXES if getattr(self, name)}


@dataclasses.dataclass(frozen=True)
class Written:
    """Paths that were written, and an error for each that could not be."""

    paths: Sequence[str]
    errors: Sequence[Error]


def check_outputs(outputs: Outputs, inputs: Mapping[str, Sequence[str]]) -> None:
    """Checks the names of outputs; touches no file.

    Args:
      outputs: files to write.
      inputs: files that the edit reads, by the flag that names them.

    Raises:
      InputError: a name has another suffix, its folder is missing, or two files are the same.
    """
    taken = {_real(name): flag for flag, names in inputs.items() for name in names if name}
    for flag, path in outputs.paths.items():
        target = _real(encode.check_output(path, SUFFIXES[flag]).path)
        if target in taken:
            raise InputError(f"--{flag} and --{taken[target]} are the same file, {target}")
        taken[target] = flag


def probe_outputs(outputs: Outputs) -> None:
    """Finds out, by writing beside them, that outputs can be written, before the work starts.

    Raises:
      InputError: one cannot be.
    """
    for path in outputs.paths.values():
        storage.check_writable(storage.resolve(os.fspath(path)))


def write_outputs(outputs: Outputs, result: Result, about: Mapping[str, Any]) -> Written:
    """Writes the files of an edit, each whether or not another one fails.

    A video that cannot be written is kept in a temporary folder, which its error names.

    Args:
      outputs: files to write.
      result: of the edit.
      about: further values for the trace, such as the prompt.
    """
    save: dict[str, Callable[[FilePath], None]] = {
        "save_file": lambda path: _write_or_keep(path, result, outputs.lossless),
        "compare": lambda path: _write_comparison(path, result),
        "trace": lambda path: report.write_trace(path, result, about),
        "plot": lambda path: report.plot_trace(path, result.trace, result.settings),
    }
    failed: dict[str, Error] = {}
    for name, write in save.items():
        if name in outputs.paths:
            try:
                write(outputs.paths[name])
            except Error as error:
                failed[name] = error
    paths = [os.fspath(path) for name, path in outputs.paths.items() if name not in failed]
    return Written(paths, list(failed.values()))


def summarize_metrics(measured: EditMetrics) -> str:
    """How well an edit kept the background, in one line."""
    parts = ["no background to measure"]
    if measured.background_psnr == measured.background_psnr:  # NaN where there is no background
        parts = [
            f"background PSNR {measured.background_psnr:.2f} dB{_ceiling(measured)}",
            f"SSIM {measured.background_ssim:.4f}",
        ]
    if measured.ring_error == measured.ring_error:
        parts.append(f"ring around the mask: error {measured.ring_error:.1f} of 255")
    if measured.ring_flicker == measured.ring_flicker:
        parts.append(f"flicker {measured.ring_flicker:.1f}")
    return ", ".join(parts)


def _write_or_keep(path: FilePath, result: Result, lossless: bool) -> None:
    """Writes the video, or if that fails, writes it to a temporary folder and raises."""
    options = {"lossless": lossless, "footage": result.footage}
    try:
        encode.write_video(path, result.video, result.fps, **options)
    except Error as error:
        suffix = posixpath.splitext(os.fspath(path))[1]
        try:
            kept = os.path.join(tempfile.mkdtemp(prefix="kvlock-"), f"edit{suffix}")
            encode.write_video(kept, result.video, result.fps, **options)
        except (Error, OSError) as second:
            raise InputError(f"{error}; nor could it be kept: {second}") from error
        raise InputError(f"{error}; the video is kept as {kept}") from error


def _write_comparison(path: FilePath, result: Result) -> None:
    """Writes source, mask and edit side by side, silent."""
    together = report.compare(result.source, result.mask, result.video)
    footage = dataclasses.replace(result.footage, audio=None)
    encode.write_video(path, together, result.fps, footage=footage)


def _real(path: str) -> str:
    resolved = storage.resolve(path)
    return resolved if storage.is_remote(resolved) else os.path.realpath(resolved)


def _ceiling(measured: EditMetrics) -> str:
    ceiling = measured.background_ceiling
    return "" if ceiling is None else f" (VAE round trip {ceiling:.2f} dB)"
