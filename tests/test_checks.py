"""What is said of sampling that reshapes the distribution, of clipping, of lost noise and of wrong values."""

import json
import math
import re

import pytest
import tiny
import torch

from trl_alp import LayerwisePerturbation
from trl_alp.instruments import Instruments
from trl_alp.sampling import neutral_value, reshaping


# ---- Sampling ----

# Each of these in the model's own generation config reshapes plain rollouts, though nobody asked for it.
LEAKS = {
    "min_p": 0.2,
    "typical_p": 0.5,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.01,
    "suppress_tokens": [7, 8],
    "begin_suppress_tokens": [7, 8],
    "bad_words_ids": [[7]],
    "sequence_bias": [[[7], -5.0]],
    "guidance_scale": 2.0,
    "num_beams": 2,
    "min_new_tokens": 3,
    "forced_eos_token_id": 1,
    "no_repeat_ngram_size": 2,
}


def with_leak(name):
    policy = tiny.model()
    setattr(policy.generation_config, name, LEAKS[name])
    return policy


@pytest.mark.parametrize("name", LEAKS)
def test_what_the_models_own_generation_config_adds_is_warned_of_with_the_way_out(tmp_path, caplog, name):
    trainer = tiny.trainer(tmp_path, policy=with_leak(name))
    (text,) = [r.getMessage() for r in caplog.records if "own generation_config" in r.getMessage()]
    assert f"adds {name}={LEAKS[name]} " in text
    (way_out,) = re.findall(r"`(trainer\.model\.\S+ = None)`", text)
    exec(way_out, {"trainer": trainer})
    used, _ = trainer.model._prepare_generation_config(trainer.generation_config)
    assert reshaping(used.to_dict(), 1.0) == {}


def test_the_leak_is_real_and_the_way_out_closes_it(tmp_path):
    def first_tokens(policy):
        trainer = tiny.trainer(tmp_path, policy=policy, train_dataset=tiny.prompts(1), num_generations=8)
        torch.manual_seed(0)
        trainer.model.train()
        batches = [trainer._generate_and_score_completions([trainer.train_dataset[0]] * 8) for _ in range(8)]
        return {int(row[0]) for batch in batches for row in batch["completion_ids"]}

    leaking = tiny.model()
    leaking.generation_config.min_p = 0.9
    assert len(first_tokens(leaking)) < 3 < len(first_tokens(tiny.model()))


def test_what_was_asked_for_is_told_once_by_the_config_alone(tmp_path, caplog):
    policy = tiny.model()
    policy.generation_config.top_p = 0.9
    tiny.trainer(tmp_path, policy=policy, top_p=0.8)
    (record,) = [r for r in caplog.records if "reweighted distribution" in r.getMessage()]
    assert "top_p=0.8" in record.getMessage()


@pytest.mark.parametrize("settings", [{}, {"rollout_func": tiny.rollout_func()}])
def test_a_plain_model_and_rollouts_of_ones_own_are_silent(tmp_path, caplog, settings):
    tiny.trainer(tmp_path, policy=with_leak("min_p") if settings else tiny.model(), **settings)
    assert "own generation_config" not in caplog.text


def test_adapters_are_looked_through(tmp_path, caplog):
    from peft import LoraConfig

    tiny.trainer(tmp_path, policy=with_leak("typical_p"), peft_config=LoraConfig(target_modules=["q_proj"]))
    assert "adds typical_p=0.5" in caplog.text


def test_every_known_option_has_a_value_that_changes_nothing():
    from trl_alp.sampling import _NEUTRAL

    options = {name: neutral_value(name, 0.7) for name in [*_NEUTRAL, "temperature"]}
    assert reshaping(options, 0.7) == {}
    assert reshaping({"temperature": 0.6, "max_new_tokens": 5}, 0.7) == {"temperature": 0.6}


# ---- Clipping and noise ----


def clipped(tmp_path, caplog, **settings):
    settings = {"epsilon": 1e-4, "epsilon_high": 1e-4, "max_steps": 2, "loss_type": "grpo"} | settings
    trainer = tiny.trainer(tmp_path, **settings)
    trainer.train()
    return re.findall(r"of the tokens are clipped before any update.*", caplog.text)


