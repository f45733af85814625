#!/usr/bin/env bash
# GPU tests and benchmarks in one command, within some minutes:
# bench/run_gpu.sh [--seconds 540] [--only PART,PART...]
#
# Parts, in their order, and the most of the time that each gets, in shares of those that are chosen:
#
#   tests     22  tests on the device, while what is timed below is compiled beside them
#   kernels   12  each kernel against its roofline and torch
#   step      20  steps of all classes with a roofline, and of other packages: LLaMA-7B, 8 layers
#   rank256    7  the same at rank 256, of four of them
#   tiles      7  kernels with other tiles
#   recipe     6  30 steps of LLaMA-7B in 24 GiB, by bench/recipes/one_gpu_24gib.py
#   fit       12  the largest batch of LLaMA-7B in 24 GiB, by method
#   polar      5  Newton-Schulz steps
#   compiled   9  kernels against compiled torch
#   converge      losses of LLaMA-60M, in what the others leave
#
# Results go to bench/results/, each as soon as it is there; where $OUT is set, they are packed
# there after each part, as results.tgz. The last lines are a short table, in $OUT as summary.txt.
# All ends within the seconds, also where a part has to be killed. Without a GPU everything runs at
# its smallest on the CPU, or says that it cannot.
set -uo pipefail
cd "$(dirname "$0")/.."
usage() { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; }
parts=(tests kernels step rank256 tiles recipe fit polar compiled converge)
declare -A share=([tests]=22 [kernels]=12 [step]=20 [rank256]=7 [tiles]=7 [recipe]=6 [fit]=12
                  [polar]=5 [compiled]=9 [converge]=0)
seconds=540
chosen=("${parts[@]}")
while [ $# -gt 0 ]; do
  case "$1" in
    --seconds) seconds="${2:-}"; shift 2 || shift ;;
    --only) IFS=, read -ra chosen <<< "${2:-}"; shift 2 || shift ;;
    --help) usage; exit 0 ;;
    *) echo "usage: bench/run_gpu.sh [--seconds N] [--only PART,PART...]" >&2; exit 2 ;;
  esac
done
[[ "$seconds" =~ ^[0-9]+$ ]] || {
  echo "--seconds must be a whole number, got '$seconds'" >&2; exit 2; }
shares=0
for part in "${chosen[@]}"; do
  [ -n "${share[$part]:-}" ] || {
    echo "--only '$part' must be of ${parts[*]}" >&2; exit 2; }
  shares=$((shares + share[$part]))
done
wanted() { [[ " ${chosen[*]} " == *" $1 "* ]]; }
start=$SECONDS
python="${PYTHON:-python3}"
work=$(mktemp -d)
results=bench/results
if [ -n "${OUT:-}" ]; then
  results="$work/results"
  mkdir -p "$OUT"
fi
mkdir -p "$results"
left() { echo $((seconds - (SECONDS - start))); }
declare -a said=() files=()
device=""

# What is there, in one file, as some machines bring back few: so does a command that is cut off.
pack() {
  [ -n "${OUT:-}" ] || return 0
  # Rows tell the command that made them, as it is where nothing is packed.
  find "$results" -maxdepth 1 -name '*.json' -exec sed -i "s#$results/#bench/results/#g" {} +
  tar -C "$results" --exclude='*.pt' --exclude='*.parts' -czf "$work/results.tgz" . &&
    cp "$work/results.tgz" "$OUT/.results" && mv "$OUT/.results" "$OUT/results.tgz"
}

table() {
  echo
  echo "== $device, $((SECONDS - start)) of $seconds s =="
  printf '%s\n' "${said[@]}"
  "$python" - "${files[@]}" <<'PYTHON'
"""The rows of this run that have a goal or a ratio, in a few lines."""
import json
import pathlib
import sys

for file in map(pathlib.Path, sys.argv[1:]):
    if not file.exists():
        continue
    rows = json.loads(file.read_text())
    if not isinstance(rows, list):
        continue
    for row in rows:
        name = row.get("kernel") or row.get("optimizer") or row.get("method") or "rows"
        word = next((f"{k}: {row[k]}" for k in ("missing", "failed", "skipped")
                     if row.get(k)), None)
        if word is None and "share_of_roofline" in row:
            word = (f"{row['size']}: {row['share_of_roofline']:.2f} of the roofline"
                    + (f" with {' '.join(row['values'])}" if "values" in row else "")
                    + (f", {row['ratio']:.2f} x {row['fastest_alternative']}"
                       if row.get("ratio") else ""))
        elif word is None and "of_roofline" in row:
            word = (f"{row['step_ms']:.2f} ms, {row['of_roofline']:.2f} x its roofline, worst "
                    f"{row['worst_of_median']:.2f} x median, {row['ratio'] or 1:.2f} x the first")
        elif word is None and "batch" in row and "in_backward" in row:
            word = (f"batch {row['batch']}, {row['tokens_per_s']:.0f} tokens/s, peak "
                    f"{row['peak_bytes'] / 2**30:.2f} GiB" if row["batch"] else "does not fit")
        elif word is None and "tokens_per_s" in row:
            word = (f"{row['tokens_per_s']:.0f} tokens/s, losses {row['losses'][0]:.3f} to "
                    f"{row['losses'][-1]:.3f}")
        elif word is None and "valid_loss" in row:
            word = f"loss {row['valid_loss']:.4f} at {row['lr']:g}, seed {row['seed']}"
        elif word is None and "speedup_over_compiled" in row:
            word = f"{row['shape']}: {row['speedup_over_compiled']:.2f} x compiled"
        if word is not None:
            print(f"{file.stem:22} {name:30} {word}")
PYTHON
}

