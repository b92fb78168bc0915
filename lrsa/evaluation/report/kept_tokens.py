"""Which tokens of a text every KV head still holds at its end: as numbers, as a picture, as a page of shaded text."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import DynamicCache

from lrsa.attention.sliding import held
from lrsa.cache import CACHE_ARGUMENT
from lrsa.config import LRSAConfig
from lrsa.evaluation.extra import extra
from lrsa.evaluation.measure.state import active_config, causal_lm, in_eval_mode
from lrsa.hf import has_latents, sliding_windows
from lrsa.hf.layers import attends
from lrsa.latent import scored
from lrsa.selection import select_tokens

# Dropped, kept by its score, kept because it is in the sink or in the last windows.
COLOURS = ("#f4f4f4", "#0072B2", "#b9b9b9")
NAMES = ("dropped", "kept by its score", "always kept: sink and last windows")
LINE = 112  # letters of a line of shaded text in the picture


class Passage(NamedTuple):
    """A text as the model reads it: its token ids, and the letters that belong to each."""

    ids: list[int]
    pieces: list[str]


def read_passage(tokenizer, text: str, most_tokens: int) -> Passage:
    """The first `most_tokens` tokens of a text, BOS in front where the tokenizer has one.

    Args:
        tokenizer: a fast tokenizer, because it tells which letters a token stands for.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, pieces, done = [], [], 0
    if tokenizer.bos_token_id is not None:
        ids, pieces = [tokenizer.bos_token_id], [tokenizer.bos_token]
    for token, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        ids.append(token)
        pieces.append(text[done:end])  # the bytes of one letter share its place: the first of them gets it
        done = max(done, end)
    return Passage(ids[:most_tokens], pieces[:most_tokens])


