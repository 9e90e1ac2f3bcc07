"""The aligner between transformer tokens and CNN feature maps (figure 3)."""
from typing import Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerNorm

__all__ = ['Aligner']


class Aligner(nn.Module):
    """Brings content tokens to the shape of a CNN's feature map (section 3.1, figure 3).

    Bilinear interpolation, depth-wise 3x3 convolution, LayerNorm, ReLU. Our choices: a 1x1 convolution after the
    depth-wise one changes the channels, LayerNorm is over channels, and the ReLU is left out where the feature map has
    negative values. It is trained with the student and thrown away afterwards.

    Args:
        in_chs: Channels of the tokens.
        out_chs: Channels of the feature map.
        relu: End with a ReLU.
    """

    def __init__(self, in_chs: int, out_chs: int, relu: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.conv_dw = nn.Conv2d(in_chs, in_chs, 3, padding=1, groups=in_chs, bias=False, **dd)
        weight = self.conv_dw.weight
        weight.data = weight.data.as_strided(weight.shape, (9, 1, 3, 1))  # as its gradient, which DDP asks for
        self.conv_pw = nn.Linear(in_chs, out_chs, **dd)  # tokens are channels-last, and stay so
        self.norm = LayerNorm(out_chs, **dd)
        self.act = nn.ReLU() if relu else nn.Identity()

    def forward(self, tokens: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
        """Align tokens on their grid (B, D, H, W) with a feature map of `size` (h, w): (B, C, h, w)."""
        if tuple(tokens.shape[-2:]) != tuple(size):
            tokens = F.interpolate(tokens, size=size, mode='bilinear')
        x = self.conv_dw(tokens).permute(0, 2, 3, 1)  # (B, h, w, D)
        return self.act(self.norm(self.conv_pw(x))).permute(0, 3, 1, 2)
