"""What a model has to do under LRSA to count as one that works, each an equality with a stated tolerance. A check
returns a remark for the table, or nothing, and raises `AssertionError` when the model is wrong."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from lrsa import LRSACache, LRSAConfig, apply_lrsa, remove_lrsa
from lrsa.cache import CACHE_ARGUMENT
from tests.lrsa.models.oracle import oracle

CONFIG = LRSAConfig(sink_size=3, lag_size=8, top_k=2)
LENGTH = 60
CHUNKINGS = {"one chunk": [LENGTH], "chunks": [25, 1, 9, 20, 5], "tokens": [1] * LENGTH}
PADDED = (60, 33)  # real tokens of the rows of a padded batch
PACKED = (37, 33)


class Subject:
    """A model without LRSA, some rows, and what it must give; every check works on a copy.

    Attributes:
        own: logits of the model's own attention over `ids`; expected: those of the oracle.
        kinds: what the attention calls of the oracle were.
        pads: whether the model itself gives a padded row what it gives the row alone.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(3, 45, (1, LENGTH), generator=generator)
        self.pads = True
        self.exact = next(model.parameters()).dtype == torch.float64
        with oracle(model, None), torch.no_grad():
            self.own = logits(model, self.ids)
        with oracle(model, CONFIG) as self.kinds, torch.no_grad():
            self.expected = logits(model, self.ids)

    def applied(self) -> PreTrainedModel:
        return apply_lrsa(copy.deepcopy(self.model), CONFIG)

    def close(self, found: torch.Tensor, expected: torch.Tensor, own_error: float = 0.0) -> None:
        """Equal to rounding, or as far off as the model is without LRSA (recurrences that compute in fp32)."""
        scale = max(float(expected.abs().max()), 1e-3)
        allowed = scale * max(3e-6 if self.exact else 1e-3, 10 * min(own_error, 1e-3))
        error = float((found - expected).detach().abs().max())
        assert error <= allowed, f"differs by {error:.1e} of {scale:.1f}"

    def own_error(self, found: torch.Tensor, expected: torch.Tensor) -> float:
        return float((found - expected).detach().abs().max()) / max(float(expected.abs().max()), 1e-3)


def logits(model, ids: torch.Tensor, **options) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False, **options).logits


def one_forward(subject: Subject) -> str | None:
    """One forward over a row equals the oracle."""
    with torch.no_grad():
        subject.close(logits(subject.applied(), subject.ids), subject.expected)
    if "compressed" not in subject.kinds:
        return "nothing to compress"
    assert float((subject.expected - subject.own).abs().max()) > 1e-3, "the oracle hides nothing"
    return None


def gradients(subject: Subject) -> str | None:
    """The gradients of all parameters equal those of the oracle."""
    model = copy.deepcopy(subject.model)
    with oracle(model, CONFIG):
        expected = _gradients(model, logits(model, subject.ids))
    model = subject.applied()
    found = _gradients(model, logits(model, subject.ids))
    assert found.keys() == expected.keys(), f"gradients for {found.keys() ^ expected.keys()}"
    largest = max(float(x.abs().max()) for x in expected.values())
    for name, value in expected.items():
        error = float((found[name] - value).abs().max())
        allowed = largest * (3e-6 if subject.exact else 3e-3)
        assert error <= allowed, f"the gradient of {name} differs by {error:.1e} of {largest:.1e}"
    return None


def _gradients(model, out: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=out.dtype)
    (out * weights).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def over_the_cache(subject: Subject) -> str | None:
    """One forward equals three ways of feeding the tokens over an `LRSACache`."""
    for name, chunks in CHUNKINGS.items():
        with contextlib.suppress(Exception):
            dense = _fed(subject.model, subject.ids, chunks, None)
        try:
            own_error = subject.own_error(dense, subject.own)
        except NameError:
            own_error = 0.0
        cache = LRSACache(CONFIG)
        found = _fed(subject.applied(), subject.ids, chunks, cache)
        try:
            subject.close(found, subject.expected, own_error)
        except AssertionError as error:
            raise AssertionError(f"{name} over the cache: {error}") from None
    return None


