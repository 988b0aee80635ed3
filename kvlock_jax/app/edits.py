"""Runs one edit of the page in a folder of its own, which holds all that makes it again."""

import contextlib
import dataclasses
import pathlib
import re
import shutil
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from kvlock_jax.app.jobs import OnStep
from kvlock_jax.app.preview import FITTED_TO, Preview
from kvlock_jax.app.request import Request, command
from kvlock_jax.app.views import scale_of, thumbnail
from kvlock_jax.media import encode, room
from kvlock_jax.media.decode import Video, read_video
from kvlock_jax.media.footage import Footage
from kvlock_jax.pipeline import report
from kvlock_jax.pipeline.api import Result, run
from kvlock_jax.pipeline.background import BackgroundCompiler
from kvlock_jax.pipeline.encode import draw_noise
from kvlock_jax.pipeline.inputs import EditInputs, read_inputs
from kvlock_jax.pipeline.load import Model
from kvlock_jax.pipeline.outputs import Outputs, summarize_metrics, write_outputs
from kvlock_jax.pipeline.settings import Settings, resolve_settings
from kvlock_jax.runtime.compile_cache import Compiler
from kvlock_jax.sampling.loop import Trace
from kvlock_jax.sampling.stepwise import Step
from kvlock_jax.shapes import Frames, Image, Mask

COMMAND = "edit.sh"
"""Name of the file with the command in an edit's folder."""

PICTURES = 12
"""Pictures of the clean estimate in a run, at most."""


@dataclasses.dataclass(frozen=True, eq=False)
class Edit:
    """An edit that is done, in a folder of its own.

    Attributes:
      folder: holds all its files.
      prompt: what was asked for.
      command: command that makes it again, run in the folder.
      kept: how well the background was kept, in a line.
      notes: warnings of the run.
      picture: the middle frame of the edit, small.
      curves: trace and settings of the run, for its curves.
    """

    folder: pathlib.Path
    prompt: str
    command: str
    kept: str
    notes: Sequence[str]
    picture: Image
    curves: tuple[Sequence[Trace], Settings]

    @property
    def video(self) -> pathlib.Path:
        """The edited video."""
        return self.folder / "edit.mp4"

    @property
    def mask(self) -> pathlib.Path:
        """The mask that was edited, lossless."""
        return self.folder / "mask.mkv"

    @property
    def trace(self) -> pathlib.Path:
        """What each step did, as JSON."""
        return self.folder / "trace.json"

    @property
    def compared(self) -> pathlib.Path:
        """Source, mask and edit side by side, small ones enlarged, for browsers."""
        return self.folder / "compared.mp4"

    @property
    def archive(self) -> pathlib.Path:
        """All that makes the edit again: source, mask, pictures and command; and what it made."""
        return self.folder / "edit.zip"


