"""Every notebook runs from its first cell to its last, as a script: without Jupyter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_run import ENVIRONMENT, ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
IMPORT = "from IPython.display import Image\n"
IMAGE = "shown = []\ndef Image(path): shown.append(open(path, 'rb').read(8))\n"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path: Path, tmp_path):
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    script = "\n".join("".join(cell["source"]) for cell in cells)
    assert IMPORT in script
    script = script.replace(IMPORT, IMAGE)
    script += "\nassert len(shown) == 2 and set(shown) == {b'\\x89PNG\\r\\n\\x1a\\n'}\n"
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stdout.splitlines() if "the right one is" in line]
    right = [line.split("'")[1] == line.split("'")[3] for line in said]
    assert right == [True, False, True], said  # full cache; compressed; compressed after training


def test_no_notebook_shows_a_local_path():
    for path in NOTEBOOKS:
        text = path.read_text(encoding="utf-8")
        assert str(Path.home()) + "/" not in text and "/tmp/" not in text
