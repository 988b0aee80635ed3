"""Lines of manifests: what they ask for, and every way in which one can be wrong."""

import hashlib
import json
import re

import pytest

from kvlock_jax.batch.manifest import KEYS, Common, Failure, parse, reason, resolved
from kvlock_jax.errors import InputError
from kvlock_jax.pipeline import overrides
from kvlock_jax.settings.schema import run_config

RUN = run_config("kvlock_anchor", steps=9)
GOOD = {"src_video": "a.mp4", "src_mask": "m.npy", "prompt": "a star"}


def lines(*rows: dict | str | bytes) -> bytes:
    texts = [row if isinstance(row, (str, bytes)) else json.dumps(row) for row in rows]
    return b"\n".join(t.encode() if isinstance(t, str) else t for t in texts)


def read(*rows, folder="/data", given=None):
    return parse(lines(*rows), folder, Common(RUN, given or {}))


def one(row, **rest):
    manifest = read(row, **rest)
    assert manifest.failures == [], manifest.failures
    return manifest.requests[0]


def why(*rows) -> str:
    """The reason why the last row fails, and it alone."""
    manifest = read(*rows)
    assert [f.line for f in manifest.failures] == [len(rows)], manifest.failures
    return manifest.failures[0].reason


# --- what a line asks for ---------------------------------------------------------------------


def test_a_line():
    found = one(GOOD | {"id": "first"})
    assert (found.id, found.line, found.prompt) == ("first", 1, "a star")
    assert (found.source, found.mask, found.references) == ("/data/a.mp4", "/data/m.npy", ())
    assert (found.save_file, found.sidecar, found.lossless) == ("first.mp4", "first.json", False)
    assert found.files == ("/data/a.mp4", "/data/m.npy")
    assert found.given == GOOD | {"id": "first"}
    assert found.settings.sample.steps == 9 and found.settings.preset == "kvlock_anchor"


def test_a_line_says_all_that_a_command_can():
    found = one(
        {
            "video": "b/../a.mp4",
            "bbox": "1,2,3,4",
            "prompt": "a star",
            "src_ref_images": ["r.png", "/x/s.png"],
            "src_prompt": "one",
            "negative_prompt": "two",
            "size": "64*32",
            "fit": "pad",
            "frame_num": 5,
            "steps": 3,
            "sample_shift": 2,
            "sample_guide_scale": 1.5,
            "sample_solver": "euler",
            "base_seed": 7,
            "preset": "kvlock",
            "invert_mask": True,
            "dilate": 2,
            "composite": True,
            "context_scale": 0.5,
            "show_masked": True,
            "config.kvlock.tau": 0.5,
            "config.sample.steps": 4,
            "save_file": "out.mkv",
            "lossless": True,
        }
    )
    assert (found.source, found.mask) == ("/data/a.mp4", (1, 2, 3, 4))
    assert found.references == ("/data/r.png", "/x/s.png")
    settings = found.settings
    assert (settings.sample.steps, settings.lock.tau, settings.preset) == (3, 0.5, "kvlock")
    assert (settings.sample.shift, settings.sample.guidance_scale) == (2.0, 1.5)
    assert (settings.sample.solver, settings.sample.seed) == ("euler", 7)
    assert settings.edit.height_width == (32, 64) and settings.edit.fit == "pad"
    assert settings.edit.frame_num == 5
    assert settings.edit.dilate == 2 and settings.edit.invert_mask and settings.edit.composite
    assert settings.edit.context_scale == 0.5 and settings.edit.show_masked
    assert (settings.edit.source_prompt, settings.edit.negative_prompt) == ("one", "two")
    assert (found.save_file, found.sidecar, found.lossless) == ("out.mkv", "out.json", True)
    assert RUN.sample.steps == 9 and RUN.kvlock.tau is None  # not changed by a line


def test_every_setting_has_a_key():
    names = {name for _, _, names, _ in overrides.SETTINGS for name in names.split()}
    assert names <= {name for names in KEYS.values() for name in names.split()}


