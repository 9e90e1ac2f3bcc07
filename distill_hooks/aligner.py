"""The aligner between transformer tokens and CNN feature maps (figure 3)."""
from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerNorm

Size = Tuple[int, int]


def interpolation_matrix(in_size: int, out_size: int, **dd: Any) -> torch.Tensor:
    """Return the matrix (out_size, in_size) of linear interpolation along one axis."""
    identity = torch.eye(in_size, **dd).unsqueeze(0)
    return F.interpolate(identity, size=out_size, mode='linear')[0].T.contiguous()


class Aligner(nn.Module):
    """Layers that give tokens the shape of a CNN's feature map (figure 3).

    Bilinear interpolation, depth-wise 3x3 convolution, LayerNorm, ReLU. Our choices: a 1x1 convolution after the
    depth-wise one changes the channels, LayerNorm normalises the channels, and feature maps with negative values get no
    ReLU. The aligner is trained with the student and discarded afterwards.

    For `in_size` and `out_size`, two matrix products interpolate, because PyTorch's bilinear backward is not
    deterministic on CUDA. PyTorch interpolates all other sizes.

    Args:
        in_chs: Channels of the tokens.
        out_chs: Channels of the feature map.
        relu: End with a ReLU.
        in_size: Usual grid of the tokens (H, W).
        out_size: Usual size of the feature map (h, w).
    """

    rows: torch.Tensor
    cols: torch.Tensor

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            relu: bool = True,
            in_size: Optional[Size] = None,
            out_size: Optional[Size] = None,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        dd: Dict[str, Any] = {'device': device, 'dtype': dtype}
        self.in_size, self.out_size = in_size, out_size
        if in_size is not None and out_size is not None:
            for name, sizes in (('rows', (in_size[0], out_size[0])), ('cols', (in_size[1], out_size[1]))):
                self.register_buffer(name, interpolation_matrix(*sizes, **dd), persistent=False)
        self.conv_dw = nn.Conv2d(in_chs, in_chs, 3, padding=1, groups=in_chs, bias=False, **dd)
        weight = self.conv_dw.weight
        weight.data = weight.data.as_strided(weight.shape, (9, 1, 3, 1))  # DDP needs the strides of its gradient
        self.conv_pw = nn.Linear(in_chs, out_chs, **dd)  # tokens stay channels-last
        self.norm = LayerNorm(out_chs, **dd)
        self.act = nn.ReLU() if relu else nn.Identity()

    def _interpolate(self, tokens: torch.Tensor, size: Size) -> torch.Tensor:
        if (tuple(tokens.shape[-2:]), tuple(size)) != (self.in_size, self.out_size):
            return F.interpolate(tokens, size=size, mode='bilinear')
        x = tokens.permute(0, 2, 3, 1)  # (B, H, W, D)
        x = self.cols.to(x.dtype) @ x
        x = self.rows.to(x.dtype) @ x.flatten(2)
        return x.unflatten(2, (size[1], -1)).permute(0, 3, 1, 2)

    def forward(self, tokens: torch.Tensor, size: Size) -> torch.Tensor:
        """Align tokens (B, D, H, W) with a feature map: (B, C, h, w) for `size` (h, w)."""
        if tuple(tokens.shape[-2:]) != tuple(size):
            tokens = self._interpolate(tokens, size)
        x = self.conv_dw(tokens).permute(0, 2, 3, 1)  # (B, h, w, D)
        return self.act(self.norm(self.conv_pw(x))).permute(0, 3, 1, 2)