@pytest.mark.parametrize(
    "level",
    [{"alp_ratio_level": "sequence_geometric"}, {"importance_sampling_level": "sequence"}],
    ids=["ours", "GSPO"],
)
def test_at_a_geometric_mean_clipped_noise_is_lowered_and_not_given_a_range_that_clips_nothing(
    tmp_path, caplog, level
):
    (text,) = clipped(tmp_path, caplog, **level)
    assert "lower `alp_sigma_init`" in text and "Widen" not in text


def test_at_a_token_level_a_narrow_range_is_to_be_widened(tmp_path, caplog):
    (text,) = clipped(tmp_path, caplog, rollout_func=tiny.rollout_func(2.0))
    assert "epsilon=0.5, epsilon_high=3.0" in text


@pytest.mark.parametrize(
    ("level", "name"),
    [
        ({"alp_ratio_level": "sequence_geometric"}, "alp_ratio_level='sequence_geometric'"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence'"),
    ],
)
def test_a_wide_range_at_a_geometric_mean_is_an_info_and_a_narrow_one_is_silent(tmp_path, caplog, level, name):
    tiny.config(tmp_path, **level)
    (record,) = [r for r in caplog.records if r.name.startswith("trl_alp")]
    assert record.levelname == "INFO" and name in record.getMessage() and "clips nothing" in record.getMessage()
    caplog.clear()
    tiny.config(tmp_path, epsilon=3e-4, epsilon_high=4e-4, **level)
    assert not [r for r in caplog.records if r.name.startswith("trl_alp")]


def test_noise_of_which_rounding_leaves_less_than_half_is_warned_of_with_the_number(tmp_path, caplog):
    policy = tiny.model(dtype=torch.bfloat16, init_std=0.02)
    settings = {"alp_noise_scale": "absolute", "bf16": True, "max_steps": 1}
    tiny.trainer(tmp_path, policy=policy, alp_sigma_init=1e-6, **settings).train()
    (kept,) = re.findall(r"Noise is lost in rounding: .* only (\d+)% of its standard deviation", caplog.text)
    assert 0 < int(kept) < 50
    caplog.clear()
    tiny.trainer(tmp_path, policy=policy, alp_sigma_init=1e-3, **settings).train()
    assert "lost in rounding" not in caplog.text


# ---- Health ----


def instruments(folder, **kwargs):
    from accelerate import Accelerator

    made = Instruments(Accelerator(cpu=True), str(folder), [], **{"log_files": False} | kwargs)
    made.begin(0)
    return made


def record(made, gap, staleness=0, engine=True):
    q = torch.full_like(gap, -1.0)
    made.record("update", q + gap, q, torch.ones_like(gap), staleness, engine=engine)
    return made


def test_an_update_is_judged_by_enough_tokens_alone(tmp_path, caplog):
    # Of 8 healthy tokens, k1 alone is beyond its bound half of the time; the alarm must not be used up by that.
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        record(instruments(tmp_path), 0.3 * torch.randn(2, 4, generator=generator), staleness=2).flush(1)
    assert not caplog.records
    record(instruments(tmp_path), torch.full((64, 64), -0.5), staleness=2).flush(1)
    assert "alp/kl/k1=0.5 is above 0.1" in caplog.text


@pytest.mark.parametrize("staleness", [0, 2])
def test_the_advice_fits_the_staleness(tmp_path, caplog, staleness):
    record(instruments(tmp_path, perturbed=True), torch.full((64, 64), -0.5), staleness).flush(1)
    (text,) = [r.getMessage() for r in caplog.records]
    assert ("take fewer updates" in text) == (staleness > 0)
    assert ("lower `alp_sigma_init`" in text) == (staleness == 0)


def test_neftune_is_named_and_dropout_not_blamed(tmp_path, caplog):
    gap = 0.3 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    record(instruments(tmp_path, neftune=True), gap, engine=False).flush(1)
    assert "`neftune_noise_alpha=None`" in caplog.text and "dropout" not in caplog.text
    trainer = tiny.trainer(tmp_path, neftune_noise_alpha=1.0)
    assert trainer.instruments.neftune and not tiny.trainer(tmp_path).instruments.neftune


def test_the_log_beside_the_run_is_json_whatever_was_logged(tmp_path):
    made = instruments(tmp_path, log_files=True)
    made.append({"step": 1, "a": math.inf, "b": float("nan"), "c": torch.tensor(-math.inf), "d": None, "e": "x"})
    (line,) = (tmp_path / "alp" / "metrics.jsonl").read_text().splitlines()

    def refuse(constant):
        raise ValueError(constant)

    assert json.loads(line, parse_constant=refuse) == {
        "step": 1, "a": "Infinity", "b": "NaN", "c": "-Infinity", "d": None, "e": "x"
    }  # fmt: skip


# ---- Names in errors ----


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sigma_init", "0.1"),
        ("sigma_init", None),
        ("sigma_max", True),
        ("noise_scale", "relative"),
        ("noise_backend", "cuda"),
        ("layers", "first:0"),
        ("layers", 1.5),
        ("layers", "x"),
    ],
)
def test_an_error_names_the_argument_of_the_class_and_the_field_of_the_config(tmp_path, field, value):
    with pytest.raises(ValueError, match=rf"^{field}={re.escape(repr(value))}"):
        LayerwisePerturbation(tiny.model(), **{field: value})
    with pytest.raises(ValueError, match=rf"^alp_{field}={re.escape(repr(value))}"):
        tiny.config(tmp_path, **{f"alp_{field}": value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alp_dual_clip", "None"),
        ("alp_dual_clip", True),
        ("alp_sigma_lr", "5e-4"),
        ("alp_monitor_every", "10"),
        ("alp_enabled", "false"),
        ("alp_learn_sigma", 1),
        ("alp_ratio_level", None),
    ],
)
def test_a_value_of_the_wrong_type_names_the_field(tmp_path, field, value):
    with pytest.raises(ValueError, match=rf"^{field}={re.escape(repr(value))}"):
        tiny.config(tmp_path, **{field: value})


