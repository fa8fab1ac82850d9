#!/usr/bin/env bash
# Nine minutes on a GPU: the most telling first, every part with its own limit, one report.
#
#   bash experiments/gpu.sh                         # cuda -> experiments/gpu.md
#   bash experiments/gpu.sh --long                  # then 20 minutes more: toy stages, torch.compile
#   bash experiments/gpu.sh --device cpu --quick    # its commands once through at toy size, on a CPU
#
# The report grows part by part, so that a cut leaves what was measured. A part that fails is written
# down, and the next one runs. Needs requirements.txt and pytest, no network; where diffusers or
# transformers is missing its comparison is left out.
set -u
cd "$(dirname "$0")/.."
DEVICE=cuda QUICK= LONG=
while [ $# -gt 0 ]; do
  case $1 in
    --device) DEVICE=$2; shift 2 ;;
    --quick) QUICK=--quick; shift ;;
    --long) LONG=yes; shift ;;
    *) echo "usage: bash experiments/gpu.sh [--device cuda] [--quick] [--long]"; exit 2 ;;
  esac
done
OUT=experiments/gpu.md WORK=$(mktemp -d) START=$SECONDS
trap 'rm -rf "$WORK"' EXIT
STEPS=300 SIZE=--sd-size
[ -z "$QUICK" ] || { STEPS=2 SIZE=; OUT=runs/gpu.md; mkdir -p runs; }

part() { # part TITLE LIMIT-IN-SECONDS COMMAND...: run it and write down how long and how it went
  local title=$1 limit=$2 start=$SECONDS code; shift 2
  echo "== $title: $*"
  timeout -k 5 "$limit" "$@" > "$WORK/log" 2>&1; code=$?
  { echo "## $title"; echo; echo "\`$*\`: exit code $code after $((SECONDS - start)) s"; echo
    echo '```'; tr '\r' '\n' < "$WORK/log" | grep -v 'it/s\|s/it\|image/s\|^$' | tail -n 40
    echo '```'; echo; } >> $OUT
}

bench() { # bench TITLE LIMIT-IN-SECONDS FLAGS...
  local title=$1 limit=$2; shift 2
  part "$title" "$limit" python -m experiments.bench --device "$DEVICE" $QUICK "$@"
}

{ echo "# $DEVICE, $(date -u +%F)"; echo; echo '```'
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2> /dev/null ||
    echo "no NVIDIA GPU"
  python -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
  echo '```'; echo; } > $OUT

part "CUDA tests" 60 python -m pytest -q -k on_a_real_gpu
# aims: 15 times the literal loop in fp32, 45 % of the peak
bench "one MRLF image, the literal loop in fp32 against ours in bf16" 240 $SIZE --only image
if python -c 'import diffusers' 2> /dev/null; then
  bench "UNet, ControlNet and VAE against diffusers" 60 $SIZE --only UNet ControlNet VAE
else
  echo "UNet, ControlNet and VAE against diffusers: not installed, skipped" | tee -a $OUT
  echo >> $OUT
fi
bench "an update of U^S and of the ControlNet" 90 --training $SIZE --only dreambooth controlnet
part "the toy pack's first command" 30 python dginstyle.py generate --device "$DEVICE" \
  --out "$WORK/images"

if [ -n "$LONG" ]; then
  part "tests on the fake GPU" 240 python -m pytest -q -k "on_a_gpu or misplaced or waits_for"
  bench "text encoder" 60 $SIZE --only text
  bench "toy size" 240
  bench "torch.compile" 300 --compile $SIZE
  bench "an update of the segmenters" 120 --training --only DAFormer HRDA
  bench "a training sample of GTA's size" 120 --data-path
  for stage in vae prior; do
    part "toy $stage, $STEPS updates" 90 python -m toy.make $stage --steps $STEPS --cache 32 \
      --device "$DEVICE" --out "$WORK/toy"
  done
  for stage in dreambooth controlnet; do
    part "toy $stage, $STEPS updates" 90 python dginstyle.py train $stage --steps $STEPS \
      --cache 32 --device "$DEVICE" --out "$WORK/toy"
  done
  part "toy segmenter, $STEPS updates" 90 python dginstyle.py segment train --steps $STEPS \
    --device "$DEVICE" --out "$WORK/toy"
fi
echo "$((SECONDS - START)) seconds in all" | tee -a $OUT
