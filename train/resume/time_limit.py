"""Training for a number of minutes: when to stop, and a learning rate that falls with the time instead of the steps."""

from __future__ import annotations

import time

from torch.optim.lr_scheduler import LambdaLR, LRScheduler


class TimeLimit:
    """How long an adapter has been trained, over all starts of its run, and how long it may be.

    Args:
        minutes: the limit; None for none.

    Attributes:
        spent: minutes until the end of the last step, the same on every process.
    """

    def __init__(self, minutes: float | None):
        self.minutes = minutes
        self.start(0.0)

    def start(self, spent: float) -> None:
        """Count on from what earlier starts have spent."""
        self.spent, self._begin = spent, time.monotonic() - 60 * spent

    def now(self) -> float:
        """Minutes spent, by the clock of this process."""
        return (time.monotonic() - self._begin) / 60

    @property
    def is_over(self) -> bool:
        return self.minutes is not None and self.spent >= self.minutes

    def drive(self, scheduler: LRScheduler, steps: int, warmup: int) -> None:
        """Behind the warm-up, read a schedule over `steps` steps at the share of the time that is spent, or of the
        steps if that is more. Schedules without a length stay as they are."""
        if self.minutes is None or not isinstance(scheduler, LambdaLR):
            return

        def by_time(factor):
            return lambda step: factor(step if step < warmup else max(step, min(self.spent / self.minutes, 1) * steps))

        scheduler.lr_lambdas = [by_time(factor) for factor in scheduler.lr_lambdas]
