"""Memory and speed of `kvlock convert` on random weights of the 1.3B text-to-video model.

Makes a Diffusers folder in bfloat16 (2.8 GB of transformer in 3 shards, a small VAE and a small
text encoder beside it), then copies and converts it in turn, each time in a process of its own.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from kvlock_jax.models.text import tokenizer

LAYOUT = Path(__file__).parents[1] / "tests/data/layouts/wan2.1-t2v-1.3b.diffusers.json"
SIZES = dict(num_attention_heads=12, attention_head_dim=128, num_layers=30, ffn_dim=8960)
SHARDS = 3
MEMORY_BAR, SPEED_BAR, COPY_BAR = 1.5e9, 100.0, 0.5

CONVERT = """
import sys, time
import jax

def memory(name):  # not ru_maxrss, which a process inherits from its parent
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(name))

jax.devices()
before = memory("VmRSS")
from kvlock_jax.convert.command import convert
start = time.perf_counter()
convert(sys.argv[1], sys.argv[2])
print(time.perf_counter() - start, memory("VmHWM") - before)
"""


def write_transformer(folder: Path) -> None:
    """Writes shards and their index, filled from slices of one random array."""
    shapes = {key: tuple(shape) for key, shape in json.loads(LAYOUT.read_text()).items()}
    rng = np.random.default_rng(0)
    pool = (0.02 * rng.standard_normal(1 << 24, np.float32)).astype(ml_dtypes.bfloat16)
    total, seen = sum(map(math.prod, shapes.values())), 0
    shards = [{} for _ in range(SHARDS)]
    for key, shape in shapes.items():
        size = math.prod(shape)
        start = rng.integers(len(pool) - size)
        shards[SHARDS * seen // total][key] = pool[start : start + size].reshape(shape)
        seen += size
    names = [f"diffusion_pytorch_model-{i + 1:05}-of-{SHARDS:05}" for i in range(SHARDS)]
    folder.mkdir()
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / f"{name}.safetensors")
    where = {
        key: f"{name}.safetensors"
        for name, shard in zip(names, shards, strict=True)
        for key in shard
    }
    index = {"metadata": {"total_size": 2 * total}, "weight_map": where}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def write_folder(folder: Path) -> None:
    """Writes the Diffusers folder; Diffusers itself writes the small parts."""
    import torch
    import transformers
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel

    with torch.device("meta"):
        config = WanTransformer3DModel(**SIZES).config
    write_transformer(folder / "transformer")
    described = {"_class_name": "WanTransformer3DModel", **config}
    (folder / "transformer" / "config.json").write_text(json.dumps(described))
    AutoencoderKLWan(base_dim=4).save_pretrained(folder / "vae")
    sizes = dict(vocab_size=16, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2)
    encoder = transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes))
    encoder.save_pretrained(folder / "text_encoder")
    tokenizer.write_word_tokenizer(folder / "tokenizer", ["a", "red", "star"], 12)
    UniPCMultistepScheduler(flow_shift=3.0).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text('{"_class_name": "WanPipeline"}')


def copied(folder: Path, target: Path) -> float:
    """The seconds that a plain copy of the files takes."""
    start = time.perf_counter()
    shutil.copytree(folder, target)
    return time.perf_counter() - start


def converted(folder: Path, target: Path) -> tuple[float, float]:
    """The seconds of a conversion, and its bytes of memory over those of an idle interpreter."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", CONVERT, str(folder), str(target)]
    ran = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    seconds, memory = map(float, ran.stdout.split())
    return seconds, memory


def main() -> None:
    """Prints each round and the medians; exits with 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", help="where to put the data, 9 GB; a temporary folder by default")
    args = parser.parse_args()
    copies, conversions, memories = [], [], []
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        folder, target = Path(name) / "source", Path(name) / "target"
        folder.mkdir()
        write_folder(folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{size / 1e9:.2f} GB in {SHARDS} shards")
        for _ in range(args.rounds):
            os.sync()  # so that neither waits for the disk writes of the other
            copies.append(size / 1e6 / copied(folder, target))
            shutil.rmtree(target)
            os.sync()
            seconds, memory = converted(folder, target)
            conversions.append(size / 1e6 / seconds)
            memories.append(memory)
            shutil.rmtree(target)
            print(
                f"copy {copies[-1]:.0f} MB/s, conversion {conversions[-1]:.0f} MB/s, "
                f"memory {memory / 1e9:.2f} GB",
                flush=True,
            )
    copy, speed = map(statistics.median, (copies, conversions))
    print(f"memory   {max(memories) / 1e9:.2f} GB, bar {MEMORY_BAR / 1e9} GB")
    bar = min(SPEED_BAR, COPY_BAR * copy)
    print(f"speed    {speed:.0f} MB/s, bar {bar:.0f} MB/s ({speed / copy:.2f} of a copy)")
    sys.exit(speed < bar or max(memories) > MEMORY_BAR)


if __name__ == "__main__":
    main()
