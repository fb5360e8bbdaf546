"""Kernels compiled ahead of time, without a GPU: registers, spills, shared memory and instructions of every variant.

A variant is a call of the kernel's own launcher on tensors without storage. What it would launch is recorded with the
specialisation that a launch makes (strides of 1, sizes and pointers divisible by 16), so what is compiled is what runs.

A row of `budgets` names the source it was compiled from, so that what is known of a source is taken from there and the
rest is compiled. Every Triton has a file of its own.
"""

import hashlib
import io
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from cladapt_kernels.tiles import assuming

CAPABILITIES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of one program
FAMILIES = {"wgmma": r"\bwgmma\.", "tcgen05": r"\btcgen05\.mma", "mma": r"\bmma\.sync", "cp.async": r"\bcp\.async\.c"}
FAMILIES |= {"tma": r"\bcp\.async\.bulk\.tensor"}
FAMILIES |= {"atom": r"\b(atom|red)\.[\w.:]*\.(b?f16|f32|f64)"}  # of floats, whose order would show
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
FIGURES = ("registers", "spills", "shared", "instructions")
COLUMNS = ("variant", "kernel", "sm", *FIGURES, "expects", "forbids", "source")


@dataclass(frozen=True)
class Variant:
    """A call of a launcher, the instructions that its kernels must have on sm_90, and those they must have nowhere."""

    name: str
    call: Callable[[], object]
    expects: tuple[str, ...] = ()
    forbids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Launch:
    """What a launcher gave to a kernel."""

    kernel: Any
    values: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True)
class Compiled:
    """Of one kernel on one architecture: registers a thread, spilled bytes, bytes of shared memory, instructions.

    `serialized` among the instructions: ptxas makes every wgmma wait for the one before.
    """

    registers: int
    spills: int
    shared: int
    instructions: tuple[str, ...]


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches inside are written down, not run."""
    launches: list[Launch] = []
    run = JITFunction.run

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        options = {name: values.pop(name) for name in tuple(values) if name not in kernel.arg_names}
        launches.append(Launch(kernel, values, options))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compile what was recorded for sm_<capability>, with ptxas's own account of it."""
    source, log = _source(launch), io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    registers, spills = _account(built.asm["cubin"])
    found = tuple(name for name, pattern in FAMILIES.items() if re.search(pattern, built.asm["ptx"]))
    serialized = "wgmma.mma_async instructions are serialized" in log.getvalue()
    return Compiled(registers, spills, built.metadata.shared, (*found, *(("serialized",) if serialized else ())))


def _source(launch: Launch) -> ASTSource:
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.values[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and special):
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype][1:]}{value.block_shape}>"
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and special:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def _account(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory, where spills go."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def source_of(launch: Launch, capability: int) -> str:
    """Hash of all that a launch is compiled from: the kernel and what it calls, types, constants, options, target."""
    options = sorted(launch.options.items())
    return hashlib.sha256(f"{_source(launch).hash()} {options} {capability}".encode()).hexdigest()[:16]


def budgets(
    variants: Sequence[Variant],
    capabilities: Sequence[int] = CAPABILITIES,
    known: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """One row of COLUMNS per variant, kernel and architecture.

    Args:
        variants: calls of launchers.
        capabilities: architectures, 90 for sm_90.
        known: earlier rows by their source, whose figures are taken.
    """
    rows = []
    for variant in variants:
        for capability in capabilities:
            with recorded() as launches, assuming(capability):
                variant.call()
            for launch in launches:
                source = source_of(launch, capability)
                row = {"variant": variant.name, "kernel": launch.kernel.__name__, "sm": capability}
                if found := (known or {}).get(source):
                    row |= {name: found[name] for name in FIGURES}
                else:
                    built = compile_launch(launch, capability)
                    figures = (built.registers, built.spills, built.shared, " ".join(built.instructions))
                    row |= dict(zip(FIGURES, figures, strict=True))
                row |= {"expects": " ".join(variant.expects), "forbids": " ".join(variant.forbids)}
                rows.append(row | {"source": source})
    return rows


def path_of(folder: Path) -> Path:
    """The file of the budgets of the Triton that is installed."""
    return folder / f"{triton.__version__}.csv"
