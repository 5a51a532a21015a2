"""The doctor on a second copy of the model under transformers, with one fault planted at a time."""

import argparse
import contextlib
import copy
import http.server
import json
import math
import re
import shlex
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from trl import GRPOTrainer

from trl_alp.doctor import __main__ as doctor
from trl_alp.doctor.counterfactuals import processed, scaled_adapter, score_as_trl, without_adapter
from trl_alp.doctor.diagnosis import diagnose
from trl_alp.doctor.engines import GenerationSetting, Samples, TransformersEngine, plain_copy
from trl_alp.doctor.findings import report
from trl_alp.doctor.prompts import read_prompts
from trl_alp.doctor.vllm_engines import VLLMEngine, VLLMServerEngine
from trl_alp.doctor.weights import flat


TOKENIZER = tiny.tokenizer()
PROMPTS = ["abcdefgh"[: i % 7] + f"{i}+{i % 5}=" for i in range(64)]


def setting(**kwargs):
    return GenerationSetting(max_tokens=12, **kwargs)


def run(model, engine, prompts=PROMPTS, tokenizer=TOKENIZER, **kwargs):
    return diagnose(model, tokenizer, engine, prompts, kwargs.pop("setting", setting()), **kwargs)


def copy_engine(model, mode="processed_logprobs", dtype=None):
    return TransformersEngine(plain_copy(model, dtype), TOKENIZER, mode)


def moved(model, size=0.01):
    """Weights of some updates ago."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return model


def adapted():
    torch.manual_seed(2)
    model = get_peft_model(tiny.model(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


class Faulty:
    """An engine that does one thing wrong."""

    def __init__(self, engine, **wrong):
        self.engine = engine
        self.__dict__.update(wrong)

    def __getattr__(self, name):
        return getattr(self.engine, name)


def no_sync(engine):
    return Faulty(engine, sync=lambda model: None)


def unable(*args):
    raise NotImplementedError


# ---- Planted faults ----


def healthy_fp32():
    return run(tiny.model(), copy_engine(tiny.model()))


def healthy_at_another_temperature():
    return run(tiny.model(), copy_engine(tiny.model()), setting=setting(temperature=0.7))


def healthy_bf16():
    return run(tiny.model(init_std=0.1), copy_engine(tiny.model(init_std=0.1), dtype=torch.bfloat16))


def healthy_lora():
    return run(adapted(), copy_engine(adapted()))


def healthy_engine_that_cannot_score():
    return run(tiny.model(), Faulty(copy_engine(tiny.model()), score=unable, score_top=unable, sync=unable))


def never_synced():
    return run(tiny.model(), no_sync(copy_engine(moved(tiny.model()))))


def never_synced_at_another_temperature():
    return run(tiny.model(), no_sync(copy_engine(moved(tiny.model()))), setting=setting(temperature=2.0))


def adapter_missing():
    return run(adapted(), no_sync(copy_engine(without_adapter(adapted()))))


def adapter_twice():
    with scaled_adapter(model := adapted(), 2.0):
        engine = copy_engine(model)
    return run(model, no_sync(engine))


def sync_breaks_it():
    engine = copy_engine(tiny.model())
    return run(tiny.model(), Faulty(engine, sync=lambda model: engine.sync(moved(model))))


def head_left_out_of_the_sync():
    engine = copy_engine(moved(tiny.model()))

    def sync(model):
        head = engine.model.lm_head.weight.clone()
        engine.sync(model)
        engine.model.lm_head.weight.data.copy_(head)

    return run(tiny.model(), Faulty(engine, sync=sync))


def stale():
    return run(tiny.model(), copy_engine(moved(tiny.model())))


def stale_in_bf16():
    return run(tiny.model(init_std=0.1), copy_engine(moved(tiny.model(init_std=0.1)), dtype=torch.bfloat16))


def stale_without_a_sync():
    return run(tiny.model(), copy_engine(moved(tiny.model())), sync=False)


def temperature_raw():
    return run(tiny.model(), copy_engine(tiny.model(), "raw_logprobs"), setting=setting(temperature=0.8))


def top_p_processed():
    return run(tiny.model(), copy_engine(tiny.model()), setting=setting(top_p=0.9))


def top_p_raw():
    return run(tiny.model(), copy_engine(tiny.model(), "raw_logprobs"), setting=setting(top_p=0.9))


def top_k_raw():
    return run(tiny.model(), copy_engine(tiny.model(), "raw_logprobs"), setting=setting(top_k=10))


def truncation_that_nobody_asked_for():
    engine = copy_engine(tiny.model(), "raw_logprobs")

    def sample(prompts, asked, seed):
        return engine.sample(prompts, setting(top_k=5), seed)

    return run(tiny.model(), Faulty(engine, sample=sample))


def defaults_of_the_generation_config():
    model = tiny.model()
    model.generation_config.repetition_penalty = 1.3
    engine = copy_engine(model)

    def sample(prompts, asked, seed):
        return engine.sample(prompts, setting(repetition_penalty=1.3), seed)

    return run(model, Faulty(engine, sample=sample))


def rounding():
    return run(tiny.model(init_std=0.8), copy_engine(tiny.model(init_std=0.8), dtype=torch.bfloat16))


def quantised_copy():
    """Stands for it: other weights under a quantised name, which no dtype explains and which cannot be synced."""
    return run(tiny.model(), Faulty(copy_engine(moved(tiny.model())), quantization="int8", sync=unable))


def double_bos():
    engine = copy_engine(tiny.model())

    def sample(prompts, asked, seed):
        return engine.sample(["<eos>" + prompt for prompt in prompts], asked, seed)

    return run(tiny.model(), Faulty(engine, sample=sample))


def other_chat_template():
    engine, trainer_side = copy_engine(tiny.model()), tiny.tokenizer()
    engine.tokenizer = tiny.tokenizer()
    engine.tokenizer.chat_template = "{{ messages[0].content }}"
    trainer_side.chat_template = "{{ messages[0].content }} "
    conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    return run(tiny.model(), engine, conversations, trainer_side)


def left_padding_without_position_ids():
    return run(tiny.model("gpt2"), copy_engine(tiny.model("gpt2")))


def left_padding_without_a_mask():
    def score(model, prompt_ids, completion_ids, temperature):
        width = max(map(len, prompt_ids))
        return score_as_trl(model, [[0] * (width - len(p)) + p for p in prompt_ids], completion_ids, temperature)

    return run(tiny.model(), copy_engine(tiny.model()), score=score)


def never_samples_a_token_of_two_per_cent():
    """As a `bad_words` of the engine's, which its log-probs of fixed tokens know nothing of."""
    plain, masked = copy_engine(tiny.model()), copy_engine(tiny.model())
    logits = masked.model(torch.tensor([[3, 4, 5, 6, 7, 8]])).logits.softmax(-1).mean((0, 1))
    token = int((logits - 0.02).abs().argmin())

    def mask(module, args, output):
        output.logits[..., token] = -1e4
        return output

    masked.model.register_forward_hook(mask)
    return run(tiny.model(), Faulty(plain, sample=masked.sample))


