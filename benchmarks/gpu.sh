#!/usr/bin/env bash
# Everything that a GPU has to show: correctness, attention, a whole training step. Each part takes a few minutes on one
# H100 and writes as it goes to the folder that is given. Needs torch, triton, transformers, matplotlib, pytest and gcc.
#   bash benchmarks/gpu.sh OUT                     all parts
#   PARTS="tests attention" bash benchmarks/gpu.sh OUT
set -uo pipefail
mkdir -p "${1:?usage: [PARTS="tests attention flex step"] bash benchmarks/gpu.sh OUT}"
out="$(cd "$1" && pwd)"
parts="${PARTS:-tests attention flex step}"
cd "$(dirname "$0")/.."
failed=0

run() {  # part, name, seconds, command
    [[ " $parts " == *" $1 "* ]] || return 0
    timeout "$3" "${@:4}" 2>&1 | tee "$out/$2.log" || failed=1
}

attention() {  # part, heads, options
    run "$1" "$1-${2/\//-}" 240 python3 benchmarks/attention.py --out "$out/$1-${2/\//-}" --device cuda \
        --dtype bfloat16 --heads "$2" --head-dim 128 --settings 512:128 --rounds 3 "${@:3}"
}

run tests tests 400 python3 -m pytest -q --no-header tests/test_gpu.py
for heads in 28/4 32/8; do
    attention attention "$heads" --impls rectangles cudnn --lengths 8192 32768 65536 131072
done
attention flex 28/4 --impls rectangles cudnn flex --lengths 8192 32768  # compiled for every length, a minute each
run step step 400 python3 benchmarks/step.py --out "$out/step" --device cuda --lengths 16384 65536 --rounds 2
exit $failed
