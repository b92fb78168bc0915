"""The model card of a run: what the adapter is, how it is used, what was measured, and how it was trained."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData

import lrsa
from data import DataSettings
from lrsa.base_loading import BaseLoading
from lrsa.evaluation import Results
from lrsa.evaluation.report.pictures import TRAINING_PICTURE
from lrsa.evaluation.report.tables import TITLES, TRAINING, measurements, setting_name
from train.resume.run_directory import results_folders
from train.settings.load import RunSettings

CARD_NAME = "README.md"
TAGS = ["lrsa", "kv-cache", "kv-cache-compression", "sparse-attention", "long-context", "lora", "custom_generate"]

ABOUT = """\
A LoRA adapter of {base}, trained under [Lag-Relative Sparse Attention](https://arxiv.org/abs/2506.11498) to work with a
compressed KV cache: of a long context, every KV head keeps the first {sink_size} tokens, {top_k} of each older window
of {lag_size} tokens ({keep_ratio:.1%}), and the last one to two windows completely.{dense}"""

USE = """\
`pip install lrsa peft`, then:

```python
import lrsa

model, tokenizer, new_cache = lrsa.load({source})
prompt = {prompt}
inputs = lrsa.PromptFormat.from_pretrained({source}).encode(tokenizer, prompt).to(model.device)
output = model.generate(**inputs, past_key_values=new_cache(), max_new_tokens=100)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""

CUSTOM_GENERATE = """\
Or with transformers' own loading, `generate` then taking its decoding from this repository (`custom_generate/`, which
needs `lrsa` too):

```python
import lrsa
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({source})
tokenizer = AutoTokenizer.from_pretrained({source})
prompt = {prompt}
inputs = lrsa.PromptFormat.from_pretrained({source}).encode(tokenizer, prompt).to(model.device)
output = model.generate(**inputs, custom_generate={source}, trust_remote_code=True, max_new_tokens=100)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

For the length of the call the model runs with the settings of this adapter. Arguments and result are those of
`generate`; a `past_key_values` of your own must be an `lrsa.LRSACache`."""

MEASURED = {
    "qa": "F1 and exact match of greedy answers to held-out questions.",
    "retrieval": "The share of a hidden code's symbols that a greedy answer repeats in place, on held-out rows.",
    "chat": "The loss on the answers of held-out chats; F1 and exact match of greedy last answers that are short.",
    "loss": "The loss on held-out text.",
}

NOT_MEASURED = (
    "This adapter was not evaluated: `eval.enabled` was false, or no rows were held out. Its quality is not known."
)


def model_card(
    settings: RunSettings,
    directory: Path,
    *,
    repo_id: str | None = None,
    license: str | None = None,
) -> ModelCard:
    """The card of a run, with metadata as the Hub reads it.

    Args:
        settings: of the run; `model.name_or_path` is the card's base model where it is a Hub id.
        directory: of the run, with the results of its evaluation; where there are none the card says so.
        repo_id: where the card is published; without it the card is that of the directory.
        license: the Hub's identifier of a licence; left out when not given, because a run does not know it.
    """
    name = (repo_id or directory.resolve().name).split("/")[-1]
    results = {
        name: Results.load(folder)
        for name, folder in results_folders(settings, directory).items()
        if (folder / "results.json").is_file()
    }
    hub_data = [path for one in settings.data.each().values() for path in _listed(one.path) if hub_id(path)]
    data = ModelCardData(
        base_model=hub_id(settings.model.name_or_path),
        datasets=hub_data or None,
        library_name="peft",
        pipeline_tag="text-generation",
        license=license,
        tags=TAGS,
        model_name=name,
        eval_results=[
            entry for name, found in results.items() for entry in eval_results(settings.data.each()[name], found)
        ]
        or None,
    )
    sample = _sample(settings, repo_id or str(directory))
    sections = [
        f"# {name}",
        _about(settings),
        f"## Use\n\n{USE.format(**sample)}",
        *([CUSTOM_GENERATE.format(**sample)] if repo_id and settings.model.loading == BaseLoading() else []),
        f"## Evaluation\n\n{_evaluation(settings, directory, results)}",
        f"## Training\n\n{_training(settings)}",
        *([TRAINING] if (directory / TRAINING_PICTURE).is_file() else []),
    ]
    text = "\n\n".join(sections)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def save_model_card(settings: RunSettings, directory: Path) -> None:
    """Write the run's card as README.md into its directory, where TRL and PEFT have left drafts of their own."""
    model_card(settings, directory).save(directory / CARD_NAME)


def hub_id(name: str | list[str] | None) -> str | None:
    """The name when others can load it from the Hub; None for local paths, which are absolute, and lists."""
    return None if not isinstance(name, str) or Path(name).is_absolute() else name


def _listed(path: str | list[str] | None) -> list[str]:
    return [] if path is None else [path] if isinstance(path, str) else path


def eval_results(data: DataSettings, results: Results) -> list[EvalResult]:
    """Every score of the adapter on one source of data, an entry for each metric and cache, for the `model-index`."""
    evaluated = data.eval_path or data.path
    on_hub = {"dataset_config": data.name, "dataset_split": data.eval_split or data.split} if hub_id(evaluated) else {}
    scores = [
        (metric, setting, results.score(results.models[-1], setting.name, metric))
        for metric in results.metrics
        for setting in results.settings
    ]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=hub_id(evaluated) or ("generated" if data.kind == "synthetic" else "local"),
            dataset_name=f"{_data_name(data, evaluated)}, held-out rows",
            metric_type=metric,
            metric_value=round(score.value, 6),
            metric_name=f"{TITLES[metric].partition(' (')[0]}, {setting_name(results, setting)}",
            metric_args={"n": score.n, "low": round(score.low, 6), "high": round(score.high, 6)},
            **on_hub,
        )
        for metric, setting, score in scores
    ]