def with_reported(edit):
    engine = copy_engine(tiny.model())

    def sample(prompts, asked, seed):
        samples = engine.sample(prompts, asked, seed)
        return samples._replace(logprobs=[edit(row) for row in samples.logprobs])

    return Faulty(engine, sample=sample)


def log_probs_too_high_by_a_constant():
    return run(tiny.model(), with_reported(lambda row: [value + 0.03 for value in row]))


def log_probs_too_high_by_less_than_any_bound():
    return run(tiny.model(), with_reported(lambda row: [value + 0.005 for value in row]))


def weights_off_by_a_per_cent_and_no_score():
    model = tiny.model(init_std=0.1)  # within every published bound
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data *= 1 + 0.01 * torch.randn(parameter.shape, generator=generator)
    return run(tiny.model(init_std=0.1), Faulty(copy_engine(model), score=unable, sync=unable))


def two_per_cent_of_the_log_probs_reported():
    count = iter(range(10**6))
    return run(tiny.model(), with_reported(lambda row: [v if next(count) % 50 == 0 else math.nan for v in row]))


def a_fifth_of_the_log_probs_missing():
    count = iter(range(10**6))
    return run(tiny.model(), with_reported(lambda row: [v if next(count) % 5 else math.nan for v in row]))


def trainer_nan_on_every_second_token():
    def score(*args):
        return [[math.nan if t % 2 else v for t, v in enumerate(row)] for row in score_as_trl(*args)]

    return run(tiny.model(), copy_engine(tiny.model()), score=score)


def nan_in_a_weight():
    model = tiny.model()
    model.lm_head.weight.data[5, 0] = math.nan
    engine = Faulty(copy_engine(tiny.model()), sync=lambda model: pytest.fail("NaN was brought into the engine"))
    return run(model, engine)


def trainer_that_depends_on_its_batch(size):
    """Log-probs off by an amount that depends on how many rows are scored at once, as of kernels that are not
    batch-invariant."""

    def score(model, prompt_ids, completion_ids, temperature):
        generator = torch.Generator().manual_seed(len(prompt_ids))
        rows = score_as_trl(model, prompt_ids, completion_ids, temperature)
        return [[v + size * float(torch.randn((), generator=generator)) for v in row] for row in rows]

    return score


