#!/usr/bin/env bash
# Lint, format and the whole test suite, in an environment of their own. Arguments go to pytest:
#   bash scripts/test.sh tests/test_masks.py -k pixel
# PYTHON picks the interpreter (3.11 or newer; default python3).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

install() {
  # Torch by itself first, at the version of setup.cfg: otherwise the packages that need it pull the
  # newest, with several GB of CUDA.
  pip install --quiet "$(grep -o 'torch==[0-9.]*' setup.cfg)"
  pip install --quiet --editable '.[test]'
}
environment test install

folders=(kvlock_jax convert configs scripts tests)
ruff check "${folders[@]}"
ruff format --check "${folders[@]}"
# loadfile: fixtures that take long belong to a module, and are made once. Not reordered: files of
# few tests are not the short ones here, and would come last, on one core.
python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder "$@"