def _fed(model, ids, chunks, cache) -> torch.Tensor:
    parts, start = [], 0
    for size in chunks:
        options = {} if cache is None else {CACHE_ARGUMENT: cache}
        with torch.no_grad():
            out = model(input_ids=ids[:, start : start + size], use_cache=True, **options)
        cache = cache if cache is not None else out[CACHE_ARGUMENT]
        parts.append(out.logits)
        start += size
    return torch.cat(parts, 1)


def padded(subject: Subject) -> str | None:
    """A row in a batch padded on the left equals the row alone."""
    rows = [subject.ids[0, :length] for length in PADDED]
    ids, mask = torch.zeros(2, len(rows), LENGTH, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, -len(tokens) :], mask[row, -len(tokens) :] = tokens, 1
    takes = {"position_ids"} & _arguments(subject.model)
    options = {name: (mask.cumsum(1) - 1).clamp(min=0) for name in takes}

    def error(model) -> float:
        with torch.no_grad():
            batch = logits(model, ids, attention_mask=mask, **options)
            alone = [logits(model, row[None])[0] for row in rows]
        pairs = [(batch[i, -len(row) :], expected) for i, (row, expected) in enumerate(zip(rows, alone, strict=True))]
        return max(subject.own_error(*pair) for pair in pairs)

    found, own = error(subject.applied()), error(subject.model)
    if found <= (3e-6 if subject.exact else 1e-3):
        return None
    subject.pads = own <= 1e-3
    assert found <= 10 * max(own, 1e-5), f"a padded row differs from the row alone by {found:.1e}, its own by {own:.1e}"
    return "padding as inexact as the model's own" if own > 1e-3 else None


def packed(subject: Subject) -> str | None:
    """Two documents in one row, told apart by their position ids, equal the documents alone, or are refused."""
    positions = torch.cat([torch.arange(length) for length in PACKED])[None]
    generator = torch.Generator().manual_seed(5)
    documents = [torch.randint(3, 45, (1, length), generator=generator) for length in PACKED]
    model = subject.applied()
    with torch.no_grad():
        alone = torch.cat([logits(model, document) for document in documents], 1)
        try:
            found = logits(model, torch.cat(documents, 1), position_ids=positions)
        except TypeError:
            return "no packing: it takes no position_ids"
        except ValueError as error:
            assert "pack" in str(error), f"packing is refused by: {error}"
            return "packing refused"
    try:
        subject.close(found, alone)
    except AssertionError as error:
        if "position_ids" not in inspect.signature(model.forward).parameters:
            return "no packing: it takes no position_ids"
        if _packed_apart(subject.model, documents, positions) > 1e-3:
            return "no packing, as without LRSA: it does not tell documents apart"
        raise AssertionError(f"packed documents against the documents alone: {error}") from None
    return None


def _packed_apart(model, documents, positions) -> float:
    """How far packed documents are from the documents alone, of the largest logit."""
    with torch.no_grad():
        found = logits(model, torch.cat(documents, 1), position_ids=positions)
        alone = torch.cat([logits(model, document) for document in documents], 1)
    return float((found - alone).abs().max()) / max(float(alone.abs().max()), 1e-3)


def _arguments(model) -> set[str]:
    names = set(inspect.signature(model.forward).parameters)
    return names | ({"position_ids"} if "kwargs" in names else set())


def generate(subject: Subject) -> str | None:
    """Greedy tokens over an `LRSACache` are those that one forward gives, and those of the row in a padded batch."""
    model, prompt = subject.applied(), subject.ids[:, :40]
    found, error = _greedy(model, prompt, LRSACache(CONFIG))
    if error > 1e-3:
        own = _greedy(subject.model, prompt)[1]
        assert own > 1e-3, f"generates with logits that differ by {error:.1e} from those of one forward"
        return "generates with other positions than one forward, as without LRSA"
    if subject.pads:
        batch, _ = _greedy(model, prompt, LRSACache(CONFIG), pads=15)
        if not torch.equal(batch, found):
            own = [_greedy(subject.model, prompt, pads=pads)[0] for pads in (0, 15)]
            assert not torch.equal(*own), "a padded prompt generates other tokens"
            return "generates other tokens from padded prompts, as without LRSA"
    return None