def trainer_disagrees_with_itself():
    return run(tiny.model(), copy_engine(tiny.model()), score=trainer_that_depends_on_its_batch(0.1))


def trainer_disagrees_with_itself_a_little():
    return run(tiny.model(), copy_engine(tiny.model()), score=trainer_that_depends_on_its_batch(0.002))


def out_of_bounds_beside_a_variance_of_the_trainer_that_is_within():
    """A trainer that varies by less than a finding is no excuse for a gap that is out of the published bounds."""
    model = tiny.model(init_std=0.2).to(torch.bfloat16)
    own = run(model, copy_engine(model)).statistics["rounding"] / 2
    engine, generator = copy_engine(model), torch.Generator().manual_seed(0)

    def sample(prompts, asked, seed):
        samples = engine.sample(prompts, asked, seed)
        noise = [(9 * own * torch.randn(len(row), generator=generator)).tolist() for row in samples.logprobs]
        rows = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(samples.logprobs, noise, strict=True)]
        return samples._replace(logprobs=rows)

    def score(model, prompt_ids, completion_ids, temperature):  # up and down by turns, so that KL's k1 stays 0
        rows = score_as_trl(model, prompt_ids, completion_ids, temperature)
        return [[v + 1.35 * own * (-1) ** (t + len(prompt_ids)) for t, v in enumerate(row)] for row in rows]

    return run(model, Faulty(engine, sample=sample), score=score)


def merging_changes_a_bf16_base():
    model = adapted().to(torch.bfloat16)
    return run(model, copy_engine(model))


def rare_token_has_another_bias():
    """Of the sampled tokens hardly any tells; the log-prob of a token of 0.05 % is off by a fifth."""
    trainer, engine = tiny.model(init_std=0.8), copy_engine(tiny.model(init_std=0.8))
    ids = torch.tensor([TOKENIZER(prompt)["input_ids"][-2:] for prompt in PROMPTS])
    token = int((trainer(ids).logits[:, -1].softmax(-1).mean(0) - 5e-4).abs().argmin())
    engine.model.lm_head.bias = torch.nn.Parameter(torch.zeros(engine.model.config.vocab_size))
    engine.model.lm_head.bias.data[token] = 0.2
    return run(trainer, no_sync(engine))


def sync_that_fails_on_packed_weights():
    """As of a QLoRA base in TRL's sync: the engine gets other shapes than it has (trl#4973)."""
    model = tiny.model()
    model.packed = torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)

    def sync(model):
        raise AssertionError("param_data.shape == loaded_weight.shape")

    return run(model, Faulty(copy_engine(tiny.model()), sync=sync))


CAUSES = {
    trainer_disagrees_with_itself: "batch variance",
    trainer_disagrees_with_itself_a_little: "batch variance",
    out_of_bounds_beside_a_variance_of_the_trainer_that_is_within: "precision",
    merging_changes_a_bf16_base: "merge",
    rare_token_has_another_bias: "vocabulary",
    sync_that_fails_on_packed_weights: "weights",
    never_samples_a_token_of_two_per_cent: "unknown",
    log_probs_too_high_by_a_constant: "unknown",
    log_probs_too_high_by_less_than_any_bound: "unknown",
    weights_off_by_a_per_cent_and_no_score: "unknown",
    two_per_cent_of_the_log_probs_reported: "unscored",
    a_fifth_of_the_log_probs_missing: "unscored",
    trainer_nan_on_every_second_token: "trainer",
    nan_in_a_weight: "trainer",
    healthy_fp32: "healthy",
    healthy_at_another_temperature: "healthy",
    healthy_bf16: "healthy",
    healthy_lora: "healthy",
    healthy_engine_that_cannot_score: "healthy",
    never_synced: "weights",
    never_synced_at_another_temperature: "weights",
    adapter_missing: "weights",
    adapter_twice: "weights",
    sync_breaks_it: "weights",
    head_left_out_of_the_sync: "weights",
    stale: "staleness",
    stale_in_bf16: "staleness",
    stale_without_a_sync: "weights or staleness",
    temperature_raw: "sampling",
    top_p_processed: "sampling",
    top_p_raw: "sampling",
    top_k_raw: "sampling",
    truncation_that_nobody_asked_for: "sampling",
    defaults_of_the_generation_config: "sampling",
    rounding: "precision",
    quantised_copy: "precision",
    double_bos: "tokenisation",
    other_chat_template: "tokenisation",
    left_padding_without_position_ids: "padding",
    left_padding_without_a_mask: "padding",
}


