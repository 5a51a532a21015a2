"""Simulated number formats, the error that each layer adds in one, and the profile of sigma that follows from it."""

import json
import math

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from trl_alp import ALPGRPOConfig, ALPGRPOTrainer
from trl_alp.formats import FORMATS, layer_in_format, put_in_format, rounded
from trl_alp.layers import find_decoder_layers
from trl_alp.profile import local_errors, parse_profile, profile_offsets


IDS = tiny.tensor([[5, 6, 7, 8, 9, 10], [9, 10, 11, 12, 13, 14]])
MASK = torch.ones_like(IDS)
GRIDS = {
    "int8": [i / 127 for i in range(-127, 128)],
    "int4": [i / 7 for i in range(-7, 8)],
    "int3": [i / 3 for i in range(-3, 4)],
    "nvfp4": [sign * x / 6 for x in (0, 0.5, 1, 1.5, 2, 3, 4, 6) for sign in (-1, 1)],
}


def nearest(value, grid):
    return min(grid, key=lambda point: abs(point - value))


@pytest.mark.parametrize("number_format", ["int8", "int4", "int3"])
def test_integers_are_the_nearest_of_their_group(number_format):
    weight = torch.randn(3, 80, generator=torch.Generator().manual_seed(0))
    out = rounded(weight, number_format)
    for row, values in enumerate(weight.tolist()):
        for start in (0, 32, 64):  # the last group is short
            group = values[start : start + 32]
            largest = max(map(abs, group))
            expected = [largest * nearest(value / largest, GRIDS[number_format]) for value in group]
            assert out[row, start : start + 32].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_nvfp4_is_the_nearest_of_its_block_under_an_e4m3_scale():
    weight = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    out = rounded(weight, "nvfp4")
    whole = weight.abs().reshape(-1).max().item() / 6 / 448
    for row, values in enumerate(weight.tolist()):
        for start in (0, 16, 32):
            block = values[start : start + 16]
            scale = torch.tensor(max(map(abs, block)) / 6 / whole).to(torch.float8_e4m3fn).item() * whole
            expected = [6 * scale * nearest(value / (6 * scale), GRIDS["nvfp4"]) for value in block]
            assert out[row, start : start + 16].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_fp8_keeps_three_bits_of_the_mantissa_and_the_largest_of_a_row():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    out = rounded(weight, "fp8")
    assert torch.equal(out.abs().amax(1), weight.abs().amax(1))
    normal = weight.abs() > weight.abs().amax(1, keepdim=True) / 448 * 2**-6
    assert ((out - weight).abs() <= weight.abs() * 2**-4 * 1.001)[normal].all()
    assert not torch.equal(out, weight)