def test_layers_beyond_the_model_are_named_by_the_field_through_the_trainer(tmp_path):
    with pytest.raises(ValueError, match=r"^alp_layers='first:9' .*The model has 2 layers"):
        tiny.trainer(tmp_path, alp_layers="first:9")


def test_the_perturbation_and_the_config_have_the_same_defaults():
    import dataclasses
    import inspect

    from trl_alp import ALPGRPOConfig

    fields = {field.name: field.default for field in dataclasses.fields(ALPGRPOConfig)}
    renamed = {"learnable": "alp_learn_sigma"}
    for name, parameter in inspect.signature(LayerwisePerturbation).parameters.items():
        if name != "model":
            assert parameter.default == fields[renamed.get(name, f"alp_{name}")], name


def test_choices_are_in_the_metadata_of_every_field_that_has_some():
    import dataclasses

    from trl_alp import ALPGRPOConfig
    from trl_alp.noise import NOISE_BACKENDS, NOISE_SCALES
    from trl_alp.ratio import LEVELS

    fields = {field.name: field for field in dataclasses.fields(ALPGRPOConfig)}
    for name, choices in (
        ("alp_ratio_level", LEVELS), ("alp_noise_scale", NOISE_SCALES), ("alp_noise_backend", NOISE_BACKENDS)
    ):  # fmt: skip
        assert tuple(fields[name].metadata["choices"]) == choices


# ---- The dataset ----


def test_a_dataset_smaller_than_one_batch_of_rollouts_is_refused_when_training_begins(tmp_path):
    # 8 completions x 4 steps // 4 completions of each prompt are 8 prompts.
    trainer = tiny.trainer(
        tmp_path, train_dataset=tiny.prompts(7), eval_dataset=tiny.prompts(1), steps_per_generation=4,
        gradient_accumulation_steps=1, per_device_eval_batch_size=4,
    )  # fmt: skip
    assert "eval_loss" in trainer.evaluate()
    with pytest.raises(ValueError, match=r"^train_dataset has 7 prompts, fewer than the 8 .*=32 // num_generations=4"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("streamed", [False, True])
def test_one_batch_of_rollouts_is_enough_and_a_stream_has_no_size(tmp_path, streamed):
    dataset = tiny.prompts(8)
    dataset = dataset.to_iterable_dataset() if streamed else dataset
    trainer = tiny.trainer(tmp_path, train_dataset=dataset, steps_per_generation=4)
    assert trainer.train().global_step == 2
