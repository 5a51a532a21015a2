"""What an update with ALP costs: passes through the model, memory kept for the backward, waits for the device."""

import inspect
from contextlib import nullcontext
from pathlib import Path

import pytest
import tiny
import torch
from test_noise import needs_gpu
from torch.utils._python_dispatch import TorchDispatchMode

import trl_alp
from trl_alp import LayerwisePerturbation


SOURCE = str(Path(trl_alp.__file__).parent)
SETTINGS = {
    "on-policy": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "off-policy": {"steps_per_generation": 4},
    "reused": {"steps_per_generation": 2, "num_iterations": 2, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("enabled", [True, False], ids=["alp", "bypass"])
def test_passes_per_micro_batch_are_those_the_loss_needs(tmp_path, settings, checkpointing, enabled):
    trainer = tiny.trainer(
        tmp_path, rollout_func=tiny.rollout_func(0.1), max_steps=4, gradient_checkpointing=checkpointing,
        alp_enabled=enabled, alp_monitor_every=0, **settings,
    )  # fmt: skip
    counts = {"model": 0, "layer": 0, "without gradient": 0, "backward": 0}
    rolling_out = False

    def count(name):
        if not rolling_out:
            counts[name] += 1
            counts["without gradient"] += name == "model" and not torch.is_grad_enabled()

    # Inside the checkpointed layer, so that its recomputation counts.
    trainer.model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: count("layer"))
    trainer.model.register_forward_hook(lambda *_: count("model"))
    rollout, backward = trainer.rollout_func, trainer.accelerator.backward

    def uncounted(*args):
        nonlocal rolling_out
        rolling_out = True
        try:
            return rollout(*args)
        finally:
            rolling_out = False

    def counted_backward(*args, **kwargs):
        counts["backward"] += 1
        return backward(*args, **kwargs)

    trainer.rollout_func, trainer.accelerator.backward = uncounted, counted_backward
    trainer.train()
    micro_batches = 4 * trainer.args.gradient_accumulation_steps
    assert counts == {
        "model": micro_batches,
        "layer": micro_batches * (2 if checkpointing else 1),
        "without gradient": 0,
        "backward": micro_batches,
    }


def kept_for_backward(tmp_path, layers, **settings):
    """Bytes of the tensors that the loss keeps for its backward, weights apart."""
    trainer = tiny.trainer(tmp_path, policy=tiny.model(layers=layers), max_steps=1, **settings)
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    compute_loss = trainer._compute_loss

    def watched(*args):
        weights = {parameter.untyped_storage().data_ptr() for parameter in trainer.model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = compute_loss(*args)
        kept.append(sum(size for pointer, size in storages.items() if pointer not in weights))
        return loss

    kept = []
    trainer._compute_loss = watched
    trainer.train()
    return kept[0]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layers", [2, 12])
def test_the_noise_keeps_next_to_nothing_for_the_backward(tmp_path, layers, checkpointing):
    settings = {"gradient_checkpointing": checkpointing, "per_device_train_batch_size": 32, "seed": 5}
    settings |= {"rollout_func": tiny.rollout_func(0.0)}
    bypass = kept_for_backward(tmp_path, layers, alp_enabled=False, **settings)
    scalars = 16 * layers  # log_sigma of each layer, aligned
    for noise_scale in ("absolute", "rms", "channel"):
        alp = kept_for_backward(tmp_path, layers, alp_noise_scale=noise_scale, **settings)
        # One RMS a token and layer, of a hidden size of 32 more than of one of 768; or one a channel and layer.
        sizes = {"absolute": 0, "rms": 32 * 16 * 4 * layers, "channel": 32 * 4 * layers}[noise_scale]
        assert bypass <= alp <= 1.01 * bypass + scalars + sizes, noise_scale


def test_no_value_is_asked_of_the_device_within_a_micro_batch(tmp_path, monkeypatch):
    """Each would wait for all that is queued there; at optimiser steps and in logging they are allowed."""
    asked, inside = [], False

    def watch(name):
        original = getattr(torch.Tensor, name)

        def watched(self, *args, **kwargs):
            caller = inspect.stack()[1]
            if inside and caller.filename.startswith(SOURCE):
                asked.append(f"{Path(caller.filename).name}:{caller.lineno} {name}")
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, watched)

    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__"):
        watch(name)
    trainer = tiny.trainer(
        tmp_path, rollout_func=tiny.rollout_func(0.1), steps_per_generation=2, gradient_accumulation_steps=2,
        alp_monitor_every=1, max_steps=2,
    )  # fmt: skip
    compute_loss, scored = trainer._compute_loss, []

    def watched_loss(*args):
        nonlocal inside
        inside = True
        try:
            return compute_loss(*args)
        finally:
            inside = False
            scored.append(1)

    trainer._compute_loss = watched_loss
    trainer.train()
    assert len(scored) == 4 and asked == []


class Operators(TorchDispatchMode):
    """Counts what is dispatched, views and allocations included."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def operators(layers, perturbed, measuring=False, backend="torch", **settings):
    model = tiny.model(layers=layers).train()
    perturbation = LayerwisePerturbation(model, noise_backend=backend, **settings).to(tiny.DEVICE)
    perturbation.measuring = measuring
    perturbation.channel_rms = torch.ones(layers, model.config.hidden_size, device=tiny.DEVICE)
    ids = torch.arange(40, device=tiny.DEVICE).reshape(2, 20)
    with Operators() as operators:
        with perturbation.applied(0) if perturbed else nullcontext():
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
    return operators.count


# Forward: three for the noise and its sum with the hidden state, with "rms" three for the scale and one to multiply by
# it, with "channel" one to take its row. Backward: drawing, times the gradient, times the scale, the sum, and two to
# write that into its row. Triton's kernels are no operators of torch: what is left is the allocation of the output.
@pytest.mark.parametrize(
    "backend, settings, at_most",
    [
        ("torch", {"noise_scale": "rms"}, 13),
        ("torch", {"noise_scale": "absolute"}, 8),
        ("torch", {"noise_scale": "channel"}, 12),
        ("torch", {"noise_scale": "rms", "learnable": False}, 7),
        pytest.param("triton", {"noise_scale": "rms"}, 1, marks=needs_gpu),
    ],
)
def test_a_perturbed_layer_dispatches_few_operators(backend, settings, at_most):
    def of_a_layer(measuring):
        few, many = (
            operators(layers, True, measuring, backend, **settings) - operators(layers, False) for layers in (2, 6)
        )
        return (many - few) / 4

    assert of_a_layer(measuring=False) <= at_most
    assert backend == "triton" or of_a_layer(measuring=True) > at_most
