"""Peak memory of a call, beyond what was there before it: one measure for every benchmark, and for the tests."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable, *args, device: str = "cpu") -> int:
    """Largest sum of allocations that are live at once during `call(*args)`; what was allocated before is not counted.

    On a GPU by the caching allocator's own record, on a CPU by the events that its allocator sends to the profiler.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(*args)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call(*args)
    live = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
