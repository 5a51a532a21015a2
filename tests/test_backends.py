"""Backends other than DDP (`test_distributed.py`), on a CPU: FSDP, DeepSpeed, split and quantised models.

As a script, `test_backends.py OUT name=value ...` is one process of a short run; what it saw goes to `OUT/rank_N.pt`.
"""

import importlib.util
import subprocess
import sys

import pytest
import tiny
import torch

from trl_alp import LayerwisePerturbation


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed (`DS_BUILD_OPS=0 pip install deepspeed`)"
)
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes (`pip install bitsandbytes`)"
)
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def launch(out, processes, gpu=False, **settings):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [__file__, str(out), *[f"{k}={v}" for k, v in settings.items()]]
    environment = tiny.environment(TRL_ALP_TEST_DEVICE="cuda" if gpu else "cpu")
    if not gpu:
        on_cpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
        environment |= {"GLOO_SOCKET_IFNAME": "lo"} | on_cpu
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [torch.load(out / f"rank_{rank}.pt", weights_only=False) for rank in range(processes)]


def trained_once(policy, out, **settings):
    trainer = tiny.trainer(out, policy=policy, alp_sigma_lr=0.05, seed=3, **settings)
    trainer.train()
    return trainer


def perturbed(model, perturbation):
    with perturbation.applied(3):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
    return loss.detach(), perturbation.log_sigma.grad


# ---- On a CPU, with nothing but torch and accelerate ----


