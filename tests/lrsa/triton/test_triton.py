"""The Triton kernels: interpreted on the CPU, and compiled for the GPUs they are meant for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no build for this system")


def test_interpreted():
    script = Path(__file__).with_name("interpreted_triton.py")
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(script)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=script.parents[3],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert found.returncode == 0, found.stdout
    assert " passed" in found.stdout


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_a_gpu(capability, monkeypatch, tmp_path):
    """Triton and NVIDIA's assembler need no GPU to say whether they accept a kernel."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lrsa.triton import merge as merging_triton
    from lrsa.triton import scoring as scoring_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    strides = ("i64", "i64", "i64", "constexpr")
    target = GPUTarget("cuda", capability, 32)
    score = {"keys": "*bf16", "values": "*bf16", "scores": "*fp32", "key_strides": strides, "value_strides": strides}
    score |= dict.fromkeys(("kv_heads", "windows", "sink_size"), "i32") | {"value_weight": "fp32"}
    fixed = {"lag_size": 512, "key_channels": 128, "value_channels": 128, "TOKENS": 512, "CHANNELS": 16}
    ones = {(3, 3): 1, (4, 3): 1}
    source = ASTSource(scoring_triton._score, score | dict.fromkeys(fixed, "constexpr"), constexprs=fixed | ones)
    assert compile(source, target=target, options={"num_warps": 8}).asm["cubin"]
    pointers = {"out": "*fp32", "lse": "*fp32", "new_out": "*bf16", "new_lse": "*fp32"}
    merged = pointers | {f"{name}_strides": strides for name in pointers} | {"heads": "i32", "queries": "i32"}
    fixed = {"channels": 128, "ROWS": 64, "CHANNELS": 128}
    ones = {(place, 3): 1 for place in (4, 5, 6, 7)}
    source = ASTSource(merging_triton._merge, merged | dict.fromkeys(fixed, "constexpr"), constexprs=fixed | ones)
    assert compile(source, target=target).asm["cubin"]