@dataclasses.dataclass(eq=False)
class Editor:
    """Does edits with one model, one at a time.

    Attributes:
      model: loaded model.
      own: the checkpoint's default settings.
      arguments: arguments of `kvlock edit` that name the model and its place.
      compiler: of all edits' programs, so that those of one size compile once.
      folder: gets a folder for each edit.
      about: further values for traces, such as the checkpoint's name.
    """

    model: Model
    own: ConfigDict
    arguments: Sequence[str]
    compiler: Compiler
    folder: pathlib.Path
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    _previewed: Frames | None = dataclasses.field(default=None, init=False)
    _preview: Preview | None = dataclasses.field(default=None, init=False)

    def __call__(self, request: Request, on_step: OnStep) -> Edit:
        """Runs an edit, and writes its files.

        Raises:
          Error: it cannot run; whatever `on_step` raises, too, and no folder is left then.
        """
        stem = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower()).strip("-")[:30] or "edit"
        folder = pathlib.Path(tempfile.mkdtemp(prefix=f"{stem}-", dir=self.folder))
        try:
            return self._edit(folder, request, on_step)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _edit(self, folder: pathlib.Path, request: Request, on_step: OnStep) -> Edit:
        settings = resolve_settings(request.config)
        with _noted() as notes:
            names, inputs = self._prepared(folder, request)
            noise = draw_noise(self.model, inputs, jax.random.key(settings.sample.seed))
            ahead = BackgroundCompiler(
                self.model, inputs, settings, noise, by_step=True, compiler=self.compiler
            )
            ahead.wait("videos")
            preview, every = self._preview_of(inputs), -(-settings.sample.steps // PICTURES)

            def hear(step: Step) -> None:
                """Passes a step on, every few with a picture."""
                is_shown = (step.number + 1) % every == 0
                on_step(step.trace, preview.drawn(step.estimate()) if is_shown else None)

            result = run(self.model, inputs, settings, on_step=hear, background=ahead)
        text = command(request, self.own, self.arguments, {**names, "save_file": "edit.mp4"})
        edit = Edit(
            folder=folder,
            prompt=request.prompt,
            command=text,
            kept=summarize_metrics(result.metrics),
            notes=list(dict.fromkeys(notes)),
            picture=thumbnail(result.video[len(result.video) // 2]),
            curves=(_rows(result.trace), settings),
        )
        about = {**self.about, "prompt": request.prompt, **names, "command": text}
        written = write_outputs(Outputs(edit.video, trace=edit.trace), result, about)
        if written.errors:
            raise written.errors[0]
        _write_compared(edit.compared, result)
        (folder / COMMAND).write_text(text + "\n", encoding="utf-8")
        kept = [*names.values(), edit.video.name, edit.trace.name, COMMAND]
        with zipfile.ZipFile(edit.archive, "w") as archive:
            for name in ",".join(filter(None, kept)).split(","):
                archive.write(folder / name, f"{folder.name}/{name}")
        return edit

    def _preview_of(self, inputs: EditInputs) -> Preview:
        """The map to colours for a clip, kept as long as clips begin alike."""
        first = np.asarray(inputs.source[:FITTED_TO])
        if self._previewed is None or not np.array_equal(first, self._previewed):
            self._preview = Preview.fitted(self.model, first, self.compiler.call)
            self._previewed = first
        return self._preview

    def _prepared(
        self, folder: pathlib.Path, request: Request
    ) -> tuple[dict[str, str], EditInputs]:
        """The inputs, read from copies in the folder as the command will, and the copies' names."""
        names = {"src_video": f"source{_suffix(request.video)}"}
        shutil.copyfile(request.video, folder / names["src_video"])
        names["src_mask"] = "mask.mkv"
        limit = request.config.edit.frame_num or None
        video = read_video(folder / names["src_video"], limit)
        _write_mask(folder / names["src_mask"], request.mask, video)
        pictures = []
        for number, path in enumerate(request.references, 1):
            pictures.append(f"reference-{number}{_suffix(path)}")
            shutil.copyfile(path, folder / pictures[-1])
        names["src_ref_images"] = ",".join(pictures)
        inputs = read_inputs(
            folder / names["src_video"],
            folder / names["src_mask"],
            request.prompt,
            resolve_settings(request.config).edit,
            [folder / name for name in pictures],
        )
        return names, inputs


def _suffix(path: str) -> str:
    """A file's suffix, where it is one: names are parted by commas, and stand in commands."""
    suffix = pathlib.Path(path).suffix.lower()
    return suffix if re.fullmatch(r"\.[a-z0-9]+", suffix) else ""


@contextlib.contextmanager
def _noted() -> Iterator[list[str]]:
    """Warnings of this thread: others handle the page meanwhile."""
    notes, thread = [], threading.get_ident()

    def note(message: Warning | str, category: type[Warning], *place: Any) -> None:
        """Takes a warning."""
        if threading.get_ident() == thread:
            notes.append(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = note
        yield notes


def _write_mask(path: pathlib.Path, mask: Mask, video: Video) -> None:
    """Writes a mask, lossless, at the times of its clip."""
    white = mask.view(np.uint8) * np.uint8(255)
    frames = np.broadcast_to(white[..., None], (*white.shape, 3))
    encode.write_video(path, frames, video.fps, lossless=True, footage=Footage(times=video.times))


def _write_compared(path: pathlib.Path, result: Result) -> None:
    """Writes source, mask and edit side by side."""
    scale = max(1, scale_of(*result.video.shape[1:3]) - 1)

    def large(frames: np.ndarray) -> np.ndarray:
        """Frames of which each pixel is a square."""
        return np.repeat(np.repeat(frames, scale, 1), scale, 2)

    parts = (room.mapped(large, x) for x in (result.source, result.mask, result.video))
    together = report.compare(*parts)
    odd = [(0, size % 2) for size in together.shape[1:3]]  # browsers play even sizes alone
    together = room.mapped(lambda x: np.pad(x, ((0, 0), *odd, (0, 0)), mode="edge"), together)
    footage = dataclasses.replace(result.footage, audio=None)
    encode.write_video(path, together, result.fps, footage=footage)


def _rows(trace: Trace) -> tuple[Trace, ...]:
    """The traces of single steps."""
    names = [field.name for field in dataclasses.fields(trace)]
    columns = zip(*(getattr(trace, name) for name in names), strict=True)
    return tuple(Trace(*row) for row in columns)
