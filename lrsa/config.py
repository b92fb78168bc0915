"""The few settings that define Lag-Relative Sparse Attention, checked once and stored beside every adapter."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

CONFIG_NAME = "lrsa_config.json"


class LRSAConfigError(ValueError):
    """Settings that cannot be used; `problems` lists `(field, what is wrong with it)`, all of them at once."""

    def __init__(self, problems: list[tuple[str, str]]):
        self.problems = problems
        super().__init__("\n".join(f"{field} {text}" for field, text in problems))


@dataclass(frozen=True)
class LRSAConfig(dict):
    """How a cache is compressed: which tokens every KV head keeps (arXiv 2506.11498; selection rule: arXiv 2504.04704).

    Args:
        sink_size: number of first tokens of a row that are always kept.
        lag_size: tokens per window `L`; a window is scored against the window that follows it.
        top_k: tokens `K` kept of every window, for each KV head. `top_k == lag_size` keeps everything: dense attention.
        value_weight: weight of the values' score against the keys' score (LagKV's `score_v_ratio`).
        skip_layers: indices of layers that stay dense, in training and in the cache.

    Raises:
        LRSAConfigError: naming every field that cannot be used, its value, what is allowed and what to change.

    It is also a `dict` of its own fields, so that it travels inside `model.config` through JSON.
    """

    sink_size: int = 16
    lag_size: int = 128
    top_k: int = 32
    value_weight: float = 1.0
    skip_layers: tuple[int, ...] = ()

    # What `select_tokens` ranks by in place of the lag-relative scores; only the controls of an experiment set it.
    rank = None

    def __post_init__(self):
        if problems := self._problems():
            raise LRSAConfigError(problems)
        object.__setattr__(self, "value_weight", float(self.value_weight))
        object.__setattr__(self, "skip_layers", tuple(sorted(set(self.skip_layers))))
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        dict.update(self, values | {"skip_layers": list(self.skip_layers)})

    def _problems(self) -> list[tuple[str, str]]:
        problems = []
        for name, smallest in (("sink_size", 0), ("lag_size", 1), ("top_k", 1)):
            value = getattr(self, name)
            if not _is_int(value):
                problems.append((name, f"must be a whole number, got {value!r}: write it without quotes or fraction."))
            elif value < smallest:
                problems.append((name, f"must be at least {smallest}, got {value}: raise {name}."))
        if _is_int(self.top_k) and _is_int(self.lag_size) and self.top_k > self.lag_size >= 1:
            allowed = f"must be between 1 and lag_size ({self.lag_size}), got {self.top_k}"
            problems.append(("top_k", f"{allowed}: lower top_k or raise lag_size."))
        weight = self.value_weight
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= 1e6:
            text = f"must be a number from 0 to 1e6, got {weight!r}: 1.0 is LagKV's choice."
            problems.append(("value_weight", text))
        layers = self.skip_layers
        if not isinstance(layers, (list, tuple, set, frozenset)) or not all(_is_int(i) and i >= 0 for i in layers):
            text = f"must be a list of layer indices counted from 0, got {layers!r}: for example [0, 1]."
            problems.append(("skip_layers", text))
        return problems

    def _refuse_change(self, *args, **kwargs):
        raise TypeError("LRSAConfig cannot be changed in place: use config.replace(name=value).")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = popitem = clear = _refuse_change

    def pop(self, name, *default):
        """Only for transformers, which takes keys of its own out of every dict in a configuration."""
        return self._refuse_change() if name in self else super().pop(name, *default)

    def __reduce__(self):
        return type(self).from_dict, (dict(self),)

    @property
    def keep_ratio(self) -> float:
        """Share of a window's tokens that is kept, `top_k / lag_size` (kvpress' compression_ratio is 1 minus this)."""
        return self.top_k / self.lag_size

    @property
    def dense_length(self) -> int:
        """Longest row, in tokens, that is never compressed: `sink_size + 2 * lag_size`."""
        return self.sink_size + 2 * self.lag_size

    def compressed_windows(self, seen: int) -> int:
        """Windows of a row of `seen` tokens that have been cut down to their kept tokens."""
        return 0 if self.top_k == self.lag_size else max((seen - self.sink_size) // self.lag_size - 1, 0)

    def kept_length(self, seen: int) -> int:
        """Tokens that a cache holds of a row of `seen` tokens: sink, `top_k` per compressed window, the rest whole."""
        return seen - self.compressed_windows(seen) * (self.lag_size - self.top_k)

    def for_layer(self, layer: int) -> LRSAConfig:
        """The settings of one layer: those in `skip_layers` keep everything."""
        return self.full() if layer in self.skip_layers else self

    def full(self) -> LRSAConfig:
        """The same settings with everything kept: the full cache, dense attention."""
        return self.replace(top_k=self.lag_size)

    def replace(self, **changes) -> LRSAConfig:
        """The same settings with some fields changed; the result is checked again."""
        return type(self)(**(self.to_dict() | changes))

    def with_keep_ratio(self, keep_ratio: float) -> LRSAConfig:
        """The same settings with `top_k` nearest to `keep_ratio * lag_size`, at least 1."""
        if not 0 < keep_ratio <= 1:
            raise ValueError(f"keep_ratio must be above 0 and at most 1, got {keep_ratio}: 0.25 keeps a quarter.")
        return self.replace(top_k=max(1, round(keep_ratio * self.lag_size)))

    def to_dict(self) -> dict:
        """The fields as plain JSON values."""
        return dict(self)

    @classmethod
    def from_dict(cls, values: dict) -> LRSAConfig:
        """Settings from plain values; an unknown field is an error, never ignored."""
        known = [field.name for field in fields(cls)]
        text = f"is an unknown LRSA setting: allowed are {', '.join(known)}."
        if unknown := [(name, text) for name in values if name not in known]:
            raise LRSAConfigError(unknown)
        return cls(**values)

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write `lrsa_config.json` into `directory` (made if missing) and return its path."""
        path = Path(directory) / CONFIG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def from_pretrained(cls, source: str | Path, **hub_options) -> LRSAConfig:
        """Read `lrsa_config.json` from a directory or a Hub repository.

        Args:
            source: a local directory, or a Hub id such as `user/adapter`.
            hub_options: passed to `huggingface_hub.hf_hub_download` (`revision`, `token`, `cache_dir`, ...).

        Raises:
            ValueError: when there is no such file, or its content is not a valid configuration.
        """
        path = Path(source) / CONFIG_NAME
        if not path.is_file():
            if Path(source).is_dir():
                raise ValueError(f"{source} holds no {CONFIG_NAME}: is it an adapter that was trained with lrsa?")
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

            try:
                path = Path(hf_hub_download(str(source), CONFIG_NAME, **hub_options))
            except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
                raise ValueError(
                    f"{source} is neither a directory with {CONFIG_NAME} nor a Hub repository that holds one: {error}"
                ) from error
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
