"""Ways of giving tokens to a model that must all come to the same: in chunks over a cache, and padded in a batch."""

import torch

from lrsa import LRSACache
from lrsa.cache import CACHE_ARGUMENT


def over_cache(model, ids, chunks, config, mask=None, **cache_options):
    """Logits of `ids`, fed chunk by chunk over a new cache; and that cache."""
    cache, logits, start = LRSACache(config, **cache_options), [], 0
    for size in chunks:
        stop = min(start + size, ids.shape[1])
        if start == stop:
            break
        options = {}
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            options = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        with torch.no_grad():
            logits.append(model(ids[:, start:stop], **{CACHE_ARGUMENT: cache}, use_cache=True, **options).logits)
        start = stop
    return torch.cat(logits, 1), cache


def padded(rows, side="left"):
    """Ids and mask of a batch of rows of different lengths."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for row, tokens in enumerate(rows):
        part = slice(longest - len(tokens), longest) if side == "left" else slice(0, len(tokens))
        ids[row, part], mask[row, part] = tokens, 1
    return ids, mask


def close(found, expected, atol=1e-10):
    """fp64 through three to five layers; logits are of size 1 to 30."""
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)