finish() {
  trap '' INT TERM HUP
  local running
  running=$(jobs -p)
  # shellcheck disable=SC2086
  [ -z "$running" ] || kill $running 2>/dev/null
  if [ -n "$device" ]; then
    table | tee "$work/summary.txt"
    if [ -n "${OUT:-}" ]; then cp "$work/summary.txt" "$OUT/summary.txt"; fi
    pack
  fi
  rm -rf "$work"
}
trap finish EXIT
trap 'said+=("cut off"); exit 143' INT TERM HUP

if ! "$python" -c 'import lissom.optim' 2>/dev/null; then
  mkdir "$work/lissom"
  for part in optim kernels bench; do ln -s "$PWD/$part" "$work/lissom/$part"; done
  export PYTHONPATH="$work${PYTHONPATH:+:$PYTHONPATH}"
fi
"$python" -c 'import lissom.optim' || { echo "lissom cannot be imported" >&2; exit 1; }
device=$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
if [ "$device" = cuda ]; then unset TRITON_INTERPRET; fi

# run NAME SECONDS LATE GRACE COMMAND...: for at most SECONDS, and what is left. LATE seconds after
# them the command is interrupted, and GRACE later killed.
run() {
  local name="$1" limit="$2" late="$3" grace="$4" began=$SECONDS most end
  shift 4
  most=$(($(left) - grace - 5))  # the rest is the table's
  [ "$limit" -le "$most" ] || limit=$most
  end=$((limit + late))
  [ "$end" -le "$most" ] || end=$most
  if [ "$limit" -lt 5 ]; then said+=("$name: skipped, no time left"); return; fi
  timeout -s INT -k "$grace" "$end" "${@//SECONDS/$limit}" > "$results/$name.log" 2>&1 &
  wait $!
  said+=("$name: exit $? after $((SECONDS - began)) s, $name.log")
  pack
}

# Seconds of a part.
of() { echo $((shares ? seconds * share[$1] / shares : 0)); }

# bench NAME SECONDS MODULE ARGUMENTS...: a script that stops by itself, after what it has begun.
bench() {
  local name="$1" limit="$2" module="$3"
  shift 3
  files+=("$results/$name.json")
  run "$name" "$limit" 20 5 "$python" -m "lissom.bench.$module" --seconds SECONDS \
    --json "$results/$name.json" "$@"
}

# What classes with a roofline and other packages are called; those that take SVDs come last.
eight='torch.optim.AdamW fused;GaLoreAdamW, 8 bits;DCTAdamW, gap 200, 8 bits;FiraAdamW, 8 bits'
eight+=';APOLLO, 8 bits;AdamW8bit;DCTAdamW, every step, 8 bits;Muon, 8 bits;Trion, 8 bits'
eight+=';PolarGrad, 8 bits;AdamW8bit, 8 bits of weights;GaLoreAdamW, 8 bits, 8 bits of weights'
wide='AdamW;GaLoreAdamW;DCTAdamW, gap 200;FiraAdamW;APOLLO;DCTAdamW, every step'
wide+=';DCTAdamW, every step, by product;Muon;Trion;PolarGrad'
peers='products alone;torch.optim.AdamW foreach;torch.optim.Muon;bitsandbytes AdamW8bit'
peers+=';flashoptim FlashAdamW;torchao AdamW8bit;fira;galore-torch, 8 bits;galore-torch'

# Compile what is timed later, beside the tests. Two layers: of one matrix no table is made.
warm_up() {
  local most
  most=$(of tests)
  if wanted kernels; then
    timeout -k 5 "$most" "$python" -m lissom.bench.kernels --warm-up --seconds "$most" \
      > "$results/warm-up-kernels.log" 2>&1 &
  fi
  if wanted step; then
    timeout -k 5 "$most" "$python" -m lissom.bench.step --device cuda --size llama-7b --layers 2 \
      --steps 1 --seconds "$most" --only "$eight;$wide" > "$results/warm-up-step.log" 2>&1 &
  fi
  if wanted tiles; then
    timeout -k 5 "$most" "$python" -m lissom.bench.tiles --repeats 1 --seconds "$most" \
      > "$results/warm-up-tiles.log" 2>&1 &
  fi
}

