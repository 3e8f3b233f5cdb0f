"""The Triton kernels without a GPU: in the interpreter, and compiled for Hopper and Blackwell GPUs and disassembled."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed on this platform")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from remit_megatron.ops import fp8_triton  # noqa: E402
from remit_megatron.ops import token_nll_triton as kernels  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (90, 100)
"""Compute capabilities: Hopper, Blackwell."""
ATOMIC = r"\b(ATOM|ATOMG|ATOMS|RED|REDG)\b"
"""What would make the order of a sum, and so its bits, depend on timing."""
STRIDES = {"stride_outer": "i64", "stride_inner": "i32", "n_inner": "i32"}


@pytest.mark.parametrize("file", ["interpreted.py", "interpreted_fp8.py"])
def test_interpreter_matches_specification(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(Path(__file__).with_name(file))],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def compile_for(
    architecture: int,
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, int],
    num_warps: int,
    multiples: tuple[str, ...] = (),
) -> Any:
    """Compiles with aligned pointers and row strides, and columns side by side, as a model's logits are.

    multiples: further arguments that are multiples of 16.
    """
    aligned = [
        name for name, kind in signature.items() if kind.startswith("*") or "stride_" in name or name in multiples
    ]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    types = {**signature, **{name: "constexpr" for name in constants}}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options={"num_warps": num_warps, "enable_fp_fusion": True})


def disassemble(compiled: Any) -> tuple[str, str]:
    """(resource usage, SASS) by the tools that come with triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([TOOLS / tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    return usage, sass


def loop_body(sass: str) -> list[str]:
    """The instructions between a label and the first branch back to it."""
    lines = [x for x in sass.splitlines() if re.search(r"/\*[0-9a-f]{4,}\*/", x) or re.match(r"\s*\.L_", x)]
    labels = {match.group(1): i for i, line in enumerate(lines) if (match := re.match(r"\s*(\.L_\S+):", line))}
    for i, line in enumerate(lines):
        match = re.search(r"BRA.*`\((\.L_\S+?)\)", line)
        if match and labels.get(match.group(1), i) < i - 5:
            return lines[labels[match.group(1)] : i + 1]
    raise AssertionError("no loop found")


def count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "columns_per_lane"), [("bf16", 8), ("fp16", 8), ("fp32", 4)])
def test_statistics_loop(dtype: str, columns_per_lane: int, architecture: int) -> None:
    signature = {"X": f"*{dtype}", **STRIDES, "Y": "*i64", "OUT": "*fp32", "out_stride": "i32"}
    signature |= {"first": "i32", "num_valid": "i32"}
    constants = {"stride_column": 1, "LANES": kernels.STATS_LANES, "K": columns_per_lane}
    compiled = compile_for(architecture, kernels.token_stats_kernel, signature, constants, kernels.STATS_WARPS)
    usage, sass = disassemble(compiled)
    assert re.search(r"STACK:0\b", usage), usage
    assert count(r"\b(LDL|STL)\b", sass) == 0
    assert count(ATOMIC, sass) == 0
    body = "\n".join(loop_body(sass))
    columns_per_thread = kernels.STATS_LANES * columns_per_lane // (kernels.STATS_WARPS * 32)
    assert count(r"LDG\.E\S*\.128", body) * columns_per_lane == columns_per_thread  # all of its loads are wide
    assert count(r"\bLDG", body) == count(r"LDG\.E\S*\.128", body)
    assert count(r"\bBAR\b|SHFL", body) == 0
    assert count(r"MUFU\.EX2", body) == columns_per_thread // columns_per_lane * (columns_per_lane + 1)
    # 8 instructions a column keep it under the time of reading 2 bytes from memory; the loop's own ones on top.
    assert len(loop_body(sass)) / columns_per_thread <= 9


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "columns_per_load"), [("bf16", 8), ("fp16", 8), ("fp32", 4)])
def test_gradient_kernel(dtype: str, columns_per_load: int, architecture: int) -> None:
    signature = {"X": f"*{dtype}", **STRIDES, "OUT": f"*{dtype}", "out_stride_outer": "i64", "out_stride_inner": "i32"}
    signature |= {"Y": "*i64", "LSE": "*fp32", "COEFFICIENT": "*fp32"}
    signature |= {"first": "i32", "num_valid": "i32", "num_local": "i32"}
    constants = {"stride_column": 1, "out_stride_column": 1, "BLOCK": kernels.GRADIENT_BLOCK}
    compiled = compile_for(architecture, kernels.token_gradient_kernel, signature, constants, kernels.GRADIENT_WARPS)
    usage, sass = disassemble(compiled)
    assert re.search(r"STACK:0\b", usage), usage
    assert count(r"\b(LDL|STL)\b", sass) == 0
    assert count(ATOMIC, sass) == 0
    assert count(r"\bBAR\b|SHFL", sass) == 0
    columns_per_thread = kernels.GRADIENT_BLOCK // (kernels.GRADIENT_WARPS * 32)
    assert count(r"LDG\.E\S*\.128", sass) * columns_per_load == columns_per_thread  # the block without a mask
    assert count(r"STG\.E\S*\.128", sass) * columns_per_load >= columns_per_thread
    # At 15 instructions a column the kernel would take as long as its memory traffic.
    lines = [line for line in sass.splitlines() if re.search(r"/\*[0-9a-f]{4,}\*/", line)]
    wide = [i for i, line in enumerate(lines) if re.search(r"(LDG|STG)\S*\.128", line)]
    first_load = next(i for i in wide if "LDG" in lines[i])
    last_store = next(i for i in reversed(wide) if "STG" in lines[i])
    assert (last_store - first_load + 1) / columns_per_thread <= 10
    ptx = compiled.asm["ptx"]
    rounding = {"bf16": "cvt.rn.bf16x2.f32", "fp16": "cvt.rn.f16x2.f32"}
    assert dtype == "fp32" or rounding[dtype] in ptx  # to nearest


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("columns", [2048, 8192, 28672])
@pytest.mark.parametrize(("dtype", "columns_per_load"), [("bf16", 8), ("fp32", 4)])
def test_fp8_kernel(dtype: str, columns_per_load: int, columns: int, architecture: int) -> None:
    """Reads a row once, in 128-bit loads, and keeps it in registers; stores whole vectors; rounds to nearest."""
    block = triton.next_power_of_2(columns)
    warps = fp8_triton.num_warps(block)
    signature = {"X": f"*{dtype}", "stride_row": "i32", "OUT": "*fp8e4nv", "SCALE": "*fp32", "num_columns": "i32"}
    kernel = fp8_triton.quantise_rows_kernel
    compiled = compile_for(architecture, kernel, signature, {"BLOCK": block}, warps, multiples=("num_columns",))
    usage, sass = disassemble(compiled)
    assert re.search(r"STACK:0\b", usage), usage
    assert count(r"\b(LDL|STL)\b", sass) == 0
    assert count(ATOMIC, sass) == 0
    columns_per_thread = block // (warps * 32)
    assert count(r"LDG\.E\S*\.128", sass) * columns_per_load == columns_per_thread
    assert count(r"\bLDG", sass) == count(r"LDG\.E\S*\.128", sass)
    assert count(r"STG\.E\S*\.128", sass) * 16 == columns_per_thread
    instructions = count(r"/\*[0-9a-f]{4,}\*/", sass)
    assert instructions / columns_per_thread <= 8  # the reading of 2 bytes and writing of 1 take longer
    assert "cvt.rn.satfinite.e4m3x2.f32" in compiled.asm["ptx"]
