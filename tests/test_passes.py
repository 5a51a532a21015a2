"""Noise belongs to a scoring pass and to that pass's recompute, and to nothing else."""

import gc

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from test_perturbation import layer_seed

from trl_alp import LayerwisePerturbation
from trl_alp.layers import find_decoder_layers, first_trained_layer
from trl_alp.perturbation import _FORWARD_STRIDE


IDS = tiny.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
CHECKPOINTING = {"none": None, "not reentrant": {"use_reentrant": False}, "reentrant": {"use_reentrant": True}}


def built(checkpointing, family="qwen2", **kwargs):
    model = tiny.model(family, layers=3).train()
    perturbation = LayerwisePerturbation(model, sigma_init=0.1, **kwargs)
    if CHECKPOINTING[checkpointing] is not None:
        model.gradient_checkpointing_enable(CHECKPOINTING[checkpointing])
        model.enable_input_require_grads()
    return model, perturbation


def loss(model, ids=IDS):
    return model(ids, labels=ids, use_cache=False).loss


def gradients(model, perturbation):
    return [perturbation.log_sigma.grad, *(p.grad for p in model.parameters())]


def many_passes(model, perturbation):
    """Two perturbed passes with plain forwards before, between and after them, and one backward for all of it."""
    before = loss(model, IDS.flip(1))
    with perturbation.applied(1):
        first = loss(model)
    between = loss(model, IDS.flip(0))
    with perturbation.applied(2):
        second = loss(model, IDS + 1)
    after = loss(model, IDS + 2)
    (before + 2 * first + 3 * between + 4 * second + 5 * after).backward()


