"""Parts of the page that are HTML: how far an edit is, the queue, its estimate, its result."""

import base64
import html
import io
from collections.abc import Sequence
from urllib.parse import quote

from PIL import Image as pillow

from kvlock_jax.app.edits import Edit
from kvlock_jax.app.jobs import RUNNING, Job
from kvlock_jax.shapes import Image


def status(text: str, share: float = 0.0) -> str:
    """A line over a bar that is full at a share of 1."""
    bar = f'<div class="kvlock-bar"><div style="width:{100 * share:.0f}%"></div></div>'
    return f'<div class="kvlock-status">{html.escape(text)}</div>{bar}'


def progress(job: Job, unfinished: Sequence[Job]) -> str:
    """How far a job is, over the queue where other jobs are in it.

    Args:
      job: the job of the page.
      unfinished: jobs of all pages that run or wait, in the order of their turns.
    """
    state = job.progress
    shown = status(str(state), len(state.rows) / max(1, state.steps))
    if not any(other is not job for other in unfinished):
        return shown
    lines = (f"<li>{_line(other, other is job)}</li>" for other in unfinished)
    return f'{shown}<ol class="kvlock-queue">{"".join(lines)}</ol>'


def _line(job: Job, is_own: bool) -> str:
    """A job in the queue."""
    far = str(job.progress) if job.progress.state == RUNNING else "waits"
    text = f"{html.escape(job.request.prompt)}: {html.escape(far)}"
    return f"<b>{text}</b>" if is_own else text


def estimate(picture: Image) -> str:
    """A picture of the clean estimate."""
    file = io.BytesIO()
    pillow.fromarray(picture).save(file, "png")
    data = base64.b64encode(file.getvalue()).decode()
    about = "first, middle and last frame as the steps so far estimate them"
    return (
        f'<figure class="kvlock-estimate"><img src="data:image/png;base64,{data}" alt="{about}">'
        f"<figcaption>{about}</figcaption></figure>"
    )


def result(edit: Edit) -> str:
    """An edit over its source, uncovered by a slider and played in step: they are one video."""
    address = f"gradio_api/file={quote(str(edit.compared))}"
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in edit.notes)
    return (
        f'<div class="kvlock-result"><h3>{html.escape(edit.prompt)}</h3><div class="kvlock-wipe">'
        f'<video src="{address}" autoplay loop muted playsinline></video><canvas></canvas>'
        '<input type="range" min="0" max="1000" value="500" aria-label="edit from here on">'
        "<div><span>source</span>"
        '<label><input type="checkbox"> with the outline of the mask</label>'
        '<button type="button">pause</button><span>edit</span></div></div>'
        f"<p>{html.escape(edit.kept)}</p>{notes}</div>"
    )
