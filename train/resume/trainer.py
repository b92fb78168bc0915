"""TRL's SFTTrainer with safe resumption: a killed run resumes bit for bit, unless it goes by the time.

A checkpoint counts only when it is complete. SIGTERM ends training after the current step, with a checkpoint. A loss
that is not finite ends it too, before anything is saved.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput
from trl import SFTTrainer

from train.adapter import ADAPTER_NAME
from train.failures import ProcessLost, RunFailed, RunStopped, first_line, is_lost_connection
from train.resume.checkpoints import COMPLETE, COUNTED, checkpoints, damage, mark_complete, remove_damaged, remove_old
from train.resume.time_limit import TimeLimit


class ResumableTrainer(SFTTrainer):
    """Trains, stops and resumes.

    Args:
        max_minutes: of training, after which it ends as if its last step was done.
        other arguments: those of `SFTTrainer`.
    """

    # Sums since the last line of the log, which are part of the next one; and the time.
    counted = ("_globalstep_last_logged", "_total_train_tokens", "minutes")

    def __init__(self, *args, max_minutes: float | None = None, **kwargs):
        self.time_limit = TimeLimit(max_minutes)
        super().__init__(*args, **kwargs)
        self._sigterm: list[int] = []
        self._stopped = False
        self._not_finite = torch.zeros((), device=self.args.device)
        self.add_callback(_EndOfStep(self))

    @property
    def made_by(self) -> dict:
        """The processes that share the optimizer's state: only the same ones can continue a checkpoint."""
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        return {"processes": self.args.world_size, "zero_stage": None if plugin is None else plugin.zero_stage}

    @property
    def minutes(self) -> float:
        return self.time_limit.spent

    @minutes.setter
    def minutes(self, spent: float) -> None:
        self.time_limit.start(spent)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        made = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if made:
            self.time_limit.drive(scheduler, num_training_steps, self.args.get_warmup_steps(num_training_steps))
        return scheduler

    def train(self, resume_from_checkpoint: str | Path | None = None, **kwargs) -> TrainOutput:
        """Train from a checkpoint that `newest_checkpoint` returned, or from the beginning.

        Raises:
            RunStopped: on SIGTERM, after a checkpoint of the last step.
            RunFailed: the loss or the weights are not finite, or a checkpoint cannot be written.
        """
        self._continued = resume_from_checkpoint
        if self.args.should_save:
            remove_damaged(Path(self.args.output_dir))
        with sigterm_noted() as self._sigterm, _lost_processes(self.args.world_size):
            result = super().train(resume_from_checkpoint and str(resume_from_checkpoint), **kwargs)
        if self._stopped:
            raise RunStopped(
                f"Stopped by SIGTERM after step {self.state.global_step} of {self.state.max_steps}. {self._last_good()}"
            )
        return result

    def save_finished(self) -> None:
        """Save the adapter and, last, the state that says how far it was trained."""
        self._refuse_weights_that_are_not_finite()
        with self._written(Path(self.args.output_dir)):
            self.save_model()
            self.state.stateful_callbacks[COUNTED] = self._counted()
            self.save_state()

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._not_finite += ~torch.isfinite(loss)
        return loss

    def end_step(self) -> bool:
        """Agree with the other processes whether to stop after this step.

        Raises:
            RunFailed: when the loss of any process was not finite.
        """
        minutes = self.time_limit.now() if self.args.process_index == 0 else 0.0
        flags = torch.tensor([bool(self._sigterm), self._not_finite, minutes], dtype=torch.float64)
        flags = self.accelerator.reduce(flags.to(self.args.device), reduction="sum")
        stop, not_finite, self.time_limit.spent = flags.tolist()
        if not_finite:
            raise RunFailed(
                f"The loss of step {self.state.global_step} is not finite: lower train.learning_rate, add "
                f"train.warmup_steps, or check the data of that step. The step was not saved. {self._last_good()}"
            )
        self._stopped = stop > 0
        if self.time_limit.is_over and not self._stopped:
            self.state.max_steps = self.state.global_step
            self.control.should_training_stop = True
            self.control.should_save |= self.args.save_strategy == "steps"  # as behind train.max_steps
        return self._stopped

    def _run_epoch(self, **kwargs) -> None:
        """Skip the epoch when the checkpoint is that of the last step: transformers would take one step more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)
        else:
            self.control.should_training_stop = True

    def _save_checkpoint(self, model, trial) -> None:
        """Write a checkpoint, mark it as complete, and only then delete older ones."""
        self._refuse_weights_that_are_not_finite()
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        (checkpoint / COMPLETE).unlink(missing_ok=True)
        most, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with self._written(checkpoint):
                super()._save_checkpoint(model, trial)
                self._save_counted(checkpoint)
                self.accelerator.wait_for_everyone()
                if self.args.should_save and not self.args.save_only_model:
                    mark_complete(checkpoint, self.made_by)
        finally:
            self.args.save_total_limit = most
        if self.args.should_save:
            remove_old(Path(self.args.output_dir), most, self.state.best_model_checkpoint)

    def _counted(self) -> dict:
        return {name: getattr(self, name) for name in self.counted}

    def _save_counted(self, checkpoint: Path) -> None:
        values = self._counted() | {"loss": self._tr_loss.item(), "metrics": dict(self._metrics["train"])}
        self._counted_file(checkpoint).write_text(json.dumps(values), encoding="utf-8")

    def restore_counted(self) -> None:
        """Restore the sums of the log line that was open when the checkpoint was written."""
        if self._continued is None:
            self.minutes = 0.0
            return
        values = json.loads(self._counted_file(Path(self._continued)).read_text(encoding="utf-8"))
        self._tr_loss += values["loss"]
        self._total_loss_scalar -= values["loss"]  # `train_loss` is the mean of the steps since this start
        self._metrics["train"].update(values["metrics"])
        for name in self.counted:
            setattr(self, name, values[name])

    def _counted_file(self, checkpoint: Path) -> Path:
        return checkpoint / f"counted_{self.args.process_index}.json"

    def _refuse_weights_that_are_not_finite(self) -> None:
        # Under ZeRO-3 a process holds a part of each weight, in ds_tensor.
        held = [getattr(p, "ds_tensor", p) for p in self.model.parameters() if p.requires_grad]
        bad = torch.tensor(sum(not torch.isfinite(x).all() for x in held), device=self.args.device)
        if self.accelerator.reduce(bad, reduction="sum"):
            raise RunFailed(
                f"The weights after step {self.state.global_step} are not finite: lower train.learning_rate, or set "
                f"train.max_grad_norm. They were not saved. {self._last_good()}"
            )

    @contextmanager
    def _written(self, directory: Path) -> Iterator[None]:
        """Delete what could not be written completely."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            output = Path(self.args.output_dir)
            if self.args.should_save:
                remove_damaged(output) if directory != output else (output / ADAPTER_NAME).unlink(missing_ok=True)
            raise RunFailed(
                f"{directory} could not be written after step {self.state.global_step}: {first_line(error)}. "
                f"Free space if the disk is full. {self._last_good()}"
            ) from error

    def _last_good(self) -> str:
        complete = [path for path in checkpoints(Path(self.args.output_dir)) if damage(path) is None]
        if not complete:
            return "There is no complete checkpoint: the same command with --resume starts from the beginning."
        return f"The same command with --resume continues from {complete[-1]}."


class _EndOfStep(TrainerCallback):
    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.trainer.restore_counted()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.trainer.end_step():
            control.should_save = control.should_training_stop = True


@contextmanager
def _lost_processes(count: int) -> Iterator[None]:
    """Replace the connection errors that follow the death of another process."""
    try:
        yield
    except RuntimeError as error:
        if count == 1 or not is_lost_connection(error):
            raise
        raise ProcessLost(
            "Another process of this run died (its own message, if any, is above): start again with --resume. "
            f"{first_line(error)}"
        ) from error


@contextmanager
def sigterm_noted() -> Iterator[list]:
    """Inside the block SIGTERM only appends to the list that it yields; launchers send it more than once."""
    noted: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGTERM, before)
