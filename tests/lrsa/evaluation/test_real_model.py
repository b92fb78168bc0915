"""A real pretrained model in the evaluation: its first layers where it is at hand, all of them in a slow test."""

import os
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrsa import LRSAConfig, PromptFormat
from lrsa.evaluation.layers import choose_layers
from lrsa.evaluation.study import study
from lrsa.evaluation.suite import needles

FOLDER = Path(os.environ.get("REAL_MODEL", Path(__file__).resolve().parents[3] / "runs/smollm2"))
CONFIG = LRSAConfig(sink_size=16, lag_size=32, top_k=4)

pytestmark = pytest.mark.skipif(
    not (FOLDER / "config.json").is_file(),
    reason="there is no real model: run make real-model, or name its folder in REAL_MODEL",
)


def passkeys(length: int, count: int) -> tuple:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    return tokenizer, needles.passkey_rows(tokenizer, PromptFormat.of(tokenizer), length, (0.2, 0.5), count, digits=16)


def test_first_layers_are_measured():
    model = AutoModelForCausalLM.from_pretrained(FOLDER, num_hidden_layers=3).eval()
    tokenizer, rows = passkeys(256, 2)
    found = study(model, tokenizer, rows, "retrieval", CONFIG, (), metric="loss", progress=False)
    losses = {name: found.score(name, "1/8", "loss").value for name in found.models}
    assert len({*losses.values(), found.score(found.models[0], metric="loss").value}) == 4
    choice = choose_layers(model, rows, CONFIG, most=1, progress=False)
    assert set(choice.alone) == {0, 1, 2} and choice.shares["chosen"] <= choice.shares["uniform"] < 0.6


@pytest.mark.slow
def test_compression_costs_the_whole_model_its_passkeys():
    model = AutoModelForCausalLM.from_pretrained(FOLDER).eval()
    tokenizer, rows = passkeys(512, 2)
    found = study(model, tokenizer, rows, "retrieval", CONFIG, (), metric="loss", progress=False)
    # All digits but the first, and not the end: the model would answer with a sentence.
    assert found.score(found.models[-1], metric="token_accuracy").value > 0.8
    for name in found.models:
        assert found.score(name, "1/8", "token_accuracy").value < 0.4
