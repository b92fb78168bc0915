"""What is assumed of accelerators: one table, from the vendors' data sheets. Only `cpu` is measured, when asked for."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch

# Shares of the peak that training reaches. Assumptions until they are measured on the device: 60% for whole
# layers (the frozen projections and everything around them), 45% for flash attention, forward and backward together.
LINEAR_EFFICIENCY = 0.60
ATTENTION_EFFICIENCY = 0.45
# LRSA reached 87% of what its number of pairs allows against dense attention, on a CPU (RESULTS.md); not yet on a GPU.
LRSA_EFFICIENCY = 0.87
# Share of a link's speed that all-to-all and all-gather reach, and GPUs of a node.
LINK_EFFICIENCY = 0.70
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Device:
    """An accelerator.

    Attributes:
        memory: bytes that a process can have.
        flops: dense matrix products per second at the training precision, at most; None when unknown.
        link, network: bytes per second that a GPU sends within a node, and to other nodes.
        on_cpu: whether it is one, where TRL's loss takes more memory and nothing is reserved by CUDA.
        linear, attention: shares of `flops` that are reached.
    """

    name: str
    memory: float
    flops: float | None = None
    link: float = 450e9
    network: float = 50e9
    on_cpu: bool = False
    linear: float = LINEAR_EFFICIENCY
    attention: float = ATTENTION_EFFICIENCY


# Memory as `torch.cuda.mem_get_info` reports it, not the label; bf16 without sparsity; NVLink per direction; a 400
# Gbit/s (A100: 200) network card per GPU.
DEVICES = {
    "h200": Device("H200", 139.8 * 2**30, 989e12),
    "h100": Device("H100", 79.1 * 2**30, 989e12),
    "a100": Device("A100", 79.1 * 2**30, 312e12, link=300e9, network=25e9),
    "a100-40": Device("A100 40GB", 39.4 * 2**30, 312e12, link=300e9, network=25e9),
}


def this_device(processes: int = 1, *, use_cpu: bool = False, measure: bool = False) -> Device:
    """The device that this process trains on; `measure` times a CPU by matrix products (half a second).

    Args:
        processes: that share the memory of a CPU.
    """
    if torch.cuda.is_available() and not use_cpu:
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        known = [d for name, d in DEVICES.items() if name.split("-")[0].upper() in found.name]
        flops = known[0].flops if known else None
        return Device(found.name, found.total_memory, flops)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes
    # What is measured is what a matrix product reaches; the rest of a layer is not one.
    return Device("CPU", memory, _cpu_flops() if measure else None, link=5e9, on_cpu=True, linear=0.6, attention=0.6)


def _cpu_flops(seconds: float = 0.5) -> float:
    """fp32 operations per second of a matrix product on this process's threads."""
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    left @ right
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        left @ right
        count += 1
    return count * 2 * 1024**3 / (time.perf_counter() - start)
