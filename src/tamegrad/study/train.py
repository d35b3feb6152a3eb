"""Trains the network under one strategy from one seed, and records every step."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor, nn

from tamegrad import Keep
from tamegrad.report import Report
from tamegrad.study.network import ByteNetwork, batches, held_out_batch, make_network
from tamegrad.study.settings import DIVERGED_LOSS, TORCH_GLOBAL, Settings, strategy_of, threshold_of
from tamegrad.study.text import Text
from tamegrad.torch import GradientNormalizer, attach

__all__ = ["Run", "Step", "train"]

EVALUATIONS = 20


@dataclass(frozen=True, slots=True)
class Step:
    """The record of one training step.

    Args:
        loss: On the batch, before the step; in nats per byte.
        norm: The norm of the whole gradient, before the strategy.
        layer_norms: The norm of each layer's gradient, before the strategy.
        layer_clipped: Whether the strategy shrank any group of the layer.
        milliseconds: The time of the step: forward, backward, strategy, optimizer.
    """

    loss: float
    norm: float
    layer_norms: tuple[float, ...]
    layer_clipped: tuple[bool, ...]
    milliseconds: float


@dataclass
class Run:
    """The record of one run; it grows with every step, so that the results so far survive Ctrl-C.

    Args:
        strategy: The strategy's name.
        threshold: Its threshold; None for a strategy that has none.
        seed: Seeds the initial parameters and the choice of excerpts.
        layers: The network's layers.
        steps: One entry per step.
        held_out: Pairs of the number of steps done and the loss on held-out text, in nats per byte.
        ended: `"completed"`, `"non-finite"` if a non-finite loss stopped the run, `"interrupted"` if Ctrl-C did.
    """

    strategy: str
    threshold: float | None
    seed: int
    layers: tuple[str, ...] = ()
    steps: list[Step] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    ended: Literal["completed", "non-finite", "interrupted"] = "interrupted"

    @property
    def diverged_at(self) -> int | None:
        """The first step, counted from 1, whose training loss is not finite or above twice that of uniform guessing."""
        losses = (step.loss for step in self.steps)
        return next((number for number, loss in enumerate(losses, 1) if not loss <= DIVERGED_LOSS), None)

    @property
    def final_loss(self) -> float:
        """The last loss on held-out text."""
        return self.held_out[-1][1]

    @property
    def learned(self) -> bool:
        """Whether the run was completed, ended under the limit and with a lower held-out loss than it started with."""
        stayed = self.diverged_at is None or self.recovered
        return self.ended == "completed" and stayed and self.final_loss < self.held_out[0][1]

    @property
    def recovered(self) -> bool:
        """Whether the run diverged, but ended under the limit."""
        return self.diverged_at is not None and self.ended == "completed" and self.steps[-1].loss <= DIVERGED_LOSS


class _Strategy:
    """Applies one strategy between backward and the optimizer's step, and measures the layers for the record."""

    def __init__(self, run: Run, network: ByteNetwork, optimizer: torch.optim.Optimizer) -> None:
        self._network = network
        self._threshold = run.threshold if run.strategy == TORCH_GLOBAL else None
        strategy = strategy_of(run.strategy, run.threshold)
        # Training without a strategy, or with PyTorch's clip, needs no layer norms: measuring them is not timed.
        untimed = isinstance(strategy, Keep) or self._threshold is not None
        self._measuring = GradientNormalizer(network, Keep()) if untimed else None
        self._normalizer = self._measuring or attach(network, optimizer, strategy)
        self.layers = tuple(layer.name for layer in self._normalizer.plan.layers)
        self._layer_of = [self.layers.index(group.name.split("/")[0]) for group in self._normalizer.plan.groups]

    def measure_untimed(self) -> None:
        """Measures the layers if the strategy does not; not timed."""
        if self._measuring is not None:
            self._measuring.normalize_()

    def apply(self) -> None:
        """Applies PyTorch's clip; other strategies run inside the optimizer's step. Timed."""
        if self._threshold is not None:
            nn.utils.clip_grad_norm_(self._network.parameters(), self._threshold)

    def record(self, loss: float, seconds: float) -> Step:
        """Returns the record of the step just done."""
        report = self._normalizer.report
        assert report is not None
        norm = float(report.total_norm)
        if self._threshold is not None:
            clipped = [self._threshold < norm < math.inf] * len(self.layers)
        else:
            clipped = _any_of_layer(report.clipped.tolist(), self._layer_of, len(self.layers))
        return Step(loss, norm, self._layer_norms(report), tuple(clipped), 1000 * seconds)

    def _layer_norms(self, report: Report[Tensor]) -> tuple[float, ...]:
        norms = [0.0] * len(self.layers)
        for layer, norm in zip(self._layer_of, report.norms.tolist(), strict=True):
            # hypot(inf, nan) is inf; here NaN wins.
            norms[layer] = math.nan if math.isnan(norm + norms[layer]) else math.hypot(norms[layer], norm)
        return tuple(norms)


def train(settings: Settings, text: Text, run: Run, after_step: Callable[[Run], None]) -> None:
    """Trains a network under one strategy, and records the run as it goes.

    A non-finite loss leaves NaN in every parameter, and no step removes it: the run stops there.

    Args:
        settings: How to train.
        text: The text to train on.
        run: The record to fill: a new one.
        after_step: Called with the run after every step.
    """
    network = make_network(settings.network, run.seed)
    optimizer = torch.optim.SGD(network.parameters(), lr=settings.learning_rate)
    strategy = _Strategy(run, network, optimizer)
    run.layers = strategy.layers
    excerpts = held_out_batch(text)
    every = math.ceil(settings.steps / EVALUATIONS)
    run.held_out.append((0, _held_out_loss(network, excerpts)))
    for number, batch in zip(range(1, settings.steps + 1), batches(text, run.seed), strict=False):
        step = _step(network, optimizer, strategy, batch)
        run.steps.append(step)
        finite = math.isfinite(step.loss)
        if number % every == 0 or number == settings.steps or not finite:
            run.held_out.append((number, _held_out_loss(network, excerpts)))
        if not finite:
            run.ended = "non-finite"
        elif number == settings.steps:
            run.ended = "completed"
        after_step(run)
        if not finite:
            return


def new_run(settings: Settings, strategy: str, seed: int) -> Run:
    """Returns the empty record of a run.

    Args:
        settings: How to train.
        strategy: The strategy's name.
        seed: The seed of the run.

    Returns:
        The record.
    """
    return Run(strategy, threshold_of(strategy, settings.threshold), seed)


def _step(network: ByteNetwork, optimizer: torch.optim.Optimizer, strategy: _Strategy, batch: Tensor) -> Step:
    started = perf_counter()
    optimizer.zero_grad()
    loss = network.loss(batch)
    loss.backward()  # type: ignore[no-untyped-call]
    to_gradients = perf_counter() - started
    strategy.measure_untimed()
    started = perf_counter()
    strategy.apply()
    optimizer.step()
    return strategy.record(loss.item(), to_gradients + perf_counter() - started)


@torch.no_grad()
def _held_out_loss(network: ByteNetwork, excerpts: Tensor) -> float:
    return network.loss(excerpts).item()


def _any_of_layer(clipped: Sequence[bool], layer_of: Sequence[int], layers: int) -> list[bool]:
    of_layers = [False] * layers
    for layer, cut in zip(layer_of, clipped, strict=True):
        of_layers[layer] |= cut
    return of_layers
