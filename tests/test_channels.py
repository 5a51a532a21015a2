"""The size of each channel: what it is measured from, and that noise relative to it is what it is called."""

import pytest
import tiny
import torch

from trl_alp import LayerwisePerturbation
from trl_alp.channels import ChannelScale
from trl_alp.layers import find_decoder_layers


IDS = tiny.tensor([[0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14], [0, 3, 4, 5, 6, 7]])
MASK = (IDS != 0).long()
CHANNEL = {"alp_noise_scale": "channel", "alp_monitor_every": 2}


def measured(model, chunks=(IDS,), masks=(MASK,), **kwargs):
    perturbation = LayerwisePerturbation(model, noise_scale="channel", **kwargs).to(tiny.DEVICE)
    scale = ChannelScale(perturbation)
    with torch.no_grad(), scale.measured(MASK):
        for ids, mask in zip(chunks, masks, strict=True):
            model(ids, attention_mask=mask)
    scale.update()
    return perturbation, scale


def inputs_of(model, ids=IDS, mask=MASK):
    """The input of each layer at the tokens that are not padding, by plain hooks.  # L times (N, H)"""
    seen = []
    handles = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"])[mask.bool()]),
            with_kwargs=True,
        )
        for layer in find_decoder_layers(model)
    ]
    with torch.no_grad():
        model(ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_is_the_rms_of_each_channel_over_tokens_that_are_no_padding(family):
    model = tiny.model(family, layers=3)
    expected = torch.stack([hidden.square().mean(0).sqrt() for hidden in inputs_of(model)])
    for chunks in ((IDS,), (IDS[:2], IDS[2:])):
        masks = (MASK,) if len(chunks) == 1 else (MASK[:2], MASK[2:])
        torch.testing.assert_close(measured(model, chunks, masks)[0].channel_rms, expected)
    some = measured(model, layers=[0, 2])[0].channel_rms
    torch.testing.assert_close(some, expected[[0, 2]])


def test_a_token_that_towers_above_all_others_does_not_decide(monkeypatch):
    model = tiny.model(layers=2)
    plain = measured(model)[0].channel_rms
    with torch.no_grad():
        model.model.embed_tokens.weight[9] *= 1000  # the first token of the second row
    assert (measured(model)[0].channel_rms[0] / plain[0]).max() < 1.5
    monkeypatch.setattr("trl_alp.channels._LARGEST_TOKEN", float("inf"))
    assert (measured(model)[0].channel_rms[0] / plain[0]).median() > 50


def test_later_measurements_move_it_by_a_part_of_the_way():
    model = tiny.model(layers=2)
    perturbation, scale = measured(model)
    first = perturbation.channel_rms
    with torch.no_grad(), scale.measured():
        model(IDS[1:2])
    scale.update()
    latest = torch.stack([hidden.square().mean(0) for hidden in inputs_of(model, IDS[1:2], MASK[1:2])])
    expected = (0.75 * first.square() + 0.25 * latest).sqrt()
    torch.testing.assert_close(perturbation.channel_rms, expected)
    scale.update()  # nothing new
    torch.testing.assert_close(perturbation.channel_rms, expected)


def test_measuring_leaves_the_model_as_it_is_and_is_needed_first():
    model = tiny.model(layers=2)
    plain = model(IDS, attention_mask=MASK).logits
    perturbation = LayerwisePerturbation(model, noise_scale="channel")
    with pytest.raises(RuntimeError, match="measure it by `ChannelScale`"), perturbation.applied(0):
        pass
    scale = ChannelScale(perturbation)
    with scale.measured(MASK):
        assert torch.equal(model(IDS, attention_mask=MASK).logits, plain)
    assert torch.equal(model(IDS, attention_mask=MASK).logits, plain)
    scale.update()
    with perturbation.applied(0):
        assert not torch.equal(model(IDS, attention_mask=MASK).logits, plain)
        with pytest.raises(RuntimeError, match="leave its context first"), scale.measured():
            pass


def test_noise_costs_less_where_a_few_channels_hold_the_energy():
    """Channels that the layers hardly read, as a pretrained model has them, and noise of the same relative size."""
    model = tiny.model(layers=4)
    ids = torch.randint(3, 40, (64, 12), generator=torch.Generator().manual_seed(0)).to(tiny.DEVICE)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, :2] *= 30
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[:2] = 0.05
                norm.weight[2:] *= 8
    divergence = {}
    for noise_scale in ("rms", "channel"):
        perturbation = LayerwisePerturbation(model, sigma_init=0.01, noise_scale=noise_scale).to(tiny.DEVICE)
        with torch.no_grad():
            if noise_scale == "channel":
                scale = ChannelScale(perturbation)
                with scale.measured():
                    model(ids)
                scale.update()
            plain = model(ids).logits.log_softmax(-1)
            with perturbation.applied(1):
                noisy = model(ids).logits.log_softmax(-1)
        divergence[noise_scale] = torch.nn.functional.kl_div(noisy, plain, log_target=True, reduction="sum").item()
        perturbation.remove()
    assert divergence["channel"] < divergence["rms"] / 4


def test_a_run_measures_before_its_first_noise_and_goes_on(tmp_path):
    trainer = tiny.trainer(tmp_path, max_steps=6, learning_rate=1e-2, **CHANNEL)
    seen, applied = [], trainer.perturbation.applied
    trainer.perturbation.applied = lambda seed: seen.append(trainer.perturbation.channel_rms) or applied(seed)
    trainer.train()
    assert len(seen) == 6 and all(each is not None for each in seen)
    assert len({id(each) for each in seen}) >= 3  # looked at again at every other step, at least
    assert tiny.history(trainer)[0]["alp/noise/effective/mean"] == pytest.approx(1, abs=0.1)


def test_a_run_without_a_monitor_keeps_what_its_first_micro_batch_showed(tmp_path):
    trainer = tiny.trainer(tmp_path, max_steps=3, alp_noise_scale="channel", alp_monitor_every=0)
    trainer.train()
    assert trainer.perturbation.channel_rms.shape == (2, 32)
    assert not any(name.startswith("alp/noise_off") for row in tiny.history(trainer) for name in row)


def test_looking_does_not_change_the_run(tmp_path):
    """The look at the first micro-batch is made with another generator, whatever the model draws."""
    runs = []
    for every in (0, 1):
        trainer = tiny.trainer(tmp_path / str(every), max_steps=1, alp_noise_scale="channel", alp_monitor_every=every)
        trainer.train()
        runs.append((trainer.perturbation.log_sigma.detach(), tiny.parameters(trainer.model)))
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(weight, runs[1][1][name]) for name, weight in runs[0][1].items())


def test_a_resumed_run_has_the_same_sizes_and_noise(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, "alp_sigma_lr": 0.05, **CHANNEL}
    whole = tiny.trainer(tmp_path / "whole", max_steps=6, **settings)
    whole.train()
    resumed = tiny.trainer(tmp_path / "resumed", max_steps=6, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert torch.equal(whole.perturbation.channel_rms, resumed.perturbation.channel_rms)
    assert torch.equal(whole.perturbation.log_sigma, resumed.perturbation.log_sigma)
    for name, weight in tiny.parameters(whole.model).items():
        assert torch.equal(weight, tiny.parameters(resumed.model)[name]), name


def test_without_alp_nothing_is_measured(tmp_path):
    trainer = tiny.trainer(tmp_path, max_steps=2, alp_enabled=False, **CHANNEL)
    trainer.train()
    assert trainer.perturbation.channel_rms is None
