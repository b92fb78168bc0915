"""The compiled attention: tasks, panels and threads of any size, what is no number, machines without a build."""

import logging
from pathlib import Path

import pytest
import torch

from lrsa import LRSAConfig, lrsa_attention, select_tokens
from lrsa.attention import api
from lrsa.attention.cpu import build, kernel
from lrsa.attention.softmax import Softmax
from tests.lrsa.attention.cases import assert_equal, inputs, run

CONFIG = LRSAConfig(4, 16, 4)


@pytest.fixture
def no_memory():
    """Neither what was compiled nor what was chosen is remembered, before the test and after it."""

    def forget():
        build.load.cache_clear()
        api.choose.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tokens", "config"),
    [
        (8, 1, 700, LRSAConfig(5, 200, 50)),  # a window is more than one task
        (12, 4, 300, LRSAConfig(0, 33, 7)),  # three heads share a KV head, windows are no multiple of anything
        (1, 1, 260, LRSAConfig(70, 30, 29)),  # one head; a sink longer than two windows
        (2, 1, 500, LRSAConfig(2, 2, 1)),  # windows shorter than a panel, more kept tokens than a block holds
    ],
)
def test_tasks_and_blocks_of_any_size(heads, kv_heads, tokens, config):
    states, grad = inputs(1, heads, kv_heads, tokens)
    assert_equal(run(states, grad, config, impl="native"), run(states, grad, config, impl="reference"), 1e-11)


@pytest.mark.parametrize("new", [1, 15, 17, 40, 99, 100])
def test_fewer_queries_than_keys(new):
    """The queries are the last of the row, as over a cache."""
    states, grad = inputs(2, 4, 2, 100)
    query, key, value = states
    for config in (CONFIG, LRSAConfig(0, 7, 3)):
        found = api.attend_rows(query[:, :, -new:], key, value, config, Softmax(0.3), "native")
        expected = lrsa_attention(*states, config, scale=0.3, impl="reference")[:, :, -new:]
        outs = [[out, *torch.autograd.grad(out, states, grad[:, :, -new:])] for out in (found, expected)]
        assert_equal(*outs)


def test_any_number_of_threads(threads):
    """Fewer KV heads than threads share the windows: the parts add up, in the same order every time."""
    states, grad = inputs(1, 4, 1, 400)
    expected = run(states, grad, CONFIG, impl="reference")
    for count in (1, 2, 3, 8):
        threads(count)
        first = run(states, grad, CONFIG, impl="native")
        assert_equal(first, expected)
        assert all(torch.equal(*pair) for pair in zip(first, run(states, grad, CONFIG, impl="native"), strict=True))


def test_padded_panels_weigh_nothing():
    """Scores far below zero: a padding query of score 0 would outweigh all others by 2^128, which is no number."""
    (*_, value), grad = inputs(1, 1, 1, 100, dtype=torch.float32)
    for size in (92.65, 93.0, 300.0, 1e4):
        states = [torch.zeros(1, 1, 100, 8) for _ in "qk"]
        states[0][..., 0], states[1][..., 0] = -size, 1.0
        leaves = [x.requires_grad_() for x in (*states, value.detach().clone())]
        found, expected = (run(leaves, grad, CONFIG, impl=impl, scale=1.0) for impl in ("native", "reference"))
        for one, other in zip(found, expected, strict=True):  # a score of that size is rounded to eps times it
            assert (one - other).norm() <= 4 * torch.finfo(torch.float32).eps * size * (1 + other.norm())


def test_no_thread_is_left_without_work():
    for heads, threads in ((1, 2), (2, 2), (3, 2), (2, 7), (8, 64), (64, 8), (0, 4)):
        parts = kernel._parts(heads, threads)
        assert heads == 0 or heads * parts >= threads
        assert heads * parts < 2 * max(heads, threads) or parts == 2  # memory: gradients of keys for every part


