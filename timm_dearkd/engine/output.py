"""The output folder of a run: checkpoints, summary, and the exported student."""
import os
from pathlib import Path
from typing import Any, Dict, List, Optional

import safetensors.torch
import torch
import torch.nn as nn
import torchvision
from timm.models._hub import save_config_for_hf
from timm.utils import CheckpointSaver, unwrap_model

__all__ = ['AtomicCheckpointSaver', 'export_model', 'save_images', 'save_recovery', 'write_text']

EXPORT_NAME = 'model_best.safetensors'


class AtomicCheckpointSaver(CheckpointSaver):
    """timm's `CheckpointSaver`, but with a whole file under every name at any moment.

    timm unlinks `last` and `model_best` before it writes them anew; here they are replaced by a rename.
    """

    def _replace(self, src: str, dst: str) -> None:
        os.replace(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        link = f'{dst}.link'
        if os.path.exists(link):
            os.unlink(link)
        super()._duplicate(src, link)
        os.replace(link, dst)


def write_text(folder: str, name: str, text: str) -> None:
    """Write a file under a temporary name and rename it."""
    temporary = Path(folder) / f'.{name}.tmp'
    temporary.write_text(text)
    os.replace(temporary, Path(folder) / name)


def export_model(
        model: nn.Module,
        folder: str,
        data_config: Dict[str, Any],
        label_names: Optional[List[str]] = None,
) -> None:
    """Write a model so that ``timm.create_model('local-dir:FOLDER', pretrained=True)`` loads it.

    The weights go to `model_best.safetensors`, the architecture, its arguments, the input and the class names to
    `config.json`.

    Args:
        model: A timm model; wrappers are taken off.
        folder: Output folder of the run.
        data_config: timm's preprocessing configuration that the model was trained with.
        label_names: Class names in the order of the classifier.
    """
    model = unwrap_model(model)
    path = Path(folder)
    temporary = path / f'.{EXPORT_NAME}.tmp'
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    temporary.write_bytes(safetensors.torch.save(tensors, metadata={'format': 'pt'}))
    os.replace(temporary, path / EXPORT_NAME)

    temporary = path / '.config.json.tmp'
    model_config = {'label_names': label_names} if label_names else {}
    save_config_for_hf(model, str(temporary), model_config=model_config, data_config=data_config)
    os.replace(temporary, path / 'config.json')


def save_images(output_dir: str, update: int, images: torch.Tensor) -> None:
    """Write a batch (B, C, H, W) as one picture."""
    path = os.path.join(output_dir, f'train-batch-{update}.jpg')
    torchvision.utils.save_image(images, path, padding=0, normalize=True)


def save_recovery(saver: AtomicCheckpointSaver, epoch: int, interval: int, update: int, last: bool) -> None:
    """Write a recovery checkpoint where one is due."""
    if last or update % interval == 0:
        saver.save_recovery(epoch, batch_idx=update)