def _data_name(data: DataSettings, path: str | list[str] | None) -> str:
    """What was generated, or for each path a data set's name on the Hub, or the last name of a local path."""
    subset = f" ({data.name})" if data.name else ""
    if path is None:
        return f"generated {data.synthetic.task} rows"
    return ", ".join(f"{one}{subset}" if hub_id(one) else f"local data {Path(one).name}" for one in _listed(path))


def _about(settings: RunSettings) -> str:
    base, config = settings.model.name_or_path, settings.lrsa
    linked = f"[{base}](https://huggingface.co/{base})" if hub_id(base) else f"a local model, `{Path(base).name}`"
    layers = ", ".join(map(str, config.skip_layers))
    dense = f" Layers with a full cache: {layers}." if layers else ""
    return ABOUT.format(base=linked, keep_ratio=config.keep_ratio, dense=dense, **config)


def _sample(settings: RunSettings, source: str) -> dict[str, str]:
    """Source and prompt of the code samples; with the prompt format of the training rows."""
    prompt, sources = "Once upon a time", list(settings.data.each().values())
    data = next((one for one in sources if one.kind != "text"), sources[0])
    if data.kind == "qa":
        prompt = data.prompt_template.replace("{context}", "The river was found by Anna.\n\nBen stayed at home.")
        prompt = prompt.replace("{question}", "Who found the river?")
    elif data.kind == "chat":
        prompt = "The river was found by Anna. Ben stayed at home. Who found the river?"
    elif data.kind == "synthetic":
        prompt = "code amber 4 8 2 . again air all along code amber"
    source, prompt = (json.dumps(text, ensure_ascii=False) for text in (source, prompt))
    return {"source": source, "prompt": prompt}


def _evaluation(settings: RunSettings, directory: Path, results: dict[str, Results]) -> str:
    """What was measured on every source, each with its pictures where they lie."""
    parts, folders = [], results_folders(settings, directory)
    for name, found in results.items():
        place = quote(folders[name].relative_to(directory).as_posix())
        text = f"{MEASURED[found.task]}\n\n{measurements(found)}".replace("\n## ", f"\n###{'#' * (len(results) > 1)} ")
        text = text if place == "." else text.replace("](", f"]({place}/")
        parts.append(f"### {name}\n\n{text}" if len(results) > 1 else text)
    return "\n\n".join(parts) or NOT_MEASURED


def _training(settings: RunSettings) -> str:
    """The most important settings."""
    train, data = settings.train, settings.data
    objective, lora = settings.objective.model_dump(), settings.lora.model_dump(exclude_defaults=True)
    lora = {"r": settings.lora.r, "lora_alpha": settings.lora.lora_alpha} | lora
    rope = settings.model.rope_scaling
    scaled = f", positions times {rope.factor:g} ({rope.rope_type})" if rope else ""
    if settings.lora.init_from:
        lora["init_from"] = hub_id(settings.lora.init_from) or "a local adapter"
    length = f"{train.max_steps} steps" if train.max_steps > 0 else f"{train.num_train_epochs:g} epochs"
    rows = {
        "data": "; ".join(f"{_data_name(one, one.path)}, {one.kind}" for one in data.each().values())
        + f"; rows of up to {data.context_length} tokens",
        "LRSA": ", ".join(f"{name} {value}" for name, value in settings.lrsa.items()),
        "LoRA": ", ".join(f"{name} {value}" for name, value in lora.items()),
        "objective": ", ".join(f"{name} {value}" for name, value in objective.items() if value is not None),
        "length": f"{train.max_minutes:g} minutes, at most {length}" if train.max_minutes else length,
        "batch": f"{train.per_device_train_batch_size} rows per device x "
        f"{train.gradient_accumulation_steps} accumulated",
        "learning rate": f"{train.learning_rate:g}",
        "base weights": settings.model.weights + scaled,
        "seed": train.seed,
        "lrsa": lrsa.__version__,
    }
    table = "\n".join(["| setting | value |", "| --- | --- |", *(f"| {name} | {rows[name]} |" for name in rows)])
    return f"{table}\n\n`config.yaml` holds every setting; `launch/train.py --config config.yaml` repeats the run."
