"""Other ways to choose the kept tokens, at the same budget: what the lag-relative scores are compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lrsa.config import LRSAConfig


@dataclass(frozen=True)
class Recent(LRSAConfig):
    """Keep the last tokens of every window."""

    @staticmethod
    def rank(keys: torch.Tensor, values: torch.Tensor, config: LRSAConfig) -> torch.Tensor:
        """Scores like `lag_relative_scores`: the position in the window."""
        return torch.arange(config.lag_size, device=keys.device, dtype=torch.float32).expand(_shape(keys, config))


@dataclass(frozen=True)
class Random(LRSAConfig):
    """Keep a random choice of every window's tokens, the same whenever a row is computed again."""

    @staticmethod
    def rank(keys: torch.Tensor, values: torch.Tensor, config: LRSAConfig) -> torch.Tensor:
        """Scores like `lag_relative_scores`: uniform random numbers."""
        generator = torch.Generator().manual_seed(0)
        return torch.rand(_shape(keys, config), generator=generator).to(keys.device)


CONTROLS = {"recent": Recent, "random": Random}
SCORES = {"lag_relative": LRSAConfig} | CONTROLS


def _shape(keys: torch.Tensor, config: LRSAConfig) -> tuple[int, int, int, int]:
    windows = max(max(keys.shape[2] - config.sink_size, 0) // config.lag_size - 1, 0)
    return keys.shape[0], keys.shape[1], windows, config.lag_size
