# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""`ALPGRPOConfig`: what ALP adds to TRL's `GRPOConfig`, with its checks."""

import math
from dataclasses import dataclass, field

from accelerate.logging import get_logger
from trl import GRPOConfig

from .layers import parse_layers
from .noise import NOISE_BACKENDS, NOISE_SCALES, check_noise_backend, check_noise_scale
from .perturbation import check_sigma, is_finite_number
from .profile import parse_profile
from .ratio import LEVELS, check_level
from .sampling import neutral_value, reshaping


logger = get_logger(__name__)  # speaks on the main process only


@dataclass
class ALPGRPOConfig(GRPOConfig):
    r"""
    Configuration class for the [`ALPGRPOTrainer`].

    This class holds only what ALP (Adaptive Layerwise Perturbation, [arXiv
    2603.19470](https://huggingface.co/papers/2603.19470)) adds to [`~trl.GRPOConfig`]. "Reference code" below is the
    paper's released code; `docs/method.md` says where the two and this package differ.

    Parameters:
        > Parameters that control the perturbation

        alp_enabled (`bool`, *optional*, defaults to `True`):
            Whether to perturb the policy during the update. `False` keeps the single importance ratio without noise:
            the paper's Bypass baseline.
        alp_sigma_init (`float`, *optional*, defaults to `0.01`):
            Initial noise level sigma of every perturbed layer, in units of `alp_noise_scale`: with `alp_noise_target`
            what is tried first, for one update, without it what sigma starts from and stays near. The paper's values
            (0.02 and 1e-6, both absolute) are no common default: 0.02 is a third of the embedding RMS of a small
            model, and adding 1e-6 to bf16 hidden states changes no bit.
        alp_noise_scale (`str`, *optional*, defaults to `"rms"`):
            `"rms"`: noise `sigma * RMS(h) * delta` with the RMS of each token's hidden state, ours. `"channel"`:
            noise `sigma * c * delta`, where `c` is the running RMS of each channel at each layer, ours too; a few
            channels hold most of the energy, and as much noise in the others costs less divergence. Its first
            measurement costs one forward of one micro-batch, later ones are the monitor's. `"absolute"`: noise
            `sigma * delta`, the paper (section 3).
        alp_learn_sigma (`bool`, *optional*, defaults to `True`):
            Whether sigma is trained together with the policy, one scalar per layer (paper, section 3). Where the
            lowest decoder layers hold nothing trainable (LoRA on the upper ones), their sigma keeps its initial
            value: its gradient would keep activations that nothing else needs.
        alp_sigma_lr (`float`, *optional*, defaults to `5e-4`):
            Constant learning rate of `log_sigma`, in its own Adam without weight decay (reference code, multi-turn
            setting; its single-turn setting uses 1e-2).
        alp_sigma_min (`float`, *optional*, defaults to `1e-6`):
            Lower bound on sigma. The reference code has none and lets AdamW's weight decay pull sigma towards 1;
            bounds replace that.
        alp_sigma_max (`float`, *optional*, defaults to `0.5`):
            Upper bound on sigma.
        alp_noise_target (`float`, *optional*, defaults to `1.0`):
            Fit the size of the noise to the training-inference mismatch: sigma is moved until the noise takes the
            policy so many times as far (in k3, on fresh rollouts) as the engine is. Without an engine, or where it is
            as exact as the trainer, sigma goes to `alp_sigma_min`, and a warning says so. `None`, the paper's way,
            starts from `alp_sigma_init` and stays there but for what sigma learns; fitted, it learns how sigma
            differs between layers. Needs `alp_monitor_every`, whose micro-batches are measured. Ours: a sigma that
            covers one engine is half a per cent of the mismatch of another, or eighteen times it; in our lab
            (`docs/results.md`) no cost of fitted noise as trained could be told from zero, and what a single ratio
            serves from a 3-bit engine gained by it.
        alp_noise_profile (`str` or `list[float]`, *optional*):
            How sigma differs between layers at first; its geometric mean is `alp_sigma_init`, or what is fitted.
            `None`, the paper's way: not at all. A number format of the engine (`"bf16"`, `"fp8"`, `"int8"`, `"int4"`,
            `"int3"`, `"nvfp4"`): in proportion to the error that the format adds in each layer, measured at
            construction on a few prompts, which needs whole weights (no ZeRO-3, no packed base). Or a positive number
            for each perturbed layer, as `trl-alp doctor MODEL --noise` measures them. Ours.
        alp_layers (`list[int]`, `int` or `str`, *optional*):
            Which decoder layers to perturb: `None` for all (the best of the paper's layer ablation), an index, a list
            of indices, or a string such as `"0-5"`, `"first:6"`, `"last:5"` or `"0,3,7"`.
        alp_noise_backend (`str`, *optional*, defaults to `"auto"`):
            What generates and adds the noise: `"torch"`, `"triton"` (one fused kernel each way; an NVIDIA GPU), or
            `"auto"` for Triton on an NVIDIA GPU where it is installed and torch elsewhere. Both draw N(0, 1), but not
            the same numbers from the same seed: a run resumed on the other backend equals an uninterrupted one in
            distribution, not bit for bit.

        > Parameters that control the loss

        alp_ratio_level (`str`, *optional*, defaults to `"token"`):
            Level of the importance ratio: `"token"`, `"sequence"` (the true product over the sequence, not TRL's
            geometric mean), `"sequence_geometric"`, `"cumulative_token"`, `"cumulative_token_geometric"` or
            `"cumulative_turn"`. The paper reports `"token"` and `"sequence"`; the sequence product is the stronger
            there and the heavier-tailed, so the default is `"token"`.
        alp_dual_clip (`float`, *optional*, defaults to `10.0`):
            Upper bound on the ratio where the advantage is negative; must exceed 1. `None` for no bound. A `delta`
            takes its place. Applies to the loss types that clip (`grpo`, `bnpo`, `dr_grpo`, `dapo`, `luspo`). Source:
            reference code, single-turn setting (3 in its multi-turn setting).

        > Parameters that control the logging

        alp_monitor_every (`int`, *optional*, defaults to `10`):
            Once in so many optimiser steps, and at fresh rollouts once in twice as many, score one micro-batch once
            more without gradient and without noise, and log the noise-off ratio under `alp/noise_off/` and the size of
            the noise as `alp/noise/kl/k3`, so that noise and training-inference mismatch can be told apart. Costs one
            forward of that micro-batch each time. `0` turns it off, and with it the warnings about the engine.
        alp_log_layers (`bool`, *optional*, defaults to `False`):
            Whether to log sigma and its gradient of every perturbed layer, two columns each, beside their mean and
            range.
        alp_log_files (`bool`, *optional*, defaults to `True`):
            Whether to write the log and the envelope of the mismatch to `output_dir/alp/`, for `trl-alp report`.

    > [!NOTE]
    > These parameters have default values different from [`~trl.GRPOConfig`]:
    > - `epsilon`: Defaults to `0.5` instead of `0.2`, and `epsilon_high` to `3.0` instead of `None` (paper,
    >   single-turn setting): a single ratio carries the training-inference mismatch inside it, and a narrow range
    >   clips that instead of the update (measured at small scale: `docs/results.md`).
    > - `vllm_importance_sampling_correction`: Defaults to `False` instead of `True`: the ratio already has the
    >   inference policy in its denominator, and a second factor would correct twice.
    > - `use_bias_correction_kl`: Defaults to `False` instead of `True`: the paper's KL term is the plain k3, and at
    >   sequence level the factor reaches e^20.
    """

    vllm_importance_sampling_correction: bool = field(
        default=False,
        metadata={
            "help": "Must stay False with vLLM: ALP's single ratio already has the inference policy in its "
            "denominator, and TRL's correction would apply the mismatch a second time."
        },
    )
    use_bias_correction_kl: bool = field(
        default=False,
        metadata={
            "help": "Whether to multiply the KL term by the importance ratio. ALP uses the plain k3 estimator, as the "
            "paper does; at sequence level the factor reaches e^20."
        },
    )
    epsilon: float = field(
        default=0.5,
        metadata={
            "help": "Lower clip range: the ratio is clipped below at 1 - epsilon (paper: 0.5). The upper one is "
            "`epsilon_high` and does not follow it, unless that is set to null."
        },
    )
    epsilon_high: float | None = field(
        default=3.0,
        metadata={
            "help": "Upper clip range: the ratio is clipped above at 1 + epsilon_high (paper: 3.0). A single ratio "
            "carries the mismatch inside it; TRL's 0.2 would clip that instead of the update."
        },
    )

    alp_enabled: bool = field(
        default=True,
        metadata={
            "help": "Whether to perturb the policy during the update. False keeps the single importance ratio without "
            "noise: the Bypass baseline."
        },
    )
    alp_sigma_init: float = field(
        default=0.01,
        metadata={
            "help": "Initial noise level of every perturbed layer, in units of `alp_noise_scale`; with "
            "`alp_noise_target` what is tried first."
        },
    )
    alp_noise_scale: str = field(
        default="rms",
        metadata={
            "help": "`rms`: noise relative to the RMS of each token's hidden state. `channel`: relative to the "
            "running RMS of each channel at each layer. `absolute`: the paper's sigma * delta.",
            "choices": list(NOISE_SCALES),
        },
    )
    alp_learn_sigma: bool = field(
        default=True,
        metadata={"help": "Whether sigma is trained together with the policy, one scalar per layer."},
    )
    alp_sigma_lr: float = field(
        default=5e-4,
        metadata={"help": "Constant learning rate of log(sigma), in its own Adam without weight decay."},
    )
    alp_sigma_min: float = field(default=1e-6, metadata={"help": "Lower bound on sigma."})
    alp_sigma_max: float = field(default=0.5, metadata={"help": "Upper bound on sigma."})
    # `str` second: `HfArgumentParser` reads such a field from the command line as that.
    alp_noise_target: float | None = field(
        default=1.0,
        metadata={
            "help": "Fit sigma so that the noise moves the policy so many times as far (k3, fresh rollouts) as the "
            "engine is from it, 1.0 for as far; null (in a YAML file) for the size that `alp_sigma_init` says."
        },
    )
    alp_noise_profile: list[float] | str | None = field(
        default=None,
        metadata={
            "help": "How sigma differs between layers at first: not at all if not set, in proportion to the error of "
            "a number format (`bf16`, `fp8`, `int8`, `int4`, `int3`, `nvfp4`), or as numbers for the layers "
            "(`0.5,1,2`)."
        },
    )
    alp_layers: list[int] | str | int | None = field(
        default=None,
        metadata={
            "help": "Which decoder layers to perturb: all if not set, else for example `0-5`, `first:6`, `last:5` or "
            "`0,3,7`."
        },
    )
    alp_noise_backend: str = field(
        default="auto",
        metadata={
            "help": "What generates and adds the noise: `torch`, `triton` (one fused kernel each way; an NVIDIA GPU), "
            "or `auto` for Triton on an NVIDIA GPU where it is installed and torch elsewhere. The two draw different "
            "noise from the same seed, so resuming on the other one is not bit-exact.",
            "choices": list(NOISE_BACKENDS),
        },
    )
    alp_ratio_level: str = field(
        default="token",
        metadata={
            "help": "Level of the importance ratio: `token`, `sequence` (the true product), `sequence_geometric`, "
            "`cumulative_token`, `cumulative_token_geometric` or `cumulative_turn`.",
            "choices": list(LEVELS),
        },
    )
    alp_dual_clip: float | None = field(
        default=10.0,
        metadata={
            "help": "Upper bound (above 1) on the ratio where the advantage is negative; not set for no bound. "
            "`delta` takes its place."
        },
    )
    alp_monitor_every: int = field(
        default=10,
        metadata={
            "help": "Once in so many optimiser steps, and at fresh rollouts once in twice as many, score one "
            "micro-batch once more without noise, and log its ratio under `alp/noise_off/`. 0 turns it off, and with "
            "it the warnings about the inference engine."
        },
    )

    alp_log_layers: bool = field(
        default=False, metadata={"help": "Whether to log sigma and its gradient of every perturbed layer."}
    )
    alp_log_files: bool = field(
        default=True,
        metadata={"help": "Whether to write the log and the envelope of the mismatch to `output_dir/alp/`."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alp_enabled", "alp_learn_sigma", "alp_log_layers", "alp_log_files"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False.")
        check_sigma(self.alp_sigma_init, self.alp_sigma_min, self.alp_sigma_max, prefix="alp_")
        check_noise_scale(self.alp_noise_scale, "alp_noise_scale")
        check_noise_backend(self.alp_noise_backend, use_cpu=self.use_cpu, name="alp_noise_backend")
        check_level(self.alp_ratio_level, "alp_ratio_level")
        parse_layers(self.alp_layers, None, "alp_layers")
        if not is_finite_number(self.alp_sigma_lr) or self.alp_sigma_lr <= 0:
            raise ValueError(
                f"alp_sigma_lr={self.alp_sigma_lr!r} must be a finite, positive number. To keep sigma fixed, set "
                "`alp_learn_sigma=False`."
            )
        if self.alp_dual_clip not in (None, math.inf) and not (
            is_finite_number(self.alp_dual_clip) and self.alp_dual_clip > 1
        ):
            raise ValueError(
                f"alp_dual_clip={self.alp_dual_clip!r} must be a number above 1, or None for no bound on the ratio of "
                "tokens with negative advantage."
            )
        if type(self.alp_monitor_every) is not int or self.alp_monitor_every < 0:
            raise ValueError(
                f"alp_monitor_every={self.alp_monitor_every!r} must be a whole number of optimiser steps, or 0 for "
                "off."
            )
        parse_profile(self.alp_noise_profile, None, "alp_noise_profile")
        if self.alp_noise_target is not None:
            if not is_finite_number(self.alp_noise_target) or self.alp_noise_target <= 0:
                raise ValueError(
                    f"alp_noise_target={self.alp_noise_target!r} must be a finite, positive number (1.0: as far as "
                    "the engine is off), or None for noise of the size that `alp_sigma_init` says."
                )
            if self.alp_monitor_every == 0 and self.alp_enabled:
                raise ValueError(
                    f"alp_noise_target={self.alp_noise_target} needs the policy to be scored without noise now and "
                    "then, and alp_monitor_every=0 turns that off. Set `alp_monitor_every=10`, or "
                    "`alp_noise_target=None` for noise of a fixed size."
                )
        if self.alp_ratio_level != "token":
            for name, value in (
                ("importance_sampling_level", self.importance_sampling_level == "sequence"),
                ("loss_type", self.loss_type == "vespo"),
            ):
                if value:
                    raise ValueError(
                        f"alp_ratio_level={self.alp_ratio_level!r} cannot be combined with "
                        f"{name}={getattr(self, name)!r}, which aggregates the token ratios over the sequence itself. "
                        f"Set `alp_ratio_level='token'`, or change `{name}`."
                    )
        if self.vllm_importance_sampling_correction:
            reason = (
                "vllm_importance_sampling_correction=True: ALP's single ratio already has the inference policy in its "
                "denominator, so TRL's factor would correct the training-inference mismatch a second time. "
            )
            if self.use_vllm:
                raise ValueError(
                    reason + "Leave it at ALP's default, False; to use TRL's correction, use `GRPOTrainer`."
                )
            logger.info(reason + "It has no effect without `use_vllm=True`.")
        if self.delta is not None and self.alp_dual_clip is not None:
            logger.info(f"delta={self.delta} takes the place of alp_dual_clip={self.alp_dual_clip}.")
        epsilon_high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        # The geometric mean, ours or TRL's (GSPO), is near 1 where the token ratios are not.
        geometric = next(
            (
                f"{name}={value!r}"
                for name, value, mean in (
                    ("alp_ratio_level", self.alp_ratio_level, "sequence_geometric"),
                    ("importance_sampling_level", self.importance_sampling_level, "sequence"),
                )
                if value == mean
            ),
            None,
        )
        if geometric and epsilon_high >= 1:
            logger.info(
                f"{geometric} takes the geometric mean of the token ratios, which hardly leaves 1, so that "
                f"epsilon={self.epsilon}, epsilon_high={epsilon_high} clips nothing. GSPO's range is 3e-4 and 4e-4."
            )
        elif not geometric and epsilon_high < 1:
            logger.info(
                f"epsilon_high={epsilon_high}: a single importance ratio carries the training-inference mismatch and "
                "the noise inside it, and so narrow a range may clip those instead of the update. The paper uses "
                "`epsilon=0.5, epsilon_high=3.0`."
            )
        self._warn_about_other_distributions()

    def _warn_about_other_distributions(self) -> None:
        """Warn of sampling options that make the completions come from another distribution than the one scored."""
        names = ("top_p", "top_k", "min_p", "repetition_penalty", "vllm_structured_outputs_regex")
        options = {name: getattr(self, name) for name in names if hasattr(self, name)}
        changed = reshaping(options | (self.generation_kwargs or {}), self.temperature)
        if changed:
            neutral = {name: neutral_value(name, self.temperature) for name in changed}
            logger.warning(
                f"{', '.join(f'{name}={value}' for name, value in changed.items())}: completions are sampled from a "
                "truncated or reweighted distribution, so the importance ratio against it is biased by the "
                "probability mass that was cut off. For an unbiased ratio, sample from the full distribution: "
                f"`{', '.join(f'{name}={value}' for name, value in neutral.items())}`."
            )
