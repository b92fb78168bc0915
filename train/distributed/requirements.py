"""What sequence parallelism asks of the settings and of the model."""

from __future__ import annotations

import copy
import os

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl import SFTConfig

from lrsa.hf import has_latents
from lrsa.hf.layers import is_recurrent
from train.distributed import environment
from train.settings.errors import Problem, SettingsError
from train.settings.load import RunSettings
from train.settings.schema import ParallelSettings, TrainSettings

PROBE = "lrsa_probe"  # the name of an attention that only tells what it gets


def check_sequence_parallel(settings: RunSettings) -> None:
    """Refuse what cannot work with `parallel.sp_size` above 1, and other parallelism that `accelerate launch` asks for.

    Raises:
        SettingsError: with every such setting.
    """
    size, train, processes = settings.parallel.sp_size, settings.train, environment.world_size()
    variables = {name: f"PARALLELISM_CONFIG_{name.upper()}" for name in ParallelSettings.not_here}
    problems = [
        (variable, f"cannot be set in the environment: {ParallelSettings.not_here[name]}")
        for name, variable in variables.items()
        if os.environ.get(variable, "1") != "1"
    ]
    problems += [] if size == 1 else _problems(size, processes, train, settings.eval.control)
    if problems:
        raise SettingsError(Problem("", name, text) for name, text in problems)


def _problems(size: int, processes: int, train: TrainSettings, control: bool) -> list[tuple[str, str]]:
    problems = []
    if not train.deepspeed:
        problems.append(("train.deepspeed", f"must be set for parallel.sp_size {size}: Ulysses is part of DeepSpeed"))
    if processes % size:
        text = f"must divide the number of processes ({processes}), got {size}: start with deepspeed --num_gpus {size}"
        problems.append(("parallel.sp_size", text))
    multiple = train.pad_to_multiple_of
    if isinstance(multiple, int) and multiple % size:
        text = f"must be a multiple of parallel.sp_size ({size}), got {multiple}: leave it out"
        problems.append(("train.pad_to_multiple_of", text))
    if train.packing and train.per_device_train_batch_size != 1:
        text = (
            f"must be 1 with train.packing and parallel.sp_size {size}: lengthen the packed row with train.max_length"
        )
        problems.append(("train.per_device_train_batch_size", text))
    if train.packing and control:
        text = f"cannot be trained with train.packing and parallel.sp_size {size}: documents would see each other"
        problems.append(("eval.control", f"{text} in dense attention; set it to false"))
    return problems


def check_model(args: SFTConfig, model: PreTrainedModel, selection: bool) -> None:
    """Refuse models, and settings with a model, whose rows cannot be shared.

    Args:
        selection: whether the objective teaches the selection.

    Raises:
        SettingsError: with every reason.
    """
    size, text_config = args.parallelism_config.sp_size, model.config.get_text_config()
    heads = text_config.num_attention_heads
    kv_heads = getattr(text_config, "num_key_value_heads", heads)
    problems = []
    if heads % size or (kv_heads % size and size % kv_heads):
        text = (
            f"must divide the model's {heads} attention heads, and divide its {kv_heads} KV heads or be a multiple of "
            f"them, got {size}"
        )
        problems.append(Problem("", "parallel.sp_size", text))
    reasons = {
        "its recurrent layers need whole rows": is_recurrent(text_config),
        "all its heads share their keys (latent attention)": has_latents(model),
        "it hands the attention sinks of all heads to the attention of some": any(
            getattr(module, "sinks", None) is not None for module in model.modules()
        ),
        "it tells documents apart by a mask, which is dropped (chunked attention)": "chunked_attention"
        in (getattr(text_config, "layer_types", None) or ()),
        "its configuration has no num_key_value_heads, which DeepSpeed reads": not hasattr(
            text_config, "num_key_value_heads"
        ),
        "its attention is not told the positions of tokens": not _hands_positions_on(model),
    }
    problems += [
        Problem("", "parallel.sp_size", f"must be 1 for {type(model).__name__}, got {size}: {reason}")
        for reason, holds in reasons.items()
        if holds
    ]
    coefficient = getattr(args, "router_aux_loss_coef", None)
    coefficient = getattr(text_config, "router_aux_loss_coef", 0) if coefficient is None else coefficient
    if coefficient and hasattr(text_config, "output_router_logits"):
        text = f"must be 0 with parallel.sp_size {size}, got {coefficient}: it is not added up over the slices of a row"
        problems.append(Problem("", "train.router_aux_loss_coef", text))
    deepspeed = args.hf_deepspeed_config
    if deepspeed.is_zero3() and deepspeed.is_false("zero_optimization.reduce_scatter"):
        text = f"must not switch reduce_scatter off in ZeRO-3 with parallel.sp_size {size}: gradients would grow by it"
        problems.append(Problem("", "train.deepspeed", text))
    if selection and size > kv_heads:
        text = f"must be at most the model's {kv_heads} KV heads with objective.selection, got {size}"
        problems.append(Problem("", "parallel.sp_size", f"{text}: copies of a KV head see a part of its queries each"))
    if problems:
        raise SettingsError(problems)


class _Reached(Exception):
    """The first attention of a model."""


def _hands_positions_on(model: PreTrainedModel) -> bool:
    """Whether a model's attention gets the positions of tokens, not its mask alone, which is dropped.

    Tried on a copy without weights and without a mask.
    """

    def attention(module, *states, **options):
        raise _Reached("position_ids" in options)

    tokens = torch.zeros(1, 2, dtype=torch.long, device="meta")
    with torch.device("meta"):
        probe = type(model)(copy.deepcopy(model.config))
    probe.config.get_text_config()._attn_implementation = PROBE
    ALL_ATTENTION_FUNCTIONS[PROBE] = attention
    try:
        probe(tokens, position_ids=tokens, use_cache=False)
    except _Reached as reached:
        return reached.args[0]
    except RuntimeError:  # it needs data to get there: DeepSpeed asserts it in the first step
        return True
    finally:
        del ALL_ATTENTION_FUNCTIONS[PROBE]
    return True
