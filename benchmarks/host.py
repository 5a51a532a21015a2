# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""Host time and kernels that the perturbation adds to a decoder layer, forward and backward together.

    python benchmarks/host.py --json host.json                 # on a GPU, a minute
    python benchmarks/host.py --source OTHER/CHECKOUT/src      # of another version, for a comparison

The model is many small layers, so that a GPU waits for launches and nothing else. Arms alternate; each figure is what
an arm takes beyond a model without hooks, divided by the number of layers. Other work on a machine only ever adds to
such a time, hence the lowest tenth of the repetitions is compared; the medians are beside it. *Empty hook* is one
`register_forward_pre_hook` that does nothing: what any hook costs here. *Measured* is a pass that also measures how
much of the noise survives rounding, as the first one after each row of the log does. Needs TRL and the sources of this
package, no network.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from contextlib import nullcontext
from itertools import product
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
if "--source" in sys.argv:
    sys.path.insert(0, sys.argv[sys.argv.index("--source") + 1])

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import trl_alp
from trl_alp import LayerwisePerturbation


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def small_model(layers: int) -> torch.nn.Module:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).to(DEVICE).train()


def arms(layers: int) -> dict[str, tuple]:
    """Models by name, each with its perturbation or None."""
    made = {"no hook": (small_model(layers), None)}
    hooked = small_model(layers)
    for layer in hooked.model.layers:
        layer.register_forward_pre_hook(lambda module, args: None)
    made["empty hook"] = (hooked, None)
    settings = [("torch", "rms", True, False)]
    if DEVICE == "cuda":
        settings += [("triton", *each) for each in product(("rms", "absolute"), (True, False), [False])]
    settings += [(settings[-1][0], "rms", True, True)]
    for backend, scale, learned, measured in settings:
        model = small_model(layers)
        perturbation = LayerwisePerturbation(model, noise_scale=scale, learnable=learned, noise_backend=backend)
        perturbation.measuring = measured
        name = f"{backend}, {scale}, {'learned' if learned else 'fixed'}{', measured' if measured else ''}"
        made[name] = (model, perturbation.to(DEVICE))
    return made


def step(model, perturbation, ids) -> None:
    with nullcontext() if perturbation is None else perturbation.applied(7):
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    if perturbation is not None:
        perturbation.forget_passes()


def seconds(model, perturbation, ids) -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step(model, perturbation, ids)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def kernels(model, perturbation, ids) -> int | None:
    """Kernels, copies and fills on the device."""
    if DEVICE != "cuda":
        return None
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step(model, perturbation, ids)
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events())


def lowest_tenth(took: list[float]) -> float:
    return statistics.quantiles(took, n=10)[0]


def report_of(times: dict[str, list[float]], counts: dict[str, int | None], layers: int) -> dict:
    """What was measured so far."""

    def beyond(took: list[float], of) -> float:
        return 1e6 * (of(took) - of(times["no hook"])) / layers

    rows = []
    for name, took in times.items():
        rows.append(
            {
                "arm": name,
                "us_per_layer": beyond(took, lowest_tenth),
                "us_per_layer_of_medians": beyond(took, statistics.median),
                "kernels_per_layer": None if counts[name] is None else (counts[name] - counts["no hook"]) / layers,
            }
        )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "torch": torch.__version__,
        "source": str(Path(trl_alp.__file__).parent),
        "layers": layers,
        "repetitions": len(times["no hook"]),
        "no_hook_ms": 1e3 * lowest_tenth(times["no hook"]),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="folder that holds the `trl_alp` to measure")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    ids = torch.arange(128, device=DEVICE).reshape(2, 64)
    models, times = arms(args.layers), {}
    counts = {}
    for name, (model, perturbation) in models.items():
        seconds(model, perturbation, ids)  # compiles
        counts[name] = kernels(model, perturbation, ids)
    gc.disable()
    for repetition in range(args.repetitions):
        for name, (model, perturbation) in models.items():
            times.setdefault(name, []).append(seconds(model, perturbation, ids))
        if args.json and repetition > 0:
            args.json.write_text(json.dumps(report_of(times, counts, args.layers), indent=1) + "\n")
    report = report_of(times, counts, args.layers)
    hook = next(row["us_per_layer"] for row in report["rows"] if row["arm"] == "empty hook")
    print(f"{report['device']}, torch {report['torch']}; without hooks {report['no_hook_ms']:.1f} ms a pass")
    print(f"{'arm':34} {'us a layer':>10} {'of medians':>10} {'/ empty hook':>12} {'kernels':>8}")
    for row in report["rows"]:
        print(
            f"{row['arm']:34} {row['us_per_layer']:10.1f} {row['us_per_layer_of_medians']:10.1f} "
            f"{row['us_per_layer'] / hook if hook > 0 else float('nan'):12.1f} "
            f"{'' if row['kernels_per_layer'] is None else format(row['kernels_per_layer'], '.1f'):>8}"
        )


if __name__ == "__main__":
    main()
