# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""Writes docs/api.md from the docstrings: `python docs/make_api.py`."""

import inspect
import re
import textwrap
from pathlib import Path

import trl_alp
import trl_alp.channels
import trl_alp.doctor
import trl_alp.fit
import trl_alp.instruments
import trl_alp.layers
import trl_alp.mismatch
import trl_alp.noise
import trl_alp.perturbation
import trl_alp.profile
import trl_alp.ratio
import trl_alp.report


PAGE = Path(__file__).with_name("api.md")
SECTIONS = {
    "Training": [trl_alp.ALPGRPOTrainer, trl_alp.ALPGRPOConfig, trl_alp.instrument, trl_alp.ConsoleCallback],
    "The method by itself": [
        trl_alp.LayerwisePerturbation,
        trl_alp.noise.add_noise,
        trl_alp.perturbation.noise_seed,
        trl_alp.layers.first_trained_layer,
        trl_alp.channels.ChannelScale,
        trl_alp.fit.SigmaFit,
        trl_alp.profile.local_errors,
        trl_alp.log_importance_ratio,
        trl_alp.ratio.turns_from_mask,
        trl_alp.ratio.dual_clip,
    ],
    "Measuring": [trl_alp.mismatch.MismatchMeter, trl_alp.mismatch.Mismatch, trl_alp.instruments.Instruments],
    "The doctor": [
        trl_alp.doctor.diagnose,
        trl_alp.doctor.draw,
        trl_alp.doctor.Diagnosis,
        trl_alp.doctor.Engine,
        trl_alp.doctor.GenerationSetting,
        trl_alp.doctor.ask_noise,
        trl_alp.doctor.NoiseAnswer,
        trl_alp.doctor.NoiseVariant,
    ],
    "The report": [trl_alp.report.report],
}


def describe(thing) -> str:
    """Name, signature and docstring; of a class also its public methods that have one."""
    # A trainer or configuration takes all that TRL's does; its docstring says what is its own.
    signature = "(...)" if issubclass(type(thing), type) and thing.__module__.endswith(("trainer", "config")) else None
    parts = [heading(thing, f"{thing.__module__}.{thing.__name__}", "###", signature), inspect.getdoc(thing) or ""]
    if inspect.isclass(thing):
        for name, member in vars(thing).items():
            if not name.startswith("_") and inspect.isfunction(member) and "Args:" in (member.__doc__ or ""):
                parts += [heading(member, f"{thing.__name__}.{name}", "####"), inspect.getdoc(member)]
    return "\n\n".join(map(markdown, parts))


def heading(thing, name: str, level: str, signature: str | None = None) -> str:
    signature = signature or str(inspect.signature(thing))
    signature = re.sub(r"(?:typing|collections\.abc|torch\.nn\.modules\.module)\.", "", signature)
    signature = re.sub(r"<function \S*<lambda> at \w+>", "...", signature)
    signature = re.sub(r"<function (\w+) at \w+>", r"\1", signature)
    return f"{level} `{name}`\n\n```python\n{name.rsplit('.', 1)[-1]}{signature}\n```"


def markdown(text: str) -> str:
    """Docstrings in Hugging Face style are nearly Markdown: name the sections, make lists of the arguments."""
    text = re.sub(
        r"^(Args|Returns|Raises|Attributes|Parameters):\n((?: +.*\n?|\n)+)", section, text + "\n", flags=re.M
    )
    text = re.sub(r"\[`~?([\w.]+)`\]", r"`\1`", text)
    return text.replace("Example:\n", "**Example**\n").strip()


def section(match: re.Match) -> str:
    body = textwrap.dedent(match[2])
    items = re.sub(r"^(\S.*)$", r"- \1", body, flags=re.M)
    return f"**{match[1]}**\n\n{re.sub(r'^    ', '  ', items, flags=re.M)}"


def page() -> str:
    lines = ["# API", "", "Made from the docstrings by `python docs/make_api.py`.", ""]
    for title, things in SECTIONS.items():
        lines += [f"## {title}", "", *(describe(thing) + "\n" for thing in things)]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