def kept_tokens(model, input_ids: Sequence[int]) -> torch.Tensor:
    """What an `LRSACache` holds after one row, token by token.

    Args:
        model: under `apply_lrsa`; keys and values come from its own forward, in which the far past is compressed too.
        input_ids: the row.

    Returns:
        bool `[layers, KV heads, tokens]`, true where that head of that layer still holds the token: at the end of its
        sliding window, in a layer that has one. The layers are `holding_layers(model)`. One head where all share their
        latents; a layer with fewer heads than another repeats them.

    Raises:
        ValueError: when the model's attention is dense, so that there are no settings.
    """
    lm, config = causal_lm(model), active_config(model)
    if config is None:
        raise ValueError("the model's attention is dense, so every token is kept: call lrsa.apply_lrsa(model, config).")
    cache = DynamicCache(config=lm.config)
    with in_eval_mode(model):
        ids = torch.tensor([list(input_ids)], device=lm.device)
        lm.base_model(input_ids=ids, **{CACHE_ARGUMENT: cache})
    score_by = scored if has_latents(lm) else lambda *states: states
    windows, position = sliding_windows(lm.config), torch.arange(len(input_ids))
    rows = [
        (position >= len(input_ids) - held(len(input_ids), windows[index])).expand(layer.keys.shape[1], -1)
        if windows[index]
        else _held(*score_by(layer.keys, layer.values), config.for_layer(index))
        for index, layer in ((index, cache.layers[index]) for index in holding_layers(model))
    ]
    heads = max(map(len, rows))
    return torch.stack([row.repeat_interleave(heads // len(row), 0) for row in rows])


def holding_layers(model) -> list[int]:
    """Indices of the layers that hold keys of their own: not recurrent ones, nor those that share another's."""
    text = causal_lm(model).config.get_text_config()
    own = text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", None) or 0)
    return [layer for layer in range(own) if attends(text, layer)]


def _held(keys: torch.Tensor, values: torch.Tensor, config: LRSAConfig) -> torch.Tensor:
    position = torch.arange(keys.shape[2])
    always = (position < config.sink_size) | (position >= near(keys.shape[2], config))
    index = select_tokens(keys, values, config).index.flatten(2)[0].cpu()
    return always.repeat(keys.shape[1], 1).scatter_(1, index, True)


def near(tokens: int, config: LRSAConfig) -> int:
    """Position of the first token of the windows that are still whole, in a row of so many tokens."""
    return config.sink_size + config.compressed_windows(tokens) * config.lag_size


def draw_kept_tokens(
    kept: torch.Tensor, pieces: Sequence[str], config: LRSAConfig, path: str | Path, names: Sequence[int] | None = None
) -> None:
    """Write a picture: tokens against layers and their KV heads, and below it the text, shaded by how many keep it.

    Args:
        names: indices of the layers, from `holding_layers`; without it they are numbered from 0.
    """
    colors, patches = extra("matplotlib.colors"), extra("matplotlib.patches")
    layers, heads, tokens = kept.shape
    lines = _lines(pieces)
    grid_height, text_height = 1 + 0.075 * layers * heads, 0.19 * len(lines)
    figure = extra("matplotlib.figure").Figure(figsize=(11, grid_height + text_height + 1), layout="constrained")
    grid, page = figure.subplots(2, 1, height_ratios=(grid_height, text_height))
    colours = kept.flatten(0, 1).int()
    position = torch.arange(tokens)
    colours[:, (position < config.sink_size) | (position >= near(tokens, config))] = 2
    grid.imshow(
        colours.numpy(), aspect="auto", interpolation="nearest", cmap=colors.ListedColormap(COLOURS), vmin=0, vmax=2
    )
    for border in range(heads, layers * heads, heads):
        grid.axhline(border - 0.5, color="black", linewidth=0.8)
    for border in range(config.sink_size, tokens, config.lag_size):
        grid.axvline(border - 0.5, color="#D55E00", linewidth=0.5)
    middles = [layer * heads + (heads - 1) / 2 for layer in range(layers)]
    grid.set_yticks(middles, [f"layer {name}" for name in names or range(layers)])
    grid.set(xlabel="token; windows are divided by thin lines", ylabel=f"{heads} KV heads each")
    figure.legend(
        handles=[patches.Patch(facecolor=c, edgecolor="#999999", label=n) for c, n in zip(COLOURS, NAMES, strict=True)],
        loc="outside upper center", ncols=3, frameon=False,
    )  # fmt: skip
    page.set(xlim=(0, LINE), ylim=(len(lines), 0))
    page.axis("off")
    page.set_title(f"the bluer, the more of the {layers * heads} heads keep the token", loc="left", fontsize=10)
    shades = _shades(kept, config)
    for row, line in enumerate(lines):
        for column, token, letters in line:
            box = patches.Rectangle((column, row), len(letters), 1, facecolor=shades[token], linewidth=0)
            page.add_patch(box)
            page.text(column, row + 0.76, letters, family="monospace", fontsize=10.4, parse_math=False)
    figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})


def _lines(pieces: Sequence[str]) -> list[list[tuple[int, int, str]]]:
    """Lines of `(column, token, letters)`, broken where the text breaks, and at a blank near the end of a full line."""
    lines, column = [[]], 0
    for token, piece in enumerate(pieces):
        for number, letters in enumerate(piece.split("\n")):
            ends = LINE - 10 if letters.startswith(" ") else LINE
            if number or column + len(letters) > ends:
                lines.append([])
                column = 0
            if letters:
                lines[-1].append((column, token, letters))
                column += len(letters)
    return [line for line in lines if line]


def _shades(kept: torch.Tensor, config: LRSAConfig) -> list[str]:
    """A colour for every token: grey where it is always kept, else the bluer the more heads keep it."""
    tokens = kept.shape[-1]
    found = []
    for position, share in enumerate(kept.flatten(0, 1).float().mean(0).tolist()):
        if position < config.sink_size or position >= near(tokens, config):
            found.append(COLOURS[2])
        else:
            white, blue = (255, 255, 255), (0, 114, 178)
            mixed = (round(w + (b - w) * 0.85 * share) for w, b in zip(white, blue, strict=True))
            found.append("#" + "".join(f"{part:02x}" for part in mixed))
    return found


def write_page(kept: torch.Tensor, pieces: Sequence[str], config: LRSAConfig, path: str | Path) -> None:
    """Write one HTML file that needs nothing else: the text, shaded; hovering tells how many heads keep a token."""
    counts, all_heads = kept.flatten(0, 1).sum(0).tolist(), kept.shape[0] * kept.shape[1]
    spans = [
        f'<span style="background:{shade}" title="token {token}: kept by {count} of {all_heads}">'
        f"{html.escape(piece)}</span>"
        for token, (piece, count, shade) in enumerate(zip(pieces, counts, _shades(kept, config), strict=True))
    ]
    page = (
        '<!doctype html><meta charset="utf-8"><title>Kept tokens</title>\n'
        "<style>body{max-width:60em;margin:2em auto;font:17px/1.6 monospace}p{white-space:pre-wrap}</style>\n"
        f"<p>{describe(kept, config)} The bluer a token, the more of the {all_heads} KV heads of all layers keep it; "
        "grey: sink and last windows, kept by all.</p>\n"
        f"<p>{''.join(spans)}</p>\n"
    )
    Path(path).write_text(page, encoding="utf-8")


def describe(kept: torch.Tensor, config: LRSAConfig) -> str:
    """Tokens, settings, and what the choice of the heads has in common, in one sentence each."""
    tokens = kept.shape[-1]
    chosen = kept.flatten(0, 1)[:, config.sink_size : near(tokens, config)].float().mean(0)
    text = (
        f"{tokens} tokens, sink {config.sink_size}, lag {config.lag_size}, top_k {config.top_k}: "
        f"{kept.float().mean():.1%} of the cache is held."
    )
    if not len(chosen):
        return f"{text} The row is too short to be compressed."
    return f"{text} Of the {len(chosen)} tokens that compete, {(chosen == 0).float().mean():.1%} are kept by no head."
