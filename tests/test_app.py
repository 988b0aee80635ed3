"""The logic of `kvlock app`, without its page."""

import contextlib
import dataclasses
import os
import shlex
import threading
import types
import warnings
import zipfile

import numpy as np
import pytest
import tiny
from clips import blob, noise

from kvlock_jax.app import clips, marks, preview, views
from kvlock_jax.app.edits import Editor
from kvlock_jax.app.jobs import CANCELLED, Jobs
from kvlock_jax.app.marks import Marks
from kvlock_jax.app.preview import Preview
from kvlock_jax.app.request import Request, command, config_of, problems
from kvlock_jax.app.session import Session
from kvlock_jax.cli import main
from kvlock_jax.cli.app import check_access, model_arguments
from kvlock_jax.cli.flags import gather_settings
from kvlock_jax.errors import InputError
from kvlock_jax.media import decode, encode
from kvlock_jax.media.decode import Video
from kvlock_jax.media.fit import Fit
from kvlock_jax.models.family import Encoded
from kvlock_jax.pipeline.load import default_config
from kvlock_jax.pipeline.settings import config, resolve_settings
from kvlock_jax.runtime.compile_cache import Compiler

VIDEO = Video(noise(), 12)

# --- clips --------------------------------------------------------------------------------------


def test_examples_are_clips_with_their_masks(tmp_path):
    for example in clips.examples(tmp_path):
        session = Session.opened(example.video).with_file(example.mask, 0)
        assert session.mask.shape == session.video.frames.shape[:3]
        assert 0.05 < session.mask.mean() < 0.5