@pytest.mark.parametrize("number_format", FORMATS)
def test_rounding_again_changes_nothing_and_zeros_stay(number_format):
    weight = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    out = rounded(weight, number_format)
    assert out.shape == weight.shape and torch.equal(out[1], weight[1]) and out.isfinite().all()
    torch.testing.assert_close(rounded(out, number_format), out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_fewer_bits_make_larger_errors_in_every_layer(family):
    model = tiny.model(family, layers=3)
    errors = [local_errors(model, IDS, MASK, number_format) for number_format in ("int8", "int4", "int3")]
    assert errors[0].shape == (3,) and (errors[0] > 0).all()
    assert (errors[1] > 5 * errors[0]).all() and (errors[2] > 1.5 * errors[1]).all()
    for number_format in ("bf16", "fp8", "nvfp4"):
        assert (local_errors(model, IDS, MASK, number_format) > 0).all()


@pytest.mark.parametrize("noise_scale", ["rms", "channel", "absolute"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_local_error_is_that_of_the_layer_alone_given_its_exact_input(family, noise_scale):
    model = tiny.model(family, layers=3)
    layers = find_decoder_layers(model)
    seen = []
    for layer in layers:
        layer.register_forward_hook(lambda module, args, kwargs, out: seen.append(out), with_kwargs=True)
    model(IDS, attention_mask=MASK)
    exact = [out if torch.is_tensor(out) else out[0] for out in seen]
    measured = local_errors(model, IDS, MASK, "int4", noise_scale)
    for index, layer in enumerate(layers):
        layers[index] = layer_in_format(layer, "int4")
        seen.clear()
        layers[index].register_forward_hook(lambda module, args, kwargs, out: seen.append(out), with_kwargs=True)
        model(IDS, attention_mask=MASK)
        out = seen[index] if torch.is_tensor(seen[index]) else seen[index][0]  # the layers below are exact
        square = (out - exact[index]).square()
        scale = exact[index].square()
        if noise_scale == "rms":
            square = square / scale.mean(-1, keepdim=True)
        elif noise_scale == "channel":
            square = square / scale.mean((0, 1))
        assert measured[index].item() == pytest.approx(square.mean().sqrt().item(), rel=1e-4)
        layers[index] = layer


def test_measuring_leaves_the_model_as_it_is():
    model = tiny.model(layers=2).train()
    model.model.layers[0].eval()
    before, plain = {name: value.clone() for name, value in model.state_dict().items()}, model(IDS).logits
    local_errors(model, IDS, MASK, "int3")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and model.model.layers[1].training and not model.model.layers[0].training
    assert torch.equal(model(IDS).logits, plain)


def test_adapters_are_merged_before_they_are_rounded():
    lora = LoraConfig(target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    model = get_peft_model(tiny.model(layers=2), lora)
    with_adapter = local_errors(model, IDS, MASK, "int4")
    torch.testing.assert_close(with_adapter, local_errors(model.merge_and_unload(), IDS, MASK, "int4"))


def test_a_whole_model_in_a_format_errs_as_its_layers_do():
    for number_format in FORMATS:
        model = tiny.model(layers=2)
        exact = model(IDS).logits
        gap = (put_in_format(model, number_format)(IDS).logits.float() - exact).abs().max()
        assert 0 < gap < exact.abs().max(), number_format
    assert torch.equal(tiny.model().lm_head.weight, put_in_format(tiny.model(), "int4").lm_head.weight)


def test_packed_and_unknown_weights_are_refused():
    model = tiny.model(layers=2)
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), False)
    with pytest.raises(ValueError, match="is packed or sharded, and cannot be rounded to int4"):
        local_errors(model, IDS, MASK, "int4")
    with pytest.raises(ValueError, match=r"number_format='int5' is unknown. Use one of \['bf16'"):
        local_errors(tiny.model(), IDS, MASK, "int5")


@pytest.mark.parametrize("given", ["int5", "", "1,zwei", [], [1, 0], [1, math.nan], [True, 1], 3])
def test_what_is_no_profile_is_refused_when_the_config_is_made(tmp_path, given):
    with pytest.raises(ValueError, match=r"^alp_noise_profile=.* is no profile: use one of"):
        ALPGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, alp_noise_profile=given)


def test_a_profile_is_read_from_lists_and_from_the_command_line():
    assert parse_profile("0.5, 1,2", 3) == parse_profile([0.5, 1, 2], 3) == [0.5, 1, 2]
    assert parse_profile("int4", 7) == "int4" and parse_profile(None, 7) is None
    with pytest.raises(ValueError, match="has 2 numbers, but 3 layers are perturbed"):
        parse_profile([1, 2], 3)
    assert profile_offsets([1, 4]).exp().tolist() == pytest.approx([0.5, 2])


@pytest.mark.parametrize("profile", ["int4", [1.0, 3.0], "1,3"])
def test_a_run_starts_from_the_profile(tmp_path, profile):
    trainer = tiny.trainer(tmp_path, max_steps=1, alp_noise_profile=profile, alp_sigma_init=0.02)
    sigma = trainer.perturbation.sigma
    assert sigma.log().mean().exp().item() == pytest.approx(0.02)
    ratio = (sigma[1] / sigma[0]).item()
    if profile == "int4":
        prompts = trainer.train_dataset["prompt"][:8]
        rows = [torch.tensor(trainer.processing_class(prompt)["input_ids"]) for prompt in prompts]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(tiny.DEVICE)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        errors = local_errors(trainer.model, ids, mask.to(tiny.DEVICE), "int4")
        assert ratio == pytest.approx((errors[1] / errors[0]).item(), rel=1e-4) and ratio != 1
    else:
        assert ratio == pytest.approx(3)
    trainer.train()


def test_the_fit_moves_the_level_and_leaves_the_profile(tmp_path):
    settings = {"alp_noise_target": 1.0, "alp_monitor_every": 1, "alp_learn_sigma": False, "alp_noise_profile": [1, 3]}
    settings |= {"max_steps": 3, "per_device_train_batch_size": 64}
    trainer = tiny.trainer(tmp_path, rollout_func=tiny.rollout_func(0.1), **settings)
    trainer.train()
    sigma = trainer.perturbation.sigma
    assert (sigma[1] / sigma[0]).item() == pytest.approx(3, rel=1e-4)
    assert sigma.log().mean().exp().item() != pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alp_noise_profile": [1, 2, 3]}, "alp_noise_profile has 3 numbers, but 2 layers are perturbed"),
        ({"alp_noise_profile": "int4", "alp_layers": [1]}, None),
        ({"alp_noise_profile": "bf16", "model": "bf16"}, "changes nothing in some layers of this model"),
        (
            {"alp_noise_profile": "int4", "model": "packed"},
            "alp_noise_profile='int4' cannot be measured on this model",
        ),
    ],
)
def test_a_profile_that_does_not_fit_is_refused_at_construction(tmp_path, change, message):
    kind = change.get("model")
    model = tiny.model(dtype=torch.bfloat16 if kind == "bf16" else torch.float32)
    change = {name: value for name, value in change.items() if name != "model"}
    if kind == "packed":
        packed = torch.nn.Linear(32, 64, bias=False)
        packed.weight = torch.nn.Parameter(torch.zeros(64, 32, dtype=torch.uint8), False)
        model.model.layers[1].mlp.extra = packed
    if message is None:
        tiny.trainer(tmp_path, policy=model, **change)
        return
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path, policy=model, **change)


def test_conversations_and_streamed_data_are_measured_too(tmp_path):
    model, tokenizer = tiny.chat_model()
    rows = [{"prompt": [{"role": "user", "content": f"what is {i} + 1?"}]} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = Dataset.from_list(rows)
    sigmas = []
    for dataset in (whole, whole.to_iterable_dataset()):
        args = tiny.config(tmp_path, alp_noise_profile="int4")
        trainer = ALPGRPOTrainer(model, tiny.count_digits, args, dataset, processing_class=tokenizer)
        sigmas.append(trainer.perturbation.sigma)
    assert torch.equal(*sigmas) and sigmas[0][0] != sigmas[0][1]
