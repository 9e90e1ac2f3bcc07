"""Predictions of a model as a CSV, and a picture with the mistakes first."""
import argparse
import logging
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from distill_hooks.errors import one_line
from timm_dearkd.commands import NON_NEGATIVE_INT, POSITIVE_INT
from timm_dearkd.engine.process import default_workers
from timm_dearkd.files import write_bytes, write_table

from .figures import escape_label, new_figure, render
from .inputs import (
    add_model_arguments,
    class_names,
    find_images,
    image_transform,
    label_names,
    load_model,
    output_files,
)

_logger = logging.getLogger(__name__)


class Prediction(NamedTuple):
    """Prediction for an image.

    Args:
        place: Index of the image in the data set.
        label: Class index of the label; None if unknown.
        classes: Class indices, most probable first.
        probs: Probabilities of `classes`.
    """
    place: int
    label: Optional[int]
    classes: List[int]
    probs: List[float]

    @property
    def is_mistake(self) -> bool:
        """Whether the label is known and not the most probable class."""
        return self.label is not None and self.label != self.classes[0]


class _Inputs(Dataset):
    """Model inputs (place, label, image); the image is None if it cannot be read."""

    def __init__(self, dataset: Any, places: Sequence[int], transform: Callable[..., torch.Tensor]) -> None:
        self.dataset, self.places, self.transform = dataset, places, transform

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> Tuple[int, Optional[int], Optional[torch.Tensor]]:
        place = self.places[i]
        try:
            image, label = self.dataset[place]
            return place, label, self.transform(image)
        except (OSError, ValueError) as e:
            _logger.warning(f'{one_line(e)} Skipping it.')
            return place, None, None


def top_classes(logits: torch.Tensor, topk: int) -> Tuple[List[List[int]], List[List[float]]]:
    """Return the most probable classes (B, topk) of logits, and their probabilities."""
    probs, classes = logits.float().softmax(dim=-1).topk(min(topk, logits.shape[-1]))
    return classes.tolist(), probs.tolist()


def predict(
        model: nn.Module,
        dataset: Any,
        places: Optional[Sequence[int]] = None,
        topk: int = 5,
        batch_size: int = 64,
        workers: int = 0,
) -> List[Prediction]:
    """Predict the most probable classes of images.

    Args:
        model: A timm model, whose validation preprocessing is used.
        dataset: Returns a Pillow image and its label (or None) for an index.
        places: Indices of the images; None means all.
        topk: Number of classes per image.
        batch_size: Images per batch.
        workers: Data loading processes; at most one per full batch is started.

    Returns:
        A prediction for each image that can be read.
    """
    places = range(len(dataset)) if places is None else places
    device = next(model.parameters()).device
    inputs = _Inputs(dataset, places, image_transform(model)[0])
    workers = min(workers, len(places) // batch_size)
    loader = DataLoader(inputs, batch_size, num_workers=workers, collate_fn=list)
    predictions = []
    was_training = model.training
    model.eval()
    for samples in tqdm(loader, desc='Predict', unit='batch', leave=False, mininterval=1, disable=None):
        readable = [sample for sample in samples if sample[2] is not None]
        if not readable:
            continue
        with torch.inference_mode():
            logits = model(torch.stack([image for _, _, image in readable]).to(device))
        for (place, label, _), c, p in zip(readable, *top_classes(logits, topk)):
            predictions.append(Prediction(place, None if label is None else int(label), c, p))
    model.train(was_training)
    return predictions


def mistakes_first(predictions: Sequence[Prediction]) -> List[Prediction]:
    """Sort: mistakes by falling probability, then the others by rising probability."""
    return sorted(predictions, key=lambda p: (not p.is_mistake, -p.probs[0] if p.is_mistake else p.probs[0]))


def plot_predictions(dataset: Any, predictions: Sequence[Prediction], names: Sequence[str], columns: int = 6) -> Any:
    """Plot images with their predicted class; mistakes are red and have a label."""
    count = max(1, len(predictions))
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, axes = new_figure(rows, columns, (1.8 * columns, 2.15 * rows))
    for ax in axes.flat:
        ax.axis('off')
    for ax, prediction in zip(axes.flat, predictions):
        image = dataset[prediction.place][0]
        image.thumbnail((256, 256))
        is_grey = image.mode == 'L'
        ax.imshow(np.asarray(image if is_grey else image.convert('RGB')), cmap='gray' if is_grey else None)
        title = f'{names[prediction.classes[0]][:22]} {100 * prediction.probs[0]:.0f} %'
        if prediction.is_mistake:
            title += f'\nlabel: {names[prediction.label][:22]}'  # type: ignore[index]
        ax.set_title(escape_label(title), fontsize=8, color='tab:red' if prediction.is_mistake else 'black')
    return figure


def accuracy(predictions: Sequence[Prediction]) -> Optional[Tuple[float, int]]:
    """Return top-1 in percent and the number of labelled images; None without labels."""
    labelled = [p for p in predictions if p.label is not None]
    if not labelled:
        return None
    return 100 * sum(not p.is_mistake for p in labelled) / len(labelled), len(labelled)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the tool."""
    add = parser.add_argument
    add('images', nargs='+', metavar='PATH', help='images or folders; class folders label their images')
    add_model_arguments(parser, 'predictions')
    add('--topk', type=POSITIVE_INT, default=5, metavar='N', help='classes per image in the CSV (default: %(default)s)')
    add('--num-pictures', type=POSITIVE_INT, default=24, metavar='N',
        help='images in the picture (default: %(default)s)')
    add('-b', '--batch-size', type=POSITIVE_INT, default=64, metavar='N',
        help='images per batch (default: %(default)s)')
    add('-j', '--workers', type=NON_NEGATIVE_INT, metavar='N',
        help='data loading processes (default: 4, or the number of CPU cores if less)')


def run(args: argparse.Namespace) -> None:
    """Write predictions as CSV and as a picture; print those of ten images."""
    workers = default_workers() if args.workers is None else args.workers
    if len(args.model) > 1:
        raise ValueError(f'--model has {len(args.model)} names, expected one.')
    new_figure()
    table, picture = output_files(args, 'predictions', args.model[0], '.csv', '.png')
    model = load_model(args.model[0], args.checkpoint, args.device)
    names = class_names(model)
    files = find_images(args.images, label_names(model), model.num_classes, image_transform(model)[1])
    predictions = predict(model, files, topk=args.topk, batch_size=args.batch_size, workers=workers)
    if not predictions:
        raise ValueError(f'None of the {len(files)} images can be read.')
    rows: List[Dict[str, Any]] = []
    for p in predictions:
        row = {'image': files.samples[p.place][0], 'label': '' if p.label is None else names[p.label]}
        for rank, (index, prob) in enumerate(zip(p.classes, p.probs), start=1):
            row.update({f'class{rank}': names[index], f'prob{rank}': f'{prob:.4f}'})
        rows.append(row)
    write_table(table, [list(rows[0]), *(list(row.values()) for row in rows)])
    shown = mistakes_first(predictions)[:args.num_pictures]
    write_bytes(picture, render(plot_predictions(files, shown, names)))
    for p in shown[:10]:
        best = ', '.join(f'{names[index]} {100 * prob:.1f} %' for index, prob in zip(p.classes, p.probs))
        print(f'{files.samples[p.place][0]}: {best}' + (f' (label: {names[p.label]})' if p.is_mistake else ''))  # type: ignore[index]
    result = accuracy(predictions)
    print(f'{len(predictions)} images' + (f', top-1 {result[0]:.2f} % of {result[1]} with labels' if result else ''))
    print(f'{table}, {picture}')
