# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""One line a step on the console, of what a person follows."""

import math

from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK


# Name, format, and the keys of the log of which the first is taken.
_FIELDS = (
    ("reward", "{:.3f}", ("reward", "eval_reward")),
    ("length", "{:.0f}", ("completions/mean_length", "eval_completions/mean_length")),
    ("KL", "{:.1e}", ("alp/kl/k3", "eval_alp/kl/k3")),
    ("ESS", "{:.0%}", ("alp/token/ess",)),
    ("sigma", "{:.2g}", ("alp/sigma/mean",)),
    ("staleness", "{:.3g}", ("alp/staleness",)),
    ("grad norm", "{:.2g}", ("grad_norm",)),
    ("", "{:.1f} s", ("step_time", "eval_runtime")),
)


class ConsoleCallback(ProgressCallback):
    """
    Prints one line for each row of the log, in place of the whole row: reward, length of the completions, the 2nd and
    98th percentile of the tokens' importance ratio, KL to the behaviour policy, effective sample size, sigma,
    staleness and time, as far as they are logged. `disable_tqdm` says whether there is a progress bar, as without it.

    [`ALPGRPOTrainer`] and [`instrument`] take it from `callbacks`. On any other trainer, or once the trainer is made,
    `ConsoleCallback().attach(trainer)` puts it in the place of transformers' own printing.

    Args:
        every (`int`, *optional*, defaults to `1`):
            Print only the rows of steps that are a multiple of it. Evaluations are always printed.

    Raises:
        `ValueError`: If `every` is below 1.

    Example:

    ```python
    >>> trainer = ALPGRPOTrainer(model, reward_funcs=reward, train_dataset=dataset, callbacks=[ConsoleCallback()])
    ```
    """

    def __init__(self, every: int = 1):
        super().__init__()
        if every < 1:
            raise ValueError(f"every={every} is out of range: it must be 1 or more steps.")
        self.every = every

    def attach(self, trainer: Trainer) -> None:
        """
        Take the place of the callbacks of `trainer` that print its log.

        Args:
            trainer ([`~transformers.Trainer`]):
                Any trainer, before `train()`.
        """
        printing = (PrinterCallback, ProgressCallback, DEFAULT_PROGRESS_CALLBACK)
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [one for one in callbacks if type(one) not in printing and one is not self] + [self]

    def on_train_begin(self, args, state, control, **kwargs):
        if not args.disable_tqdm:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, **kwargs):
        if not args.disable_tqdm:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        due = state.global_step % self.every == 0 or any(key.startswith(("eval_", "train_runtime")) for key in logs)
        if state.is_world_process_zero and logs and due:
            tqdm.write(line(logs, state.global_step, state.max_steps))


def attach_console(trainer: Trainer) -> None:
    """Let a [`ConsoleCallback`] among the trainer's callbacks take the place of what prints the log."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ConsoleCallback):
            callback.attach(trainer)
            return


def line(logs: dict, step: int, steps: int) -> str:
    """
    A row of the log in one line.

    Args:
        logs (`dict`):
            The row; what it lacks is left out.
        step, steps (`int`):
            The optimiser step, and how many there will be.

    Returns:
        `str`: The line, fields that stand in every row in columns of one width.
    """
    if "train_runtime" in logs:
        return f"done: {step} steps in {logs['train_runtime']:.0f} s"
    parts = []
    for name, form, keys in _FIELDS:
        value = next((logs[key] for key in keys if key in logs), None)
        if isinstance(value, int | float):
            parts.append(f"{name} {form.format(value)}".strip())
        if name == "length" and "alp/token/log_ratio/p02" in logs:
            low, high = (_exp(logs[f"alp/token/log_ratio/{p}"]) for p in ("p02", "p98"))
            parts.append(f"ratio {low:.2f}-{high:.2f}")
    kind = "eval" if any(key.startswith("eval_") for key in logs) else "step"
    return f"{kind} {step:>{len(str(steps))}}/{steps}  " + "  ".join(part.ljust(12) for part in parts).rstrip()


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))
