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
        source: the file.
        definitions: macros, `NAME=value`.

    Returns:
        The library. It lies in `$XDG_CACHE_HOME/lrsa` (`~/.cache/lrsa`) under a name made of the source, the compiler
        and the instructions of this CPU, so that machines can share a home and an update compiles anew.

    Raises:
        CompilerError: when it cannot be compiled.
    """
    native = "-march=native" if platform.machine().lower() in ("x86_64", "amd64") else "-mcpu=native"
    compiler = _compiler()
    macros = _run([*compiler, native, "-dM", "-E", "-x", "c++", os.devnull])
    # GCC's OpenMP is PyTorch's, whose threads are shared then; with clang there would be two of them.
    threads = "-pthread" if "__clang__" in macros else "-fopenmp"
    command = [*compiler, *FLAGS, native, threads, *(f"-D{definition}" for definition in definitions)]
    facts = [*command, macros, *platform.libc_ver(), source.read_text()]
    key = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]
    library = _folder() / f"{source.stem}-{key}.so"
    if not library.exists():
        # Several processes may come here at once: each compiles a file of its own, and the last one's stays.
        unfinished = library.with_name(f"{library.name}.{os.getpid()}")
        _run([*command, "-o", str(unfinished), str(source)])
        unfinished.replace(library)
    return ctypes.CDLL(str(library))


def _compiler() -> list[str]:
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for command in map(shlex.split, wanted):
        if command and shutil.which(command[0]):
            return command
    raise CompilerError(f"no C++ compiler was found ({', '.join(wanted)}): install g++ or clang++, or name one in CXX")


def _folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "lrsa"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="lrsa-"))  # compiled again by the next process


def _run(command: list[str]) -> str:
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise CompilerError(f"{' '.join(command)} failed:\n{found.stderr.strip()[:2000]}")
    return found.stdout
