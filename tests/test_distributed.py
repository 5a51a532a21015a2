import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from trl_alp.perturbation import noise_seed


HERE = Path(__file__).parent


def launch(out, processes, **overrides):
    # `accelerate launch` starts several CPU processes through MPI only; on other devices it calls this launcher too.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(HERE / "distributed_run.py"), str(out), *[f"{k}={v}" for k, v in overrides.items()]]
    environment = tiny.environment(ACCELERATE_USE_CPU="true", GLOO_SOCKET_IFNAME="lo")
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


@pytest.mark.slow
def test_resume_on_two_processes_is_exact_also_where_one_does_not_see_the_file(tmp_path):
    whole = launch(tmp_path / "whole", 2, max_steps=4)
    resumed = launch(tmp_path / "resumed", 2, max_steps=4, resume=tmp_path / "whole" / "checkpoint-2")
    for rank in range(2):
        assert torch.equal(whole[rank]["log_sigma"], resumed[rank]["log_sigma"])
        assert whole[rank]["seeds"][2:] == resumed[rank]["seeds"]
        for name, weight in whole[rank]["weights"].items():
            assert torch.equal(weight, resumed[rank]["weights"][name]), name


@pytest.mark.slow
@pytest.mark.parametrize("enabled", [True, False])
def test_one_process_with_two_steps_and_two_with_one_train_alike(tmp_path, enabled):
    settings = {"fixed_rollouts": 1, "alp_enabled": int(enabled), "alp_monitor_every": 1, "max_steps": 3}
    two, _ = launch(tmp_path / "two", 2, **settings)
    (one,) = launch(tmp_path / "one", 1, gradient_accumulation_steps=2, **settings)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=0, atol=1e-5)
    torch.testing.assert_close(two["log_sigma"], one["log_sigma"], rtol=0, atol=1e-5)
    for ours, theirs in zip(two["log"][:3], one["log"][:3], strict=True):
        assert abs(ours["loss"] - theirs["loss"]) < 1e-5
        pooled = [name for name in ours if name.startswith("alp/") and "noise" not in name and "reward" not in name]
        assert len(pooled) > 40
        for name in pooled:  # the same tokens, however they are spread over processes
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name


def test_a_process_whose_micro_batch_is_all_masked_does_not_hang_the_others(tmp_path):
    first, second = launch(tmp_path, 2, fixed_rollouts=1, masked_rank=1, alp_monitor_every=1)
    assert torch.equal(first["log_sigma"], second["log_sigma"]) and torch.isfinite(first["log_sigma"]).all()
    assert all(torch.isfinite(weight).all() for weight in first["weights"].values())


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_resumes_on_one(tmp_path):
    launch(tmp_path / "two", 2)
    (one,) = launch(
        tmp_path / "one", 1, max_steps=4, gradient_accumulation_steps=2, resume=tmp_path / "two" / "checkpoint-2"
    )
    assert one["seeds"] == [noise_seed(3, i) for i in range(4, 8)]  # no seed of the first half again
    assert [row["step"] for row in one["log"][:4]] == [1, 2, 3, 4]


def sharded_by(version, model):
    if version == "FSDP1":
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        policy = ModuleWrapPolicy({type(model.model.layers[0])})
        size = sum(p.numel() for p in model.parameters())
        model = FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"))
        assert sum(p.numel() for p in model.parameters()) < 0.6 * size  # each process holds half of it
        return model
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


def compare_with_one_process(rank, version, path):
    """One process of two: shard a model, and compare its loss and sigma's gradient with the whole model's."""
    import tiny

    from trl_alp import LayerwisePerturbation

    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    for checkpointing in (False, True):
        results = []
        for shard in (False, True):
            model = tiny.model().train()
            perturbation = LayerwisePerturbation(model, sigma_init=0.1)
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            if shard:
                model = sharded_by(version, model)
            with perturbation.applied(3):
                loss = model(ids, labels=ids, use_cache=False).loss
                loss.backward()
            results.append((loss.detach(), perturbation.log_sigma.grad))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    torch.distributed.destroy_process_group()


# Through accelerate a run on a CPU silently becomes DDP, so the model is sharded here by hand.
@pytest.mark.parametrize("version", [pytest.param("FSDP1", marks=pytest.mark.slow), "FSDP2"])
def test_loss_and_sigma_gradient_under_fsdp_are_those_of_one_process(tmp_path, version):
    torch.multiprocessing.spawn(compare_with_one_process, args=(version, tmp_path / "rendezvous"), nprocs=2)


@pytest.mark.slow
def test_two_processes_measure_the_same_channels(tmp_path):
    settings = {"fixed_rollouts": 1, "alp_noise_scale": "channel", "alp_monitor_every": 1}
    first, second = launch(tmp_path / "two", 2, **settings)
    assert torch.equal(first["channel_rms"], second["channel_rms"])
    assert torch.equal(first["log_sigma"], second["log_sigma"])
    assert all(torch.equal(weight, second["weights"][name]) for name, weight in first["weights"].items())


def test_two_processes_fit_the_same_sigma(tmp_path):
    settings = {"fixed_rollouts": 1, "alp_noise_target": 1, "alp_monitor_every": 1, "per_device_train_batch_size": 16}
    first, second = launch(tmp_path, 2, **settings)
    assert torch.equal(first["log_sigma"], second["log_sigma"])
    (found, *_) = [row for row in first["log"] if "alp/noise/fit/sigma" in row]
    asked = 0.01 * (found["alp/noise/fit/k3_mismatch"] / found["alp/noise/fit/k3_noise"]) ** 0.5
    assert found["alp/noise/fit/sigma"] == pytest.approx(min(asked, 0.1), rel=1e-3)  # tenfold at most
