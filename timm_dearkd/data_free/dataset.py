"""Data set of synthetic images: folder or WebDataset shards, and a manifest.

`batches/NUMBER.json` is written after all other files of a batch. Without it, a resumed run makes the batch again.
"""
import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Set, Tuple

from PIL import Image

from timm_dearkd.engine.image_folder import class_order, normal_name
from timm_dearkd.files import find_obstacle, write_bytes, write_table, write_text

from .look import encode_png

FORMATS = ('folder', 'wds')
MAX_NAME_BYTES = 240  # file systems allow 255, and equal names get a number
# File systems refuse these parts of a folder name. A leading dot hides the folder.
_INVALID_PARTS = re.compile(
    r'[<>:"/\\|?*\x00-\x1f\x7f]|^\.|[. ]+$|^(?=(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|$))', re.IGNORECASE)
# Options that name networks, whose weights are compared
NETWORKS = {'model', 'checkpoint', 'student', 'student_checkpoint', 'verifier', 'verifier_checkpoint'}


class SyntheticSet:
    """Data set of synthetic images that grows batch by batch.

    Args:
        root: Folder of the data set.
        classes: Class names by the CNN's class index.
        settings: Options and versions that the images are made with.
        data_format: 'folder' (train/CLASS/IMAGE.png) or 'wds' (train/train-NUMBER.tar).
        resume: Continue with the images in the folder.

    Raises:
        ValueError: If the folder has images made with other settings, or see `check_folder`.
    """

    def __init__(
            self,
            root: str,
            classes: Dict[int, str],
            settings: Dict[str, Any],
            data_format: str = 'folder',
            resume: bool = False,
    ) -> None:
        self.root = Path(root)
        self.classes = classes
        self.settings = {**settings, 'classes': {str(index): name for index, name in classes.items()},
                         'format': data_format}
        self.data_format = data_format
        self.names = class_order(classes.values())  # as train.py numbers the folders
        self._samples: Dict[int, List[Image.Image]] = {}
        self._sampled: Set[Path] = set()
        check_folder(root, resume)
        saved = read_settings(root)
        keys = {*saved, *self.settings} - {'versions', 'num_images'} if saved else set()
        if saved.get('weights') == self.settings.get('weights'):  # from wherever they were loaded
            keys -= NETWORKS
        differing = sorted(key for key in keys if saved.get(key) != self.settings.get(key))
        if differing:
            raise ValueError(
                f'{root!r} has images made with another {", ".join(differing)}. Choose another OUT, or use the settings'
                ' in its settings.json.')

    def start(self) -> None:
        """Write the settings."""
        write_text(self.root / 'settings.json', json.dumps(self.settings, indent=2))

    def _batch_path(self, batch: int) -> Path:
        return self.root / 'batches' / f'{batch:06d}.json'

    def is_done(self, batch: int) -> bool:
        """Return whether a batch is written completely."""
        return self._batch_path(batch).exists()

    def write(self, batch: int, images: Sequence[Image.Image], records: Sequence[Dict[str, Any]], **info: Any) -> None:
        """Write a batch.

        Args:
            batch: Number of the batch.
            images: Images, also those that are not kept.
            records: Entry of each image in the manifest: 'target' (the CNN's class), 'kept' and others.
            **info: Further entries of the batch.
        """
        entries, files = [], {}
        for i, (image, record) in enumerate(zip(images, records)):
            name = f'{batch:06d}-{i:02d}'
            entries.append({'name': name, **record})
            class_name = self.classes[record['target']]
            if record['kept']:
                files[name] = (image, class_name)
            elif self.data_format == 'folder':  # an interrupted attempt may have kept it
                (self.root / 'train' / class_name / f'{name}.png').unlink(missing_ok=True)
        if self.data_format == 'folder':
            for name, (image, class_name) in files.items():
                write_bytes(self.root / 'train' / class_name / f'{name}.png', encode_png(image))
        elif files:
            write_bytes(self.root / 'train' / f'train-{batch:06d}.tar', self._tar(files))
        write_text(self._batch_path(batch), json.dumps(dict(batch=batch, images=entries, **info)))

    def _tar(self, files: Dict[str, Any]) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode='w') as tar:
            for name, (image, class_name) in files.items():
                label = str(self.names.index(class_name)).encode()
                for extension, content in (('png', encode_png(image)), ('cls', label)):
                    info = tarfile.TarInfo(f'{name}.{extension}')
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        return buffer.getvalue()

    def batches(self) -> Iterator[Dict[str, Any]]:
        """Yield the entries of all finished batches."""
        for path in sorted((self.root / 'batches').glob('[0-9]*.json')):
            yield json.loads(path.read_text())

    def finish(self) -> Tuple[Dict[str, int], List[int]]:
        """Write the manifest, the class map, `losses.csv`, and for shards `_info.json` and `class_map.txt`.

        Returns:
            Numbers of images 'made', 'kept' and 'sure' (probability above 0.5), of 'classes' with kept images and of
            'failed' batches; and the class map.
        """
        batches = list(self.batches())
        images = [{**image, 'class': self.classes[image['target']]} for b in batches for image in b['images']]
        failed = [b['batch'] for b in batches if b.get('failed')]
        manifest = dict(
            settings=self.settings,
            verified=self.settings.get('verifier') is not None,
            failed_batches=failed,
            seconds=round(sum(b.get('seconds', 0.) for b in batches), 1),
            images=images,
        )
        write_text(self.root / 'manifest.json', json.dumps(manifest, indent=1))
        kept = [image for image in images if image['kept'] and self._exists(image)]
        lines = [f'{index} {self.classes[index]}\n' for index in self.class_map(kept)]
        write_text(self.root / 'kd_class_map.txt', ''.join(lines))
        rows = [dict(batch=b['batch'], **row) for b in batches for row in b.get('losses', ())]
        if rows:
            write_table(self.root / 'losses.csv', [list(rows[0]), *([row[name] for name in rows[0]] for row in rows)])
        if self.data_format == 'wds':
            self._write_info(kept)
        sure = sum(image['teacher_prob'] > 0.5 for image in images)
        classes = len({image['class'] for image in kept})
        counts = dict(made=len(images), kept=len(kept), classes=classes, sure=sure, failed=len(failed))
        return counts, self.class_map(kept)

    def class_map(self, kept: Sequence[Dict[str, Any]]) -> List[int]:
        """Return the CNN's class for each class of a student of these images.

        An image folder has no classes without images; shards have all classes.
        """
        index = {name: index for index, name in self.classes.items()}
        present = {image['class'] for image in kept} if self.data_format == 'folder' else set(self.names)
        return [index[name] for name in self.names if name in present]

    def samples(self, rows: int = 20, columns: int = 8) -> Dict[str, List[Image.Image]]:
        """Read the first kept images of the first classes, by class name.

        Each call reads the batches that are new since the last one.
        """
        for path in sorted(set((self.root / 'batches').glob('[0-9]*.json')) - self._sampled):
            self._sampled.add(path)
            for record in json.loads(path.read_text())['images']:
                target = record['target']
                wanted = len(self._samples) < rows or target <= max(self._samples)
                full = len(self._samples.get(target, ())) >= columns
                if wanted and not full and record['kept'] and self._exists(record):
                    self._samples.setdefault(target, []).append(self._read(record))
                    if len(self._samples) > rows:
                        del self._samples[max(self._samples)]
        return {self.classes[index]: images for index, images in sorted(self._samples.items())}

    def _image_path(self, record: Dict[str, Any]) -> Path:
        return self.root / 'train' / self.classes[record['target']] / f'{record["name"]}.png'

    def _exists(self, record: Dict[str, Any]) -> bool:
        """Return whether a kept image still exists, because users may delete files."""
        return self.data_format != 'folder' or self._image_path(record).exists()

    def _read(self, record: Dict[str, Any]) -> Image.Image:
        if self.data_format == 'folder':
            content = self._image_path(record).read_bytes()
        else:
            name = f'{record["name"]}.png'
            with tarfile.open(self.root / 'train' / f'train-{name.partition("-")[0]}.tar') as tar:
                content = tar.extractfile(name).read()  # type: ignore[union-attr]
        return Image.open(io.BytesIO(content))

    def _write_info(self, kept: Sequence[Dict[str, Any]]) -> None:
        """Write `_info.json`, in which timm looks up the shards and their lengths, and the class names."""
        counts: Dict[str, int] = {}
        for image in kept:
            shard = f'train-{image["name"].partition("-")[0]}.tar'
            counts[shard] = counts.get(shard, 0) + 1
        split = dict(
            name='train', num_samples=len(kept), filenames=[f'train/{shard}' for shard in counts],
            shard_lengths=list(counts.values()))
        write_text(self.root / '_info.json', json.dumps(dict(splits=dict(train=split))))
        lines = [f'{index} {name}\n' for index, name in enumerate(self.names)]
        write_text(self.root / 'class_map.txt', ''.join(lines))


def check_folder(root: str, resume: bool) -> None:
    """Check that a data set may be written to a folder.

    Raises:
        ValueError: If it has images and `resume` is false, has other files, is a file, or cannot be written.
    """
    path = Path(root)
    place = find_obstacle(path)
    if place:
        raise ValueError(f'{root!r} cannot be written: {str(place)!r} is not a writable folder. Choose another OUT.')
    if read_settings(root):
        if not resume:
            raise ValueError(
                f'{root!r} has images. Add --resume to continue with the same settings, or choose another OUT.')
    elif path.exists() and any(path.iterdir()):
        raise ValueError(f'{root!r} is not empty and not a data set of this command. Choose another OUT.')


def read_settings(root: str) -> Dict[str, Any]:
    """Return the settings of the images in a folder; {} if there are none."""
    path = Path(root) / 'settings.json'
    return json.loads(path.read_text()) if path.exists() else {}


def folder_name(name: str, index: int) -> str:
    """Return a class name as a folder name, with `_` for what file systems refuse, or the index if it is empty."""
    short = normal_name(name).encode(errors='surrogatepass')[:MAX_NAME_BYTES].decode(errors='ignore')
    return _INVALID_PARTS.sub('_', short) or f'{index:04d}'
