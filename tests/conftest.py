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


SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "Question: who found the river?\nAnswer: Anna did.",
    "3 4 8 2",
)


@pytest.fixture(scope="session")
def byte_tokenizer():
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it, with few merges; every text has tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    raw.train_from_iterator(SENTENCES * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="session")
def blank_tokenizer():
    """A tokenizer that puts a blank in front of every text, as SentencePiece's do (Llama 2, Mistral, Gemma)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    raw.decoder = decoders.Metaspace(prepend_scheme="always")
    letters = [chr(code) for code in range(33, 127)] + ["\n", "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=letters, max_token_length=5
    )
    raw.train_from_iterator([sentence.replace("\n", " ") for sentence in SENTENCES] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
