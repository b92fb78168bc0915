"""The side of benchmarks/peers.py that runs kvpress, in an environment of its own: it pins an older transformers.

    python benchmarks/peers_kvpress.py --model DIR --rows rows.json --out peers.json

Needs torch and kvpress only. `answer` is what peers.py scores LRSA with as well.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

BLIND = ("SnapKV", "ExpectedAttention", "StreamingLLM", "TOVA", "Knorm", "LagKV", "KVzip")
SEEING = ("SnapKV", "TOVA")  # also with the question at the end of what is compressed


def answer(model, cache, start: int, ids: list[int], length: int, argument: str = "past_key_values") -> dict:
    """Teacher-forced answer of `length` tokens at the end of `ids`, which come behind `start` tokens in the cache.

    Returns:
        nats (mean over the answer's tokens), the share of them predicted right, and whether all are: then greedy
        generation gives the reference.
    """
    positions = torch.arange(start, start + len(ids))[None]
    logits = model(torch.tensor([ids]), position_ids=positions, **{argument: cache}).logits[0, -length - 1 : -1]
    labels = torch.tensor(ids[-length:])
    right = logits.argmax(-1) == labels
    nats = torch.nn.functional.cross_entropy(logits.float(), labels).item()
    return {"nats": nats, "tokens": right.float().mean().item(), "exact": float(right.all())}


def cache_bytes(cache) -> int:
    """Bytes of all keys and values."""
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


def compressed(model, press, ids: list[int]):
    """A cache of `ids` after the press, and the seconds it took."""
    from transformers import DynamicCache

    cache, begin = DynamicCache(), time.perf_counter()
    with press(model):
        model.model(input_ids=torch.tensor([ids]), past_key_values=cache)
    return cache, time.perf_counter() - begin


def measure(model, make_press: Callable, contexts: list[dict], ratio: str, seeing: bool) -> list[dict]:
    """One result per question, in order; `seeing` compresses context and question together."""
    results = []
    for context in contexts:
        ids, shared = context["ids"], None
        for question in context["questions"]:
            asked, said = question["ids"], question["answer"]
            # The last token of the prompt is read over the compressed cache: its logits begin the answer.
            read, rest = (ids + asked[:-1], asked[-1:]) if seeing else (ids, asked)
            if seeing or shared is None:
                kept = question["held"][ratio] - len(rest) if seeing else context["held"][ratio]
                shared = compressed(model, make_press(1 - (kept + 0.5) / len(read)), read)
            cache, seconds = copy.deepcopy(shared[0]), shared[1]
            bytes_ = cache_bytes(cache) + len(rest) * cache_bytes(cache) // cache.layers[0].keys.shape[2]
            result = answer(model, cache, len(read), rest + said, len(said))
            results.append(result | {"bytes": bytes_, "seconds": seconds})
    return results


@torch.no_grad()
def main() -> None:
    import kvpress
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--rows", required=True, type=Path, help="rows.json of peers.py")
    parser.add_argument("--out", required=True, type=Path, help="JSON file of the results")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    rows = json.loads(options.rows.read_text(encoding="utf-8"))
    methods = [(name, False) for name in BLIND] + [(name, True) for name in SEEING]
    results = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    for name, seeing in methods:
        for ratio in rows["ratios"]:
            key = f"{name}{', sees the question' if seeing else ''}|{ratio}"
            if key in results:
                continue

            def make_press(share: float, name=name):
                press = getattr(kvpress, f"{name}Press")(compression_ratio=share)
                if name == "LagKV":
                    press.n_sink, press.lag_size = rows["sink_size"], rows["lag_size"]
                return press

            try:
                results[key] = measure(model, make_press, rows["contexts"], ratio, seeing)
            except Exception as error:  # a method that does not run here is named in the table
                results[key] = f"{type(error).__name__}: {error}"
            options.out.write_text(json.dumps(results), encoding="utf-8")
            print(key, "failed" if isinstance(results[key], str) else "done", flush=True)


if __name__ == "__main__":
    main()
