"""The wheel: what it needs to be imported, and the sources that it brings."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Packages of the extras: none of our modules may need them on import; transformers itself imports tqdm.
IMPORTS = """
import builtins, importlib.abc, importlib.util, sys
sys.path.insert(0, sys.argv[1])
OPTIONAL = {"matplotlib", "rich", "peft", "trl", "datasets", "pydantic", "accelerate", "deepspeed"}

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OPTIONAL:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

real = builtins.__import__
def guarded(name, globals=None, *rest, **options):
    if name.partition(".")[0] == "tqdm" and (globals or {}).get("__name__", "").startswith("lrsa"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return real(name, globals, *rest, **options)

find = importlib.util.find_spec  # how transformers asks for a package
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] in OPTIONAL else find(name, *rest)
sys.meta_path.insert(0, Absent())
builtins.__import__ = guarded
import lrsa, lrsa.evaluation
assert lrsa.__file__.startswith(sys.argv[1]), lrsa.__file__
score = lrsa.evaluation.Score.from_rows([1.0, 2.0], "points")
cells = {"model": {"full": lrsa.evaluation.Cell({"loss": score}, None, 1.0)}}
rows = {"n": 2, "shortest": 1, "median": 1, "longest": 1, "compressed_share": 1.0}
from lrsa.evaluation.measure.cost import LayerCost
settings = [lrsa.evaluation.Setting(None, [LayerCost(0, 1, 1, 8, 8)])]
details = {"seed": 0, "versions": {}}
results = lrsa.evaluation.Results("loss", lrsa.LRSAConfig(), settings, rows, details, cells)
results.save(sys.argv[1])
for job in (lambda: lrsa.evaluation.print_report(results), lambda: lrsa.evaluation.save_report(results, sys.argv[1])):
    try:
        job()
    except ImportError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout, built from a copy, without a network."""
    pytest.importorskip("setuptools", minversion="77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "lrsa", source / "lrsa", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(out)], cwd=source, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_wheel_holds_every_source_file_and_nothing_else(wheel):
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    suffixes = (".py", ".cpp", ".h")
    assert found == {str(p.relative_to(ROOT)) for p in (ROOT / "lrsa").rglob("*") if p.suffix in suffixes}
    assert {"lrsa/attention/cpu/kernel.cpp", "lrsa/attention/cpu/simd.h"} <= found


def test_import_needs_no_optional_package(wheel, tmp_path):
    install = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", tmp_path, wheel)
    subprocess.run(install, check=True, capture_output=True)
    done = subprocess.run([sys.executable, "-c", IMPORTS, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if 'pip install "lrsa[evaluation]"' in line]
    assert [line.split()[0] for line in told] == ["rich", "matplotlib"]
