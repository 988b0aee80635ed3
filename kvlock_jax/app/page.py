"""The page of `kvlock app`, by Gradio: its components, and which event calls what."""

import pathlib
import socket
import time
from typing import Any

import gradio as gr
from ml_collections import ConfigDict

from kvlock_jax import lock
from kvlock_jax.app import clips
from kvlock_jax.app.handlers import OUTLINE, PROBLEMS, TOKENS, Handlers, Studio
from kvlock_jax.app.request import FIELDS
from kvlock_jax.errors import InputError

_UNUSED = 24 * 3600  # s after which uploads of a session that is still open go
_FOLDER = pathlib.Path(__file__).parent


def serve(
    studio: Studio, *, listen: str, port: int, auth: tuple[str, str] | None, opened: bool = False
) -> str:
    """Serves the page in threads of its own, and returns its address.

    Raises:
      InputError: the address or the port cannot be had.
    """
    port = _free_port(listen, port)
    page = build(studio)
    try:
        _, url, _ = page.launch(
            server_name=listen,
            server_port=port,
            auth=auth,
            inbrowser=opened,
            share=False,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=clips.LARGEST,
            footer_links=[],
            css=(_FOLDER / "page.css").read_text("utf-8"),
            js=(_FOLDER / "page.js").read_text("utf-8"),
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        )
    except OSError as error:
        raise InputError(f"--listen {listen} --port {port}: {error}") from error
    page.allowed_paths = studio.served  # of its edits alone: the folder may hold other files
    return url


def wait() -> None:
    """Waits until Ctrl-C."""
    while True:
        time.sleep(3600)


def _free_port(listen: str, port: int) -> int:
    """The port, or a free one for 0."""
    family = socket.AF_INET6 if ":" in listen else socket.AF_INET
    with socket.socket(family) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((listen, port))
        except OSError as error:
            raise InputError(f"--listen {listen} --port {port}: {error.strerror}") from error
        return trial.getsockname()[1]


def build(studio: Studio) -> gr.Blocks:
    """The page; it is not served yet."""
    with gr.Blocks(title="kvlock", analytics_enabled=False, delete_cache=(3600, _UNUSED)) as page:
        _Page(studio).wire(page)
    page.queue(default_concurrency_limit=4)
    return page


