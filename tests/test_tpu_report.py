"""The report's programs, small ones, through the TPU's own compiler; and the report's page."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "tpu_report.py"

SMALL = """
import dataclasses, json, sys
sys.path.insert(0, sys.argv[1])
import tpu_programs as report
from kvlock_jax.estimate import costs
from kvlock_jax.models.text.config import UMT5Config
from kvlock_jax.models.vae.config import VAEConfig
from kvlock_jax.models.wan.config import WanConfig

WAN = WanConfig(8, 128, 2, 2048, text_dim=256, freq_dim=64)
report.MODELS = {"T2V": WAN, "VACE": dataclasses.replace(WAN, num_layers=3, vace_layers=(0, 2))}
report.TEXT_ENCODER = UMT5Config(1024, 256, 64, 512, 2, 4)
report.VAE = VAEConfig(base_dim=8, num_res_blocks=1)
report.STEPS = 4
ROWS = {
    "text": report.Row("T2V", 128, 256, 9, "v5e-8"),
    "loop": report.Row("T2V", 128, 256, 9, "v5e-8", gathered=True, cache="carried"),
    "spread loop": report.Row("VACE", 128, 256, 9, "v6e-8", batch=2, mesh=(2, 2, 2)),
    "decode": report.Row("T2V", 128, 256, 9, "v5e-8"),
}
for name in sys.argv[2:]:
    row, program = ROWS[name], name.split()[-1]
    mesh = report.mesh_of(row)
    ways, group = mesh.shape["frames"], row.batch // mesh.shape["data"]
    plan = costs.Layout.of(ways, False, row.workload.tokens)
    workload = dataclasses.replace(row.workload, batch=group)
    cache = costs.cache_bytes(workload, plan, report.settings_of(row))
    with report.jax.set_mesh(mesh):
        facts = report.measure(report.PROGRAMS[program](mesh, row))
    facts["cache"] = cache // mesh.shape["model"]
    print("FOUND", json.dumps([row.model, row.gathered, program, facts]), flush=True)
"""


@pytest.mark.parametrize(
    "names", [["text", "spread loop"], pytest.param(["loop", "decode"], marks=pytest.mark.nightly)]
)
def test_the_tpu_compiler_takes_what_is_run(names):
    pytest.importorskip("libtpu", reason="libtpu, the TPU's compiler, is not installed")
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # of a CPU
    env |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    argv = [sys.executable, "-c", SMALL, str(SCRIPT.parent), *names]
    ran = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    lines = [line.split(" ", 1)[1] for line in ran.stdout.splitlines() if line[:5] == "FOUND"]
    found = [json.loads(line) for line in lines]
    assert len(found) == len(names)
    for model, gathered, program, facts in found:
        assert not facts["refused"] and facts["temporaries"] > 0, (model, program)
        if program != "loop":
            continue
        assert facts["cache"] < facts["temporaries"], model
        counted = facts["collectives"]
        assert counted["all-gather" if gathered else "collective-permute"][0] > 0


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("tpu_report", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tpu_report", module)
    spec.loader.exec_module(module)
    return module


def test_rows_are_those_that_are_asked_for(report):
    rows = report.rows()
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    asked = {
        (model, *size, 81, slice_)
        for model in report.MODELS
        for size in ((480, 832), (720, 1280))
        for slice_ in ("v5e-8", "v6e-8", "v5p-8")
    }
    assert asked <= {dataclasses.astuple(row)[:5] for row in rows}


def test_collectives_are_read_from_a_program(report):
    text = """
      %a = bf16[2,8]{1,0} all-gather(bf16[2,1] %x), dimensions={1}
      %b = (f32[4]{0}, f32[8]{0}) all-gather-start(f32[4] %y)
      %c = f32[8]{0} all-gather-done(%b)
      %d = (f32[2], s32[]) all-reduce(%e, %f), to_apply=%sum
      %g = f32[2] add(%h, %all-gather.3)
      %i = (bf16[4]{0}, bf16[4]{0}, u32[], u32[]) collective-permute-start(%j)
    """
    found = report.tpu_programs.collectives(text)
    assert found == {
        "all-gather": [2, 32 + 32],
        "all-reduce": [1, 12],
        "collective-permute": [1, 8],
    }
