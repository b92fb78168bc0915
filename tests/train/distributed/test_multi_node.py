"""The DeepSpeed launcher on two nodes, played by two launchers on this machine that share a hostfile and a port."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_run import free_port

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = [
    *("train.max_steps=3", "train.logging_steps=1", "data.synthetic.rows=96", "data.eval_rows=4"),
    *("eval.enabled=false", "eval.control=false"),
]


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
def test_two_nodes_learn_what_one_process_learns(tmp_path):
    deepspeed = Path(sys.executable).with_name("deepspeed")
    (tmp_path / "hosts").write_text("host-a slots=1\nhost-b slots=1\n")
    port = str(free_port())
    path = f"{deepspeed.parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PATH": path}
    train = [str(ROOT / "launch" / "train.py"), "--config", "quickstart.yaml", "--set", *SETTINGS]
    nodes = []
    for rank in ("0", "1"):
        where = ["--hostfile", "hosts", "--no_ssh", "--node_rank", rank, "--master_addr", "127.0.0.1"]
        command = [str(deepspeed), *where, "--master_port", port, *train, "train.output_dir=two"]
        with open(tmp_path / f"node{rank}.log", "w") as log:
            nodes.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log))
    codes = [node.wait(timeout=900) for node in nodes]
    assert codes == [0, 0], (tmp_path / "node0.log").read_text()[-3000:]
    assert "x 2 processes = 32 rows per step" in (tmp_path / "node0.log").read_text()

    alone = [*train, "train.output_dir=one", "train.deepspeed=null", "train.per_device_train_batch_size=32"]
    subprocess.run([sys.executable, *alone], cwd=tmp_path, env=environment, check=True, timeout=900)
    assert len(losses(tmp_path / "two")) == 3
    # fp32 sums in another order: the same bound as for two processes of one node (tests/train/test_train.py).
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
