"""PyTorch's operations on one tensor at a time, for what its multi-tensor operations cannot do.

That is: float64 and complex128, whose squares need three ranges, and limits on elements. Tensors are read in pieces, so
that the float64 temporaries have a bounded size.
"""

import torch
from torch import Tensor

from tamegrad.decide import AFTER, BEFORE, COLUMNS, CUT, NONFINITE
from tamegrad.ranges import BIG_ABOVE, BIG_FACTOR, SAFE_ABOVE, SAFE_BELOW, SMALL_BELOW, SMALL_FACTOR
from tamegrad.torch.memory import NARROW_DTYPES, flattened

__all__ = ["SMALLEST_LIMIT", "as_real", "change_", "count_nonfinite", "measured", "pieces_of"]

# The real numbers in a piece. On the CPU smaller ones cost more in calls than they gain in caches.
HOST_PIECE, DEVICE_PIECE = 2**19, 2**24

# The squares of limits above this one are in the middle range of float64, with any loss scale.
SMALLEST_LIMIT = 2.0**-300
_MIDDLE = BEFORE.start + 1


def as_real(values: Tensor) -> Tensor:
    """Returns the values of a dense tensor as a 1-dim view, complex ones as pairs of real numbers."""
    flat = flattened(values)
    return torch.view_as_real(flat).view(-1) if flat.is_complex() else flat


def pieces_of(real: Tensor) -> list[Tensor]:
    """Cuts a 1-dim tensor into pieces of bounded size; no pair of real numbers is cut in two."""
    size = HOST_PIECE if real.device.type == "cpu" else DEVICE_PIECE
    return [real] if real.numel() <= size else list(torch.split(real, size))


def measured(values: Tensor, limit: Tensor | None) -> Tensor:
    """Measures one tensor.

    Args:
        values: A dense tensor.
        limit: 0-dim float64 on its device: where elements are cut, to measure what is left as well; None if nowhere.

    Returns:
        `(COLUMNS,)` float64 on its device.
    """
    row = torch.zeros(COLUMNS, dtype=torch.float64, device=values.device)
    real, narrow = as_real(values), values.dtype in NARROW_DTYPES
    for piece in pieces_of(real):
        wide, pairs = piece.to(torch.float64), values.is_complex()
        if narrow:
            row[_MIDDLE] += wide.square().sum()
        else:
            row[BEFORE] += _squares(wide)
        if limit is not None:
            row[AFTER] += _squares(_limited(wide, limit, pairs=pairs))
            row[CUT] += (_magnitudes(wide, pairs=pairs) > limit).sum()
    # Sums are finite exactly if all values are; on the CPU it costs nothing to look, elsewhere counting is cheaper.
    if values.device.type != "cpu" or not row.isfinite().all():
        row[NONFINITE] = count_nonfinite(values).to(torch.float64)
    return row


def count_nonfinite(values: Tensor) -> Tensor:
    """Returns how many real numbers of a dense tensor are NaN, +inf and -inf; `(3,)` int64 on its device."""
    counts = torch.zeros(3, dtype=torch.int64, device=values.device)
    for piece in pieces_of(as_real(values)):
        counts += torch.stack([found.sum() for found in (piece.isnan(), piece.isposinf(), piece.isneginf())])
    return counts


def change_(values: Tensor, first: Tensor, second: Tensor, limit: Tensor | None, zeroed: Tensor | None) -> None:
    """Multiplies a dense tensor by two factors, then cuts its elements, or makes it zero; in place.

    Args:
        values: The tensor.
        first: 0-dim float64 on its device.
        second: 0-dim float64 on its device.
        limit: 0-dim float64 on its device, or None.
        zeroed: 0-dim bool on its device, or None.
    """
    for piece in pieces_of(as_real(values)):
        # A product of complex numbers would lose the sign of zeros.
        wide = piece.to(torch.float64) * first * second
        if limit is not None:
            wide = _limited(wide, limit, pairs=values.is_complex())
        if zeroed is not None:
            wide = wide.masked_fill(zeroed, 0.0)
        piece.copy_(wide)


def _magnitudes(wide: Tensor, *, pairs: bool) -> Tensor:
    return torch.hypot(wide[::2], wide[1::2]) if pairs else wide.abs()


def _limited(wide: Tensor, limit: Tensor, *, pairs: bool) -> Tensor:
    """Cuts magnitudes to a limit; a complex value, which is a pair, keeps its direction."""
    if not pairs:
        return wide.clamp(-limit, limit)
    magnitudes = _magnitudes(wide, pairs=True)
    # A magnitude may be past what a float64 holds; that of a half never is.
    halved = torch.where(magnitudes.isinf(), 0.5, 1.0)
    over = (magnitudes > limit).repeat_interleave(2)
    held = wide * halved.repeat_interleave(2)
    return torch.where(over, held / _magnitudes(held, pairs=True).repeat_interleave(2) * limit, wide)


def _squares(wide: Tensor) -> Tensor:
    """Returns the sums of squares of float64 values in the small, middle and big range, `(3,)`."""
    if wide.device.type == "cpu":
        middle = wide.square().sum()
        if SAFE_ABOVE < middle < SAFE_BELOW:
            none = torch.zeros_like(middle)
            return torch.stack([none, middle, none])
    magnitudes = wide.abs()
    small, big = magnitudes < SMALL_BELOW, magnitudes > BIG_ABOVE
    ranges = (
        (magnitudes * SMALL_FACTOR).masked_fill_(~small, 0.0),
        magnitudes.masked_fill(small | big, 0.0),
        (magnitudes * BIG_FACTOR).masked_fill_(~big, 0.0),
    )
    return torch.stack([scaled.square_().sum() for scaled in ranges])
