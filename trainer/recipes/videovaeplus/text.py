"""Text guidance: cross-attention of visual tokens and the tokens of a caption (section 3.3).

    x -> patches -> LayerNorm -> Q, V ----+
                                          attention -> projection -> + x
    caption or null token -> K (, V) -----+

The paper has queries and values from the visual tokens and keys from the text, while attention gives a value to each
key. The reading that computes: a text token first gathers the visual values of a frame by its own attention over them,
then the visual tokens attend to the text tokens and take what these gathered,

    y = softmax_L(Q Kᵀ / √d) softmax_P(K Qᵀ / √d) V        (``values: visual``)
    y = softmax_L(Q Kᵀ / √d) V_text                        (``values: text``, the released code)

Legend: B clips, C channels, T frames, H height, W width; P patches of a frame, N = T P visual tokens, L text tokens,
D their width, h heads, d numbers of a head.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.recipes.videovaeplus.config import TextSpec


class Text(NamedTuple):
    """Tokens (B, L, D) that clips attend to, and a mask that is False at padding; every clip has one token at least."""

    emb_BLD: Tensor
    mask_BL: Tensor


class NullToken(nn.Module):
    """The learned token that stands for a missing caption."""

    def __init__(self, spec: TextSpec) -> None:
        super().__init__()
        self.token_D = nn.Parameter(torch.randn(spec.width) * 0.02)

    def forward(self, clips: int, emb_BLD: Tensor | None, mask_BL: Tensor | None) -> Text:
        """Each clip's own tokens, or the null token for a clip that has none. It always runs, on every rank."""
        null_B1D = self.token_D.expand(clips, 1, -1)
        if emb_BLD is None or mask_BL is None:
            return Text(null_B1D, torch.ones(clips, 1, dtype=torch.bool, device=self.token_D.device))
        mask_BL = mask_BL.bool()
        silent_B1 = ~mask_BL.any(1, keepdim=True)
        emb_BLD = emb_BLD.to(null_B1D).masked_fill(~mask_BL[..., None], 0.0)
        return Text(torch.cat((null_B1D, emb_BLD), dim=1), torch.cat((silent_B1, mask_BL), dim=1))


class TextAttention(nn.Module):
    """Visual tokens, patches of ``patch`` x ``patch`` pixels, attend to the text; starts as nothing."""

    def __init__(self, spec: TextSpec, channels: int, patch: int) -> None:
        super().__init__()
        self.patch, self.heads, self.visual = patch, spec.heads, spec.values == "visual"
        inner, size = spec.heads * spec.head_width, channels * patch * patch
        self.norm = nn.LayerNorm(size)
        self.to_q, self.to_k = nn.Linear(size, inner, bias=False), nn.Linear(spec.width, inner, bias=False)
        self.to_v = nn.Linear(size if self.visual else spec.width, inner, bias=False)
        self.to_out = nn.Linear(inner, size)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def forward(self, x_BCTHW: Tensor, text: Text) -> Tensor:
        """(B, C, T, H, W) -> the same shape; H and W are multiples of ``patch``."""
        patch = self.patch
        x_BCThpwp = x_BCTHW.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))
        tokens_BThwN = x_BCThpwp.permute(0, 2, 3, 5, 4, 6, 1).flatten(4)
        grid = tokens_BThwN.shape[1:4]
        tokens_BTPN = self.norm(tokens_BThwN.flatten(2, 3))
        query_BhTPd = self._heads(self.to_q(tokens_BTPN))
        key_BhLd = self._heads(self.to_k(text.emb_BLD))
        mask_B11L = text.mask_BL[:, None, None]
        if self.visual:
            value_BhTPd = self._heads(self.to_v(tokens_BTPN))
            scores_BhTPL = torch.einsum("bhtpd,bhld->bhtpl", query_BhTPd, key_BhLd).float()
            scores_BhTPL = scores_BhTPL / math.sqrt(query_BhTPd.shape[-1])
            gather = scores_BhTPL.softmax(3).to(value_BhTPd.dtype)
            spread = scores_BhTPL.masked_fill(~mask_B11L[:, None], -math.inf).softmax(4).to(value_BhTPd.dtype)
            gathered_BhTLd = torch.einsum("bhtpl,bhtpd->bhtld", gather, value_BhTPd)
            seen_BhTPd = torch.einsum("bhtpl,bhtld->bhtpd", spread, gathered_BhTLd)
        else:
            value_BhLd = self._heads(self.to_v(text.emb_BLD))
            seen_BhNd = F.scaled_dot_product_attention(
                query_BhTPd.flatten(2, 3), key_BhLd, value_BhLd, attn_mask=mask_B11L
            )
            seen_BhTPd = seen_BhNd.unflatten(2, query_BhTPd.shape[2:4])
        y_BTPN = self.to_out(seen_BhTPd.movedim(1, 3).flatten(3))
        y_BThwppC = y_BTPN.unflatten(3, (patch, patch, -1)).unflatten(2, grid[1:])
        return x_BCTHW + y_BThwppC.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    def _heads(self, tokens: Tensor) -> Tensor:
        """(B, ..., h d) -> (B, h, ..., d)."""
        return tokens.unflatten(-1, (self.heads, -1)).movedim(-2, 1)
