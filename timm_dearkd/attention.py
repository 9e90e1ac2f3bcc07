"""Multi-head convolutional attention (MHCA) with a learned position encoding.

Paper: `DearKD: Data-Efficient Early Knowledge Distillation for Vision Transformers` (CVPR 2022),
https://arxiv.org/abs/2204.12997, equation 3.
"""
from typing import Any, Final, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Attention, maybe_add_mask, resolve_self_attn_mask
from torch import _assert

from .rel_pos import DEFAULT_REL_POS, AdaptiveRelPos, RelPosConfig, append_channels, append_positions

# torch.fx wraps functions by the module that calls them
torch.fx.wrap('append_positions')
torch.fx.wrap('maybe_add_mask')
torch.fx.wrap('resolve_self_attn_mask')


class ConvAttention(Attention):
    r"""Multi-head convolutional attention, MHCA (Eq. 3).

    It computes :math:`softmax(q k^T / \sqrt{d} + v^{(h)} r_{ij})`: timm's `Attention` with an `AdaptiveRelPos` added to
    its scores. Arguments not listed are timm's. Each call chooses the form of the scores. Training uses the factorised
    form, which needs no (T, T) tensor, except for elementwise dropout of the positional scores, which needs the plain
    form. Inference on the CPU adds a cached bias, which is faster there. Inference on an accelerator caches the
    channels of the factorised form.

    Args:
        grid_size: Token grid (rows, columns). `set_grid_size` changes it.
        num_prefix_tokens: Tokens before the patches, without a position.
        rel_pos: Dropout and initial values of the positional scores.
    """

    qk_norm: Final[bool]
    frozen_scores: Optional[torch.Tensor]

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            grid_size: Tuple[int, int] = (14, 14),
            num_prefix_tokens: int = 1,
            rel_pos: RelPosConfig = DEFAULT_REL_POS,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
            **kwargs: Any,
    ) -> None:
        super().__init__(dim, num_heads, device=device, dtype=dtype, **kwargs)
        self.qk_norm = not isinstance(self.q_norm, nn.Identity)
        self.register_buffer('frozen_scores', None, persistent=False)
        self.rpe = AdaptiveRelPos(
            num_heads,
            grid_size,
            num_prefix_tokens=num_prefix_tokens,
            config=rel_pos,
            device=device,
            dtype=dtype,
        )

    @classmethod
    def from_attention(
            cls,
            attn: Attention,
            grid_size: Tuple[int, int],
            num_prefix_tokens: int = 1,
            rel_pos: RelPosConfig = DEFAULT_REL_POS,
    ) -> 'ConvAttention':
        """Create MHCA with the submodules and the settings of a timm `Attention`."""
        mhca = cls(
            attn.qkv.in_features,
            attn.num_heads,
            attn_head_dim=attn.head_dim,
            dim_out=attn.proj.out_features,
            device=torch.device('meta'),  # without memory; filled below
        )
        for name, module in attn.named_children():
            setattr(mhca, name, module)
        mhca.qk_norm = not isinstance(attn.q_norm, nn.Identity)  # type: ignore[misc]
        mhca.scale = attn.scale
        mhca.fused_attn = attn.fused_attn  # type: ignore[misc]
        mhca.rpe = AdaptiveRelPos(
            attn.num_heads,
            grid_size,
            num_prefix_tokens=num_prefix_tokens,
            config=rel_pos,
            device=attn.qkv.weight.device,
            dtype=attn.qkv.weight.dtype,
        )
        return mhca.train(attn.training)

    @torch.jit.ignore
    def freeze_scores(self) -> None:
        """Store the positional scores as a constant, before an export on the CPU.

        An exported program has no cache, and would compute the scores again in every call.
        """
        self.frozen_scores = self.rpe.cached_scores(torch.float32)

    def _qkv(self, x: torch.Tensor) -> torch.Tensor:
        """Return the queries, keys and values (B, T, 3, heads, head_dim) of the tokens."""
        B, T, _ = x.shape
        _assert(
            self.rpe.constants()[0].shape[0] == T,
            'The number of tokens does not match the token grid of MHCA. Call set_input_size() on the model, or'
            ' rpe.set_grid_size(rows, columns) on a ConvAttention used alone.',
        )
        qkv = self.qkv(x).reshape(B, T, 3, self.num_heads, self.head_dim)
        if self.qk_norm:
            q, k, v = qkv.unbind(2)
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)  # autocast norms in float32
            qkv = torch.stack([q, k, v], dim=2)
        return qkv

    def _scores_are_constant(self) -> bool:
        """Return whether a cached bias is the fastest form: inference on the CPU."""
        return False if torch.jit.is_scripting() else self._is_cpu_inference()

    @torch.jit.unused
    def _is_cpu_inference(self) -> bool:
        # `_buffers`, because replicas of nn.DataParallel have no parameters, and torch.fx turns attributes into proxies
        if self.training or self.rpe._buffers['key_basis'].device.type != 'cpu':  # type: ignore[union-attr]
            return False
        # a trace is for inference, even if gradients are enabled
        return not self._takes_gradient() or torch.jit.is_tracing()

    @torch.jit.unused
    def _takes_gradient(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.rpe.parameters())

    @torch.jit.unused
    def _is_traced(self) -> bool:
        """Return whether the call is recorded. A cache would become a constant."""
        return torch.jit.is_tracing() or torch.compiler.is_compiling() or isinstance(self.rpe.alpha, torch.fx.Proxy)

    @torch.jit.unused
    def _cached_channels(self, qkv: torch.Tensor) -> Optional[torch.Tensor]:
        """Return the cached channels, or None if this call must not use the cache."""
        if self._is_traced():
            return None
        if self.training or self._takes_gradient():
            self.rpe._channels_cache = None  # a fused optimizer may step next, and free the gradients
            return None
        return self.rpe.cached_channels(self.scale, qkv)

    def _scores(self, dtype: torch.dtype, is_masked: bool) -> torch.Tensor:
        """Return the positional scores (heads, T, T), from the cache if possible.

        The cache limits low scores. This is exact only if each query may attend to its own patch.
        """
        if not is_masked:
            frozen = self.frozen_scores
            if frozen is not None:
                return frozen.to(dtype)
            if not torch.jit.is_scripting() and self._is_cpu_inference() and not self._is_traced():
                return self.rpe.cached_scores(dtype)
        return self.rpe().to(dtype)

    def _append_scores(self, qkv: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys and values with channels whose products are the positional scores."""
        channels: Optional[torch.Tensor] = None
        if not torch.jit.is_scripting():
            channels = self._cached_channels(qkv)
        if channels is not None:
            return append_channels(qkv, channels)
        rpe = self.rpe
        alpha = rpe.alpha.unsqueeze(1)
        if rpe.dropout_active():
            alpha = alpha * rpe.query_dropout()
        key_basis, query_basis, sq_steps = rpe.constants()
        return append_positions(qkv, alpha, rpe.delta, query_basis, key_basis, self.scale, sq_steps)

    def forward(
            self,
            x: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Compute the attention.

        Args:
            x: Tokens (B, T, dim), prefix tokens first, then the patches of the grid row by row.
            attn_mask: Boolean (True attends) or additive mask that broadcasts to (B, heads, T, T).
            is_causal: Mask later tokens. Not together with `attn_mask`.

        Returns:
            (B, T, dim_out).
        """
        B, T, _ = x.shape
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        qkv = self._qkv(x)
        is_masked = attn_mask is not None

        if self.fused_attn and not (self.rpe.needs_scores() or self._scores_are_constant()):
            q, k, v = self._append_scores(qkv)
            x = F.scaled_dot_product_attention(
                q, k, v,
                attn_mask=attn_mask,
                dropout_p=self.attn_drop.p if self.training else 0.,
                is_causal=is_causal,
                scale=self.scale,
            )[..., :self.head_dim]
        elif self.fused_attn:
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            scores = self._scores(q.dtype, is_masked)
            mask = resolve_self_attn_mask(T, scores, attn_mask, is_causal)
            x = F.scaled_dot_product_attention(
                q, k, v,
                attn_mask=maybe_add_mask(scores.unsqueeze(0), mask),
                dropout_p=self.attn_drop.p if self.training else 0.,
                scale=self.scale,
            )
        else:
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            attn = (q * self.scale) @ k.transpose(-2, -1) + self._scores(q.dtype, is_masked)
            attn = maybe_add_mask(attn, resolve_self_attn_mask(T, attn, attn_mask, is_causal))
            attn = attn.softmax(dim=-1)
            attn = self.attn_drop(attn)
            x = attn @ v

        x = x.transpose(1, 2).reshape(B, T, self.attn_dim)
        x = self.norm(x)
        if gate is not None:
            x = x * gate
        x = self.proj(x)
        return self.proj_drop(x)

    @torch.jit.ignore
    def attention_scores(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the scores before the softmax, and their two parts.

        Args:
            x: Tokens (B, T, dim), the input of `forward` (in a block: after its first norm).

        Returns:
            Content scores (B, heads, T, T), positional scores (heads, T, T) without dropout, and their sum.
        """
        q, k, _ = self._qkv(x).permute(2, 0, 3, 1, 4).unbind(0)
        content = (q * self.scale) @ k.transpose(-2, -1)
        position = self.rpe.offset_scores(self.rpe.alpha, self.rpe.delta).to(content.dtype)
        return content, position, content + position
