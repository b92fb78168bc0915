"""One run from settings to report, top to bottom: data, model, LRSA, LoRA, training, adapter, evaluation."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pyarrow.compute
import torch
from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

import data
from lrsa import LRSAConfig, apply_lrsa, remove_lrsa
from train.adapter import lora_config, module_problems, start_from, verify_adapter
from train.banner import plan_of, print_banner
from train.distributed import environment
from train.distributed.requirements import check_sequence_parallel
from train.distributed.ulysses import (
    SequenceParallelTrainer,
    parallelism_config,
    separate_rows,
    share_rows,
)
from train.estimate.report import out_of_memory
from train.evaluation import evaluate_run, load_variants, save_training_losses
from train.failures import is_out_of_memory
from train.model import check_weights, is_packed, load_model, load_tokenizer, packing_problems, token_problems
from train.objective import objective_problems
from train.preflight import check_trainer
from train.publish.model_card import save_model_card
from train.resume.checkpoints import STATE, is_finished, newest_checkpoint, replace_text
from train.resume.run_directory import (
    CONFIG_NAME,
    changed_rows,
    check_run_directory,
    clear_run_directory,
    discard_results,
    lock_run_directory,
)
from train.settings.defaults import with_defaults
from train.settings.errors import Problem, SettingsError
from train.settings.load import RunSettings
from train.suite import run_suite
from train.trainer import LRSATrainer


def run(settings: RunSettings, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Train an adapter as the settings say, evaluate it and return the run's directory.

    Args:
        settings: from `load_settings`.
        resume: continue from the newest complete checkpoint in the directory, or start when there is none; adapters
            that are finished are not trained again. `train.resume_from_checkpoint: auto` means the same.
        overwrite: delete an earlier run's results in the directory first.

    Raises:
        SettingsError, data.DataError, AdapterError: with a message for the person who started the run.
        RunStopped, RunFailed: as `ResumableTrainer.train`.
    """
    settings = with_defaults(settings)
    directory = Path(settings.train.output_dir)
    resume = not overwrite and (resume or settings.train.resume_from_checkpoint == "auto")
    notes = check_run_directory(settings, resume, overwrite)
    environment.start(settings.train)
    check_sequence_parallel(settings)
    main = environment.rank() == 0
    console = Console(quiet=not main)
    for note in notes:
        console.print(f"warning: {note}", style="bold yellow", soft_wrap=True)
    check_weights(settings.model)  # before SFTConfig, which makes every model one of ZeRO-3
    args = sft_config(settings, directory)
    check_trainer(args, settings.model.quantization)

    tokenizer = load_tokenizer(settings.model)
    corpus = data.load(settings.data, tokenizer, args.seed, settings.lrsa.dense_length)
    if resume and (changed := changed_rows(directory, corpus.report)):
        text = f"{changed}. Put that back, start afresh with --overwrite, or choose another train.output_dir"
        raise SettingsError([Problem("", "data", text)])
    if main:
        directory.mkdir(parents=True, exist_ok=True)
    with lock_run_directory(directory) if main else nullcontext():
        if main:
            if overwrite:
                clear_run_directory(directory)
            replace_text(directory / CONFIG_NAME, settings.to_yaml(directory))
            corpus.report.save(directory)
            corpus.report.print(console)
        _train_and_evaluate(settings, args, corpus, tokenizer, console, resume)
    return directory


def _train_and_evaluate(
    settings: RunSettings,
    args: SFTConfig,
    corpus: data.Corpus,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
    resume: bool,
) -> None:
    directory, main = Path(settings.train.output_dir), environment.rank() == 0
    steps = train_adapter(settings, args, corpus, tokenizer, settings.lrsa, console, resume)
    if settings.eval.control:
        control = settings
        if settings.train.max_minutes:
            by_steps = settings.train.model_copy(update={"max_minutes": None, "max_steps": steps})
            control = replace(settings, train=by_steps)
        control_args = sft_config(control, directory / "control")
        train_adapter(control, control_args, corpus, tokenizer, None, console, resume)

    environment.stop()
    if not main:
        return
    corpus.prompt.save_pretrained(directory)
    save_training_losses(directory, directory)  # also where nothing is evaluated: the model card shows them
    if settings.eval.enabled:
        evaluate_run(settings, directory, tokenizer, corpus.evaluation, console)
    save_model_card(settings, directory)
    if settings.eval.enabled and settings.eval.suite:
        run_suite(settings, *load_variants(settings, directory), tokenizer, corpus, console, directory)


