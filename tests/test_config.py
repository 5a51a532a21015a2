import dataclasses
import re

import pytest
import tiny
from trl import GRPOConfig, TrlParser

from trl_alp import ALPGRPOConfig


def ours():
    return [f for f in dataclasses.fields(ALPGRPOConfig) if f.name.startswith("alp_")]


def test_exactly_four_of_trls_defaults_change():
    stock = {f.name: f.default for f in dataclasses.fields(GRPOConfig)}
    changed = {
        f.name: f.default
        for f in dataclasses.fields(ALPGRPOConfig)
        if f.name in stock and f.default is not stock[f.name] and f.default != stock[f.name]
    }
    assert changed == {
        "vllm_importance_sampling_correction": False,
        "use_bias_correction_kl": False,
        "epsilon": 0.5,
        "epsilon_high": 3.0,
    }


def test_everything_added_starts_with_alp_and_is_documented_with_its_default():
    added = {f.name for f in dataclasses.fields(ALPGRPOConfig)} - {f.name for f in dataclasses.fields(GRPOConfig)}
    assert added == {f.name for f in ours()}
    for field in ours():
        assert field.metadata["help"]
        entry = re.search(rf"^        {field.name} \(.*\):$", ALPGRPOConfig.__doc__, re.MULTILINE)
        assert entry, field.name
        if field.default is not None:
            (documented,) = re.findall(r"defaults to `(.*?)`", entry.group())
            assert eval(documented) == field.default


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alp_sigma_init": 0.0}, r"alp_sigma_init=0.0 must be a finite, positive number"),
        ({"alp_sigma_init": float("nan")}, "alp_sigma_init=nan"),
        ({"alp_sigma_max": float("inf")}, "alp_sigma_max=inf"),
        (
            {"alp_sigma_min": 0.5, "alp_sigma_max": 0.1},
            "alp_sigma_min=0.5 <= alp_sigma_init=0.01 <= alp_sigma_max=0.1",
        ),
        ({"alp_sigma_lr": 0.0}, "alp_sigma_lr=0.0.*alp_learn_sigma=False"),
        ({"alp_noise_scale": "relative"}, "alp_noise_scale='relative' is unknown"),
        ({"alp_ratio_level": "sentence"}, "alp_ratio_level='sentence' is unknown"),
        ({"alp_dual_clip": 1.0}, "alp_dual_clip=1.0 must be a number above 1"),
        ({"alp_dual_clip": float("nan")}, "alp_dual_clip=nan must be a number above 1"),
        ({"alp_monitor_every": -1}, "alp_monitor_every=-1"),
        ({"alp_monitor_every": True}, "alp_monitor_every=True"),
        ({"alp_monitor_every": 0.5}, "alp_monitor_every=0.5"),
        (
            {"alp_ratio_level": "sequence", "importance_sampling_level": "sequence"},
            "importance_sampling_level='sequence'.*alp_ratio_level='token'",
        ),
        (
            {"alp_ratio_level": "cumulative_turn", "loss_type": "luspo", "importance_sampling_level": "sequence"},
            "importance_sampling_level='sequence'",
        ),
        (
            {"alp_ratio_level": "sequence_geometric", "loss_type": "vespo"},
            "loss_type='vespo'.*alp_ratio_level='token'",
        ),
        (
            {"use_vllm": True, "vllm_importance_sampling_correction": True},
            "correct the training-inference mismatch a second time.*GRPOTrainer",
        ),
    ],
)
def test_bad_values_fail_at_construction(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny.config(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "level", "message"),
    [
        ({"epsilon_high": 0.28}, "INFO", "epsilon_high=0.28: a single importance ratio carries"),
        ({"epsilon": 0.2, "epsilon_high": None}, "INFO", "epsilon_high=0.2"),
        ({"delta": 4.0}, "INFO", "delta=4.0 takes the place of alp_dual_clip=10.0"),
        ({"vllm_importance_sampling_correction": True}, "INFO", "no effect without `use_vllm=True`"),
        ({"top_p": 0.9}, "WARNING", "top_p=0.9: completions are sampled from a truncated"),
        ({"top_k": 20, "min_p": 0.1}, "WARNING", "top_k=20, min_p=0.1"),
        ({"generation_kwargs": {"top_p": 0.8}}, "WARNING", "top_p=0.8"),
        ({"repetition_penalty": 1.1}, "WARNING", "repetition_penalty=1.1"),
        ({"vllm_structured_outputs_regex": "[0-9]+"}, "WARNING", "vllm_structured_outputs_regex=[0-9]+: "),
        ({"generation_kwargs": {"presence_penalty": 1.0}}, "WARNING", "`presence_penalty=0.0`"),
        ({"generation_kwargs": {"temperature": 0.7}}, "WARNING", "`temperature=1.0`"),
        ({"generation_kwargs": {"logit_bias": {5: -100}}}, "WARNING", "logit_bias={5: -100}"),
        ({"generation_kwargs": {"do_sample": False}}, "WARNING", "`do_sample=True`"),
    ],
)
def test_odd_values_are_told(tmp_path, caplog, settings, level, message):
    tiny.config(tmp_path, **settings)
    (record,) = [r for r in caplog.records if r.name.startswith("trl_alp")]
    assert record.levelname == level and message in record.getMessage()


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.7, "generation_kwargs": {"temperature": 0.7, "top_k": -1, "seed": 3, "bad_words": []}}],
)
def test_what_samples_from_the_full_distribution_is_silent(tmp_path, caplog, settings):
    tiny.config(tmp_path, **settings)
    assert not [r for r in caplog.records if r.name.startswith("trl_alp")]


@pytest.mark.parametrize(("given", "expected"), [("first:6", "first:6"), ("0,3,7", "0,3,7"), ("2", "2")])
def test_layers_are_read_from_the_command_line(tmp_path, given, expected):
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--alp_layers", given]
    (args,) = TrlParser([ALPGRPOConfig]).parse_args_and_config(arguments)
    assert args.alp_layers == expected


def test_every_field_is_read_from_yaml(tmp_path):
    (tmp_path / "config.yaml").write_text(
        f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\nalp_layers: [0, 2]\nalp_sigma_init: 0.02\n"
        "alp_noise_scale: absolute\nalp_sigma_lr: 1.0e-2\nalp_ratio_level: sequence\nalp_dual_clip: 3.0\n"
        "alp_learn_sigma: false\nalp_monitor_every: 5\nalp_sigma_min: 1.0e-5\nalp_sigma_max: 0.3\nalp_enabled: false\n"
    )
    (args,) = TrlParser([ALPGRPOConfig]).parse_args_and_config(["--config", str(tmp_path / "config.yaml")])
    assert args.alp_layers == [0, 2] and args.alp_sigma_lr == 1e-2 and args.alp_ratio_level == "sequence"
    assert (args.alp_learn_sigma, args.alp_enabled, args.alp_monitor_every) == (False, False, 5)


def test_help_renders():
    parser = TrlParser([ALPGRPOConfig])
    assert "--alp_sigma_init" in parser.format_help()
