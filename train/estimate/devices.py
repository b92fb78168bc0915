"""Accelerators that a run can be planned for, and the one that this process has."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """An accelerator.

    Attributes:
        memory: bytes that a process can have.
        on_cpu: whether it is a CPU, where TRL's loss takes more memory and nothing is reserved by CUDA.
    """

    name: str
    memory: float
    on_cpu: bool = False


# Memory as `torch.cuda.mem_get_info` reports it, not the label.
DEVICES = {
    "h200": Device("H200", 139.8 * 2**30),
    "h100": Device("H100", 79.1 * 2**30),
    "a100": Device("A100", 79.1 * 2**30),
    "a100-40": Device("A100 40GB", 39.4 * 2**30),
}


def this_device(processes: int = 1, *, use_cpu: bool = False) -> Device:
    """The device that this process trains on.

    Args:
        processes: that share the memory of a CPU.
    """
    if torch.cuda.is_available() and not use_cpu:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return Device(properties.name, properties.total_memory)
    return Device("CPU", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes, on_cpu=True)
