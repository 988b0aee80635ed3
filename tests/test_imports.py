"""The house rules that can be read off the source: who imports whom, docstrings, sizes."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "kvlock_jax": "kvlock_jax",
    "convert": "kvlock_jax.convert",
    "configs": "kvlock_jax.configs",
}

ROWS = (
    "errors",
    "shapes",
    "grid",
    "settings",
    "configs",
    "parallel",
    "runtime",
    "lock",
    "models",
    "sampling",
    "checkpoints",
    "convert",
    "media",
    "masks",
    "demo",
    "evaluate",
    "pipeline",
    "",  # the package itself
    "estimate",
    "batch",
    "app",
    "cli",
)
"""The folders of the package, and the modules at its top; each imports only rows above it."""

ORDER = {
    "settings": "fields schema",
    "parallel": "padding mesh sharding processes agreement",
    "runtime": "clock identity trees compile_cache",
    "models": "layout small family precision linear attention norms text vae wan",
    "checkpoints": "files store registry metadata format",
    "media": "storage folders footage orientation colour timing containers pictures heif room "
    "memory deinterlace sound decode encode fit timeline masks",
    "masks": "keyframes between motion appearance track follow",
    "pipeline": "settings overrides inputs load hosts pieces encode seeds stages background "
    "placement api report outputs",
    "batch": "lines manifest grouping fingerprint resume lease ledger reader publisher runner "
    "replica cluster",
    "app": "clips uploads marks views request curves preview jobs edits session fragments handlers "
    "page",
    "cli": "terminal flags loading edit fleet batch mask app convert info main",
}
"""The same within folders where the order tells how a run goes."""

FOREIGN = {"torch", "diffusers", "transformers", "tensorflow"}
"""What users need not install. Torch reads `.pth` originals, in `convert` and when it is needed."""


def _name(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([PACKAGES[folder], *rest]).removesuffix(".__init__")


SOURCES = {
    _name(path): path for folder in PACKAGES for path in sorted((ROOT / folder).rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, ...]]:
    """What each imported name may mean: `from a import b` names the module `a.b`, or `a`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name,) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            above = parts[: len(parts) - node.level + is_package] if node.level else []
            source = ".".join(above + ([node.module] if node.module else []))
            yield from ((f"{source}.{alias.name}", source) for alias in node.names)


def own_imports(module: str) -> set[str]:
    """The modules of the package that a module imports, at its top or later."""
    names = imported(TREES[module], module, SOURCES[module].stem == "__init__")
    return {next(n for n in meanings if n in SOURCES) for meanings in names if is_own(meanings[0])}


def is_own(name: str) -> bool:
    return name.split(".")[0] == "kvlock_jax"


def row(module: str) -> str:
    return module.removeprefix("kvlock_jax").removeprefix(".").split(".")[0]


def breaches(module: str, others: set[str]) -> list[str]:
    """Which of `others` stand in rows below a module's; those of its own row are beside it."""
    return sorted(other for other in others if ROWS.index(row(other)) > ROWS.index(row(module)))


@pytest.mark.parametrize(
    ("code", "module", "is_package", "meanings"),
    [
        ("import a.b as c", "kvlock_jax.edit", False, ("a.b",)),
        ("from a import b", "kvlock_jax.edit", False, ("a.b", "a")),
        (
            "from . import x",
            "kvlock_jax.lock.masks",
            False,
            ("kvlock_jax.lock.x", "kvlock_jax.lock"),
        ),
        ("from . import x", "kvlock_jax.lock", True, ("kvlock_jax.lock.x", "kvlock_jax.lock")),
        (
            "from ..errors import E",
            "kvlock_jax.lock.masks",
            False,
            ("kvlock_jax.errors.E", "kvlock_jax.errors"),
        ),
        ("def f():\n    if f:\n        import late", "kvlock_jax.edit", False, ("late",)),
    ],
)
def test_every_form_of_import_is_seen(code, module, is_package, meanings):
    assert list(imported(ast.parse(code), module, is_package)) == [meanings]


def test_a_breach_is_seen():
    others = {"kvlock_jax.models.wan.vace", "kvlock_jax.shapes", "kvlock_jax.lock.cache"}
    assert breaches("kvlock_jax.lock.masks", others) == ["kvlock_jax.models.wan.vace"]
    assert breaches("kvlock_jax.settings.schema", {"kvlock_jax"}) == ["kvlock_jax"]