@pytest.mark.parametrize("plant", CAUSES, ids=lambda plant: plant.__name__)
def test_planted_fault_is_named(plant):
    diagnosis = plant()
    assert [finding.cause for finding in diagnosis.findings] == [CAUSES[plant]] * (not diagnosis.healthy) or (
        plant is sync_breaks_it
    ), diagnosis.verdict
    assert diagnosis.cause == CAUSES[plant]
    assert diagnosis.verdict.startswith(CAUSES[plant]) and "\n" not in diagnosis.verdict


@pytest.mark.parametrize(
    ("build", "causes"),
    [
        (lambda: copy_engine(moved(tiny.model())), {"staleness", "sampling"}),
        (lambda: no_sync(copy_engine(moved(tiny.model()))), {"weights", "sampling"}),
    ],
    ids=["stale", "never_synced"],
)
def test_two_faults_at_once_are_both_named(build, causes):
    engine = build()
    engine.logprobs_mode = getattr(engine, "engine", engine).logprobs_mode = "raw_logprobs"
    found = run(tiny.model(), engine, setting=setting(temperature=0.6)).findings
    assert {finding.cause for finding in found} == causes
    removed = [finding.gap_before - finding.gap_after for finding in found]
    assert removed == sorted(removed, reverse=True), "the dominant cause comes first"


def test_sync_that_breaks_a_right_engine_is_told_from_one_that_never_works():
    assert "closer to the trainer's before a sync" in sync_breaks_it().verdict
    assert "a sync does not change that" in never_synced().verdict
    assert "a sync changes the engine, but leaves it with other weights" in head_left_out_of_the_sync().verdict


def test_matching_candidate_is_named_by_path(tmp_path):
    moved(tiny.model()).save_pretrained(tmp_path / "old")
    moved(tiny.model(), 0.03).save_pretrained(tmp_path / "older")
    candidates = {name: str(tmp_path / name) for name in ("older", "old")}
    fixed = run(tiny.model(), copy_engine(moved(tiny.model())), candidates=candidates)
    unfixed = run(tiny.model(), no_sync(copy_engine(moved(tiny.model()))), candidates=candidates)
    unknown = run(tiny.model(), copy_engine(moved(tiny.model())), candidates=candidates, sync=False)
    assert fixed.cause == "staleness" and "the weights of old," in fixed.verdict
    assert unfixed.cause == "weights" and "the weights of old," in unfixed.verdict
    assert unknown.cause == "weights or staleness" and "the weights of old" in unknown.verdict


def test_candidate_may_be_an_adapter(tmp_path):
    with scaled_adapter(old := adapted(), 0.5):
        engine = copy_engine(old)
    for name, parameter in old.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.5
    old.save_pretrained(tmp_path)
    assert "the weights of old" in run(adapted(), no_sync(engine), candidates={"old": str(tmp_path)}).verdict


def test_training_model_is_left_as_it_was():
    for model in (tiny.model(), adapted()):
        before = tiny.parameters(model)
        run(model, copy_engine(moved(model), dtype=torch.bfloat16))
        after = tiny.parameters(model)
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_dropout_is_off_meanwhile():
    model = tiny.model()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    engine = copy_engine(model)
    model.train()
    assert run(model, engine).healthy and model.training


def test_same_seed_gives_the_same_diagnosis_and_leaves_the_global_generator():
    model, engine = tiny.model(), copy_engine(tiny.model())
    state = torch.get_rng_state()
    first, second = (run(model, engine, seed=3).to_dict() for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)


def test_tokens_without_a_log_prob_are_left_out_and_counted():
    engine = copy_engine(tiny.model())

    def sample(prompts, asked, seed):
        samples = engine.sample(prompts, asked, seed)
        return samples._replace(
            logprobs=[[math.nan, *row[1:]] for row in samples.logprobs[:32]] + samples.logprobs[32:]
        )

    diagnosis = run(tiny.model(), Faulty(engine, sample=sample))
    assert diagnosis.healthy and diagnosis.statistics["unscored"] == 32


def test_an_unknown_gap_says_what_it_is_not_and_what_would_tell_more():
    verdict = log_probs_too_high_by_a_constant().verdict
    assert "0.03 nats are left, where rounding in float32 makes" in verdict
    assert "the weights, as the engine scores with them" in verdict and "`--candidates`" in verdict
    assert "its weights cannot be ruled out" in weights_off_by_a_per_cent_and_no_score().verdict


