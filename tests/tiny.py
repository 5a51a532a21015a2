"""Tiny models, tokenizers and trainers built from configs; nothing is downloaded."""

import os
import string
import zlib
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from trl import GRPOConfig
from trl.chat_template_utils import qwen3_chat_template

from trl_alp import ALPGRPOConfig, ALPGRPOTrainer


# Where the tests compute: `make test-gpu` sets it, and every model, trainer and tensor of theirs follows.
DEVICE = os.environ.get("TRL_ALP_TEST_DEVICE", "cpu")
if DEVICE != "cpu":  # there "bit for bit" would else depend on the order in which threads add
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Inductor's pool of processes takes longer to start than these models to compile.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
CHARACTERS = string.digits + "+-= " + string.ascii_lowercase
FAMILIES = ("llama", "qwen2", "gpt2")


def cpu_only(reason: str):
    """Marks a test that cannot hold on another device, and says why."""
    return pytest.mark.skipif(DEVICE != "cpu", reason=reason)


def tensor(values, **kwargs) -> torch.Tensor:
    """`torch.tensor` on `DEVICE`."""
    return torch.tensor(values, device=DEVICE, **kwargs)


def random_states() -> list[torch.Tensor]:
    """Of the global generators."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if DEVICE == "cuda" else [])]


def environment(**more: str) -> dict[str, str]:
    """For a process beside this one, of one thread: it finds these modules and all that this process finds."""
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)} | more


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, with pad and end-of-sequence tokens."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {c: i + 3 for i, c in enumerate(CHARACTERS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def model(family: str = "qwen2", layers: int = 2, seed: int = 0, init_std: float = 0.3, dtype=torch.float32):
    """A decoder LM of a few thousand parameters; the large init makes its distribution far from uniform."""
    torch.manual_seed(seed)
    ids = {"vocab_size": 3 + len(CHARACTERS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    if family == "gpt2":
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = GPT2Config(
            n_layer=layers, n_embd=32, n_head=2, n_positions=64, initializer_range=init_std, **dropout, **ids
        )
        return GPT2LMHeadModel(config).to(DEVICE, dtype)
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[family]
    config = config_class(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=init_std,
        **ids,
    )
    return model_class(config).to(DEVICE, dtype)


def chat_model(**overrides):
    """A tiny model and its tokenizer of bytes, with Qwen3's chat template, whose tool calls TRL knows how to parse."""
    special = ["<pad>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>", extra_special_tokens=special[1:2]
    )
    tokenizer.add_tokens(special[3:])
    tokenizer.chat_template = qwen3_chat_template
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2Config(
        vocab_size=len(tokenizer), num_key_value_heads=1, max_position_embeddings=4096, pad_token_id=0,
        bos_token_id=2, eos_token_id=2, **{"initializer_range": 0.2} | size | overrides,
    )  # fmt: skip
    return Qwen2ForCausalLM(config), tokenizer


def prompts(rows: int = 16) -> Dataset:
    return Dataset.from_dict({"prompt": [f"{i % 10}+{i // 10}=" for i in range(rows)]})


def count_digits(completions: list[str], **kwargs) -> list[float]:
    """A reward that varies between completions of a random model."""
    return [sum(c.isdigit() for c in completion) / 4 for completion in completions]


def config(output_dir, config_class=ALPGRPOConfig, **overrides):
    """fp32: 2 prompts x 4 completions a micro-batch, one update per rollout."""
    settings = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": DEVICE == "cpu",
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    if issubclass(config_class, ALPGRPOConfig):
        settings["alp_noise_target"] = None  # most of these runs have no engine, and its noise would vanish
    return config_class(**settings | overrides)


def trainer(
    output_dir, trainer_class=ALPGRPOTrainer, policy=None, args=None, reward=count_digits, config_class=None, **kwargs
):
    """A trainer on a tiny model. Keyword arguments go to the config, but for those the trainer takes."""
    names = {"train_dataset", "eval_dataset", "peft_config", "rollout_func", "callbacks", "reward_processing_classes"}
    trainer_kwargs = {name: kwargs.pop(name) for name in names & kwargs.keys()}
    if args is None:
        config_class = config_class or (ALPGRPOConfig if issubclass(trainer_class, ALPGRPOTrainer) else GRPOConfig)
        args = config(output_dir, config_class, **kwargs)
    return trainer_class(
        model=policy if policy is not None else model(),
        reward_funcs=reward,
        args=args,
        processing_class=tokenizer(),
        **{"train_dataset": prompts(), **trainer_kwargs},
    )


def rollout_func(noise: float = 0.3, edit=None):
    """A behaviour policy that is the policy in other numerics: its log-probs are off by Gaussian noise.

    `edit(completion_ids, logprobs)` may change what is returned.
    """

    def rollout(batch, trainer):
        device = trainer.accelerator.device
        tokens = trainer.processing_class(batch, return_tensors="pt", padding=True).to(device)
        width = tokens["input_ids"].shape[1]
        was_training = trainer.model.training
        trainer.model.eval()
        with torch.no_grad():
            out = trainer.model.generate(
                **tokens, max_new_tokens=trainer.max_completion_length, do_sample=True, top_k=0, use_cache=True
            )
            logits = trainer.model(out, attention_mask=(out != 0).long()).logits[:, width - 1 : -1].log_softmax(-1)
        trainer.model.train(was_training)
        scores = logits.gather(-1, out[:, width:, None])[..., 0]
        scores = scores + noise * torch.randn_like(scores)
        completion_ids, logprobs = [], []
        for row, score in zip(out[:, width:].tolist(), scores.tolist(), strict=True):
            length = row.index(1) + 1 if 1 in row else len(row)
            completion_ids.append(row[:length])
            logprobs.append(score[:length])
        if edit is not None:
            completion_ids, logprobs = edit(completion_ids, logprobs)
        prompt_ids = [trainer.processing_class(prompt)["input_ids"] for prompt in batch]
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logprobs}

    return rollout


def fixed_rollouts(batch, trainer, masked_rank=None):
    """A `rollout_func`: the same completions and log-probs on any number of processes, from no model; those of
    `masked_rank` are the environment's."""
    completion_ids = []
    for i, prompt in enumerate(batch):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{prompt}{i % 4}".encode()))
        completion_ids.append(torch.randint(3, 13, (2 + i % 4,), generator=generator).tolist())
    mask = int(trainer.accelerator.process_index != masked_rank)
    return {
        "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in batch],
        "completion_ids": completion_ids,
        "logprobs": [[-3.0 - 0.1 * token for token in ids] for ids in completion_ids],
        "env_mask": [[mask] * len(ids) for ids in completion_ids],
    }


def saved(path, **kwargs):
    """A tiny policy that TRL can load again by its name, as it does for the reference model."""
    policy = model(**kwargs)
    policy.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return type(policy).from_pretrained(path).to(DEVICE)


def parameters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def history(a_trainer) -> list[dict]:
    """The log, without what measures time."""
    timed = ("step_time", "train_runtime", "per_second", "total_flos", "train_tokens")
    return [{k: v for k, v in row.items() if not any(t in k for t in timed)} for row in a_trainer.state.log_history]
