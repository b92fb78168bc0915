"""Models that the tests run: a random one with few but real parts, and a small pretrained one where it lies beside the
checkout."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.tiny_run import save_model
from tests.train.publish.hub_server import TOKEN, LocalHub

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


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, byte_tokenizer) -> Path:
    """The directory of a finished run: two steps and an evaluation of a random model, which lies in `../../base`."""
    from train.run import run
    from train.settings.load import load_settings

    directory = tmp_path_factory.mktemp("work")
    save_model(directory / "base", byte_tokenizer, positions=256)
    rng = random.Random(0)
    words = [" ".join(rng.choices(["river", "fox", "Anna", "3", "dog"], k=rng.randint(12, 24))) for _ in range(12)]
    (directory / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    settings = {
        "model": {"name_or_path": str(directory / "base")},
        "lrsa": {"sink_size": 4, "lag_size": 8, "top_k": 2, "skip_layers": [0]},
        "lora": {"r": 4},
        "data": {"kind": "text", "path": str(directory / "text.jsonl"), "eval_rows": 4, "context_length": 96},
        "train": {
            "output_dir": str(directory / "runs" / "tiny"),
            "max_steps": 2,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.1,
            "use_cpu": True,
            "disable_tqdm": True,
        },
        "eval": {"keep_ratios": [0.5]},
    }
    (directory / "tiny.yaml").write_text(json.dumps(settings))
    return run(load_settings(str(directory / "tiny.yaml")))


@pytest.fixture
def tiny_copy(tiny_run, tmp_path) -> Path:
    """A copy of the run that a test may spoil."""
    return Path(shutil.copytree(tiny_run, tmp_path / "runs" / "tiny"))


@pytest.fixture(scope="session")
def start_hub(tiny_run):
    """Makes a local hub that everybody can load the run's base model from, as `org/base`."""

    def start() -> LocalHub:
        hub = LocalHub()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
            api = HfApi(endpoint=hub.url, token=TOKEN)
            api.create_repo("org/base", private=False)
            api.upload_folder(repo_id="org/base", folder_path=tiny_run.parents[1] / "base")
        hub.requests.clear()
        return hub

    return start


@pytest.fixture
def hub(start_hub, monkeypatch):
    """Such a hub, which the client in this process takes for the only one."""
    with start_hub() as hub:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        yield hub
