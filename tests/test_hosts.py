"""Hosts that agree on inputs and outcomes, or end together: two of them as threads."""

import dataclasses
import json
import threading
import time

import batches
import fleet
import numpy as np
import pytest
from manifests import all_frames, failures, names

from kvlock_jax.batch import runner
from kvlock_jax.batch.reader import Reader
from kvlock_jax.batch.resume import agree_on_work, find_work
from kvlock_jax.errors import HostError, InputError, LostHostError
from kvlock_jax.media import encode
from kvlock_jax.parallel import agreement


def on(host: int) -> bool:
    return fleet.HOST.get() == host


# --- the protocol -----------------------------------------------------------------------------


def test_one_host_asks_nobody():
    assert agreement.ask("x", "text") == ["text"] and agreement.together("x", lambda: 3) == 3
    agreement.agree("x", {"seed": "1"})
    agreement.leave("the end")


def test_all_hosts_have_all_texts(monkeypatch):
    def work():
        return [agreement.ask("x", f"{n} of {fleet.HOST.get()}") for n in range(3)]

    want = [[f"{n} of {host}" for host in range(3)] for n in range(3)]
    assert fleet.run(monkeypatch, work, work, work) == [want] * 3


def test_different_values_are_named(monkeypatch):
    def work(seed, prompt):
        return lambda: agreement.agree("x", {"seed": seed, "prompt": prompt, "steps": "3"})

    assert fleet.run(monkeypatch, work("1", "a"), work("1", "a")) == [None, None]
    for error in fleet.run(monkeypatch, work("1", "a"), work("2", "b")):
        assert isinstance(error, InputError)
        assert str(error).startswith("the hosts were given different values of seed, prompt: ")


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failure_of_one_is_a_failure_of_all(monkeypatch, failing):
    def work():
        def half():
            if on(failing):
                raise KeyError("injected")
            return 3

        try:
            agreement.together("x", half)
        except Exception as error:
            # the next exchange works as if nothing had been
            return error, agreement.ask("y", "still here")
        return None

    for host, (error, texts) in enumerate(fleet.run(monkeypatch, work, work, work)):
        assert texts == ["still here"] * 3
        if host == failing:
            assert isinstance(error, KeyError)
        else:
            assert isinstance(error, HostError) and not isinstance(error, LostHostError)
            assert str(error) == f"host {failing} failed: KeyError: 'injected'"


@pytest.mark.parametrize("place", ["before", "within", "after"])
def test_a_failure_reaches_hosts_at_any_depth(monkeypatch, place):
    """The others are in an exchange or in a further `together` that this host never enters."""

    def fail(here):
        if on(1) and here == place:
            raise KeyError(place)

    def inner():
        fail("within")
        return agreement.ask("inner question", "x")

    def outer():
        fail("before")
        agreement.together("inner", inner)
        fail("after")
        return agreement.ask("outer question", "x")

    def work():
        try:
            agreement.together("outer", outer)
        except Exception as error:
            return str(error), agreement.ask("next", "x")

    for error, texts in fleet.run(monkeypatch, work, work, work):
        assert texts == ["x"] * 3 and error.endswith(f"'{place}'")


def test_a_host_that_is_stuck_in_a_program_is_given_up(monkeypatch):
    release = threading.Event()

    def program():
        if on(1):
            raise RuntimeError("out of memory")
        release.wait(30)

    start = time.monotonic()
    stuck, failed = fleet.run(monkeypatch, *[lambda: agreement.together("an edit", program)] * 2)
    assert time.monotonic() - start < 10
    release.set()
    assert isinstance(stuck, LostHostError)
    assert "host 1 failed (RuntimeError: out of memory)" in str(stuck)
    assert isinstance(failed, LostHostError) and "out of memory" in str(failed)


def test_a_host_that_is_only_slower_is_waited_for(monkeypatch):
    def program():
        time.sleep(0.1 if on(0) else 1)  # over the grace, which is for failures
        return 3

    assert fleet.run(monkeypatch, *[lambda: agreement.together("x", program)] * 2) == [3, 3]


def test_a_host_that_ends_is_named(monkeypatch):
    def ends():
        agreement._line().leave("no such file")

    def asks():
        agreement.ask("x", "")

    def works():
        agreement.together("x", lambda: time.sleep(30))

    for waits in (asks, works):
        error, _ = fleet.run(monkeypatch, waits, ends)
        assert isinstance(error, LostHostError)
        assert "host 1 ended (no such file)" in str(error)


