"""How an adapter's base model is loaded where its files alone do not say it: scaled rotary positions, a GGUF file.

Stored beside the adapter as `lrsa_base.json`, and read back by `lrsa.load`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import AutoConfig, GgufConfig, PreTrainedConfig, PreTrainedModel

BASE_NAME = "lrsa_base.json"


@dataclass(frozen=True)
class BaseLoading:
    """What is given to `from_pretrained` beside a base model's name.

    Attributes:
        gguf_file: file of a GGUF model in its directory or repository; its weights are dequantised.
        rope_scaling: `rope_type`, yarn or linear, and `factor`, by which the model's positions are multiplied.
    """

    gguf_file: str | None = None
    rope_scaling: dict | None = None

    def files(self) -> dict:
        """Options for the configuration and the tokenizer."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}

    def options(self, source: str | Path, **hub) -> dict:
        """Options for the model.

        Args:
            source: directory or Hub id of the base model.
            hub: `revision`, `token`, `trust_remote_code`, ... as `from_pretrained` takes them.

        Raises:
            ValueError: when the model's positions cannot be scaled.
        """
        options = self.files()
        if self.gguf_file:
            options |= {"quantization_config": GgufConfig(dequantize=True), "use_safetensors": None}
        if self.rope_scaling:
            config = AutoConfig.from_pretrained(source, **self.files(), **hub)
            options["config"] = _scaled(config, **self.rope_scaling)
        return options

    def check(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model, once it is sure that its code reads the scaling.

        Raises:
            ValueError: when it does not.
        """
        kinds = {getattr(module, "rope_type", None) for module in model.modules()}
        if self.rope_scaling and self.rope_scaling["rope_type"] not in kinds:
            raise ValueError(
                f"rope_scaling has no effect: {type(model).__name__} computes its positions in its own way"
            )
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `lrsa_base.json` into `directory`, or delete it where there is nothing to say."""
        path = Path(directory) / BASE_NAME
        if self == BaseLoading():
            path.unlink(missing_ok=True)
        else:
            path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, adapter: Path) -> BaseLoading:
        """That of an adapter's directory."""
        path = adapter / BASE_NAME
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else cls()


def _scaled(config: PreTrainedConfig, rope_type: str, factor: float) -> PreTrainedConfig:
    text = config.get_text_config()
    rope, positions = getattr(text, "rope_parameters", None), getattr(text, "max_position_embeddings", None)
    if not rope or not positions:
        raise ValueError(f"rope_scaling cannot be used: {config.model_type} has no rotary positions")
    kind = rope.get("rope_type")
    if kind != "default":
        own = f"scales its positions already ({kind})" if kind else "has positions of its own for each kind of layer"
        raise ValueError(f"rope_scaling cannot be used: {config.model_type} {own}")
    scaling = {"rope_type": rope_type, "factor": float(factor)}
    scaling |= {"original_max_position_embeddings": positions} if rope_type == "yarn" else {}
    text.rope_parameters = rope | scaling
    text.max_position_embeddings = int(positions * factor)
    return config
