"""A short off-policy run that a timer kills: `killed_run.py OUT [SECONDS]`.

It resumes from the last complete checkpoint in OUT. SIGKILL strikes so many seconds after training has begun, wherever
the run is then: in a step or in a save.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path

import tiny
import torch
from transformers import TrainerCallback


torch.set_num_threads(1)
out, seconds = Path(sys.argv[1]), [float(value) for value in sys.argv[2:]]


def is_complete(checkpoint):
    # The Trainer writes this file last.
    try:
        return bool(json.loads((checkpoint / "trainer_state.json").read_text()))
    except (FileNotFoundError, json.JSONDecodeError):
        return False


class Kill(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        if seconds:
            timer = threading.Timer(seconds[0], os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()


trainer = tiny.trainer(
    out,
    callbacks=[Kill()],
    save_strategy="steps",
    save_steps=1,
    max_steps=12,
    steps_per_generation=3,
    num_iterations=2,
    alp_sigma_lr=0.05,
    alp_monitor_every=2,
)
checkpoints = [path for path in out.glob("checkpoint-*") if is_complete(path)]
last = max(checkpoints, key=lambda path: int(path.name.split("-")[1]), default=None)
trainer.train(resume_from_checkpoint=str(last) if last else None)
state = {
    "weights": trainer.model.state_dict(),
    "log_sigma": trainer.perturbation.log_sigma.detach(),
    "log": tiny.history(trainer),
}
torch.save(state, out / "final.pt")
