#!/usr/bin/env bash
# Edits the bundled clip with the bundled model, and writes the results to demo_out/.
# Arguments are added to the command line: bash scripts/demo.sh --preset cfg
# PYTHON picks the interpreter (3.11 or newer; default python3).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

prompt="a blue square"

environment demo pip install --quiet --editable .

mkdir -p demo_out
kvlock edit \
  --ckpt_dir demo \
  --src_video kvlock_jax/demo/clip.mp4 \
  --src_mask kvlock_jax/demo/mask.mp4 \
  --prompt "$prompt" \
  --save_file demo_out/edited.mp4 \
  --compare demo_out/side_by_side.mp4 \
  --plot demo_out/trace.png \
  --trace demo_out/trace.json \
  "$@"

cat <<END

The edit, "$prompt":                demo_out/edited.mp4
Source, mask and edit side by side:  demo_out/side_by_side.mp4
sigma2, alpha, omega, s* by step:    demo_out/trace.png, trace.json
END