def test_what_the_command_says_holds_where_the_line_does_not():
    values = {"video": "x", "src_video": "v.mp4", "bbox": "0,0,8,8", "prompt": "a circle"}
    given = resolved(values | {"lossless": True}, "/flags")
    found = one({"id": 1}, given=given)
    assert (found.source, found.mask) == ("/flags/v.mp4", (0, 0, 8, 8))
    assert (found.id, found.prompt, found.lossless) == ("1", "a circle", True)
    # a mask of its own takes the place of the command's box, and the other way round
    found = one(GOOD | {"lossless": False, "prompt": "p"}, given=given)
    assert (found.mask, found.prompt, found.lossless) == ("/data/m.npy", "p", False)
    box = {k: v for k, v in GOOD.items() if k != "src_mask"} | {"bbox": [1, 2, 3, 4]}
    assert one(box, given=resolved({"src_mask": "m.mp4"}, "/flags")).mask == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("path", "folder", "source"),
    [
        ("/v/a.mp4", "/data", "/v/a.mp4"),
        ("c/a.mp4", "gs://bucket/set", "gs://bucket/set/c/a.mp4"),
        ("../a.mp4", "memory://one/two", "memory://one/a.mp4"),
        ("a.mp4", "memory://", "memory://a.mp4"),
        ("s3://b/a.mp4", "/data", "s3://b/a.mp4"),
        ("/v/a.mp4", "gs://bucket/set", "/v/a.mp4"),
        ("file:///v/a.mp4", "gs://bucket/set", "/v/a.mp4"),
    ],
)
def test_paths(path, folder, source):
    assert one(GOOD | {"src_video": path}, folder=folder).source == source


def test_blanks_around_names_and_numbers_do_not_count():
    row = GOOD | {
        "src_video": " a.mp4 ",
        "src_mask": None,
        "bbox": " 1, 2 ,3 , 4",
        "src_ref_images": "r.png, s.png ,",
        "size": "64 * 32",
    }
    found = one(row)
    assert (found.source, found.mask) == ("/data/a.mp4", (1, 2, 3, 4))
    assert found.references == ("/data/r.png", "/data/s.png")
    assert found.settings.edit.height_width == (32, 64)
    listed = one(GOOD | {"src_ref_images": [" r.png", "s, t.png", ""]})
    assert listed.references == ("/data/r.png", "/data/s, t.png")


@pytest.mark.parametrize(
    "bbox",
    [
        "0:1,2,3,4 8:5,6,7,8",
        ["0:1,2,3,4", "8:5,6,7,8"],
        {"8": [5, 6, 7, 8], "0": [1, 2, 3, 4]},
    ],
)
def test_boxes_of_some_frames(bbox):
    found = one(GOOD | {"src_mask": None, "bbox": bbox})
    assert found.mask == {0: (1, 2, 3, 4), 8: (5, 6, 7, 8)}
    assert found.files == ("/data/a.mp4",)


def test_null_and_empty_lines_say_nothing():
    found = one(GOOD | {"bbox": None, "id": None, "steps": None, "lossless": None})
    assert found.settings.sample.steps == 9 and found.id == one(GOOD).id
    manifest = parse(b"\xef\xbb\xbf\n  \r\n" + lines(GOOD) + b"\r\n\n", "/", Common(RUN))
    assert [r.line for r in manifest.requests] == [3] and not manifest.failures


def test_a_string_may_hold_what_ends_lines_elsewhere():
    text = json.dumps(GOOD | {"prompt": "a\u2028b\x85c"}, ensure_ascii=False)
    assert one(text).prompt == "a\u2028b\x85c"


def test_an_id_is_made_of_the_content():
    derived = one(GOOD).id
    content = json.dumps(GOOD, sort_keys=True).encode()
    assert derived == f"edit-{hashlib.sha256(content).hexdigest()[:16]}"
    others = [
        dict(reversed(GOOD.items())),
        json.dumps(GOOD, indent=None, separators=(" ,  ", " : ")),
        {"video": "a.mp4", "mask": "m.npy", "prompt": "a star"},
    ]
    assert [one(row).id for row in others] == [derived] * 3
    manifest = read({"prompt": "?"}, GOOD | {"prompt": "b"}, GOOD)
    assert manifest.requests[1].id == derived  # wherever it stands
    assert one(GOOD | {"prompt": "a stars"}).id != derived
    assert one(GOOD, given={"lossless": True}).id == derived  # of the line alone


