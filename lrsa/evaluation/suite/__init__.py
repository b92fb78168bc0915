"""The long-context suite: retrieval over lengths and depths, real questions, loss by position, RULER and LongBench."""

from lrsa.evaluation.suite.report import save_suite
from lrsa.evaluation.suite.run import TASKS, Suite, long_context

__all__ = ["TASKS", "Suite", "long_context", "save_suite"]
