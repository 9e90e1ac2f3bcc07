#!/bin/sh
# timm's own scripts with a DearKD model. `python -m timm_dearkd` registers the architectures and runs the script.
#
#   sh examples/timm_scripts.sh CLONE RUN IMAGES [OPTION ...]     CLONE is a clone of pytorch-image-models, RUN what
#   train.py wrote, IMAGES a folder with a folder for each class; options, such as --device cpu, go to both scripts
set -e
CLONE=$1; RUN=$2; IMAGES=$3; shift 3

python -m timm_dearkd "$CLONE/validate.py" "$IMAGES" --model "local-dir:$RUN" --pretrained "$@"
python -m timm_dearkd "$CLONE/inference.py" "$IMAGES" --model "local-dir:$RUN" --pretrained \
    --results-file predictions.csv --topk 1 "$@"
