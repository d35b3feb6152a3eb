"""One run: the network trained under one strategy, every step recorded."""

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
    """What one training step did.

    Args:
        loss: On the batch, before the step; nats a byte.
        norm: Of the whole gradient, before the strategy.
        layer_norms: Of each layer's gradient, before the strategy.
        layer_clipped: Whether the strategy made any group of the layer smaller.
        milliseconds: What the step took: forward, backward, strategy, optimizer.
    """

    loss: float
    norm: float
    layer_norms: tuple[float, ...]
    layer_clipped: tuple[bool, ...]
    milliseconds: float


@dataclass
class Run:
    """The record of one run; it grows while the run goes on, so that what was measured outlives Ctrl-C.

    Args:
        strategy: The strategy's name.
        threshold: Its threshold; None for a strategy that has none.
        layers: The network's layers.
        steps: One entry a step.
        held_out: Pairs of how many steps were done and the loss on held-out text, in nats a byte.
        ended: `"completed"`, `"non-finite"` where a loss was not and the run was stopped, `"interrupted"` by Ctrl-C.
    """

    strategy: str
    threshold: float | None
    layers: tuple[str, ...] = ()
    steps: list[Step] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    ended: Literal["completed", "non-finite", "interrupted"] = "interrupted"

    @property
    def diverged_at(self) -> int | None:
        """The first step, from 1, with a training loss that is not finite or above twice that of uniform guessing."""
        losses = (step.loss for step in self.steps)
        return next((number for number, loss in enumerate(losses, 1) if not loss <= DIVERGED_LOSS), None)

    @property
    def recovered(self) -> bool:
        """Whether the run diverged and was back under the limit at its end."""
        return self.diverged_at is not None and self.ended == "completed" and self.steps[-1].loss <= DIVERGED_LOSS


class _Strategy:
    """A strategy at work on a network: what happens between gradients and optimizer, and what is timed of it."""

    def __init__(self, run: Run, network: ByteNetwork, optimizer: torch.optim.Optimizer) -> None:
        self._network = network
        self._threshold = run.threshold if run.strategy == TORCH_GLOBAL else None
        strategy = strategy_of(run.strategy, run.threshold)
        # Who uses no strategy, or PyTorch's clip, does not measure layers: there it is done aside and not timed.
        self._aside = isinstance(strategy, Keep) or self._threshold is not None
        self._normalizer: GradientNormalizer = (
            GradientNormalizer(network, Keep()) if self._aside else attach(network, optimizer, strategy)
        )
        self.layers = tuple(layer.name for layer in self._normalizer.plan.layers)
        self._layer_of = [self.layers.index(group.name.split("/")[0]) for group in self._normalizer.plan.groups]

    def measure_aside(self) -> None:
        """Measures the layers where the strategy does not do so itself; not timed."""
        if self._aside:
            self._normalizer.normalize_()

    def apply(self) -> None:
        """Does what is left to do before the optimizer's step, which does the rest; timed."""
        if self._threshold is not None:
            nn.utils.clip_grad_norm_(self._network.parameters(), self._threshold)

    def record(self, loss: float, seconds: float) -> Step:
        """Returns the record of the step that was just done."""
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
            # hypot calls infinity with NaN infinity; here NaN is to win.
            norms[layer] = math.nan if math.isnan(norm + norms[layer]) else math.hypot(norms[layer], norm)
        return tuple(norms)


def train(settings: Settings, text: Text, run: Run, after_step: Callable[[Run], None]) -> None:
    """Trains a network under one strategy, and records the run as it goes.

    A loss that is not finite leaves NaN in every parameter, from which nothing recovers: the run stops there.

    Args:
        settings: How to train.
        text: What to train on.
        run: Where to record; new, with the strategy's name.
        after_step: Called with the run after every step.
    """
    network = make_network(settings.network, settings.seed)
    optimizer = torch.optim.SGD(network.parameters(), lr=settings.learning_rate)
    strategy = _Strategy(run, network, optimizer)
    run.layers = strategy.layers
    excerpts = held_out_batch(text)
    every = math.ceil(settings.steps / EVALUATIONS)
    run.held_out.append((0, _held_out_loss(network, excerpts)))
    for number, batch in zip(range(1, settings.steps + 1), batches(text, settings.seed), strict=False):
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


def new_run(settings: Settings, strategy: str) -> Run:
    """Returns the empty record of a run.

    Args:
        settings: How it will be trained.
        strategy: The strategy's name.

    Returns:
        The record.
    """
    return Run(strategy, threshold_of(strategy, settings.threshold))


def _step(network: ByteNetwork, optimizer: torch.optim.Optimizer, strategy: _Strategy, batch: Tensor) -> Step:
    started = perf_counter()
    optimizer.zero_grad()
    loss = network.loss(batch)
    loss.backward()  # type: ignore[no-untyped-call]
    to_gradients = perf_counter() - started
    strategy.measure_aside()
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
