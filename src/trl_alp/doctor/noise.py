# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""Would noise cover this engine? Asked before a GPU-hour is spent: sigma as training would fit it, and what the noise
of that size does."""

import math
from collections.abc import Callable, Sequence

import torch

from ..channels import ChannelScale
from ..formats import check_format, put_in_format
from ..layers import find_decoder_layers
from ..perturbation import LayerwisePerturbation, noise_seed
from ..profile import local_errors, profile_offsets
from .coverage import NoiseAverage, coverage, divergence
from .engines import (
    Engine,
    GenerationSetting,
    Prompt,
    Samples,
    TransformersEngine,
    equal_lengths,
    evaluating,
    plain_copy,
    unpadded_logits,
)
from .noise_answer import FLOOR, NoiseAnswer, NoiseVariant, in_words, verdict


SCALES = ("rms", "channel", "absolute")  # the trainer's default first: the verdict is about it
# Sigma that is tried first, and the most rounds of measuring and setting it until it is within so much.
_PROBE, _ROUNDS, _NEAR = 0.01, 4, 0.1
_BOUNDS = (1e-6, 0.5)  # `alp_sigma_min` and `alp_sigma_max`


@torch.no_grad()
def ask_noise(
    model: torch.nn.Module,
    tokenizer,
    engine: Engine | str,
    prompts: Sequence[Prompt],
    *,
    temperature: float = 1.0,
    max_tokens: int = 32,
    number_format: str | None = None,
    draws: int = 8,
    seed: int = 0,
    batch_size: int = 16,
    progress: Callable[[str], None] = lambda step: None,
) -> NoiseAnswer:
    """
    Ask whether noise would cover an engine.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The training model, with its adapter if it has one.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        engine ([`Engine`] or `str`):
            An engine, or a number format to simulate one in: one of `trl_alp.formats.FORMATS`.
        prompts (`Sequence`):
            One completion is sampled for each.
        temperature (`float`, *optional*, defaults to `1.0`):
            Of the engine and of the trainer.
        max_tokens (`int`, *optional*, defaults to `32`):
            Longest completion, in tokens.
        number_format (`str`, *optional*):
            Format whose local errors shape sigma over the layers; by default the simulated one, else none.
        draws (`int`, *optional*, defaults to `8`):
            Draws of the noise that are averaged, a multiple of 4.
        seed (`int`, *optional*, defaults to `0`):
            Of samples and noise; the same seed gives the same answer.
        batch_size (`int`, *optional*, defaults to `16`):
            Rows scored at once. Eight times their log-probs over the vocabulary have to fit into memory.
        progress (`Callable[[str], None]`, *optional*):
            Called with the name of each step when it begins.

    Returns:
        [`NoiseAnswer`].

    Raises:
        `ValueError`: If there are no prompts, `draws` is no multiple of 4, a format is unknown, or the engine returns
            no completion with finite log-probs, or the training model scores tokens as NaN.

    Example:

    ```python
    >>> answer = ask_noise(model, tokenizer, "int4", ["What is 17 + 25?", "Name a river."])
    >>> print(answer.verdict)
    ```
    """
    if not prompts:
        raise ValueError("prompts must be a non-empty list.")
    if draws < 4 or draws % 4:
        raise ValueError(f"draws={draws} must be a multiple of 4: two halves of pairs of opposite sign. Take 8.")
    words = engine if isinstance(engine, str) else in_words(engine)
    if isinstance(engine, str):
        check_format(engine, "engine")
        number_format = number_format or engine
        progress("simulate the engine")
        engine = TransformersEngine(put_in_format(plain_copy(model), engine), tokenizer)
    if number_format is not None:
        check_format(number_format)
    with evaluating(model):
        progress("sample")
        samples = engine.sample(prompts, GenerationSetting(temperature, max_tokens=max_tokens), seed)
        # A completion without one of its log-probs is left out, as training leaves out the token.
        kept = [row for row, values in enumerate(samples.logprobs) if values and all(map(math.isfinite, values))]
        if not kept:
            raise ValueError("The engine returned no completion with finite log-probs: there is nothing to compare.")
        samples = Samples(*([column[row] for row in kept] for column in samples))
        question = _Question(model, engine, samples, temperature, seed, batch_size)
        return _answer(question, words, number_format, draws, progress)


class _Question:
    """The sampled completions in batches, and both policies on them."""

    def __init__(self, model, engine, samples: Samples, temperature: float, seed: int, batch_size: int):
        self.model, self.engine, self.samples = model, engine, samples
        self.temperature, self.seed = temperature, seed
        rows = [list(p) + list(c) for p, c in zip(samples.prompt_ids, samples.completion_ids, strict=True)]
        self.batches = list(equal_lengths(rows, batch_size))
        self.sees_engine = isinstance(getattr(engine, "model", None), torch.nn.Module)

    def logps(self, model: torch.nn.Module, batch: list[int]) -> torch.Tensor:
        """Log-probs over the vocabulary at the tokens of a batch's completions.  # (N, V)"""
        prompts, completions = ([column[i] for i in batch] for column in self.samples[:2])
        rows = sorted(unpadded_logits(model, prompts, completions, len(batch)), key=lambda row: row[0])
        return (torch.cat([logits for _, logits in rows]) / self.temperature).log_softmax(-1)

    def tokens(self, batch: list[int], device) -> torch.Tensor:
        """# (N, 1)"""
        return torch.tensor([token for i in batch for token in self.samples.completion_ids[i]], device=device)[:, None]

    def engine_logps(self, batch: list[int], like: torch.Tensor) -> torch.Tensor:
        """Over the vocabulary where the engine can be seen, else of the sampled tokens.  # (N, V) or (N,)"""
        if self.sees_engine:
            return self.logps(self.engine.model, batch).to(like.device)
        return torch.tensor([value for i in batch for value in self.samples.logprobs[i]], device=like.device)

    def by_row(self, batch: list[int], values: torch.Tensor) -> list[float]:
        """Sums over the tokens of each completion."""
        lengths = [len(self.samples.completion_ids[i]) for i in batch]
        return [part.sum().item() for part in values.split(lengths)]

    def noisy(self, perturbation: LayerwisePerturbation, number: int, draw: int) -> torch.Tensor:
        """The log-probs of a batch under a draw of the noise; the second of each two is the first's opposite.
        # (N, V)"""
        pair, second = divmod(draw, 2)
        with perturbation.applied(noise_seed(self.seed, pair * len(self.batches) + number)) as scoring:
            if second:
                for device in {parameter.device for parameter in self.model.parameters()}:
                    scoring.levels_on(device).sigma.neg_()
            return self.logps(self.model, self.batches[number])