part_tests() {
  local these=(tests/test_gpu.py tests/test_capture.py) more=() workers
  workers=$(($(env -u OMP_NUM_THREADS nproc) - 2))  # nproc would say how many threads
  if ! "$python" -c 'import pytest' 2>/dev/null; then
    said+=("gpu-tests: pytest is not installed")
    return
  fi
  if [ "$device" = cuda ]; then
    these+=(tests/test_apart.py tests/test_kernels.py tests/test_lift.py tests/test_symmul.py)
    # These compile for a GPU, and use none.
    more=(--deselect tests/test_apart.py::test_addresses_from_a_table_cost_nothing
          --deselect tests/test_kernels.py::test_kernels_compile_for_a_gpu
          --deselect tests/test_lift.py::test_compiles_for_a_gpu
          --deselect tests/test_symmul.py::test_compiles_for_a_gpu)
    # Most of the tests' time is the compiler's.
    if "$python" -c 'import xdist' 2>/dev/null; then
      more+=(-n "$((workers > 1 ? workers : 1))")
    fi
    warm_up
  fi
  # pytest does not stop by itself: interrupted, it says what failed until then.
  run gpu-tests "$(($(of tests) - 15))" 0 15 "$python" -m pytest -q -rf --tb=short --maxfail 20 \
    -p no:cacheprovider "${more[@]}" "${these[@]}"
  wait
}

part_kernels() {
  if [ "$device" = cuda ]; then
    bench kernels-gpu "$(of kernels)" kernels --repeats 15 --no-compile
  else
    bench kernels-cpu "$(of kernels)" kernels --device cpu --repeats 1
  fi
}

part_step() {
  if [ "$device" = cuda ]; then
    bench step-7b-gpu "$(of step)" step --device cuda --size llama-7b --layers 8 --steps 10 \
      --only "$eight;$wide;$peers"
  else
    bench step-tiny-cpu "$(of step)" step --size tiny --rank 8 --steps 3 --layers 1
  fi
}

part_rank256() {
  [ "$device" = cuda ] || return 0
  local these='torch.optim.AdamW fused;GaLoreAdamW, 8 bits;DCTAdamW, gap 200, 8 bits'
  bench step-7b-rank256-gpu "$(of rank256)" step --device cuda --size llama-7b --layers 8 \
    --rank 256 --steps 10 --only "$these;DCTAdamW, every step, 8 bits"
}

part_tiles() { bench tiles-gpu "$(of tiles)" tiles --repeats 15; }

part_recipe() {
  local name=recipe-one-gpu-24gib-gpu steps=30 more=()
  if [ "$device" = cpu ]; then name=recipe-one-gpu-24gib-cpu steps=2 more=(--length 32); fi
  files+=("$results/$name.json")
  run "$name" "$(of recipe)" 20 5 "$python" -m lissom.bench.recipes.one_gpu_24gib \
    --steps "$steps" --json "$results/$name.json" "${more[@]}"
}

part_fit() {
  if [ "$device" = cuda ]; then  # at rank 1024 the buffers of "project" do not fit
    bench fit-7b-24gib-gpu "$(of fit)" fit --cap 24GiB --limit 16 --steps 3 --methods \
      'galore 8 bits, update;fira 8 bits, update;apollo 8 bits, update;adamw 8 bits, update'
  else
    bench fit-tiny-cpu "$(of fit)" fit --device cpu --model tiny --cap 101MB --dtype fp32 \
      --length 16 --limit 4 --steps 1 --rank 8 \
      --methods 'galore 8 bits, update;galore 8 bits, project;torch AdamW'
  fi
}

part_polar() { bench polar-gpu "$(of polar)" polar_gpu --repeats 15; }

part_compiled() {
  [ "$device" = cuda ] || return 0
  bench kernels-compiled-gpu "$(of compiled)" kernels --repeats 15
}

part_converge() {
  local name=converge-60m-gpu enough=70 rest  # seconds of one rate of one method, at a guess
  if [ "$device" = cpu ]; then name=converge-tiny-cpu enough=20; fi
  rest=$(($(left) - 30))
  if [ "$rest" -lt "$enough" ]; then
    said+=("$name: left out, a run takes about $enough s and $((rest > 0 ? rest : 0)) are left")
  elif [ "$device" = cuda ]; then
    bench "$name" "$rest" converge --tokens 4000000 --seeds 2 --plot "$results/$name.png" \
      --methods 'AdamW;Fira;GaLore;DCT-AdamW;Muon'
  else
    bench "$name" "$rest" converge --device cpu --size tiny --rank 8 --tokens 512 --batch 2 \
      --length 64 --seeds 1 --piece 8 --methods AdamW
  fi
}

for part in "${parts[@]}"; do
  if wanted "$part"; then "part_$part"; fi
done
exit 0