def test_hosts_of_different_commands_do_not_begin(monkeypatch):
    for error in fleet.run(
        monkeypatch, lambda: agreement.ask("work", ""), lambda: agreement.ask("an edit", "")
    ):
        assert isinstance(error, LostHostError) and "with the same command" in str(error)


def test_an_interruption_ends_the_others(monkeypatch):
    def work():
        def half():
            if on(1):
                raise KeyboardInterrupt
            time.sleep(30)

        try:
            agreement.together("x", half)
        except KeyboardInterrupt:
            return "interrupted"

    error, other = fleet.run(monkeypatch, work, work)
    assert other == "interrupted" and "host 1 ended (KeyboardInterrupt" in str(error)


def test_digests_are_of_contents_however_they_lie():
    rows = np.broadcast_to(np.arange(3), (4, 3))
    assert agreement.digest(rows) == agreement.digest(rows.copy())
    found = {agreement.digest(x) for x in (rows, rows[:3], rows.T, rows.astype(np.float32))}
    found |= {agreement.digest(np.float32(1).reshape(())), agreement.digest(b"x")}
    assert len(found) == 6


# --- a manifest -------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path):
    """Four edits in groups of two."""
    batches.write_inputs(tmp_path)
    region = np.zeros((*batches.SHAPE[1:], 3), np.uint8)
    region[8:16, 8:24] = 255
    encode.write_png(tmp_path / "mask.png", region)
    row = {"src_mask": "mask.png", "prompt": "a star", "lossless": True}
    rows = [
        row | {"id": name, "src_video": f"{n // 2}.mkv", "save_file": f"{name}.mkv"}
        for n, name in enumerate("abcd")
    ]
    (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return batches.job(tmp_path / "edits.jsonl", tmp_path / "out", batch_size=2)


@pytest.fixture
def whole(job, tmp_path):
    batches.do(job.manifest, tmp_path / "whole", batch_size=2)
    return all_frames(tmp_path / "whole")


def host(job, run=batches.runner):
    """What a host does with the job, as `kvlock batch` would."""

    def work():
        try:
            planned = agree_on_work(find_work(job))
            if agreement.is_writer():
                return batches.run(planned, run)
            return runner.follow(planned, lambda: None, run)
        except Exception as error:
            agreement._line().leave(str(error))
            raise

    return work


def failing(where):
    """A runner that fails on host 1, before or after all hosts have run their programs."""

    def run(model, inputs, settings, keys):
        if where == "before" and on(1):
            raise RuntimeError("injected")
        results = agreement.together(
            "programs", lambda: batches.runner(model, inputs, settings, keys)
        )
        if where == "after" and on(1) and len(inputs) == 2:
            raise RuntimeError("injected")
        if where == "one" and on(1):
            results[0] = RuntimeError("injected")
        return results

    return run


@pytest.mark.parametrize("where", ["nowhere", "before", "after", "one"])
def test_no_edit_is_published_that_failed_elsewhere(monkeypatch, job, whole, tmp_path, where):
    first, second = fleet.run(monkeypatch, *[host(job, failing(where))] * 2)
    assert first == second
    done = {"nowhere": "abcd", "before": "", "after": "abcd", "one": "bd"}[where]
    found = all_frames(tmp_path / "out")
    assert found == {f"{name}.mkv": whole[f"{name}.mkv"] for name in done}
    assert (first.done, first.failed) == (len(done), 4 - len(done))
    if first.failed:
        reasons = {row["reason"] for row in failures(tmp_path / "out")}
        assert reasons == {"host 1 failed: RuntimeError: injected"}


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("an error", "host 1 failed: RuntimeError: injected"),
        ("other frames", "the hosts read different values of src_video"),
        ("another size", "the hosts read different values of src_video, src_mask"),
    ],
)
def test_an_edit_that_hosts_read_differently_fails_alone(
    monkeypatch, job, whole, tmp_path, what, reason
):
    make, inputs_of = Reader.__init__, Reader._inputs

    def init(self):
        make(self)
        self.host = fleet.HOST.get()  # its thread does not know it

    def reading(self, request):
        inputs = inputs_of(self, request)
        if self.host == 0 or request.id != "b":
            return inputs
        if what == "an error":
            raise RuntimeError("injected")
        source = inputs.source + np.uint8(1) if what == "other frames" else inputs.source[:, :16]
        return dataclasses.replace(inputs, source=source, mask=inputs.mask[:, : source.shape[1]])

    monkeypatch.setattr(Reader, "__init__", init)
    monkeypatch.setattr(Reader, "_inputs", reading)
    first, second = fleet.run(monkeypatch, *[host(job)] * 2)
    assert first == second and (first.done, first.failed) == (3, 1)
    (row,) = failures(tmp_path / "out")
    assert (row["id"], row["reason"]) == ("b", reason)
    assert all_frames(tmp_path / "out") == {n: whole[n] for n in ("a.mkv", "c.mkv", "d.mkv")}


