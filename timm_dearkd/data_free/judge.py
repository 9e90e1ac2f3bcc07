"""Check of finished images by the CNN and by an independent network."""
from typing import Any, Dict, List, Optional, Sequence

import torch

from distill_hooks.errors import first_line

from .inversion import wrap_network

MAX_IMAGES = 120  # at once, as in a generator's step


class Judge:
    """Measures the probability that networks give the target class of stored images.

    Args:
        model: The CNN that the images are made from.
        verifier: Independent network, whose classes may have another order; None keeps all images.
        classes: The verifier's class for each class of `model`.
        mean: Normalisation of `model`.
        std: See `mean`.
        min_prob: Least probability by the verifier of an image to keep.
    """

    def __init__(
            self,
            model: torch.nn.Module,
            verifier: Optional[torch.nn.Module],
            classes: Sequence[int],
            mean: Sequence[float],
            std: Sequence[float],
            min_prob: float,
    ) -> None:
        self.mean, self.std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        self.model = model
        self.verifier = None
        if verifier is not None:
            self.verifier = wrap_network(verifier, mean, std)
            self.verifier_classes = torch.tensor(classes)
        self.min_prob = min_prob

    def check_size(self, size: int) -> None:
        """Run the verifier, if any, on an image of `size` pixels a side.

        Raises:
            ValueError: If the verifier does not take this size.
        """
        if self.verifier is None:
            return
        pixels = torch.zeros(1, size, size, self.mean.shape[1], dtype=torch.uint8)
        try:
            self.records(pixels, torch.zeros(1, dtype=torch.long))
        except (RuntimeError, AssertionError) as e:
            raise ValueError(
                f'--verifier does not take images of {size} pixels ({first_line(e)}). Choose another one.') from e

    def to_uint8(self, images: torch.Tensor) -> torch.Tensor:
        """Convert normalised images (B, C, H, W) to pixels (B, H, W, C)."""
        pixels = (images.cpu() * self.std + self.mean) * 255
        return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    @torch.no_grad()
    def records(self, pixels: torch.Tensor, targets: torch.Tensor) -> List[Dict[str, Any]]:
        """Return the manifest entry of each image: pixels (B, H, W, C), targets (B,)."""
        device = next(self.model.parameters()).device
        images = ((pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std).to(device)

        def probabilities(logits: torch.Tensor, classes: torch.Tensor) -> List[float]:
            return logits.float().softmax(1).gather(1, classes.to(device)[:, None])[:, 0].tolist()

        chunks = images.split(MAX_IMAGES)
        teacher = probabilities(torch.cat([self.model(x) for x in chunks]), targets)
        verifier: List[Optional[float]] = [None] * len(targets)
        if self.verifier is not None:
            logits = torch.cat([self.verifier(x, with_features=False)[0] for x in chunks])
            verifier = list(probabilities(logits, self.verifier_classes[targets]))
        return [
            dict(target=target, teacher_prob=round(p, 4), verifier_prob=None if v is None else round(v, 4),
                 kept=v is None or v >= self.min_prob)
            for target, p, v in zip(targets.tolist(), teacher, verifier)
        ]
