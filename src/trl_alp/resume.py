# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""ALP's files in a checkpoint: sigma's state, and the rollouts that have not been used up.

TRL alone samples anew on resume; with its buffered rollouts a run goes on where it was broken off, also between two
updates of one batch of rollouts.
"""

import os
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object, send_to_device


logger = get_logger(__name__)  # speaks on the main process only

STATE_NAME = "alp_state.pt"
ROLLOUTS_NAME = "alp_rollouts_{}.pt"  # one for each process, as with the random states


def save_state(trainer, output_dir: str) -> None:
    """
    Write the files of a checkpoint.

    Args:
        trainer ([`ALPGRPOTrainer`]):
            The trainer.
        output_dir (`str`):
            The checkpoint's folder.
    """
    os.makedirs(output_dir, exist_ok=True)  # a process may get here before the one that saves the model
    rollouts = {
        "step": trainer._step,
        "updates": trainer.watcher.updates,
        "generated_at": trainer.watcher.generated_at,
        "buffered_inputs": _unused(trainer),
        "layout": _layout(trainer),
    }
    try:
        rollouts = _loadable(rollouts)
    except TypeError as error:
        logger.warning(
            f"The rollouts hold {error}, which a checkpoint cannot: they are not saved, and a run resumed from "
            f"{output_dir} samples anew. Let the trainer put tensors, numpy values, numbers and strings into them."
        )
        rollouts = None
    path = os.path.join(output_dir, ROLLOUTS_NAME.format(trainer.accelerator.process_index))
    if rollouts is not None:
        _save(rollouts, path)
    if trainer.args.should_save and trainer.args.alp_enabled:
        perturbation, optimizer = trainer.perturbation, trainer.sigma_optimizer
        state = {
            "layer_indices": perturbation.layer_indices,
            "num_layers": perturbation.num_layers,
            "noise_scale": perturbation.noise_scale,
            "log_sigma": perturbation.log_sigma.detach().cpu(),
            "channel_rms": None if perturbation.channel_rms is None else perturbation.channel_rms.cpu(),
            "optimizer": None if optimizer is None else optimizer.adam.state_dict(),
            "fit": None if trainer.sigma_fit is None else trainer.sigma_fit.state_dict(),
            "micro_batches": trainer.micro_batches,
        }
        _save(state, os.path.join(output_dir, STATE_NAME))


def load_state(trainer, checkpoint: str) -> None:
    """
    Take up what [`save_state`] wrote.

    Args:
        trainer ([`ALPGRPOTrainer`]):
            The trainer, before its first step.
        checkpoint (`str`):
            The checkpoint's folder.

    Raises:
        `ValueError`: If a file cannot be read, or sigma's state is of another perturbation.
    """
    rollouts_path = os.path.join(checkpoint, ROLLOUTS_NAME.format(trainer.accelerator.process_index))
    _load_rollouts(trainer, rollouts_path)
    if trainer.args.alp_enabled:
        _load_sigma(trainer, os.path.join(checkpoint, STATE_NAME), of_bypass=os.path.isfile(rollouts_path))


# ---- The rollouts ----


def _unused(trainer) -> list[dict[str, Any] | None] | None:
    """The buffered micro-batches that will be read again; None in the place of one that will not, or of them all."""
    buffered, per_round = trainer._buffered_inputs, trainer.args.steps_per_generation
    left = -trainer._step % (per_round * trainer.num_iterations)
    if buffered is None or left == 0:
        return None
    return [batch if index >= per_round - left else None for index, batch in enumerate(buffered)]


def _layout(trainer) -> dict[str, int]:
    """How the buffered rollouts are cut into micro-batches, when they are used up, and what they hold."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
    layout = {name: getattr(trainer.args, name) for name in names}
    layout |= {"num_iterations": trainer.num_iterations, "num_processes": trainer.accelerator.num_processes}
    return layout | {"with_reference": trainer.beta != 0}


def _load_rollouts(trainer, path: str) -> None:
    rollouts = _load(path, "start from freshly sampled rollouts")
    layout = _layout(trainer)
    if not all(gather_object([rollouts is not None and rollouts.get("layout") == layout])):
        logger.warning(
            f"No buffered rollouts of {', '.join(f'{name}={value}' for name, value in layout.items())} at {path}: the "
            "run goes on with freshly sampled ones, and equals an uninterrupted run only if the checkpoint was "
            "written when all updates of a batch of rollouts were done."
        )
        trainer._step, trainer._buffered_inputs = 0, None
        return
    trainer._step = rollouts["step"]
    trainer.watcher.updates, trainer.watcher.generated_at = rollouts["updates"], rollouts["generated_at"]
    if rollouts["buffered_inputs"] is not None:
        trainer._buffered_inputs = send_to_device(rollouts["buffered_inputs"], trainer.accelerator.device)


# ---- Sigma ----


def _load_sigma(trainer, path: str, of_bypass: bool) -> None:
    initial = f"start sigma from alp_sigma_init={trainer.args.alp_sigma_init}"
    main = trainer.accelerator.is_main_process
    # Read once for all processes: one that did not see the file would go on with another sigma.
    state, of_bypass = broadcast_object_list([_load(path, initial) if main else None, of_bypass])
    if state is None:
        origin = "of a run with `alp_enabled=False`" if of_bypass else "not ALP's, or made with `save_only_model=True`"
        logger.warning(
            f"The checkpoint has no {STATE_NAME} ({path}): it is {origin}. The run will {initial}; to go on from "
            "another value, set `alp_sigma_init`."
        )
        return
    for name in ("num_layers", "layer_indices", "noise_scale"):
        saved, current = state[name], getattr(trainer.perturbation, name)
        if saved != current:
            raise ValueError(
                f"{path} was written with {name}={saved}, but this run has {name}={current}: its sigma does not fit. "
                "Resume with the same model, `alp_layers` and `alp_noise_scale`, or delete the file to "
                f"{initial}."
            )
    with torch.no_grad():
        trainer.perturbation.log_sigma.copy_(state["log_sigma"])
    trainer.perturbation.bound_()
    if state.get("channel_rms") is not None:
        trainer.perturbation.channel_rms = state["channel_rms"].to(trainer.accelerator.device)
    trainer.micro_batches = state["micro_batches"]
    if trainer.sigma_fit is not None and state.get("fit") is not None:
        trainer.sigma_fit.load_state_dict(state["fit"])
    if trainer.sigma_optimizer is not None and state["optimizer"] is not None:
        trainer.sigma_optimizer.adam.load_state_dict(state["optimizer"])
        trainer.sigma_optimizer.adam.param_groups[0]["lr"] = trainer.args.alp_sigma_lr


# ---- Files ----


def _loadable(value: Any) -> Any:
    """The same in tensors, containers and plain values, which is all that `torch.load` takes without running code;
    what numpy holds becomes a tensor, a number or a list."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.tensor(value) if value.dtype.kind in "biuf" else _loadable(value.tolist())
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()  # a slice would bring the whole tensor that it was cut from
    if isinstance(value, dict):
        return {_loadable(key): _loadable(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        items = [_loadable(each) for each in value]
        return tuple(items) if isinstance(value, tuple) else items
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"a {type(value).__name__}")


def _save(state: dict[str, Any], path: str) -> None:
    """Save so that an interrupted write leaves no half file behind."""
    torch.save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def _load(path: str, otherwise: str) -> dict[str, Any] | None:
    if not os.path.isfile(path):
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Not torch's own words, which advise to let the file run code.
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}): it is damaged, or not a file of ALP's. Resume from "
            f"another checkpoint, or delete the file to {otherwise}."
        ) from None
