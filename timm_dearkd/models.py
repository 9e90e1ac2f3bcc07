"""DearKD vision transformers.

Paper: `DearKD: Data-Efficient Early Knowledge Distillation for Vision Transformers` (CVPR 2022),
https://arxiv.org/abs/2204.12997. The geometry is DeiT's with more heads, and MHCA in the first blocks.
"""
import types
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Callable, Dict, Optional, Set, Tuple, Type, Union, cast

import timm
import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention
from timm.models import (
    PretrainedCfg,
    VisionTransformerDistilled,
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._input import update_model_args
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from .attention import ConvAttention
from .rel_pos import RelPosConfig, grid_constants
from .weights import locate_weights

__all__ = ['DearKD', 'add_mhca']

torch.fx.wrap('grid_constants')  # torch.fx wraps functions by the module that calls them


def _parent_pos_embed(vit_cls: Type[VisionTransformer]) -> Callable[..., torch.Tensor]:
    """Copy the parent's `_pos_embed` under a new name: TorchScript has no super()."""
    fn = vit_cls._pos_embed
    copy = types.FunctionType(fn.__code__, fn.__globals__, '_parent_pos_embed', fn.__defaults__, fn.__closure__)
    copy.__annotations__ = fn.__annotations__
    return copy


class MhcaMixin(VisionTransformer if TYPE_CHECKING else object):  # type: ignore[misc]
    """Mixin for a `VisionTransformer` with MHCA blocks: it sets their token grid."""

    def _set_mhca_grid(self, height: int, width: int) -> None:
        for block in self.blocks:
            if hasattr(block.attn, 'rpe'):  # noqa: SIM102  TorchScript needs two statements
                if block.attn.rpe.grid_size != (height, width):
                    block.attn.rpe.set_grid_size(height, width)

    @torch.jit.unused
    def _is_traced_by_fx(self, x: torch.Tensor) -> bool:
        return isinstance(x, torch.fx.Proxy)

    @torch.jit.unused
    def _trace_mhca_grid(self, x: torch.Tensor) -> None:
        constants = grid_constants(x.shape[1], x.shape[2], self.num_prefix_tokens, x.device)
        for block in self.blocks:
            if hasattr(block.attn, 'rpe'):
                block.attn.rpe.trace_constants(constants)

    def _pos_embed(self, x: torch.Tensor) -> torch.Tensor:
        # timm's blocks do not pass the grid to attention, and every forward path calls this method
        if self.dynamic_img_size:
            if not torch.jit.is_scripting() and self._is_traced_by_fx(x):
                self._trace_mhca_grid(x)
            else:
                self._set_mhca_grid(int(x.shape[1]), int(x.shape[2]))  # (B, H, W, C)
        return self._parent_pos_embed(x)

    def set_input_size(
            self,
            img_size: Optional[Union[int, Tuple[int, int]]] = None,
            patch_size: Optional[Union[int, Tuple[int, int]]] = None,
    ) -> None:
        """Change image or patch size: resample the position embedding, extend the RPE."""
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        height, width = self.patch_embed.grid_size
        self._set_mhca_grid(height, width)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Return parameters without weight decay: timm's, and alpha and delta of MHCA."""
        rpe = {name for name, _ in self.named_parameters() if name.endswith(('.rpe.alpha', '.rpe.delta'))}
        return super().no_weight_decay() | rpe


def _convert_blocks(model: VisionTransformer, num_blocks: int, rel_pos: RelPosConfig) -> None:
    """Replace the attention of the first blocks by MHCA, in place.

    Raises:
        ValueError: If `num_blocks` exceeds the depth, patches are dropped, or a block's attention is not timm's.
    """
    if not 0 <= num_blocks <= len(model.blocks):
        raise ValueError(
            f'num_mhca_blocks is {num_blocks}, but the model has {len(model.blocks)} blocks.'
            f' Choose a number from 0 (a plain ViT) to {len(model.blocks)}.')
    if not isinstance(model.patch_drop, nn.Identity):
        raise ValueError('MHCA needs all patches, but patch_drop_rate drops some. Set patch_drop_rate to 0.')
    blocks = model.blocks[:num_blocks]
    for index, block in enumerate(blocks):
        attn = getattr(block, 'attn', None)
        if type(attn) is not Attention:
            found = type(attn or block).__name__
            raise ValueError(
                f"blocks.{index} has {found}, expected timm's Attention."
                " MHCA can be added to timm VisionTransformers whose blocks have that class, such as DeiT.")
    for block in blocks:
        block.attn = ConvAttention.from_attention(
            cast(Attention, block.attn),
            model.patch_embed.grid_size,
            num_prefix_tokens=model.num_prefix_tokens,
            rel_pos=rel_pos,
        )
    # DDP would broadcast them, but their size differs between processes if the image size does
    constants = [name for name, _ in model.named_buffers() if '.rpe.' in name]
    model._ddp_params_and_buffers_to_ignore = constants  # type: ignore[assignment]


class DearKD(MhcaMixin, VisionTransformer):
    """Vision transformer with MHCA in its first blocks (Eq. 2 and 3).

    Takes all arguments of timm's `VisionTransformer`, except `patch_drop_rate` (MHCA needs every position).

    Args:
        num_mhca_blocks: Number of first blocks with MHCA; 0 gives the plain ViT. The paper has 8 of 12.
        rpe_drop_rate: Dropout rate of the positional scores in training.
        rpe_drop_mode: 'element' (single scores) or 'query' (all scores of a token, cheaper). Our choice.
        rpe_alpha: Initial sharpness of all heads. Our choice.
        rpe_delta: Initial offsets of the heads: 'grid', 'zero' or 'normal', see `RelPosConfig`. Our choice.

    Raises:
        ValueError: If `num_mhca_blocks` exceeds the depth, `patch_drop_rate` is not 0, a block does not have timm's
            `Attention`, or an rpe value is out of its range.
    """
    _parent_pos_embed = _parent_pos_embed(VisionTransformer)

    def __init__(
            self,
            *args: Any,
            num_mhca_blocks: int = 8,
            rpe_drop_rate: float = 0.,
            rpe_drop_mode: str = 'element',
            rpe_alpha: float = 1.,
            rpe_delta: str = 'grid',
            **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        _convert_blocks(self, num_mhca_blocks, RelPosConfig(rpe_drop_rate, rpe_drop_mode, rpe_alpha, rpe_delta))


class DearKDDistilled(MhcaMixin, VisionTransformerDistilled):
    """DeiT with a distillation token and MHCA blocks, created by `add_mhca`."""
    _parent_pos_embed = _parent_pos_embed(VisionTransformerDistilled)


_MHCA_CLASSES: Dict[type, type] = {VisionTransformer: DearKD, VisionTransformerDistilled: DearKDDistilled}


def add_mhca(
        model: VisionTransformer,
        num_blocks: int = 8,
        rpe_drop_rate: float = 0.,
        rpe_drop_mode: str = 'element',
        rpe_alpha: float = 1.,
        rpe_delta: str = 'grid',
) -> VisionTransformer:
    """Convert the first blocks of a timm `VisionTransformer` to MHCA, in place.

    The weights stay. With `rpe_alpha` = 0, the positional scores are 0 and the outputs do not change.

    Args:
        model: A timm VisionTransformer (or DeiT), pretrained or not, with registers or without [CLS].
        num_blocks: Number of first blocks to convert.
        rpe_drop_rate: Dropout rate of the positional scores in training.
        rpe_drop_mode: 'element' or 'query', see `DearKD`.
        rpe_alpha: Initial sharpness of all heads.
        rpe_delta: Initial offsets of the heads, see `DearKD`.

    Returns:
        The same model. Its class is now a subclass that sets the token grid of MHCA. timm saves it as a `dearkd_from`.

    Raises:
        ValueError: If the model is not a `VisionTransformer`, has MHCA blocks already, or cannot have them (see
            `DearKD`).
    """
    if isinstance(model, MhcaMixin):
        raise ValueError(
            f'{type(model).__name__} has MHCA blocks already. To change their number, create it with num_mhca_blocks.')
    if type(model) not in _MHCA_CLASSES:
        raise ValueError(
            f'MHCA can be added to a timm VisionTransformer, not to a {type(model).__name__}.'
            ' Use a vit_*, deit_* or deit3_* architecture.')
    _convert_blocks(model, num_blocks, RelPosConfig(rpe_drop_rate, rpe_drop_mode, rpe_alpha, rpe_delta))
    model.__class__ = _MHCA_CLASSES[type(model)]
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    if cfg.get('architecture'):  # so that timm saves and loads the model under a name that it knows
        update_model_args(model, base=cfg['architecture'], num_mhca_blocks=num_blocks)
        saved: Any = model
        saved.pretrained_cfg = saved.default_cfg = {**cfg, 'architecture': 'dearkd_from'}
    return model


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return {
        'url': '',
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': None,
        'crop_pct': .9, 'interpolation': 'bicubic', 'fixed_input_size': True,
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.proj', 'classifier': 'head',
        'license': 'apache-2.0', 'origin_url': 'https://arxiv.org/abs/2204.12997', 'paper_ids': 'arXiv:2204.12997',
        **kwargs,
    }


def _cfgs(name: str, *tags: str, **kwargs: Any) -> Dict[str, Dict[str, Any]]:
    """Return the configurations without weights and of each recipe (`weights.py`)."""
    return {f'{name}.{tag}': _cfg(**kwargs) for tag in ('untrained', *tags)}


_LARGE = dict(input_size=(3, 384, 384), crop_pct=1.0)
_SMALL = dict(input_size=(3, 32, 32), crop_pct=1.0)

default_cfgs = generate_default_cfgs({
    **_cfgs('dearkd_tiny_patch16_224', 'in1k_300e', 'in1k_1000e'),
    **_cfgs('dearkd_small_patch16_224', 'in1k_300e', 'in1k_1000e'),
    **_cfgs('dearkd_base_patch16_224', 'in1k_300e', 'in1k_1000e'),
    **_cfgs('dearkd_tiny_patch16_384', 'in1k_300e_ft', **_LARGE),
    **_cfgs('dearkd_small_patch16_384', 'in1k_300e_ft', **_LARGE),
    **_cfgs('dearkd_base_patch16_384', 'in1k_300e_ft', **_LARGE),
    **_cfgs('dearkd_tiny_patch4_32', **_SMALL),
    **_cfgs('dearkd_nano_patch4_32', **_SMALL),
    **_cfgs('test_dearkd', input_size=(3, 160, 160), crop_pct=0.95),
    **_cfgs('dearkd_from'),
})


def _filter_base_weights(state_dict: Dict[str, torch.Tensor], model: Any) -> Dict[str, torch.Tensor]:
    """Convert weights as timm does for a ViT. Those of a plain ViT get the model's new alpha and delta."""
    weights = checkpoint_filter_fn(state_dict, model)
    if any('.rpe.' in name for name in weights):  # of a DearKD, which should be complete
        return weights
    return {**{name: value for name, value in model.state_dict().items() if '.rpe.' in name}, **weights}


def _create_dearkd(
        variant: str,
        pretrained: bool = False,
        model_cls: Any = DearKD,
        filter_fn: Callable[..., Any] = checkpoint_filter_fn,
        **kwargs: Any,
) -> DearKD:
    out_indices = kwargs.pop('out_indices', 3)
    if pretrained:
        cfg = resolve_pretrained_cfg(
            variant, kwargs.pop('pretrained_cfg', None), kwargs.pop('pretrained_cfg_overlay', None))
        if cfg.source == 'hf-hub' or not (cfg.file or cfg.url or cfg.state_dict):
            cfg = locate_weights(cfg, kwargs.get('cache_dir'))
        kwargs['pretrained_cfg'] = vars(cfg)
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        **kwargs,
    )


@register_model
def dearkd_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> DearKD:
    """DearKD-Ti: 5 M parameters."""
    model_args = dict(patch_size=16, embed_dim=192, depth=12, num_heads=12)
    return _create_dearkd('dearkd_tiny_patch16_224', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dearkd_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> DearKD:
    """DearKD-S: 22 M parameters."""
    model_args = dict(patch_size=16, embed_dim=384, depth=12, num_heads=12)
    return _create_dearkd('dearkd_small_patch16_224', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dearkd_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> DearKD:
    """DearKD-B: 86 M parameters."""
    model_args = dict(patch_size=16, embed_dim=768, depth=12, num_heads=16)
    return _create_dearkd('dearkd_base_patch16_224', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dearkd_tiny_patch16_384(pretrained: bool = False, **kwargs: Any) -> DearKD:
    """DearKD-Ti for 384x384 images."""
    model_args = dict(patch_size=16, embed_dim=192, depth=12, num_heads=12)
    return _create_dearkd('dearkd_tiny_patch16_384', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dearkd_small_patch16_384(pretrained: bool = False, **kwargs: Any) -> DearKD:
    """DearKD-S for 384x384 images."""
    model_args = dict(patch_size=16, embed_dim=384, depth=12, num_heads=12)
    return _create_dearkd('dearkd_small_patch16_384', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dearkd_base_patch16_384(pretrained: bool = False, **kwargs: Any) -> DearKD:
    """DearKD-B for 384x384 images."""
    model_args = dict(patch_size=16, embed_dim=768, depth=12, num_heads=16)
    return _create_dearkd('dearkd_base_patch16_384', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dearkd_tiny_patch4_32(pretrained: bool = False, **kwargs: Any) -> DearKD:
    """DearKD-Ti for CIFAR-sized images, 8x8 patches. Not in the paper."""
    model_args = dict(patch_size=4, embed_dim=192, depth=12, num_heads=12)
    return _create_dearkd('dearkd_tiny_patch4_32', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dearkd_nano_patch4_32(pretrained: bool = False, **kwargs: Any) -> DearKD:
    """A DearKD for experiments on a CPU, 8x8 patches. Not in the paper."""
    model_args = dict(patch_size=4, embed_dim=96, depth=6, num_heads=12, num_mhca_blocks=4)
    return _create_dearkd('dearkd_nano_patch4_32', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def test_dearkd(pretrained: bool = False, **kwargs: Any) -> DearKD:
    """DearKD for tests, as small as timm's test_vit."""
    model_args = dict(
        patch_size=16, embed_dim=64, depth=6, num_heads=2, mlp_ratio=3, num_mhca_blocks=4, dynamic_img_size=True)
    return _create_dearkd('test_dearkd', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dearkd_from(
        pretrained: bool = False,
        base: str = 'deit_tiny_patch16_224',
        num_mhca_blocks: int = 8,
        rpe_drop_rate: float = 0.,
        rpe_drop_mode: str = 'element',
        rpe_alpha: float = 1.,
        rpe_delta: str = 'grid',
        **kwargs: Any,
) -> VisionTransformer:
    """Any timm `VisionTransformer` with MHCA in its first blocks.

    `pretrained=True` loads the weights of the base, or those of a `file` in `pretrained_cfg_overlay`. For a saved
    `dearkd_from` (`local-dir:`, `hf-hub:`), it loads the saved weights.

    Args:
        base: timm name of the architecture, optionally with a pretrained tag.
        num_mhca_blocks: Number of first blocks to convert, see `add_mhca`.
        rpe_drop_rate: Dropout rate of the positional scores in training.
        rpe_drop_mode: 'element' or 'query', see `DearKD`.
        rpe_alpha: Initial sharpness of all heads; with 0 the model starts with the outputs of the base.
        rpe_delta: Initial offsets of the heads, see `DearKD`.

    Raises:
        ValueError: If `base` is a place of weights, or its architecture cannot have MHCA blocks.
    """
    if ':' in base:
        raise ValueError(
            f'base is {base!r}, expected the timm name of an architecture. For other weights, call add_mhca(model), or'
            ' add pretrained_cfg_overlay=dict(file=PATH).')
    own_cfg, overlay = kwargs.pop('pretrained_cfg', None), kwargs.pop('pretrained_cfg_overlay', None) or {}
    own_cfg = own_cfg if isinstance(own_cfg, dict) else {}
    has_own_weights = any(
        cfg.get(source) for cfg in (own_cfg, overlay) for source in ('file', 'hf_hub_id', 'url', 'state_dict'))
    base_kwargs: Dict[str, Any] = {}
    if pretrained and not has_own_weights:
        base_kwargs = dict(pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=kwargs.pop('cache_dir', None))

    def build(**model_kwargs: Any) -> VisionTransformer:
        model = timm.create_model(base, **base_kwargs, **model_kwargs)
        return add_mhca(
            cast(VisionTransformer, model), num_mhca_blocks, rpe_drop_rate, rpe_drop_mode, rpe_alpha, rpe_delta)

    if own_cfg.get('source') not in ('local-dir', 'hf-hub'):  # else a saved dearkd_from
        base_cfg, default = (get_pretrained_cfg(name) or PretrainedCfg() for name in (base, 'dearkd_from'))
        defaults = default.to_dict()
        changed = {key: value for key, value in own_cfg.items() if value != defaults.get(key)}
        if has_own_weights:  # a file has neither the format nor the tag of the base's published weights
            base_cfg = replace(base_cfg, custom_load=False, tag=None)
        own_cfg = {**base_cfg.to_dict(remove_source=has_own_weights), **changed}
    kwargs['pretrained_cfg'] = {**own_cfg, **overlay, 'architecture': 'dearkd_from'}
    return _create_dearkd('dearkd_from', pretrained and has_own_weights, build, _filter_base_weights, **kwargs)
