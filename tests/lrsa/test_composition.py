"""The fast path under what people wrap around a model: autocast, compilers, selective checkpointing, benchmarks."""

import functools
import json

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lrsa import LRSAConfig, apply_lrsa, lrsa_attention, remove_lrsa, select_tokens
from lrsa.attention.cpu import kernel
from lrsa.attention.tiled import sdpa
from tests.tiny_run import ROOT, launch_here

CONFIG = LRSAConfig(3, 8, 2)


def loss_and_gradients(model, ids):
    model.zero_grad()
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_autocast(random_llama):
    """bf16 autocast costs LRSA no more than twice the error that it costs dense attention."""
    model = random_llama.float()
    ids = torch.randint(0, 48, (2, 80))
    errors = {}
    for name, switch in (("dense", remove_lrsa), ("lrsa", lambda m: apply_lrsa(m, CONFIG))):
        switch(model)
        # Weights of a size at which bf16 does not choose other tokens.
        _, exact = loss_and_gradients(model, ids[:, : CONFIG.dense_length + 8])
        with torch.autocast("cpu", torch.bfloat16):
            _, rounded = loss_and_gradients(model, ids[:, : CONFIG.dense_length + 8])
        errors[name] = ((rounded - exact).norm() / exact.norm()).item()
    assert 0 < errors["lrsa"] < 2 * errors["dense"]


def test_compiled_model(random_llama):
    """The attention stays eager inside a compiled model; numbers and gradients are the same."""
    model = apply_lrsa(random_llama, CONFIG)
    ids = torch.randint(0, 48, (2, 80))
    loss, gradients = loss_and_gradients(model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    compiled_loss, compiled_gradients = loss_and_gradients(compiled, ids)
    torch.testing.assert_close(compiled_loss, loss, atol=1e-12, rtol=0)
    torch.testing.assert_close(compiled_gradients, gradients, atol=1e-10, rtol=0)


def test_operators_are_registered_rightly():
    """PyTorch's own check of custom operators: schema, autograd, fake tensors and tracing."""
    states = [torch.randn(1, heads, 60, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    index = select_tokens(*states[1:], CONFIG).index
    for sinks in (None, torch.zeros(4, dtype=torch.float64, requires_grad=True)):
        torch.library.opcheck(torch.ops.lrsa.tiled.default, (*states, index, sinks, 3, 8, 0.3, "flash"))
        torch.library.opcheck(torch.ops.lrsa.native.default, (*states, index, sinks, 3, 8, 0.3, 0.0))


@pytest.mark.parametrize(("impl", "module", "function"), [("native", kernel, "_call"), ("tiled", sdpa, "forward")])
def test_selective_checkpointing_keeps_the_output(impl, module, function, monkeypatch):
    """With the operator on the list of what to keep, the backward does not compute the attention again."""
    calls = []
    true_function = getattr(module, function)
    monkeypatch.setattr(module, function, lambda *args: calls.append(args[0]) or true_function(*args))
    states = [torch.randn(1, heads, 60, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]

    def layer(query, key, value):
        return lrsa_attention(query.sin(), key.sin(), value.sin(), CONFIG, impl=impl)

    def policy(context, operator, *args, **kwargs):
        keep = operator == getattr(torch.ops.lrsa, impl).default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def gradients(**options):
        calls.clear()
        out = checkpoint(layer, *states, use_reentrant=False, **options)
        once = len(calls)
        found = torch.autograd.grad(out.sum(), states)
        return found, (len(calls) - calls.count("lrsa_backward")) / once

    plain, times = gradients()
    assert times == 2
    kept, times = gradients(context_fn=functools.partial(create_selective_checkpoint_contexts, policy))
    assert times == 1
    for one, other in zip(plain, kept, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("script", "options", "files"),
    [
        ("attention", "--lengths 64 128 --settings 16:4 --heads 4/2 --head-dim 8", ["attention.json", "attention.png"]),
        ("step", "--lengths 64 128 --setting 16:4 --layers 1", ["step.json"]),
        ("serving", "--cells 1x64 2x128 --decode 9 --setting 16:4 --layers 1", ["serving.json", "serving.md"]),
    ],
)
def test_benchmarks_run(script, options, files, tmp_path):
    options = ["--out", str(tmp_path), "--rounds", "1", "--threads", str(torch.get_num_threads()), *options.split()]
    found = launch_here(ROOT, f"benchmarks/{script}.py", *options)
    assert found.returncode == 0, found.stderr
    assert all((tmp_path / name).stat().st_size > 0 for name in files)
    rows = json.loads((tmp_path / files[0]).read_text())["rows"]
    assert {row["length"] for row in rows} == {64, 128}
    assert rows[-1].get("cache", 0) < 1, "the compressed cache is not the smaller one"
