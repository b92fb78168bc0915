"""Models that the tests run: a random one with few but real parts, and a small pretrained one where it lies beside the
checkout."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture
def random_llama():
    """Three layers, four query heads over two KV heads, fp64, weights large enough for attention to matter."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture
def shared():
    """The folder of real data and models beside the checkout; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data here: {SHARED.name}/ lies beside the checkout only where the project is developed")
    return SHARED


@pytest.fixture
def stories(shared):
    """A real pretrained Llama, in fp64."""
    return AutoModelForCausalLM.from_pretrained(shared / "models/stories260K", dtype=torch.float64).eval()
