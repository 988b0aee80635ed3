"""The page of `kvlock app` builds, and its events do what they say; where Gradio is installed."""

import dataclasses
import socket
import threading
import time
import types

import pytest

pytest.importorskip("gradio", reason="kvlock app needs Gradio: pip install '.[app]'")

import numpy as np
from clips import only

from kvlock_jax.app import clips
from kvlock_jax.app.edits import Edit, Editor
from kvlock_jax.app.handlers import OPENED, OUTLINE, TOKENS, Handlers, Studio
from kvlock_jax.app.jobs import DONE, Jobs
from kvlock_jax.app.page import build, serve
from kvlock_jax.app.uploads import Uploads
from kvlock_jax.errors import InputError
from kvlock_jax.pipeline.load import default_config
from kvlock_jax.runtime.compile_cache import Compiler

pytestmark = [
    pytest.mark.usefixtures("swept"),
    pytest.mark.filterwarnings("ignore"),  # of Gradio and what it imports
]


@pytest.fixture(scope="module")
def studio(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    (folder / "kept").mkdir()
    base = default_config(model)
    base.sample.steps, base.edit.size = 2, "48*48"
    return Studio(
        editor=Editor(model, default_config(model), [], Compiler(), folder / "kept"),
        base=base,
        configs=model.checkpoint.configs,
        examples=clips.examples(folder),
        takes_references=False,
    )


def test_the_page_builds(studio):
    assert len(build(studio).fns) > 15


def test_an_example_is_edited_and_kept(studio):
    does = Handlers(studio)
    session, _, _, prompt, *fields = does.open_example(1)
    assert prompt == "a yellow circle" and fields == [0, "", False, None]
    outlined, line, _ = does.look(session, 4, OUTLINE, 0, False, "")
    tokens, _, _ = does.look(session, 4, TOKENS, 0, False, "48*48")
    assert outlined.shape == (*tokens.shape[:2], 3) and "tokens" in line
    values = ["", studio.base.preset, 2, 4.0, 0, "48*48"]
    job, status, *_ = does.edit(session, 0, False, 0, None, prompt, *values)
    assert does.begin()[OPENED] is job  # as a page that opens meanwhile finds it
    told = list(does.watch(job))
    assert any("<img" in str(estimate) for _, _, estimate, *_ in told)
    status, curve, estimate, *_ = told[-1]
    assert "done" in status and 'data-steps="2"' in curve and estimate == ""
    (edit,) = studio.done
    assert "edit.mp4" in only(edit.folder) and "yellow circle" in edit.command
    assert "<video" in does.begin()[OPENED + 1]  # as a page that opens later shows it


def test_what_is_wrong_is_told_and_nothing_runs(studio):
    does = Handlers(studio)
    session = does.open_example(0)[0]
    values = ["", studio.base.preset, 0, 4.0, 0, ""]
    job, status, *_ = does.edit(session, 0, False, 0, None, " ", *values)
    assert job is None and "mend" in status
    assert does.check(" ", *values)[3].startswith("SampleConfig.steps must be at least 1")
    unmarked = does.unmark_all(session)[0]
    values[2] = 2
    job, status, *_ = does.edit(unmarked, 0, False, 0, None, "a star", *values)
    assert job is None and "nothing is marked" in status
    _, problem = does.mark_box(session, 0, "1,2")
    assert "x0" in problem.value


def test_fields_and_marks_that_do_not_agree(studio):
    studio = dataclasses.replace(studio, done=[])
    studio.jobs = Jobs(lambda request, on_step: request)
    does = Handlers(studio)
    session = does.open_example(0)[0]
    assert does.look(session, None, OUTLINE, None, False, "")[1].startswith("a mask of every frame")
    assert len(does.open_again(session, 5)[0].marks.whole) == 5
    assert does.open_again(does.open_again(session, 5)[0], 0)[0].marks.whole is None
    followed = does.set_follow(session, True)[0]
    assert does.mark_file(followed, 0, str(studio.examples[0].mask))[0].marks.follow
    session = does.unmark_all(session)[0]
    for number in (2, 5):
        session = does.mark_box(session, number, "20,20,60,60")[0]
    shorter = does.open_again(session, 5)[0]
    assert list(shorter.marks.keyframes) == [2] and shorter.mask.shape[0] == 5
    shorter = does.mark_box(shorter, 8, "0,0,9,9")[0]  # of the last frame, which is shown
    assert list(shorter.marks.keyframes) == [2, 4]
    values = ["", studio.base.preset, 2, 4.0, 0, "48*48"]
    job = does.edit(session, None, False, 3, None, "a star", *values)[0]  # before the field is left
    assert job.request.config.edit.frame_num == 3 and job.request.mask.shape[0] == 3
    assert does.check(None, *values)[0].startswith("the prompt is empty")
    assert "at most" in does.check("a star", *values[:5], "100000*100000")[6]


def test_the_edit_that_was_picked_is_shown(studio, tmp_path):
    studio = dataclasses.replace(studio, done=[])
    for number in range(3):
        edit = Edit(
            tmp_path, f"edit {number}", "", "", [], np.zeros((2, 2, 3), np.uint8), ((), None)
        )
        studio.done.append(edit)
    *_, length = Handlers(studio).begin()
    studio.done.append(edit)  # of another page, whose strip alone shows it
    event = types.SimpleNamespace(index=2)
    assert "edit 0" in Handlers(studio).pick(length, event)[0]


def test_bad_uploads_are_told(studio, tmp_path):
    path = tmp_path / "text.mp4"
    path.write_text("no video")
    session, problem, *_ = Handlers(studio).open_upload(str(path), 0)
    assert session is None and problem.value.startswith("text.mp4: not a readable video")
    does = Handlers(studio)
    values = ["", studio.base.preset, 2, 4.0, 0, "48*48"]
    session = does.open_example(0)[0]
    job, status, *_ = does.edit(session, 0, False, 0, [str(path)], "a star", *values)
    assert job is None and ">text.mp4: not a readable" in status


def test_a_port_that_is_taken_is_told(studio):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port}"):
            serve(studio, listen="127.0.0.1", port=port, auth=None)


