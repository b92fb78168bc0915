"""The tiles that a row is cut into, and the kernels that compute them."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lrsa import lrsa_attention, select_tokens
from lrsa.attention.tiled import sdpa
from lrsa.attention.tiled.tiles import tiles
from lrsa.visibility import visible
from tests.lrsa.attention.cases import CONFIGS, assert_equal, inputs, run


@pytest.mark.parametrize("sizes", [(5, 20, True), (5, 40, False), (2**30, 2**30, False)])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_tiles_of_any_size_equal_reference(sizes, config, monkeypatch):
    """Few queries at a time, and the squares and large tiles that a GPU gets."""
    monkeypatch.setattr(sdpa, "sizes", lambda device: sizes)
    states, grad = inputs(1, 4, 2, 97)
    assert_equal(run(states, grad, config, impl="tiled"), run(states, grad, config, impl="reference"))


@pytest.mark.parametrize(
    "sizes", [(64, 1024, True), (4, 20, True), (3, 1, True), (5, 40, False), (2**30, 2**30, False)]
)
def test_every_pair_is_computed_once(sizes):
    """The tiles cover exactly the pairs that the rule names: no pair twice, none wasted."""
    for config in CONFIGS:
        if config.top_k == config.lag_size:
            continue
        for length in (config.dense_length + 1, 100, 131):
            found = torch.zeros(length, length, dtype=torch.long)
            states = torch.randn(1, 1, length, 4)
            index = select_tokens(states, states, config).index.flatten()
            compact = torch.cat([torch.arange(config.sink_size), index])
            for tile in tiles(length, config.sink_size, config.lag_size, config.top_k, True, *sizes):
                for block in range(tile.blocks):
                    rows = torch.arange(tile.rows) + tile.query + block * tile.step
                    columns = torch.arange(tile.columns) + tile.key + block * tile.key_step
                    columns = compact[columns] if tile.compact else columns
                    ones = torch.ones(len(rows), len(columns), dtype=torch.long)
                    found[rows[:, None], columns] += ones.tril(len(columns) - len(rows)) if tile.causal else ones
            positions = torch.arange(length)
            expected = visible(select_tokens(states, states, config), positions, length, config)
            assert torch.equal(found, expected[0, 0].long())


def test_matrix_products_equal_flash():
    """The kernels for devices and dtypes without flash, run here on the CPU."""
    (query, key, value), grad = inputs(1, 4, 2, 24)
    query, key, value = (x.detach() for x in (query, key, value))
    for causal, queries, keys in ((True, 24, 24), (True, 16, 20), (False, 24, 11)):
        args = (query[:, :, :queries], key[:, :, :keys], value[:, :, :keys])
        out, lse = sdpa.forward(*args, causal, 0.3, "flash")
        assert_equal(sdpa._products_forward(*args, causal, 0.3), (out, lse))
        backend = sdpa.backward(grad[:, :, :queries], *args, out, lse, causal, 0.3, "flash")
        assert_equal(sdpa._products_backward(grad[:, :, :queries], *args, out, lse, causal, 0.3), backend)


@pytest.mark.parametrize(("backend", "device"), [("flash", "cuda"), ("cudnn", "meta")])
def test_cuda_kernels_take_what_they_are_given(backend, device):
    """No GPU is needed to check names, order and shapes of the arguments; the numbers are for a machine with one."""
    with FakeTensorMode():
        query = torch.empty(3, 8, 24, 64, device=device, dtype=torch.bfloat16)
        key = torch.empty(3, 2, 40, 64, device=device, dtype=torch.bfloat16)
        out, lse = sdpa.forward(query, key, key, False, 0.1, backend)
        assert (out.shape, lse.shape, lse.dtype) == (query.shape, query.shape[:3], torch.float32)
        grads = sdpa.backward(out, query, key, key, out, lse, False, 0.1, backend)
        assert [x.shape for x in grads] == [query.shape, key.shape, key.shape]


def test_cudnn_needs_a_gpu():
    states, _ = inputs(1, 4, 2, 100)
    with pytest.raises(ValueError, match=r"impl='cudnn' takes fp16 or bf16 on an NVIDIA GPU.*got torch.float64 on cpu"):
        lrsa_attention(*states, CONFIGS[0], impl="cudnn")
