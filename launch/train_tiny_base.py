"""Train the tiny base model that is committed in data/tiny_base: four minutes on one core, with torch 2.9 or newer.

It learns, with ordinary dense attention, to find one of four codes in 256 tokens of filler words. It is never shown a
compressed cache, so that the quickstart can show what compression costs it and what LRSA gives back.

  python launch/train_tiny_base.py --output data/tiny_base
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import NamedTuple

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from data.synthetic import text as synthetic  # noqa: E402
from launch.command_line import Parser, explain  # noqa: E402

LENGTH, MAX_LENGTH, KEYS, DIGITS = 256, 1024, 4, 3
SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
OTHER_WORDS = [*"0123456789.", "the", "is", "code", "pass", "key"]


class Stage(NamedTuple):
    """A part of the training: how many names there are, how its rows look, and how long it lasts."""

    names: int
    digits: int
    length: int
    questions: int
    rows: int
    steps: int


# Looking up "what followed this name" takes two layers that are useless without each other. With all names at once, and
# codes whose later digits follow from the first, training stays on a plateau. Four names and one digit get it off in a
# hundred steps; the rest is growth. The last stage is the task itself.
STAGES = (
    Stage(names=4, digits=1, length=50, questions=8, rows=64, steps=120),
    Stage(names=8, digits=1, length=50, questions=8, rows=64, steps=60),
    Stage(names=16, digits=1, length=50, questions=8, rows=64, steps=60),
    Stage(names=63, digits=1, length=50, questions=8, rows=64, steps=120),
    Stage(names=63, digits=DIGITS, length=96, questions=8, rows=32, steps=120),
    Stage(names=63, digits=DIGITS, length=160, questions=8, rows=32, steps=80),
    Stage(names=63, digits=DIGITS, length=LENGTH, questions=8, rows=32, steps=80),
    Stage(names=63, digits=DIGITS, length=LENGTH, questions=1, rows=32, steps=100),
)


def build_tokenizer() -> PreTrainedTokenizerFast:
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
        tokenizer_object=tokenizer, model_max_length=MAX_LENGTH, padding_side="left", **SPECIAL
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 0.5M parameters: 3 layers, 4 query heads that share 2 KV heads of 32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=MAX_LENGTH, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},  # more of the few channels tell order
        initializer_range=0.04,  # a narrow model starts more quickly from weights larger than the usual 0.02
    )  # fmt: skip
    return LlamaForCausalLM(config)


def draw_row(rng: random.Random, stage: Stage) -> str:
    """Facts among filler, then questions with their answers; a code may be asked for twice, so none is left over."""
    names = rng.sample(synthetic.NAMES[: stage.names], KEYS)
    facts = [f"code {name} {' '.join(rng.choices('0123456789', k=stage.digits))}" for name in names]
    end = " . ".join(rng.choices(facts, k=stage.questions)) + " <eos>"
    pieces = [f"{fact} ." for fact in facts]
    room = stage.length - 1 - sum(len(text.split()) for text in [*pieces, end])
    body = rng.choices(synthetic.FILLER, k=room)
    for piece in pieces:
        body.insert(rng.randint(0, len(body)), piece)
    return " ".join([*body, end])


def trained_positions(stage: Stage) -> torch.Tensor:
    """Where the digits of the answers and `<eos>` stand, the same in every row of a stage."""
    question = 2 + stage.digits + 1
    starts = range(stage.length - question * stage.questions + 2, stage.length, question)
    return torch.tensor([start + i for start in starts for i in range(stage.digits)] + [stage.length - 1])


def train(model, tokenizer, args: argparse.Namespace) -> None:
    """Muon for the layers' matrices, AdamW for embeddings and norms; loss on answers only."""
    rng = random.Random(args.seed)
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.muon_rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=args.adam_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    steps = [stage for stage in STAGES for _ in range(stage.steps)]
    # Short warmup, constant, and down to zero over the last two fifths.
    rate = lambda step: min(1, (step + 1) / 20, (len(steps) - step) / (0.4 * len(steps)))  # noqa: E731
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    progress = tqdm(steps, desc="training the tiny base", mininterval=2)
    for step, stage in enumerate(progress):
        ids = torch.tensor(tokenizer([draw_row(rng, stage) for _ in range(stage.rows)])["input_ids"])
        trained = trained_positions(stage)
        logits = model(input_ids=ids, logits_to_keep=trained - 1, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, trained].flatten())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in [*optimizers, *schedules]:
            stepper.step()
        if step % 20 == 0:
            progress.set_postfix(names=stage.names, length=stage.length, loss=f"{loss.item():.3f}")


@torch.no_grad()
def digit_accuracy(model, tokenizer, rows: int, seed: int) -> float:
    """Share of the answers' digits that greedy generation with the full cache puts in place."""
    rng, right = random.Random(seed), 0
    for _ in tqdm(range(rows // 50), desc="answering new rows"):
        made = [synthetic.key_value_row(rng, tokenizer, LENGTH, KEYS, DIGITS) for _ in range(50)]
        prompts = tokenizer([row["prompt"] for row in made], return_tensors="pt", padding=True)
        ids = model.generate(**prompts, max_new_tokens=DIGITS + 1, do_sample=False)[:, prompts["input_ids"].shape[1] :]
        answers = tokenizer.batch_decode(ids, skip_special_tokens=True)
        for row, answer in zip(made, answers, strict=True):
            right += sum(a == b for a, b in zip(answer.split(), row["answers"][0].split(), strict=False))
    return right / (rows // 50 * 50 * DIGITS)


def main() -> int:
    parser = Parser("train_tiny_base.py", __doc__)
    parser.add_argument("--output", default="data/tiny_base", metavar="DIR", help="where model and tokenizer go")
    parser.add_argument("--muon-rate", type=float, default=0.02, help="learning rate of the matrices (Muon)")
    parser.add_argument("--adam-rate", type=float, default=3e-3, help="learning rate of everything else (AdamW)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of weights and rows")
    options = parser.parse_args()
    return explain(lambda: make_base(options))


def make_base(options: argparse.Namespace) -> None:
    """Train the model from scratch, say how well it retrieves, and save it with its tokenizer."""
    torch.manual_seed(options.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens in the vocabulary")
    train(model.train(), tokenizer, options)
    accuracy = digit_accuracy(model.eval(), tokenizer, 500, seed=options.seed + 1)
    print(f"digit accuracy with the full cache, 500 new rows of {LENGTH} tokens: {accuracy:.3f}")
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    sys.exit(main())
