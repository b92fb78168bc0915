"""Which layers to keep whole (`skip_layers`), by measurement: each layer compressed alone, then the worst of them kept
whole and the others cut so much more that the cache holds no more tokens than before."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lrsa.config import LRSAConfig
from lrsa.evaluation.measure.cost import kept_share
from lrsa.evaluation.measure.perplexity import evaluate_loss
from lrsa.evaluation.measure.state import with_attention
from lrsa.evaluation.progress import Progress
from lrsa.evaluation.report.pictures import draw_layers
from lrsa.evaluation.report.tables import markdown_table
from lrsa.evaluation.score import Score, paired_difference
from lrsa.hf import compressed_layers

NAME, PICTURE = "layers", "layers.png"


@dataclass(frozen=True)
class LayerChoice:
    """What `choose_layers` found.

    Attributes:
        uniform: the settings that it started from.
        chosen: those with the lowest loss that hold no more tokens; `uniform` itself when no layer is worth it.
        full: loss of the full cache, on the rows of the choice.
        alone: layer -> loss when it alone is compressed, on the rows of the choice.
        whole: the settings that were compared, `uniform` first, with their loss on the rows of the choice.
        held_out: loss on the other rows, of `"full"`, `"uniform"` and `"chosen"`.
        shares: share of the tokens that the cache holds under `"uniform"` and `"chosen"`.
    """

    uniform: LRSAConfig
    chosen: LRSAConfig
    full: Score
    alone: dict[int, Score]
    whole: list[tuple[LRSAConfig, Score]]
    held_out: dict[str, Score]
    shares: dict[str, float]

    def summary(self) -> str:
        """The choice in one sentence, with what it is worth on rows that it was not made on."""
        full, uniform, chosen = (self.held_out[name] for name in ("full", "uniform", "chosen"))
        costs = f"full cache {full}, {self.uniform.top_k} of {self.uniform.lag_size} in every layer {uniform}"
        if self.chosen == self.uniform:
            return f"**No layer is worth being kept whole at this size** (n = {full.n}; loss: {costs})."
        back = paired_difference(uniform, chosen)
        return (
            f"**`lrsa.skip_layers: {list(self.chosen.skip_layers)}` with `lrsa.top_k: {self.chosen.top_k}` wins back "
            f"{back.value / (uniform.value - full.value):.0%} of what compression costs**: {back} nats, at "
            f"{self.shares['chosen']:.1%} of the tokens in place of {self.shares['uniform']:.1%} (loss: {costs}, "
            f"chosen {chosen}; n = {full.n} rows that the layers were not chosen on; the model as it is)."
        )

    def to_dict(self) -> dict:
        """Everything as plain JSON values."""
        whole = [{"lrsa": config, "loss": score.to_dict()} for config, score in self.whole]
        return {
            "uniform": self.uniform, "chosen": self.chosen, "full": self.full.to_dict(), "whole": whole,
            "alone": {layer: score.to_dict() for layer, score in self.alone.items()},
            "held_out": {name: score.to_dict() for name, score in self.held_out.items()}, "shares": self.shares,
        }  # fmt: skip


def choose_layers(
    model,
    rows: Sequence[dict],
    config: LRSAConfig,
    *,
    most: int = 6,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> LayerChoice:
    """Measure the loss with each layer compressed alone, and with the `most` worst kept whole, at no larger a cache.

    Args:
        model: a transformers causal LM or a PEFT model, in the state that shall be measured.
        rows: as `evaluate_loss` takes them; the first half is for the choice, the second half for its report.
        config: the settings to improve; layers in its `skip_layers` stay whole.
        most: layers kept whole at most.

    Raises:
        ValueError: when there are fewer than 4 rows, or none is long enough to be compressed.
    """
    lengths = [row.get("prompt_length", len(row["input_ids"])) for row in rows]
    if len(rows) < 4 or not any(config.compressed_windows(length) for length in lengths):
        raise ValueError(
            f"layers are chosen on at least 4 rows longer than {config.dense_length} tokens (sink_size + 2 * "
            f"lag_size), got {len(rows)} of up to {max(lengths, default=0)}: give longer rows, or lower lag_size."
        )
    half, layers = len(rows) // 2, compressed_layers(model, config)
    bar = Progress((1 + len(layers) + 1 + min(most, len(layers) - 1)) * half + 3 * (len(rows) - half), not progress)

    def loss(name: str, setting: LRSAConfig | None, on: Sequence[dict]) -> Score:
        bar.begin(name, "loss")
        with with_attention(model, setting):
            return evaluate_loss(model, on, batch_size=batch_size, seed=seed, progress=lambda _, x: bar.add(x))

    choice = rows[:half]
    full = loss("full cache", None, choice)
    alone = {}
    for layer in layers:
        others = [*config.skip_layers, *(other for other in layers if other != layer)]
        alone[layer] = loss(f"layer {layer} alone", config.replace(skip_layers=others), choice)
    worst = sorted(layers, key=lambda layer: -alone[layer].value)
    sets = [
        _of_equal_size(config, worst[:count], len(layers), lengths) for count in range(min(most, len(layers) - 1) + 1)
    ]
    whole = [(c, loss(f"layers {list(c.skip_layers)} whole", c, choice)) for c in sets if c is not None]
    chosen = min(whole, key=lambda pair: pair[1].value)[0]
    names = {"full": None, "uniform": config, "chosen": chosen}
    held_out = {name: loss(f"{name}, other rows", setting, rows[half:]) for name, setting in names.items()}
    shares = {name: kept_share(model, names[name], lengths) for name in ("uniform", "chosen")}
    return LayerChoice(config, chosen, full, alone, whole, held_out, shares)


def save_layers(choice: LayerChoice, directory: str | Path) -> Path:
    """Write `layers.json`, `layers.md` and `layers.png` into `directory` (made if missing)."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(choice.to_dict(), indent=1)
    (directory / f"{NAME}.json").write_text(text + "\n", encoding="utf-8")
    (directory / f"{NAME}.md").write_text(_markdown(choice), encoding="utf-8")
    losses = {layer: paired_difference(score, choice.full) for layer, score in choice.alone.items()}
    kept = {len(c.skip_layers): paired_difference(score, choice.full) for c, score in choice.whole}
    draw_layers(losses, kept, directory / PICTURE)
    return directory


