# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""Machine instructions an element that the Triton kernels compile to for sm_90, by the unit that runs them.

    make .venv-triton/.ready && PYTHONPATH=.venv-triton .venv/bin/python benchmarks/instructions.py

Needs Triton, which brings the assembler, and no GPU. It says what a kernel may cost, not what it does.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import types
from collections import Counter
from itertools import product
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


# `trl_alp` itself imports TRL, which this script can do without.
package = types.ModuleType("trl_alp")
package.__path__ = [str(Path(__file__).parents[1] / "src" / "trl_alp")]
sys.modules["trl_alp"] = package
from trl_alp import noise_triton  # noqa: E402


WARPS = 4
DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SCALARS = {"position": "i32", "place": "i32", "seed": "i64", "rows": "i32"}
UNITS = {"MUFU": "special", "FFMA": "float", "FMUL": "float", "FADD": "float", "IMAD": "multiply"}


def instructions(kernel, dtype: str, constants: dict) -> list[str]:
    """The machine code's operations, without padding."""
    element, signature = {"bfloat16": "bf16", "float32": "fp32"}[dtype], {}
    for name in kernel.arg_names:
        pointer = f"*{element}" if name in ("hidden", "out", "grad") else "*fp32"
        signature[name] = "constexpr" if name in constants else SCALARS.get(name, pointer)
    aligned = {(i,): [["tt.divisibility", 16]] for i, each in enumerate(signature.values()) if each.startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(DISASSEMBLER), "-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", text)
    return [each for each in found if each != "NOP"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=3584, help="hidden size; that of Qwen2.5-7B by default")
    args = parser.parse_args()
    units = ("special", "float", "multiply", "other")
    print(f"{'dtype':9} {'scale':9} {'pass':9} {'all':>6}", *(f"{unit:>9}" for unit in units), "  spills")
    for dtype, scale in product(("bfloat16", "float32"), ("absolute", "rms")):
        width, rms, kind = args.width, scale == "rms", getattr(torch, dtype)
        _, _, constants = noise_triton._launch(64 * width, width, kind, noise_triton._is_short(kind), WARPS)
        constants = {name: value for name, value in constants.items() if name != "num_warps"} | {"RMS": rms}
        row_bytes = triton.cdiv(width, constants["COLS"]) * noise_triton._THREAD * kind.itemsize
        kept = rms and row_bytes <= noise_triton._KEPT_BYTES
        elements = constants["ROWS"] * width / (32 * WARPS)  # of a thread
        for name, kernel, more in (
            ("forward", noise_triton._forward_kernel, {"KEPT": kept, "MEASURED": False}),
            ("backward", noise_triton._backward_kernel, {}),
        ):
            found = instructions(kernel, dtype, constants | more)
            counts = Counter(UNITS.get(each.split(".")[0], "other") for each in found)
            spills = sum(each.startswith(("LDL", "STL")) for each in found)
            shares = (f"{counts[unit] / elements:9.1f}" for unit in units)
            print(f"{dtype:9} {scale:9} {name:9} {len(found) / elements:6.1f}", *shares, f"{spills:8}")


if __name__ == "__main__":
    main()
