"""Adaptive relative position encoding of MHCA, as scores and as channels of queries and keys.

Paper: `DearKD: Data-Efficient Early Knowledge Distillation for Vision Transformers` (CVPR 2022),
https://arxiv.org/abs/2204.12997, equation 2.
"""
import math
from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_function

RPE_DROP_MODES = ('element', 'query')
RPE_DELTAS = ('grid', 'zero', 'normal')


@torch.fx.wrap
@register_notrace_function
def grid_constants(
        height: int,
        width: int,
        num_prefix_tokens: int,
        device: torch.device,
) -> Tuple[torch.Tensor, torch.Tensor, int]:
    """Compute the constants of a token grid, in float32.

    With the centred patch position p, a key has the channels (p_row, p_col, |p|^2, 64), and the query channels are
    ``alpha * (basis[0] + delta_row * basis[1] + delta_col * basis[2])``. Rows of prefix tokens are 0. The last key
    channel is 64 instead of 1, so that the query's part of it, about alpha |p|^2 / 64, does not overflow in float16.

    Returns:
        The key channels (T, 4), the query basis (3, T, 4), and the largest |p|^2 in units of its smallest step.
    """
    rows = torch.arange(height, device=device, dtype=torch.float32) - (height - 1) / 2
    cols = torch.arange(width, device=device, dtype=torch.float32) - (width - 1) / 2
    y = rows.unsqueeze(1).expand(height, width).reshape(-1)
    x = cols.unsqueeze(0).expand(height, width).reshape(-1)
    sq, one, zero = y * y + x * x, torch.ones_like(y), torch.zeros_like(y)
    key = torch.stack([y, x, sq, 64 * one], dim=-1)  # (H*W, 4)
    query = torch.stack([
        torch.stack([2 * y, 2 * x, -one, -sq / 64], dim=-1),
        torch.stack([2 * one, zero, zero, -2 * y / 64], dim=-1),
        torch.stack([zero, 2 * one, zero, -2 * x / 64], dim=-1),
    ])  # (3, H*W, 4)
    # |p|^2 is a multiple of 1 if both sides are odd, of 1/2 if both are even, of 1/4 otherwise
    sq_per_step = 1 if height % 2 != width % 2 else (2 if height % 2 == 0 else 4)
    sq_steps = ((height - 1) * (height - 1) + (width - 1) * (width - 1)) // sq_per_step
    key, query = F.pad(key, [0, 0, num_prefix_tokens, 0]), F.pad(query, [0, 0, num_prefix_tokens, 0])
    return key, query, sq_steps


@dataclass(frozen=True)
class RelPosConfig:
    """Settings of `AdaptiveRelPos`.

    All are our choices, because the paper gives no values.

    Args:
        drop_rate: Dropout rate of the positional scores (the paper's dropout layer after the adaptive RPE). The whole
            batch shares one mask.
        drop_mode: 'element' drops single scores, which needs the (heads, T, T) form; 'query' drops all positional
            scores of a query token together and keeps the factorised form.
        alpha: Initial sharpness of all heads.
        delta: Initial offsets of the heads: the centred 'grid', 'zero', or 'normal' (each drawn from N(0, 1)).

    Raises:
        ValueError: If `drop_mode` or `delta` is unknown, or `drop_rate` is outside [0, 1).
    """
    drop_rate: float = 0.
    drop_mode: str = 'element'
    alpha: float = 1.
    delta: str = 'grid'

    def __post_init__(self) -> None:
        for name, choices in (('drop_mode', RPE_DROP_MODES), ('delta', RPE_DELTAS)):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f'Unknown rpe {name} {value!r}, expected one of {", ".join(choices)}.')
        if not 0. <= self.drop_rate < 1.:
            raise ValueError(f'rpe drop_rate is {self.drop_rate}, expected a rate in [0, 1).')


DEFAULT_REL_POS = RelPosConfig()


