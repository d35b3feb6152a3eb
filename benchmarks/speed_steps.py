"""The share of a real training step, including forward, backward and AdamW, that clipping takes."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from speed_tools import HUGE, LOOP, PER_LAYER, TINY, WHOLE
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from tamegrad import Clip
from tamegrad.torch import GradientNormalizer

__all__ = ["Share", "measure_shares"]


@dataclass(frozen=True)
class Share:
    """The share of clipping in the steps of one model.

    Args:
        model: The model that is trained.
        tool: The tool that clips.
        clips: Whether everything is clipped in every step, or nothing.
        seconds: The median time of clipping.
        share: The median share of the step.
    """

    model: str
    tool: str
    clips: bool
    seconds: float
    share: float


class _Transformer(nn.Module):
    def __init__(self, width: int, blocks: int, words: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, blocks)
        self.out = nn.Linear(width, words)

    def forward(self, words: Tensor) -> Tensor:
        scores: Tensor = self.out(self.blocks(self.embedding(words)))
        return nn.functional.cross_entropy(scores.flatten(0, 1), words.flatten())


class _Recurrent(nn.Module):
    def __init__(self, width: int, words: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.rnn = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.out = nn.Linear(width, words)

    def forward(self, words: Tensor) -> Tensor:
        scores: Tensor = self.out(self.rnn(self.embedding(words))[0])
        return nn.functional.cross_entropy(scores.flatten(0, 1), words.flatten())


def measure_shares(*, quick: bool) -> list[Share]:
    """Trains a small transformer and an LSTM for some steps; the tools take turns to clip.

    Args:
        quick: Whether to use tiny models and one round.

    Returns:
        The shares.
    """
    words, width, narrow, length = (20, 8, 8, 4) if quick else (1000, 1024, 256, 64)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(words, (8, length), generator=generator)
    recurrent = f"2-layer LSTM of {width}, 8 sequences of {length} words"
    transformer = f"transformer of 4 blocks of {narrow}, 8 sequences of {length} words"
    rounds = 1 if quick else 3
    return [
        *_measure(transformer, _Transformer(narrow, 4, words), batch, rounds),
        *_measure(recurrent, _Recurrent(width, words), batch, rounds),
    ]


def _measure(name: str, model: nn.Module, batch: Tensor, rounds: int) -> list[Share]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    clippers = {(tool, t == TINY): clip for t in (HUGE, TINY) for tool, clip in _clippers(model, t).items()}
    times = np.array(
        [[_step(model, batch, optimizer, clip) for clip in clippers.values()] for _ in range(rounds + 1)][1:]
    )
    return [
        Share(name, tool, clips, float(np.median(part)), float(np.median(part / whole)))
        for (tool, clips), (part, whole) in zip(clippers, times.transpose(1, 2, 0), strict=True)
    ]


def _clippers(model: nn.Module, threshold: float) -> dict[str, Callable[[], object]]:
    owned = [list(module.parameters(recurse=False)) for module in model.modules()]
    layers = [layer for layer in owned if layer]

    def loop() -> None:
        for layer in layers:
            clip_grad_norm_(layer, threshold)

    return {
        PER_LAYER: GradientNormalizer(model, Clip(threshold, per="layer")).normalize_,
        LOOP: loop,
        WHOLE: lambda: clip_grad_norm_(model.parameters(), threshold),
    }


def _step(
    model: nn.Module, batch: Tensor, optimizer: torch.optim.Optimizer, clip: Callable[[], object]
) -> tuple[float, float]:
    """Takes one training step; returns the seconds of clipping and of the whole step."""
    start = time.perf_counter()
    optimizer.zero_grad()
    model(batch).backward()
    before = time.perf_counter()
    clip()
    after = time.perf_counter()
    optimizer.step()
    return after - before, time.perf_counter() - start
