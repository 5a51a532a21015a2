import copy
import gc
import pickle

import pytest
import tiny
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GPT2Config,
    LlavaConfig,
    Qwen2VLConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from trl_alp import LayerwisePerturbation
from trl_alp.channels import ChannelScale
from trl_alp.layers import find_decoder_layers, parse_layers
from trl_alp.perturbation import noise_seed


IDS = tiny.tensor([[0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]])
MASK = (IDS != 0).long()


def layer_seed(perturbation, seed, index):
    """The seed of one layer's noise, from the rule in the docstring: injective in (seed, layer)."""
    return (seed * perturbation.num_layers + index) * 0x9E3779B97F4A7C15 % 2**64


def add_by_hand(layers, indices, sigma, perturbation, seed, noise_scale):
    """Slow reference: plain hooks that add noise drawn ahead, with autograd doing the rest. Returns the handles."""

    def hook(index, level):
        def add(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            generator = torch.Generator(hidden.device).manual_seed(layer_seed(perturbation, seed, index))
            dtype = torch.promote_types(hidden.dtype, torch.float32)
            delta = torch.randn(hidden.shape, generator=generator, dtype=dtype, device=hidden.device)
            noise = delta * level.to(dtype)
            if noise_scale == "rms":
                noise = noise * hidden.detach().to(dtype).square().mean(-1, keepdim=True).sqrt()
            elif noise_scale == "channel":
                noise = noise * perturbation.channel_rms[perturbation.layer_indices.index(index)].to(dtype)
            hidden = (hidden + noise).to(hidden.dtype)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return add

    return [
        layers[index].register_forward_pre_hook(hook(index, level), with_kwargs=True)
        for index, level in zip(indices, sigma, strict=True)
    ]


def measure_channels(model, perturbation):
    if perturbation.noise_scale == "channel":
        scale = ChannelScale(perturbation)
        with torch.no_grad(), scale.measured(MASK):
            model(IDS, attention_mask=MASK)
        scale.update()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noise_scale", ["absolute", "rms", "channel"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_perturbed_forward_equals_noise_added_by_hand_at_the_layer_input(family, noise_scale, dtype):
    model = tiny.model(family, layers=3, dtype=dtype)
    perturbation = LayerwisePerturbation(
        model, layers=[0, 2], sigma_init=0.1, noise_scale=noise_scale, noise_backend="torch"
    )
    measure_channels(model, perturbation)
    plain = model(IDS, attention_mask=MASK).logits
    with perturbation.applied(7):
        perturbed = model(IDS, attention_mask=MASK).logits
    layers = find_decoder_layers(model)
    handles = add_by_hand(layers, [0, 2], perturbation.sigma, perturbation, 7, noise_scale)
    by_hand = model(IDS, attention_mask=MASK).logits
    for handle in handles:
        handle.remove()
    assert torch.equal(perturbed, by_hand)
    assert not torch.equal(perturbed, plain)
    assert torch.equal(model(IDS, attention_mask=MASK).logits, plain)


def test_perturbed_forward_equals_noise_added_by_hand_on_gpt2_124m():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).to(tiny.DEVICE)
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    perturbation = LayerwisePerturbation(model, sigma_init=0.05, noise_scale="absolute", noise_backend="torch")
    assert perturbation.layer_indices == list(range(12))
    with torch.no_grad():
        with perturbation.applied(3):
            perturbed = model(IDS).logits
        add_by_hand(model.transformer.h, range(12), perturbation.sigma, perturbation, 3, "absolute")
        assert torch.equal(perturbed, model(IDS).logits)


