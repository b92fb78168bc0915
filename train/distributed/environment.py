"""The process around a run: quiet libraries, one process or several, CPU or GPU."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import warnings
from typing import TYPE_CHECKING

from train.failures import RunFailed, first_line
from train.settings.errors import Problem, SettingsError

if TYPE_CHECKING:  # importing it takes seconds, and torch with it
    from train.settings.schema import TrainSettings


def prepare() -> None:
    """Set what libraries read on import; call it before torch and transformers are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Tokenizers would warn, and use one thread, once a data loader forks after they ran in parallel.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # It says on every import that a faster kernel is not there.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # TRL reads an attribute that transformers renamed; a user cannot act on it.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def rank() -> int:
    """Number of this process among all, 0 for a run that no launcher started."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(train: TrainSettings) -> None:
    """Bring up what DeepSpeed and accelerate need, before the first `SFTConfig` is made.

    Raises:
        SettingsError: when `train.deepspeed` is set and DeepSpeed is not installed, one process sees several GPUs, or
            `accelerate launch` asks for what the settings do not.
        RunFailed: when the processes cannot connect.
    """
    _refuse_other_plugins(train)
    _share_cores()
    if rank() > 0:
        _hide_progress_bars()
    if train.use_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if train.deepspeed:
        _start_deepspeed(on_cpu=train.use_cpu)
    elif not train.use_cpu and "LOCAL_RANK" not in os.environ:
        _refuse_data_parallel()


def stop() -> None:
    """Leave the group of processes and forget DeepSpeed, so that one process can continue alone (evaluation)."""
    import torch.distributed
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _refuse_other_plugins(train: TrainSettings) -> None:
    """How weights are divided stands in the settings, so that --resume and the report know it."""
    asked = [
        name for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM") if os.environ.get(f"ACCELERATE_USE_{name}") == "true"
    ]
    if asked and not (asked == ["DEEPSPEED"] and train.deepspeed):
        option = f"--use_{asked[0].lower()}"
        text = (
            f"is not set, and accelerate launch was given {option}, or a configuration with it: leave that out, and "
            "set train.deepspeed=deepspeed/zero2.json or zero3.json where the weights shall be divided"
        )
        raise SettingsError([Problem("", "train.deepspeed", text)])


def _hide_progress_bars() -> None:
    """One process shows them; the others do the same work."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def _share_cores() -> None:
    """Split this machine's cores among its processes; accelerate would take them all for each."""
    import torch

    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world_size())))
    if "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, torch.get_num_threads() // local)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


def _start_deepspeed(on_cpu: bool) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        text = "DeepSpeed is not installed: pip install deepspeed, or run without it (--set train.deepspeed=null)"
        raise SettingsError([Problem("", "train.deepspeed", text)])
    if "RANK" not in os.environ:
        # DeepSpeed needs a launcher's variables also for the one process of `python launch/train.py`.
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(_free_port()))
    import deepspeed
    import torch.distributed

    if on_cpu:
        # An operator for tensor-parallel inference, which takes a C++ compiler and a minute to build.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # Before the model is built: ZeRO-3 would otherwise believe that it runs alone.
        try:
            deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
        except torch.distributed.DistNetworkError as error:
            raise RunFailed(
                f"Cannot initialise the process group at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} (port "
                f"in use?): choose another port with deepspeed --master_port 29501 ... ({first_line(error)})"
            ) from error


def _refuse_data_parallel() -> None:
    import torch

    if torch.cuda.is_available() and torch.cuda.device_count() > 1:
        text = (
            f"one process sees {torch.cuda.device_count()} GPUs: start it with `deepspeed launch/train.py ...` to use "
            "them all, or with CUDA_VISIBLE_DEVICES=0 to use one."
        )
        raise SettingsError([Problem("", "", text)])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
