"""The page of `kvlock app` builds, and its events do what they say; where Gradio is installed."""

import socket

import pytest

pytest.importorskip("gradio", reason="kvlock app needs Gradio: pip install '.[app]'")

from clips import only

from kvlock_jax.app import clips
from kvlock_jax.app.edits import Editor
from kvlock_jax.app.handlers import OUTLINE, TOKENS, Handlers, Studio, forget
from kvlock_jax.app.page import build, serve
from kvlock_jax.app.session import Session
from kvlock_jax.errors import InputError
from kvlock_jax.pipeline.load import default_config
from kvlock_jax.runtime.compile_cache import Compiler

pytestmark = pytest.mark.filterwarnings("ignore")  # of Gradio and what it imports


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
    session, *_, prompt, frames, size = does.open_example(1)
    assert prompt == "a yellow circle" and (frames, size) == (0, "")
    outlined, line, _ = does.look(session, 4, OUTLINE, 0, False, "")
    tokens, _, _ = does.look(session, 4, TOKENS, 0, False, "48*48")
    assert outlined.shape == (*tokens.shape[:2], 3) and "tokens" in line
    values = ["", studio.base.preset, 2, 4.0, 0, "48*48"]
    job, status, *_ = does.edit(session, 0, False, 0, None, prompt, *values)
    assert does.begin()[6] is job  # as a page that opens meanwhile finds it
    told = list(does.watch(job))
    assert any("<img" in str(estimate) for _, _, estimate, *_ in told)
    status, curve, estimate, *_ = told[-1]
    assert "done" in status and 'data-steps="2"' in curve and estimate == ""
    (edit,) = studio.done
    assert "edit.mp4" in only(edit.folder) and "yellow circle" in edit.command
    assert "<video" in does.begin()[7]  # as a page that opens later shows it


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


def test_bad_uploads_are_told(studio, tmp_path):
    path = tmp_path / "text.mp4"
    path.write_text("no video")
    session, problem, *_ = Handlers(studio).open_upload(str(path), "")
    assert session is None and problem.value.startswith("text.mp4: not a readable video")


def test_a_port_that_is_taken_is_told(studio):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port}"):
            serve(studio, listen="127.0.0.1", port=port, auth=None)


def test_an_upload_goes_with_its_page(studio, tmp_path, monkeypatch):
    example = studio.examples[1].video
    monkeypatch.setattr("gradio.utils.get_upload_folder", lambda: str(tmp_path))
    upload = tmp_path / "mine.mp4"
    upload.write_bytes(example.read_bytes())
    for path, is_left in ((upload, False), (example, True)):
        forget(Session.opened(path))
        assert path.exists() == is_left