class AdaptiveRelPos(nn.Module):
    r"""Adaptive relative position encoding (Eq. 2).

    For the query patch i and the key patch j, with the shift :math:`\delta = p_j - p_i` in patches, head h scores

    .. math:: v^{(h)} r_{ij} = -\alpha^{(h)} (|\delta|^2 - 2 \Delta^{(h)} \cdot \delta)

    so it attends to the patch at offset :math:`\Delta` (row, column) with sharpness :math:`\alpha`. Both are learned.
    Every pair with a prefix token ([CLS], registers) scores exactly 0.

    The score is a dot product of four query and four key channels (`query_basis`, `key_basis`, `append_positions`), so
    that any fused attention kernel can compute it. `forward` computes the same scores in the plain (heads, T, T) form.

    Our choice, where the paper is silent: alpha is a raw parameter (no softplus).

    Args:
        num_heads: Number of attention heads.
        grid_size: Token grid (rows, columns).
        num_prefix_tokens: Tokens before the patches, without a position.
        config: Dropout and initial values.
    """

    grid_size: Tuple[int, int]
    sq_steps: int
    key_basis: torch.Tensor
    query_basis: torch.Tensor
    _scores_cache: Optional[Tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    _channels_cache: Optional[torch.Tensor]

    def __init__(
            self,
            num_heads: int,
            grid_size: Tuple[int, int],
            num_prefix_tokens: int = 1,
            config: RelPosConfig = DEFAULT_REL_POS,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        dd: Dict[str, Any] = {'device': device, 'dtype': dtype}
        self.num_heads = num_heads
        self.num_prefix_tokens = num_prefix_tokens
        self.drop_rate = config.drop_rate
        self.drop_mode = config.drop_mode
        self.initial = (config.alpha, config.delta)
        self._channels_key: Any = None
        self.alpha = nn.Parameter(torch.empty(num_heads, **dd))
        self.delta = nn.Parameter(torch.empty(num_heads, 2, **dd))
        # Constants of the token grid, in float32 for every dtype of the model
        self.register_buffer('key_basis', torch.empty(0, device=device), persistent=False)
        self.register_buffer('query_basis', torch.empty(0, device=device), persistent=False)
        self.set_grid_size(int(grid_size[0]), int(grid_size[1]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set alpha and delta to their initial values.

        The 'grid' has floor(sqrt(heads)) rows, and is centred.
        """
        alpha, delta = self.initial
        rows = math.isqrt(self.num_heads)
        cols = -(-self.num_heads // rows)
        with torch.no_grad():
            index = torch.arange(self.num_heads, device=self.delta.device)
            offsets = torch.stack([index // cols - (rows - 1) / 2, index % cols - (cols - 1) / 2], dim=1)
            self.alpha.fill_(alpha)
            if delta == 'grid':
                self.delta.copy_(offsets)
            elif delta == 'normal':
                self.delta.normal_()
            else:
                self.delta.zero_()

    @torch.jit.ignore
    def init_non_persistent_buffers(self) -> None:
        """Compute the constants again. timm calls this after creation on 'meta'."""
        self.set_grid_size(*self.grid_size)

    def train(self, mode: bool = True) -> 'AdaptiveRelPos':
        """Set the mode, and drop the caches of inference."""
        self._channels_cache = None
        if mode:
            self._scores_cache = None
            if self.key_basis.is_inference():  # set by a compiled model in inference mode
                self.set_grid_size(*self.grid_size)
        return super().train(mode)

    def set_grid_size(self, height: int, width: int) -> None:
        """Set the token grid (rows, columns) of the scores."""
        if torch.jit.is_scripting() or torch.compiler.is_compiling():
            self._build_grid(height, width)
        else:
            self._build_grid_for_training(height, width)

    @torch.jit.unused
    def _build_grid_for_training(self, height: int, width: int) -> None:
        with torch.inference_mode(False):  # a later training step must be able to use the constants
            self._build_grid(height, width)

    def _build_grid(self, height: int, width: int) -> None:
        constants = grid_constants(height, width, self.num_prefix_tokens, self.key_basis.device)
        self.key_basis, self.query_basis, self.sq_steps = constants
        self.grid_size = (height, width)
        self._scores_cache = self._channels_cache = None

    @torch.jit.unused
    def trace_constants(self, constants: Any) -> None:
        """Set the torch.fx node that computes the constants from the input size.

        The tracer stores the node, so that the module itself does not change.
        """
        vars(constants.tracer).setdefault('mhca_constants', {})[self] = constants

    def constants(self) -> Tuple[torch.Tensor, torch.Tensor, int]:
        """Return `key_basis`, `query_basis` and `sq_steps`, or their torch.fx nodes."""
        if not torch.jit.is_scripting():
            alpha = self.alpha
            if isinstance(alpha, torch.fx.Proxy):
                node = getattr(alpha.tracer, 'mhca_constants', {}).get(self)
                if node is not None:
                    return node[0], node[1], node[2]
        return self.key_basis, self.query_basis, self.sq_steps

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> 'AdaptiveRelPos':
        """Move the module, but keep the constants float32 (|p|^2 needs its precision)."""
        result = super()._apply(fn, *args, **kwargs)
        self.set_grid_size(*self.grid_size)
        return result

    def __getstate__(self) -> Dict[str, Any]:
        # copies and pickles start without the caches
        return {**self.__dict__, '_scores_cache': None, '_channels_cache': None, '_channels_key': None}

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}, grid_size={self.grid_size}, drop_rate={self.drop_rate}'

    def dropout_active(self) -> bool:
        """Return whether dropout applies in the current mode."""
        return self.training and self.drop_rate > 0.

    def needs_scores(self) -> bool:
        """Return whether elementwise dropout needs the (heads, T, T) form now."""
        return self.dropout_active() and self.drop_mode == 'element'

    def offset_scores(self, alpha: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """Return the scores of Eq. 2 (heads, T, T) without dropout.

        Args:
            alpha: Sharpness (heads,).
            delta: Offsets (heads, 2).
        """
        prefix = self.num_prefix_tokens
        pos = self.constants()[0][prefix:, :2]  # (H*W, 2)
        shift = pos.unsqueeze(0) - pos.unsqueeze(1)  # (H*W, H*W, 2), key minus query
        sq = (shift * shift).sum(-1)
        along = delta[:, 0, None, None] * shift[..., 0] + delta[:, 1, None, None] * shift[..., 1]
        scores = -alpha[:, None, None] * (sq - 2 * along)
        return F.pad(scores, [prefix, 0, prefix, 0])

    def forward(self) -> torch.Tensor:
        """Compute the positional scores of all pairs, in the plain form.

        Returns:
            (heads, T, T) in float32 or the parameters' dtype, whichever is wider. Dropout applies in training.
        """
        scores = self.offset_scores(self.alpha, self.delta)
        if self.dropout_active():
            if self.drop_mode == 'element':
                scores = F.dropout(scores, self.drop_rate)
            else:
                scores = scores * self.query_dropout().unsqueeze(-1)
        return scores

    def query_dropout(self) -> torch.Tensor:
        """Return a dropout mask of the query tokens (heads, T), 0 or 1 / (1 - rate)."""
        key_basis = self.constants()[0]
        return F.dropout(key_basis.new_ones(self.num_heads, key_basis.shape[0]), self.drop_rate)

    @torch.jit.unused
    def cached_scores(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the cached `forward()`, without dropout or gradient.

        The cache is valid until alpha, delta, grid, dtype or device change. For the CPU only: it compares the values of
        alpha and delta, which would synchronise an accelerator.
        """
        alpha, delta = self.alpha.detach(), self.delta.detach()
        if self._scores_cache is not None:
            scores, cached_alpha, cached_delta = self._scores_cache
            if scores.dtype == dtype and torch.equal(cached_alpha, alpha) and torch.equal(cached_delta, delta):
                return scores
        with torch.inference_mode(False), torch.no_grad():
            # A query's own score is 0, so e^-75 adds nothing. Lower scores give denormals, which are slow on CPUs
            scores = self.offset_scores(alpha, delta).clamp(min=-75.).to(dtype)
            self._scores_cache = (scores, alpha.clone(), delta.clone())
        return scores

    @torch.jit.unused
    def cached_channels(self, scale: float, qkv: torch.Tensor) -> Optional[torch.Tensor]:
        """Return the cached channels of the positional scores, see `stack_channels`.

        For inference on an accelerator: the check does not wait for the device. The cache is valid until identity,
        storage or version of alpha or delta change. PyTorch's fused optimizers do not change the version, but need a
        gradient, so nothing is cached while a gradient exists, and a forward that takes gradients clears the cache. So
        do train() and eval(). A write to `.data` is not detected.

        Args:
            scale: Scale of the attention.
            qkv: Queries, keys and values (B, T, 3, heads, D).

        Returns:
            The channels, or None if changes cannot be detected (replicas, parametrised or functional alpha and delta).
        """
        parameters = [self._parameters.get(name) for name in ('alpha', 'delta')]
        if any(type(p) is not nn.Parameter or p.grad is not None or p.is_inference() for p in parameters):
            self._channels_cache = None
            return None
        alpha, delta = (cast(nn.Parameter, p) for p in parameters)
        key = (scale, qkv.dtype, *((id(p), p.data_ptr(), p._version) for p in (alpha, delta)))
        if self._channels_cache is None or self._channels_key != key:
            with torch.inference_mode(False), torch.no_grad():
                channels = position_channels(
                    alpha.unsqueeze(1), delta, self.query_basis, self.key_basis, scale, self.sq_steps, qkv.dtype,
                    qkv.shape[-1])
                stacked = stack_channels(*channels, with_values=needs_one_width(qkv))
                self._channels_cache, self._channels_key = stacked.to(qkv.dtype), key
        return self._channels_cache


def needs_one_width(qkv: torch.Tensor) -> bool:
    """Return whether a fused kernel for these tensors needs values as wide as queries and keys.

    FlashAttention and PyTorch's kernel for CPUs do. CUDA's only fused kernel for float32 takes two widths, if both are
    multiples of 4.
    """
    return not (qkv.is_cuda and qkv.dtype == torch.float32 and qkv.shape[-1] % 4 == 0)


def stack_channels(query: torch.Tensor, key: torch.Tensor, with_values: bool) -> torch.Tensor:
    """Stack channels of queries (heads, T, C), keys (T, C) and, if wanted, zeros for values.

    Returns:
        (T, 2 * heads, C), or (T, 3 * heads, C) with values.
    """
    query = query.transpose(0, 1)  # (T, heads, C)
    channels = [query, key.unsqueeze(1).expand_as(query)]
    if with_values:
        channels.append(torch.zeros_like(query))
    return torch.cat(channels, dim=1)


def append_channels(
        qkv: torch.Tensor, channels: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Append channels to the qkv of every image.

    One concatenation of four dimensions, which is one kernel on CUDA.

    Args:
        qkv: (B, T, 3, heads, D).
        channels: See `stack_channels`.

    Returns:
        q and k (B, heads, T, D + C), and v, which is as wide only if `channels` are for values, too.
    """
    count = channels.shape[1]
    if not torch.jit.is_scripting() and torch.compiler.is_compiling():
        # fused with the rest; the backward then sums over images in float32
        channels = channels.unsqueeze(0).expand(qkv.shape[0], -1, -1, -1).to(qkv.dtype)
    else:
        channels = channels.to(qkv.dtype).unsqueeze(0).expand(qkv.shape[0], -1, -1, -1)
    wide = torch.cat([qkv.flatten(2, 3)[:, :, :count], channels], dim=-1)
    wide = wide.unflatten(2, [-1, qkv.shape[3]]).permute(2, 0, 3, 1, 4)
    v = wide[2] if len(wide) == 3 else qkv[:, :, 2].transpose(1, 2)
    return wide[0], wide[1], v


class _Append(torch.autograd.Function):
    """`append_channels` for training: a faster layout and a more precise backward.

    q and k, and v if it gets zeros, are contiguous (B, heads, T, D + C). The gradient of the channels is summed over
    the images in the dtype of the channels (float32 or wider) instead of the tokens' dtype.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
            qkv: torch.Tensor,
            query: torch.Tensor,
            key: torch.Tensor,
            with_values: bool,
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        size = (len(qkv), *query.shape)  # (B, heads, T, C)
        channels = [query, key, *([torch.zeros_like(key)] if with_values else [])]
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        wide = [torch.cat([x, c.to(qkv.dtype).expand(size)], dim=-1) for x, c in zip((q, k, v), channels)]
        return wide[0], wide[1], wide[2] if with_values else v

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        qkv, query, _, _ = inputs
        ctx.dim, ctx.dtype = qkv.shape[-1], query.dtype

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, None, None]:
        grad_qkv = torch.cat([grad[..., :ctx.dim].transpose(1, 2) for grad in grads], dim=2)  # (B, T, 3 * heads, D)
        return grad_qkv.unflatten(2, (3, -1)), grads[0][..., ctx.dim:].sum(dim=0, dtype=ctx.dtype), None, None


def _round(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round float32 values to the significand of a half precision dtype.

    This changes the bits, because compilers remove a cast to the dtype and back.
    """
    bits = 16 if dtype == torch.bfloat16 else 13
    return ((x.contiguous().view(torch.int32) + (1 << (bits - 1))) & -(1 << bits)).view(torch.float32)


@register_notrace_function
def append_positions(
        qkv: torch.Tensor,
        alpha: torch.Tensor,
        delta: torch.Tensor,
        query_basis: torch.Tensor,
        key_basis: torch.Tensor,
        scale: float,
        sq_steps: int,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Append channels, so that ``scale * q @ k.T`` includes the positional scores.

    Args:
        qkv: Queries, keys and values (B, T, 3, heads, D).
        alpha: See `position_channels`.
        sq_steps: See `position_channels`.

    Returns:
        q, k and v, see `append_channels` and `position_channels`.
    """
    query, key = position_channels(alpha, delta, query_basis, key_basis, scale, sq_steps, qkv.dtype, qkv.shape[-1])
    with_values = needs_one_width(qkv)
    # torch.compile fuses the plain form, and older versions of PyTorch's DDP optimizer take no autograd function
    if torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return append_channels(qkv, stack_channels(query, key, with_values))
    return _Append.apply(qkv, query, key, with_values)


def position_channels(
        alpha: torch.Tensor,
        delta: torch.Tensor,
        query_basis: torch.Tensor,
        key_basis: torch.Tensor,
        scale: float,
        sq_steps: int,
        dtype: torch.dtype,
        head_dim: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return channels whose product is the positional score divided by `scale`.

    float32 and wider need four channels. In half precision, the query part is split into a rounded value and its
    remainder, eight channels in all. The kernel rounds the gradient of the channels to half precision. So the gradients
    of alpha and delta have more rounding noise than with a bias of that dtype (alpha's about ten times as much). The
    output and the gradients of q, k and v have less.

    Args:
        alpha: Sharpness (heads,), or (heads, T) multiplied by a dropout mask of the query tokens.
        sq_steps: The grid's largest |p|^2 in units of its smallest step. If the significand of the dtype cannot hold
            it, alpha is rounded, and its free remainder channel has the remainder of |p|^2.
        dtype: Dtype of the tokens.
        head_dim: Head dimension of the attention. Zero channels pad ``head_dim + C`` to a multiple of 4, or of 8 in
            half precision: for other widths, CUDA chooses a slow kernel that is imprecise under TF32.
    """
    half = dtype == torch.float16 or dtype == torch.bfloat16
    key_is_exact = sq_steps <= (256 if dtype == torch.bfloat16 else 2048)
    if half:
        alpha, delta = alpha.float(), delta.float()
    alpha = alpha / scale
    if half and not key_is_exact:
        alpha = alpha - (alpha - _round(alpha.detach(), dtype)).detach()  # straight-through
    offset = delta.unsqueeze(-1).unsqueeze(-1)  # (heads, 2, 1, 1)
    query = query_basis[0] + offset[:, 0] * query_basis[1] + offset[:, 1] * query_basis[2]
    query = query * alpha.view(alpha.shape[0], -1, 1)  # (heads, T, 4)
    key = key_basis  # (T, 4)
    if half:
        query_lo = query.detach() - _round(query.detach(), dtype)
        query_hi = query - query_lo  # the rounded value, with the gradient of the exact one
        key_hi = key_lo = key
        if not key_is_exact:
            key_hi = _round(key, dtype)
            query_lo = torch.cat([query_lo[..., :2], query_hi[..., 2:3], query_lo[..., 3:]], dim=-1)
            key_lo = torch.cat([key[:, :2], key[:, 2:3] - key_hi[:, 2:3], key[:, 3:]], dim=-1)
        query, key = torch.cat([query_hi, query_lo], dim=-1), torch.cat([key_hi, key_lo], dim=-1)
    padding = -(head_dim + query.shape[-1]) % (8 if half else 4)
    if padding:
        query, key = F.pad(query, [0, padding]), F.pad(key, [0, padding])
    return query, key
