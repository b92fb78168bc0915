"""Train the tiny base model that is committed in data/tiny_base (about ten minutes on two cores).

It learns, with ordinary dense attention, to find one of four codes in 256 tokens of filler words. It is never shown a compressed
cache, so that the quickstart can show what compression costs it and what LRSA gives back.

    python launch/train_tiny_base.py --output data/tiny_base
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from data import synthetic  # noqa: E402

SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
OTHER_WORDS = [*"0123456789.", "the", "of", "is", "code", "pass", "key"]


def build_tokenizer(context_length: int) -> PreTrainedTokenizerFast:
    """Words separated by blanks, `<bos>` in front: the synthetic text and nothing else has a token."""
    words = [*SPECIAL.values(), *OTHER_WORDS, *synthetic.NAMES, *synthetic.FILLER]
    vocabulary = {word: index for index, word in enumerate(words)}
    assert len(vocabulary) == len(words), "a word stands in two lists"
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=4 * context_length, padding_side="left", **SPECIAL
    )


def build_model(tokenizer: PreTrainedTokenizerFast, context_length: int) -> LlamaForCausalLM:
    """A Llama of 0.5M parameters: 3 layers, 4 query heads that share 2 KV heads of 32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=4 * context_length, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def draw_batch(rng: random.Random, tokenizer, rows: int, length: int) -> tuple[torch.Tensor, int]:
    """Rows of exactly `length` tokens, `[rows, length]`, each ending in its answer and `<eos>`; and the length of that end."""
    texts = [synthetic.key_value_row(rng, tokenizer, length) for _ in range(rows)]
    ids = tokenizer([f"{text['prompt']} {text['answers'][0]} <eos>" for text in texts])["input_ids"]
    return torch.tensor(ids), len(texts[0]["answers"][0].split()) + 1


def answer_logits(model, ids: torch.Tensor, trained: int) -> torch.Tensor:
    """Logits for the last `trained` tokens of every row, `[rows, trained, vocabulary]`."""
    return model(input_ids=ids, logits_to_keep=trained + 1, use_cache=False).logits[:, :-1]


@torch.no_grad()
def digit_accuracy(model, tokenizer, rows: int, length: int, seed: int) -> float:
    """Share of the answer's digits that come first in the model's prediction, the digits before them given."""
    rng, right = random.Random(seed), []
    for start in range(0, rows, 50):
        ids, trained = draw_batch(rng, tokenizer, min(50, rows - start), length)
        right.append((answer_logits(model, ids, trained).argmax(-1) == ids[:, -trained:])[:, :-1].float())
    return torch.cat(right).mean().item()


def train(model, tokenizer, args: argparse.Namespace) -> None:
    """AdamW on the answer tokens only, the length growing in thirds: short rows teach the circuit, long ones the reach."""
    rng = random.Random(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.steps, pct_start=0.1
    )
    lengths = [args.context_length * 3 // 8, args.context_length * 5 // 8, args.context_length]
    progress = tqdm(range(args.steps), desc="training the tiny base")
    for step in progress:
        ids, trained = draw_batch(rng, tokenizer, args.batch_size, lengths[len(lengths) * step // args.steps])
        logits = answer_logits(model, ids, trained)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -trained:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(length=ids.shape[1], loss=f"{loss.item():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="data/tiny_base", help="directory for model and tokenizer")
    parser.add_argument("--context-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer(args.context_length)
    model = build_model(tokenizer, args.context_length)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens in the vocabulary")
    train(model.train(), tokenizer, args)
    accuracy = digit_accuracy(model.eval(), tokenizer, 500, args.context_length, seed=args.seed + 1)
    print(f"dense digit accuracy on 500 new rows of {args.context_length} tokens: {accuracy:.3f}")
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
