#!/bin/sh
# Students trained on no image at all: images of handwritten digits are made out of a CNN, in the three ways of the
# paper's table 5, and a DearKD student is trained on each set, and one on as many real images. About 10 minutes on 2
# cores. Each step is left out if its result is there, or goes on where it was interrupted.
#
#   sh examples/data_free_digits.sh [OUTPUT [SEED]]     seed 0 is the demo's split; all was chosen on that of seed 1
set -e
cd "$(dirname "$0")/.."
OUT=${1:-output/data_free_digits}
SEED=${2:-0}
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# the CNN: trained on 1,257 real images, none of which is used after this
test -d "$OUT/data" || python examples/digits_data.py "$OUT/data" --seed "$SEED"
OMP_NUM_THREADS=2 python train.py "$OUT/data" -c recipes/digits.yaml --model test_resnet --img-size 32 \
    --batch-size 64 --epochs 15 --seed "$SEED" --output "$OUT" --experiment teacher --resume auto

# images out of the CNN, in two processes; the validation images are the real ones
make_images() {
    name=$1; shift
    torchrun --standalone --nproc_per_node=2 -m timm_dearkd.data_free "$OUT/$name" --resume --device cpu \
        --model "local-dir:$OUT/teacher" --num-images 420 --classes-per-batch 10 --images-per-class 7 --seed "$SEED" \
        --resolutions 32:120:0.4 --jitter 2 --no-flip --tv-weight 0.08 --bn-weight 0.08 "$@"
    ln -sfn ../data/validation "$OUT/$name/validation"
}

# a DearKD student: the same for all of them
train_student() {
    data=$1; name=$2; shift 2
    OMP_NUM_THREADS=2 python train.py "$data" -c recipes/digits.yaml --model dearkd_nano_patch4_32 \
        --kd-model-name "local-dir:$OUT/teacher" --batch-size 42 --epochs 40 --seed "$SEED" \
        --output "$OUT" --experiment "student_$name" --resume auto "$@"
}

make_images none --diversity none
train_student "$OUT/none" none
make_images adi --diversity adi --adi-weight 1 --student "local-dir:$OUT/student_none"
train_student "$OUT/adi" adi
make_images intra --diversity intra --ep-weight 0.1 --triplet-weight 0.1
train_student "$OUT/intra" intra
train_student "$OUT/data" real --train-fraction 0.334

python examples/data_free_report.py "$OUT"