def fsdp1(rank, path):
    """One process of two: shard a model with FSDP1 and compare with the whole model."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    for checkpointing in (False, True):
        whole = tiny.model().train()
        expected = perturbed(whole, LayerwisePerturbation(whole, sigma_init=0.1))
        for use_orig_params in (True, False):
            model = tiny.model().train()
            perturbation = LayerwisePerturbation(model, sigma_init=0.1)
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            sharded = FullyShardedDataParallel(
                model,
                auto_wrap_policy=ModuleWrapPolicy({type(model.model.layers[0])}),
                use_orig_params=use_orig_params,
                device_id=torch.device("cpu"),
            )
            assert sum(p.numel() for p in sharded.parameters()) < sum(p.numel() for p in whole.parameters())
            loss, gradient = perturbed(sharded, perturbation)
            assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1])
    torch.distributed.destroy_process_group()


@pytest.mark.slow  # here; the fast tests have it by another way of sharding
def test_loss_and_sigma_gradient_under_fsdp1_are_those_of_one_process(tmp_path):
    torch.multiprocessing.spawn(fsdp1, args=(tmp_path / "rendezvous",), nprocs=2)


def test_a_model_split_by_a_device_map_is_perturbed_and_trained_like_a_whole_one(tmp_path):
    from accelerate import dispatch_model

    parts = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    split = dispatch_model(tiny.model(), dict.fromkeys(parts, "cpu"), force_hooks=True)
    assert all(hasattr(layer, "_hf_hook") for layer in split.model.layers)  # accelerate moves each layer's input
    results = []
    for model in (tiny.model(), split):
        perturbation = LayerwisePerturbation(model, sigma_init=0.1)
        results.append(perturbed(model.train(), perturbation))
        assert results[-1][0] != model(IDS, labels=IDS).loss
        perturbation.remove()
        model.zero_grad()
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])

    whole, split = trained_once(tiny.model(), tmp_path), trained_once(split, tmp_path)
    assert whole.perturbation.sigma.std() > 0
    assert torch.equal(whole.perturbation.sigma, split.perturbation.sigma)
    weights = tiny.parameters(split.model)
    assert all(torch.equal(value, weights[name]) for name, value in tiny.parameters(whole.model).items())


@pytest.mark.slow
def test_fsdp2_through_accelerate_on_a_cpu_trains_what_ddp_trains_and_resumes_exactly(tmp_path):
    settings = {"max_steps": 4, "alp_monitor_every": 1, "gradient_checkpointing": 1}
    whole = launch(tmp_path / "whole", 2, fsdp2=1, **settings)
    assert all(state["sharded"] and state["sigma_steps"] == 4 for state in whole)
    assert whole[0]["log_sigma"].std() > 0 and torch.equal(whole[0]["log_sigma"], whole[1]["log_sigma"])
    ddp, _ = launch(tmp_path / "ddp", 2, **settings)
    assert ddp["wrapper"] == "DistributedDataParallel"
    torch.testing.assert_close(whole[0]["log_sigma"], ddp["log_sigma"], rtol=0, atol=1e-5)
    for name, weight in ddp["weights"].items():
        torch.testing.assert_close(whole[0]["weights"][name], weight, rtol=0, atol=1e-5)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed = launch(tmp_path / "resumed", 2, fsdp2=1, resume=checkpoint, **settings)
    for before, after in zip(whole, resumed, strict=True):
        assert after["seeds"] == before["seeds"][2:] and after["log"][:4] == before["log"][:4]
        assert torch.equal(before["log_sigma"], after["log_sigma"])
        assert all(torch.equal(weight, after["weights"][name]) for name, weight in before["weights"].items())


# ---- On a CPU, where the package is installed ----


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_under_deepspeed_on_a_cpu_sigma_steps_with_the_policy_and_resumes_exactly(tmp_path, stage):
    settings = {"zero": stage, "alp_monitor_every": 1, "gradient_checkpointing": 1}
    whole = launch(tmp_path / "whole", 2, max_steps=4, **settings)
    assert [state["wrapper"] for state in whole] == ["DeepSpeedEngine"] * 2
    assert [state["sharded"] for state in whole] == [stage == 3] * 2
    assert [(state["policy_steps"], state["sigma_steps"]) for state in whole] == [(4, 4)] * 2
    assert whole[0]["log_sigma"].std() > 0 and torch.equal(whole[0]["log_sigma"], whole[1]["log_sigma"])
    assert "alp/noise_off/kl/k3" in whole[0]["log"][0]
    assert (tmp_path / "whole" / "checkpoint-2" / "alp_state.pt").is_file()
    resumed = launch(tmp_path / "resumed", 2, max_steps=4, resume=tmp_path / "whole" / "checkpoint-2", **settings)
    for before, after in zip(whole, resumed, strict=True):
        assert after["seeds"] == before["seeds"][2:] and after["log"][:4] == before["log"][:4]
        assert torch.equal(before["log_sigma"], after["log_sigma"])
        assert all(torch.equal(weight, after["weights"][name]) for name, weight in before["weights"].items())


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_on_a_cpu_trains_what_ddp_trains(tmp_path, stage):
    deepspeed, _ = launch(tmp_path / "deepspeed", 2, zero=stage, gradient_accumulation_steps=2)
    ddp, _ = launch(tmp_path / "ddp", 2, gradient_accumulation_steps=2)
    assert (deepspeed["wrapper"], ddp["wrapper"]) == ("DeepSpeedEngine", "DistributedDataParallel")
    torch.testing.assert_close(deepspeed["log_sigma"], ddp["log_sigma"], rtol=0, atol=1e-5)
    for name, weight in ddp["weights"].items():
        torch.testing.assert_close(deepspeed["weights"][name], weight, rtol=0, atol=1e-5)


@pytest.mark.slow
@needs_deepspeed
def test_lora_under_zero_3_on_a_cpu_trains_sigma(tmp_path):
    first, second = launch(tmp_path, 2, zero=3, lora=1, gradient_checkpointing=1)
    assert first["sharded"] and first["policy_steps"] == first["sigma_steps"] == 2
    assert first["log_sigma"].std() > 0 and torch.equal(first["log_sigma"], second["log_sigma"])


@pytest.mark.slow
@needs_bitsandbytes
def test_qlora_on_a_cpu_trains_sigma_and_the_adapter_only(tmp_path):
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny.saved(tmp_path)
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    sigmas = []
    for checkpointing in (False, True):
        policy = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=quantized, device_map={"": "cpu"}, dtype=torch.float32
        )
        assert isinstance(policy.model.layers[0].self_attn.q_proj, Linear4bit)
        adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        settings = {"alp_sigma_lr": 0.05, "seed": 3, "beta": 0.1, "gradient_checkpointing": checkpointing}
        trainer = tiny.trainer(tmp_path / "out", policy=policy, peft_config=adapter, **settings)
        before = tiny.parameters(trainer.model)
        trainer.train()
        changed = [name for name, value in tiny.parameters(trainer.model).items() if not value.equal(before[name])]
        assert changed and all("lora_" in name for name in changed)
        assert trainer.state.log_history[0]["alp/noise/effective/min"] > 0.9
        sigmas.append(trainer.perturbation.sigma)
    assert sigmas[0].std() > 0 and torch.equal(*sigmas)  # the recompute of checkpointing met the same noise


FITTED = {"alp_noise_target": 1, "scale": "channel", "fixed_rollouts": 1, "alp_monitor_every": 1, "max_steps": 4}
FITTED |= {"per_device_train_batch_size": 16, "gradient_checkpointing": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", ["fsdp2=1", *(pytest.param(f"zero={stage}", marks=needs_deepspeed) for stage in (2, 3))]
)
def test_sigma_and_channels_are_fitted_as_under_ddp_and_resume_exactly(tmp_path, backend):
    settings = FITTED | dict([backend.split("=")])
    whole = launch(tmp_path / "whole", 2, **settings)
    ddp, _ = launch(tmp_path / "ddp", 2, **FITTED)
    for state in whole:
        assert torch.equal(state["log_sigma"], whole[0]["log_sigma"])
        assert torch.equal(state["channel_rms"], whole[0]["channel_rms"])
    fits = [[row[name] for row in state["log"] if (name := "alp/noise/fit/sigma") in row] for state in (ddp, whole[0])]
    assert len(fits[0]) == len(fits[1]) >= 3 and fits[1] == pytest.approx(fits[0], rel=1e-3)
    torch.testing.assert_close(whole[0]["log_sigma"], ddp["log_sigma"], rtol=0, atol=1e-3)
    torch.testing.assert_close(whole[0]["channel_rms"], ddp["channel_rms"], rtol=1e-3, atol=1e-5)
    resumed = launch(tmp_path / "resumed", 2, resume=tmp_path / "whole" / "checkpoint-2", **settings)
    for before, after in zip(whole, resumed, strict=True):
        assert torch.equal(before["log_sigma"], after["log_sigma"])
        assert torch.equal(before["channel_rms"], after["channel_rms"])


# ---- One process of a run ----


def run(out, resume=None, zero=0, fsdp2=0, fp16=0, lora=0, scale=None, fixed_rollouts=0, **overrides):
    zero, fsdp2, fp16, lora = int(zero), int(fsdp2), int(fp16), int(lora)
    on_gpu = tiny.DEVICE != "cpu"
    settings = {"use_cpu": not on_gpu, "fp16": bool(fp16), "save_strategy": "steps", "save_steps": 2, "seed": 3}
    if zero or fsdp2:
        # `use_cpu=True` would leave DeepSpeed and FSDP2 out: DDP runs, without a word.
        settings["use_cpu"] = False
    if (zero or fsdp2) and not on_gpu:
        # Of itself accelerate finds no backend on a CPU then, and takes each process for the only one.
        from accelerate.state import DistributedType, PartialState

        kind = DistributedType.MULTI_CPU if zero else DistributedType.MULTI_GPU  # FSDP is looked for on GPUs only
        PartialState._prepare_backend = lambda *args: ("gloo", kind)
    if zero:
        automatic = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        settings["deepspeed"] = dict.fromkeys((*automatic, "gradient_clipping"), "auto") | {
            "zero_optimization": {"stage": zero}
        }
        if zero == 3:  # parameters below the threshold, here all, would stay whole
            settings["deepspeed"]["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            settings["deepspeed"]["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    if fsdp2:
        settings["fsdp"] = "full_shard auto_wrap"
        settings["fsdp_config"] = {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"]}
    if lora:
        from peft import LoraConfig

        settings["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    if scale is not None:
        settings["alp_noise_scale"] = scale
    if int(fixed_rollouts):
        # The same completions in the same order on any number of processes.
        import trl.trainer.grpo_trainer

        trl.trainer.grpo_trainer.shuffle_sequence_dict = lambda batch: batch
        settings["rollout_func"] = tiny.fixed_rollouts
        settings["train_dataset"] = tiny.prompts(32)  # one epoch: a resumed TRL run has the first one's order in all
    trainer = tiny.trainer(out, alp_sigma_lr=0.05, **settings | {k: int(v) for k, v in overrides.items()})
    seeds, sigma_steps = [], []
    applied = trainer.perturbation.applied
    trainer.perturbation.applied = lambda seed: seeds.append(seed) or applied(seed)
    trainer.sigma_optimizer.adam.register_step_post_hook(lambda *args: sigma_steps.append(1))
    trainer.train(resume_from_checkpoint=resume)
    parameters = list(trainer.model.parameters())
    state = {
        "wrapper": type(trainer.model_wrapped).__name__,
        "sharded": all(hasattr(p, "full_tensor") or p.numel() == 0 for p in parameters),
        "seeds": seeds,
        "sigma_steps": len(sigma_steps),
        "policy_steps": trainer.deepspeed.global_steps if zero else trainer.state.global_step,
        "loss_scale": trainer.accelerator.scaler.get_scale() if fp16 else None,
        "log_sigma": trainer.perturbation.log_sigma.detach().cpu(),
        "channel_rms": trainer.perturbation.channel_rms,
        "log": tiny.history(trainer),
    }
    if zero == 3:
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            state["weights"] = tiny.parameters(trainer.model)
    else:
        weights = tiny.parameters(trainer.model)
        state["weights"] = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in weights.items()}
    torch.save(state, f"{out}/rank_{trainer.accelerator.process_index}.pt")


if __name__ == "__main__":
    run(sys.argv[1], **dict(pair.split("=") for pair in sys.argv[2:]))


@pytest.mark.slow
@needs_bitsandbytes
def test_doctor_calls_a_qlora_model_and_its_dense_copy_healthy_and_names_a_packed_sync(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM

    from trl_alp.doctor import GenerationSetting, TransformersEngine, diagnose
    from trl_alp.doctor.engines import packed, plain_copy

    torch.manual_seed(0)
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": len(tiny.tokenizer()), "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    Qwen2ForCausalLM(
        Qwen2Config(num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1, **size, **ids)
    ).save_pretrained(tmp_path / "base")
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantized, device_map={"": "cpu"}, dtype=torch.float32
    )
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    assert len(packed(model)) == 14
    model(torch.tensor([[3, 4, 5]]))  # on a CPU, bitsandbytes packs anew in the first forward
    dense = plain_copy(model)
    assert not packed(dense)
    dense.save_pretrained(tmp_path / "dense")  # as a plain model
    assert not packed(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))

    class PackedSync(TransformersEngine):
        def sync(self, model):
            layer = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
            with torch.no_grad():
                self.model.model.layers[0].self_attn.q_proj.weight.copy_(layer.weight)

    prompts, setting = [f"{i}+{i % 5}=" for i in range(64)], GenerationSetting(max_tokens=12)
    healthy = diagnose(model, tiny.tokenizer(), TransformersEngine(dense, tiny.tokenizer()), prompts, setting)
    assert healthy.healthy, healthy.verdict
    broken = diagnose(model, tiny.tokenizer(), PackedSync(plain_copy(model), tiny.tokenizer()), prompts, setting)
    assert broken.cause == "weights" and "14 packed tensors" in broken.verdict, broken.verdict
