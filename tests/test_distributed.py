import os
import subprocess
import sys
from pathlib import Path

import torch

from trl_alp.perturbation import noise_seed


HERE = Path(__file__).parent


def launch(out, processes, **overrides):
    # `accelerate launch` starts several CPU processes through MPI only; on other devices it calls this launcher too.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(HERE / "distributed_run.py"), str(out), *[f"{k}={v}" for k, v in overrides.items()]]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(HERE),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [torch.load(out / f"rank_{rank}.pt", weights_only=False) for rank in range(processes)]


def test_two_processes_share_sigma_and_weights_and_draw_the_noise_of_one_with_two_steps(tmp_path):
    first, second = launch(tmp_path / "two", 2)
    assert first["world_size"] == 2
    assert torch.equal(first["log_sigma"], second["log_sigma"])
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
    assert first["log_sigma"].std() > 0  # sigma was trained, each layer on its own
    (single,) = launch(tmp_path / "one", 1, gradient_accumulation_steps=2)
    interleaved = [seed for pair in zip(first["seeds"], second["seeds"], strict=True) for seed in pair]
    assert interleaved == single["seeds"] == [noise_seed(3, i) for i in range(4)]
    assert (tmp_path / "two" / "checkpoint-2" / "alp_state.pt").is_file()
    assert first["log"][0]["alp/kl/k3"] == second["log"][0]["alp/kl/k3"]  # statistics are over all processes
