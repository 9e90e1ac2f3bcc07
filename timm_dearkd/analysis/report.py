"""HTML report of a run: results, curves, attention, predictions and options."""
import argparse
import base64
import io
import logging
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from PIL import Image
from timm.data.model_config import resolve_input_data_config
from torch.utils.data import IterableDataset

from distill_hooks.errors import one_line
from timm_dearkd._version import __version__
from timm_dearkd.commands import POSITIVE_INT, add_device, check_overwrite
from timm_dearkd.distances import read_log
from timm_dearkd.engine.data import class_indices, evenly_spaced, is_image_folder, open_dataset
from timm_dearkd.engine.wrappers import set_image_mode
from timm_dearkd.files import write_bytes, write_text

from .attention_distance import plot_over_epochs
from .attention_map import head_positions, plot_heads
from .compare import drawn_columns, plot_column, plot_runs
from .figures import new_figure, render
from .inputs import ImageFiles, class_names, image_transform, label_names, load_model
from .predict import Prediction, accuracy, mistakes_first, predict
from .runs import Run, open_run, readable, why_no_model

_logger = logging.getLogger(__name__)

NUM_PICTURES = 18
PICTURES = ('curves', 'distances', 'heads')  # plots that --pictures writes


def check_available() -> None:
    """Check that the packages that reports need are installed.

    Raises:
        ValueError: If matplotlib or jinja2 is missing.
    """
    new_figure()
    try:
        import jinja2  # noqa: F401
    except ImportError as e:
        raise ValueError(
            "Reports need jinja2: pip install -e '.[analysis]' in the clone, or pip install jinja2.") from e


def write_report(
        folder: str,
        output: Optional[str] = None,
        num_images: int = 512,
        device: Optional[str] = None,
        pictures: Optional[str] = None,
) -> Path:
    """Write the HTML report of a run, finished or not.

    Args:
        folder: Output folder of train.py.
        output: HTML file; None means `report.html` in the folder.
        num_images: Validation images to predict.
        device: Device of the model.
        pictures: Folder for PNG files of the plots; None writes none.

    Returns:
        The HTML file.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If train.py did not write the folder, or a package is missing.
    """
    check_available()
    import jinja2

    run = open_run(folder)
    model, problem = _load(run, device)
    columns = drawn_columns([run])
    figures = _figures(run, model)
    if pictures:
        curves = {'curves': plot_runs([run], columns)} if columns else {}
        for name, figure in {**curves, **figures}.items():
            write_bytes(Path(pictures) / f'{name}.png', render(figure))
    predictions, no_predictions = (None, problem) if model is None else _predictions(run, model, num_images)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
        undefined=jinja2.StrictUndefined)
    page = environment.get_template('report.html').render(
        run=run, version=__version__, summary=_summary(run), tiles=_tiles(run, model),
        curves=[_curve(run, column) for column in columns],
        **{name: _svg(figures[name]) if name in figures else '' for name in ('distances', 'heads')},
        no_heads='The model has no MHCA.' if model is not None else problem,
        predictions=predictions, no_predictions=no_predictions,
        small_images=model is not None and resolve_input_data_config(model)['input_size'][-1] <= 64,
        commands=[session['command'] for session in run.info.get('sessions', ())],
        facts=_facts(run), options=sorted(run.args.items()))
    path = Path(output) if output else run.folder / 'report.html'
    write_text(path, page)
    return path


def _figures(run: Run, model: Any) -> Dict[str, Any]:
    """Plot the attention distances and the heads, if the run has them."""
    figures = {}
    log = read_log(run.folder)
    if log:
        figures['distances'] = plot_over_epochs(log, run.stage2_start)
    positions = head_positions(model) if model is not None else {}
    if positions:
        figures['heads'] = plot_heads(positions)
    return figures


def _svg(figure: Any) -> str:
    return render(figure, 'svg').decode()


