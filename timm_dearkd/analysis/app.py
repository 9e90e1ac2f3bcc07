"""Local web page of a model: drop an image, see its classes and the attention."""
import argparse
import contextlib
import html
import logging
import os
import socket
import threading
from dataclasses import dataclass
from typing import Any, Dict, Optional, Sequence, Tuple

import torch
from PIL import Image, ImageDraw
from timm.data.model_config import resolve_input_data_config

from distill_hooks import Teacher
from distill_hooks.errors import one_line
from timm_dearkd.commands import POSITIVE_INT
from timm_dearkd.distances import attention_layers
from timm_dearkd.engine.distillation import load_teacher

from .attention_map import attention_maps, seen_image
from .inputs import class_names, image_transform, label_names, load_model, open_image
from .predict import top_classes
from .runs import Run, open_run

_logger = logging.getLogger(__name__)

SIDE = 448  # pixels to which small pictures are enlarged
DAY = 24 * 60 * 60
Answer = Dict[str, float]  # probability by class name
Patch = Tuple[int, int]  # row and column, counted from 0


@dataclass
class Viewer:
    """A student and its teacher, as the page shows them.

    Args:
        student: A timm model in eval mode.
        title: Its name.
        facts: What the page says about it.
        teacher: Its teacher, on the same device; None if there is none.
        teacher_names: Class names of the teacher's answers.
    """
    student: Any
    title: str
    facts: str = ''
    teacher: Optional[Teacher] = None
    teacher_names: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.names = class_names(self.student)
        self.transform, self.mode = image_transform(self.student)
        self.num_layers = self.num_heads = 0
        try:
            layers = attention_layers(self.student)
        except ValueError:  # not a vision transformer
            return
        self.num_layers, self.num_heads = len(layers), min(layer.num_heads for layer in layers)

    def read(self, path: str) -> torch.Tensor:
        """Return an image file as the student's input (C, H, W).

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If the file cannot be read as an image.
        """
        return self.transform(open_image(path, self.mode)).to(next(self.student.parameters()).device)

    @torch.inference_mode()
    def classify(self, image: torch.Tensor, topk: int = 5) -> Tuple[Answer, Answer]:
        """Return the answers of the student and of the teacher; {} without a teacher."""
        student = _answer(self.student(image[None]), self.names, topk)
        if self.teacher is None:
            return student, {}
        return student, _answer(self.teacher(image[None], with_features=False)[0], self.teacher_names, topk)

    def picture(self, image: torch.Tensor) -> Image.Image:
        """Return the student's input as a picture, enlarged if it is small."""
        seen = seen_image(self.student, image).convert('RGB')
        factor = max(1, SIDE // max(seen.size))
        return seen.resize((factor * seen.width, factor * seen.height), Image.Resampling.NEAREST)

    def grid(self, image: torch.Tensor) -> Tuple[int, int]:
        """Return the rows and columns of patches of an input."""
        return self.student.patch_embed.dynamic_feat_size(tuple(image.shape[-2:]))

    def patch_at(self, image: torch.Tensor, x: int, y: int) -> Patch:
        """Return the patch at a pixel of the picture."""
        picture, (rows, columns) = self.picture(image), self.grid(image)
        return y * rows // picture.height, x * columns // picture.width

    def attention(self, image: torch.Tensor, patch: Patch, layer: int = 1, head: int = 0) -> Image.Image:
        """Return a picture of the attention of a patch, which gets a frame.

        Args:
            image: The student's input (C, H, W).
            patch: The query patch.
            layer: Layer, counted from 1.
            head: Head, counted from 1; 0 is the mean of all heads.
        """
        maps = list(attention_maps(self.student, image, layer, patch).values())[-1]  # of MHCA, the sum
        weights = maps[head - 1] if head else maps.mean(dim=0)
        picture = self.picture(image)
        strength = (230 * weights / weights.max().clamp(min=1e-12)).byte().cpu().numpy()
        mask = Image.fromarray(strength).resize(picture.size, Image.Resampling.NEAREST)
        grey, color = picture.convert('L').convert('RGB'), Image.new('RGB', picture.size, 'orangered')
        picture = Image.composite(color, grey, mask)
        height, width = picture.height / weights.shape[0], picture.width / weights.shape[1]
        box = [patch[1] * width, patch[0] * height, (patch[1] + 1) * width - 1, (patch[0] + 1) * height - 1]
        ImageDraw.Draw(picture).rectangle(box, outline='cyan', width=3)
        return picture

    def show(self, path: str, layer: int = 1, head: int = 0) -> Tuple[Any, ...]:
        """Return what the page shows of a file, which need not be an image.

        Returns:
            A message, the answers of student and teacher, the picture, the attention of the patch in the middle, that
            patch, and the student's input. All but the message are None if the file cannot be read as an image.
        """
        try:
            image = self.read(path)
        except (OSError, ValueError) as e:
            message = str(e).replace(os.path.dirname(path) + os.sep, '')  # the folder of the upload
            return message, None, None, None, None, None, None
        patch = attention = None
        if self.num_layers:
            rows, columns = self.grid(image)
            patch = rows // 2, columns // 2
            attention = self.attention(image, patch, layer, head)
        return os.path.basename(path), *self.classify(image), self.picture(image), attention, patch, image


def _answer(logits: torch.Tensor, names: Sequence[str], topk: int) -> Answer:
    (classes,), (probs,) = top_classes(logits, topk)
    return {names[c]: prob for c, prob in zip(classes, probs)}


def open_viewer(name: str) -> Viewer:
    """Load a student, and the teacher that its run folder names.

    Args:
        name: Run folder, timm name, `hf-hub:` or `local-dir:`.

    Raises:
        ValueError: If the student does not load.
    """
    student = load_model(name)
    config = resolve_input_data_config(student)
    height, width = config['input_size'][1:]
    architecture = student.pretrained_cfg.get('architecture') or type(student).__name__
    viewer = Viewer(student, name, f'{architecture}, {student.num_classes} classes, {height} x {width} pixels.')
    try:
        run = open_run(name.removeprefix('local-dir:'))
    except (OSError, ValueError):
        viewer.facts += ' No teacher: the model is not the folder of a run.'
        return viewer
    viewer.title = run.name
    results = run.summary()
    top1 = ', '.join(f'{which} ' * (len(results) > 1) + f'{value:.1f} %' for which, value in results.items())
    viewer.facts += f' Top-1 on the validation images: {top1}.' if top1 else ''
    if not run.args.get('kd_model_name'):
        viewer.facts += ' No teacher: the model was trained without one.'
        return viewer
    try:
        viewer.teacher, viewer.teacher_names = _find_teacher(viewer, run, config)
    except (OSError, ValueError) as e:
        _logger.warning(f'The page shows no teacher: {one_line(e)}')
        viewer.facts += ' No teacher: it could not be loaded, the terminal shows why.'
    return viewer


def _find_teacher(viewer: Viewer, run: Run, config: Dict[str, Any]) -> Tuple[Teacher, Sequence[str]]:
    """Load the teacher of a run. Return it and the class names of its answers."""
    has_own_classes = run.args.get('kd_distill_type') == 'feature'
    own_names = () if has_own_classes else label_names(viewer.student) or ()
    teacher = load_teacher(viewer.student, config, run.args, own_names).to(next(viewer.student.parameters()).device)
    names = class_names(teacher.model) if has_own_classes else viewer.names
    if teacher.num_classes != len(names):
        raise ValueError(f'It has {teacher.num_classes} classes, the student {len(names)}.')
    return teacher, names


def _import_gradio() -> Any:
    try:
        import gradio
        found = gradio.__version__
    except ImportError:
        found = 'none'
    if found == 'none' or not (6, 31) <= tuple(map(int, found.split('.')[:2])) < (7,):
        raise ValueError(
            f"The page needs gradio 6, from 6.31 (found: {found}): pip install -e '.[app]' in the clone, or pip install"
            " 'gradio>=6.31,<7'.")
    return gradio


def build_page(viewer: Viewer) -> Any:
    """Build the page, a `gradio.Blocks`."""
    gr, has_attention = _import_gradio(), viewer.num_layers > 0
    picture: Dict[str, Any] = dict(format='png', interactive=False, buttons=[], height=SIDE + 64)
    # one at a time: `attention_maps` hooks into the model
    one: Dict[str, Any] = dict(
        concurrency_id='model', concurrency_limit=1, show_progress='hidden', api_visibility='private')
    with gr.Blocks(title=f'{viewer.title} - timm-dearkd', analytics_enabled=False, delete_cache=(DAY, DAY)) as page:
        gr.Markdown(f'# {viewer.title}\n{viewer.facts}')
        image, patch = gr.State(), gr.State()
        with gr.Row():
            with gr.Column():
                file = gr.File(label='Drop an image', height=170)
                message = gr.HTML()
            student = gr.Label(label='Student' if viewer.teacher else 'Classes')
            teacher = gr.Label(label='Teacher', visible=viewer.teacher is not None)
        with gr.Row():
            seen = gr.Image(label='What the model sees' + has_attention * ': click a patch', **picture)
            attention = gr.Image(
                label='Attention of the framed patch: red is more', visible=has_attention, **picture)
        with gr.Row(visible=has_attention):
            layer = gr.Slider(1, max(2, viewer.num_layers), 1, step=1, label='Layer', visible=viewer.num_layers > 1)
            heads = [('mean of all heads', 0), *((f'head {i}', i) for i in range(1, viewer.num_heads + 1))]
            head = gr.Dropdown(heads, value=0, label='Head')

        def show(path, layer, head):
            text, *rest = viewer.show(path, layer, head)
            return None, html.escape(text), *rest

        def look(image, patch, layer, head):
            return None if image is None else viewer.attention(image, patch, layer, head)

        def choose(image, layer, head, event: gr.SelectData):  # type: ignore[name-defined]
            patch = viewer.patch_at(image, *event.index)
            return patch, viewer.attention(image, patch, layer, head)

        # the drop zone is emptied, so that it takes the next image
        file.upload(show, [file, layer, head], [file, message, student, teacher, seen, attention, patch, image], **one)
        gr.on(
            [layer.change, head.change], look, [image, patch, layer, head], attention, trigger_mode='always_last',
            **one)
        if has_attention:
            gr.on([seen.select, attention.select], choose, [image, layer, head], [patch, attention], **one)
    return page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the tool."""
    add = parser.add_argument
    add('model', metavar='MODEL', help='run folder, timm name, hf-hub: or local-dir:')
    add('--host', default='127.0.0.1', metavar='ADDRESS',
        help='address to listen on; 0.0.0.0 lets other machines in (default: %(default)s)')
    add('--port', type=POSITIVE_INT, metavar='N', help='port to listen on (default: the first free one from 7860)')
    add('--share', action='store_true', help="open the page to the internet, through Gradio's servers")


def _check_address(host: str, port: Optional[int]) -> None:
    try:
        socket.create_server((host, port or 0)).close()
    except (OSError, OverflowError) as e:
        reason = (getattr(e, 'strerror', None) or str(e)).partition(' (')[0].rstrip('.')
        address = f'{host}, port {port}' if port else host
        raise ValueError(f'Cannot listen on {address} ({reason}). Set another --port or --host.') from e


def _serve(page: Any, host: str, port: Optional[int], share: bool) -> str:
    """Start to serve a page in another thread, and return its address."""
    theme = _import_gradio().themes.Default(font=['system-ui', 'sans-serif'], font_mono=['monospace'])
    logging.getLogger('httpx').setLevel(logging.WARNING)
    try:
        _, local, public = page.launch(
            server_name=host, server_port=port, share=share, prevent_thread_lock=True, quiet=True, theme=theme,
            footer_links=[], ssr_mode=False, run_history=False, enable_monitoring=False, mcp_server=False)
    except Exception as e:  # gradio asks its own page for an answer, and raises any kind of error
        raise ValueError(
            f'The page on {host} gives no answer ({one_line(e)}). If HTTP_PROXY is set, add {host} to NO_PROXY.') from e
    return public or local


def run(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    _import_gradio()
    _check_address(args.host, args.port)
    page = build_page(open_viewer(args.model))
    url = _serve(page, args.host, args.port, args.share)
    with contextlib.suppress(KeyboardInterrupt):
        print(f'{url} shows {args.model}. Ctrl-C stops it.', flush=True)
        threading.Event().wait()
    page.close(verbose=False)
