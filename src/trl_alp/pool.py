# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""Pools a vector over micro-batches and processes: one entry for each layer, say."""

import torch
from accelerate import Accelerator


class Pool:
    """Sum, number, minimum and maximum of vectors whose entries may be unknown, that is NaN."""

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None  # sum, number; (2, L)
        self._extremes: torch.Tensor | None = None  # -min, max; (2, L)

    @property
    def is_empty(self) -> bool:
        return self._sums is None

    def add(self, values: torch.Tensor) -> None:  # (L,)
        known = ~values.isnan()
        sums = torch.stack([torch.where(known, values, 0.0), known.to(values)])
        extremes = torch.stack([torch.where(known, sign * values, -torch.inf) for sign in (-1, 1)])
        self._sums = sums if self.is_empty else self._sums + sums
        self._extremes = extremes if self._extremes is None else torch.maximum(self._extremes, extremes)

    def over(self, accelerator: Accelerator) -> list[torch.Tensor]:
        """Sum, number, minimum and maximum over all processes.  # (L,) each"""
        sums = accelerator.reduce(self._sums, reduction="sum")
        lowest, highest = accelerator.gather(self._extremes.unsqueeze(0)).amax(0)
        return [each.cpu() for each in (*sums, -lowest, highest)]
