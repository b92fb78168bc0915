"""What a model has to do under LRSA to count as one that works, each an equality with a stated tolerance. A check
returns a remark for the table, or nothing, and raises `AssertionError` when the model is wrong."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import tempfile

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from lrsa import LRSACache, apply_lrsa, remove_lrsa
from lrsa.cache import CACHE_ARGUMENT
from tests.lrsa.models.oracle import oracle
from tests.lrsa.models.subject import CONFIG, KINDS_OF_TOKENS, Subject, fails_alike, logits, shown


def one_forward(subject: Subject) -> str | None:
    """One forward over a row equals the oracle."""
    with torch.no_grad():
        subject.close(logits(subject.applied(), subject.ids, **subject.image), subject.expected)
    if "compressed" not in subject.kinds:
        return "nothing to compress"
    assert float((subject.expected - subject.own).abs().max()) > 1e-3, "the oracle hides nothing"
    return None


def gradients(subject: Subject) -> str | None:
    """The gradients of all parameters equal those of the oracle."""
    model = copy.deepcopy(subject.model)
    with oracle(model, CONFIG):
        expected = _gradients(model, logits(model, subject.ids, **subject.image))
    model = subject.applied()
    found = _gradients(model, logits(model, subject.ids, **subject.image))
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
    chunkings = {"one chunk": [subject.length], "chunks": [25, 1, 9, 20], "tokens": [1] * subject.length}
    chunkings["chunks"] += [subject.length - 55]
    for name, chunks in chunkings.items():
        if subject.head > chunks[0]:  # the image comes with the first chunk
            sizes = torch.tensor(chunks).cumsum(0)
            chunks = [subject.head, *sizes[sizes > subject.head].diff(prepend=torch.tensor([subject.head])).tolist()]
        own_error = 0.0
        with contextlib.suppress(Exception):
            own_error = subject.own_error(_fed(subject, subject.model, chunks, None), subject.own)
        cache = LRSACache(CONFIG)
        found = _fed(subject, subject.applied(), chunks, cache)
        try:
            subject.close(found, subject.expected, own_error)
        except AssertionError as error:
            raise AssertionError(f"{name} over the cache: {error}") from None
    return None


def _fed(subject: Subject, model, chunks, cache) -> torch.Tensor:
    parts, start = [], 0
    for size in chunks:
        options = {} if cache is None else {CACHE_ARGUMENT: cache}
        given = {"input_ids": subject.ids[:, start : start + size]}
        if subject.image and not start:
            given = subject.inputs(size)
            del given["attention_mask"]
        with torch.no_grad():
            out = model(**given, use_cache=True, **options)
        cache = cache if cache is not None else out[CACHE_ARGUMENT]
        parts.append(shown(out.logits))
        start += size
    return torch.cat(parts, 1)


def padded(subject: Subject) -> str | None:
    """A row in a batch padded on the left equals the row alone."""
    lengths = (subject.length, max(33, subject.head + 3))
    batch = subject.batch([subject.inputs(length, subject.length - length) for length in lengths])
    if "position_ids" in _arguments(subject.model) and not (subject.image and _counts(subject.model)):
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)

    def error(model) -> float:
        with torch.no_grad():
            found = logits(model, **batch)
            alone = [logits(model, **subject.inputs(length))[0] for length in lengths]
        pairs = zip(found, alone, lengths, strict=True)
        return max(subject.own_error(row[-length:], expected) for row, expected, length in pairs)

    found, own = error(subject.applied()), error(subject.dense())
    if found <= (3e-6 if subject.exact else 1e-3):
        return None
    subject.pads = own <= 1e-3
    assert found <= 10 * max(own, 1e-5), f"a padded row differs from the row alone by {found:.1e}, its own by {own:.1e}"
    return "padding as inexact as the model's own" if own > 1e-3 else None


def packed(subject: Subject) -> str | None:
    """Two documents in one row, told apart by their position ids, equal the documents alone, or are refused.

    The first has the image; then each is given its positions, because two dimensions of them are not what models that
    count in three make themselves.
    """
    first = subject.inputs(max(37, subject.head + 12))
    del first["attention_mask"]
    second = {"input_ids": torch.randint(3, 45, (1, 33), generator=torch.Generator().manual_seed(5))}
    places = [torch.arange(document["input_ids"].shape[1])[None] for document in (first, second)]
    row = first | {name: F.pad(first[name], (0, 33)) for name in KINDS_OF_TOKENS if name in first}
    row |= {"input_ids": torch.cat([first["input_ids"], second["input_ids"]], 1), "position_ids": torch.cat(places, 1)}
    if subject.image:
        first["position_ids"], second["position_ids"] = places
    model = subject.applied()
    with torch.no_grad():
        try:
            alone = torch.cat([logits(model, **document) for document in (first, second)], 1)
            found = logits(model, **row)
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
        with torch.no_grad():
            own = torch.cat([logits(subject.model, **document) for document in (first, second)], 1)
            own_error = subject.own_error(logits(subject.model, **row), own)
        if own_error > 1e-3:
            return "no packing, as without LRSA: it does not tell documents apart"
        raise AssertionError(f"packed documents against the documents alone: {error}") from None
    return None


def _counts(model) -> bool:
    """Whether a model counts positions itself, in three dimensions, when an image comes."""
    return any(hasattr(module, "get_rope_index") for module in model.modules())


def _arguments(model) -> set[str]:
    names = set(inspect.signature(model.forward).parameters)
    return names | ({"position_ids"} if "kwargs" in names else set())


def generate(subject: Subject) -> str | None:
    """Greedy tokens over an `LRSACache` are those that one forward gives, and those of the row in a padded batch."""
    model = subject.applied()
    try:
        found, error = _greedy(subject, model, LRSACache(CONFIG))
    except Exception as failure:
        if fails_alike(failure, lambda: _greedy(subject, subject.dense())):
            return "generates in a way of its own"
        raise
    if not error <= 1e-3:
        own = _greedy(subject, subject.dense())[1]
        assert error <= 10 * own, f"generates with logits that differ by {error:.1e} from those of one forward"
        return "generates with other positions than one forward, as without LRSA"
    if subject.pads:
        try:
            batch, _ = _greedy(subject, model, LRSACache(CONFIG), pads=15)
        except ValueError as error:
            assert "first real token" in str(error), error
            return "generation from padded prompts refused"
        if not torch.equal(batch, found):
            own = [_greedy(subject, subject.dense(), pads=pads)[0] for pads in (0, 15)]
            assert not torch.equal(*own), "a padded prompt generates other tokens"
            return "generates other tokens from padded prompts, as without LRSA"
    return None


@torch.no_grad()
def _greedy(subject: Subject, model, cache: LRSACache | None = None, pads: int = 0) -> tuple[torch.Tensor, float]:
    """Eight greedy tokens behind a prompt padded on the left; how far their logits are from those of one forward."""
    prompt = max(40, subject.head + 3)
    options = {} if cache is None else {CACHE_ARGUMENT: cache}
    model.generation_config.forced_eos_token_id = None
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    settings |= {"suppress_tokens": list(range(50, 55))} if subject.image else {}  # no further images
    out = model.generate(**subject.inputs(prompt, pads), **settings, **options)
    whole = subject.inputs(prompt + 8) | {"input_ids": out.sequences[:, pads:]}
    del whole["attention_mask"]
    expected = logits(model, **whole)[:, prompt - 1 : -1]
    error = (shown(torch.stack(out.logits, 1)) - expected).abs().max() / expected.abs().max()
    return out.sequences[0, -8:], float(error)


def adapter(subject: Subject) -> str | None:
    """LoRA on all linear layers learns, and gradient checkpointing changes nothing."""
    try:
        tuned, expected = _tuned(subject.applied(), subject)
    except Exception as failure:
        if fails_alike(failure, lambda: _tuned(subject.model, subject)):
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
        except AssertionError as lost:
            if fails_alike(lost, lambda: _checkpointed(*_tuned(subject.model, subject), subject, True)) and reentrant:
                return "gradient checkpointing with use_reentrant=True changes gradients, without LRSA too"
            raise
        if not worst <= (3e-6 if subject.exact else 1e-3):
            own = _checkpointed(*_tuned(subject.model, subject), subject, reentrant)
            assert worst <= 10 * own < float("inf"), f"checkpointing changes gradients by {worst:.1e}"
            return f"gradient checkpointing with use_reentrant={reentrant} changes gradients, without LRSA too"
    return None


def _checkpointed(tuned, expected: dict, subject: Subject, reentrant: bool) -> float:
    """How far gradients with checkpointing are from those without, of the largest."""
    tuned.enable_input_require_grads()
    tuned.zero_grad()
    tuned.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = _gradients(tuned, logits(tuned, subject.ids, **subject.image))
    lost = expected.keys() ^ found.keys()
    assert not lost, f"checkpointing loses the gradients of {sorted(lost)}"
    largest = max(float(x.abs().max()) for x in expected.values())
    return max(float((found[name] - expected[name]).abs().max()) for name in expected) / largest


def _tuned(model, subject: Subject):
    """A copy of a model with a random adapter on all linear layers, and the adapter's gradients."""
    torch.manual_seed(1)
    model = copy.deepcopy(model)
    kind = next(model.parameters()).dtype
    config = LoraConfig(r=2, target_modules="all-linear", exclude_modules=r".*\bvis.*", init_lora_weights=False)
    tuned = get_peft_model(model, config).to(kind).train()
    expected = _gradients(tuned, logits(tuned, subject.ids, **subject.image))
    assert expected and all(torch.isfinite(value).all() for value in expected.values()), "no finite gradients"
    return tuned, expected


def saved(subject: Subject) -> str | None:
    """A saved model that is loaded by the name "lrsa" gives the same, and `remove_lrsa` gives the model back.

    The name alone would set the encoders of images too, so `apply_lrsa` sets models that have one.
    """
    model = subject.applied()
    with torch.no_grad():
        expected = logits(model, subject.ids, **subject.image)
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            sees = hasattr(model.config, "vision_config") or hasattr(model.config, "vq_config")
            again = reloaded(type(model), directory, next(model.parameters()).dtype, "eager" if sees else "lrsa")
            if sees:
                apply_lrsa(again, CONFIG)
        # Frequencies and scales that a model computes from its configuration come in another precision.
        subject.close(logits(again, subject.ids, **subject.image), expected, own_error=1e-5)
        own = logits(subject.model, subject.ids, **subject.image)
        left = logits(remove_lrsa(model), subject.ids, **subject.image)
    assert torch.equal(left, own), "remove_lrsa does not give the model back"
    return None


def reloaded(kind: type[PreTrainedModel], directory: str, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """A model from a directory, on an attention by its name."""
    options = {"attn_implementation": attention, "dtype": dtype}
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