def _curve(run: Run, column: str) -> str:
    figure, ((axes,),) = new_figure(size=(4.6, 2.9))
    plot_column(axes, [run], column)
    if run.stage2_start is not None:
        axes.legend(frameon=False)
    return _svg(figure)


def _load(run: Run, device: Optional[str]) -> Tuple[Any, str]:
    """Return the best model so far; or None, and the reason."""
    if not (run.folder / 'config.json').exists():
        return None, f'No model: {why_no_model(run.folder)}.'
    try:
        return load_model(str(run.folder), device=device), ''
    except (OSError, ValueError) as e:
        return None, f'The model could not be loaded: {one_line(e)}'


def _summary(run: Run) -> str:
    """Describe the model, the data and the teacher in one or two sentences."""
    data = run.info.get('data', {})
    images = f'{data["train_images"]:,} images' if data.get('train_images') else 'images'
    classes = f' of {data["classes"]} classes' if data.get('classes') else ''
    source = run.args.get('data_dir') or run.args.get('data') or ''
    name = ' '.join(str(part) for part in (run.args.get('dataset'), source) if part)
    text = f'{run.args.get("model")}, trained on {images}{classes}' + (f' ({name})' if name else '') + '.'
    teacher = run.args.get('kd_model_name')
    if teacher:
        text += f' Its teacher is {teacher}'
        if run.stage2_start is not None:
            text += f', for the first {run.stage2_start} epochs (stage I)'
        text += '.'
    return text


def _tiles(run: Run, model: Any) -> List[Tuple[str, str]]:
    """Return the values and labels at the top of the page."""
    unit = ' %' if run.metric.endswith(('top1', 'top5')) else ''
    label = readable(run.metric).replace(', %', '')
    tiles = []
    for which, point in (('best', run.best()), ('last', run.last())):
        if point:
            digits = '.2f' if unit else '.4g'
            tiles.append((f'{point[1]:{digits}}{unit}', f'{which} {label}, epoch {point[0]}'))
    teacher_top1 = run.info.get('results', {}).get('teacher_top1')
    if teacher_top1 is not None:
        tiles.append((f'{teacher_top1:.2f} %', 'top-1 of the teacher'))
    tiles.append((f'{run.num_done} / {run.num_epochs}', 'epochs'))
    if model is not None:
        tiles.append((f'{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M', 'parameters'))
    images = run.info.get('data', {}).get('train_images')
    return tiles + ([(f'{images:,}', 'training images')] if images else [])


def _facts(run: Run) -> List[Tuple[str, Any]]:
    """Return keys and values about the data, the environment and the sessions."""
    data, environment = run.info.get('data', {}), run.info.get('environment', {})
    facts = [(key.replace('_', ' '), value) for part in (data, environment) for key, value in part.items()]
    sessions = run.info.get('sessions', ())
    facts += [('started', session['started']) for session in sessions[:1]]
    facts += [('resumed', f'{session["started"]}, from epoch {session["epoch"]}') for session in sessions[1:]]
    return facts or [('environment', 'not recorded')]


def validation_set(run: Run, names: Optional[Sequence[str]], mode: str) -> Any:
    """Open the validation images of a run, with the class indices of its model.

    Args:
        run: The run.
        names: Names that label the classes of the model, see `label_names`; None takes the order of the data set.
        mode: Pillow mode of the images, if the run does not set one.

    Raises:
        FileNotFoundError: If the data set does not exist any more.
        ValueError: If it cannot be opened, or the run has no validation images.
    """
    args = run.args
    split, root = args.get('val_split') or '', args.get('data_dir') or args.get('data')
    if not split:
        raise ValueError('the run has no validation images.')
    options: Dict[str, Any] = dict(is_training=False, input_img_mode=args.get('input_img_mode') or mode)
    kind, known = args.get('dataset') or '', {name: index for index, name in enumerate(names or ())}
    if known and is_image_folder(kind):
        options['class_map'] = known
    for key in ('input_key', 'target_key'):
        if args.get(key):
            options[key] = args[key]
    dataset = open_dataset(kind, root, split, **options)
    indices = {key: known.get(str(key), -1) for key in class_indices(dataset)}
    if min(indices.values(), default=-1) >= 0 and indices != class_indices(dataset):
        dataset = open_dataset(kind, root, split, class_map=indices, **options)
    if not kind:  # timm's data set replaces an unreadable image by the next one
        return ImageFiles(dataset.reader.samples, options['input_img_mode'])
    set_image_mode(dataset, options['input_img_mode'])
    return dataset


