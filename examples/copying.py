"""Copying from the source: what a text is about is written in it, and need not be spelt anew.

B texts, L tokens written, Ls of source; vectors of E channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Copying(nn.Module):
    """A pointer (See et al., 2017): a token is written from the vocabulary, or copied.

    P(w) = p_gen P_vocab(w) + (1 - p_gen) sum of a_i over the source's tokens i that are w; a_i is
    the softmax of (W h) . m_i / sqrt(E), p_gen = sigmoid(w . h + b). h is the decoder's vector.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, dim, bias=False)
        self.writes = nn.Linear(dim, 1)

    def forward(
        self, logits: Tensor, hidden: Tensor, memory: Tensor, lengths: Tensor, source: Tensor
    ) -> Tensor:
        """Log P [B, L, vocabulary].

        logits: [B, L, vocabulary]; hidden: [B, L, E]; memory: [B, Ls, E]; source: int [B, Ls].
        """
        scores = (self.query(hidden) @ memory.mT).float() * hidden.shape[-1] ** -0.5
        padding = torch.arange(source.shape[1]) >= lengths[:, None, None]
        copied = scores.masked_fill(padding, -torch.inf).softmax(-1)  # [B, L, Ls]
        writes = self.writes(hidden).float().sigmoid()
        mixed = writes * logits.float().softmax(-1)
        mixed = mixed.scatter_add(2, source[:, None].expand_as(copied), (1 - writes) * copied)
        return mixed.clamp_min(1e-20).log()
