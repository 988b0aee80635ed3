"""A program is traced once for all processes, and again where anything of it is another."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvlock_jax.runtime import compile_cache
from kvlock_jax.runtime.compile_cache import CachingCompiler, Compiler


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pair:
    first: jax.Array
    second: jax.Array
    name: str = dataclasses.field(default="", metadata={"static": True})


traces: list[str] = []


@functools.partial(jax.jit, static_argnames="times", donate_argnames="pair")
def scaled(pair, by, *, times=1):
    traces.append(pair.name)
    made = times * by.astype(pair.first.dtype) * pair.first
    return Pair(pair.second, made, "of " + pair.name), pair.first.sum()


@pytest.fixture
def kept(tmp_path):
    """Makes what a new process would have."""

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
def test_what_is_compiled_ahead_is_what_runs(kind, tmp_path):
    jax.clear_caches()
    traces.clear()
    run = kind(tmp_path) if kind is CachingCompiler else kind()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), pair())
    told, total = run.compile(scaled, shapes, np.float32(2), times=3)
    assert told.name == "of a" and total.shape == ()
    given = pair()
    found, total = run.call(scaled, given, np.float32(2), times=3)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(lambda x: x.shape, told)
    np.testing.assert_array_equal(found.second, [0, 6, 12])
    assert total == 3 and traces == ["a"]
    assert given.first.is_deleted() and given.second.is_deleted()


def test_a_program_is_traced_once(kept):
    kept().call(scaled, pair(), 2.0 * np.float32(1), times=3)
    assert traces == ["a"]
    given = pair()
    found, total = kept().call(scaled, given, np.float32(5), times=3)
    assert traces == []
    np.testing.assert_array_equal(found.second, [0, 15, 30])
    assert found.name == "of a" and total == 3 and given.first.is_deleted()


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
def test_what_is_another_program_is_traced(other, times, kept):
    kept().call(scaled, pair(), np.float32(2), times=3)
    other = jax.tree.map(jnp.copy, other)
    wanted = times * 2 * np.asarray(other.first, np.float32)
    found, _ = kept().call(scaled, other, np.float32(2), times=times)
    assert traces == [other.name]
    np.testing.assert_array_equal(np.asarray(found.second, np.float32), wanted)


def test_a_namesake_is_another_program(kept):
    @functools.partial(jax.jit, static_argnames="times")
    def scaled_(pair, by, *, times=1):
        return pair.second, times

    scaled_.__wrapped__.__name__ = scaled_.__name__ = "scaled"
    programs = kept()
    compile_cache.call(scaled, pair(), np.float32(2), times=7)
    for start in (programs, kept()):
        _, times = start.call(scaled_, pair(), np.float32(2), times=7)
        assert times == 7  # and not the sum


def test_a_number_without_a_type_of_its_own_makes_another_program(kept):
    kept().call(scaled, pair(), jnp.float32(2))
    kept().call(scaled, pair(), jnp.asarray(2.0))
    assert traces == ["a"]


@pytest.mark.parametrize("setting", ["jax_default_matmul_precision", "jax_numpy_rank_promotion"])
def test_jaxs_settings_make_another_program(setting, kept):
    kept().call(scaled, pair(), np.float32(2))
    before = getattr(jax.config, setting)
    jax.config.update(setting, "highest" if "precision" in setting else "raise")
    try:
        kept().call(scaled, pair(), np.float32(2))
    finally:
        jax.config.update(setting, before)
        assert traces == ["a"]


def test_other_sources_make_another_program(kept, monkeypatch, tmp_path):
    kept().call(scaled, pair(), np.float32(2))
    (tmp_path / "package" / "runtime").mkdir(parents=True)
    changed = tmp_path / "package" / "runtime" / "compile_cache.py"
    changed.write_text("# changed")
    monkeypatch.setattr(compile_cache, "__file__", str(changed))
    compile_cache._code.cache_clear()
    kept().call(scaled, pair(), np.float32(2))
    compile_cache._code.cache_clear()
    assert traces == ["a"]


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[:-1], lambda b: b[:40] + b"?" + b[41:]]
)
def test_a_damaged_file_is_made_again(damage, kept, tmp_path):
    kept().call(scaled, pair(), np.float32(2))
    (path,) = (tmp_path / "programs").iterdir()
    path.write_bytes(damage(path.read_bytes()))
    found, _ = kept().call(scaled, pair(), np.float32(2))
    np.testing.assert_array_equal(found.second, [0, 2, 4])
    assert traces == ["a"]
    kept().call(scaled, pair(), np.float32(2))
    assert traces == []


def test_what_jax_does_not_export_runs(kept, monkeypatch, tmp_path):
    def export(*args, **how):
        raise ValueError("Cannot serialize code with custom calls")

    monkeypatch.setattr(compile_cache.export, "export", export)
    given = pair()
    found, _ = kept().call(scaled, given, np.float32(2))
    np.testing.assert_array_equal(found.second, [0, 2, 4])
    assert given.first.is_deleted() and not (tmp_path / "programs").exists()


def test_where_nothing_can_be_kept_it_runs(kept, tmp_path):
    (tmp_path / "programs").write_text("a file")
    found, _ = kept().call(scaled, pair(), np.float32(2))
    np.testing.assert_array_equal(found.second, [0, 2, 4])
    assert (tmp_path / "programs").read_text() == "a file"
