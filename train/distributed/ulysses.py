"""Ulysses sequence parallelism: several processes share every row, so that rows may outgrow one GPU.

Each process holds a slice of every row. Around attention, DeepSpeed's ALST trades slices of tokens for groups of heads:
there a process has whole rows of some heads. LRSA selects for each KV head over the whole row, so it selects the same
tokens as on one process. ALST drops the padding mask, but padding has position 0, hence every padding token is a
document of its own, which no real token sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed
from accelerate import ParallelismConfig
from accelerate.utils import DeepSpeedSequenceParallelConfig
from transformers import PreTrainedModel, Trainer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl import SFTConfig

from train.distributed import environment
from train.distributed.requirements import check_model
from train.trainer import LRSATrainer

IGNORED = -100  # the label of a token that is not trained


def parallelism_config(sp_size: int) -> ParallelismConfig:
    """What TRL's `SFTConfig` takes: groups of `sp_size` processes, each with rows of its own."""
    groups = environment.world_size() // sp_size
    return ParallelismConfig(
        sp_backend="deepspeed",
        sp_size=sp_size,
        dp_replicate_size=groups,
        sp_handler=DeepSpeedSequenceParallelConfig(),
    )


def share_rows(args: SFTConfig, model: PreTrainedModel, selection: bool) -> None:
    """Set up `args` so that the processes of a group share every row.

    Args:
        selection: whether the objective teaches the selection.

    Raises:
        SettingsError: as `check_model`.
    """
    check_model(args, model, selection)
    # Not an argument of the handler, which refuses any name that it does not know.
    args.parallelism_config.sp_handler.sp_attn_implementation = model.config._attn_implementation


def separate_rows(args: SFTConfig) -> None:
    """Undo what ALST changed in this process: the attention function that it wrapped, and its groups."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    del ALL_ATTENTION_FUNCTIONS[args.parallelism_config.sp_handler.sp_attn_implementation]
    parallel_state_sp._SEQUENCE_PARALLEL_GROUP = parallel_state_sp._SEQUENCE_DATA_PARALLEL_GROUP = None


class PartOfStep(Trainer):
    """What SFTTrainer calls for the loss of shared rows: a process's part of the mean over the step's trained tokens.

    Transformers' own takes the mean of the means of the step's batches, and its gradients are `sp_size` times too large
    under ZeRO-2, which changes what `max_grad_norm` clips.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss * self.groups
        return (loss, outputs) if return_outputs else loss


class SequenceParallelTrainer(LRSATrainer, PartOfStep):
    """LRSATrainer whose processes share rows: those of a group read the same rows, and each keeps its slice of them.

    Transformers' own way is that every process reads rows and a group takes them in turn. That cannot continue a
    checkpoint, and needs rows of one length on a CPU.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sp_size = self.args.parallelism_config.sp_size
        self.groups = self.args.world_size // self.sp_size
        self.accelerator.deepspeed_ulysses_dl_adapter = lambda dataloader, model: dataloader
        # The loss below is one of the whole step: transformers need not divide it by the number of its batches.
        self.model_accepts_loss_kwargs = True

    def get_train_dataloader(self):
        """Batches cut to this process's slice; every process of a group gets the same ones."""
        whole = self.data_collator
        self.data_collator = _Slices(whole, self.args.process_index % self.sp_size, self.sp_size)
        try:
            dataloader = super().get_train_dataloader()
        finally:
            self.data_collator = whole
        dataloader.batch_sampler.num_processes //= self.sp_size
        dataloader.batch_sampler.process_index //= self.sp_size
        return dataloader

    def get_sp_size(self) -> int:
        """How many batches of an epoch transformers believes to come out of one of the data loader."""
        return 1

    def get_total_train_batch_size(self, args: SFTConfig) -> int:
        return super().get_total_train_batch_size(args) // self.sp_size

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        from deepspeed.runtime.sequence_parallel.parallel_state_sp import get_sequence_parallel_group

        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.lrsa is None:
            del inputs["predicting"]
        part = super().compute_loss(model, inputs, False, num_items_in_batch)
        whole = part.detach().clone()
        torch.distributed.all_reduce(whole, group=get_sequence_parallel_group())
        # DeepSpeed adds up the gradients of a group and takes the mean over the groups, but ZeRO-3 the mean over all.
        part = part * (self.sp_size if self.args.hf_deepspeed_config.is_zero3() else 1)
        return part + (whole - part.detach())  # the log takes the mean over all processes

    def _shares(self, num_items_in_batch) -> tuple[float, torch.Tensor | None]:
        return 1 / self.current_gradient_accumulation_steps / self.sp_size, num_items_in_batch / self.groups

    def _get_num_items_in_batch(self, batches: list[dict], device: torch.device):
        if not batches or "shift_labels" not in batches[0]:
            return super()._get_num_items_in_batch(batches, device)
        items = sum((batch["shift_labels"] != IGNORED).sum() for batch in batches)
        return self.accelerator.reduce(items.to(device), reduction="sum")

    def _document_lengths(self, inputs: dict) -> torch.Tensor:
        return inputs.pop("document_lengths")


@dataclass
class _Slices:
    """A collator whose rows are cut: slice `rank` of `size`, with labels that are shifted before the cut.

    `document_lengths` and `predicting` (the tokens whose next one is trained) stay whole, for trainer and objective.
    """

    collator: Callable
    rank: int
    size: int

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = self.collator(rows)
        labels = batch.pop("labels")
        batch["shift_labels"] = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        width, rest = divmod(labels.shape[1], self.size)
        assert not rest, f"rows of {labels.shape[1]} tokens were not padded to a multiple of {self.size}"
        names = [name for name in ("input_ids", "position_ids", "attention_mask", "shift_labels") if name in batch]
        slices = {name: batch[name][:, self.rank * width : (self.rank + 1) * width].contiguous() for name in names}
        lengths = [length for row in rows for length in row.get("seq_lengths", [len(row["input_ids"])])]
        predicting = batch["shift_labels"] != IGNORED
        return slices | {"document_lengths": torch.tensor(lengths), "predicting": predicting}
