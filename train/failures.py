"""How a job ends early for reasons outside its settings; `launch/` prints the text and exits with `status`."""

from __future__ import annotations

import errno

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: "try again later"
FAILED = 1
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RunStopped(Exception):
    """SIGTERM came, and a checkpoint was written; starting again with --resume continues from it."""

    status = STOPPED


class RunFailed(Exception):
    """The job cannot go on: no memory, a full disk, a busy port, a loss that is not finite, a broken upload."""

    status = FAILED


class ProcessLost(RunFailed):
    """Another process of the run has died, perhaps the one that prints for all."""


# PyTorch raises these as plain RuntimeErrors on a CPU and with gloo: their text is all that tells them apart.
def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device had no memory left."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether a connection to another process broke."""
    import torch.distributed

    return isinstance(error, torch.distributed.DistError) or "onnection" in str(error)


def first_line(error: BaseException) -> str:
    """An error's own message without the C++ stack that PyTorch may append."""
    return f"{error}".strip().partition("\n")[0]
