#!/usr/bin/env bash
# Everything that docs/performance.md wants measured, on this machine's GPU, unattended: about 7 minutes.
#
#     benchmarks/gpu.sh                      # writes benchmarks/results/{loss,step,step_fp8,step_graph}_<GPU>.json
#     benchmarks/gpu.sh --rehearse FOLDER    # the same commands in miniature on the CPU: do they run?
#
# Installs what is missing of triton and Liger-Kernel into the Python it runs with (PYTHON; default .venv/bin/python).
# The parts do not depend on each other: one that fails is named at the end, the others' files stay. Exit code: how
# many failed.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}

results=benchmarks/results
device=cuda
loss=()
step=()
if [[ ${1:-} == --rehearse ]]; then
  results=${2:?--rehearse needs a folder for its results}
  device=cpu
  loss=(--tokens 48 --vocab 256 --hidden 16 --chunk-tokens 16 --repeats 3)
  step=(--shape tiny --warmup 1 --pairs 2)
fi
mkdir -p "$results"

if [[ $device == cuda ]]; then
  gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "_"))') || {
    echo "gpu.sh: torch sees no CUDA device: run it on a GPU machine, or --rehearse FOLDER" >&2
    exit 2
  }
  for package in triton liger-kernel; do
    # Without dependencies: torch stays the one that is measured.
    "$PYTHON" -c "import importlib.metadata as m; m.version('$package')" 2>/dev/null ||
      timeout 60 "$PYTHON" -m pip install --quiet --no-deps "$package" ||
      echo "gpu.sh: $package could not be installed: what needs it will be missing from the results" >&2
  done
else
  gpu=cpu
fi

failed=()
run() { # NAME SECONDS MODULE ARGUMENTS...
  local name=$1 seconds=$2
  shift 2
  echo "== $name"
  timeout --kill-after=10 "$seconds" "$PYTHON" -W ignore -m "$@" || failed+=("$name (exit code $?)")
}

run loss 180 benchmarks.loss --device $device "${loss[@]}" --out "$results/loss_$gpu.json"
run step 150 benchmarks.step --device $device "${step[@]}" --arms ntp remit remit-scores \
  --output "$results/step_$gpu.json"
run "step, FP8 reference" 100 benchmarks.step --device $device "${step[@]}" --arms ntp remit-fp8 \
  --output "$results/step_fp8_$gpu.json"
if [[ $device == cuda ]]; then
  run "step, replayed reference" 100 benchmarks.step --device $device --arms ntp remit-graph \
    --output "$results/step_graph_$gpu.json"
fi

for name in "${failed[@]}"; do
  echo "gpu.sh: failed: $name" >&2
done
exit ${#failed[@]}
