"""Compiles a C++ file of this package on first use, and keeps the library for later processes.

It needs a C++ compiler and nothing else: what is compiled is called through ctypes and knows nothing of PyTorch.
"""

from __future__ import annotations

import contextlib
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
    except OSError:  # no home, a full disk, one that is read-only or runs nothing: compiled again by the next process
        with tempfile.TemporaryDirectory(prefix="lrsa-") as folder:
            try:
                return _load(command, Path(folder), name)
            except OSError as error:
                raise CompilerError(f"what {compiler[0]} made cannot be loaded: {error}; check CXX") from error


def _load(command: list[str], folder: Path, name: str) -> ctypes.CDLL:
    library = folder / name
    if library.exists():
        with contextlib.suppress(OSError):  # cut off, or of another system: compiled anew below
            return ctypes.CDLL(str(library))
    folder.mkdir(parents=True, exist_ok=True)
    # Several processes may come here at once: each compiles a file of its own, and the last one's stays.
    handle, unfinished = tempfile.mkstemp(dir=folder, suffix=".so")
    os.close(handle)
    try:
        _run([*command, "-o", unfinished])
        loaded = ctypes.CDLL(unfinished)
        with open(unfinished, "rb") as written:  # on the disk before it has its name, lest it be found cut off
            os.fsync(written.fileno())
        os.chmod(unfinished, 0o755)
        os.replace(unfinished, library)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return loaded


def _cache() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lrsa"
    except RuntimeError as error:
        raise OSError("this user has no home") from error


def _compiler() -> list[str]:
    wanted = shlex.split(os.environ.get("CXX", ""))
    if wanted:
        if shutil.which(wanted[0]):
            return wanted
        raise CompilerError(f"CXX is {shlex.join(wanted)!r}, which is no command: unset it or name a C++ compiler")
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name]
    raise CompilerError("no C++ compiler was found: install g++ (or clang++), or name one in CXX")


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompilerError(f"{shlex.join(command)} failed:\n{done.stderr.strip()[:2000]}")
    return done.stdout