def test_every_module_has_a_row():
    assert len(SOURCES) > 20
    assert {name for name in SOURCES if row(name) not in ROWS} == set()


@pytest.mark.parametrize("module", SOURCES)
def test_imports_only_rows_above(module):
    assert breaches(module, own_imports(module)) == []


@pytest.mark.parametrize(
    ("importer", "allowed"),
    [
        ("lock", {"errors", "shapes", "settings", "lock"}),
        (
            "sampling",
            {"errors", "shapes", "grid", "settings", "parallel", "runtime", "lock", "sampling"},
        ),
    ],
)
def test_method_and_loop_know_no_model(importer, allowed):
    for module in SOURCES:
        if row(module) == importer:
            assert {row(name) for name in own_imports(module)} <= allowed, module


@pytest.mark.parametrize("folder", ORDER)
def test_order_within_a_folder(folder):
    order, prefix = ORDER[folder].split(), f"kvlock_jax.{folder}."
    for module in SOURCES:
        if module.startswith(prefix):
            place = order.index(module.removeprefix(prefix).split(".")[0])
            for other in own_imports(module):
                if other.startswith(prefix):
                    name = other.removeprefix(prefix).split(".")[0]
                    assert order.index(name) <= place, f"{module} imports {other}"


def test_few_modules_lie_at_the_top():
    top = [path.name for path in (ROOT / "kvlock_jax").glob("*.py")]
    assert len(top) <= 4, top


def test_only_loading_and_the_command_line_convert():
    users = {m for m in SOURCES if any(row(name) == "convert" for name in own_imports(m))}
    assert {m for m in users if row(m) != "convert"} <= {
        "kvlock_jax.pipeline.load",
        "kvlock_jax.cli.convert",
    }


@pytest.mark.parametrize("module", SOURCES)
def test_foreign_imports(module):
    tree, is_package = TREES[module], SOURCES[module].stem == "__init__"
    found = {names[0].split(".")[0] for names in imported(tree, module, is_package)} & FOREIGN
    assert found <= ({"torch"} if row(module) == "convert" else set())
    functions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))
    lazy = {names[0] for f in functions for names in imported(f, module, is_package)}
    assert all(any(name.split(".")[0] == foreign for name in lazy) for foreign in found)


@pytest.mark.parametrize("module", SOURCES)
def test_environment_is_not_read(module):
    nodes = list(ast.walk(TREES[module]))
    set_ = [n.value for n in nodes if isinstance(n, ast.Subscript) and isinstance(n.ctx, ast.Store)]
    for node in nodes:
        if isinstance(node, ast.Attribute) and node not in set_:  # Gradio's folder is told so alone
            assert node.attr not in ("environ", "environb", "getenv"), f"line {node.lineno}"
    assert not {"os.environ", "os.getenv"} & {
        meanings[0] for meanings in imported(TREES[module], module, False)
    }


@pytest.mark.parametrize("folder", [*PACKAGES, "scripts", "tests"])
def test_length(folder):
    long = [p for p in (ROOT / folder).rglob("*.py") if len(p.read_text().splitlines()) >= 400]
    assert long == []


@pytest.mark.parametrize("module", SOURCES)
def test_docstrings(module):
    assert list(undocumented(TREES[module], module)) == []


def undocumented(node: ast.AST, name: str) -> Iterator[str]:
    """Public modules, classes, functions and methods without a docstring."""
    if not ast.get_docstring(node):
        yield name
    if not isinstance(node, ast.FunctionDef):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)) and child.name[0] != "_":
                yield from undocumented(child, f"{name}.{child.name}")


def test_import_is_light():
    """Nothing heavy is loaded, and no device is asked for: `no such platform` would be an error."""
    program = (
        "import sys, time; start = time.perf_counter(); import kvlock_jax;"
        "print(time.perf_counter() - start);"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"JAX_PLATFORMS": "no such platform"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    seconds, names = ran.stdout.splitlines()
    print(f"import kvlock_jax: {float(seconds):.2f} s")
    assert not set(names.split()) & (
        FOREIGN | {"matplotlib", "orbax", "ray", "pandas", "gradio", "cv2"}
    )
