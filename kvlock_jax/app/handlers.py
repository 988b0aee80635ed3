"""What the page's events do: from values of its components to values of others."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gradio as gr
from ml_collections import ConfigDict

from kvlock_jax import lock
from kvlock_jax.app import clips, curves, fragments
from kvlock_jax.app.clips import Example
from kvlock_jax.app.edits import Edit, Editor
from kvlock_jax.app.jobs import DONE, Job, Jobs
from kvlock_jax.app.marks import Marks
from kvlock_jax.app.request import FIELDS, Request, config_of, problems
from kvlock_jax.app.session import Session
from kvlock_jax.app.uploads import Uploads
from kvlock_jax.app.views import enlarged, scale_of
from kvlock_jax.checkpoints.registry import Configs
from kvlock_jax.errors import Error, InputError
from kvlock_jax.pipeline.settings import resolve_settings

OUTLINE, TOKENS = "outline of the mask", "tokens that are edited"
"""What is drawn over a frame."""

OPENED = 8
"""Values of a clip: itself, its problem, slider, prompt, frames, size, no follow, no corner."""

SHOWN = 9
"""Values of a result: itself, its downloads (4 in a row), its command, the strip, its length."""

PROBLEMS = ("prompt", *FIELDS)
"""Fields with a problem under them, in the order of `check`."""


@dataclasses.dataclass(eq=False)
class Studio:
    """What all open pages share.

    Attributes:
      editor: does the edits.
      base: settings that a page begins with.
      configs: of the model's networks.
      examples: clips to begin with.
      takes_references: whether the model looks at pictures of the wanted content.
      jobs: queue of edits.
      done: edits that are done, the latest last; they outlive the page that asked for them.
      served: folders of theirs, which browsers may read.
      uploads: uploaded files that pages and edits need.
    """

    editor: Editor
    base: ConfigDict
    configs: Configs
    examples: Sequence[Example]
    takes_references: bool
    jobs: Jobs = dataclasses.field(init=False)
    done: list[Edit] = dataclasses.field(default_factory=list)
    served: list[str] = dataclasses.field(default_factory=list)
    uploads: Uploads = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        def work(request: Request, on_step: Any) -> Edit:
            """Does an edit, and keeps it for every page."""
            edit = self.editor(request, on_step)
            self.served.append(str(edit.folder))
            self.done.append(edit)
            return edit

        self.uploads = Uploads(gr.utils.get_upload_folder())
        self.jobs = Jobs(work, self.uploads.drop)

    def submit(self, request: Request, steps: int) -> Job:
        """Puts an edit into the queue; its uploads stay until it is over."""
        files = (request.video, *request.references)
        self.uploads.hold(request, files)
        try:
            for file in files:
                clips.check_there(file)
        except Error:
            self.uploads.drop(request)
            raise
        return self.jobs.submit(request, steps)


class Handlers:
    """Handles the events of all open pages; what belongs to one of them, its `Session` holds."""

    def __init__(self, studio: Studio):
        self.studio = studio

    def hold(self, files: str | list[str] | None, page: gr.Request) -> None:
        """Notes what a page uploaded."""
        given = files if isinstance(files, list) else [files]
        self.studio.uploads.hold(page.session_hash, filter(None, given))

    def leave(self, page: gr.Request) -> None:
        """Deletes the uploads of a page that was closed, but those that others need."""
        self.studio.uploads.drop(page.session_hash)

    # -- the clip and its marks ------------------------------------------------------------------

    def begin(self) -> list[Any]:
        """The page as it opens: the first example, the edits so far, and the last unfinished one.

        So a page that is opened again goes on with the edit that was asked for before.
        """
        opened = self.open_example(0) if self.studio.examples else [gr.skip()] * OPENED
        done, unfinished = self.studio.done, self.studio.jobs.unfinished
        job = unfinished[-1] if unfinished else None
        return [*opened, job, *self._shown(done[-1] if done else None)]

    def open_example(self, number: int) -> list[Any]:
        """Opens an example, with its mask and a prompt for it."""
        example = self.studio.examples[number]
        session = Session.opened(example.video).with_file(example.mask, 0)
        return [session, _told(""), _frames(session), example.prompt, 0, "", False, None]

    def open_upload(self, path: str, frames: float | None) -> list[Any]:
        """Opens a file; the demo model takes it at its own size and length."""
        is_demo = bool(self.studio.examples)
        own = (9, "96*96") if is_demo else (gr.skip(), gr.skip())
        try:
            session = Session.opened(path, 9 if is_demo else int(frames or 0))
        except Error as error:
            return [None, _told(str(error)), *[gr.skip()] * (OPENED - 2)]
        return [session, _told(""), _frames(session), gr.skip(), *own, False, None]

    def open_again(self, session: Session | None, frames: float | None) -> list[Any]:
        """Takes another number of frames of the clip; its marks stay where they still fit."""
        if session is None or int(frames or 0) == session.frames:
            return [gr.skip()] * 3
        try:
            changed = session.cut(int(frames or 0))
        except Error as error:
            return [gr.skip(), _told(str(error)), gr.skip()]
        return [changed, _told(""), _frames(changed)]

    def look(
        self,
        session: Session | None,
        number: float | None,
        kind: str,
        pixels: float | None,
        inverted: bool,
        size: str,
    ) -> list[Any]:
        """The frame with its mask."""
        if session is None:
            return [None, "", _told("")]
        try:
            edit = resolve_settings(config_of(self.studio.base, {"size": size})).edit
        except Error:  # which the field tells
            edit = resolve_settings(self.studio.base).edit
        options = {"pixels": int(pixels or 0), "inverted": inverted, "as_tokens": kind == TOKENS}
        view = session.view(session.number(number), self.studio.configs, edit, **options)
        return [view.picture, view.line, _told(view.problem)]

    def mark_box(self, session: Session | None, number: float | None, box: str) -> list[Any]:
        """Marks a box on a frame."""
        return _marked(session, lambda one: one.with_box(box, one.number(number)))

    def mark_paint(
        self, session: Session | None, number: float | None, painted: Mapping[str, Any] | None
    ) -> list[Any]:
        """Marks what is painted on a frame."""
        layers = (painted or {}).get("layers") or []
        return _marked(session, lambda one: one.with_paint(layers, one.number(number)))

    def mark_file(self, session: Session | None, number: float | None, path: str) -> list[Any]:
        """Marks what a mask file shows."""
        return _marked(session, lambda one: one.with_file(path, one.number(number)))

    def unmark(self, session: Session | None, number: float | None) -> list[Any]:
        """Takes the mark of a frame away."""
        return _marked(session, lambda one: one.marked(one.marks.without(one.number(number))))

    def unmark_all(self, session: Session | None) -> list[Any]:
        """Takes all marks away."""
        return _marked(session, lambda one: one.marked(Marks(follow=one.marks.follow)))

    def set_follow(self, session: Session | None, follow: bool) -> list[Any]:
        """Follows the object between marks, or not."""

        def changed(one: Session) -> Session:
            """The session that does."""
            return one.marked(dataclasses.replace(one.marks, follow=follow))

        return _marked(session, changed)

    def click(self, session: Session | None, corner: Any, event: gr.SelectData) -> tuple[Any, Any]:
        """Takes a click on the picture for a corner of the box."""
        if session is None:
            return None, gr.skip()
        height, width = session.video.frames.shape[1:3]
        scale = scale_of(height, width)
        x, y = (int(at) // scale for at in event.index)
        if corner is None:
            return (x, y), f"{x},{y},"
        (x0, x1), (y0, y1) = sorted((x, corner[0])), sorted((y, corner[1]))
        return None, f"{x0},{y0},{min(x1 + 1, width)},{min(y1 + 1, height)}"

    def canvas(self, session: Session | None, number: float | None) -> Any:
        """The frame to paint on."""
        if session is None:
            return gr.skip()
        picture = enlarged(session.video.frames[session.number(number)])
        return {"background": picture, "layers": [], "composite": picture}

    # -- the edit --------------------------------------------------------------------------------

    def check(self, prompt: str, *values: Any) -> list[str]:
        """What is wrong with the fields, each beside its own."""
        found = problems(self.studio.base, prompt, dict(zip(FIELDS, values, strict=True)))
        return [found.get(name, "") for name in PROBLEMS]

    def told(self, prompt: str, *values: Any) -> list[gr.Markdown]:
        """`check`, as the page shows it."""
        return [_told(text) for text in self.check(prompt, *values)]

    def brought(self, preset: str) -> list[Any]:
        """The sampling that a preset sets, in the fields."""
        sampling = {**self.studio.base.sample.to_dict(), **lock.sampling(preset)}
        about = gr.Dropdown(info=lock.PRESETS[preset])
        return [about, sampling["steps"], sampling["guidance_scale"]]

    def edit(
        self,
        session: Session | None,
        pixels: float | None,
        inverted: bool,
        frames: float | None,
        references: list[str] | None,
        prompt: str,
        *values: Any,
    ) -> list[Any]:
        """Puts an edit into the queue, or tells why not: the job, its status, problems."""
        wrong = self.check(prompt, *values)
        told = [_told(text) for text in wrong]
        if any(wrong):
            return [None, fragments.status("mend what is marked in red"), *told]
        fields = dict(zip(FIELDS, values, strict=True))
        try:
            if session is None:
                raise InputError("no clip is open: choose an example or a file")
            session = session.cut(int(frames or 0))  # as the field says, which was left just now
            config = config_of(self.studio.base, fields, session.frames)
            mask = session.grown(int(pixels or 0), inverted)
            for picture in references or ():
                clips.check_picture(picture)
            request = Request(session.path, mask, prompt, config, tuple(references or ()))
            job = self.studio.submit(request, resolve_settings(config).sample.steps)
        except Error as error:
            return [None, fragments.status(str(error)), *told]
        return [job, fragments.progress(job, self.studio.jobs.unfinished), *told]

    def watch(self, job: Job | None) -> Iterator[list[Any]]:
        """Shows how far an edit is, until it is over: status, curves, estimate, result, strip."""
        if job is None:
            yield [gr.skip()] * (3 + SHOWN)
            return
        jobs, settings = self.studio.jobs, resolve_settings(job.request.config)
        seen, picture, is_over = -1, None, False
        while not is_over:
            seen, progress = job.wait(seen, timeout=2), job.progress
            is_over, is_done = progress.is_over, progress.state == DONE
            drawn = curves.drawn(progress.rows, settings)
            shown = self._shown(progress.result) if is_done else [gr.skip()] * SHOWN
            image = gr.skip()
            if progress.picture is not picture:
                picture = progress.picture
                image = fragments.estimate(picture)
            if is_done or not progress.rows:
                image = ""
            yield [fragments.progress(job, jobs.unfinished), drawn, image, *shown]

    def stop(self, job: Job | None) -> str:
        """Cancels the edit that this page shows, or else the last of the queue."""
        jobs = self.studio.jobs
        if job is None or job.progress.is_over:
            unfinished = jobs.unfinished
            if not unfinished:
                return fragments.status("nothing runs")
            job = unfinished[-1]
        jobs.cancel(job)
        return fragments.progress(job, jobs.unfinished)

    def pick(self, length: int, event: gr.SelectData) -> list[Any]:
        """Shows an edit of the strip, which may not have the latest edits of other pages."""
        return self._shown(self.studio.done[length - 1 - event.index])[:-2]

    def _shown(self, edit: Edit | None) -> list[Any]:
        """A result with its downloads, and the strip of all, the latest first."""
        if edit is None:
            return [gr.skip()] * SHOWN
        done = self.studio.done[:]
        strip = [(one.picture, one.prompt) for one in reversed(done)]
        files = [str(path) for path in (edit.video, edit.mask, edit.trace, edit.archive)]
        return [
            fragments.result(edit),
            gr.Row(visible=True),
            *(gr.DownloadButton(value=path) for path in files),
            gr.Textbox(edit.command, visible=True),
            gr.Gallery(strip, visible=True),
            len(done),
        ]


def _told(text: str) -> gr.Markdown:
    """A problem under a field; it takes no room where there is none."""
    return gr.Markdown(text, visible=bool(text))


def _frames(session: Session) -> gr.Slider:
    return gr.Slider(0, max(1, session.last), 0, step=1)


def _marked(session: Session | None, change: Callable[[Session], Session]) -> list[Any]:
    """The session after a change of its marks, or what is wrong with that."""
    if session is None:
        return [None, _told("no clip is open: choose an example or a file")]
    try:
        return [change(session), _told("")]
    except Error as error:
        return [gr.skip(), _told(str(error))]
