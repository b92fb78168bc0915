"""LRSA against the methods of kvpress, at equal bytes of the cache: same weights, same questions, one table.

    python -m venv runs/kvpress && runs/kvpress/bin/pip install torch kvpress
    python benchmarks/peers.py --run runs/qa --data articles.json --peers runs/kvpress/bin/python --out runs/peers

The run has a dense LoRA beside it (`eval.control: true`), which is merged into its base for all methods that were not
trained; LRSA's own adapter stands below. Without `--run`, `--model` is any model, untuned. Every article of `--data`
(SQuAD's layout) gives one context of whole passages and its questions; train on other articles.

Budgets are bytes that are held once the prompt is read. LRSA sets them: it compresses prompt and question as they come
and does not know what is a question. The others compress the context, keep the question whole, and get as many tokens
as make the same bytes. "Sees the question" compresses both together, behind the question. "nats" is the loss of the
reference answer, "tokens" the share of its tokens predicted right, "exact" the share of questions with all of them
right, which greedy generation then answers so. Intervals: 95% bootstrap over articles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measure import machine
from benchmarks.peers_kvpress import answer
from lrsa import LRSACache, LRSAConfig, PromptFormat, apply_lrsa, remove_lrsa
from lrsa.cache import CACHE_ARGUMENT
from lrsa.evaluation.measure.controls import CONTROLS
from lrsa.serving.engine import row_bytes

FULL = "full cache"


def read_contexts(path: Path, tokenizer, prompt: PromptFormat, template: str, length: int, rows: int) -> list[dict]:
    """One context per article, of the passages that fit `length` tokens, with the questions on them; `rows` at most."""
    head, tail = template.split("{context}")
    gap = tail[: len(tail) - len(tail.lstrip())]

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    contexts, left = [], rows
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        text, questions = prompt.before + head, []
        for paragraph in article["paragraphs"]:
            if len(ids(text + paragraph["context"] + gap)) > length:
                break
            text += paragraph["context"] + gap
            questions += [(qa["question"], qa["answers"][0]["text"]) for qa in paragraph["qas"]]
        questions = questions[:left]
        if questions:
            asked = [
                {
                    "ids": ids(tail.lstrip().replace("{question}", question) + prompt.between),
                    "answer": ids(prompt.lead + said + prompt.after),
                }
                for question, said in questions
            ]
            contexts.append({"ids": ids(text), "questions": asked})
            left -= len(questions)
    return contexts


@torch.no_grad()
def measure(model, contexts: list[dict], config: LRSAConfig) -> list[dict]:
    """One result per question over an `LRSACache`; a config that keeps everything is the full cache."""
    apply_lrsa(model, config)
    results = []
    for context in contexts:
        shared, begin = LRSACache(config), time.perf_counter()
        model(torch.tensor([context["ids"]]), logits_to_keep=1, **{CACHE_ARGUMENT: shared})
        seconds = time.perf_counter() - begin
        for question in context["questions"]:
            cache, start = shared.rows([0]), len(context["ids"])
            prompt = question["ids"][:-1]
            model(
                torch.tensor([prompt]), position_ids=torch.arange(start, start + len(prompt))[None], logits_to_keep=1,
                **{CACHE_ARGUMENT: cache},
            )  # fmt: skip
            held = row_bytes(cache)[0][0]
            rest = [*question["ids"][-1:], *question["answer"]]
            result = answer(model, cache, start + len(prompt), rest, len(question["answer"]), CACHE_ARGUMENT)
            results.append(result | {"bytes": held + held // sum(cache.layers[0].held()), "seconds": seconds})
    remove_lrsa(model)
    return results


def budgets(contexts: list[dict], config: LRSAConfig, ratio: str) -> None:
    """Write into the rows how many tokens LRSA holds after each prompt, and what that leaves for the context alone."""
    for context in contexts:
        for question in context["questions"]:
            length = len(context["ids"]) + len(question["ids"])
            question.setdefault("held", {})[ratio] = config.kept_length(length)
        left = [question["held"][ratio] - len(question["ids"]) for question in context["questions"]]
        context.setdefault("held", {})[ratio] = round(statistics.mean(left))


def shared_out(config: LRSAConfig, ratio: float, layers: int) -> LRSAConfig | None:
    """The run's own layers with a full cache, and as much less of the others; None when nothing is left for them."""
    whole = len(config.skip_layers)
    top_k = int(config.lag_size * (ratio * layers - whole) / (layers - whole))
    return config.replace(top_k=top_k) if top_k else None


def interval(results: list[dict], field: str, contexts: list[dict]) -> str:
    """Mean over questions, and its bootstrap interval over articles."""
    ends = np.cumsum([len(context["questions"]) for context in contexts])
    groups = np.split(np.array([result[field] for result in results]), ends[:-1])
    rng = np.random.default_rng(0)
    draws = rng.integers(len(groups), size=(2000, len(groups)))
    sums, sizes = np.array([group.sum() for group in groups]), np.array([len(group) for group in groups])
    low, high = np.percentile(sums[draws].sum(1) / sizes[draws].sum(1), [2.5, 97.5])
    return f"{sums.sum() / sizes.sum():.3f} [{low:.3f}, {high:.3f}]"


