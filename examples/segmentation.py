"""A DearKD model as the backbone of something else: `features_only`, and a small head that segments.

    python examples/segmentation.py output/train/student      a trained backbone
    python examples/segmentation.py dearkd_nano_patch4_32     an untrained one

The images are bright shapes on noise, made here; put your own data set in their place.
"""
import argparse
from typing import List, Tuple

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

import timm_dearkd  # noqa: F401  registers the architectures
from distill_hooks import resolve_model


class Segmenter(nn.Module):
    """Two levels of a ViT's tokens as maps, mixed and brought up to the size of the image."""

    def __init__(self, backbone: nn.Module, num_classes: int, width: int = 64) -> None:
        super().__init__()
        self.backbone = backbone
        self.reduce = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in backbone.feature_info.channels())
        self.head = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, num_classes, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class scores (B, num_classes, H, W) of images (B, C, H, W)."""
        features: List[torch.Tensor] = self.backbone(images)
        mixed = sum(reduce(level) for reduce, level in zip(self.reduce, features))
        return F.interpolate(self.head(mixed), images.shape[-2:], mode='bilinear', align_corners=False)


def make_batch(size: int, chans: int, count: int = 16) -> Tuple[torch.Tensor, torch.Tensor]:
    """Images (B, C, size, size) with a bright rectangle in each, and where it is (B, size, size)."""
    images, masks = torch.randn(count, chans, size, size) * 0.3, torch.zeros(count, size, size, dtype=torch.long)
    for image, mask in zip(images, masks):
        (top, left), (height, width) = torch.randint(0, size // 2, (2,)), torch.randint(size // 4, size // 2, (2,))
        mask[top:top + height, left:left + width] = 1
        image += mask
    return images, masks


def overlap(scores: torch.Tensor, masks: torch.Tensor) -> float:
    """Intersection over union of the shapes."""
    found, there = scores.argmax(dim=1).bool(), masks.bool()
    return ((found & there).sum() / (found | there).sum().clamp(min=1)).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', help='output folder of train.py, or a timm name')
    parser.add_argument('--steps', type=int, default=50)
    args = parser.parse_args()
    torch.manual_seed(0)

    name, _ = resolve_model(args.model)  # a folder becomes timm's local-dir:
    trained = name.startswith('local-dir:')
    backbone = timm.create_model(name, pretrained=trained, features_only=True, out_indices=(-3, -1))
    config = backbone.pretrained_cfg
    chans, size = config['input_size'][0], config['input_size'][-1]
    model = Segmenter(backbone, num_classes=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    test_images, test_masks = make_batch(size, chans)
    for step in range(args.steps + 1):
        if step in (0, args.steps):
            with torch.no_grad():
                scores = model.eval()(test_images)
            loss = F.cross_entropy(scores, test_masks).item()
            print(f'step {step}: loss {loss:.3f}, intersection over union {overlap(scores, test_masks):.2f}')
        images, masks = make_batch(size, chans)
        optimizer.zero_grad()
        F.cross_entropy(model.train()(images), masks).backward()
        optimizer.step()


if __name__ == '__main__':
    main()
