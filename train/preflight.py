"""What the libraries would refuse only after the data are built: missing packages, contradicting DeepSpeed numbers."""

from __future__ import annotations

from transformers import Trainer
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.utils import is_liger_kernel_available
from trl import SFTConfig

from train.settings.errors import Problem, SettingsError


def check_trainer(args: SFTConfig, quantization: str | None = None) -> None:
    """Refuse what this machine or DeepSpeed's file does not allow.

    Args:
        quantization: of the base model.

    Raises:
        SettingsError: with every such setting.
    """
    problems = []
    try:
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
    except (ImportError, RuntimeError) as error:
        problems.append(("train.report_to", f"{error} Install the package, or set none"))
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except ImportError as error:
        problems.append(("train.optim", f"{error}; or use adamw_torch"))
    except (ValueError, AttributeError):
        pass  # needs the model, which the trainer will hand over
    if args.use_liger_kernel and not is_liger_kernel_available():
        problems.append(("train.use_liger_kernel", "liger-kernel is not installed: pip install liger-kernel, or false"))
    if args.activation_offloading and args.use_cpu:
        problems.append(("train.activation_offloading", "must be false on a CPU: its memory holds activations anyway"))
    if quantization and args.deepspeed and args.hf_deepspeed_config.is_zero3():
        text = f"{quantization} cannot be used under ZeRO-3, which splits weights that are packed: use ZeRO-2"
        problems.append(("model.quantization", text))
    mismatches = args.hf_deepspeed_config.mismatches if args.deepspeed else []
    problems += [
        ("train.deepspeed", f"contradicts section train ({text.strip('- ')}): write auto in the file")
        for text in mismatches
    ]
    if problems:
        raise SettingsError(Problem("", field, text) for field, text in problems)
