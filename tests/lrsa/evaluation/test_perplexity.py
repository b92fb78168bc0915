"""The loss of whole rows equals a slow reference, whatever the batch and the piece, and prefill in chunks."""

import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from transformers import CohereConfig, CohereForCausalLM

from lrsa import LRSACache, LRSAConfig, apply_lrsa
from lrsa.cache import CACHE_ARGUMENT
from lrsa.evaluation import evaluate_loss, perplexity_of, teacher_forced

CONFIG = LRSAConfig(sink_size=2, lag_size=8, top_k=2)


def make_rows(count=5):
    rng = random.Random(0)
    return [{"input_ids": [rng.randrange(48) for _ in range(rng.randrange(30, 70))]} for _ in range(count)]


@torch.no_grad()
def slow_loss(model, row, first=1):
    ids = torch.tensor([row["input_ids"]])
    logits = model(ids, use_cache=False).logits[0]
    return F.cross_entropy(logits[first - 1 : -1], ids[0, first:]).item()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("logits_at_once", [1, 48 * 3 * 10, 2**25])
def test_equals_each_row_alone_in_pieces_of_any_size(random_llama, compressed, logits_at_once, monkeypatch):
    monkeypatch.setattr("lrsa.evaluation.measure.perplexity.LOGITS_AT_ONCE", logits_at_once)
    rows = make_rows()
    if compressed:
        apply_lrsa(random_llama, CONFIG)
    score = evaluate_loss(random_llama, rows, batch_size=3)
    assert score.per_row == pytest.approx([slow_loss(random_llama, row) for row in rows], abs=1e-6)
    assert score.value == pytest.approx(sum(score.per_row) / 5)


def test_compressed_loss_is_that_of_prefill_in_chunks(random_llama):
    apply_lrsa(random_llama, CONFIG)
    row = make_rows(1)[0]
    ids = torch.tensor([row["input_ids"]])
    cache = LRSACache(CONFIG)
    with torch.no_grad():
        starts = [0, *range(CONFIG.dense_length, ids.shape[1], CONFIG.lag_size), ids.shape[1]]
        chunks = [random_llama(ids[:, a:b], **{CACHE_ARGUMENT: cache}).logits for a, b in itertools.pairwise(starts)]
    expected = F.cross_entropy(torch.cat(chunks, 1)[0, :-1], ids[0, 1:]).item()
    assert len(chunks) > 2
    assert evaluate_loss(random_llama, [row]).value == pytest.approx(expected, abs=1e-6)


def test_prompt_does_not_count(random_llama):
    row = make_rows(1)[0] | {"prompt_length": 20}
    assert evaluate_loss(random_llama, [row]).value == pytest.approx(slow_loss(random_llama, row, first=20), abs=1e-6)


def test_logits_are_made_as_the_model_makes_them():
    """Cohere scales its logits after the output layer."""
    torch.manual_seed(0)
    size = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = CohereConfig(**size, num_attention_heads=4, num_key_value_heads=2, logit_scale=0.2, pad_token_id=0)
    model = CohereForCausalLM(config).double().eval()
    rows = make_rows(2)
    assert evaluate_loss(model, rows).per_row == pytest.approx([slow_loss(model, row) for row in rows], abs=1e-6)


def test_backbone_is_run_once_per_batch_and_left_as_it_was(random_llama, monkeypatch):
    monkeypatch.setattr("lrsa.evaluation.measure.perplexity.LOGITS_AT_ONCE", 1)
    runs = []
    random_llama.model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    evaluate_loss(random_llama, make_rows(4), batch_size=2)
    assert len(runs) == 2
    assert "forward" not in vars(random_llama.model)


def test_perplexity_is_exp_of_the_loss(random_llama):
    loss = evaluate_loss(random_llama, make_rows())
    found = perplexity_of(loss)
    assert (found.value, found.low, found.high) == tuple(map(math.exp, (loss.value, loss.low, loss.high)))
    assert found.low < found.value < found.high


def test_row_without_a_token_to_predict_is_named(random_llama):
    with pytest.raises(ValueError, match="row 1 has 1 tokens"):
        evaluate_loss(random_llama, [{"input_ids": [3, 4]}, {"input_ids": [3]}])


def test_of_a_chat_only_the_marked_tokens_count(random_llama):
    rows = [row | {"trained": [place % 7 in (3, 4) for place in range(len(row["input_ids"]))]} for row in make_rows()]
    expected = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        losses = torch.nn.functional.cross_entropy(
            random_llama(ids, use_cache=False).logits[0, :-1], ids[0, 1:], reduction="none"
        )
        expected.append(losses[torch.tensor(row["trained"][1:])].mean().item())
    assert evaluate_loss(random_llama, rows, batch_size=3).per_row == pytest.approx(expected, abs=1e-6)


def test_real_model_on_real_text(stories, shared):
    """A model of children's stories finds one easier than its words in another order."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260K")
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with friends."
    ids = tokenizer(text)["input_ids"]
    mixed = [ids[0], *random.Random(0).sample(ids[1:], len(ids) - 1)]
    story, noise = evaluate_loss(stories, [{"input_ids": ids}, {"input_ids": mixed}]).per_row
    assert story < 1.5 < 4 < noise


def test_token_accuracy_is_the_share_of_largest_logits(random_llama):
    rows = [row | {"prompt_length": 11} for row in make_rows(3)]
    expected = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        best = random_llama(ids, use_cache=False).logits[0].argmax(-1)
        row["input_ids"][20], row["input_ids"][25] = best[19].item(), best[24].item()  # some are right
        ids = torch.tensor([row["input_ids"]])
        best = random_llama(ids, use_cache=False).logits[0, 10:-1].argmax(-1)
        expected.append((best == ids[0, 11:]).double().mean().item())
    found = teacher_forced(random_llama, rows, batch_size=2)
    assert found["token_accuracy"].per_row == pytest.approx(expected) and max(expected) > 0
    assert found["loss"] == evaluate_loss(random_llama, rows, batch_size=2)