def table(results: dict[str, list[dict] | str], contexts: list[dict]) -> str:
    head = "| budget | method | KiB after the prompt | nats | tokens | exact | s per context |\n"
    lines = [head + "| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    order = sorted(results, key=lambda key: (-float(key.partition("|")[2] or 1), not key.startswith("LRSA"), key))
    for key in order:
        (name, _, ratio), found = key.partition("|"), results[key]
        if isinstance(found, str):
            lines.append(f"| {ratio} | {name} | did not run: {found} | | | | |")
            continue
        cells = [interval(found, field, contexts) for field in ("nats", "tokens", "exact")]
        size, seconds = (statistics.mean(result[field] for result in found) for field in ("bytes", "seconds"))
        lines.append(f"| {ratio or 'full'} | {name} | {size / 1024:.0f} | {' | '.join(cells)} | {seconds:.2f} |")
    return "\n".join(lines) + "\n"


def draw(results: dict[str, list[dict] | str], path: Path) -> None:
    """Score against bytes, one line per method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    lines: dict[str, list[tuple[float, list[dict]]]] = {}
    for key, found in results.items():
        if not isinstance(found, str):
            lines.setdefault(key.partition("|")[0], []).append((statistics.mean(r["bytes"] for r in found), found))
    for axes, field in zip(figure.subplots(1, 2), ("nats", "tokens"), strict=True):
        for number, (name, points) in enumerate(sorted(lines.items())):
            x, y = zip(*sorted((size / 1024, statistics.mean(r[field] for r in f)) for size, f in points), strict=True)
            bold = name.startswith("LRSA")
            style = {"linewidth": 2.4 if bold else 1.2, "linestyle": ":" if "sees" in name else "-"}
            axes.plot(x, y, marker="osD^vPX*"[number % 8], color=f"C{number % 10}", label=name, **style)
        axes.set(xscale="log", xlabel="KiB of the cache after the prompt", ylabel=field)
        axes.grid(color="#e4e4e4")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="directory of a finished run with its dense control")
    source.add_argument("--model", help="any model, untuned")
    parser.add_argument("--data", type=Path, required=True, help="articles in SQuAD's layout, not those of training")
    parser.add_argument("--peers", required=True, help="Python of an environment with kvpress")
    parser.add_argument("--out", type=Path, required=True, help="folder for peers.json, peers.md, peers.png")
    parser.add_argument("--context-length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=200, help="questions")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    parser.add_argument("--setting", default="16:64", help="sink_size:lag_size; with --run, those of the run")
    return parser.parse_args()


def setup(options: argparse.Namespace) -> tuple[str, LRSAConfig, str, PreTrainedTokenizerBase, PromptFormat]:
    """The base model's name, the compression, the prompt's template, the tokenizer and the prompt format."""
    if options.run:
        from train.settings.load import load_settings

        settings = load_settings(str(options.run / "config.yaml"), ["train.deepspeed=null"])
        tokenizer, prompt = AutoTokenizer.from_pretrained(options.run), PromptFormat.from_pretrained(options.run)
        return settings.model.name_or_path, settings.lrsa, settings.data.prompt_template, tokenizer, prompt
    from data.settings import DataSettings

    sink, lag = map(int, options.setting.split(":"))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    template = DataSettings.model_fields["prompt_template"].default
    return options.model, LRSAConfig(sink, lag, lag // 4), template, tokenizer, PromptFormat.of(tokenizer)


def load(name: str, adapter: Path | None) -> PreTrainedModel:
    """The base model, with an adapter merged into it where one is given."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    if adapter is None:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    name, config, template, tokenizer, prompt = setup(options)
    contexts = read_contexts(options.data, tokenizer, prompt, template, options.context_length, options.rows)
    even = config.replace(skip_layers=())
    configs = {f"{ratio:g}": even.replace(top_k=max(1, round(ratio * config.lag_size))) for ratio in options.ratios}
    for ratio, compressed in configs.items():
        budgets(contexts, compressed, ratio)
    rows = {"ratios": list(configs), "sink_size": config.sink_size, "lag_size": config.lag_size, "contexts": contexts}
    (options.out / "rows.json").write_text(json.dumps(rows), encoding="utf-8")

    dense = load(name, options.run and options.run / "control")
    layers = dense.config.num_hidden_layers
    dense.save_pretrained(options.out / "dense")
    tokenizer.save_pretrained(options.out / "dense")  # KVzip reads the chat template
    results = {FULL: measure(dense, contexts, config.full())}
    for ratio, compressed in configs.items():
        results[f"LRSA, untrained|{ratio}"] = measure(dense, contexts, compressed)
        results[f"random|{ratio}"] = measure(dense, contexts, CONTROLS["random"](**compressed))
        own = shared_out(config, float(ratio), layers)
        if config.skip_layers and own is not None:
            results[f"LRSA, untrained, the run's skip_layers|{ratio}"] = measure(dense, contexts, own)
    if options.run:
        tuned = load(name, options.run)
        results[f"{FULL}, LRSA's adapter"] = measure(tuned, contexts, config.full())
        for ratio in configs:
            if (own := shared_out(config, float(ratio), layers)) is not None:
                results[f"LRSA, trained|{ratio}"] = measure(tuned, contexts, own)
    print(table(results, contexts), flush=True)

    peers = options.out / "kvpress.json"
    command = [options.peers, str(Path(__file__).with_name("peers_kvpress.py")), "--model", str(options.out / "dense")]
    subprocess.run([*command, "--rows", str(options.out / "rows.json"), "--out", str(peers)], check=True)
    results |= json.loads(peers.read_text(encoding="utf-8"))
    (options.out / "peers.json").write_text(json.dumps(results), encoding="utf-8")
    n = sum(len(context["questions"]) for context in contexts)
    text = f"{machine('cpu')}, torch {torch.__version__}, {Path(name).name}, n = {n}, {len(contexts)} articles"
    (options.out / "peers.md").write_text(f"{text}\n\n{table(results, contexts)}", encoding="utf-8")
    draw(results, options.out / "peers.png")
    print(f"{text}\n\n{table(results, contexts)}\nwrote {options.out}/peers.md, peers.json, peers.png")


if __name__ == "__main__":
    main()
