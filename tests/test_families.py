"""What ALP asks of a model family, over every family in the table: built from configs, nothing downloaded."""

import pytest
import torch
import transformers
from packaging.version import Version
from test_perturbation import add_by_hand
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from trl_alp import LayerwisePerturbation


COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
# What several families spell alike. None drops a common key that the family's config does not have.
GPT = {"path": "transformer.h", "head_dim": None, "num_key_value_heads": None}
MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
SHARED_EXPERT = {"shared_expert_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 4}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_heads": 2,  # kimi_linear
    "linear_head_dim": 8,
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
ZAMBA = {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"], "n_mamba_heads": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64}
GEMMA4 = SLIDING | PER_LAYER | {"global_head_dim": 16}
HYPER = {"hc_mult": 2, "index_head_dim": 16, "index_n_heads": 2}
LONGCAT = {"num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8, "ffn_hidden_size": 32}
LONGCAT |= {"expert_ffn_hidden_size": 16, "moe_topk": 2, "zero_expert_num": 1}
NEMOTRON_H = {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 16}
NEMOTRON_H |= {"ssm_state_size": 8, "n_groups": 1, "chunk_size": 4}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PATCHES = VISION | {"image_size": 16, "patch_size": 8}
CLIP = PATCHES | {"model_type": "clip_vision_model", "projection_dim": 32}
GEMMA_VISION = VISION | {"model_type": "gemma4_vision", "head_dim": 16, "patch_size": 8}
IDEFICS = PATCHES | {"model_type": "idefics3_vision"}
MLLAMA_VISION = PATCHES | {"num_global_layers": 1, "attention_heads": 2, "vision_output_dim": 64}
MLLAMA_VISION |= {"intermediate_layers_indices": [0]}
PIXTRAL = PATCHES | {"model_type": "pixtral"}
SIGLIP = PATCHES | {"model_type": "siglip_vision_model"}
SIGLIP2 = VISION | {"model_type": "siglip2_vision_model", "num_patches": 4, "patch_size": 8}
SMOL_VISION = PATCHES | {"model_type": "smolvlm_vision"}
QWEN_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}

# Dense families that need no more than COMMON.
DENSE = (
    "apertus arcee bitnet cohere cwm doge ernie4_5 gemma glm glm4 granite helium hunyuan_v1_dense jais2 llama "
    "ministral3 mistral nanochat nemotron olmo olmo2 persimmon phi phi3 qwen2 qwen3 seed_oss smollm3 stablelm "
    "starcoder2"
)
# model_type -> what its config needs besides COMMON, `path` telling where its decoder layers are.
FAMILIES = {
    # dense
    **{name: {} for name in DENSE.split()},
    "biogpt": {"path": "biogpt.layers", "head_dim": None},
    "bloom": GPT,
    "codegen": {**GPT, "num_attention_heads": 4, "n_ctx": 64, "rotary_dim": 4},
    "cohere2": SLIDING,
    "diffllama": {"num_key_value_heads": 2},
    "exaone4": SLIDING,
    "falcon": GPT,
    "gemma2": SLIDING,
    "gemma3_text": SLIDING,
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": {**GPT, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {"path": "gpt_neox.layers", "head_dim": None},
    "gpt_neox_japanese": {"path": "gpt_neox_japanese.layers", "head_dim": None},
    "gptj": {**GPT, "rotary_dim": 8},
    "mpt": {**GPT, "path": "transformer.blocks", "max_seq_len": 64},
    "olmo3": SLIDING,
    "opt": {"path": "model.decoder.layers", "head_dim": None, "ffn_dim": 32, "word_embed_proj_dim": 32},
    "vaultgemma": SLIDING,
    "xglm": {"path": "model.layers", "ffn_dim": 32},
    # mixture of experts
    "afmoe": {**MOE, **SLIDING, "num_dense_layers": 1},
    "deepseek_v2": {**MOE, **ROUTED, **LATENT, "num_key_value_heads": 2, "head_dim": 8},
    "deepseek_v3": {**MOE, **ROUTED, **LATENT, "num_key_value_heads": 2, "head_dim": 8},
    "dots1": {**MOE, **ROUTED},
    "ernie4_5_moe": {**MOE, "moe_num_experts": 4, "moe_k": 2},
    "exaone_moe": {**MOE, **SLIDING, **ROUTED, "num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"]},
    "flex_olmo": MOE,
    "glm4_moe": {**MOE, **ROUTED},
    "gpt_oss": {**MOE, **SLIDING, "num_local_experts": 4},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoeshared": {"num_local_experts": 4, "shared_intermediate_size": 16},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 32, "interleave_moe_layer_step": 2},
    "longcat_flash": {**MOE, **ROUTED, **LATENT, **LONGCAT},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4},
    "olmoe": MOE,
    "phimoe": {"num_local_experts": 4},
    "qwen2_moe": {**MOE, **SHARED_EXPERT},
    "qwen3_moe": MOE,
    "solar_open": {**MOE, **ROUTED},
    # state space, linear attention, convolution, and hybrids of them with attention
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "falcon_mamba": {"path": "backbone.layers", "state_size": 8},
    "granitemoehybrid": {**MAMBA, "num_local_experts": 4, "layer_types": ["mamba", "attention"]},
    "jamba": {"num_experts": 4, "mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**MOE, **ROUTED, **LATENT, **LINEAR, "num_key_value_heads": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {**MOE, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba": {"path": "backbone.layers", "state_size": 8},
    "mamba2": {"path": "backbone.layers", "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1},
    "minimax": {"num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"]},
    "nemotron_h": {**MOE, **ROUTED, **NEMOTRON_H},
    "olmo_hybrid": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_next": {**MOE, **SHARED_EXPERT, **LINEAR},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32},
    "rwkv": {"path": "rwkv.blocks", "attention_hidden_size": 32, "context_length": 64},
    "xlstm": {"path": "backbone.blocks", "num_heads": 2, "chunk_size": 4},
    "zamba": {**ZAMBA, "mamba_d_state": 8, "use_mamba_kernels": False, "attention_head_dim": 32, "head_dim": None},
    "zamba2": {**ZAMBA, "mamba_d_state": 8, "chunk_size": 4, "head_dim": None, "num_key_value_heads": 2},
    # several residual streams, all of them perturbed
    "deepseek_v4": {**MOE, **HYPER, "q_lora_rank": 16, "o_lora_rank": 8, "o_groups": 2},
    # Plain Gemma 3n has NaN gradients where an embedding is zero, so its padding row is one that IDS does not use.
    "gemma3n_text": {**SLIDING, **PER_LAYER, "laurel_rank": 4, "num_kv_shared_layers": 0, "pad_token_id": 63},
    "gemma4_text": GEMMA4,
    # vision-language: noise in the text tower only, which has as many layers as the vision tower
    "aria": {"text": "aria_text", "vision_config": IDEFICS, "moe_num_experts": 4, "moe_topk": 2},
    "gemma3": {"text": "gemma3_text", "vision_config": SIGLIP},
    "gemma4": {"text": "gemma4_text", "vision_config": GEMMA_VISION, **GEMMA4},
    "glm4v": {"text": "glm4v_text", "vision_config": QWEN_VISION, "rope_parameters": MROPE},
    "idefics3": {"text": "llama", "vision_config": IDEFICS, "path": "model.text_model.layers"},
    "internvl": {"text": "qwen2", "vision_config": VISION | {"image_size": [16, 16], "patch_size": [8, 8]}},
    "lfm2_vl": {"text": "lfm2", "vision_config": SIGLIP2, "layer_types": ["conv", "full_attention"]},
    "llava": {"text": "llama", "vision_config": CLIP},
    "llava_next": {"text": "mistral", "vision_config": CLIP},
    "llava_onevision": {"text": "qwen2", "vision_config": SIGLIP},
    "mistral3": {"text": "mistral", "vision_config": PIXTRAL},
    "mllama": {"text": "mllama_text_model", "vision_config": MLLAMA_VISION, "cross_attention_layers": [1]},
    "paligemma": {"text": "gemma", "vision_config": SIGLIP},
    "qwen2_5_vl": {"text": "qwen2_5_vl_text", "vision_config": QWEN_VISION, "rope_parameters": MROPE},
    "qwen2_vl": {"text": "qwen2_vl_text", "vision_config": QWEN_VISION | {"embed_dim": 32}, "rope_parameters": MROPE},
    "qwen3_5": {"text": "qwen3_5_text", "vision_config": QWEN_VISION, **LINEAR},
    "qwen3_vl": {"text": "qwen3_vl_text", "vision_config": QWEN_VISION, "rope_parameters": MROPE},
    "smolvlm": {"text": "llama", "vision_config": SMOL_VISION, "path": "model.text_model.layers"},
}

IDS = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]])
BATCH = {"input_ids": IDS, "attention_mask": (IDS != 0).long(), "use_cache": False}
# Llama 3.2 Vision skips its cross-attention layers where there is no image. Every other family sees text only.
IMAGE = {
    "pixel_values": torch.linspace(-1, 1, 2 * 4 * 3 * 16 * 16).view(2, 1, 4, 3, 16, 16),
    "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
    "aspect_ratio_mask": torch.ones(2, 1, 4, dtype=torch.long),
    "cross_attention_mask": torch.ones(2, 6, 1, 4, dtype=torch.long),
}
# transformers has no gradient checkpointing for these.
NOT_CHECKPOINTED = {"gpt_neox_japanese", "jetmoe"}