def _answer(question: _Question, words: str, number_format: str | None, draws: int, progress) -> NoiseAnswer:
    progress("compare")
    plain, mismatch, divergences, entropies = {}, [], [], []  # of the sampled tokens, and sums of each completion
    for batch in question.batches:
        policy = question.logps(question.model, batch)
        engine, tokens = question.engine_logps(batch, policy), question.tokens(batch, policy.device)
        plain[batch[0]] = policy.gather(-1, tokens)[:, 0]
        sampled = engine.gather(-1, tokens)[:, 0] if engine.dim() == 2 else engine
        mismatch.append(divergence(sampled, plain[batch[0]]))
        at_tokens = policy if engine.dim() == 2 else plain[batch[0]]
        divergences += question.by_row(batch, divergence(engine, at_tokens))
        entropy = -(engine.exp() * engine).nan_to_num(0.0).sum(-1) if engine.dim() == 2 else -engine
        entropies.append(torch.stack([-(policy.exp() * policy).nan_to_num(0.0).sum(-1), entropy]).double())
    k3 = torch.cat(mismatch).mean().item()
    if not math.isfinite(k3):
        raise ValueError("The training model scores some of the engine's tokens as NaN: look at its weights.")
    entropy_policy, entropy_engine = torch.cat(entropies, 1).mean(1).tolist()
    answer = NoiseAnswer(
        covers=False, verdict="", engine=words, tokens=len(torch.cat(mismatch)),
        completions=len(question.samples.completion_ids), whole_vocabulary=question.sees_engine, k3=k3,
        kl=sum(divergences) / len(torch.cat(mismatch)), entropy_policy=entropy_policy, entropy_engine=entropy_engine,
    )  # fmt: skip
    progress("look at the layers")
    profiles = {} if number_format is None else _profiles(question, number_format)
    answer.layers = _by_layer(question, profiles.get("rms"))
    if k3 >= FLOOR:
        for scale in SCALES:
            errors = profiles.get(scale)
            # A format that the trainer computes in itself adds nothing, and so has no profile.
            measured = errors is not None and bool((errors > 0).all())
            for profile in ("flat", number_format) if measured else ("flat",):
                progress(f"noise: {scale}, {profile}")
                offsets = None if profile == "flat" else profile_offsets(errors.tolist())
                noise, averaged, sigma = _covered(question, scale, offsets, k3, plain, draws)
                covered, error = coverage(averaged, divergences) or (None, None)
                level = math.exp(sum(map(math.log, sigma)) / len(sigma))
                answer.variants.append(NoiseVariant(scale, profile, level, sigma, noise, covered, error))
    answer.covers, answer.verdict = verdict(answer, question.engine)
    return answer


