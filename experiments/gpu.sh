#!/usr/bin/env bash
# The first hour on a GPU: tests, bench, memory, training and the toy pack's stages, one report.
#
#   bash experiments/gpu.sh                         # cuda, under 40 minutes -> experiments/gpu.md
#   bash experiments/gpu.sh --device cpu --quick    # its commands once through at toy size, on a CPU
#
# A part that fails is written down, and the next one runs. Needs requirements-dev.txt and 20 GB in
# the folder of temporary files.
set -u
cd "$(dirname "$0")/.."
DEVICE=cuda QUICK=
while [ $# -gt 0 ]; do
  case $1 in
    --device) DEVICE=$2; shift 2 ;;
    --quick) QUICK=--quick; shift ;;
    *) echo "usage: bash experiments/gpu.sh [--device cuda] [--quick]"; exit 2 ;;
  esac
done
OUT=experiments/gpu.md WORK=$(mktemp -d) START=$SECONDS
trap '[ -z "$QUICK" ] || cp "$WORK"/bench.* experiments/; rm -rf "$WORK"' EXIT
cp experiments/bench.json experiments/bench.md "$WORK"  # a rehearsal's figures are not kept
STEPS=300 IMAGES=64 SIZE=--sd-size
[ -z "$QUICK" ] || { STEPS=2 IMAGES=4 SIZE=; }

part() { # part TITLE LIMIT-IN-SECONDS COMMAND...: run it and write down how long and how it went
  local title=$1 limit=$2 start=$SECONDS code; shift 2
  echo "== $title: $*"
  timeout -k 20 "$limit" "$@" > "$WORK/log" 2>&1; code=$?
  { echo "## $title"; echo; echo "\`$*\`: exit code $code after $((SECONDS - start)) s"; echo
    echo '```'; tr '\r' '\n' < "$WORK/log" | grep -v 'it/s\|s/it\|image/s\|^$' | tail -n 40
    echo '```'; echo; } >> $OUT
}

{ echo "# $DEVICE, $(date -u +%F)"; echo; echo '```'
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2> /dev/null ||
    echo "no NVIDIA GPU"
  python -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
  echo '```'; echo; } > $OUT

# every stage and both passes, on the pretended GPU and, where there is one, on the real one
part "tests" 240 python -m pytest -q -k "on_a_gpu or misplaced or waits_for or on_a_real_gpu"
# aims: an MRLF image in bf16 >= 15 times the literal loop in fp32, of peak >= 45 %, UNet >= 1.0
[ -n "$QUICK" ] ||
  part "bench, SD1.5's size" 600 python -m experiments.bench $SIZE --device $DEVICE
part "bench, toy size" 240 python -m experiments.bench --device $DEVICE $QUICK
part "torch.compile" 300 python -m experiments.bench --compile $SIZE --device $DEVICE $QUICK
SD=toy
[ -n "$QUICK" ] || {
  SD=$WORK/sd
  part "random weights of SD1.5's size" 120 python test_dginstyle.py "$SD"
}
part "updates and their wait for data" 360 python -m experiments.bench --training \
  --sd "$SD" --device $DEVICE $QUICK
part "a training sample of GTA's size" 120 python -m experiments.bench --data-path
for stage in vae prior; do
  part "toy $stage, $STEPS updates" 90 python -m toy.make $stage --steps $STEPS --cache 32 \
    --sample-steps 2 --device $DEVICE --out "$WORK/toy"
done
for stage in dreambooth controlnet; do
  part "toy $stage, $STEPS updates" 90 python dginstyle.py train $stage --steps $STEPS \
    --cache 32 --sample-steps 2 --device $DEVICE --out "$WORK/toy"
done
part "toy segmenter, $STEPS updates" 90 python dginstyle.py segment train --steps $STEPS \
  --device $DEVICE --out "$WORK/toy"
part "toy images" 90 python dginstyle.py generate --num $IMAGES \
  --preset turbo --device $DEVICE --out "$WORK/images"
echo "$(((SECONDS - START) / 60)) minutes in all" | tee -a $OUT