def sft_config(settings: RunSettings, output_dir: Path) -> SFTConfig:
    """TRL's own configuration from the `train` section.

    Raises:
        SettingsError: with what TRL or transformers object to.
    """
    values = {"max_length": settings.data.context_length} | settings.train.given()
    values |= {"output_dir": str(output_dir), "completion_only_loss": True}
    for name in ("max_minutes", "early_stopping_patience"):  # what SFTConfig does not have
        values.pop(name, None)
    if settings.parallel.sp_size > 1:
        values = {"pad_to_multiple_of": settings.parallel.sp_size} | values
        values["parallelism_config"] = parallelism_config(settings.parallel.sp_size)
    try:
        return SFTConfig(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise SettingsError([Problem("", "train", f"refused by TRL's SFTConfig: {error}")]) from error


def train_adapter(
    settings: RunSettings,
    args: SFTConfig,
    corpus: data.Corpus,
    tokenizer: PreTrainedTokenizerBase,
    lrsa: LRSAConfig | None,
    console: Console,
    resume: bool,
) -> int:
    """Train one adapter of the base model, under LRSA or dense, leave it verified in `args.output_dir`, and return its
    number of steps."""
    train = settings.train
    if resume and is_finished(args, minutes=train.max_minutes, _in_vain=train.early_stopping_patience):
        console.print(f"{args.output_dir} already holds a finished adapter: skipping its training", soft_wrap=True)
        return json.loads((Path(args.output_dir) / STATE).read_text(encoding="utf-8"))["global_step"]
    if environment.rank() == 0:
        discard_results(Path(settings.train.output_dir))
    trainer = _trainer(settings, args, corpus, tokenizer, lrsa)
    if not settings.data.streaming:
        lost = _tokens(corpus.train) - _tokens(trainer.train_dataset)
        assert lost == 0, f"TRL dropped {lost} tokens of rows that were ready"
    print_banner(console, settings, trainer, corpus.report)
    try:
        newest = newest_checkpoint(Path(args.output_dir), trainer.made_by, console) if resume else None
        if newest is None and settings.lora.init_from is not None:
            start_from(trainer.model, settings.lora)
        trainer.train(resume_from_checkpoint=newest)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(plan_of(settings, trainer), error) from error
    if trainer.time_limit.is_over:
        console.print(f"train.max_minutes used up after step {trainer.state.global_step}")
    trainer.save_finished()
    if trainer.is_world_process_zero():
        verify_adapter(args.output_dir)
    if settings.parallel.sp_size > 1:
        separate_rows(args)
    trainer.accelerator.free_memory()
    steps = trainer.state.global_step
    del trainer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return steps


def _trainer(settings: RunSettings, args: SFTConfig, corpus: data.Corpus, tokenizer, lrsa) -> LRSATrainer:
    """Base model with its attention set, LoRA and trainer; what the libraries refuse becomes a SettingsError."""
    model = load_model(settings.model)
    problems = module_problems(settings.lora, model)
    problems += token_problems(tokenizer, corpus.highest_token, model)
    problems += packing_problems(model) if args.packing else []
    problems += [] if lrsa is None else objective_problems(settings.objective, lrsa, model)
    if problems:
        raise SettingsError(problems)
    try:
        model = remove_lrsa(model) if lrsa is None else apply_lrsa(model, lrsa, settings.model.attention)
    except ValueError as error:
        raise SettingsError([Problem("", "lrsa", str(error))]) from error
    shared = settings.parallel.sp_size > 1
    if shared:
        share_rows(args, model, selection=lrsa is not None and settings.objective.selection > 0)
    try:
        trainer = (SequenceParallelTrainer if shared else LRSATrainer)(
            model=model,
            args=args,
            train_dataset=corpus.train,
            eval_dataset=None if args.eval_strategy == "no" else _loss_rows(corpus.evaluation),
            processing_class=tokenizer,
            peft_config=lora_config(settings.lora, settings.model.revision),
            lrsa=lrsa,
            objective=settings.objective,
            max_minutes=settings.train.max_minutes,
            patience=settings.train.early_stopping_patience,
            base=settings.model.loading,
        )
    except ValueError as error:
        raise SettingsError([Problem("", "train, lora", f"refused by TRL or PEFT: {error}")]) from error
    if is_packed(trainer.model) and settings.model.dtype == "float32":
        for parameter in trainer.model.parameters():  # TRL has made them bfloat16
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    return trainer


def _loss_rows(evaluation: list[dict]) -> Dataset:
    """Evaluation rows as TRL takes them, for `train.eval_strategy`."""
    masks = []
    for row in evaluation:
        prompt = row.get("prompt_length", 0)
        masks.append(row.get("trained") or [False] * prompt + [True] * (len(row["input_ids"]) - prompt))
    return Dataset.from_dict({"input_ids": [row["input_ids"] for row in evaluation], "completion_mask": masks})


def _tokens(rows: Dataset) -> int:
    return sum(pyarrow.compute.sum(pyarrow.compute.list_value_length(ids)).as_py() for ids in _input_ids(rows))


def _input_ids(rows: Dataset) -> Iterator[pyarrow.Array]:
    """The rows' tokens, a thousand rows at a time."""
    batches = rows.select_columns("input_ids").with_format("arrow").iter(batch_size=1000)
    return (batch["input_ids"] for batch in batches)