def double_model(family):
    """A model that computes in fp64 throughout; transformers' RMSNorm and loss go through fp32."""
    model = tiny.model(family, layers=3, dtype=torch.float64)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda h, w=module.weight: w * h * (h.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    return model


def double_loss(model):
    logps = model(IDS, attention_mask=MASK).logits[:, :-1].log_softmax(-1)
    return -logps.gather(-1, IDS[:, 1:, None]).mean()


@pytest.mark.parametrize("noise_scale", ["absolute", "rms", "channel"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_log_sigma_gradient_equals_finite_differences_in_fp64(family, noise_scale):
    model = double_model(family)
    settings = {"noise_scale": noise_scale, "noise_backend": "torch"}
    perturbation = LayerwisePerturbation(model, sigma_init=0.1, **settings).double()
    measure_channels(model, perturbation)
    with perturbation.applied(7):
        double_loss(model).backward()
    step = 1e-5
    for layer in range(3):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                perturbation.log_sigma[layer] += sign * step
                if noise_scale != "rms":
                    with perturbation.applied(7):
                        values.append(double_loss(model).item())
                else:  # the scale is detached, so it must not move with sigma at the layers behind
                    values.append(reference_loss(model, perturbation, layer))
                perturbation.log_sigma[layer] -= sign * step
        finite_difference = (values[0] - values[1]) / (2 * step)
        assert perturbation.log_sigma.grad[layer].item() == pytest.approx(finite_difference, rel=1e-6, abs=1e-10)


def reference_loss(model, perturbation, moved):
    """Loss with every layer's RMS frozen at its value before `moved` moved, as the gradient has it."""
    sigma = perturbation.sigma
    frozen = sigma.clone()
    frozen[moved] = 0.1  # where it started
    layers = find_decoder_layers(model)
    scales = {}

    def record(index):
        def hook(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            scales[index] = hidden.square().mean(-1, keepdim=True).sqrt()

        return hook

    def add(index, level):
        def hook(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            generator = torch.Generator(hidden.device).manual_seed(layer_seed(perturbation, 7, index))
            delta = torch.randn(hidden.shape, generator=generator, dtype=torch.float64, device=hidden.device)
            hidden = hidden + delta * level * scales[index]
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook

    for levels in (frozen, sigma):  # first pass records the frozen scales, second uses them
        handles = []
        for index, layer in enumerate(layers):
            if levels is frozen:
                handles.append(layer.register_forward_pre_hook(record(index), with_kwargs=True))
            handles.append(layer.register_forward_pre_hook(add(index, levels[index]), with_kwargs=True))
        value = double_loss(model).item()
        for handle in handles:
            handle.remove()
    return value


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradient_checkpointing_meets_the_same_noise(family, use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = tiny.model(family, layers=3).train()
        perturbation = LayerwisePerturbation(model, sigma_init=0.1, noise_scale="rms")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        with perturbation.applied(5):
            model(IDS, attention_mask=MASK, labels=IDS, use_cache=False).loss.backward()
        gradients.append([perturbation.log_sigma.grad, *(p.grad for p in model.parameters())])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)
    assert (gradients[0][0] != 0).all()


def test_layer_input_is_perturbed_also_where_it_comes_as_a_keyword():
    model = tiny.model()
    perturbation = LayerwisePerturbation(model, sigma_init=0.1)
    hidden = torch.randn(1, 3, 32, device=tiny.DEVICE)
    rotary = model.model.rotary_emb(hidden, torch.arange(3, device=tiny.DEVICE)[None])
    layer = model.model.layers[0]
    with torch.no_grad():
        with perturbation.applied(4):
            by_position = layer(hidden, position_embeddings=rotary)
        with perturbation.applied(4):
            by_keyword = layer(hidden_states=hidden, position_embeddings=rotary)
    assert torch.equal(by_position, by_keyword)
    assert not torch.equal(by_position, layer(hidden, position_embeddings=rotary))


def test_global_random_state_is_untouched():
    model = tiny.model()
    perturbation = LayerwisePerturbation(model)
    before = tiny.random_states()
    with perturbation.applied(1):
        model(IDS, labels=IDS).loss.backward()
    assert all(torch.equal(one, other) for one, other in zip(before, tiny.random_states(), strict=True))


def test_same_seed_same_noise_other_seed_other_noise():
    model = tiny.model()
    perturbation = LayerwisePerturbation(model)

    def forward(seed):
        with perturbation.applied(seed), torch.no_grad():
            return model(IDS).logits

    assert torch.equal(forward(1), forward(1))
    assert not torch.equal(forward(1), forward(2))


def test_no_two_micro_batches_ranks_or_layers_share_a_seed():
    model = tiny.model(layers=3)
    perturbation = LayerwisePerturbation(model)
    seen = []
    perturbation_seeds = [noise_seed(42, step * 8 + rank) for step in range(500) for rank in range(8)]
    for seed in perturbation_seeds:
        seen += [layer_seed(perturbation, seed, index) for index in range(3)]
    assert len(set(seen)) == len(seen)
    # torch's CPU generator keeps 32 bits of a seed; they must differ too.
    assert len({seed % 2**32 for seed in seen}) == len(seen)
    other_run = {layer_seed(perturbation, noise_seed(43, i), layer) % 2**32 for i in range(4000) for layer in range(3)}
    assert not other_run & {seed % 2**32 for seed in seen}


def test_one_process_with_two_steps_and_two_with_one_share_the_seeds():
    accumulated = [noise_seed(1, step) for step in range(4)]
    distributed = [noise_seed(1, step * 2 + rank) for step in range(2) for rank in range(2)]
    assert accumulated == distributed


def test_effective_noise_is_one_in_fp32_and_zero_where_rounding_eats_it():
    for dtype, sigma, expected in [
        (torch.float32, 0.01, 1.0),
        (torch.bfloat16, 0.01, 1.0),
        (torch.bfloat16, 1e-6, 0.0),
    ]:
        model = tiny.model(dtype=dtype)
        perturbation = LayerwisePerturbation(model, sigma_init=sigma, noise_scale="rms")
        assert perturbation.effective_noise().isnan().all()
        with perturbation.applied(0):
            model(torch.randint(3, 40, (8, 32), device=tiny.DEVICE))
        assert perturbation.effective_noise().tolist() == pytest.approx([expected] * 2, abs=0.1)
        assert perturbation.hidden_dtype == dtype


def test_sigma_is_in_units_of_the_tokens_rms():
    hidden = torch.randn(2, 64, 512, device=tiny.DEVICE) * tiny.tensor([1.0, 100.0]).view(2, 1, 1)
    model = tiny.model()
    perturbation = LayerwisePerturbation(model, sigma_init=0.1, noise_scale="rms")
    with perturbation.applied(0):
        noise = perturbation.perturb(hidden, 0) - hidden
    assert noise[0].std().item() == pytest.approx(0.1, rel=0.02)
    assert noise[1].std().item() == pytest.approx(10, rel=0.02)


def test_off_is_bit_identical_also_after_an_exception_inside_the_forward():
    model = tiny.model()
    plain = model(IDS).logits
    names = [name for name, _ in model.named_parameters()], list(model.state_dict())
    perturbation = LayerwisePerturbation(model)
    assert ([name for name, _ in model.named_parameters()], list(model.state_dict())) == names

    def fail(*args):
        raise MemoryError

    handle = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(MemoryError), perturbation.applied(1):
        model(IDS)
    handle.remove()
    assert perturbation.scoring is None
    assert torch.equal(model(IDS).logits, plain)


def test_applied_does_not_nest():
    perturbation = LayerwisePerturbation(tiny.model())
    with perturbation.applied(1), pytest.raises(RuntimeError, match="already active"), perturbation.applied(2):
        pass
    assert perturbation.scoring is None


def test_hooks_are_gone_when_the_perturbation_is():
    model = tiny.model()
    perturbation = LayerwisePerturbation(model)
    assert all(len(layer._forward_pre_hooks) == 1 for layer in model.model.layers)
    del perturbation
    gc.collect()
    assert all(len(layer._forward_pre_hooks) == 0 for layer in model.model.layers)


def test_copies_and_pickles_of_the_model_are_not_perturbed():
    model = tiny.model()
    perturbation = LayerwisePerturbation(model, sigma_init=0.1)
    plain = model(IDS).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with perturbation.applied(1):
            assert torch.equal(twin(IDS).logits, plain)


def test_a_perturbation_can_be_copied_while_a_backward_is_awaited():
    model = tiny.model()
    perturbation = LayerwisePerturbation(model)
    with perturbation.applied(1):
        loss = model(IDS, labels=IDS).loss
    twin = copy.deepcopy(perturbation)
    assert torch.equal(twin.sigma, perturbation.sigma) and not twin.passes and len(perturbation.passes) == 1
    loss.backward()
    assert (perturbation.log_sigma.grad != 0).all()


def test_two_perturbations_do_not_disturb_each_other():
    first, second = tiny.model(), tiny.model()
    plain = second(IDS).logits
    perturbation, other = LayerwisePerturbation(first), LayerwisePerturbation(second)
    with perturbation.applied(1):
        assert torch.equal(second(IDS).logits, plain)
    assert other.effective_noise().isnan().all()


# ---- Finding the layers ----


@pytest.mark.parametrize("wrapper", ["peft", "ddp", "compile", pytest.param("peft_compile", marks=pytest.mark.slow)])
def test_layers_are_found_and_perturbed_through_wrappers(wrapper):
    model = tiny.model()
    layers = find_decoder_layers(model)
    wrapped = model
    if "peft" in wrapper:
        from peft import LoraConfig, get_peft_model

        wrapped = get_peft_model(wrapped, LoraConfig(target_modules=["q_proj"]))
    if "compile" in wrapper:
        wrapped = torch.compile(wrapped, backend="eager")
    if wrapper == "ddp":
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        wrapped = nn.parallel.DistributedDataParallel(wrapped)
    try:
        assert find_decoder_layers(wrapped) is layers
        perturbation = LayerwisePerturbation(wrapped, sigma_init=0.1)
        plain = wrapped(IDS).logits
        with perturbation.applied(1):
            perturbed = wrapped(IDS).logits
            perturbed.sum().backward()
        assert not torch.equal(plain, perturbed)
        assert torch.equal(wrapped(IDS).logits, plain)
        assert (perturbation.log_sigma.grad != 0).all()
    finally:
        if wrapper == "ddp":
            torch.distributed.destroy_process_group()


def test_compiled_model_meets_the_noise_of_the_eager_one_at_every_seed():
    model = tiny.model()
    perturbation = LayerwisePerturbation(model, sigma_init=0.1)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(IDS)  # compiled with the noise off first
        for seed in range(3):
            with perturbation.applied(seed):
                compiled_logits = compiled(IDS).logits
            with perturbation.applied(seed):
                eager_logits = model(IDS).logits
            # On a GPU a compiled model may call another attention kernel.
            torch.testing.assert_close(compiled_logits, eager_logits, rtol=0, atol=0 if tiny.DEVICE == "cpu" else 1e-3)


def test_a_model_with_the_noise_off_still_compiles_to_one_graph():
    model = tiny.model()
    perturbation = LayerwisePerturbation(model)
    plain = model(IDS).logits
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(IDS).logits, plain)
    assert perturbation.scoring is None


@pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
def test_only_the_text_tower_of_a_vision_language_model_is_perturbed(family):
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    if family == "qwen2_vl":
        text |= {
            "num_key_value_heads": 2,
            "vocab_size": 64,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
        }
        config = Qwen2VLConfig(
            text_config=text, vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}
        )
    else:
        vision = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, "projection_dim": 32} | text
        config = LlavaConfig(text_config={"model_type": "llama", "vocab_size": 64, **text}, vision_config=vision)
    model = AutoModelForImageTextToText.from_config(config)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2]
    assert len(lists) == 2  # the vision tower has as many layers
    assert find_decoder_layers(model) is model.model.language_model.layers


def test_a_model_without_decoder_layers_is_told_what_was_looked_for():
    with pytest.raises(ValueError, match=r"No decoder layers found in Linear: looked for .*get_decoder"):
        LayerwisePerturbation(nn.Linear(2, 2))
    model = tiny.model()
    model.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match=r"one `ModuleList` of .* = 5 layers and found 0"):
        LayerwisePerturbation(model)


