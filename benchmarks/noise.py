# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""Time and bandwidth of the noise op: both backends beside each other and beside the floor that memory sets.

    python benchmarks/noise.py --json noise.json                       # on a GPU, 1 MB to 1 GB
    python benchmarks/noise.py --device cpu --megabytes 1 12           # torch alone
    python benchmarks/noise.py --sweep                                 # on a GPU, also other numbers of warps

The floor is the bytes that must move (the forward reads and writes the hidden state, the backward reads its gradient)
over the bandwidth of a large copy measured in the same run. On a GPU the times are those of the device, its cache
emptied before each repetition: it is held up while the host launches, so that launching is not in them (`host.py` is
about that). Needs torch, Triton and the sources of this package, nothing else; meant to take under two minutes.
"""

import argparse
import json
import statistics
import sys
import time
import types
from itertools import product
from pathlib import Path

import torch


# `trl_alp` itself imports TRL, which this script can do without.
package = types.ModuleType("trl_alp")
package.__path__ = [str(Path(__file__).parents[1] / "src" / "trl_alp")]
sys.modules["trl_alp"] = package
from trl_alp.noise import NoiseLevels, add_noise, noise_triton  # noqa: E402


def milliseconds(function, device: str) -> float:
    """Median time of one call."""
    if device == "cuda":
        return device_milliseconds(function)
    times = []
    for repetition in range(8):
        start = time.perf_counter()
        function()
        if repetition > 0:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def device_milliseconds(function, repetitions: int = 15) -> float:
    """The same on a GPU, without what the host takes to launch it."""
    cache = torch.empty(2**28, dtype=torch.int8, device="cuda")
    function()  # compiles
    torch.cuda.synchronize()
    times = []
    for _ in range(repetitions):
        cache.zero_()
        torch.cuda._sleep(4_000_000)  # cycles, two milliseconds
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def copy_bandwidth(device: str, megabytes: float) -> float:
    """Bytes read plus bytes written per second of a copy."""
    source = torch.randn(int(megabytes * 2**20) // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (milliseconds(lambda: target.copy_(source), device) / 1e3)


def check(add, device: str) -> None:
    """Stop if the op is wrong: a fast wrong one is worth nothing."""
    hidden, grad = torch.randn(2, 64, 3, 1000, device=device)
    log_sigma = torch.tensor(-1.0, device=device, requires_grad=True)
    for noise_scale in ("absolute", "rms"):
        out = add(hidden, NoiseLevels(log_sigma.reshape(1)), noise_scale)
        noise = (out - hidden).detach()
        (found,) = torch.autograd.grad(out, log_sigma, grad)
        size = noise.norm() / (log_sigma.exp() * noise.numel() ** 0.5)  # hidden has RMS 1
        assert abs(size - 1) < 0.02, f"{noise_scale}: the noise has size {size}, not 1"
        assert torch.isclose(found, (grad * noise).sum(), rtol=1e-3, atol=1e-2), f"{noise_scale}: wrong gradient"


def cases(hidden: torch.Tensor, noise_scale: str, add):
    """Forward and backward of one op, with the bytes each must move."""
    log_sigma = torch.tensor(-4.0, device=hidden.device, requires_grad=True)
    levels = NoiseLevels(log_sigma.reshape(1))  # made once for all layers of a pass
    grad = torch.randn_like(hidden)

    def forward():
        with torch.no_grad():
            add(hidden, levels, noise_scale)

    out = add(hidden, levels, noise_scale)
    yield "forward", 2 * hidden.nbytes, forward
    yield "backward", hidden.nbytes, lambda: torch.autograd.grad(out, log_sigma, grad, retain_graph=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--width", type=int, default=3584, help="hidden size; that of Qwen2.5-7B by default")
    parser.add_argument("--sweep", action="store_true", help="the kernels with other numbers of warps as well")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    ops = {"torch": lambda hidden, levels, scale: add_noise(hidden, levels, 0, 7, scale, "torch")}
    if args.device == "cuda" and noise_triton is not None:
        ops["triton"] = lambda hidden, levels, scale: add_noise(hidden, levels, 0, 7, scale, "triton")
        for warps in (1, 2, 4, 8, 16) if args.sweep else ():
            ops[f"warps={warps}"] = lambda hidden, levels, scale, warps=warps: noise_triton.AddNoiseTriton.apply(
                hidden, levels.token, levels, 0, 7, scale, 0, warps
            )
    for add in ops.values():
        check(add, args.device)
    bandwidth = copy_bandwidth(args.device, max(args.megabytes))
    rows = []
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": noise_triton.triton.__version__ if noise_triton is not None else None,
        "width": args.width,
        "copy_gigabytes_per_second": bandwidth / 1e9,
        "rows": rows,
    }
    print(*(f"{name}: {value}" for name, value in report.items() if name != "rows"), sep="\n")
    head = (
        f"{'MB':>6} {'dtype':9} {'scale':9} {'pass':9} {'op':9} {'ms':>9} {'floor ms':>9} {'of floor':>9} {'GB/s':>7}"
    )
    print("", head, "-" * len(head), sep="\n")
    for megabytes, dtype in product(args.megabytes, (torch.float32, torch.bfloat16)):
        tokens = max(1, int(megabytes * 2**20) // (dtype.itemsize * args.width))
        hidden = torch.randn(1, tokens, args.width, device=args.device).to(dtype)
        for noise_scale, (op, add) in product(("absolute", "rms"), ops.items()):
            for direction, bytes_moved, function in cases(hidden, noise_scale, add):
                ms = milliseconds(function, args.device)
                row = {
                    "megabytes": megabytes,
                    "dtype": str(dtype).removeprefix("torch."),
                    "scale": noise_scale,
                    "pass": direction,
                    "op": op,
                    "ms": ms,
                    "floor_ms": 1e3 * bytes_moved / bandwidth,
                    "gigabytes_per_second": bytes_moved / ms / 1e6,
                }
                rows.append(row)
                print(
                    f"{megabytes:6g} {row['dtype']:9} {noise_scale:9} {direction:9} {op:9} {ms:9.4f} "
                    f"{row['floor_ms']:9.4f} {row['floor_ms'] / ms:8.0%}  {row['gigabytes_per_second']:7.0f}",
                    flush=True,
                )
                if args.json:
                    args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