def build(family):
    needs = COMMON | FAMILIES[family]
    text, vision = needs.pop("text", None), needs.pop("vision_config", None)
    path = needs.pop("path", "model.language_model.layers" if vision else "model.layers")
    needs = {key: value for key, value in needs.items() if value is not None}
    if vision:
        needs = {"text_config": {"model_type": text} | needs, "vision_config": vision}
    config = AutoConfig.for_model(family, **needs)
    for part in (config, config.get_text_config()):
        for key, value in part.to_dict().items():
            if isinstance(value, float) and ("drop" in key or "jitter" in key):
                setattr(part, key, 0.0)
    torch.manual_seed(0)
    model = (AutoModelForImageTextToText if vision else AutoModelForCausalLM).from_config(config).train()
    return model, model.get_submodule(path)


@pytest.fixture(params=FAMILIES)
def family(request):
    if request.param == "longcat_flash" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("the plain model has NaN gradients in transformers 5.17")
    return request.param


def forward(family, model, **kwargs):
    torch.manual_seed(0)  # PhiMoE samples its experts while training
    return model(**BATCH, **(IMAGE if family == "mllama" else {}), **kwargs)


def gradient(family, checkpointing):
    model, _ = build(family)
    perturbation = LayerwisePerturbation(model, sigma_init=0.1, noise_scale="rms")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert model.is_gradient_checkpointing
    with perturbation.applied(5):
        forward(family, model, labels=IDS).loss.backward()
    return perturbation.log_sigma.grad, [p.grad for p in model.parameters() if p.grad is not None]