def one_by_one(model, perturbation):
    """The same, each with its own backward."""
    (5 * loss(model, IDS + 2)).backward()
    for seed, ids, weight in ((2, IDS + 1, 4), (1, IDS, 2)):
        with perturbation.applied(seed):
            (weight * loss(model, ids)).backward()
    (3 * loss(model, IDS.flip(0))).backward()
    loss(model, IDS.flip(1)).backward()


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_each_pass_meets_its_own_noise_again_and_plain_forwards_none(family, checkpointing):
    results = []
    for compute, how in ((many_passes, "none"), (many_passes, checkpointing), (one_by_one, "none")):
        model, perturbation = built(how, family)
        compute(model, perturbation)
        results.append(gradients(model, perturbation))
    plain, checkpointed, apart = results
    for a, b, c in zip(plain, checkpointed, apart, strict=True):
        assert torch.equal(a, b)  # whatever is run again in backward
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)  # another order of summation


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_the_backward_may_come_after_the_pass(checkpointing):
    results = []
    for inside in (True, False):
        model, perturbation = built(checkpointing)
        with perturbation.applied(5):
            value = loss(model)
            if inside:
                value.backward()
        if not inside:
            value.backward()
        results.append(gradients(model, perturbation))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_two_forwards_of_a_pass_draw_different_noise_and_the_first_that_of_a_pass_alone(checkpointing):
    model, perturbation = built(checkpointing)
    with perturbation.applied(5):
        first, second = model(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits
    with perturbation.applied(5):
        alone = model(IDS, use_cache=False).logits
    with perturbation.applied(5 + _FORWARD_STRIDE):
        shifted = model(IDS, use_cache=False).logits
    assert torch.equal(first, alone) and torch.equal(second, shifted)
    assert not torch.equal(first, second)
    (first.square().mean() + second.square().mean()).backward()
    found = gradients(model, perturbation)
    model, perturbation = built("none")
    for seed in (5 + _FORWARD_STRIDE, 5):
        with perturbation.applied(seed):
            model(IDS, use_cache=False).logits.square().mean().backward()
    for a, b in zip(found, gradients(model, perturbation), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_forwards_micro_batches_and_layers_share_no_seed():
    perturbation = LayerwisePerturbation(tiny.model(layers=3))
    seen = {
        layer_seed(perturbation, batch + forward * _FORWARD_STRIDE, layer) % 2**32
        for batch in range(2000)
        for forward in range(8)
        for layer in range(3)
    }
    assert len(seen) == 2000 * 8 * 3


def test_forgotten_passes_leave_nothing_on():
    model, perturbation = built("none")
    with perturbation.applied(1):
        loss(model)
    assert perturbation.switch["on"]  # its backward may still come
    perturbation.forget_passes()
    assert not perturbation.passes and not perturbation.switch["on"]


def test_a_plain_forward_is_bit_identical_while_a_backward_is_awaited():
    model, perturbation = built("none")
    compiled = torch.compile(model, backend="eager")
    plain, plain_compiled = model(IDS).logits, compiled(IDS).logits
    with perturbation.applied(1):
        value = loss(model)
    assert torch.equal(model(IDS).logits, plain)
    assert torch.equal(compiled(IDS).logits, plain_compiled)
    value.backward()


def test_a_plain_forward_compiles_once_and_sees_whether_it_ran_with_gradient():
    model, perturbation = built("none")
    compilations = []

    def backend(graph, example_inputs):
        compilations.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(3):
        perturbation.seen["ran"] = False
        compiled(IDS, use_cache=False)
        assert perturbation.seen["ran"]
    assert len(compilations) == 1
    perturbation.seen["ran"] = False
    with torch.no_grad():
        model(IDS)
    assert not perturbation.seen["ran"]


# ---- The layers that nothing trained lies below ----


def kept_bytes(train):
    """Bytes of what autograd keeps between a forward and its backward."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = train()
    total = sum(kept.values())
    value.backward()
    return total


def with_lora_on_top(layers=8, top=2):
    names = [f"layers.{i}.self_attn.q_proj" for i in range(layers - top, layers)]
    model = get_peft_model(tiny.model(layers=layers), LoraConfig(target_modules=names, init_lora_weights=False))
    return model.train()


def test_sigma_keeps_no_activations_below_what_is_trained():
    ids = torch.randint(3, 40, (8, 32), device=tiny.DEVICE)
    model = with_lora_on_top()
    stock = kept_bytes(lambda: loss(model, ids))
    perturbation = LayerwisePerturbation(model, sigma_init=0.1)

    def perturbed():
        with perturbation.applied(3):
            return loss(model, ids)

    assert kept_bytes(perturbed) > 3 * stock
    plain_noise = perturbed().detach()
    perturbation.first_trained = first_trained_layer(model)
    perturbation.log_sigma.grad = None
    assert kept_bytes(perturbed) < 1.1 * stock
    assert torch.equal(perturbed().detach(), plain_noise)  # the noise stays
    assert (perturbation.log_sigma.grad[:6] == 0).all() and (perturbation.log_sigma.grad[6:] != 0).all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_trains_sigma_from_the_lowest_trained_layer_on(tmp_path, checkpointing):
    trainer = tiny.trainer(
        tmp_path,
        policy=tiny.model(layers=4),
        peft_config=LoraConfig(target_modules=["layers.2.self_attn.q_proj"]),
        gradient_checkpointing=checkpointing,
        alp_sigma_lr=0.1,
    )
    before = trainer.perturbation.sigma
    trainer.train()
    assert (trainer.perturbation.sigma == before).tolist() == [True, True, False, False]


def choose(model, *names):
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in names))
    return first_trained_layer(model)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_lowest_trained_layer_is_read_off_the_parameters(family):
    model = tiny.model(family, layers=4)
    layers = {"gpt2": "h"}.get(family, "layers")
    assert first_trained_layer(model) == 0
    assert choose(model, f"{layers}.1.", f"{layers}.3.") == 1
    assert choose(model, f"{layers}.3.") == 3
    assert choose(model, {"gpt2": "ln_f"}.get(family, "model.norm")) == 4
    assert choose(model, {"gpt2": "wpe"}.get(family, "embed_tokens"), f"{layers}.3.") == 0
    # GPT-2's output embedding is its input embedding.
    assert choose(model, {"gpt2": "wte"}.get(family, "lm_head"), f"{layers}.2.") == (0 if family == "gpt2" else 2)


def test_the_lowest_trained_layer_is_read_through_adapters():
    model = tiny.model(layers=4)
    modules = LoraConfig(target_modules=["layers.3.mlp.up_proj"], modules_to_save=["lm_head"])
    assert first_trained_layer(get_peft_model(model, modules)) == 3
    model = tiny.model(layers=4)
    assert first_trained_layer(get_peft_model(model, LoraConfig(target_modules=["embed_tokens"]))) == 0


# ---- Hooks ----


def test_gradient_checkpointing_leaves_no_more_hooks_on_the_embedding_than_in_stock(tmp_path):
    # transformers adds one each time checkpointing is switched on again, as TRL does around its own scoring.
    from trl import GRPOTrainer

    from trl_alp import ALPGRPOTrainer

    counts = []
    for trainer_class in (GRPOTrainer, ALPGRPOTrainer):
        more = {"alp_monitor_every": 1} if trainer_class is ALPGRPOTrainer else {}
        trainer = tiny.trainer(tmp_path, trainer_class, gradient_checkpointing=True, max_steps=5, **more)
        trainer.train()
        counts.append(len(trainer.model.get_input_embeddings()._forward_hooks))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_look_without_noise_is_the_same_with_gradient_checkpointing_on(reentrant):
    model = tiny.model().train()
    with torch.no_grad():
        off = model(IDS).logits
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert torch.equal(model(IDS).logits, off)


def test_the_layers_hold_one_hook_each_and_none_when_the_perturbation_is_gone():
    model, perturbation = built("none")
    with perturbation.applied(1):
        value = loss(model)
    assert all(len(layer._forward_pre_hooks) == 1 for layer in find_decoder_layers(model))
    del perturbation
    gc.collect()
    assert all(len(layer._forward_pre_hooks) == 0 for layer in find_decoder_layers(model))
    value.backward()
