#!/bin/sh
# Students without real images: images of handwritten digits are created from a CNN, in the three ways of the
# paper's table 5, and a DearKD student is trained on each set, and one on as many real images. About 11 minutes on 2
# cores. Run it again to resume after an interruption.
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
OMP_NUM_THREADS=2 python train.py "$OUT/data" -c digits --model test_resnet --img-size 32 \
    --batch-size 64 --epochs 40 --mixup 0.3 --cutmix 0.5 --smoothing 0.1 --val-interval 40 --seed "$SEED" \
    --output "$OUT" --experiment teacher --resume auto

# 480 images out of the CNN, in two processes; the validation images beside them are the real ones
make_images() {
    name=$1; shift
    torchrun --standalone --nproc_per_node=2 -m timm_dearkd.data_free "$OUT/$name" --resume --device cpu \
        --model "local-dir:$OUT/teacher" --num-images 480 --classes-per-batch 10 --images-per-class 6 --seed "$SEED" \
        --resolutions 32:130:0.3 --jitter 2 --no-flip --tv-weight 0.07 --bn-weight 0.2 "$@"
    ln -sfn ../data/validation "$OUT/$name/validation"
}

# a DearKD student, the same for all: the labels are the classes that the images were made for, and the CNN teaches by
# its features alone (alpha 1), throughout
train_student() {
    data=$1; name=$2; shift 2
    python train.py "$OUT/$data" -c digits --model dearkd_nano_patch4_32 \
        --kd-model-name "local-dir:$OUT/teacher" --dearkd-alpha 1.0 --dearkd-stage1-epochs 50 --color-jitter 0.3 \
        --batch-size 40 --epochs 50 --val-interval 50 --seed "$SEED" --output "$OUT" \
        --experiment "student_$name" --resume auto "$@"
}

# two students at a time, one on each core; the one of the plain images then competes in ADI
make_images none --diversity none
train_student data real --train-fraction 0.382 &
train_student none none
wait $!
make_images adi --diversity adi --adi-weight 1 --student "local-dir:$OUT/student_none"
make_images intra --diversity intra --ep-weight 0.2 --triplet-weight 0.02
train_student adi adi &
train_student intra intra
wait $!

# table 6: how far apart the images of a class are, by the CNN's features
python -m timm_dearkd.analysis diversity "$OUT/none" "$OUT/adi" "$OUT/intra" "$OUT/data/train" \
    --model "local-dir:$OUT/teacher" --output "$OUT/diversity.json" --overwrite
python examples/data_free_report.py "$OUT"
