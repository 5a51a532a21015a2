"""vLLM itself as the lab's behaviour policy: every batch of rollouts comes from the current weights."""

import sys
from pathlib import Path

import pytest


pytest.importorskip("vllm", reason="the real engine is not installed: `make test-vllm`")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "lab"))

import run


SETTINGS = {
    "arm": "tis",
    "size": {"hidden": 64, "layers": 2, "heads": 2},
    "start_accuracy": 0.0,
    "updates_per_rollout": 2,
    "mini_batch": 8,
    "num_generations": 4,
    "updates": 6,
    "eval_every": 6,
    "eval_problems": 4,
    "learning_rate": 1e-3,
}


def fresh_k3(numerics: str, folder: Path, monkeypatch) -> list[float]:
    """k3 between old policy and engine at each batch of rollouts."""
    monkeypatch.setattr(
        run.addition, "is_correct", lambda completions, answer=None, **kwargs: [len(c) % 7 / 7 for c in completions]
    )
    result = run.run(SETTINGS | {"numerics": numerics}, folder)
    return [row["alp/old/kl/k3"] for row in result["log"][::2]]


def test_the_mismatch_is_that_of_the_engines_number_format_at_every_sync(tmp_path, monkeypatch):
    fp32 = fresh_k3("vllm-fp32", tmp_path, monkeypatch)
    bf16 = fresh_k3("vllm-bf16", tmp_path, monkeypatch)
    assert len(fp32) == 3 and max(fp32) < 1e-9
    assert min(bf16) > 1e-8 and max(bf16) < 1e-2
