"""What several hosts agree on, as one of two finds it: what the other one says is made up."""

import json

import batches
import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from kvlock_jax.batch import resume, runner
from kvlock_jax.batch.resume import find_work
from kvlock_jax.errors import InputError
from kvlock_jax.media import encode
from kvlock_jax.parallel import agreement


class Other:
    """A second host. It says what this one says, save to question `deaf`, counted from 0."""

    def __init__(self, monkeypatch):
        self.deaf, self.asked, self.first = None, 0, None
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(multihost_utils, "process_allgather", self._gather)
        monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", self._broadcast)

    def _gather(self, number):
        own = number if self.asked != self.deaf else number ^ np.uint32(1)
        self.asked += 1
        return np.stack([number, own])

    def _broadcast(self, found):
        return found if self.first is None else self.first


@pytest.fixture
def other(monkeypatch):
    return Other(monkeypatch)


@pytest.fixture
def work(tmp_path):
    """Two edits, the mask of both one image for all frames."""
    batches.write_inputs(tmp_path)
    region = np.zeros((*batches.SHAPE[1:], 3), np.uint8)
    region[8:16, 8:24] = 255
    encode.write_png(tmp_path / "mask.png", region)
    row = {"src_video": "0.mkv", "src_mask": "mask.png", "prompt": "a star"}
    (tmp_path / "edits.jsonl").write_text(
        "\n".join(json.dumps(row | {"id": name}) for name in "ab")
    )
    return find_work(batches.job(tmp_path / "edits.jsonl", tmp_path / "out", batch_size=2))


def test_contents_are_the_same_however_they_are_laid_out(other, monkeypatch):
    rows = np.broadcast_to(np.arange(3), (4, 3))
    told = []
    monkeypatch.setattr(
        multihost_utils, "process_allgather", lambda number: told.append(number) or np.zeros(2)
    )
    assert (
        agreement.all_agree(rows)
        and agreement.all_agree(rows.copy())
        and agreement.all_agree(rows[:3])
    )
    assert told[0] == told[1] != told[2]


def test_an_edit_that_hosts_read_differently_fails_alone(other, work):
    other.deaf = 0
    ended = {}
    summary = batches.run(work, on_end=lambda request, failure: ended.update({request.id: failure}))
    assert (summary.done, summary.failed, other.asked) == (1, 1, 2)
    assert ended["a"].reason == "not all hosts could read the same of it" and ended["b"] is None


def test_both_kinds_of_host_ask_the_same_questions(other, work):
    assert batches.run(work).done == 2
    asked = other.asked
    assert runner.follow(work, lambda: None, batches.runner).done == 2
    assert other.asked == 2 * asked


def test_what_the_first_host_finds_finished_is_so_for_all(other, work):
    assert resume.agree_on_work(work) == work
    other.first = np.array([False, True])
    assert resume.agree_on_work(work).finished == frozenset({"b"})


def test_hosts_that_see_other_files_do_not_begin(other, work):
    other.deaf = 0
    with pytest.raises(InputError, match="do not see the same files"):
        resume.agree_on_work(work)


def test_one_host_asks_nobody(work):
    assert resume.agree_on_work(work) is work and agreement.all_agree(b"")