def test_packed_weights_and_the_error_of_a_sync_are_named():
    verdict = sync_that_fails_on_packed_weights().verdict
    assert "the sync fails" in verdict and "AssertionError: param_data.shape" in verdict
    assert "1 packed tensors, packed say, which TRL sends as they lie" in verdict


def test_trainer_against_itself_is_measured_and_is_the_floor_of_everything_else():
    diagnosis = trainer_disagrees_with_itself()
    alone, among = (
        trainer_that_depends_on_its_batch(0.1)(tiny.model(), [[3, 4]] * rows, [[5, 6, 7]] * rows, 1.0)[0]
        for rows in (1, 4)
    )
    assert diagnosis.statistics["batch_variance"] > 0.05 and diagnosis.statistics["batch_variance_share"] > 0.2
    assert any(abs(a - b) > 0 for a, b in zip(alone, among, strict=True))
    assert "with no engine at all" in diagnosis.verdict
    assert healthy_fp32().statistics["batch_variance"] < 1e-6


def test_a_merge_and_unmerge_is_measured_and_leaves_the_model_alone():
    model = adapted().to(torch.bfloat16)
    before = tiny.parameters(model)
    statistics = run(model, copy_engine(model)).statistics
    assert 0.01 < statistics["merge_cycle_share"] < 1 and statistics["merge_cycle"] > 1e-4
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    in_fp32 = healthy_lora().statistics
    assert in_fp32["merge_cycle_share"] > 0 and in_fp32["merge_cycle"] < 1e-5  # rounding, which does not add up


def test_log_ratio_is_told_as_movement_plus_precision_where_their_totals_cancel():
    """An engine that reports too much and has old weights: the mean of the whole gap says nothing of either."""
    new, engine = tiny.model(), copy_engine(moved(tiny.model(), 0.03))
    samples = engine.sample(PROMPTS, setting(), 0)
    now = copy_engine(new).score(samples.prompt_ids, samples.completion_ids)
    movement = flat(now) - flat(samples.logprobs)
    shift = float(movement.mean())

    def sample(prompts, asked, seed):
        samples = engine.sample(prompts, asked, seed)
        return samples._replace(logprobs=[[value + shift for value in row] for row in samples.logprobs])

    diagnosis = run(new, Faulty(engine, sample=sample))
    told = diagnosis.statistics
    assert abs(told["kl_k1"]) < 1e-5, "the totals cancel"
    assert told["movement_mean"] == pytest.approx(shift, abs=1e-5)
    assert told["precision_mean"] == pytest.approx(-shift, abs=1e-5)
    assert told["movement"] == pytest.approx(float(movement.abs().clamp(max=1).mean()), abs=1e-4)
    assert {finding.cause for finding in diagnosis.findings} == {"staleness", "unknown"}


def test_tokens_clipped_before_the_policy_has_moved_are_counted_and_told():
    diagnosis = rounding()
    gap = (diagnosis.tokens["trainer"] - diagnosis.tokens["engine"]).exp()
    share = float(((gap < 0.8) | (gap > 1.2)).double().mean())
    assert share > 0.01 and diagnosis.statistics["clipped_before_movement"] == pytest.approx(share, abs=2e-3)
    assert f"{share:.1%} of the tokens leave the clip range before the policy has moved" in diagnosis.verdict
    old = stale()
    assert old.statistics["clipped_before_movement"] == 0.0 and "clip range" not in old.verdict


def test_a_second_sampling_fault_is_in_the_verdict():
    """Log-probs without the temperature, of samples that are truncated as well."""
    engine = copy_engine(tiny.model(), "raw_logprobs")
    both = run(tiny.model(), engine, setting=setting(temperature=0.7, top_p=0.7))
    assert [finding.cause for finding in both.findings] == ["sampling", "sampling"]
    assert "raw: without the temperature" in both.verdict and "processed: with top_p=0.7" in both.verdict
    one = run(tiny.model(), engine, setting=setting(temperature=0.7))
    assert [finding.cause for finding in one.findings] == ["sampling"]


def test_what_people_read_has_no_nan_and_no_internal_keys():
    diagnosis = top_p_raw()
    assert any(row["gap_left"] is None for row in diagnosis.evidence)
    text = report(diagnosis)
    assert "nan" not in text and "None" not in text
    assert not set(re.findall(r"[a-z]+_[a-z_]+", text)) - {
        "top_p",
        "generation_config",
        "logprobs",
        "processed_logprobs",
    }


