#!/usr/bin/env bash
# Everything that a GPU has to show: correctness, attention, a whole training step. Each part takes a few minutes on one
# H100 and writes as it goes to the folder that is given. Needs torch, triton, transformers, matplotlib, pytest and gcc.
#   bash benchmarks/gpu.sh OUT                     all parts
#   PARTS="tests attention" bash benchmarks/gpu.sh OUT
set -uo pipefail
say() { echo "$*" >&2; exit 2; }
[[ $# == 1 ]] || say "usage: bash benchmarks/gpu.sh OUT; PARTS='tests attention flex step' in front chooses"
mkdir -p "$1"
out="$(cd "$1" && pwd)"
cd "$(dirname "$0")/.."
parts="${PARTS:-tests attention flex step}"
for part in $parts; do
    [[ " tests attention flex step " == *" $part "* ]] || say "PARTS names '$part'; there are tests, attention, flex, step"
done
[[ -x .venv/bin/python ]] && python=.venv/bin/python || python=python3
"$python" -c "import torch; assert torch.cuda.is_available()" 2>/dev/null || say "$python finds no CUDA GPU, or no torch: nothing to do"
failed=0

run() {  # part, name, seconds, command
    [[ " $parts " == *" $1 "* ]] || return 0
    timeout "$3" "${@:4}" 2>&1 | tee "$out/$2.log" || failed=1
}

attention() {  # part, heads, options
    run "$1" "$1-${2/\//-}" 240 "$python" benchmarks/attention.py --out "$out/$1-${2/\//-}" --device cuda \
        --dtype bfloat16 --heads "$2" --head-dim 128 --settings 512:128 --rounds 3 "${@:3}"
}

run tests tests 400 "$python" -m pytest -q --no-header tests/lrsa/attention/test_gpu.py
for heads in 28/4 32/8; do
    attention attention "$heads" --impls tiled cudnn --lengths 8192 32768 65536 131072
done
attention flex 28/4 --impls tiled cudnn flex --lengths 8192 32768  # compiled for every length, a minute each
run step step 400 "$python" benchmarks/step.py --out "$out/step" --device cuda --lengths 16384 65536 --rounds 2
exit $failed