def test_bad_uploads_are_told_by_name(folder):
    whole = (folder / "in.mkv").read_bytes()
    (folder / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    (folder / "text.mp4").write_text("no video")
    for name, told in (("cut.mkv", "cut.mkv: "), ("text.mp4", "not a readable"), ("no", "gone")):
        with pytest.raises(InputError, match=told) as caught:
            clips.read(folder / name)
        assert os.fspath(folder) not in str(caught.value)
    with pytest.raises(InputError, match="too large"):
        clips.read(folder / "in.mkv", largest=10)
    assert len(clips.read(folder / "in.mkv", 2).frames) == 2


# --- marks --------------------------------------------------------------------------------------


def test_a_mark_stands_for_all_frames_and_two_change_evenly():
    one = Marks().put(2, (8, 8, 16, 16))
    mask = marks.mask_of(one, VIDEO)
    assert mask[:, 8:16, 8:16].all() and mask.sum() == 5 * 64
    two = one.put(4, (16, 8, 24, 16)).without(0)
    moved = marks.mask_of(two, VIDEO)
    assert moved[3, 8:16, 12:20].all() and moved[3].sum() == 64
    mixed = two.put(0, blob()[0])
    assert (marks.mask_of(mixed, VIDEO)[0] == blob()[0]).all()
    assert str(Marks(follow=True).put(2, (8, 8, 16, 16))).endswith("followed between")
    assert list(mixed.keyframes) == [0, 2, 4] and "frame 4: box 16,8,24,16" in str(mixed)


def test_marks_that_do_not_fit():
    with pytest.raises(InputError, match="nothing is marked"):
        marks.mask_of(Marks(), VIDEO)
    with pytest.raises(InputError, match="no frame 7"):
        marks.mask_of(Marks().put(7, (0, 0, 8, 8)), VIDEO)
    with pytest.raises(InputError):
        marks.box_mark("0,0,100,8", VIDEO)
    with pytest.raises(InputError, match="nothing is painted"):
        marks.painted([], VIDEO)


def test_paint_is_brought_to_the_frames_size():
    layer = np.zeros((320, 480, 4), np.uint8)
    layer[80:164, 100:200, 3] = 255  # four tenths of the last row's pixels
    shape = marks.painted([layer], VIDEO)
    assert shape[8:16, 10:20].all() and shape.sum() == 80


def test_a_mask_file_is_of_every_frame_or_of_one(folder):
    session = Session.opened(folder / "in.mkv").with_file(folder / "mask.mkv", 3)
    np.testing.assert_array_equal(session.mask, tiny.mask()[..., 0] > 127)
    encode.write_png(
        folder / "one.png", np.repeat(blob()[0, ..., None], 3, -1).view(np.uint8) * 255
    )
    session = session.with_file(folder / "one.png", 3)
    assert list(session.marks.keyframes) == [3] and session.marks.whole is None
    with pytest.raises(InputError, match=r"^mask in\.mkv|in\.mkv"):
        Session.opened(clips.examples(folder)[0].video).with_file(folder / "in.mkv", 0)


def test_the_mask_is_shown_before_anything_runs(folder, model):
    configs, edit = model.checkpoint.configs, config("demo").edit
    edit = resolve_settings(config("demo")).edit
    session = Session.opened(folder / "in.mkv")
    assert "nothing is marked" in session.view(0, configs, edit).problem
    session = session.with_box("8,8,16,16", 0)
    view = session.view(2, configs, edit)
    assert "64 pixels" not in view.line and "4.2 % of the pixels, in 5 of 5" in view.line
    assert "2 of 12 tokens" in view.line and not view.problem
    assert view.picture.shape == (320, 480, 3)
    tokens = session.view(2, configs, edit, as_tokens=True).picture
    plain = views.enlarged(session.video.frames[2])
    assert (tokens != plain)[1:159, 1:159].any(-1).all()  # the token of 16 pixels that it touches
    np.testing.assert_array_equal(tokens[170:310, 170:310], plain[170:310, 170:310])
    assert "9.4 %" in session.view(2, configs, edit, pixels=2).line  # 12x12
    assert "95.8 %" in session.view(2, configs, edit, inverted=True).line
    turned = session.grown(2, True)  # turned round first, and then grown
    assert turned.sum() == turned.size - 5 * 4 * 4
    smaller = dataclasses.replace(edit, size="24*16")
    assert "tokens" in session.view(2, configs, smaller, as_tokens=True).line


def test_tokens_lie_over_the_frames_and_pixels_that_they_stand_for():
    chosen = np.zeros((3, 2, 3), bool)
    chosen[1, 0, 2] = True
    tokens, image = views.Tokens(chosen, (4, 16, 8)), np.full((30, 24, 3), 100, np.uint8)
    for number, is_edited in ((0, False), (1, True), (4, True), (5, False)):
        seen = tokens.drawn(image, number)[..., 0] > 100
        assert seen[: 16 * 16, 16 * 16 :].all() == is_edited and seen.sum() in (0, 256 * 128)
    mask = np.zeros((9, 30, 24), bool)
    mask[3:5, :3, :12] = True
    told = "1.1 % of the pixels, in 2 of 9 frames; 1 of 18 tokens (6 %) are edited"
    assert views.coverage(mask, tokens) == told


# --- fields and the command ---------------------------------------------------------------------


def words(text: str) -> list[str]:
    """A command's words, as a shell parts them."""
    return shlex.split(text.replace("\\\n", ""))


def test_what_is_wrong_is_told_by_field():
    base = config("demo")
    good = {"negative_prompt": "", "preset": "kvlock", "steps": 8, "guidance_scale": 4, "seed": 1}
    good["size"] = ""
    assert problems(base, "a star", good) == {}
    bad = good | {"steps": 0, "seed": None, "size": "big"}
    found = problems(base, " ", bad)
    assert list(found) == ["prompt", "steps", "seed", "size"]
    assert found["steps"] == "SampleConfig.steps must be at least 1, found 0"
    assert found["prompt"].startswith("the prompt is empty")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"steps": 8, "guidance_scale": 3, "seed": 7, "size": "48*32"},
        {"preset": "distilled", "steps": 5, "guidance_scale": 1.0},
        {"negative_prompt": 'it\'s "bad" $HOME; -x', "preset": "hard_lock"},
    ],
)
@pytest.mark.parametrize("own", ["demo", "t2v_a14b"])
def test_the_command_has_the_same_settings(own, changes):
    low = config(own).sample.guidance_scale_low  # which the other scale's flag alone would change
    given = ["app", "--window=33", "--sample_guide_scale=6", f"--sample_guide_scale_low={low}"]
    base = gather_settings(main._parser().parse_args(given), [], own)
    base.kvlock.tau = 0.02
    base.edit.dilate, base.edit.invert_mask = 4, True
    run = config_of(base, changes, frames=5)
    assert run.edit.dilate == 0 and not run.edit.invert_mask and run.edit.frame_num == 5
    request = Request("in.mp4", blob(), "a star", run)
    text = command(request, config(own), ["--ckpt_dir=x"], {"src_video": "a b.mp4", "bbox": None})
    kvlock, *arguments = words(text)
    args, others = main._parser().parse_known_args([*arguments, "--save_file=out.mp4"])
    assert kvlock == "kvlock" and args.src_video == "a b.mp4" and args.ckpt_dir == "x"
    assert resolve_settings(gather_settings(args, others, own)) == resolve_settings(run)


