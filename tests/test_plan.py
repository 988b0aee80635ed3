"""Which edits run together, and on which machine."""

import json
import random

import pytest

from kvlock_jax.batch.grouping import group, shard, shared_settings
from kvlock_jax.batch.manifest import Common, Failure, Manifest, parse
from kvlock_jax.settings.schema import run_config


def requests(*rows: dict):
    filled = [
        {"prompt": f"p{n}", "src_video": "a", "bbox": "0,0,1,1"} | r for n, r in enumerate(rows)
    ]
    content = "\n".join(map(json.dumps, filled)).encode()
    manifest = parse(content, "/", Common(run_config("kvlock")))
    assert not manifest.failures, manifest.failures
    return manifest.requests


def grouped(rows, size, shape=lambda request: None):
    return [[r.line for r in group] for group in group(requests(*rows), shape, size)]


def test_edits_of_one_source_stand_side_by_side():
    rows = [{"src_video": v} for v in "abacb"]
    assert grouped(rows, 2) == [[1, 3], [2, 5], [4]]
    assert grouped(rows, 5) == [[1, 3, 2, 5, 4]]
    assert grouped(rows, 1) == [[1], [3], [2], [5], [4]]
    rows = [{"src_video": v, "noise_id": n} for v, n in ("ax", "by", "ay", "ax")]
    assert grouped(rows, 4) == [[1, 4, 3, 2]]


@pytest.mark.parametrize(
    "row",
    [
        {"negative_prompt": "x"},
        {"src_prompt": "x"},
        {"base_seed": 3},
        {"bbox": "1,1,2,2"},
        {"src_video": "b"},
        {"invert_mask": True},
        {"dilate": 1},
        {"composite": True},
        {"size": "32*32"},
        {"frame_num": 3},
        {"lossless": True},
        {"config.kvlock.tau": 0.01},  # as the preset has it
    ],
)
def test_what_edits_of_a_batch_may_differ_in(row):
    assert grouped([{}, row], 2) == [[1, 2]]


@pytest.mark.parametrize(
    "row",
    [
        {"steps": 3},
        {"shift": 3.0},
        {"solver": "euler"},
        {"guidance_scale": 2.0},
        {"preset": "cfg"},
        {"config.kvlock.tau": 0.02},
        {"context_scale": 0.5},
        {"show_masked": True},
        {"src_ref_images": "a.png"},
    ],
)
def test_what_they_have_in_common(row):
    assert grouped([{}, row, {}], 2) == [[1, 3], [2]]


def test_shapes_stay_apart():
    rows = [{"src_video": v} for v in "abab"]
    assert grouped(rows, 4, lambda r: r.source) == [[1, 3], [2, 4]]


def test_a_preset_is_what_it_stands_for():
    named, spelled = requests({"preset": "kvlock"}, {"preset": "hard_lock"})
    assert shared_settings(named.settings) != shared_settings(spelled.settings)
    assert shared_settings(named.settings).preset == shared_settings(spelled.settings).preset == ""


def test_groups_hold_every_edit_once():
    draw = random.Random(0)
    rows = [
        {
            "src_video": draw.choice("abcde"),
            "steps": draw.choice([2, 3]),
            "frame_num": draw.choice([1, 5]),
        }
        for _ in range(60)
    ]
    for size in (1, 3, 8):
        groups = grouped(rows, size, lambda r: r.source in "/a/b")
        assert sorted(line for group in groups for line in group) == list(range(1, 61))
        assert max(map(len, groups)) <= size
        assert groups == grouped(rows, size, lambda r: r.source in "/a/b")


def test_shards_split_by_source():
    manifest = Manifest(
        requests(*({"src_video": v} for v in "aaabbcabd")),
        [Failure(line, None, "bad") for line in (10, 11, 12, 13)],
    )
    parts = [shard(manifest, index, 3) for index in range(3)]
    assert [[r.line for r in part.requests] for part in parts] == [[1, 2, 3, 7], [4, 5, 8], [6, 9]]
    assert [[f.line for f in part.failures] for part in parts] == [[10, 13], [11], [12]]
    whole = shard(manifest, 0, 1)
    assert whole.requests == manifest.requests and whole.failures == manifest.failures