# --- the whole file ---------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_a_byte_order_mark_tells_the_encoding(encoding):
    text = "\r\n".join(json.dumps(GOOD | {"id": n, "prompt": "ein Stern \u2605"}) for n in (1, 2))
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    manifest = parse((mark + text).encode(encoding), "/data", Common(RUN))
    assert [r.prompt for r in manifest.requests] == ["ein Stern \u2605"] * 2
    assert not manifest.failures


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (json.dumps([GOOD, GOOD]).encode(), "the manifest is a JSON array: .* one object on each"),
        (b"[\n" + lines(GOOD) + b",\n" + lines(GOOD) + b"\n]\n", "the manifest is a JSON array"),
        (json.dumps(GOOD, indent=2).encode(), "spreads a JSON object over several lines"),
        (
            b"src_video,src_mask,prompt\na.mp4,m.npy,a star\n",
            "no line .* is a JSON object: .*src_v",
        ),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "is not a text in UTF-8, it has zero bytes"),
        (json.dumps(GOOD).encode("utf-16-le"), "is not a text in UTF-8, it has zero bytes"),
        (b"\xff\xfe" + b"{\x00}", "the manifest is not UTF-16, as it says"),
    ],
)
def test_what_is_no_manifest_is_one_error(content, says):
    with pytest.raises(InputError, match=says) as caught:
        parse(content, "/data", Common(RUN))
    assert "\n" not in str(caught.value)


# --- broken lines ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "not JSON: .* at column 2"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        ('{"prompt": "\\ud800"}', "not UTF-8: surrogates"),
        ("[" * 100_000, "not JSON that can be read"),
        ('{"steps": ' + "9" * 5000 + "}", "not JSON that can be read"),
        ("[1, 2]", r"must be a JSON object, found \[1, 2\]"),
        ('{"prompt": "a", "prompt": "b"}', "key 'prompt' appears twice"),
        (GOOD | {"promt": "a"}, r"unknown key 'promt'; did you mean prompt"),
        (GOOD | {"sample_step": 3}, r"unknown key 'sample_step'; did you mean sample_steps or"),
        (
            GOOD | {"zzzzz": 3},
            r"unknown key 'zzzzz'; a line has src_video, src_mask, .*config\.KEY",
        ),
        (GOOD | {"steps": 3, "sample_steps": 3}, "'sample_steps' repeats a key .*steps"),
        (GOOD | {"ckpt_dir": "demo"}, "ckpt_dir is for all lines: .* --ckpt_dir"),
        (GOOD | {"steps": "3"}, 'sample_steps must be a whole number, found "3"'),
        (GOOD | {"steps": 3.5}, r"sample_steps must be a whole number, found 3\.5"),
        (GOOD | {"steps": True}, "sample_steps must be a whole number, found true"),
        (GOOD | {"steps": 0}, r"SampleConfig\.steps must be at least 1"),
        (GOOD | {"shift": "1"}, "sample_shift must be a number"),
        (GOOD | {"composite": 1}, "composite must be true or false, found 1"),
        (GOOD | {"prompt": 1}, "prompt must be a string"),
        (GOOD | {"prompt": " "}, "prompt is missing"),
        (GOOD | {"preset": "kvlok"}, "no preset 'kvlok'"),
        (GOOD | {"config.kvlock.tua": 1}, r"unknown key config\.kvlock\.tua: kvlock has .*tau"),
        (GOOD | {"config.kvlock.tau": "x"}, r"LockConfig\.tau must be float, found 'x'"),
        (GOOD | {"config.kvlock.tau": [1]}, r"config\.kvlock\.tau must be a .*value, found \[1\]"),
        (GOOD | {"config.kvlock": 1}, r"config\.kvlock is no setting: name one of its .*tau"),
        (GOOD | {"config.preset": 1}, "no preset 1"),
        (GOOD | {"bbox": "0,0,8,8"}, "either src_mask or bbox, found both"),
        (GOOD | {"src_mask": None}, "src_mask is missing, and so is bbox"),
        (GOOD | {"src_mask": None, "bbox": [1, 2, 3]}, r"bbox must be four .*found \[1, 2, 3\]"),
        (GOOD | {"src_mask": None, "bbox": [1, 2, 3, 4.5]}, "bbox must be four whole numbers"),
        (GOOD | {"src_mask": None, "bbox": "a,2,3,4"}, "bbox must be four whole numbers"),
        (GOOD | {"src_video": None}, "src_video is missing"),
        (GOOD | {"src_video": 3}, "src_video must be a string, found 3"),
        (GOOD | {"src_ref_images": [1]}, r"src_ref_images must be a list of files.*\[1\]"),
        (GOOD | {"id": "../x"}, r"id '\.\./x' must not .* start with a dot"),
        (GOOD | {"id": "a/b"}, "id 'a/b' must be a plain name, without '/'"),
        (GOOD | {"id": "a\\b"}, "must be a plain name"),
        (GOOD | {"id": ""}, "id '' must not be empty"),
        (GOOD | {"id": 1.5}, r"id must be a string or a whole number, found 1\.5"),
        (GOOD | {"id": True}, "id must be a string or a whole number"),
        (GOOD | {"id": "é" * 101}, "at most 200 bytes"),
        (GOOD | {"save_file": "../x.mp4"}, "save_file '../x.mp4' must not"),
        (GOOD | {"save_file": "/x.mp4"}, "save_file '/x.mp4' must be a plain name"),
        (GOOD | {"save_file": "x.avi"}, r"save_file 'x\.avi' must end in \.mp4"),
        (GOOD | {"save_file": ".mp4"}, "start with a dot"),
        (GOOD | {"save_file": "x\n.mp4"}, "must be a plain name"),
        (GOOD | {"frame_num": 10**30, "config.sample.shift": 10**400}, "OverflowError"),
    ],
)
def test_a_bad_line(row, says):
    found = why(GOOD, row)
    assert re.search(says, found), found
    assert "\n" not in found