def test_an_encoder_decoder_is_refused():
    model = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8))
    with pytest.raises(ValueError, match="encoder-decoder"):
        LayerwisePerturbation(model)


# ---- Choosing layers and sigmas ----


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("all", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("0-2", [0, 1, 2]),
        ("first:3", [0, 1, 2]),
        ("last:2", [6, 7]),
        ("0,3,7", [0, 3, 7]),
        ("last:1, 0-1, 4", [0, 1, 4, 7]),
        ([5, 2], [2, 5]),
        (3, [3]),
    ],
)
def test_layers_are_read(layers, expected):
    assert parse_layers(layers, 8) == expected


@pytest.mark.parametrize(
    "layers",
    [
        "",
        ",",
        [],
        "8",
        "0-8",
        "first:9",
        "last:0",
        "first:0",
        [-1],
        [8],
        "3,3",
        [1, 1],
        "0-3,2",
        "5-4",
        "5-3,7",
        9,
        "x",
        "first:x",
        "1-",
        [1.0],
        [True],
    ],
)
def test_bad_layers_say_how_many_the_model_has(layers):
    with pytest.raises(ValueError, match=r"^layers=.*The model has 8 layers"):
        parse_layers(layers, 8)


@pytest.mark.parametrize(
    ("sigma_init", "sigma_min", "sigma_max"),
    [
        (0, 1e-6, 0.5),
        (-1, 1e-6, 0.5),
        (float("nan"), 1e-6, 0.5),
        (float("inf"), 1e-6, 0.5),
        (0.1, 0.5, 1e-6),
        (1, 1e-6, 0.5),
        (0.1, 0, 0.5),
        (0.1, 1e-6, float("inf")),
    ],
)
def test_bad_sigmas_are_refused(sigma_init, sigma_min, sigma_max):
    with pytest.raises(ValueError, match=r"^sigma_"):
        LayerwisePerturbation(tiny.model(), sigma_init=sigma_init, sigma_min=sigma_min, sigma_max=sigma_max)


def test_unknown_noise_scale_is_refused():
    with pytest.raises(ValueError, match=r"^noise_scale='relative' is unknown.*'rms'"):
        LayerwisePerturbation(tiny.model(), noise_scale="relative")


def test_sigma_is_held_to_its_bounds():
    perturbation = LayerwisePerturbation(tiny.model(), sigma_init=0.1, sigma_min=0.05, sigma_max=0.2)
    with torch.no_grad():
        perturbation.log_sigma.copy_(torch.tensor([-100.0, 100.0]))
    perturbation.bound_()
    assert perturbation.sigma.tolist() == pytest.approx([0.05, 0.2])


def test_fixed_sigma_has_no_gradient():
    model = tiny.model()
    perturbation = LayerwisePerturbation(model, sigma_init=0.1, learnable=False)
    with perturbation.applied(0):
        model(IDS, labels=IDS).loss.backward()
    assert perturbation.log_sigma.grad is None
