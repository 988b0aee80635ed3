#!/usr/bin/env bash
# Checks and measures kvlock_jax on this machine's GPU, beside Diffusers, and writes the section
# "Measured" of docs/gpu.md. Takes under ten minutes once its two environments are made, and no
# network then. Arguments go to gpu_check.py: bash scripts/gpu_check.sh --rounds 5
# PYTHON picks the interpreter (3.11 or newer; default python3).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

# Two environments: JAX and PyTorch want different versions of the same CUDA libraries.
peer() {
  pip install --quiet "$(grep -o 'torch==[0-9.]*' setup.cfg)" "$(grep -o 'diffusers==[0-9.]*' setup.cfg)" \
    transformers accelerate
}
(environment gpu-peer peer)
environment gpu pip install --quiet --editable '.[cuda]'
python scripts/gpu_check.py --peer .venv-gpu-peer/bin/python "$@"
