"""Post-train language models for a compressed KV cache: Lag-Relative Sparse Attention and its cache."""

from lrsa.attention import lrsa_attention
from lrsa.cache import LRSACache
from lrsa.config import LRSAConfig
from lrsa.hf import apply_lrsa, remove_lrsa
from lrsa.loading import load
from lrsa.prompt import PromptFormat
from lrsa.scoring import lag_relative_scores
from lrsa.selection import Selection, select_tokens

__version__ = "0.1.0"
__all__ = [
    "LRSACache",
    "LRSAConfig",
    "PromptFormat",
    "Selection",
    "apply_lrsa",
    "lag_relative_scores",
    "load",
    "lrsa_attention",
    "remove_lrsa",
    "select_tokens",
]
