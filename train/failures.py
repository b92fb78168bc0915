"""How a command ends before its end for another reason than a mistake in its settings, data or files."""

from __future__ import annotations

import errno

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: "try again later"
FAILED = 1
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RunStopped(Exception):
    """SIGTERM came, and a checkpoint was written; starting again with --resume goes on from there."""

    status = STOPPED


class RunFailed(Exception):
    """A command cannot go on: no memory or disk left, a busy port, a lost process or connection, a loss not finite."""

    status = FAILED


class ProcessLost(RunFailed):
    """Another process of the run is gone, perhaps the one that speaks for all."""
