"""`train_alp.py` under the backend `accelerate launch` was asked for, which on a CPU would be DDP without a word."""

import os
import sys
from pathlib import Path

from accelerate.state import DistributedType, PartialState
from transformers import TrainerCallback


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import train_alp


if "ACCELERATE_USE_FSDP" in os.environ:  # looked for on GPUs only
    PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_GPU)
elif "ACCELERATE_USE_DEEPSPEED" in os.environ:
    PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_CPU)


class Backend(TrainerCallback):
    """Says what the model was wrapped in."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_end(self, args, state, control, **kwargs):
        wrapper = self.trainer.model_wrapped
        sharded = all(hasattr(p, "full_tensor") for p in self.trainer.model.parameters())
        kind = "FSDP2" if sharded else type(wrapper).__name__
        stage = getattr(wrapper, "zero_optimization_stage", lambda: "")()
        processes = self.trainer.accelerator.num_processes
        sys.stdout.write(f"\nbackend {kind}{stage} processes {processes}\n")  # in one piece


instrument = train_alp.instrument
train_alp.instrument = lambda trainer: instrument(trainer).add_callback(Backend(trainer))
train_alp.main(*train_alp.parse_arguments())
