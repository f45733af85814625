#!/usr/bin/env bash
# GPU tests and benchmarks in one command, within some minutes: bench/run_gpu.sh [--seconds 540]
#
# Results go to $OUT if it is set, else to bench/results/, each as soon as it is there; the last lines
# are a short table. Without a GPU everything runs at its smallest on the CPU, or says that it cannot.
set -uo pipefail
cd "$(dirname "$0")/.."
seconds=540
while [ $# -gt 0 ]; do
  case "$1" in
    --seconds) seconds="$2"; shift 2 ;;
    *) echo "usage: bench/run_gpu.sh [--seconds N]" >&2; exit 2 ;;
  esac
done
out="${OUT:-bench/results}"
mkdir -p "$out"
python="${PYTHON:-python3}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if ! "$python" -c 'import lissom.optim' 2>/dev/null; then
  mkdir "$work/lissom"
  for part in optim kernels bench; do ln -s "$PWD/$part" "$work/lissom/$part"; done
  export PYTHONPATH="$work${PYTHONPATH:+:$PYTHONPATH}"
fi
"$python" -c 'import lissom.optim' || { echo "lissom cannot be imported" >&2; exit 1; }
device=$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
if [ "$device" = cuda ]; then unset TRITON_INTERPRET; fi
start=$SECONDS
left() { echo $((seconds - (SECONDS - start))); }
declare -a said=()

# run NAME SHARE COMMAND...: for at most SHARE per cent of all seconds, and of what is left.
run() {
  local name="$1" limit=$((seconds * $2 / 100)) rest began=$SECONDS
  shift 2
  rest=$(left)
  if [ "$limit" -gt "$rest" ]; then limit=$rest; fi
  if [ "$limit" -lt 5 ]; then said+=("$name: skipped, no time left"); return; fi
  # Scripts stop by themselves at ${limit} seconds; a little later they are stopped.
  timeout -k 5 $((limit + 20)) "${@//SECONDS/$limit}" > "$out/$name.log" 2>&1
  said+=("$name: exit $? after $((SECONDS - began)) s, $out/$name.log")
}

bench() { local name="$1" share="$2" module="$3"; shift 3
  run "$name" "$share" "$python" -m "lissom.bench.$module" --seconds SECONDS --json "$out/$name.json" "$@"
}

if "$python" -c 'import pytest' 2>/dev/null; then
  files=(tests/test_gpu.py tests/test_capture.py)
  # Most of the tests' time is the compiler's: they share it, as does what is timed below.
  share=()
  if [ "$device" = cuda ]; then
    files+=(tests/test_apart.py tests/test_kernels.py tests/test_lift.py tests/test_symmul.py)
    "$python" -c 'import xdist' 2>/dev/null && share=(-n "$(( ($(nproc) + 1) / 2 ))")
    timeout $((seconds / 9)) "$python" -m lissom.bench.kernels --repeats 1 --no-compile \
      > /dev/null 2>&1 &
  fi
  run gpu-tests 22 "$python" -m pytest -q --maxfail 20 -p no:cacheprovider "${share[@]}" "${files[@]}"
  wait
else
  said+=("gpu-tests: pytest is not installed")
fi
if [ "$device" = cuda ]; then
  bench polar-gpu 6 polar_gpu --repeats 15
  bench kernels-gpu 10 kernels --repeats 15 --no-compile
  bench step-7b-gpu 22 step --device cuda --size llama-7b --layers 8 --steps 10
  bench step-7b-rank256-gpu 8 step --device cuda --size llama-7b --layers 8 --rank 256 --steps 10 \
    --only 'torch.optim.AdamW fused;GaLoreAdamW, 8 bits;DCTAdamW, gap 200, 8 bits;DCTAdamW, every step, 8 bits'
  bench fit-7b-24gib 14 fit --cap 24GiB --limit 64 --steps 3 \
    --methods 'galore 8 bits, update;dct-adamw 8 bits, project;galore 8 bits, project;bitsandbytes AdamW8bit'
  # Against compiled torch as far as the time goes, which the compiler takes.
  bench kernels-compiled-gpu 12 kernels --repeats 15
  bench converge-60m-gpu 40 converge --tokens 4000000 --seeds 2 --plot "$out/converge-60m-gpu.png" \
    --methods 'AdamW;Fira;GaLore;DCT-AdamW;Muon'
else
  bench polar-gpu 10 polar_gpu
  bench kernels-cpu 20 kernels --device cpu --repeats 1
  bench step-tiny-cpu 20 step --size tiny --rank 8 --steps 3 --layers 1
  bench fit-tiny-cpu 25 fit --device cpu --model tiny --cap 101MB --dtype fp32 --length 16 --limit 4 \
    --steps 1 --rank 8 --methods 'galore 8 bits, update;galore 8 bits, project;torch AdamW'
  bench converge-tiny-cpu 25 converge --device cpu --size tiny --rank 8 --tokens 512 --batch 2 \
    --length 64 --seeds 1 --piece 8 --methods AdamW
fi

echo
echo "== $device, $((SECONDS - start)) of $seconds s =="
printf '%s\n' "${said[@]}"
"$python" - "$out" <<'PYTHON'
"""The rows of this run that have a goal or a ratio, in a few lines."""
import json
import pathlib
import sys

for file in sorted(pathlib.Path(sys.argv[1]).glob("*-[gc]pu.json")) + sorted(
        pathlib.Path(sys.argv[1]).glob("fit-7b*.json")):
    rows = json.loads(file.read_text())
    if not isinstance(rows, list):
        continue
    for row in rows:
        name = row.get("kernel") or row.get("optimizer") or row.get("method") or "rows"
        word = next((f"{k}: {row[k]}" for k in ("missing", "failed", "skipped")
                     if row.get(k)), None)
        if word is None and "share_of_roofline" in row:
            word = f"{row['size']}: {row['share_of_roofline']:.2f} of the roofline"
        elif word is None and "of_roofline" in row:
            word = (f"{row['step_ms']:.2f} ms, {row['of_roofline']:.2f} x its roofline, worst "
                    f"{row['worst_of_median']:.2f} x median, {row['ratio'] or 1:.2f} x the first")
        elif word is None and "tokens_per_s" in row:
            word = (f"batch {row['batch']}, {row['tokens_per_s']:.0f} tokens/s, peak "
                    f"{row['peak_of_expected']:.3f} of expected")
        elif word is None and "valid_loss" in row:
            word = f"loss {row['valid_loss']:.4f} at {row['lr']:g}, seed {row['seed']}"
        elif word is None and "speedup_over_compiled" in row:
            word = f"{row['shape']}: {row['speedup_over_compiled']:.2f} x compiled"
        if word is not None:
            print(f"{file.stem:22} {name:30} {word}")
PYTHON
exit 0
