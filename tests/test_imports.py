"""The house rules that can be read off the source: who imports whom, docstrings, sizes."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"kvlock_jax": "kvlock_jax", "convert": "kvlock_jax.convert"} | {
    "configs": "kvlock_jax.configs"
}

ROWS = (
    "errors",
    "shapes",
    "config",
    "configs",
    "sharding",
    "lock",
    "models",
    "text",
    "sampling",
    "checkpoint",
    "convert",
    "video",
    "demo",
    "metrics",
    "edit",
    "batch",
    "",  # the package itself
    "cli",
)
"""DESIGN.md section 1, with the rows that its table leaves out; each imports only rows above it."""

FOREIGN = {"torch", "diffusers", "transformers", "tensorflow"}
"""Nothing of the package needs them to run; Torch reads `.pth` originals, in `convert` only."""


def name_of(path: Path) -> str:
    """Dotted name under which a source file is imported."""
    top, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[top], *rest]).removesuffix(".__init__")


SOURCES = {name_of(p): p for top in FOLDERS for p in sorted((ROOT / top).rglob("*.py"))}


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, ...]]:
    """For every import statement's name, what it may mean: `a.b`, or `a` where `b` is an object."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name,) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            base = parts[: len(parts) - node.level + is_package] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{source}.{alias.name}", source) for alias in node.names)


def own_imports(module: str) -> set[str]:
    """The package's modules that a module imports, wherever in its code."""
    path = SOURCES[module]
    found = set()
    for meanings in imports(ast.parse(path.read_text()), module, path.stem == "__init__"):
        if meanings[0].split(".")[0] == "kvlock_jax":
            found.add(next(name for name in meanings if name in SOURCES))
    return found


def row(module: str) -> str:
    return module.removeprefix("kvlock_jax").removeprefix(".").split(".")[0]


def breaches(module: str, imported: set[str]) -> list[str]:
    """What `module` may not import of `imported`."""
    own = ROWS.index(row(module))
    return sorted(name for name in imported if ROWS.index(row(name)) >= own != row(name) and
                  row(name) != row(module))


@pytest.mark.parametrize(
    ("code", "module", "is_package", "expected"),
    [
        ("import a.b as c, d", "kvlock_jax.edit", False, [("a.b",), ("d",)]),
        ("from a import b", "kvlock_jax.edit", False, [("a.b", "a")]),
        ("from . import x", "kvlock_jax.lock.masks", False, [("kvlock_jax.lock.x",)]),
        ("from . import x", "kvlock_jax.lock", True, [("kvlock_jax.lock.x",)]),
        ("from ..errors import E", "kvlock_jax.lock.masks", False, [("kvlock_jax.errors.E",)]),
        ("def f():\n  if 1: import late", "kvlock_jax.edit", False, [("late",)]),
    ],
)
def test_imports_are_found(code, module, is_package, expected):
    found = imports(ast.parse(code), module, is_package)
    assert [m[: len(e)] for m, e in zip(found, expected, strict=True)] == expected