def _of_equal_size(config: LRSAConfig, whole: list[int], layers: int, lengths: list[int]) -> LRSAConfig | None:
    """These layers whole, and of the others the largest `top_k` that holds no more tokens; None when there is none."""
    budget = layers * sum(map(config.kept_length, lengths))
    for top_k in range(config.top_k, 0, -1):
        found = config.replace(top_k=top_k, skip_layers=[*config.skip_layers, *whole])
        if len(whole) * sum(lengths) + (layers - len(whole)) * sum(map(found.kept_length, lengths)) <= budget:
            return found
    return None


def _markdown(choice: LayerChoice) -> str:
    alone = [["layer", "loss", "above the full cache"]]
    alone += [[str(k), str(s), str(paired_difference(s, choice.full))] for k, s in choice.alone.items()]
    whole = [["whole layers", "top_k", "loss", "above the full cache"]]
    whole += [
        [str(list(c.skip_layers)), f"{c.top_k} of {c.lag_size}", str(s), str(paired_difference(s, choice.full))]
        for c, s in choice.whole
    ]
    n = choice.full.n
    return f"""# Which layers to keep whole

{choice.summary()}

```yaml
lrsa:
  lag_size: {choice.chosen.lag_size}
  top_k: {choice.chosen.top_k}
  skip_layers: {list(choice.chosen.skip_layers)}
```

![Loss of each layer compressed alone, and of the worst kept whole]({PICTURE})

## The worst layers whole, the others cut so much more that the cache is no larger (n = {n})

{markdown_table(whole)}

## Each layer compressed alone (full cache: {choice.full}; n = {n})

{markdown_table(alone)}
"""