def test_of_too_few_tokens_nothing_is_said(saved, capsys):
    with pytest.raises(ValueError, match=r"Could not tell: only 1 tokens can be compared, of at least 100"):
        run(tiny.model(), copy_engine(tiny.model()), PROMPTS[:1], setting=GenerationSetting(max_tokens=1))
    assert command(saved / "now", "--num-completions", "2") == 2
    assert "Could not tell" in capsys.readouterr().err


# ---- What it computes with ----


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_default_scorer_is_that_of_trl(tmp_path, family):
    trainer = tiny.trainer(tmp_path, GRPOTrainer, policy=tiny.model(family), temperature=0.7)
    prompt_ids, completion_ids = [[3, 4, 5], [6], [7, 8]], [[9, 10], [11, 12, 13], [14]]
    ours = score_as_trl(trainer.model, prompt_ids, completion_ids, 0.7)
    ids = torch.tensor([[3, 4, 5, 9, 10, 0], [0, 0, 6, 11, 12, 13], [0, 7, 8, 14, 0, 0]])
    theirs = trainer._get_per_token_logps_and_entropies(trainer.model, ids, (ids != 0).long(), 3)[0]
    for row, expected in zip(ours, theirs.tolist(), strict=True):
        assert row == pytest.approx(expected[: len(row)], abs=1e-5)


def test_processed_log_probs_are_those_of_transformers():
    torch.manual_seed(0)
    asked = GenerationSetting(temperature=0.7, top_p=0.8, top_k=9, min_p=0.02, repetition_penalty=1.3)
    prompt, completion = [1, 2, 3], [4, 5, 4, 6]
    logits = 3 * torch.randn(len(completion), 20)
    chain = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.3), TemperatureLogitsWarper(0.7), MinPLogitsWarper(0.02),
            TopKLogitsWarper(9), TopPLogitsWarper(0.8),
        ]
    )  # fmt: skip
    for t, row in enumerate(processed(logits, prompt, completion, asked)):
        expected = chain(torch.tensor([prompt + completion[:t]]), logits[t : t + 1].clone()).log_softmax(-1)[0]
        torch.testing.assert_close(row, expected)


def test_engine_samples_and_scores_with_the_same_log_probs():
    engine = copy_engine(tiny.model())
    samples = engine.sample(PROMPTS, setting(), 0)
    scored = engine.score(samples.prompt_ids, samples.completion_ids)
    for row, expected in zip(samples.logprobs, scored, strict=True):
        assert row == pytest.approx(expected, abs=1e-5)


# ---- The command ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny.saved(folder / "now")
    TOKENIZER.save_pretrained(folder / "old")
    moved(tiny.model()).save_pretrained(folder / "old")
    adapted().save_pretrained(folder / "adapter")
    return folder


def command(*arguments):
    options = ["--engine", "transformers", "--num-completions", "64", "--max-tokens", "8", "--no-progress"]
    return doctor.main([*options, "--device", "cpu", *map(str, arguments)])


def test_exit_status_is_0_when_healthy(saved, capsys):
    assert command(saved / "now") == 0
    assert capsys.readouterr().out.startswith("healthy: ")


def test_exit_status_is_1_with_the_verdict_first_and_json_and_figure(saved, tmp_path, capsys):
    files = "--json", tmp_path / "out.json", "--figure", tmp_path / "out.png"
    assert command(saved / "now", "--engine-model", saved / "old", "--candidates", saved / "old", *files) == 1
    printed = capsys.readouterr().out
    assert printed.startswith(f"staleness: the engine had the weights of {saved / 'old'}")
    assert "hypothesis" in printed and "position" in printed and "probability under the engine" in printed
    out = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)
    keys = {"schema", "healthy", "cause", "verdict", "findings", "evidence", "statistics", "by_position"}
    assert out.keys() == keys | {"by_probability"} and out["schema"] == 1
    assert (out["healthy"], out["cause"]) == (False, "staleness")
    assert out["findings"][0].keys() == {"cause", "what", "gap_before", "gap_after"}
    assert out["evidence"][0].keys() == {"cause", "hypothesis", "predicts", "gap_left", "share_left"}
    assert sum(row["tokens"] for row in out["by_position"]) == out["statistics"]["tokens"]
    assert sum(row["tokens"] for row in out["by_probability"]) == out["statistics"]["tokens"]
    assert (tmp_path / "out.png").stat().st_size > 10_000


