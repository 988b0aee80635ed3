"""Reading the TPU compiler's programs, and adding up a step, on a program written by hand."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "scripts"))
import hlo
import tpu_costs
import tpu_kernels

TEXT = (pathlib.Path(__file__).parent / "data" / "step.hlo").read_text()
CASE = tpu_costs.Case("T2V 1.3B", 480, 832, "v6e-8", "full")


def test_what_a_program_executes():
    module = hlo.Module(TEXT)
    times = {use.instruction.name: use.times for use in module.uses()}
    assert times["y"] == 150  # 50 steps of 3 layers
    assert "neg" not in times and times["exp"] == 150  # of a branch the dearest
    by_name = {use.instruction.name: use.instruction for use in module.uses()}
    kinds = {name: module.kind(one) for name, one in by_name.items()}
    assert kinds["y"] == "products" and kinds["turned"] == "copies" and kinds["sum"] == "reductions"
    assert kinds["exp"] == "elementwise" and kinds["all"] == kinds["start"] == "collective"
    assert module.flops(by_name["y"]) == 2 * 8 * 128 * 256
    assert by_name["start"].sent == 8 * 128 * 2 and by_name["all"].sent == 64 * 128 * 2
    assert module.line(by_name["y"], "/project") == "kvlock_jax/models/linear.py:64 Linear.product"
    assert module.unknown == []


def test_a_step_adds_up(tmp_path):
    spent = tpu_costs.step(TEXT, CASE, tmp_path)
    cycle = 3 / 1.75e9  # in each of three layers
    kinds = {"products": 1000, "copies": 100, "reductions": 50, "elementwise": 70}
    assert spent.kinds == pytest.approx({kind: n * cycle for kind, n in kinds.items()})
    assert spent.flops == 3 * 2 * 8 * 128 * 256 and spent.unknown == {"add": 3}
    # the permuted block has a product beside it, the gathered one waits
    assert spent.hidden == 3 * 2048 and spent.sent == 3 * (2048 + 16_384)
    assert spent.exposed == pytest.approx(3 * 16_384 / 100e9)


def test_bundles_of_the_largest_region():
    lines = ["0x0 LB: > {}", "0x10 End region 0", "0x11 PB: {}", "0x91 End region 1", "0xa0 {}"]
    assert tpu_kernels.largest_region("\n".join(lines)) == 0x81


def test_a_section_is_replaced_where_it_stands():
    page = "# Page\n\n## One\n\nold\n\n## Two\n\nkept\n"
    assert tpu_costs.section(page, "## One", "## One\n\nnew\n") == page.replace("old", "new")
    added = tpu_costs.section(page, "## Three", "## Three\n\nmore\n")
    assert added == page + "\n## Three\n\nmore\n"
    assert tpu_costs.section(added, "## Three", "## Three\n\nmore\n") == added
