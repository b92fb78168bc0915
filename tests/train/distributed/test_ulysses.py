"""Ulysses in fp64: rows that several processes share, against the same rows on one."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import HfDeepSpeedConfig
from transformers import LlamaConfig, LlamaForCausalLM

from lrsa import LRSAConfig, apply_lrsa, lrsa_attention
from tests.lrsa.models.build import build
from tests.tiny_run import free_port, make_workplace
from train.distributed.requirements import check_sequence_parallel
from train.distributed.ulysses import (
    parallelism_config,
    share_rows,
)
from train.settings.defaults import with_defaults
from train.settings.errors import SettingsError
from train.settings.load import load_settings

CONFIG = LRSAConfig(sink_size=3, lag_size=8, top_k=2)
LENGTHS = (93, 50)  # neither their length nor their end falls on the border of a slice


def model(layers: int = 2) -> LlamaForCausalLM:
    """Eight query heads over two KV heads, so that four processes need every KV head twice."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    return apply_lrsa(LlamaForCausalLM(config).double().train(), CONFIG)


def batch(multiple: int) -> dict[str, torch.Tensor]:
    """Two rows as TRL pads them, with labels that are shifted already."""
    width = -(-max(LENGTHS) // multiple) * multiple
    ids = torch.randint(48, (2, 128), generator=torch.Generator().manual_seed(1))[:, :width]
    position = torch.arange(width).expand(2, -1)
    real = position < torch.tensor(LENGTHS)[:, None]
    labels = torch.where(position + 1 < torch.tensor(LENGTHS)[:, None], ids.roll(-1, 1), -100)
    return {"input_ids": ids, "position_ids": position * real, "attention_mask": real.long(), "labels": labels}


def gradients(network, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the losses, and all gradients behind each other."""
    labels = inputs.pop("labels")
    logits = network(**inputs, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in network.parameters()])


def shared(rank: int, size: int, port: int, out: str) -> None:
    """One of `size` processes; the first saves what they found together, and what they find with positions that each
    slice counts for itself."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    network, found = model(), []
    network.gradient_checkpointing_enable({"use_reentrant": False})
    UlyssesSPAttentionHF.register_with_transformers(network, "lrsa", size, micro_batch_size=len(LENGTHS))
    for own_positions in (False, True):
        whole = batch(size)
        width = whole["input_ids"].shape[1] // size
        inputs = {name: tensor[:, rank * width : (rank + 1) * width] for name, tensor in whole.items()}
        if own_positions:
            inputs["position_ids"] = torch.arange(width).expand(len(LENGTHS), -1)
        network.zero_grad()
        loss, grads = gradients(network, inputs)
        for tensor in (loss, grads):
            torch.distributed.all_reduce(tensor)
        found.append((loss, grads))
    if rank == 0:
        torch.save(found, out)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_shared_rows_equal_whole_ones(size, tmp_path):
    pytest.importorskip("deepspeed")
    loss, grads = gradients(model(), batch(1))
    dense, _ = gradients(apply_lrsa(model(), CONFIG.replace(top_k=CONFIG.lag_size)), batch(1))
    assert abs(dense - loss) > 1e-3 * loss, "too little is dropped to tell"
    out = tmp_path / "found.pt"
    torch.multiprocessing.spawn(shared, (size, free_port(), str(out)), nprocs=size)
    (found, found_grads), (broken, _) = torch.load(out)
    torch.testing.assert_close(found, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(found_grads, grads, rtol=0, atol=1e-12 * grads.abs().max().item())
    assert abs(broken - loss) > 1e-3 * loss, "positions of each slice alone would have gone unnoticed"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_at_position_0_is_no_part_of_a_row(side):
    """What ALST hands over: no mask, whole rows, and 0 as the position of every padding token."""
    torch.manual_seed(0)
    lengths, tokens = (61, 80, 33), 80
    real = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    real = real.flip(1) if side == "left" else real
    position = (real.cumsum(1) - 1).clamp(min=0) * real
    states = [torch.randn(3, heads, tokens, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    found = lrsa_attention(*states, CONFIG, position_ids=position).transpose(1, 2)[real]
    masked = lrsa_attention(*states, CONFIG, position_ids=position, attention_mask=real.long()).transpose(1, 2)[real]
    grad = torch.randn_like(found)
    pairs = zip(*(torch.autograd.grad(x, states, grad) for x in (found, masked)), strict=True)
    for ours, theirs in [(found, masked), *pairs]:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    dense = lrsa_attention(*states, CONFIG.replace(top_k=8), position_ids=position).transpose(1, 2)[real]
    assert not torch.allclose(found, dense, atol=1e-3), "nothing was dropped"


@pytest.fixture
def settings_with(tmp_path, byte_tokenizer, monkeypatch):
    """Reads a run's settings with overrides."""
    make_workplace(tmp_path, byte_tokenizer)
    monkeypatch.chdir(tmp_path)
    return lambda *overrides: with_defaults(load_settings("run.yaml", list(overrides)))


def test_ring_and_tensor_parallelism_are_refused_by_name(settings_with, monkeypatch, tmp_path):
    with pytest.raises(SettingsError, match=r"parallel\.cp_size: cannot be set here: ring context parallelism knows"):
        settings_with("parallel.cp_size=2")
    (tmp_path / "own.json").write_text(json.dumps({"tensor_parallel": {"autotp_size": 2}, "sequence_parallel_size": 2}))
    with pytest.raises(SettingsError) as error:
        settings_with("train.deepspeed=own.json")
    assert "sequence_parallel_size has no effect" in str(error.value) and "tensor_parallel cannot" in str(error.value)
    check_sequence_parallel(settings_with())
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    with pytest.raises(SettingsError, match=r"PARALLELISM_CONFIG_CP_SIZE: cannot be set in the environment: ring"):
        check_sequence_parallel(settings_with())


def test_what_cannot_be_shared_is_refused_all_at_once(settings_with, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SettingsError) as error:
        check_sequence_parallel(
            settings_with("parallel.sp_size=2", "train.packing=true", "train.pad_to_multiple_of=5", "eval.control=true")
        )
    assert [problem.field for problem in error.value.problems] == [
        "train.deepspeed",
        "parallel.sp_size",
        "train.pad_to_multiple_of",
        "train.per_device_train_batch_size",
        "eval.control",
    ]
    assert "parallel.sp_size must divide the number of processes (3), got 2" in str(error.value)


def arguments(size: int, **zero) -> SimpleNamespace:
    """The part of TRL's configuration that is looked at."""
    deepspeed = HfDeepSpeedConfig({"zero_optimization": {"stage": 3} | zero})
    return SimpleNamespace(parallelism_config=parallelism_config(size), hf_deepspeed_config=deepspeed)


def test_gradients_that_would_be_scaled_otherwise(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match=r"train\.deepspeed must not switch reduce_scatter off"):
        share_rows(arguments(2, reduce_scatter=False), model(), selection=False)


@pytest.mark.parametrize("size", [3, 16])
def test_heads_that_cannot_be_dealt_out(size, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(size))
    args = arguments(size)
    with pytest.raises(SettingsError, match=rf"must divide the model's 8 attention heads, .* 2 KV heads .* got {size}"):
        share_rows(args, model(), selection=False)


@pytest.mark.parametrize(
    ("family", "reason"),
    [("gpt_oss", "attention sinks"), ("llama4_text", "chunked attention"), ("youtu", "latent attention")]
    + [(family, "not told the positions") for family in ("gpt_bigcode", "persimmon", "moshi")]
    + [("gpt_neox", "no num_key_value_heads")],
)
def test_models_whose_heads_cannot_be_told_everything(family, reason, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match=rf"parallel\.sp_size must be 1 for .*{reason}"):
        share_rows(arguments(2), build(family), selection=False)


class ReadsItsTokens(LlamaForCausalLM):
    """What cannot be tried without data, since it asks for values before it attends."""

    def forward(self, input_ids, **options):
        assert input_ids.max().item() < self.config.vocab_size
        return super().forward(input_ids, **options)


def test_a_model_that_cannot_be_tried_without_data_is_not_refused_for_it(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    args = arguments(2)
    share_rows(args, ReadsItsTokens(model().config), selection=False)
    assert args.parallelism_config.sp_handler.sp_attn_implementation == "lrsa"


def test_copies_of_kv_heads_are_not_taught(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    args = arguments(4)
    share_rows(args, model(), selection=False)
    assert args.parallelism_config.sp_handler.sp_attn_implementation == "lrsa"
    with pytest.raises(SettingsError, match=r"must be at most the model's 2 KV heads with objective.selection, got 4"):
        share_rows(args, model(), selection=True)