def test_adapter_is_in_the_engine_unless_it_has_a_model_of_its_own(saved, capsys):
    assert command(saved / "now", "--adapter", saved / "adapter") == 0
    assert command(saved / "now", "--adapter", saved / "adapter", "--engine-model", saved / "now", "--no-sync") == 1
    assert "the engine has the weights without the adapter" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/model"], "/no/such/model"),
        (["{now}", "--temperature", "0"], "temperature=0.0 is out of range"),
        (["{now}", "--top-p", "1.5"], "top_p=1.5 is out of range"),
        (["{now}", "--prompts", "/no/such/file.txt"], "/no/such/file.txt"),
        (["{now}", "--json", "/no/such/folder/out.json"], "a folder that does not exist"),
        (["{now}", "--logprobs-mode", "raw"], "logprobs_mode='raw' is unknown"),
        (["{now}", "--engine-model", "/no/such/model"], "--engine-model: there is no folder /no/such/model"),
        (["{now}", "--candidates", "/no/such/model"], "--candidates: there is no folder /no/such/model"),
        (["{now}", "--adapter", "{old}"], "holds no adapter_config.json"),
        (["{now}", "--json", "{old}"], "cannot be written: Is a directory"),
        (["{now}", "--figure", "{old}"], "cannot be written: Is a directory"),
        (["{now}", "--num-completions", "0"], "--num-completions 0 is out of range"),
        (["{now}", "--engine", "http://127.0.0.1:9"], "could not run"),
    ],
)
def test_what_is_wrong_about_the_call_is_told_before_a_model_is_loaded(saved, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("trl_alp.doctor.engines.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    assert command(*(argument.format(now=saved / "now", old=saved / "old") for argument in arguments)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("options", ["{", "[1]"])
def test_options_that_are_no_json_object_are_a_usage_error(saved, capsys, options):
    with pytest.raises(SystemExit) as stopped:
        command(saved / "now", "--vllm-options", options)
    assert stopped.value.code == 2 and "--vllm-options" in capsys.readouterr().err


def test_a_write_that_fails_does_not_turn_the_exit_status(saved, monkeypatch, tmp_path, capsys):
    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr("trl_alp.doctor.figure.draw", full)
    files = "--json", tmp_path / "out.json", "--figure", tmp_path / "out.png"
    assert command(saved / "now", *files) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("healthy: ") and printed.err.count("could not be written: OSError") == 2


# ---- A server that does not answer ----


@pytest.fixture
def silent_server():
    """Answers what the constructor asks, and then nothing; with `/health` in `silent`, nothing at all."""
    answers = {
        "/health": {},
        "/v1/models": {"data": [{"id": "policy"}]},
        "/server_info": {
            "vllm_config": {
                "model_config": {"dtype": "torch.float32", "quantization": None, "logprobs_mode": "raw_logprobs"},
                "cache_config": {"cache_dtype": "auto"},
            }
        },
    }
    stop = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.split("?")[0]
            if path not in answers:
                stop.wait(20)
            body = json.dumps(answers.get(path)).encode()
            with contextlib.suppress(OSError):
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", answers
    stop.set()
    server.shutdown()


def test_a_server_that_does_not_answer_is_not_waited_for(silent_server, monkeypatch):
    monkeypatch.setattr("trl.generation.vllm_client.is_vllm_available", lambda *_, **__: True)
    url, answers = silent_server
    engine = VLLMServerEngine(url, timeout=0.5)
    assert engine.dtype == torch.float32
    for ask in (lambda: engine.score([[3]], [[4]]), lambda: engine.sample(["1+1="], setting(), 0)):
        with pytest.raises(TimeoutError, match=r"server at http.* has not answered for 0\.5 seconds"):
            ask()
    del answers["/health"]
    with pytest.raises(TimeoutError, match=r"has not answered"):
        VLLMServerEngine(url, timeout=0.5)


def test_exit_status_is_2_when_the_engine_breaks(saved, monkeypatch, capsys):
    monkeypatch.setattr(TransformersEngine, "score", lambda *_: 1 / 0)
    assert command(saved / "now") == 2
    assert "could not run: ZeroDivisionError" in capsys.readouterr().err


def test_unknown_engine_is_a_usage_error(saved, capsys):
    with pytest.raises(SystemExit) as stopped:
        doctor.main([str(saved / "now"), "--engine", "sglang"])
    assert stopped.value.code == 2 and "'sglang' is none of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", "one\n\ntwo\n", ["one", "two", "one"]),
        ("a.json", '["one", {"question": "two"}]', ["one", "two", "one"]),
        ("a.jsonl", '{"prompt": [{"role": "user", "content": "x"}]}\n', [[{"role": "user", "content": "x"}]] * 3),
    ],
)  # fmt: skip
def test_prompts_are_read_and_repeated(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    assert read_prompts(str(tmp_path / name), 3, chat=True) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '"a"\n{"context": "x"}\n', r"a\.jsonl:2: a row has fields \['context'\]; name one .*`prompt`"),
        ("a.jsonl", '"a"\n\n{"prompt": \n', r"a\.jsonl:3: not JSON \(Expecting value"),
        ("a.jsonl", '"a"\n17\n', r"a\.jsonl:2: a int is no prompt"),
        ("a.jsonl", '"a"\n{"prompt": [{"role": "user", "content": "x"}]}', "mixed: .*a.jsonl:1 and .*a.jsonl:2"),
        (
            "a.jsonl",
            '{"prompt": [{"role": "user", "content": "x"}]}',
            r"a\.jsonl:1: a conversation, .* no chat template",
        ),
        ("a.jsonl", '{"prompt": ["x"]}', r"a\.jsonl:1: neither a text nor a list of messages"),
        ("a.json", '["a",\n"b"', r"a\.json:2: not JSON"),
        ("a.json", '{"prompt": "a"}', r"a\.json:1: a dict is no prompt, nor a list of them"),
        ("a.json", "[]", "has no prompts"),
        ("a.txt", b"\xff\xfe", "cannot be read"),
    ],
)
def test_prompts_that_cannot_be_used_are_told_with_file_and_line(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_prompts(str(tmp_path / name), 3, chat=False)


@pytest.mark.parametrize(
    ("prompts", "rows", "message"),
    [
        ([], None, "non-empty list"),
        (["a", [{"role": "user", "content": "b"}]], None, "all texts or all conversations"),
        (["a"], Samples([[3]], [[4, 5]], [[-1.0]]), "1 log-probs for the 2 tokens of row 0"),
        (["a"], Samples([[3]], [[4, 5]], [[math.nan] * 2]), "no finite log-probs"),
        (["a"], Samples([[3]], [[]], [[]]), "no tokens"),
    ],
)
def test_what_an_engine_may_not_return_is_told(prompts, rows, message):
    engine = copy_engine(tiny.model())
    with pytest.raises(ValueError, match=message):
        run(tiny.model(), Faulty(engine, sample=lambda *_: rows), prompts)


def test_a_prompt_of_no_token_is_told_before_a_model_is_loaded(saved, tmp_path, monkeypatch, capsys):
    knows_one_letter = Tokenizer(models.BPE({"<eos>": 0, "~": 1}, []))
    PreTrainedTokenizerFast(tokenizer_object=knows_one_letter, eos_token="<eos>").save_pretrained(tmp_path)
    monkeypatch.setattr("trl_alp.doctor.engines.load_model", lambda *args, **kwargs: pytest.fail("loaded"))
    assert command(saved / "now", "--tokenizer", tmp_path) == 2
    assert "no token of the prompt 'What is 17 + 25?'. Give prompts it knows." in capsys.readouterr().err


def test_it_needs_no_vllm(saved, monkeypatch, capsys):
    with contextlib.suppress(ImportError):
        import vllm  # noqa: F401

        pytest.skip("vLLM is installed here")
    assert command(saved / "now") == 0
    monkeypatch.setattr("trl_alp.doctor.engines.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    assert doctor.main([str(saved / "now"), "--engine", "vllm", "--device", "cpu"]) == 2
    assert 'pip install "trl[vllm]"' in capsys.readouterr().err


# ---- docs/doctor.md ----

DOCS = (Path(__file__).parent.parent / "docs" / "doctor.md").read_text()


def test_python_of_the_docs_runs_and_draws(saved, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, inside_a_run = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    TOKENIZER.save_pretrained(saved / "now")
    exec(first.replace("Qwen/Qwen2.5-0.5B-Instruct", str(saved / "now")), {})
    assert "mean |p - q|" in capsys.readouterr().out
    assert (tmp_path / "doctor.png").read_bytes().startswith(b"\x89PNG")
    compile(inside_a_run, "docs/doctor.md", "exec")  # tests/engine/test_doctor_on_vllm.py runs its like


def test_commands_of_the_docs_parse():
    commands = re.findall(r"^trl-alp doctor (.*)$", DOCS, re.MULTILINE)
    assert len(commands) == 5
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    for line in commands:
        parser.parse_args(shlex.split(line))


def test_a_sleeping_engine_is_an_error_and_is_not_waited_for():
    engine = VLLMEngine.__new__(VLLMEngine)
    engine.llm = SimpleNamespace(llm_engine=SimpleNamespace(is_sleeping=lambda: True))
    for ask in (lambda: engine.sample(["1+1="], GenerationSetting(), 0), lambda: engine.score([[1]], [[2]])):
        with pytest.raises(RuntimeError, match=r"engine sleeps .*`vllm_enable_sleep_mode=False`"):
            ask()
