"""How a run ends before its end: stopped from outside, or by something that no change of a setting alone would mend."""

from __future__ import annotations

import errno

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: "try again later"
FAILED = 1
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RunStopped(Exception):
    """SIGTERM came, and a checkpoint was written; starting again with --resume goes on from there."""

    status = STOPPED


class RunFailed(Exception):
    """Training cannot go on: a full disk, a loss that is not finite, a process that is gone."""

    status = FAILED


class ProcessLost(RunFailed):
    """Another process of the run is gone, perhaps the one that speaks for all."""
