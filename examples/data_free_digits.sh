#!/bin/sh
# Students without real images: images of handwritten digits are created from a CNN, by a generator and by optimising
# pixels (DeepInversion). A DearKD student is trained on each set, and one on real images, all with the recipe
# `data_free`. About 6 minutes on 2 cores. Run it again to resume after an interruption.
#
#   sh examples/data_free_digits.sh [OUTPUT [SEED]]     seed 0 is the demo's split; all was chosen on that of seed 1
set -e
cd "$(dirname "$0")/.."
OUT=${1:-output/data_free_digits}
SEED=${2:-0}
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS=1

# the demo's CNN, trained for longer and on mixed images too: what it then makes looks more like digits
test -d "$OUT/data" || python examples/digits_data.py "$OUT/data" --seed "$SEED"
python train.py "$OUT/data" -c digits --model test_resnet --img-size 32 \
    --batch-size 64 --epochs 40 --mixup 0.3 --cutmix 0.5 --smoothing 0.1 --val-interval 40 --seed "$SEED" \
    --output "$OUT" --experiment teacher --resume auto

# images out of the CNN, in two processes; the validation images beside them are the real ones
make_images() {
    name=$1; shift
    torchrun --standalone --nproc_per_node=2 -m timm_dearkd.data_free "$OUT/$name" --resume --device cpu \
        --model "local-dir:$OUT/teacher" --diversity none --seed "$SEED" "$@"
    ln -sfn ../data/validation "$OUT/$name/validation"
}

# a DearKD student, the same for all; the generator's pilot finds out that digits are not mirrored
train_student() {
    data=$1; name=$2; shift 2
    python train.py "$OUT/$data" -c data_free --model dearkd_nano_patch4_32 --model-kwargs patch_size=8 \
        --kd-model-name "local-dir:$OUT/teacher" --in-chans 1 --hflip 0 --epochs 20 --val-interval 20 --workers 0 \
        --seed "$SEED" --output "$OUT" --experiment "student_$name" --resume auto "$@"
}

make_images pixels --num-images 480 --classes-per-batch 10 --images-per-class 6 --resolutions 32:130:0.3 --jitter 2 \
    --no-flip --tv-weight 0.07 --bn-weight 0.2
train_student pixels pixels &
train_student data real --train-fraction 0.382
wait $!
make_images generator --generator --num-images 3840
train_student generator generator

# how far apart the images of a class are, by the CNN's features
python -m timm_dearkd.analysis diversity "$OUT/pixels" "$OUT/generator" "$OUT/data/train" \
    --model "local-dir:$OUT/teacher" --output "$OUT/diversity.json" --overwrite
python examples/data_free_report.py "$OUT"