def test_fields_win_over_what_a_preset_brings():
    base = config("demo")
    same = {name: base.sample[name] for name in ("steps", "guidance_scale")}
    run = config_of(base, {"preset": "distilled", **same})
    assert {name: run.sample[name] for name in same} == same and run.sample.solver == "euler"


def test_the_command_makes_the_same_video(tmp_path, monkeypatch, model, loads, tiny_checkpoint):
    example = clips.examples(tmp_path)[0]
    upload = tmp_path / "a clip, of 'mine'.m p,4"
    upload.write_bytes(example.video.read_bytes())
    session = Session.opened(upload, 5).with_box("20,24,60,70", 0)
    base = default_config(model)
    run = config_of(base, {"steps": 2, "seed": 3, "size": "48*32"}, frames=5)
    editor = Editor(
        model,
        default_config(model),
        [f"--ckpt={tiny_checkpoint}", "--mesh=frames=1"],
        Compiler(),
        tmp_path,
    )
    steps = []

    def on_step(*step):
        steps.append(step)
        other = threading.Thread(target=warnings.warn, args=["of another page's mask"])
        other.start()
        other.join()

    request = Request(session.path, session.grown(2, False), "a 'blue'\n\"$HOME\" square", run)
    edit = editor(request, on_step)
    assert [picture.shape for _, picture in steps] == [(160, 480, 3)] * 2
    assert "background PSNR" in edit.kept
    assert "cropped" in edit.notes[0] and not any("another page" in note for note in edit.notes)
    with zipfile.ZipFile(edit.archive) as archive:
        archive.extractall(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere" / edit.folder.name)
    made = edit.video.read_bytes()
    with open("edit.mp4", "rb") as file:
        assert file.read() == made
    os.remove("edit.mp4")
    with open("edit.sh", encoding="utf-8") as file:
        assert main.main(words(file.read())[1:]) == 0
    with open("edit.mp4", "rb") as file:
        assert file.read() == made
    assert decode.read_video(edit.compared).frames.shape[1] % 2 == 0


def test_a_cancelled_edit_leaves_nothing(tmp_path, model):
    session = Session.opened(clips.examples(tmp_path)[0].video, 5).with_box("20,24,60,70", 0)
    run = config_of(default_config(model), {"steps": 2, "size": "48*32"}, frames=5)
    (tmp_path / "kept").mkdir()
    editor = Editor(model, default_config(model), [], Compiler(), tmp_path / "kept")
    jobs = Jobs(editor)
    job = jobs.submit(Request(session.path, session.grown(0, False), "a star", run), 2)
    seen = 0
    while not job.progress.rows and not job.progress.is_over:
        seen = job.wait(seen)
    job.cancel()
    while not job.progress.is_over:
        seen = job.wait(seen)
    assert job.progress.state == CANCELLED and len(job.progress.rows) == 1
    assert list((tmp_path / "kept").iterdir()) == []


# --- previews -----------------------------------------------------------------------------------


def test_a_preview_is_the_linear_map_of_latents_to_colours(monkeypatch):
    random = np.random.default_rng(1)
    mixing = random.normal(size=(4, 5)) / 100

    def encode(network, clips, masks, run):
        """A VAE whose latents are linear in the mean colours of 4 frames of 8 x 8 pixels."""
        return Encoded(
            [_cells(clip)[None] @ mixing[:3] + mixing[3] for clip in clips], np.arange(4)
        )

    monkeypatch.setattr(preview, "encode_clips", encode)
    vae = types.SimpleNamespace(strides=(4, 8, 8))
    model = types.SimpleNamespace(
        checkpoint=types.SimpleNamespace(configs=types.SimpleNamespace(vae=vae)),
        fit=lambda clip: Fit(*clip.shape[:3], (4, 8, 8)),
        on_mesh=contextlib.nullcontext,
        using=contextlib.nullcontext,
    )
    clip = np.repeat(random.integers(60, 70, (9, 40, 24, 1), dtype=np.uint8), 3, -1)
    fitted = Preview.fitted(model, clip, None)
    colourful = random.integers(0, 256, (9, 40, 24, 3), dtype=np.uint8)
    colours = fitted.colours(_cells(colourful) @ mixing[:3] + mixing[3])
    np.testing.assert_allclose(colours, _cells(colourful), atol=0.51)
    assert fitted.drawn(np.zeros((1, 5, 3, 5))).shape == (160, 96, 3)


def test_a_preview_shows_the_first_the_middle_and_the_last_frame():
    latents = np.array([-5.0, 10, 120, 30, 300])[:, None, None, None] * np.ones((1, 1, 2, 3))
    picture = Preview(np.eye(4, 3)).drawn(latents)
    shown = picture.reshape(160, 3, 320, 3)
    assert [np.unique(shown[:, number]).tolist() for number in range(3)] == [[0], [120], [255]]


def _cells(clip):
    parts = [clip[:1], *(clip[n : n + 4] for n in range(1, len(clip), 4))]
    means = np.stack([part.astype(float).mean(0) for part in parts])
    return means.reshape(len(parts), 5, 8, 3, 8, 3).mean((2, 4))


# --- the command --------------------------------------------------------------------------------


def test_who_may_reach_the_page():
    assert check_access("127.0.0.1", None) is check_access("::1", None) is None
    assert check_access("localhost", None) is None
    assert check_access("0.0.0.0", "me:a:b") == ("me", "a:b")
    with pytest.raises(InputError, match="--auth USER:PASSWORD"):
        check_access("0.0.0.0", None)
    with pytest.raises(InputError, match="USER:PASSWORD"):
        check_access("127.0.0.1", "me")


def test_the_command_loads_the_same_model(folder):
    given = "--ckpt_dir wan --vae v.pth --transformer a.gguf --transformer b.gguf --lora l:0.5"
    given += " --dtype bfloat16 --mesh frames=2 --no-spread_weights --weights int8 --vae_tiles 2"
    app = main._parser().parse_args(["app", *given.split()])
    files = ["--src_video=a", "--prompt=b", "--save_file=c"]
    edit = main._parser().parse_args(["edit", *model_arguments(app), *files])
    for name in "lora dtype mesh spread_weights weights vae_tiles attention weights_on".split():
        assert getattr(edit, name) == getattr(app, name), name
    assert edit.ckpt_dir == str(folder / "wan") and edit.vae == str(folder / "v.pth")
    assert edit.transformer == [str(folder / "a.gguf"), str(folder / "b.gguf")]
    demo = main._parser().parse_args(["app"])
    assert model_arguments(demo) == ["--ckpt_dir=demo"]
    remote = main._parser().parse_args(["app", "--ckpt_dir=gs://a/b"])
    assert model_arguments(remote) == ["--ckpt_dir=gs://a/b"]


def test_without_gradio(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    for name in ("page", "handlers"):
        monkeypatch.delitem(__import__("sys").modules, f"kvlock_jax.app.{name}", raising=False)
    assert main.main(["app"]) == 2
    assert capsys.readouterr().err == "error: kvlock app needs Gradio: pip install '.[app]'\n"