def test_large_scores_and_no_numbers():
    """Scores of any size are finite; what is no number reaches every query that sees it, and no other KV head."""
    (query, key, value), _ = inputs(1, 4, 2, 100, dtype=torch.float32)
    large = [x.detach() * 1e3 for x in (query, key)]
    found, expected = (lrsa_attention(*large, value, CONFIG, impl=impl) for impl in ("native", "reference"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for token in (0, 50, 99):
        broken = query.detach().clone()
        broken[0, 1, token] = float("nan")
        bad = lrsa_attention(broken, key, value, CONFIG, impl="native").isnan().any(-1).nonzero().tolist()
        assert bad == [[0, 1, token]]
    broken = key.detach().clone()
    broken[0, 1, 2] = float("nan")  # in the sink, which all see
    for states in ((query, broken, value), (query, key, broken)):
        bad = lrsa_attention(*states, CONFIG, impl="native").isnan().any(-1)
        assert bad[0, 2:, 2:].all() and not bad[0, :2].any()


def test_bf16_is_fp32_rounded_once():
    """The kernel reads halves and computes in fp32: out and dq are the fp32 numbers, rounded to the nearest."""
    states, grad = inputs(1, 4, 2, 200, 16, torch.bfloat16)
    states = [x.detach() for x in states]
    index = select_tokens(*states[1:], CONFIG).index
    numbers = (CONFIG.sink_size, CONFIG.lag_size, 0.3, 0.0)
    exact = [x.float() for x in states]
    out, lse = kernel._attend(*states, index, None, *numbers)
    exact_out, exact_lse = kernel._attend(*exact, index, None, *numbers)
    assert torch.equal(out, exact_out.bfloat16()) and torch.equal(lse, exact_lse)
    grads = kernel._attend_backward(grad, *states, out, lse, index, *numbers)
    exact_grads = kernel._attend_backward(grad.float(), *exact, out.float(), lse, index, *numbers)
    assert all(torch.equal(x, y.bfloat16()) for x, y in zip(grads, exact_grads, strict=True))


def test_exponential():
    """One query whose weights are powers of two over the whole range of fp32."""
    config = LRSAConfig(0, 100, 1)
    query = torch.ones(1, 1, 300, 1)
    key = torch.linspace(-100, 0, 300).view(1, 1, 300, 1)
    value = torch.eye(300)[None, None]
    query, key = (torch.nn.functional.pad(x, (0, 299)) for x in (query, key))
    found, truth = (
        lrsa_attention(*(x.to(dtype) for x in (query, key, value)), config, scale=1.0, impl=impl)
        for dtype, impl in ((torch.float32, "native"), (torch.float64, "reference"))
    )
    far = truth > 1e-36
    allowed = 300 * torch.finfo(torch.float32).eps  # a score of up to 100 is rounded, and again times log2(e)
    assert ((found[far] - truth[far]).abs() <= allowed * truth[far]).all()
    assert (found[~far] < 2e-36).all()


def test_without_a_compiler(no_memory, monkeypatch, caplog):
    """Asked for by name it says what is missing; by itself it takes another implementation and says why, once."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    states, grad = inputs(1, 4, 2, 100)
    expected = run(states, grad, CONFIG, impl="reference")
    with pytest.raises(build.CompilerError, match=r"CXX is 'no-such-compiler', which is no command: unset it"):
        lrsa_attention(*states, CONFIG, impl="native")
    with caplog.at_level(logging.WARNING, logger="lrsa"):
        for _ in range(2):
            assert_equal(run(states, grad, CONFIG), expected)
    assert len(caplog.records) == 1 and "no-such-compiler" in caplog.text


def test_no_compiler_at_all(no_memory, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(build.CompilerError, match=r"no C\+\+ compiler was found: install g\+\+"):
        kernel.library(torch.float32)


def test_a_library_that_was_cut_off_is_made_anew(no_memory, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernel.library(torch.float64)
    (library,) = (tmp_path / "lrsa").iterdir()
    library.unlink()  # what is loaded stays loaded, whatever lies there next
    library.write_bytes(b"")
    build.load.cache_clear()
    states, grad = inputs(1, 4, 2, 100)
    assert_equal(run(states, grad, CONFIG, impl="native"), run(states, grad, CONFIG, impl="reference"))
    assert [file.stat().st_size > 1000 for file in (tmp_path / "lrsa").iterdir()] == [True]


def test_what_changed_is_compiled_anew(no_memory, monkeypatch, tmp_path):
    """The source, a header beside it and a macro: an update never meets what an older version left."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source, header = tmp_path / "sum.cpp", tmp_path / "part.h"
    answers = []
    for text, part, macro in (("0", 1, 1), ("10", 1, 1), ("10", 2, 1), ("10", 2, 5), ("0", 1, 1)):
        source.write_text(f'#include "part.h"\nextern "C" int sum() {{ return {text} + PART + MACRO; }}')
        header.write_text(f"#define PART {part}")
        build.load.cache_clear()
        answers.append(build.load(source, f"MACRO={macro}").sum())
    assert answers == [2, 12, 13, 17, 2]
    assert len(list((tmp_path / "cache/lrsa").iterdir())) == 4


def test_a_compiler_that_makes_nothing(no_memory, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "true")
    with pytest.raises(build.CompilerError, match=r"what true made cannot be loaded: .*check CXX"):
        kernel.library(torch.float32)
    assert not list((tmp_path / "lrsa").iterdir())


def test_a_compiler_that_fails_is_quoted(no_memory, monkeypatch, tmp_path):
    script = tmp_path / "cxx"
    script.write_text('#!/bin/sh\ncase "$*" in *-dM*) exit 0;; esac\necho "the disk is on fire" >&2\nexit 3\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(build.CompilerError, match=r"(?s)-O3.* failed:.the disk is on fire"):
        kernel.library(torch.float32)


@pytest.mark.parametrize("writable", [True, False])
def test_where_the_library_lies(no_memory, monkeypatch, tmp_path, writable):
    """In the cache folder, under a name that the source and the compiler decide; elsewhere when that is closed."""
    home = tmp_path / "home"
    if writable:
        home.mkdir()
    else:
        home.write_text("a file, where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    states, grad = inputs(1, 4, 2, 100)
    assert_equal(run(states, grad, CONFIG, impl="native"), run(states, grad, CONFIG, impl="reference"))
    if writable:
        (library,) = (home / "lrsa").iterdir()
        made = library.stat().st_mtime_ns
        build.load.cache_clear()
        kernel.library(torch.float64)
        assert library.stat().st_mtime_ns == made
        kernel.library(torch.float32)
        assert len(list((home / "lrsa").iterdir())) == 2


def test_dtypes_that_differ():
    states = [torch.randn(1, heads, 100, 8) for heads in (4, 2, 2)]
    states[1] = states[1].bfloat16()
    with pytest.raises(ValueError, match=r"must have one dtype, got torch.float32, torch.bfloat16 and torch.float32"):
        kernel.attend(*states, None, CONFIG, Softmax(0.3))
    with pytest.raises(ValueError, match=r"fp16, bf16, fp32 or fp64, got torch.int64"):
        kernel.attend(*(x.long() for x in (states[0], states[0], states[0])), None, CONFIG, Softmax(0.3))


def test_empty_batch():
    states = [torch.randn(0, heads, 100, 8, requires_grad=True) for heads in (4, 2, 2)]
    out = lrsa_attention(*states, CONFIG, impl="native")
    assert out.shape == (0, 4, 100, 8)
    assert all(x.shape == y.shape for x, y in zip(torch.autograd.grad(out.sum(), states), states, strict=True))


def test_the_wheel_ships_the_sources():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has it")
    package = Path(kernel.__file__).parents[2]
    settings = tomllib.loads((package.parent / "pyproject.toml").read_text())
    shipped = settings["tool"]["setuptools"]["package-data"]["lrsa"]
    others = [f for f in package.rglob("*") if f.is_file() and f.suffix not in (".py", ".pyc")]
    assert len(others) >= 2
    assert all(any(f.match(f"lrsa/{pattern}") for pattern in shipped) for f in others), others


def test_only_on_a_cpu():
    states = [torch.empty(1, heads, 100, 8, device="meta") for heads in (4, 2, 2)]
    with pytest.raises(ValueError, match="runs on a CPU, got tensors on meta"):
        kernel.attend(*states, None, CONFIG, Softmax(0.3))
