"""What the scripts in `launch/` share: options, help with every setting, and one readable message for a mistake."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

from train.distributed import environment
from train.failures import FAILED, NO_SPACE, ProcessLost, RunFailed, RunStopped

PATIENCE = 20  # seconds


class Parser(argparse.ArgumentParser):
    """The options of a script; only the first process prints. Make it before torch and transformers are imported.

    Args:
        script: its name in `launch/`.
        doc: its docstring, which begins the help.
        settings: makes the text of the settings that end the help; the script then takes `--set` as well.
    """

    def __init__(self, script: str, doc: str, settings: Callable[[], str] | None = None):
        super().__init__(
            prog=f"launch/{script}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )  # fmt: skip
        environment.prepare()
        self._settings = settings
        # The DeepSpeed launcher appends it; accelerate reads the number from the environment.
        self.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)
        if settings is not None:
            self.add_argument(
                "--set", action="extend", nargs="+", default=[], metavar="section.key=value",
                help="replace settings of the file, for example --set lrsa.top_k=64 lora.r=8; values are YAML",
            )  # fmt: skip

    def format_help(self) -> str:
        return super().format_help() + (f"\n{self._settings()}" if self._settings else "")

    def error(self, message: str) -> None:
        _tell(f"{self.format_usage()}{self.prog}: error: {message}")
        sys.exit(2)


def run_settings() -> str:
    """Help on the settings of a run."""
    from train.settings.help import sections_help

    return sections_help()


def explain(job: Callable[[], object]) -> int:
    """Run `job`; a mistake in settings, data or files is printed once, without traceback.

    Returns:
        the exit status: 0, 2 for such a mistake, 75 when SIGTERM stopped a run and its checkpoint is written, 1 when a
        run could not go on.
    """
    try:
        job()
    except _mistakes() as error:
        _tell(f"\n{error}", patience=0 if isinstance(error, ProcessLost) else PATIENCE)
        return getattr(error, "status", 2)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        _tell(f"\n{error.filename or 'a file of the run'} could not be written: {error.strerror}. Free space and start "
              "the same command again, with --resume if it was training.")  # fmt: skip
        return FAILED
    return 0


def _tell(message: str, patience: int = PATIENCE) -> None:
    """Print in the first process. The others wait: a launcher ends all processes as soon as one of them fails, and the
    first one must have spoken by then. One that is still there after that has made its mistake alone, and says so."""
    if environment.rank() > 0:
        time.sleep(patience)
        message = f"process {environment.rank()}: {message}"
    print(message, file=sys.stderr, flush=True)


def _mistakes() -> tuple[type[Exception], ...]:
    from data import DataError
    from train.adapter import AdapterError
    from train.settings.errors import SettingsError

    return (SettingsError, DataError, AdapterError, RunStopped, RunFailed)