def test_every_decoder_layer_is_perturbed_and_nothing_else(family):
    model, layers = build(family)
    perturbation = LayerwisePerturbation(model)
    attentions_per_layer = 2 if family == "longcat_flash" else 1  # num_hidden_layers counts both
    assert len(layers) * attentions_per_layer == model.config.get_text_config().num_hidden_layers
    assert perturbation.layer_indices == list(range(len(layers)))
    hooked = [module for module in model.modules() if module._forward_pre_hooks]
    assert len(hooked) == len(layers) and all(a is b for a, b in zip(hooked, layers, strict=True))


def test_noise_equals_noise_added_by_hand_at_the_layer_input(family):
    model, layers = build(family)
    perturbation = LayerwisePerturbation(model, sigma_init=0.1, noise_scale="rms")
    with torch.no_grad():
        plain = forward(family, model).logits
        with perturbation.applied(7):
            perturbed = forward(family, model).logits
        add_by_hand(layers, range(len(layers)), perturbation.sigma, perturbation, 7, "rms")
        by_hand = forward(family, model).logits
    assert torch.equal(perturbed, by_hand)
    assert not torch.equal(perturbed, plain)


def test_gradient_reaches_every_log_sigma(family):
    log_sigma, parameters = gradient(family, checkpointing=False)
    assert log_sigma.isfinite().all() and (log_sigma != 0).all()
    assert all(grad.isfinite().all() for grad in parameters)


def test_off_is_bit_identical_before_and_after(family):
    model, _ = build(family)
    plain = forward(family, model).logits
    perturbation = LayerwisePerturbation(model, sigma_init=0.1)
    assert torch.equal(forward(family, model).logits, plain)
    with perturbation.applied(1):
        assert not torch.equal(forward(family, model).logits, plain)
    assert torch.equal(forward(family, model).logits, plain)


def test_gradient_checkpointing_gives_the_same_gradients(family):
    if family in NOT_CHECKPOINTED:
        with pytest.raises(ValueError, match="does not support"):
            gradient(family, checkpointing=True)
        return
    plain, checkpointed = gradient(family, checkpointing=False), gradient(family, checkpointing=True)
    assert torch.equal(plain[0], checkpointed[0])
    assert len(plain[1]) == len(checkpointed[1])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], checkpointed[1], strict=True))
    assert checkpointed[0].isfinite().all()
