"""Rotary positions: turn pairs of a head's channels by an angle that grows with the position.

Su et al., 2021 (RoFormer). Channel pair i of a head of `dim` channels turns by
m * theta_i at position m, with theta_i = base^(-2i / dim), so that the product of a query at
p and a key at j depends on p - j only. A scaling object stretches the angles for contexts longer
than the model was trained on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from manyheads.arguments import number, whole_number
from manyheads.errors import ArgumentError, ArgumentTypeError, ShapeError


class RotaryScaling(Protocol):
    """How the frequencies of a longer context are made from the trained ones."""

    def frequencies(self, dim: int, base: float) -> Tensor:
        """float64 [dim // 2] on the CPU: theta_i, radians per position."""
        ...

    @property
    def amplitude(self) -> float:
        """Factor on cos and sin (YaRN's attention factor)."""
        ...


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (Chen et al., 2023): every angle divided by `factor`."""

    factor: float
    amplitude = 1.0

    def __post_init__(self) -> None:
        _check_factor(self)

    def frequencies(self, dim: int, base: float) -> Tensor:
        """See `RotaryScaling.frequencies`."""
        return plain_frequencies(dim, base) / self.factor


@dataclass(frozen=True)
class NTKScaling:
    """NTK-aware scaling (bloc97, 2023): base * factor^(dim / (dim - 2)).

    The slowest pair is slowed by `factor`, the fastest hardly at all. The "dynamic" kind of other
    libraries changes the base as the text grows, which makes keys already in a cache wrong; fix
    the length you need instead: factor * length / trained_length - (factor - 1) is its factor at
    that length.
    """

    factor: float
    amplitude = 1.0

    def __post_init__(self) -> None:
        _check_factor(self)

    def frequencies(self, dim: int, base: float) -> Tensor:
        """See `RotaryScaling.frequencies`."""
        if dim <= 2:
            raise ArgumentError(f"NTKScaling got dim={dim}; expected at least 4.")
        return plain_frequencies(dim, base * self.factor ** (dim / (dim - 2)))


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al., 2023): interpolate slow pairs, keep fast ones, sharpen the softmax.

    Args:
        factor: the paper's s, new length / trained length.
        original_length: the trained length in positions, the paper's L.
        attention_factor: factor on cos and sin; None gives the paper's 0.1 ln(s) + 1.
        beta_fast, beta_slow: turns over the trained length above which a pair is kept and below
            which it is interpolated; the paper's beta and alpha.
        mscale, mscale_all_dim: DeepSeek's variant of the attention factor; both or neither.
        truncate: round the ramp's ends to whole pairs.
    """

    factor: float
    original_length: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_factor(self)
        _check_length(self)

    @property
    def amplitude(self) -> float:
        """See `RotaryScaling.amplitude`."""
        if self.attention_factor is not None:
            return self.attention_factor

        def grown(weight: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            return grown(self.mscale) / grown(self.mscale_all_dim)
        return grown(1.0)

    def frequencies(self, dim: int, base: float) -> Tensor:
        """See `RotaryScaling.frequencies`."""

        def pair_that_turns(times: float) -> float:
            """The (fractional) pair that makes so many turns over the trained length."""
            return (
                dim * math.log(self.original_length / (times * 2 * math.pi)) / (2 * math.log(base))
            )

        low, high = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        width = (high - low) or 0.001  # as in the authors' code: no division by zero
        pair = torch.arange(dim // 2, dtype=torch.float64, device="cpu")
        interpolated = ((pair - low) / width).clamp(0, 1)
        theta = plain_frequencies(dim, base)
        return theta / self.factor * interpolated + theta * (1 - interpolated)


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling: slow pairs divided by `factor`, fast ones kept, a blend between.

    Args:
        factor: new length / trained length.
        original_length: the trained length in positions.
        low_freq_factor, high_freq_factor: turns over the trained length below which a pair is
            slowed in full and above which it is kept.
    """

    factor: float = 8.0
    original_length: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    amplitude = 1.0

    def __post_init__(self) -> None:
        _check_factor(self)
        _check_length(self)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ArgumentError(
                f"Llama3Scaling got low_freq_factor={self.low_freq_factor} and "
                f"high_freq_factor={self.high_freq_factor}; expected low < high."
            )

    def frequencies(self, dim: int, base: float) -> Tensor:
        """See `RotaryScaling.frequencies`."""
        theta = plain_frequencies(dim, base)
        turns = self.original_length * theta / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0, 1)
        return theta * kept + theta / self.factor * (1 - kept)


class Rotary:
    """Rotary positions of one kind: call it with vectors and their positions.

    Args:
        dim: how many of a head's first channels turn, even; the rest pass through (partial
            rotary).
        base: the paper's 10000.
        interleaved: False pairs channel i with i + dim / 2 (Llama, NeoX); True pairs 2i with
            2i + 1 (the paper, GPT-J).
        scaling: a `RotaryScaling` for contexts longer than the trained one, or None.

    Angles are computed in float64 and their cos and sin rounded once, because a float32 angle is
    off by up to 0.01 radians at position 100,000. The turning itself is done in float32 (float64
    for float64 vectors), whatever the vectors' dtype. There is no state: nothing to save or move.

    Raises:
        ArgumentError: an odd `dim`, or a `base` that is not above 1.
        ArgumentTypeError: a `dim` that is no int, or a `base` that is no number.

    >>> rotary = Rotary(4)
    >>> x = torch.ones(1, 1, 3, 4)  # [B, H, L, D]
    >>> [round(v, 3) for v in rotary(x, 0)[0, 0, 1].tolist()]  # cos 1 - sin 1, ...
    [-0.301, 0.99, 1.382, 1.01]
    >>> bool((rotary(x, 5) == rotary(x, torch.tensor([5, 6, 7]))).all())
    True
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        *,
        interleaved: bool = False,
        scaling: RotaryScaling | None = None,
    ) -> None:
        dim = whole_number(dim, "Rotary's dim")
        base = number("Rotary's base", base, "a number above 1", lambda _: True)
        if dim < 2 or dim % 2:
            raise ArgumentError(
                f"Rotary got dim={dim}; expected a positive even number: channels turn in pairs."
            )
        if not base > 1:
            raise ArgumentError(f"Rotary got base={base}; expected a number above 1, e.g. 10000.")
        if scaling is not None and not hasattr(scaling, "frequencies"):
            raise ArgumentTypeError(
                f"Rotary got scaling={scaling!r}; expected LinearScaling, NTKScaling, "
                f"YarnScaling, Llama3Scaling or None."
            )
        self.dim = dim
        self.base = base
        self.interleaved = interleaved
        self.scaling = scaling
        kind = scaling if scaling is not None else LinearScaling(1.0)
        self._amplitude = kind.amplitude
        self._frequencies = kind.frequencies(dim, base)

    def __call__(self, x: Tensor, positions: int | Tensor) -> Tensor:
        """Turn `x` by its positions.

        Args:
            x: [B, H, L, D] or [H, L, D], float, D >= dim; any strides; not changed.
            positions: the int position of the first row, the others following; or an int tensor
                [L], or [B, L]. Negative positions are fine.

        Returns:
            The turned vectors, shape and dtype of `x`.

        Raises:
            ShapeError: D < dim, or positions that fit neither [L] nor [B, L].
            ArgumentTypeError: `x` is not float, or `positions` not int.
        """
        if not x.is_floating_point():
            raise ArgumentTypeError(f"Rotary got x of {x.dtype}; expected a float dtype.")
        if x.dim() not in (3, 4) or x.shape[-1] < self.dim:
            raise ShapeError(
                f"Rotary got x of shape {list(x.shape)}; expected [B, H, L, D] or [H, L, D] with "
                f"D >= dim = {self.dim}."
            )
        cos, sin = self.tables(positions, x)
        return self.turn(x, cos, sin)

    def tables(self, positions: int | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Make cos and sin for vectors like `like`, to share between query and key.

        Returns:
            cos [L, D] or [B, 1, L, D], 1 for the channels that do not turn, and sin [L, dim // 2]
            or [B, 1, L, dim // 2]; float32 (float64 if `like` is).
        """
        # Apple's GPU has no float64.
        wide = torch.float32 if like.device.type == "mps" else torch.float64
        frequencies = self._frequencies.to(like.device, wide)
        angles = _positions(positions, like).to(wide)[..., None] * frequencies
        if angles.dim() == 3:
            angles = angles[:, None]
        cos, sin = angles.cos(), angles.sin()
        if self._amplitude != 1.0:
            cos, sin = cos * self._amplitude, sin * self._amplitude
        cos = cos.repeat_interleave(2, -1) if self.interleaved else torch.cat([cos, cos], -1)
        cos = functional.pad(cos, (0, like.shape[-1] - self.dim), value=1.0)
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return cos.to(dtype), sin.to(dtype)

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`x` turned by the angles of `tables`; shape and dtype of `x`, and its memory order."""
        wide = x.to(cos.dtype)
        # One new tensor, finished in place: allocating more costs more than the arithmetic.
        turned = wide * cos
        first, second = self._pairs(wide)
        turned_first, turned_second = self._pairs(turned)
        turned_first.addcmul_(second, sin, value=-1)
        turned_second.addcmul_(first, sin)
        return turned.to(x.dtype)

    def _pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Views [..., dim // 2] of the first and the second channels of all pairs."""
        if self.interleaved:
            return x[..., 0 : self.dim : 2], x[..., 1 : self.dim : 2]
        half = self.dim // 2
        return x[..., :half], x[..., half : self.dim]

    def __repr__(self) -> str:
        parts = [f"{self.dim}", f"base={self.base}"]
        if self.interleaved:
            parts.append("interleaved=True")
        if self.scaling is not None:
            parts.append(f"scaling={self.scaling}")
        return f"Rotary({', '.join(parts)})"


def plain_frequencies(dim: int, base: float) -> Tensor:
    """float64 [dim // 2] on the CPU: the paper's theta_i = base^(-2i / dim)."""
    even = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu")
    return base ** (-even / dim)


def _positions(positions: int | Tensor, like: Tensor) -> Tensor:
    """The int positions, [L] or [B, L], of every row of `like` [B, H, L, D]."""
    length = like.shape[-2]
    if not isinstance(positions, Tensor):
        return torch.arange(positions, positions + length, device=like.device)
    if positions.is_floating_point() or positions.dtype == torch.bool:
        raise ArgumentTypeError(
            f"Rotary got positions of {positions.dtype}; expected an int dtype: they are counts."
        )
    fits = [(length,)] + ([(1, length), (like.shape[0], length)] if like.dim() == 4 else [])
    if tuple(positions.shape) not in fits:
        raise ShapeError(
            f"Rotary got positions of shape {list(positions.shape)} for x of shape "
            f"{list(like.shape)}; expected an int, or a tensor [L] or [B, L] with L = {length}."
        )
    return positions.to(like.device)


def _check_factor(scaling: LinearScaling | NTKScaling | YarnScaling | Llama3Scaling) -> None:
    if not scaling.factor > 0:
        raise ArgumentError(
            f"{type(scaling).__name__} got factor={scaling.factor}; expected a positive number, "
            f"the new context length over the trained one."
        )


def _check_length(scaling: YarnScaling | Llama3Scaling) -> None:
    if not scaling.original_length > 0:
        raise ArgumentError(
            f"{type(scaling).__name__} got original_length={scaling.original_length}; expected "
            f"the trained context length, in positions."
        )
