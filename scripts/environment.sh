# Sourced by the scripts beside it, from the repository's root.

# environment NAME COMMAND...: activates the virtual environment .venv-NAME. Where there is none, or it
# was made for another setup.cfg, interpreter or folder, it is made again and COMMAND fills it.
# PYTHON picks the interpreter.
environment() {
  local folder=".venv-$1" python="${PYTHON:-python3}" stamp
  shift
  stamp=$("$python" -c '
import hashlib, os, pathlib, sys
made_for = [sys.version, os.getcwd(), *(pathlib.Path(p).read_text() for p in sys.argv[1:])]
print(hashlib.sha256("\n".join(made_for).encode()).hexdigest())' setup.cfg pyproject.toml)
  if [ "$(cat "$folder/stamp" 2>/dev/null)" = "$stamp" ]; then
    . "$folder/bin/activate"
  else
    echo "making $folder"
    rm -rf "$folder"
    "$python" -m venv "$folder"
    . "$folder/bin/activate"
    "$@"
    echo "$stamp" >"$folder/stamp"
  fi
}
