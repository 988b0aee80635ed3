"""Changes one operator, comparison or constant at a time, and asks whether the tests notice.

    python scripts/mutants.py --count 40 --seed 0

Mutants are drawn from eight modules, evenly, and tested one by one in a copy of the tree. Prints
the mutants that survive and exits 1 if there are any. Names of modules draw from those alone:
`python scripts/mutants.py lock/cache sampling/loop`.
"""

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = Path("kvlock_jax")
FILES = {
    "lock/cache": "cache wan passes",
    "lock/schedules": "schedules passes sampler",
    "lock/variance": "variance sampler",
    "lock/guidance": "guidance sampler",
    "sampling/loop": "sampler passes",
    "sampling/solvers": "solvers sampler",
    "models/wan/block": "wan vace chunks",
    "media/fit": "video_sizes video_masks video",
}
SWAPS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


class Mutant(NamedTuple):
    """One change to a module."""

    module: str
    line: int
    before: str
    after: str
    source: str  # of the whole module, changed


def places(tree: ast.Module) -> list[ast.AST]:
    """The nodes that a mutant may change; annotations, docstrings and messages are none of them."""
    passed_over = set()
    for node in ast.walk(tree):
        parts = [getattr(node, name, None) for name in ("annotation", "returns")]
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom):
            parts.append(node)
        if isinstance(node, ast.Assign) and "[Array" in ast.unparse(node.value):
            parts.append(node)
        for part in filter(None, parts):
            passed_over.update(map(id, ast.walk(part)))

    def changeable(node: ast.AST) -> bool:
        if isinstance(node, ast.Constant):
            return isinstance(node.value, bool | int | float)
        operator = node.ops[0] if isinstance(node, ast.Compare) else getattr(node, "op", None)
        return type(operator) in SWAPS

    return [node for node in ast.walk(tree) if id(node) not in passed_over and changeable(node)]


def change(node: ast.AST) -> None:
    """Changes a node of `places`."""
    if isinstance(node, ast.Constant):
        node.value = not node.value if isinstance(node.value, bool) else node.value + 1
    elif isinstance(node, ast.Compare):
        node.ops[0] = SWAPS[type(node.ops[0])]()
    else:
        node.op = SWAPS[type(node.op)]()


def draw(module: str, random_state: random.Random) -> Mutant:
    """A mutant of a module."""
    text = (ROOT / PACKAGE / f"{module}.py").read_text()
    tree = ast.parse(text)
    node = random_state.choice(places(tree))
    before = ast.unparse(node)
    change(node)
    return Mutant(module, node.lineno, before, ast.unparse(node), ast.unparse(tree))


def survives(mutant: Mutant, folder: Path) -> bool:
    """Whether the tests of a mutant's module pass in a copy of the tree."""
    path = folder / PACKAGE / f"{mutant.module}.py"
    original = path.read_text()
    files = [f"tests/test_{name}.py" for name in FILES[mutant.module].split()]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    # The copy goes before an installed package.
    environment = os.environ | {"PYTHONPATH": str(folder)}
    path.write_text(mutant.source)
    try:
        ran = subprocess.run(
            [*command, *files], cwd=folder, env=environment, capture_output=True, timeout=1800
        )
    except subprocess.TimeoutExpired:
        return False  # it hangs, and that is noticed
    finally:
        path.write_text(original)
    if ran.returncode not in (0, 1, 2):
        sys.exit(f"pytest failed:\n{ran.stdout.decode()}{ran.stderr.decode()}")
    return ran.returncode == 0


def main() -> int:
    """Draws mutants, tests each, and prints the survivors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", choices=[*FILES, []], help="default: all eight")
    parser.add_argument("--count", type=int, default=40, help="of mutants (default 40)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    parser.add_argument("--list", action="store_true", help="draws and prints, and runs nothing")
    args = parser.parse_args()
    random_state, modules = random.Random(args.seed), args.modules or list(FILES)
    mutants = [draw(modules[n % len(modules)], random_state) for n in range(args.count)]
    survivors = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not args.list:
            for part in ("kvlock_jax", "convert", "configs", "tests", "scripts"):
                shutil.copytree(ROOT / part, folder / part)
            shutil.copy(ROOT / "pyproject.toml", folder)
        for mutant in mutants:
            place = f"{mutant.module}.py:{mutant.line}: {mutant.before}  ->  {mutant.after}"
            if args.list:
                print(place)
                continue
            alive = survives(mutant, folder)
            survivors += alive
            print("survived" if alive else "killed  ", place, flush=True)
    if not args.list:
        print(f"{len(mutants) - survivors} of {len(mutants)} were killed")
    return survivors > 0


if __name__ == "__main__":
    sys.exit(main())