def test_a_host_that_is_lost_ends_the_batch(monkeypatch, job, whole, tmp_path):
    """What was made before is written; the group that was running fails; the next run goes on."""
    release = threading.Event()

    def run(model, inputs, settings, keys):
        if run.broken and inputs[0].source is not run.first.setdefault(on(0), inputs[0].source):
            if on(1):
                raise RuntimeError("injected")
            release.wait(30)
        return batches.runner(model, inputs, settings, keys)

    run.broken, run.first = True, {}
    first, second = fleet.run(monkeypatch, *[host(job, run)] * 2)
    release.set()
    for error in (first, second):
        assert isinstance(error, LostHostError) and "RuntimeError: injected" in str(error)
    assert all_frames(tmp_path / "out") == {n: whole[n] for n in ("a.mkv", "b.mkv")}
    rows = failures(tmp_path / "out")
    assert [row["id"] for row in rows] == ["c", "d"]
    assert all("RuntimeError: injected" in row["reason"] for row in rows)
    run.broken = False
    first, second = fleet.run(monkeypatch, *[host(job, run)] * 2)
    assert first == second and (first.done, first.skipped) == (2, 2)
    assert all_frames(tmp_path / "out") == whole and "failed.jsonl" not in names(tmp_path / "out")


def test_a_result_that_the_first_host_cannot_write_is_a_failure_on_all(monkeypatch, job, tmp_path):
    (tmp_path / "out" / "b.mkv").mkdir(parents=True)
    first, second = fleet.run(monkeypatch, *[host(job)] * 2)
    assert first == second and (first.done, first.failed) == (3, 1)
    assert first.failures == str(tmp_path / "out" / "failed.jsonl")


def test_a_first_host_that_cannot_begin_ends_the_others(monkeypatch, job, tmp_path):
    (tmp_path / "out").touch()
    first, second = fleet.run(monkeypatch, *[host(job)] * 2)
    assert "out: cannot be made" in str(first)
    assert isinstance(second, LostHostError) and "out: cannot be made" in str(second)


def test_a_model_that_one_host_cannot_load_ends_all(monkeypatch, job, tmp_path):
    def loads():
        if on(1):
            raise InputError("damaged")

    def work():
        planned = agree_on_work(find_work(job))
        end = runner.run if agreement.is_writer() else runner.follow
        return end(planned, loads, batches.runner)

    first, second = fleet.run(monkeypatch, work, work)
    assert str(first) == "host 1 failed: damaged" and str(second) == "damaged"
    assert all_frames(tmp_path / "out") == {}


def test_edits_that_the_first_host_finds_finished_are_so_for_all(monkeypatch, job, tmp_path):
    batches.run(find_work(job))
    (tmp_path / "out" / "b.json").unlink()
    other = dataclasses.replace(job, save_dir=str(tmp_path / "elsewhere"))
    plans = fleet.run(
        monkeypatch, *(lambda j=j: agree_on_work(find_work(j)).finished for j in (job, other))
    )
    assert plans == [frozenset("acd")] * 2


def test_hosts_that_see_other_files_do_not_begin(monkeypatch, job, tmp_path):
    (tmp_path / "other.jsonl").write_text((tmp_path / "edits.jsonl").read_text().splitlines()[0])
    other = dataclasses.replace(job, manifest=str(tmp_path / "other.jsonl"))
    works = (lambda j=j: agree_on_work(find_work(j)) for j in (job, other))
    for error in fleet.run(monkeypatch, *works):
        assert isinstance(error, InputError) and "do not see the same files" in str(error)
