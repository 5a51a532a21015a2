# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""What `doctor --noise` has to say: the answer, its verdict and its tables."""

from dataclasses import asdict, dataclass, field

from ..fit import FLOOR
from .engines import Engine
from .findings import finite, table


# Coverage that is worth the noise, and how many standard errors it has to be away from that, and from 0.
WORTH, SURE = 0.1, 2.0


@dataclass
class NoiseVariant:
    """
    Noise of one scale and profile, as large as the mismatch.

    Args:
        scale, profile (`str`):
            `alp_noise_scale`, and `"flat"` or the number format whose local errors shape sigma.
        sigma (`float`):
            Geometric mean over layers.
        sigma_by_layer (`list[float]`):
            Sigma of each layer; what `alp_noise_profile` takes.
        k3 (`float`):
            Divergence of the noise in nats, at the sampled tokens.
        coverage, standard_error (`float`, *optional*):
            See `coverage.py`. `None` where there is nothing to cover.
    """

    scale: str
    profile: str
    sigma: float
    sigma_by_layer: list[float]
    k3: float
    coverage: float | None
    standard_error: float | None


@dataclass
class NoiseAnswer:
    """
    What noise would do about an engine.

    Args:
        covers (`bool`):
            Whether noise of RMS scale and no profile, as large as the mismatch, is worth it by its coverage.
        verdict (`str`):
            One line.
        engine (`str`):
            The engine, in words.
        tokens, completions (`int`):
            How much was compared.
        whole_vocabulary (`bool`):
            Whether divergences are over the whole vocabulary, or at the sampled tokens.
        k3 (`float`):
            The mismatch at the sampled tokens, in nats; what training would fit sigma to.
        kl (`float`):
            KL(engine || policy) a token, in nats.
        entropy_policy, entropy_engine (`float`):
            In nats a token.
        layers (`list[dict]`):
            Of each layer `layer`, `mismatch` (how far the engine's output of it is from the policy's, in units of its
            RMS; `None` where the engine's states cannot be seen) and `local_error` (what the layer alone adds, where a
            number format is simulated).
        variants (`list[NoiseVariant]`):
            Noise of each scale and profile.
    """

    covers: bool
    verdict: str
    engine: str
    tokens: int
    completions: int
    whole_vocabulary: bool
    k3: float
    kl: float
    entropy_policy: float
    entropy_engine: float
    layers: list[dict] = field(default_factory=list)
    variants: list[NoiseVariant] = field(default_factory=list)

    def to_dict(self) -> dict:
        """For JSON; values that are not finite become `None`."""
        return finite({"schema": 1} | asdict(self))


def in_words(engine: Engine) -> str:
    parts = [str(engine.dtype or "unknown dtype").removeprefix("torch."), engine.quantization]
    if str(engine.kv_cache_dtype).startswith("fp8"):
        parts.append("fp8 KV cache")
    return ", ".join(filter(None, parts))


def _way_out(answer: NoiseAnswer, engine: Engine) -> str:
    correction = "a correction of the ratio (TRL's default, or ALP's single ratio with `alp_enabled=False`)"
    if answer.engine.startswith(("fp8", "int", "nvfp4")) or engine.quantization is not None:
        return f"What does: weights of more bits, or {correction}."
    if str(engine.kv_cache_dtype).startswith("fp8"):
        return f"What does: a KV cache in the engine's dtype, or {correction}."
    return f"What does: fp16 in trainer and engine, or {correction}."


def verdict(answer: NoiseAnswer, engine: Engine) -> tuple[bool, str]:
    found = f"{answer.engine} is {answer.k3:.2g} nats (k3) from the policy"
    if answer.k3 < FLOOR or answer.variants[0].coverage is None:
        why = "no more than the trainer's own arithmetic makes"
        return False, f"Nothing to cover: {found}, {why}; coverage is undefined."
    first, best = answer.variants[0], max(answer.variants, key=lambda variant: variant.coverage)
    size = f"noise as large (sigma {first.sigma:.2g}) covers {first.coverage:.0%} +- {first.standard_error:.0%} of it"
    if best.coverage > first.coverage + SURE * max(best.standard_error, first.standard_error):
        size += f", at best {best.coverage:.0%} (scale {best.scale}, profile {best.profile})"
    if first.coverage - SURE * first.standard_error > WORTH:
        return True, f"Yes: {found}, and {size}."
    way_out = _way_out(answer, engine)
    if first.coverage + SURE * first.standard_error < 0:
        sharper = answer.entropy_engine < answer.entropy_policy
        why = "The engine is sharper than the policy, and noise blurs it. " if sharper else ""
        return False, f"No: {found}, and noise takes the policy further away ({size}). {why}{way_out}"
    return False, f"Hardly: {found}, and {size}. {way_out}"


def report_noise(answer: NoiseAnswer) -> str:
    """The answer as text: the verdict, both policies, the noise of each scale and profile, the layers."""
    whole = "the whole vocabulary" if answer.whole_vocabulary else "the sampled tokens"
    lines = [answer.verdict, ""]
    lines += table(
        ("statistic", ""),
        [
            ("tokens", answer.tokens),
            ("completions", answer.completions),
            ("mismatch at the sampled tokens, k3, nats", answer.k3),
            (f"KL(engine || policy) over {whole}, nats", answer.kl),
            ("entropy of the policy, nats", answer.entropy_policy),
            ("entropy of the engine, nats", answer.entropy_engine),
        ],
    )
    rows = [
        (
            v.scale,
            v.profile,
            v.sigma,
            v.k3,
            "-" if v.coverage is None else f"{v.coverage:.1%} +- {v.standard_error:.1%}",
        )
        for v in answer.variants
    ]
    lines += ["", *table(("scale", "profile", "sigma", "k3 of the noise", "coverage"), rows)]
    rows = [
        (row["layer"], *("-" if row[key] is None else row[key] for key in ("mismatch", "local_error")))
        for row in answer.layers
    ]
    return "\n".join([*lines, "", *table(("layer", "mismatch so far", "error of the layer alone"), rows)])
