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

# A browser for the page's tests: the system's, else the distribution's, else Playwright's own.
# Without one those tests are skipped, and say so.
chromium() {
  python -c 'import sys; sys.path.insert(0, "scripts"); import browsing; sys.exit(browsing.missing() != "")'
}
if ! chromium; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    (apt-get -qq update && apt-get -qq install --yes chromium) >/dev/null 2>&1 || true
  fi
  chromium || timeout 120 python -m playwright install chromium >/dev/null 2>&1 || true
  chromium || echo "no Chromium could be installed: the tests of kvlock app in a browser are skipped"
fi

folders=(kvlock_jax convert configs scripts tests)
ruff check "${folders[@]}"
ruff format --check "${folders[@]}"
# loadfile: fixtures that take long belong to a module, and are made once. Not reordered: files of
# few tests are not the short ones here, and would come last, on one core.
python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --durations=25 "$@"