def _predictions(run: Run, model: Any, num_images: int) -> Tuple[Optional[Dict[str, Any]], str]:
    """Return the data of the predictions section; or None, and the reason."""
    names, mode = class_names(model), image_transform(model)[1]
    try:
        dataset = validation_set(run, label_names(model), mode)
        is_stream = isinstance(dataset, IterableDataset)
        if is_stream:
            dataset = list(islice(dataset, num_images))
        places = evenly_spaced(len(dataset), num_images)
        found = predict(model, dataset, places)
    except (OSError, ValueError) as e:
        return None, f'The validation images could not be read: {one_line(e)}'
    top1 = accuracy(found)
    if top1 is None:
        return None, 'None of the validation images could be read.'
    mistakes = [p for p in mistakes_first(found) if p.is_mistake]
    pairs = Counter((names[p.label], names[p.classes[0]]) for p in mistakes if p.label is not None)
    return dict(
        top1=f'{top1[0]:.1f} %',
        count=f'{top1[1]:,} validation images' + (
            f', spread over all {len(dataset):,}' if len(places) < len(dataset) else '') + (
            ', the first ones of the stream' if is_stream and len(dataset) == num_images else '') + (
            f'; {len(places) - len(found)} cannot be read' if len(found) < len(places) else ''),
        samples=[_picture(dataset, found[i], names) for i in evenly_spaced(len(found), NUM_PICTURES)],
        mistakes=[_picture(dataset, p, names) for p in mistakes[:NUM_PICTURES]],
        confused=[(label, says, count) for (label, says), count in pairs.most_common(10)],
    ), ''


def _picture(dataset: Any, prediction: Prediction, names: Sequence[str], size: int = 160) -> Dict[str, Any]:
    """Return an image as a data URL, and the texts of its prediction."""
    image: Image.Image = dataset[prediction.place][0]
    image.thumbnail((size, size))
    small = max(image.size) <= 64
    buffer = io.BytesIO()
    image.convert('L' if image.mode == 'L' else 'RGB').save(buffer, 'PNG' if small else 'JPEG', quality=85)
    content = base64.b64encode(buffer.getvalue()).decode()
    return dict(
        src=f'data:image/{"png" if small else "jpeg"};base64,{content}',
        says=names[prediction.classes[0]],
        prob=f'{100 * prediction.probs[0]:.0f} %',
        label=names[prediction.label] if prediction.label is not None else '',
        mistake=prediction.is_mistake)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the tool."""
    add = parser.add_argument
    add('run', metavar='RUN', help='output folder of train.py')
    add('--output', metavar='FILE', help='HTML file (default: RUN/report.html)')
    add('--num-images', type=POSITIVE_INT, default=512, metavar='N',
        help='validation images to predict (default: %(default)s)')
    add('--pictures', metavar='DIR', help='folder for PNG files of the plots (default: none)')
    add('--overwrite', action='store_true', help='replace existing files; RUN/report.html is always replaced')
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    """Write the report; print the path of the file."""
    default = Path(args.run, 'report.html')
    files = [Path(args.output or default), *(Path(args.pictures, f'{name}.png') for name in PICTURES if args.pictures)]
    check_overwrite([file for file in files if file.absolute() != default.absolute()], args.overwrite)
    print(write_report(args.run, args.output, args.num_images, args.device, args.pictures))
