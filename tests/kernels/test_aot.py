"""What is compiled ahead of time is what a launch compiles, and instructions are told by their families."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels are written in triton")

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
SCRIPT = '''
import json
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from cladapt_kernels.aot.compile import COLUMNS, Variant, _source, budgets, recorded


class Driver:
    """A driver without a device, enough for a launch to compile."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@triton.jit
def scaled(x, y, skipped, n, odd, one, wide, scale, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i * one + wide - wide, mask=i < n, other=0.0)
    tl.store(y + i, value * scale + odd, mask=i < n)


@triton.jit
def product(x, y, total, n, BLOCK: tl.constexpr, PRECISION: tl.constexpr, ADD: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * n + i[None, :]
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(0, n, BLOCK):
        sums = tl.dot(tl.load(x + at + step), tl.load(x + at + step * n), sums, input_precision=PRECISION)
    tl.store(y + at, sums.to(y.dtype.element_ty))
    if ADD:
        tl.atomic_add(total, tl.sum(sums))


driver.set_active(Driver())
told = {}
x, y = torch.empty(256), torch.empty(256, dtype=torch.float16)
arguments = (x, y, None, 256, 17, 1, 2**40, 0.5)
with recorded() as launches:
    scaled[(2,)](*arguments, BLOCK=128, num_warps=2)
(launch,) = launches
ours, theirs = _source(launch), scaled.warmup(*arguments, BLOCK=128, num_warps=2, grid=(2,))
built = triton.compile(ours, target=GPUTarget("cuda", 90, 32), options=launch.options)
told["signature"] = [ours.signature, theirs.src.signature]
told["constants"] = [[[*map(list, s.constants)], [*s.constants.values()]] for s in (ours, theirs.src)]
told["aligned"] = [sorted(index for (index,), facts in s.attrs.items() if facts) for s in (ours, theirs.src)]
told["same code"] = built.asm["ptx"] == theirs.asm["ptx"]
told["same options"] = [built.metadata.num_warps, theirs.metadata.num_warps]

run = JITFunction.run
try:
    with recorded():
        raise KeyError
except KeyError:
    told["restored"] = JITFunction.run is run

bf16, fp32 = (torch.empty(512, 512, dtype=dtype, device="meta") for dtype in (torch.bfloat16, torch.float32))


def call(x, precision, add, block=64):
    product[(1,)](x, x, torch.empty(1, device="meta"), 512, BLOCK=block, PRECISION=precision, ADD=add)


variants = [
    Variant("cores", lambda: call(bf16, "tf32", False), ("wgmma",)),
    Variant("exact", lambda: call(fp32, "ieee", False, 32)),
    Variant("atomic", lambda: call(bf16, "tf32", True)),
]
told["rows"] = budgets(variants, (80, 90))
told["columns"] = list(COLUMNS)
marked = {row["source"]: {**row, "registers": -1} for row in told["rows"] if row["sm"] == 90}
told["known"] = budgets(variants, (80, 90), marked)
print(json.dumps(told))
'''


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a Python of its own found: where this one interprets kernels, it cannot compile them."""
    folder = tmp_path_factory.mktemp("aot")
    script = folder / "script.py"  # triton reads a kernel's source from its file
    script.write_text(SCRIPT, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(KERNELS), "TRITON_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("what", ["signature", "constants", "aligned", "same options"])
def test_a_recorded_launch_is_specialised_as_triton_specialises_it(told: dict[str, Any], what: str) -> None:
    ours, theirs = told[what]
    assert ours == theirs


def test_specialisation_sees_ones_nones_and_multiples_of_sixteen(told: dict[str, Any]) -> None:
    signature = {"x": "*fp32", "y": "*fp16", "skipped": "constexpr", "n": "i32", "odd": "i32"}
    signature |= {"one": "constexpr", "wide": "i64", "scale": "fp32", "BLOCK": "constexpr"}
    assert told["signature"][0] == signature
    assert told["aligned"][0] == [0, 1, 3, 6]  # x, y, n = 256 and wide = 2^40, not odd = 17


def test_the_code_of_a_recorded_launch_is_the_code_that_runs(told: dict[str, Any]) -> None:
    assert told["same code"]


def test_recording_ends_even_where_the_launcher_fails(told: dict[str, Any]) -> None:
    assert told["restored"]


def test_instructions_are_told_by_family_variant_and_architecture(told: dict[str, Any]) -> None:
    found = {(row["variant"], row["sm"]): {*row["instructions"].split()} for row in told["rows"]}
    assert list(found) == [(name, sm) for name in ("cores", "exact", "atomic") for sm in (80, 90)]
    assert found["cores", 80] >= {"mma", "cp.async"}
    assert found["cores", 90] >= {"wgmma", "cp.async"}
    assert not found["cores", 80] & {"wgmma", "atom"}
    assert not found["cores", 90] & {"mma", "atom"}
    assert not found["exact", 90] & {"wgmma", "mma", "tcgen05"}
    assert "atom" in found["atomic", 90]


def test_only_the_same_source_for_the_same_target_is_taken_from_what_is_known(told: dict[str, Any]) -> None:
    assert len({row["source"] for row in told["rows"]}) == len(told["rows"])
    marked = [{**row, "registers": -1} if row["sm"] == 90 else row for row in told["rows"]]
    assert told["known"] == marked


def test_every_row_has_every_column_and_plausible_figures(told: dict[str, Any]) -> None:
    for row in told["rows"]:
        assert list(row) == told["columns"]
        assert 16 <= row["registers"] <= 255
        assert row["spills"] == 0
        assert 0 < row["shared"] < 163 * 1024
