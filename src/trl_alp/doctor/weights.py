# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""Whose weights the engine has: asked of the engine itself, before and after a sync, and of the sync's parts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .counterfactuals import Case, State, is_lora
from .engines import Engine, Samples, packed
from .findings import Finding
from .gap import FLOOR, MIN_T, ROUNDING_FACTOR, magnitude, t_statistic


# The engine's most probable tokens that are compared, where it gives them; vLLM's default allows 20.
TOP = 20


@dataclass
class Probe:
    """The engine's own scores of the sampled tokens at temperature 1 (`None`: it cannot), twice, and after a sync."""

    before: torch.Tensor | None = None
    again: torch.Tensor | None = None
    after: torch.Tensor | None = None
    error: str | None = None  # of a sync that failed

    @property
    def changed(self) -> bool | None:
        """Whether the sync changed the scores by more than scoring twice does (`None`: there was none)."""
        if self.after is None:
            return None
        noise = magnitude(self.before - self.again)
        return magnitude(self.before - self.after) > max(FLOOR, ROUNDING_FACTOR * noise)


def ask(engine: Engine, model: torch.nn.Module, samples: Samples, sync: bool, progress) -> Probe:
    """Let the engine score, sync it if that is allowed, and let it score again."""
    ids = samples.prompt_ids, samples.completion_ids
    try:
        progress("let the engine score")
        before, again = flat(engine.score(*ids)), flat(engine.score(*ids))
    except NotImplementedError:
        return Probe()
    if not sync:
        return Probe(before, again)
    try:
        progress("sync, and let the engine score again")
        engine.sync(model)
    except NotImplementedError:
        return Probe(before, again)
    except Exception as error:  # whatever an engine raises: that the sync fails is the finding
        return Probe(before, again, error=(f"{type(error).__name__}: {error}".splitlines() or [""])[0][:200])
    return Probe(before, again, flat(engine.score(*ids)))


def ask_top(engine: Engine, case: Case) -> None:
    """Give the case the engine's most probable tokens, if it can score them."""
    if case.scores is None:
        return
    try:
        case.top = engine.score_top(case.samples.prompt_ids, case.samples.completion_ids, TOP)
    except (AttributeError, NotImplementedError):
        case.top = None


def failed_sync(model: torch.nn.Module, probe: Probe, gap: float) -> list[Finding]:
    if probe.error is None:
        return []
    return [Finding("weights", f"the sync fails{packing(model)}: {probe.error}", gap, 0.0)]


def packing(model: torch.nn.Module) -> str:
    """What to add where a sync is at fault and the training model's weights are packed (trl#4973)."""
    names = packed(model)
    if not names:
        return ""
    return f" (the training model has {len(names)} packed tensors, {names[0]} say, which TRL sends as they lie)"


def before_sync(case: Case, probe: Probe) -> Finding:
    """The finding where a sync changed the engine: were its weights old, or right until then?"""
    now = case.reference(State(ids="engine"), case.raw)
    before, after = magnitude(now - probe.before), magnitude(now - probe.after)
    gain = (now - probe.before).abs().clamp(max=1) - (now - probe.after).abs().clamp(max=1)
    if t_statistic(gain) < -MIN_T:
        what = f"the engine's weights were closer to the trainer's before a sync{packing(case.model)}"
        return Finding("weights", what, after, before)
    named = "weights older than the trainer's"
    for name, change in weights_of(case):
        if magnitude(case.reference(State(ids="engine", weights=change), case.raw) - probe.before) < 0.1 * before:
            named = name
            break
    return Finding("staleness", f"the engine had {named}, and a sync brought the trainer's", before, after)


def weights_of(case: Case) -> list[tuple[str, str]]:
    """The weights that an engine may have instead of the trainer's: how to say it, and their name in a `State`."""
    out = []
    if hasattr(case.model, "disable_adapter"):
        out.append(("the weights without the adapter", "adapter off"))
        if is_lora(case.model):
            out.append(("the weights with the adapter applied twice", "adapter twice"))
    return out + [(f"the weights of {name}", name) for name in case.candidates]


def where_weights(what: str, sync_changed: bool | None) -> tuple[str, str]:
    """Other weights after a sync are the sync's fault; without one it cannot be told from staleness."""
    if sync_changed is None:
        return "weights or staleness", f"the engine has {what}"
    if sync_changed:
        return "weights", f"a sync changes the engine, but leaves it with {what}"
    return "weights", f"the engine has {what}, and a sync does not change that"


def flat(rows: Sequence[Sequence[float]]) -> torch.Tensor:
    """Log-probs of all rows, NaN where there is none.  # (N,)"""
    return torch.cat([torch.as_tensor([math.nan if x is None else x for x in row]).float() for row in rows])