def _covered(question, scale, offsets, k3, plain, draws) -> tuple[float, list[float], list[float]]:
    """Fit noise of that scale and shape: its divergence, that of the averaged policy from the engine for each
    completion, and sigma by layer."""
    model, device = question.model, next(iter(plain.values())).device
    perturbation = LayerwisePerturbation(model, sigma_init=_PROBE, noise_scale=scale).to(device)
    try:
        if scale == "channel":
            channels = ChannelScale(perturbation)
            with channels.measured():
                for batch in question.batches:
                    question.logps(model, batch)
            channels.update()
        if offsets is not None:
            perturbation.log_sigma += offsets.to(device)
        noise = _fit(question, perturbation, k3, plain, first_draw=draws)
        averaged = []
        for number, batch in enumerate(question.batches):
            mean = NoiseAverage(draws)
            for draw in range(draws):
                mean.add(question.noisy(perturbation, number, draw))
            tokens = question.tokens(batch, device)
            averaged += question.by_row(batch, mean.divergence_from(question.engine_logps(batch, tokens), tokens))
        return noise, averaged, perturbation.sigma.tolist()
    finally:
        perturbation.remove()


def _fit(question, perturbation, k3: float, plain: dict[int, torch.Tensor], first_draw: int) -> float:
    """Set sigma so that the noise is as far from the policy as the engine is; the divergence that was measured last,
    in k3."""
    noise = 0.0
    for draw in range(first_draw, first_draw + 2 * _ROUNDS, 2):  # none of those that are averaged
        gaps = []
        for number, batch in enumerate(question.batches):
            policy = question.noisy(perturbation, number, draw)
            gaps.append(divergence(plain[batch[0]], policy.gather(-1, question.tokens(batch, policy.device))[:, 0]))
        noise = torch.cat(gaps).mean().item()
        if abs(math.log(max(noise, FLOOR) / k3)) < 2 * math.log1p(_NEAR):
            break
        level = perturbation.log_sigma.mean().exp().item()
        wanted = min(max(level * math.sqrt(k3 / max(noise, FLOOR)), _BOUNDS[0]), _BOUNDS[1])
        perturbation.log_sigma += math.log(wanted / level)
    return noise


def _some_tokens(question: _Question) -> tuple[torch.Tensor, torch.Tensor]:
    """The first batches' tokens, on the left of a rectangle, and its mask.  # (B, T) each"""
    samples, rows = question.samples, []
    for i in [row for batch in question.batches for row in batch][:16]:
        rows.append(torch.tensor(list(samples.prompt_ids[i]) + list(samples.completion_ids[i])))
    device = next(question.model.parameters()).device
    pad = torch.nn.utils.rnn.pad_sequence
    return (
        pad(rows, batch_first=True).to(device),
        pad([torch.ones_like(row) for row in rows], batch_first=True).to(device),
    )


def _profiles(question: _Question, number_format: str) -> dict[str, torch.Tensor]:
    """The local errors of the layers in that format, relative to each scale of the noise.  # (L,) each"""
    tokens = _some_tokens(question)
    return {scale: local_errors(question.model, *tokens, number_format, scale) for scale in SCALES}


def _by_layer(question: _Question, errors: torch.Tensor | None) -> list[dict]:
    count = len(find_decoder_layers(question.model))
    mismatch: list[float | None] = [None] * count
    if question.sees_engine:
        ids, mask = _some_tokens(question)
        exact, other = (_outputs(model, ids, mask) for model in (question.model, question.engine.model))
        mismatch = [
            ((b - a).square().mean(-1) / a.square().mean(-1)).mean().sqrt().item()
            for a, b in zip(exact, other, strict=True)
        ]
    local = [None] * count if errors is None else errors.tolist()
    return [
        {"layer": index, "mismatch": gap, "local_error": error}
        for index, (gap, error) in enumerate(zip(mismatch, local, strict=True))
    ]


def _outputs(model, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """The hidden states behind each decoder layer, at the tokens that count.  # L times (N, H), fp32 on the CPU"""
    out: list[torch.Tensor] = []

    def keep(module, args, output) -> None:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        out.append(hidden[mask.bool()].float().cpu())

    handles = [layer.register_forward_hook(keep) for layer in find_decoder_layers(model)]
    try:
        device = next(model.parameters()).device
        model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return out