class _Page:
    """The components, and what their events do."""

    def __init__(self, studio: Studio):
        self.does, base = Handlers(studio), studio.base
        self.session, self.job = gr.State(None), gr.State(None)
        self.corner, self.length = gr.State(None), gr.State(0)
        gr.Markdown("## kvlock: edit the masked part of a video, keep the rest")
        with gr.Row():
            with gr.Column(min_width=320):
                self._clip(base)
            with gr.Column(min_width=320):
                self._wishes(base)
        self._result()

    def _clip(self, base: ConfigDict) -> None:
        gr.Markdown("### 1. A clip, and what to edit in it")
        with gr.Row():
            self.examples = [
                gr.Button(f"Example: {one.name}", size="sm", min_width=120)
                for one in self.does.studio.examples
            ]
        self.upload = gr.File(label="Your clip", height=140, elem_id="upload")
        self.clip_problem = _problem()
        self.picture = gr.Image(
            label="Click two corners of a box",
            interactive=False,
            format="png",
            buttons=[],
            elem_id="picture",
        )
        self.frame = gr.Slider(0, 1, 0, step=1, label="Frame", elem_id="frame")
        self.kind = gr.Radio([OUTLINE, TOKENS], value=OUTLINE, show_label=False)
        self.line = gr.Markdown(elem_id="coverage")
        self.mask_problem = _problem()
        with gr.Tabs():
            with gr.Tab("Box"), gr.Row():
                self.box = gr.Textbox(label="x0,y0,x1,y1 in pixels", scale=2, elem_id="box")
                self.put_box = gr.Button("Mark on this frame", size="sm", elem_id="put_box")
            with gr.Tab("Brush") as self.brush_tab:
                self.paint = gr.ImageEditor(
                    label="Paint over what to edit",
                    sources=(),
                    transforms=(),
                    layers=False,
                    brush=gr.Brush(colors=["#ff8c00"], color_mode="fixed"),
                    buttons=[],
                    height=420,
                )
                self.put_paint = gr.Button("Mark on this frame", size="sm")
            with gr.Tab("Mask file"):
                self.mask_file = gr.File(
                    label="A video for every frame, or a picture for this one; white is edited",
                    height=140,
                )
        self.mark_problem = _problem()
        with gr.Row():
            self.remove = gr.Button("Unmark this frame", size="sm", min_width=120)
            self.clear = gr.Button("Unmark all", size="sm", min_width=120)
        self.follow = gr.Checkbox(label="Follow the object between marks (OpenCV)")
        with gr.Row():
            self.grow = gr.Slider(0, 64, base.edit.dilate, step=1, label="Grow, pixels")
            self.invert = gr.Checkbox(base.edit.invert_mask, label="Edit the rest instead")

    def _wishes(self, base: ConfigDict) -> None:
        gr.Markdown("### 2. What it should show")
        self.prompt = gr.Textbox(label="Prompt", lines=2, elem_id="prompt")
        self.problems = {"prompt": _problem()}

        def field(name: str, component: gr.components.Component) -> gr.components.Component:
            """A field with its problem under it."""
            self.problems[name] = _problem()
            return component

        negative = gr.Textbox(base.edit.negative_prompt, label="Negative prompt", lines=1)
        self.fields = {"negative_prompt": field("negative_prompt", negative)}
        self.references = gr.File(
            label="Pictures of the wanted content (VACE)",
            file_count="multiple",
            file_types=["image"],
            height=160,
            visible=self.does.studio.takes_references,
        )
        preset = gr.Dropdown(
            list(lock.PRESETS),
            value=base.preset,
            label="Preset",
            info=lock.PRESETS.get(base.preset),
            elem_id="preset",
        )
        self.fields["preset"] = field("preset", preset)
        sample = base.sample
        numbers = {
            "steps": gr.Number(
                sample.steps, label="Steps", precision=0, elem_id="steps", render=False
            ),
            "guidance_scale": gr.Number(sample.guidance_scale, label="Guidance", render=False),
            "seed": gr.Number(sample.seed, label="Seed", precision=0, render=False),
            "size": gr.Textbox(
                base.edit.size, label="Work at WIDTH*HEIGHT", placeholder="the clip's", render=False
            ),
        }
        for pair in (("steps", "guidance_scale"), ("seed", "size")):
            with gr.Row():
                for name in pair:
                    with gr.Column(min_width=130):
                        self.fields[name] = field(name, numbers[name].render())
        self.frames = gr.Number(
            base.edit.frame_num, label="Frames from the start, 0: all", precision=0
        )
        with gr.Row():
            self.run = gr.Button("Edit", variant="primary", elem_id="run", min_width=120)
            self.cancel = gr.Button("Cancel", variant="stop", elem_id="cancel", min_width=120)
        self.status = gr.HTML(elem_id="status")
        self.curves = gr.HTML(elem_id="curves")
        self.estimate = gr.HTML(elem_id="estimate")

    def _result(self) -> None:
        self.result = gr.HTML(elem_id="result")
        with gr.Row(visible=False) as self.downloads:
            names = ("Video", "Mask", "Trace", "All, with the command")
            self.files = [gr.DownloadButton(name, size="sm", min_width=120) for name in names]
        self.command = gr.Textbox(
            label="The same edit on the command line, in the folder of the last download",
            interactive=False,
            lines=6,
            max_lines=14,
            buttons=["copy"],
            visible=False,
            elem_id="command",
        )
        self.strip = gr.Gallery(
            show_label=False,
            columns=6,
            object_fit="contain",
            height=200,
            fit_columns=False,
            allow_preview=False,
            buttons=[],
            visible=False,
            elem_id="strip",
        )

    def wire(self, page: gr.Blocks) -> None:
        """Says which event calls what."""
        opening = [self.session, self.clip_problem, self.frame, self.prompt]
        opening += [self.frames, self.fields["size"], self.follow, self.corner]
        look = [self.picture, self.line, self.mask_problem]
        looks = [self.session, self.frame, self.kind, self.grow, self.invert, self.fields["size"]]
        marked = [self.session, self.mark_problem]
        quiet = {"show_progress": "hidden"}

        def then_look(event: Any) -> None:
            """Shows the mask after an event."""
            event.success(self.does.look, looks, look, **quiet)

        # One after another, or a slow change would undo a quick one that came after it.
        turns = {"concurrency_id": "session", "concurrency_limit": 1}
        chosen = [
            button.click(lambda n=number: self.does.open_example(n), None, opening, **turns)
            for number, button in enumerate(self.examples)
        ]
        uploaded = [self.upload, self.frames]
        chosen.append(self.upload.upload(self.does.open_upload, uploaded, opening, **turns))
        held = [self.session, self.frames]
        again = self.frames.blur(self.does.open_again, held, opening[:3], **turns)
        for event in (*chosen, again):
            then_look(event)
        for component in looks[1:]:
            component.change(self.does.look, looks, look, trigger_mode="always_last", **quiet)
        at = [self.session, self.frame]
        for event in (
            self.put_box.click(self.does.mark_box, [*at, self.box], marked, **turns),
            self.box.submit(self.does.mark_box, [*at, self.box], marked, **turns),
            self.put_paint.click(self.does.mark_paint, [*at, self.paint], marked, **turns),
            self.mask_file.upload(self.does.mark_file, [*at, self.mask_file], marked, **turns),
            self.remove.click(self.does.unmark, at, marked, **turns),
            self.clear.click(self.does.unmark_all, [self.session], marked, **turns),
            self.follow.change(self.does.set_follow, [self.session, self.follow], marked, **turns),
        ):
            then_look(event)
        corners = [self.session, self.corner]
        self.picture.select(self.does.click, corners, [self.corner, self.box])
        self.brush_tab.select(self.does.canvas, at, self.paint)
        # What is painted is of the frame below it: a new frame, or clip, takes the paint away.
        for event in chosen:
            event.success(self.does.canvas, at, self.paint, **quiet)
        self.frame.change(self.does.canvas, at, self.paint, trigger_mode="always_last", **quiet)
        told = [self.problems[name] for name in PROBLEMS]
        wishes = [self.prompt, *(self.fields[name] for name in FIELDS)]
        self.fields["preset"].input(
            self.does.brought,
            self.fields["preset"],
            [self.fields[name] for name in ("preset", "steps", "guidance_scale")],
        )
        for component in wishes:
            component.change(self.does.told, wishes, told, trigger_mode="always_last", **quiet)
        shown = [self.result, self.downloads, *self.files, self.command, self.strip, self.length]
        asked = [self.session, self.grow, self.invert, self.frames, self.references, *wishes]
        watched = [self.status, self.curves, self.estimate, *shown]
        many = {**quiet, "concurrency_limit": None}
        first = page.load(self.does.begin, None, [*opening, self.job, *shown])
        then_look(first)
        resumed = first.then(self.does.watch, self.job, watched, **many)
        answer = [self.job, self.status, *told]
        run = self.run.click(self.does.edit, asked, answer, **quiet, **turns)
        watching = run.then(self.does.watch, self.job, watched, **many)
        self.run.click(None, cancels=[resumed, watching])
        self.cancel.click(self.does.stop, self.job, self.status, queue=False, **quiet)
        self.strip.select(self.does.pick, self.length, shown[:-2])
        for files in (self.upload, self.mask_file, self.references):
            files.upload(self.does.hold, files, **quiet)
        page.unload(self.does.leave)


def _problem() -> gr.Markdown:
    return gr.Markdown(elem_classes="problem", visible=False)