@torch.no_grad()
def _greedy(model, prompt: torch.Tensor, cache: LRSACache | None = None, pads: int = 0) -> tuple[torch.Tensor, float]:
    """Eight greedy tokens behind a prompt padded on the left; how far their logits are from those of one forward."""
    ids = torch.cat([torch.zeros(1, pads, dtype=torch.long), prompt], 1)
    mask = (torch.arange(ids.shape[1]) >= pads).long()[None]
    options = {} if cache is None else {CACHE_ARGUMENT: cache}
    model.generation_config.forced_eos_token_id = None
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    out = model.generate(input_ids=ids, attention_mask=mask, **settings, **options)
    expected = logits(model, out.sequences)[:, ids.shape[1] - 1 : -1]
    error = (torch.stack(out.logits, 1) - expected).abs().max() / expected.abs().max()
    return out.sequences[0, -8:], float(error)


def adapter(subject: Subject) -> str | None:
    """LoRA on all linear layers learns, and gradient checkpointing changes nothing."""
    try:
        tuned, expected = _tuned(subject.applied(), subject)
    except Exception as failure:
        try:
            _tuned(subject.model, subject)
        except type(failure):
            return "no LoRA on all linear layers, without LRSA neither"
        raise
    if not tuned.supports_gradient_checkpointing:
        return "no gradient checkpointing"
    for reentrant in (False, True):
        try:
            worst = _checkpointed(tuned, expected, subject, reentrant)
        except ValueError as error:
            assert reentrant and "gradient_checkpointing: false" in str(error), error
            return "gradient checkpointing with use_reentrant=True refused"
        assert worst <= (3e-6 if subject.exact else 1e-3), f"checkpointing changes gradients by {worst:.1e}"
    return None


def _checkpointed(tuned, expected: dict, subject: Subject, reentrant: bool) -> float:
    """How far gradients with checkpointing are from those without, of the largest."""
    tuned.enable_input_require_grads()
    tuned.zero_grad()
    tuned.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = _gradients(tuned, logits(tuned, subject.ids))
    assert found.keys() == expected.keys(), f"checkpointing loses {found.keys() ^ expected.keys()}"
    largest = max(float(x.abs().max()) for x in expected.values())
    return max(float((found[name] - expected[name]).abs().max()) for name in expected) / largest


def _tuned(model, subject: Subject):
    """A copy of a model with a random adapter on all linear layers, and the adapter's gradients."""
    torch.manual_seed(1)
    model = copy.deepcopy(model)
    kind = next(model.parameters()).dtype
    tuned = (
        get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).to(kind).train()
    )
    expected = _gradients(tuned, logits(tuned, subject.ids))
    assert expected and all(torch.isfinite(value).all() for value in expected.values()), "no finite gradients"
    return tuned, expected


def saved(subject: Subject) -> str | None:
    """A saved model that is loaded by the name "lrsa" gives the same, and `remove_lrsa` gives the model back."""
    model = subject.applied()
    with torch.no_grad():
        expected = logits(model, subject.ids)
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            again = reloaded(type(model), directory, next(model.parameters()).dtype)
        # Frequencies and scales that a model computes from its configuration come in another precision.
        subject.close(logits(again, subject.ids), expected, own_error=1e-5)
        own = logits(subject.model, subject.ids)
        left = logits(remove_lrsa(model), subject.ids)
    assert torch.equal(left, own), "remove_lrsa does not give the model back"
    return None


def reloaded(kind: type[PreTrainedModel], directory: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model from a directory, on the attention "lrsa"."""
    options = {"attn_implementation": "lrsa", "dtype": dtype}
    try:
        model = kind.from_pretrained(directory, experts_implementation="eager", **options)
    except (TypeError, ValueError) as error:
        if "experts" not in str(error):
            raise
        model = kind.from_pretrained(directory, **options)
    return model.to(dtype).eval()


CHECKS = [one_forward, gradients, over_the_cache, padded, packed, generate, adapter, saved]


def remarks(notes) -> str:
    return "; ".join(itertools.filterfalse(lambda note: not note, notes))
