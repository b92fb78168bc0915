"""TRL's SFTTrainer with three additions: the kept fraction in the log, lrsa_config.json at every save, a log file."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

import torch
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig

from lrsa import LRSAConfig
from lrsa.attention.sliding import held
from lrsa.base_loading import BaseLoading
from lrsa.hf import config_of, set_config, sliding_windows
from train.objective import Objective, config_of_step
from train.resume.checkpoints import replace_text
from train.resume.trainer import ResumableTrainer
from train.settings.schema import ObjectiveSettings


class LRSATrainer(ResumableTrainer):
    """Trains one adapter.

    Args:
        lrsa: the compression that the model was given with `apply_lrsa`, or None for a dense control.
        objective: what a step learns from; a dense control learns from cross-entropy alone.
        base: how the base model is loaded.
        patience: evaluations without a lower held-out loss, after which training ends.
        other arguments: those of `SFTTrainer`.
    """

    counted = (*ResumableTrainer.counted, "_kept_and_seen", "_in_vain")

    def __init__(
        self,
        *args,
        lrsa: LRSAConfig | None,
        objective: ObjectiveSettings,
        base: BaseLoading,
        patience: int | None = None,
        **kwargs,
    ):
        self.lrsa = self._evaluated = lrsa
        self.base = base
        self.objective = objective
        self._kept_and_seen = [0.0, 0.0]
        super().__init__(*args, **kwargs)
        self.add_callback(LogFile())
        self._patience = StopEarly(patience or 1)
        if patience is not None:
            self.add_callback(self._patience)

    @property
    def _in_vain(self) -> int:
        """Evaluations since the best one."""
        return self._patience.early_stopping_patience_counter

    @_in_vain.setter
    def _in_vain(self, count: int) -> None:
        self._patience.early_stopping_patience_counter = count

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """Measure the held-out loss with the full cache, then with the one that is trained for, whose metrics count."""
        loop = partial(super().evaluation_loop, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        key = f"{metric_key_prefix}_loss"
        if self.lrsa is None or self.lrsa == self.lrsa.full():
            return loop()
        self._evaluated = self.lrsa.full()
        full = loop().metrics[key]
        self._metrics["eval"].clear()
        self._evaluated = self.lrsa
        output = loop()
        output.metrics[f"{key}_full_cache"] = full
        return output

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.model.training:
            self._compress(self._evaluated)  # not the ratio that the last step sampled
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.lrsa is None:
            self._count_kept(inputs, None)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        config = config_of_step(self.objective, self.lrsa, self.state.global_step, self.state.max_steps, self.args.seed)
        self._count_kept(inputs, config)
        objective = Objective(self.objective, self.lrsa, self.model, inputs, *self._shares(num_items_in_batch))
        self._compress(config)
        objective.teach(model)
        with objective.watching():
            loss = super().compute_loss(model, objective.model_inputs(), False, num_items_in_batch)
        loss = objective.total(loss)
        for name, part in objective.parts(config).items():
            total, count = self.accelerator.reduce(torch.stack([x.double() for x in part]), "sum").tolist()
            if count:
                self._metrics["train"][name].append(total / count)
        return loss

    def _compress(self, config: LRSAConfig | None) -> None:
        """Set the model's compression, where it changes: once per step, and for an evaluation."""
        if config is not None and config != config_of(self.model):
            set_config(self.model, config)

    def _shares(self, num_items_in_batch) -> tuple[float, torch.Tensor | None]:
        """As TRL does with its own loss: with `num_items_in_batch` the trainer leaves both averages to the loss."""
        if num_items_in_batch is None:
            return 1.0, None
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return 1 / self.current_gradient_accumulation_steps, num_items_in_batch / ranks

    def _count_kept(self, inputs: dict, config: LRSAConfig | None) -> None:
        """Add up, over all processes, the lengths of this batch's documents and what a cache would hold of them."""
        lengths = self._document_lengths(inputs)
        kept = kept_tokens(lengths.tolist(), config, sliding_windows(self.model.config))
        totals = torch.tensor([kept, lengths.sum()], dtype=torch.float64, device=lengths.device)
        for index, total in enumerate(self.accelerator.reduce(totals, reduction="sum").tolist()):
            self._kept_and_seen[index] += total

    def _document_lengths(self, inputs: dict) -> torch.Tensor:
        packed = "attention_mask" not in inputs
        return inputs["cu_seq_lens_q"].diff() if packed else inputs["attention_mask"].sum(dim=1)

    def log(self, logs: dict, *args, **kwargs) -> None:
        kept, seen = self._kept_and_seen
        if seen and "loss" in logs:
            logs["kept_fraction"] = round(kept / seen, 4)
            self._kept_and_seen = [0.0, 0.0]
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        if self.lrsa is not None:
            self.lrsa.save_pretrained(output_dir or self.args.output_dir)
        self.base.save_pretrained(output_dir or self.args.output_dir)


def kept_tokens(lengths: list[int], lrsa: LRSAConfig | None, windows: list[int | None]) -> float:
    """Tokens that a cache holds of rows of these lengths once they are read, as a mean over the layers.

    Args:
        lrsa: the compression; None holds every token in every layer, which is what `kept_fraction` is a share of.
        windows: of every layer, from `lrsa.hf.sliding_windows`.
    """
    if lrsa is None:
        return float(sum(lengths))
    layers = [(window, lrsa.for_layer(layer)) for layer, window in enumerate(windows)]
    return sum(
        held(length, window) if window else config.kept_length(length)
        for window, config in layers
        for length in lengths
    ) / len(layers)


class StopEarly(EarlyStoppingCallback):
    """Ends training as if its last step was done."""

    def on_evaluate(self, args: SFTConfig, state, control, metrics, **kwargs) -> None:
        super().on_evaluate(args, state, control, metrics, **kwargs)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            state.max_steps = state.global_step


class LogFile(TrainerCallback):
    """Appends every logged step to `log.jsonl` in the run directory, as it happens."""

    def __init__(self):
        self.started = time.monotonic()

    def on_train_begin(self, args: SFTConfig, state, control, **kwargs) -> None:
        """Keep only the lines up to the checkpoint that is resumed."""
        path = Path(args.output_dir) / "log.jsonl"
        if state.is_world_process_zero and path.is_file():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            kept = [line + "\n" for line in lines if json.loads(line)["step"] <= state.global_step]
            replace_text(path, "".join(kept))

    def on_log(self, args: SFTConfig, state, control, logs: dict | None = None, **kwargs) -> None:
        if state.is_world_process_zero and logs:
            line = {"step": state.global_step, "seconds": round(time.monotonic() - self.started, 2)} | logs
            with open(Path(args.output_dir) / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
