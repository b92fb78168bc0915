"""Compiles a C++ file of this package on first use, and keeps the library for later processes.

It needs a C++ compiler and nothing else: what is compiled is called through ctypes and knows nothing of PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-fPIC", "-shared")


class CompilerError(RuntimeError):
    """There is no C++ compiler, or it refused the file; the message says which and what to do."""


@functools.cache
def load(source: Path, *definitions: str) -> ctypes.CDLL:
    """The compiled library of a C++ file.

    Args:
        source: the file; it may include headers that lie beside it.
        definitions: macros, `NAME=value`.

    Returns:
        The library. It lies in `$XDG_CACHE_HOME/lrsa` (`~/.cache/lrsa`) under a name made of the source, the compiler
        and the instructions of this CPU, so that machines can share a home and an update compiles anew.

    Raises:
        CompilerError: when it cannot be compiled.
    """
    compiler = _compiler()
    native = "-march=native" if platform.machine().lower() in ("x86_64", "amd64") else "-mcpu=native"
    macros = _run([*compiler, native, "-dM", "-E", "-x", "c++", os.devnull])
    # GCC's OpenMP is the one of PyTorch's own builds, so that threads are shared; clang's would be a second one.
    threads = "-pthread" if "__clang__" in macros else "-fopenmp"
    command = [*compiler, *FLAGS, native, threads, *(f"-D{definition}" for definition in definitions), str(source)]
    texts = [file.read_text() for file in (source, *sorted(source.parent.glob("*.h")))]
    key = hashlib.sha256("\0".join([*command[:-1], macros, *platform.libc_ver(), *texts]).encode()).hexdigest()
    name = f"{source.stem}-{key[:16]}.so"
    try:
        return _load(command, _cache(), name)
    except OSError:  # no home, a full or read-only disk: compiled again by the next process
        with tempfile.TemporaryDirectory(prefix="lrsa-") as folder:
            return _load(command, Path(folder), name)


def _load(command: list[str], folder: Path, name: str) -> ctypes.CDLL:
    library = folder / name
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Several processes may come here at once: each compiles a file of its own, and the last one's stays.
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".so", delete=False) as file:
            unfinished = Path(file.name)
        try:
            _run([*command, "-o", str(unfinished)])
            unfinished.chmod(0o755)
            unfinished.replace(library)
        finally:
            unfinished.unlink(missing_ok=True)
    return ctypes.CDLL(str(library))


def _cache() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lrsa"
    except RuntimeError as error:
        raise OSError("this user has no home") from error


def _compiler() -> list[str]:
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for command in map(shlex.split, wanted):
        if command and shutil.which(command[0]):
            return command
    raise CompilerError(f"no C++ compiler was found ({', '.join(wanted)}): install g++ or clang++, or name one in CXX")


def _run(command: list[str]) -> str:
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise CompilerError(f"{shlex.join(command)} failed:\n{found.stderr.strip()[:2000]}")
    return found.stdout
