"""A program is traced once for all processes, and again where anything it depends on differs."""

import dataclasses
import functools
import hashlib
import json
import os
import pickle
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvlock_jax.errors import ConfigError
from kvlock_jax.models.attention.sharded import gathered
from kvlock_jax.pipeline.placement import Placement, compiler_for
from kvlock_jax.runtime import compile_cache, trees
from kvlock_jax.runtime.compile_cache import CachingCompiler, Compiler


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pair:
    first: jax.Array
    second: jax.Array
    name: str = dataclasses.field(default="", metadata={"static": True})


trees.register((Pair,))
traces: list[str] = []


@functools.partial(jax.jit, static_argnames="times", donate_argnames="pair")
def scaled(pair, by, *, times=1):
    traces.append(pair.name)
    made = times * by.astype(pair.first.dtype) * pair.first
    return Pair(pair.second, made, "of " + pair.name), pair.first.sum()


@pytest.fixture
def start(tmp_path):
    """Makes the compiler that a new process would have."""

    def start():
        jax.clear_caches()
        traces.clear()
        return CachingCompiler(tmp_path / "programs")

    return start


def pair(shape=(3,), dtype=jnp.float32, name="a"):
    return Pair(
        jnp.arange(np.prod(shape), dtype=dtype).reshape(shape), jnp.ones(shape, dtype), name
    )


@pytest.mark.parametrize("kind", [Compiler, CachingCompiler])
def test_compile_prepares_the_program_that_call_runs(kind, tmp_path):
    jax.clear_caches()
    traces.clear()
    run = kind(tmp_path) if kind is CachingCompiler else kind()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), pair())
    shapes_of, total = run.compile(scaled, shapes, np.float32(2), times=3)
    assert shapes_of.name == "of a" and total.shape == ()
    argument = pair()
    got, total = run.call(scaled, argument, np.float32(2), times=3)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(lambda x: x.shape, shapes_of)
    np.testing.assert_array_equal(got.second, [0, 6, 12])
    assert total == 3 and traces == ["a"]
    assert argument.first.is_deleted() and argument.second.is_deleted()


def test_a_program_is_traced_once(start):
    start().call(scaled, pair(), 2.0 * np.float32(1), times=3)
    assert traces == ["a"]
    argument = pair()
    got, total = start().call(scaled, argument, np.float32(5), times=3)
    assert traces == []
    np.testing.assert_array_equal(got.second, [0, 15, 30])
    assert got.name == "of a" and total == 3 and argument.first.is_deleted()


@pytest.mark.parametrize(
    ("other", "times"),
    [
        (pair((4,)), 3),
        (pair((3, 1)), 3),
        (pair(dtype=jnp.bfloat16), 3),
        (pair(name="b"), 3),
        (pair(), 4),
    ],
)
def test_other_arguments_are_traced_again(other, times, start):
    start().call(scaled, pair(), np.float32(2), times=3)
    other = jax.tree.map(jnp.copy, other)
    wanted = times * 2 * np.asarray(other.first, np.float32)
    got, _ = start().call(scaled, other, np.float32(2), times=times)
    assert traces == [other.name]
    np.testing.assert_array_equal(np.asarray(got.second, np.float32), wanted)


def test_a_weakly_typed_number_is_traced_again(start):
    start().call(scaled, pair(), jnp.float32(2))
    start().call(scaled, pair(), jnp.asarray(2.0))
    assert traces == ["a"]


@pytest.mark.parametrize("setting", ["jax_default_matmul_precision", "jax_numpy_rank_promotion"])
def test_other_jax_settings_are_traced_again(setting, start):
    start().call(scaled, pair(), np.float32(2))
    before = getattr(jax.config, setting)
    jax.config.update(setting, "highest" if "precision" in setting else "raise")
    try:
        start().call(scaled, pair(), np.float32(2))
    finally:
        jax.config.update(setting, before)
        assert traces == ["a"]


def test_other_sources_are_traced_again(start, monkeypatch, tmp_path):
    start().call(scaled, pair(), np.float32(2))
    (tmp_path / "package" / "runtime").mkdir(parents=True)
    changed = tmp_path / "package" / "runtime" / "compile_cache.py"
    changed.write_text("# changed")
    monkeypatch.setattr(compile_cache, "__file__", str(changed))
    compile_cache._sources.cache_clear()
    start().call(scaled, pair(), np.float32(2))
    compile_cache._sources.cache_clear()
    assert traces == ["a"]


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[:-1], lambda b: b[:40] + b"?" + b[41:]]
)
def test_a_damaged_file_is_replaced(damage, start, tmp_path):
    start().call(scaled, pair(), np.float32(2))
    (path,) = (tmp_path / "programs").iterdir()
    path.write_bytes(damage(path.read_bytes()))
    got, _ = start().call(scaled, pair(), np.float32(2))
    np.testing.assert_array_equal(got.second, [0, 2, 4])
    assert traces == ["a"]
    start().call(scaled, pair(), np.float32(2))
    assert traces == []


def test_a_program_that_jax_does_not_export_runs(start, monkeypatch, tmp_path):
    def export(*args, **how):
        raise ValueError("Cannot serialize code with custom calls")

    monkeypatch.setattr(compile_cache.export, "export", export)
    argument = pair()
    got, _ = start().call(scaled, argument, np.float32(2))
    np.testing.assert_array_equal(got.second, [0, 2, 4])
    assert argument.first.is_deleted() and not (tmp_path / "programs").exists()


