"""What a comparison can tell: which strategies ended lowest, and which of them are too close to rank."""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tamegrad.study.train import Run

__all__ = ["MARGIN", "Verdict", "judge"]

# Nats per byte. One run of each strategy cannot show how much the next would differ. With the defaults and seeds 0 to
# 9, the difference in final loss between two strategies that learned had a standard deviation over the seeds of 0.014
# to 0.029, depending on the two; this is twice the largest.
MARGIN = 0.06

# The two-sided 95% points of Student's t distribution, for 1 to 10 degrees of freedom; more make it hardly smaller.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a comparison can tell.

    Args:
        recommended: The one strategy that ended lowest, if the seeds are enough to rank it first.
        together: The strategies that ended lowest and are too close to rank, lowest first.
        sentence: All of this for people to read, on one line.
    """

    recommended: str | None
    together: tuple[str, ...]
    sentence: str


def judge(runs: Sequence[Run]) -> Verdict:
    """Finds the strategies that ended with the lowest held-out loss, of those that learned with every seed.

    Two strategies are compared over the same seeds: with several seeds, one is ahead if the mean of the differences,
    seed by seed, is above its 95% uncertainty (a paired t-test). With one seed no strategy is recommended.

    Args:
        runs: The runs of the comparison, as far as they got.

    Returns:
        The verdict.
    """
    outcomes = _outcomes(runs)
    learned = sorted((outcome for outcome in outcomes if outcome.learned), key=lambda outcome: outcome.loss)
    if not outcomes:
        return Verdict(None, (), "No strategy can be recommended: no run was completed.")
    if not learned:
        diverged = any(outcome.diverged for outcome in outcomes)
        advice = "a smaller --lr or --threshold" if diverged else "a larger --lr or more --steps"
        return Verdict(None, (), f"No strategy can be recommended: none learned. Try {advice}.")
    best = learned[0]
    together = [best, *(outcome for outcome in learned[1:] if not best.is_ahead_of(outcome))]
    others = [outcome for outcome in learned if outcome not in together]
    recommended = best.name if best.seeds > 1 and len(together) == 1 else None
    sentences = (
        _lowest(together, others),
        *_diverged_along_the_way(together, others),
        *_did_not_learn(outcomes),
        *_advice(best.seeds, together),
    )
    return Verdict(recommended, tuple(outcome.name for outcome in together), " ".join(sentences))


@dataclass(frozen=True, slots=True)
class _Outcome:
    """The runs of one strategy, in the order of the seeds."""

    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        return self.runs[0].strategy

    @property
    def seeds(self) -> int:
        return len(self.runs)

    @property
    def learned(self) -> bool:
        return all(run.learned for run in self.runs)

    @property
    def diverged(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.diverged_at is not None)

    @property
    def loss(self) -> float:
        return statistics.fmean(run.final_loss for run in self.runs)

    def __str__(self) -> str:
        return f"{self.name} ({self.loss:.3f})"

    def lead_over(self, other: "_Outcome") -> tuple[float, float]:
        """Returns by how much this one ended lower, and how much of that may be chance."""
        leads = [theirs.final_loss - own.final_loss for own, theirs in zip(self.runs, other.runs, strict=True)]
        if len(leads) == 1:
            return leads[0], MARGIN
        t = T_95[min(len(leads) - 1, len(T_95)) - 1]
        return statistics.fmean(leads), t * statistics.stdev(leads) / math.sqrt(len(leads))

    def is_ahead_of(self, other: "_Outcome") -> bool:
        lead, chance = self.lead_over(other)
        return lead > chance

    def divergences(self) -> str:
        """Returns which of its runs diverged, for people to read."""
        if self.seeds == 1:
            return f"{self.name} (at step {self.diverged[0].diverged_at})"
        return f"{self.name} (with {len(self.diverged)} of {self.seeds} seeds)"


def _outcomes(runs: Iterable[Run]) -> list[_Outcome]:
    """Collects the runs by strategy, for the seeds with which all of these strategies ended."""
    ended: dict[str, dict[int, Run]] = {}
    for run in runs:
        if run.ended != "interrupted":
            ended.setdefault(run.strategy, {})[run.seed] = run
    if not ended:
        return []
    seeds = sorted(set.intersection(*(set(of_seed) for of_seed in ended.values())))
    return [_Outcome(tuple(of_seed[seed] for seed in seeds)) for of_seed in ended.values()]


def _lowest(together: Sequence[_Outcome], others: Sequence[_Outcome]) -> str:
    best = together[0]
    if len(together) > 1:
        names = f"{', '.join(map(str, together[:-1]))} and {together[-1]}"
        if best.seeds == 1:
            return (
                f"One seed is not enough to rank {names}: they ended within {MARGIN} nats of the lowest held-out loss."
            )
        return f"{best.seeds} seeds are not enough to rank {names}, the lowest mean held-out losses."
    if best.seeds == 1:
        lead = f", {best.lead_over(others[0])[0]:.3f} below the next, {others[0].name}" if others else ""
        return f"{best.name} ended with the lowest held-out loss, {best.loss:.3f}{lead}; that is one seed."
    threshold = best.runs[0].threshold
    setting = "" if threshold is None else f" (threshold {threshold:g})"
    lead = ""
    if others:
        ahead, chance = best.lead_over(others[0])
        lead = f", {ahead:.3f} ± {chance:.3f} below the next, {others[0].name}"
    return f"Use {best.name}{setting}: mean held-out loss {best.loss:.3f} over {best.seeds} seeds{lead}."


def _diverged_along_the_way(together: Sequence[_Outcome], others: Sequence[_Outcome]) -> Iterator[str]:
    diverged = [outcome for outcome in together if outcome.diverged]
    if diverged:
        yield f"Diverged along the way, but recovered: {', '.join(one.divergences() for one in diverged)}."
    steady = next((outcome for outcome in others if not outcome.diverged), None)
    if len(diverged) == len(together) and steady is not None:
        yield f"The lowest that never diverged: {steady}."


def _did_not_learn(outcomes: Sequence[_Outcome]) -> Iterator[str]:
    failed = [outcome for outcome in outcomes if not outcome.learned]
    diverged = [outcome.divergences() for outcome in failed if outcome.diverged]
    if diverged:
        yield f"Diverged: {', '.join(diverged)}."
    still = [outcome.name for outcome in failed if not outcome.diverged]
    if still:
        yield f"Learned nothing{'' if failed[0].seeds == 1 else ' with some seed'}: {', '.join(still)}."


def _advice(seeds: int, together: Sequence[_Outcome]) -> Iterator[str]:
    if seeds == 1:
        yield "Pass --seeds 5 to compare over five seeds."
    elif len(together) > 1:
        yield "Try more --seeds."
