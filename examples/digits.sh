#!/bin/sh
# A DearKD student beside a plain ViT, both trained on 125 real images of handwritten digits: 10 % of the training set.
# The CNN that teaches has seen all of it. Copy the commands for your own images. 4 to 12 minutes on 2 cores.
#
#   sh examples/digits.sh [OUTPUT [SEED]]     seed 0 is the demo's split; the recipe was chosen on that of seed 1
set -e
cd "$(dirname "$0")/.."
OUT=${1:-output/digits}
SEED=${2:-0}
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}"

# 1,797 real 8x8 images from scikit-learn, as DIR/train, DIR/train_10pct and DIR/validation, one folder per class
python examples/digits_data.py "$OUT/data" --seed "$SEED"

rm -rf "$OUT/teacher" "$OUT/vit" "$OUT/dearkd"  # of an earlier call

# the teacher: a small CNN, on all training images
python train.py "$OUT/data" -c digits --model test_resnet --img-size 32 \
    --batch-size 64 --epochs 15 --output "$OUT" --experiment teacher

# a plain ViT on 10 % of them: the same architecture without MHCA (0 blocks), and no teacher
python train.py "$OUT/data" --train-split train_10pct -c digits \
    --model dearkd_nano_patch4_32 --model-kwargs num_mhca_blocks=0 \
    --batch-size 25 --epochs 120 --output "$OUT" --experiment vit

# DearKD on the same 10 %, for as many epochs; stage I is the first 5/6 of them. At the end it writes report.html
python train.py "$OUT/data" --train-split train_10pct -c digits \
    --model dearkd_nano_patch4_32 --kd-model-name "local-dir:$OUT/teacher" \
    --batch-size 25 --epochs 120 --output "$OUT" --experiment dearkd \
    --track-attention-distance --report

# load all three again, evaluate them, print the table and draw the picture
python examples/digits_report.py "$OUT"