def test_a_program_runs_where_no_file_can_be_written(start, tmp_path):
    (tmp_path / "programs").write_text("a file")
    got, _ = start().call(scaled, pair(), np.float32(2))
    np.testing.assert_array_equal(got.second, [0, 2, 4])
    assert (tmp_path / "programs").read_text() == "a file"


def factory(times):
    @jax.jit
    def multiplied(x):
        return times * x

    return multiplied


NAMELESS = {
    "a closure": factory(np.float32(2)),
    "a lambda": jax.jit(lambda x: x),
    "a partial": functools.partial(scaled.__wrapped__, times=2),
    "a namesake": functools.wraps(scaled)(lambda x: x),
}


@pytest.mark.parametrize("program", NAMELESS.values(), ids=NAMELESS)
def test_a_function_without_a_name_of_its_own_is_refused(program, start):
    """Two closures of one factory shared a key, and the second ran the first's program."""
    with pytest.raises(ConfigError, match=r"cannot be cached: expected a function .* module"):
        start().call(program, np.float32(1))


@pytest.mark.parametrize("function", [lambda x: x, functools.partial(max, 1)])
def test_a_nameless_function_among_static_values_is_refused(function, start):
    with pytest.raises(ConfigError, match="cannot be cached"):
        start().call(scaled, pair(name=function), np.float32(2))


def test_functions_of_one_name_in_two_modules_are_two(monkeypatch):
    texts = []
    for name in ("one", "two"):
        module = types.ModuleType(name)
        exec("def f(x):\n    return x", vars(module))
        monkeypatch.setitem(sys.modules, name, module)
        texts.append(compile_cache.describe(module.f))
    assert texts == ["one:f", "two:f"]


class Planted:
    """Its pickle makes a folder when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def planted_pickle(path):
    body = pickle.dumps(Planted(path))
    return hashlib.sha256(body).digest() + body


def planted_with_header(path):
    body = pickle.dumps(Planted(path))
    header = {"sha256": hashlib.sha256(body).hexdigest(), "donated": [0, -1, "x", 99]}
    return json.dumps(header).encode() + b"\n" + body


@pytest.mark.parametrize("content", [planted_pickle, planted_with_header])
def test_a_planted_file_runs_nothing(content, start, tmp_path):
    start().call(scaled, pair(), np.float32(2))
    (path,) = (tmp_path / "programs").iterdir()
    path.write_bytes(content(tmp_path / "ran"))
    got, _ = start().call(scaled, pair(), np.float32(2))
    np.testing.assert_array_equal(got.second, [0, 2, 4])
    assert not (tmp_path / "ran").exists() and traces == ["a"]


def test_the_file_of_another_program_is_ignored(start, tmp_path):
    start().call(scaled, pair(), np.float32(2))
    (first,) = (tmp_path / "programs").iterdir()
    start().call(scaled, pair((4,)), np.float32(2))
    (second,) = set((tmp_path / "programs").iterdir()) - {first}
    first.write_bytes(second.read_bytes())
    got, _ = start().call(scaled, pair(), np.float32(2))
    np.testing.assert_array_equal(got.second, [0, 2, 4])


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_that_others_may_write_to_is_not_read(mode, start, tmp_path):
    start().call(scaled, pair(), np.float32(2))
    folder = tmp_path / "programs"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    folder.chmod(mode)
    with pytest.warns(UserWarning, match="others may write to it"):
        start().call(scaled, pair(), np.float32(2))
    assert traces == ["a"]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_folder_of_another_user_is_not_read(start, monkeypatch):
    start().call(scaled, pair(), np.float32(2))
    monkeypatch.setattr(compile_cache.os, "getuid", lambda: 12345)
    with pytest.warns(UserWarning, match="belongs to another user"):
        start().call(scaled, pair(), np.float32(2))
    assert traces == ["a"]


def test_a_new_folder_is_private(start, tmp_path):
    start().call(scaled, pair(), np.float32(2))
    assert (tmp_path / "programs").stat().st_mode & 0o777 == 0o700


def test_traces_stay_in_the_users_folder_whatever_jax_is_set_to(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "shared"))
    compiler = compiler_for(Placement(None, False, gathered), None)
    compiler.call(scaled, pair(), np.float32(2))
    assert list((tmp_path / "mine").rglob("traced/scaled-*"))
    assert not (tmp_path / "shared").exists()


def test_the_key_covers_the_parts_that_an_editable_install_keeps_elsewhere():
    names = {path.name for folder in compile_cache._folders() for path in folder.rglob("*.py")}
    assert {"compile_cache.py", "diffusers.py", "t2v_14b_480p.py"} <= names


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unregistered:
    """A result that `trees.register` does not know."""

    value: jax.Array


@jax.jit
def wrapped(x):
    return Unregistered(2 * x)


def test_a_result_of_an_unregistered_class_runs_and_is_not_kept(start, tmp_path):
    found = start().call(wrapped, np.float32(3))
    assert float(found.value) == 6
    folder = tmp_path / "programs"
    assert not folder.exists() or not list(folder.iterdir())
