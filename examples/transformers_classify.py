"""A DearKD model in 🤗 transformers, by its TimmWrapper classes. `import timm_dearkd` is all that it takes.

    pip install transformers
    python -m timm_dearkd.hub push output/train/student --repo org/name --dry-run
    python examples/transformers_classify.py output/train/student/hub photo.jpg      or org/name
"""
import argparse

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

import timm_dearkd  # noqa: F401  registers the architectures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', help='repository on the Hub, or folder that timm_dearkd.hub wrote')
    parser.add_argument('images', nargs='+')
    args = parser.parse_args()

    processor = AutoImageProcessor.from_pretrained(args.model)
    model = AutoModelForImageClassification.from_pretrained(args.model).eval()
    mode = 'L' if len(processor.data_config['mean']) == 1 else 'RGB'
    for path in args.images:
        inputs = processor(Image.open(path).convert(mode), return_tensors='pt')
        with torch.no_grad():
            probabilities = model(**inputs).logits[0].softmax(dim=-1)
        best = int(probabilities.argmax())
        print(f'{path}: {model.config.id2label[best]} {100 * probabilities[best]:.1f} %')


if __name__ == '__main__':
    main()
