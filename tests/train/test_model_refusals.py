"""A model that does not fit its settings or its tokenizer is refused before training, in words about settings."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests import tiny_run
from tests.lrsa.models.build import build
from tests.tiny_run import ONE_STEP, make_workplace
from train.model import packing_problems

run_here = partial(tiny_run.run_here, overwrite=True)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, byte_tokenizer) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"), byte_tokenizer, ONE_STEP)


def test_every_target_module_must_exist(workplace, capsys):
    assert run_here(workplace, "lora.target_modules=[q_proj, v_porj, layers.9.k_proj]") == 2
    message = capsys.readouterr().err
    assert "lora.target_modules: no module of the model is called v_porj; did you mean v_proj?" in message
    assert "layers.9.k_proj" in message and "q_proj, v_porj" not in message
    assert run_here(workplace, "lora.target_modules=[q_proj, layers.0.self_attn.v_proj]") == 0
    assert "2 q_proj, 1 v_proj" in " ".join(capsys.readouterr().out.replace("│", " ").split()), "the banner counts them"


def test_a_token_without_an_embedding_is_refused(workplace, capsys):
    tokenizer = AutoTokenizer.from_pretrained(workplace / "model")
    padded = workplace / "padded"
    padded.mkdir()
    for path in (workplace / "model").iterdir():
        (padded / path.name).write_bytes(path.read_bytes())
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    tokenizer.save_pretrained(padded)
    size = len(tokenizer) - 1
    for rows in (1, 4):
        given = ["model.name_or_path=padded", f"train.per_device_train_batch_size={rows}"]
        assert run_here(workplace, *given) == 2
        message = capsys.readouterr().err
        assert f"model.name_or_path: token <new pad> has id {size}, but the model has {size} embeddings" in message
        assert "resize_token_embeddings" in message


def test_a_warmup_that_never_ends_is_told(workplace, capsys):
    for warmup, told in ((5, True), (1, False)):
        assert run_here(workplace, "train.max_steps=2", f"train.warmup_steps={warmup}") == 0
        banner = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert ("a warmup of 5 steps never reaches train.learning_rate in 2 steps" in banner) == told


@pytest.mark.parametrize("kind", ["granitemoehybrid", "lfm2"])
def test_packing_for_models_that_cannot_tell_documents_apart(kind):
    model = build(kind)
    (problem,) = packing_problems(model)
    assert problem.field == "train.packing" and f"cannot be used with {kind}" in problem.text
    assert packing_problems(build("llama")) == []