def test_uploads_go_when_nobody_needs_them(tmp_path):
    uploads = Uploads(str(tmp_path / "gradio"))
    paths = [tmp_path / "gradio" / name / "a.mp4" for name in ("mine", "ours")]
    paths.append(tmp_path / "a.mp4")  # no upload
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    mine, ours, other = map(str, paths)
    uploads.hold("a page", [mine])
    uploads.hold("a page", [ours, other])
    uploads.hold("another page", [ours])
    uploads.drop("a page")
    uploads.drop("a page")
    assert [path.exists() for path in paths] == [False, True, True]
    assert not paths[0].parent.exists()
    uploads.drop("another page")
    assert [path.exists() for path in paths] == [False, False, True]


def test_an_edit_that_waits_keeps_its_upload_when_its_page_is_closed(studio, tmp_path, monkeypatch):
    upload = tmp_path / "mine.mp4"
    upload.write_bytes(studio.examples[1].video.read_bytes())
    goes_on = threading.Event()

    def work(request, on_step):
        goes_on.wait(20)
        return len(clips.read(request.video).frames)

    monkeypatch.setattr("gradio.utils.get_upload_folder", lambda: str(tmp_path))
    studio = dataclasses.replace(studio, done=[])
    studio.jobs = Jobs(work, studio.uploads.drop)
    does, page = Handlers(studio), types.SimpleNamespace(session_hash="a page")
    session = does.open_upload(str(upload), 0)[0]
    does.hold(str(upload), page)
    session = does.mark_box(session, 0, "20,20,60,60")[0]
    values = ["", studio.base.preset, 2, 4.0, 0, "48*48"]
    _, cancelled, last = (does.edit(session, 0, False, 9, None, "a", *values)[0] for _ in "abc")
    studio.jobs.cancel(cancelled)
    does.leave(page)
    assert upload.exists()
    goes_on.set()
    seen, end = -1, time.monotonic() + 20
    while not last.progress.is_over:
        seen = last.wait(seen)
    assert last.progress.state == DONE and last.progress.result == 9
    while upload.exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    job, status, *_ = does.edit(session, 0, False, 9, None, "a", *values)
    assert job is None and "mine.mp4: the upload is gone" in status
