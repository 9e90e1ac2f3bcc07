#!/bin/sh
# A DearKD student beside a plain ViT, both trained on 125 real images of handwritten digits: 10 % of the training set.
# The CNN that teaches was trained on all of it. Copy the commands for your own images.
#
#   sh examples/digits.sh [OUTPUT [SEED [FLAG ...]]]     seed 0 is the demo's split; all was chosen on that of seed 1
#
# Flags such as --epochs 2 are for the student and the ViT.
set -e
cd "$(dirname "$0")/.."
OUT=${1:-output/digits}
SEED=${2:-0}
shift $(($# < 2 ? $# : 2))
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}"

if [ -e "$OUT/student" ] && [ ! -d "$OUT/data/train_10pct" ]; then
    echo "$OUT has runs of something else. Name another folder." >&2
    exit 2
fi

# 1,797 real 8x8 images from scikit-learn, as DIR/train, DIR/train_10pct and DIR/validation, one folder per class
python examples/digits_data.py "$OUT/data" --seed "$SEED"

rm -rf "$OUT/teacher" "$OUT/vit" "$OUT/student"  # of an earlier call

# the teacher: a small CNN, on all training images
python train.py "$OUT/data" -c digits --model test_resnet --img-size 32 \
    --batch-size 64 --epochs 15 --output "$OUT" --experiment teacher

# a DearKD student on 10 % of them, on one core; everything else is chosen by the images
export OMP_NUM_THREADS=1
python -m timm_dearkd distill "$OUT/data" --train-split train_10pct --teacher "$OUT/teacher" --output "$OUT" \
    --track-attention-distance "$@" &
STUDENT=$!
trap 'kill $STUDENT 2> /dev/null || true' EXIT
while [ ! -s "$OUT/student/args.yaml" ]; do kill -0 $STUDENT; sleep 1; done

# at the same time, a plain ViT on another core: the student's options without MHCA (0 blocks) and without the teacher
KWARGS=$(python -c "import sys, yaml
for item in (yaml.safe_load(open(sys.argv[1]))['model_kwargs'] or {}).items(): print('%s=%s' % item)" \
    "$OUT/student/args.yaml")
python train.py "$OUT/data" -c "$OUT/student/args.yaml" --experiment vit --model-kwargs num_mhca_blocks=0 $KWARGS \
    --kd-model-name "" > "$OUT/vit.log" 2>&1 || { tail "$OUT/vit.log"; exit 1; }
wait $STUDENT

# load all three again, evaluate them, print the table and draw the picture
python examples/digits_report.py "$OUT"
