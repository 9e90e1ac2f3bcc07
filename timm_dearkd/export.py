"""Export a trained model to ONNX, torch.export or safetensors, and check it.

    python -m timm_dearkd.export output/train/student --format onnx
"""
import argparse
import copy
import logging
import os
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence

import timm
import torch
import torch.nn as nn
from safetensors import SafetensorError
from timm.models import get_model_input_config
from timm.utils import setup_default_logging

from distill_hooks import load_model
from distill_hooks.errors import one_line
from timm_dearkd.attention import ConvAttention
from timm_dearkd.commands import POSITIVE_INT, check_overwrite, run_command
from timm_dearkd.engine.run_folder import save_folder
from timm_dearkd.engine.student import check_img_size

TOLERANCE = 1e-4  # for the logits, relative to values above 1


def _save_safetensors(model: Any, images: torch.Tensor, path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    save_folder(model, path, data_config=dict(input_size=tuple(images.shape[1:])))
    return timm.create_model(f'local-dir:{path}', pretrained=True).eval()


def _save_torch_export(model: nn.Module, images: torch.Tensor, path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    batch = torch.export.Dim('batch', min=1, max=2 ** 16)
    torch.export.save(torch.export.export(model, (images,), dynamic_shapes=({0: batch},)), path)
    return torch.export.load(path).module()


def _save_onnx(model: nn.Module, images: torch.Tensor, path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as e:
        raise ValueError(f"ONNX needs another package ({e}): pip install -e '.[export]' in the clone.") from e
    for name in ('onnxscript', 'onnx_ir'):  # they log dozens of lines about constant folding
        logging.getLogger(name).setLevel(logging.ERROR)
    batch = torch.export.Dim('batch', min=1, max=2 ** 16)
    torch.onnx.export(
        model, (images,), path, dynamo=True, dynamic_shapes=({0: batch},), input_names=['images'],
        output_names=['logits'], external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run(None, {'images': images.numpy()})[0])


FORMATS: Dict[str, Any] = {
    'safetensors': (_save_safetensors, ''), 'onnx': (_save_onnx, '.onnx'), 'torch-export': (_save_torch_export, '.pt2')}


@torch.no_grad()
def export(model: Any, kind: str, path: Path, img_size: Optional[int] = None) -> float:
    """Write a model, load it again, and compare the logits on three images.

    Args:
        model: A timm model. A copy is exported for the CPU, in float32.
        kind: 'safetensors' writes a folder with timm's `config.json`, which `local-dir:` loads. 'onnx' and
            'torch-export' write a program for any batch size, with MHCA's positional scores as constants, the fastest
            form on a CPU.
        path: Folder or file to write. An existing one is replaced.
        img_size: Side length of the images in pixels, to which a ViT's position embedding is resampled; None is the
            model's own.

    Returns:
        Largest difference of the logits, relative to values above 1.

    Raises:
        ValueError: If a package is missing, the model cannot be exported, or the logits differ.
    """
    model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    try:
        if img_size is not None and hasattr(model, 'set_input_size'):
            model.set_input_size(img_size)
        chans, *size = get_model_input_config(model)['input_size']
        size = [img_size or side for side in size]
        images = torch.randn(3, chans, *size, generator=torch.Generator().manual_seed(0))
        expected = model(images)
    except (AssertionError, RuntimeError) as e:
        size_text = f' of --img-size {img_size}' if img_size else ''
        raise ValueError(f'The model does not take images{size_text}: {one_line(e)}') from e
    if img_size is not None:
        check_img_size(model)
    if kind != 'safetensors':
        for module in model.modules():
            if isinstance(module, ConvAttention):
                module.freeze_scores()
    save, ending = FORMATS[kind]
    temporary = path.with_name(f'.tmp-{os.getpid()}-{path.stem}{ending}')
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        reloaded = save(model, images[:2], temporary)
        actual = torch.cat([reloaded(images[:1]), reloaded(images[1:])])
        error = float(((actual - expected).abs() / expected.abs().clamp(min=1)).max())
        if not error <= TOLERANCE:
            raise ValueError(f'The exported model differs by {error:.2g} from the original, more than {TOLERANCE}.')
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except (RuntimeError, SafetensorError) as e:  # raised by the exporters
        raise ValueError(one_line(e)) from e
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
    return error


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command."""
    parser = argparse.ArgumentParser(prog='timm-dearkd export', description='Export a trained model')
    add = parser.add_argument
    add('model', metavar='RUN_OR_MODEL', help='output folder of train.py, or a timm name')
    add('--checkpoint', metavar='FILE', help='weights of the model (default: its pretrained ones)')
    add('--format', default='safetensors', choices=list(FORMATS), help='file format (default: %(default)s)')
    add('--img-size', type=POSITIVE_INT, metavar='N', help="side length of the images in pixels (default: the model's)")
    add('--output', metavar='PATH', help='file or folder to write (default: MODEL-export, with .onnx or .pt2)')
    add('--overwrite', action='store_true', help='replace an export that exists')
    return parser


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    setup_default_logging()
    path = Path(args.output or f'{_file_name(args.model)}-export{FORMATS[args.format][1]}')
    if path.is_dir() and any(path.iterdir()) and not (args.format == 'safetensors' and _is_export(path)):
        raise ValueError(f'{str(path)!r} is a folder with other files. Set another --output.')
    check_overwrite([path], args.overwrite)
    try:
        model: Any = load_model(args.model, args.checkpoint)
    except (RuntimeError, SafetensorError) as e:  # raised for damaged files
        raise ValueError(one_line(e)) from e
    error = export(model, args.format, path, args.img_size)
    print(f'{path} (checked: its logits differ by at most {error:.1g})')


def _file_name(model: str) -> str:
    folder = Path(model.rpartition(':')[2])
    return (folder.resolve() if folder.is_dir() else folder).name


def _is_export(path: Path) -> bool:
    return {file.name for file in path.iterdir()} <= {'config.json', 'model.safetensors'}


def run_script(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command; an error is one line and status 2."""
    run_command(build_parser().prog, main, argv)


if __name__ == '__main__':
    run_script()
