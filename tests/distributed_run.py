"""One short run on each of the processes that `accelerate launch` started; what each saw goes to `OUT/rank_N.pt`."""

import functools
import os
import sys

import tiny
import torch


out, overrides = sys.argv[1], dict(pair.split("=") for pair in sys.argv[2:])
resume = overrides.pop("resume", None)
overrides = {"max_steps": 2} | {k: value if k == "alp_noise_scale" else int(value) for k, value in overrides.items()}
overrides["alp_enabled"] = bool(overrides.get("alp_enabled", True))
extra = {}
if overrides.pop("fixed_rollouts", 0):
    # The same completions in the same order on any number of processes.
    import trl.trainer.grpo_trainer

    trl.trainer.grpo_trainer.shuffle_sequence_dict = lambda batch: batch
    extra["rollout_func"] = functools.partial(tiny.fixed_rollouts, masked_rank=overrides.pop("masked_rank", None))
trainer = tiny.trainer(out, **extra, alp_sigma_lr=0.05, save_strategy="steps", save_steps=2, seed=3, **overrides)
seeds = []
applied = trainer.perturbation.applied
trainer.perturbation.applied = lambda seed: seeds.append(seed) or applied(seed)
if resume and not trainer.accelerator.is_main_process:
    # This process does not see the files of the others, as on a machine without a shared disk.
    isfile = os.path.isfile
    os.path.isfile = lambda path: "alp_state" not in str(path) and isfile(path)
trainer.train(resume_from_checkpoint=resume)
rank = trainer.accelerator.process_index
state = {
    "world_size": trainer.accelerator.num_processes,
    "seeds": seeds,
    "log_sigma": trainer.perturbation.log_sigma.detach(),
    "channel_rms": trainer.perturbation.channel_rms,
    "weights": trainer.accelerator.unwrap_model(trainer.model).state_dict(),
    "log": tiny.history(trainer),
}
torch.save(state, f"{out}/rank_{rank}.pt")
