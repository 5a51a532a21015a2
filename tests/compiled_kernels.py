"""Compile every kernel that `noise.add_noise` may launch for an NVIDIA GPU, with none at hand; print how many.

What the interpreter runs need not compile. Each launch stops short of the device, so its results mean nothing.
"""

import functools
import itertools
import types

import torch
import triton
from triton.backends.compiler import GPUTarget

from trl_alp import noise_triton
from trl_alp.noise import NoiseLevels, add_noise


driver = types.SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0, get_current_stream=lambda _: 0
)
triton.runtime.driver.set_active(driver)
compiled = 0


def compile_only(run, *args, **kwargs):
    global compiled
    compiled += run(*args, **kwargs | {"warmup": True}) is not None


for kernel in (noise_triton._forward_kernel, noise_triton._backward_kernel):
    kernel.run = functools.partial(compile_only, kernel.run)
dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
cases = [*itertools.product(dtypes, (64,), ("absolute", "rms", "channel"), (False, True))]
cases += [(torch.bfloat16, 7, "rms", False), (torch.float32, 7, "absolute", False)]  # rows that no vector divides
for dtype, width, noise_scale, measured in cases:
    log_sigma = torch.zeros(1, requires_grad=True, dtype=torch.promote_types(dtype, torch.float32))
    levels = NoiseLevels(log_sigma, measured=measured, channels=torch.ones(1, width))
    add_noise(torch.zeros(2, width, dtype=dtype), levels, 0, 2**63, noise_scale, "triton").sum().backward()
print(compiled)
