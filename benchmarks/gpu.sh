#!/usr/bin/env bash
# Everything that a GPU has to show, in one command: correctness, attention, a whole step. About ten minutes on one H100;
# needs torch, triton, transformers and pytest. Results go to the folder that is given.
#   bash benchmarks/gpu.sh OUT            PARTS="tests attention step" chooses
set -uo pipefail
cd "$(dirname "$0")/.."
out="${1:?usage: bash benchmarks/gpu.sh OUT}"
parts="${PARTS:-tests attention step}"
mkdir -p "$out"
failed=0

part() {  # name, seconds, command
    [[ " $parts " == *" ${1%%-*} "* ]] || return 0
    timeout "$2" "${@:3}" 2>&1 | tee "$out/$1.log" || failed=1
}

part tests 240 python3 -m pytest -q -x --no-header tests/test_gpu.py
for heads in 28/4 32/8; do
    part "attention-${heads/\//-}" 240 python3 benchmarks/attention.py --out "$out/attention-${heads/\//-}" \
        --dtype bfloat16 --heads "$heads" --head-dim 128 --lengths 8192 32768 65536 131072 --settings 512:128 --rounds 3
done
part step 240 python3 benchmarks/step.py --out "$out/step" --lengths 16384 65536 --rounds 2
exit $failed