def test_of_two_alike_the_second_fails():
    first, second = GOOD | {"id": "x"}, GOOD | {"id": "x", "prompt": "other"}
    assert why(first, GOOD, second) == "id 'x' is that of line 1 already"
    assert "is that of line 2 already (equal lines need different ids)" in why("", GOOD, GOOD)
    named = {"save_file": "Out.mp4"}
    for other in ("Out.mp4", "out.mp4", "Out.mkv"):
        says = why(GOOD | named, GOOD | {"save_file": other, "steps": 1})
        assert says == f"save_file '{other}' is that of line 1 already, case and suffix apart"
    assert "that of line 1" in why(GOOD | {"save_file": "a.mp4"}, GOOD | {"id": "a"})
    composed, decomposed = GOOD | {"id": "\u00e9"}, GOOD | {"id": "e\u0301"}
    assert "that of line 1" in why(composed, decomposed)


def test_a_failure_has_the_id_of_its_line():
    row = GOOD | {"id": "mine", "steps": "many"}
    assert read(row).failures[0].id == "mine"
    assert read({"id": "mine", "what": 1}).failures[0].id == "mine"
    assert read({"prompt": "a"}).failures[0].id.startswith("edit-")
    assert read("{", GOOD).failures[0].id is None


def test_no_line_stops_the_others():
    manifest = read("{", GOOD, {"id": "../x"}, GOOD | {"id": "y"})
    assert [r.line for r in manifest.requests] == [2, 4]
    assert [f.line for f in manifest.failures] == [1, 3]
    assert all(isinstance(f, Failure) for f in manifest.failures)


def test_reasons_are_one_line():
    assert reason(InputError("a\n  b")) == "a b"
    assert reason(ValueError("a\nb")) == "ValueError: a b"
    assert reason(KeyError("x")) == "KeyError: 'x'"
