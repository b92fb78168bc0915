"""The folder that is published of a run: checked first, then written without local paths."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from lrsa import LRSAConfig, PromptFormat
from lrsa.base_loading import BASE_NAME, BaseLoading
from lrsa.evaluation import Results
from lrsa.prompt import PROMPT_NAME
from train.adapter import ADAPTER_NAME, AdapterError, verify_adapter
from train.publish.model_card import CARD_NAME, hub_id, model_card
from train.publish.redaction import Redaction, remaining_paths
from train.resume.run_directory import CONFIG_NAME, PUBLISHED_NAME, config_of_run
from train.settings.errors import Problem, SettingsError
from train.settings.load import RunSettings, load_settings
from train.settings.sources import parse

# Of a run's directory, beside config.yaml and the card; the tokenizer under all the names that transformers gives it.
FILES = (
    *(ADAPTER_NAME, "adapter_config.json", "lrsa_config.json", PROMPT_NAME, BASE_NAME),
    *("results.json", "report.md", "data_report.md", "*.png"),
    *("evaluation/*/results.json", "evaluation/*/report.md", "evaluation/*/*.png"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja", "vocab.*", "merges.txt", "*.model"),
)
BINARY = (".safetensors", ".png", ".model")
CUSTOM_GENERATE = Path(__file__).parent / "custom_generate" / "generate.py"


@dataclass(frozen=True)
class Publication:
    """A run that can be published, and where; `settings.model.name_or_path` is a Hub id."""

    run: Path
    repo_id: str
    settings: RunSettings
    lrsa: LRSAConfig
    prompt: PromptFormat

    @property
    def base_model(self) -> str:
        return self.settings.model.name_or_path


def read_run(run: Path, repo_id: str, base_model: str | None, problems: list[Problem]) -> Publication:
    """Read a run's directory and refuse one whose adapter others could not use or judge.

    Args:
        run: directory of a finished run.
        repo_id: where it will be published.
        base_model: the base model's Hub id, where the run loaded it from a local directory.
        problems: of earlier checks; raised together with those of this one.

    Raises:
        SettingsError: with every problem at once.
    """
    parts, problems = {}, list(problems)
    readers = {
        "settings": lambda: _settings(run, base_model),
        "adapter": lambda: verify_adapter(run),
        "lrsa": lambda: LRSAConfig.from_pretrained(run),
        "prompt": lambda: _prompt(run),
        "results": lambda: _results(run),
    }
    for name, read in readers.items():
        try:
            parts[name] = read()
        except SettingsError as error:
            problems += error.problems
        except (AdapterError, ValueError) as error:
            problems.append(Problem("", "", str(error)))
    if problems:
        raise SettingsError(problems)
    return Publication(run, repo_id, parts["settings"], parts["lrsa"], parts["prompt"])


def write_folder(publication: Publication, license: str | None = None) -> Path:
    """Write what is published into the run's `hub/`, replacing an earlier one, and return that folder.

    Raises:
        SettingsError: when a text would contain a local path.
    """
    run, folder = publication.run, publication.run / PUBLISHED_NAME
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    values = parse((run / CONFIG_NAME).read_text(encoding="utf-8")).values
    redaction = Redaction(values, publication.base_model, run)
    texts = {CONFIG_NAME: redaction.config()}
    for path in [path for pattern in FILES for path in sorted(run.glob(pattern)) if path.is_file()]:
        if path.suffix in BINARY:
            (folder / path.relative_to(run)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / path.relative_to(run))
        else:
            texts[str(path.relative_to(run))] = redaction.text(path.read_text(encoding="utf-8"))
    adapter_config = json.loads(texts["adapter_config.json"]) | {"base_model_name_or_path": publication.base_model}
    texts["adapter_config.json"] = json.dumps(adapter_config, indent=2, sort_keys=True) + "\n"
    card = model_card(publication.settings, run, repo_id=publication.repo_id, license=license)
    texts[CARD_NAME] = str(card)
    if publication.settings.model.loading == BaseLoading():  # else transformers' own loading would give another model
        texts |= _custom_generate(publication.lrsa, publication.prompt)
    problems = [problem for name, text in texts.items() for problem in remaining_paths(name, text, run)]
    if problems:
        raise SettingsError(problems)
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def _settings(run: Path, base_model: str | None) -> RunSettings:
    # Files that only training needs may be missing on this machine.
    overrides = ["train.deepspeed=null", "model.chat_template=null"]
    overrides += [f"model.name_or_path={base_model}"] if base_model else []
    settings = load_settings(config_of_run(str(run)), overrides)
    if hub_id(settings.model.name_or_path) is None:
        text = (
            f"is the local directory {settings.model.name_or_path}, which others cannot load: give the model's name "
            "on the Hub with --base-model ORG/NAME"
        )
        raise SettingsError([Problem("", "model.name_or_path", text)])
    return settings


def _prompt(run: Path) -> PromptFormat:
    prompt = PromptFormat.from_pretrained(run)
    if prompt is None:
        raise ValueError(f"{run} holds no {PROMPT_NAME}: launch/evaluate.py --run {run} writes it")
    return prompt


def _results(run: Path) -> Results:
    try:
        return Results.load(run)
    except ValueError as error:
        raise ValueError(f"{error}: measure the adapter with launch/evaluate.py --run {run}") from error


def _custom_generate(config: LRSAConfig, prompt: PromptFormat) -> dict[str, str]:
    """`custom_generate/` as transformers loads it, with the settings of the adapter."""
    settings = f"# lrsa_config.json of this repository, as it was published.\nSETTINGS = {config.to_dict()}\n"
    settings += f"# Where training ended answers.\nEND = {prompt.end}\n"
    source = CUSTOM_GENERATE.read_text(encoding="utf-8")
    return {"custom_generate/generate.py": source, "custom_generate/settings.py": settings}
