"""Formats the measurements as Markdown."""

from collections.abc import Sequence

from speed_measure import Growth, Measured
from speed_sharded import PROCESSES, FirstCall, Sharded
from speed_steps import Share
from speed_tools import FOREACH, LOOP, PER_LAYER, READ, WHOLE

__all__ = ["page", "tables"]

# Targets with nothing clipped: at least how many times as fast as torch's loop and its global clip, clipping per layer,
# and at most how many times as long as the floor.
_AIMS: dict[str, dict[str, float]] = {
    "GPT-2 124M": {LOOP: 2, WHOLE: 2, READ: 1.3},
    "ResNet-50": {LOOP: 3, WHOLE: 2, READ: 1.5},
    "1000 x Linear(64, 64)": {LOOP: 48, WHOLE: 12},
}
# The same for sharded models with this many layers, and the limit of a first call in seconds.
_SHARDED_LAYERS, _SHARDED_AIMS, _FIRST_SECONDS = 100, {LOOP: 15, WHOLE: 1}, 1.0
_KEPT = "yes"
_MISSED = "**no**"


def tables(
    measured: Sequence[Measured],
    growth: Growth,
    shares: Sequence[Share],
    sharded: Sequence[Sharded],
    first_calls: Sequence[FirstCall],
) -> str:
    """Formats all measurements.

    Args:
        measured: The times on each model.
        growth: The times with growing numbers of layers.
        shares: The shares of training steps.
        sharded: The times on sharded models.
        first_calls: The times of the first call on a sharded model.

    Returns:
        Markdown sections.
    """
    sections = {
        "Targets and results": _aims(measured, sharded, first_calls),
        "Where tamegrad is slower": _losses(measured, sharded),
        **{f"{case.name}: {case.size}": _case(case) for case in measured},
        "Growing numbers of layers": _growth(growth),
        "Share of a training step": _shares(shares),
        "Sharded models": _sharded(sharded, first_calls),
    }
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _case(case: Measured) -> str:
    head = ["tool"]
    for what, *_ in case.both():
        head += [f"{what}, ms", "x floor", "x tamegrad"]
    rows = []
    for tool in case.nothing.tools:
        row = [tool.name]
        for _, times, floor in case.both():
            beside = ""
            if tool.rival is not None:
                ratio = times.ratio(tool.name, tool.rival)
                beside = _beside(ratio)
            row += [f"{1e3 * times.median(tool.name):.2f}", f"{times.ratio(tool.name, floor):.2f}", beside]
        rows.append(row)
    rounds = " and ".join(str(len(times.seconds)) for _, times, _ in case.both())
    return f"{_table(head, rows)}\n\nMedians of {rounds} rounds."


def _beside(ratio: float) -> str:
    return f"**{ratio:.2f}**" if ratio < 1 else f"{ratio:.2f}"


def _losses(measured: Sequence[Measured], sharded: Sequence[Sharded]) -> str:
    lines = [
        f"- {case.name}, {what}: {tool.name} takes {ratio:.2f}x the time of {tool.rival}."
        for case in measured
        for what, times, _ in case.both()
        for tool in times.tools
        if tool.rival is not None and (ratio := times.ratio(tool.name, tool.rival)) < 1
    ]
    lines += [
        f"- {row.mesh}, {row.layers} layers: {row.tool} takes {row.ratio:.2f}x the time of {PER_LAYER}."
        for row in sharded
        if row.ratio < 1
    ]
    return "\n".join(lines) or "Nowhere in these tables."


def _aims(measured: Sequence[Measured], sharded: Sequence[Sharded], first_calls: Sequence[FirstCall]) -> str:
    rows = []
    for case in measured:
        for other, aim in _AIMS.get(case.name, {}).items():
            pair = (PER_LAYER, other) if other == READ else (other, PER_LAYER)
            ratio, fastest = case.nothing.ratio(*pair), case.nothing.ratio_of_fastest(*pair)
            kept = ratio <= aim if other == READ else ratio >= aim
            said = f"at most {aim:g}x the floor" if other == READ else f"at least {aim:g}x as fast as {other}"
            rows.append([case.name, f"nothing clipped: {said}", _times(ratio), _times(fastest), _said(kept=kept)])
        for other in (WHOLE, FOREACH):
            ratio = case.everything.ratio(other, PER_LAYER)
            fastest = case.everything.ratio_of_fastest(other, PER_LAYER)
            said = f"everything clipped: never slower than {other}"
            rows.append([case.name, said, _times(ratio), _times(fastest), _said(kept=ratio >= 1)])
    for row in sharded:
        if row.layers == _SHARDED_LAYERS and row.tool in _SHARDED_AIMS and not row.problem:
            aim = _SHARDED_AIMS[row.tool]
            said = f"nothing clipped: at least {aim:g}x as fast as {row.tool}"
            model = f"{row.layers} layers, {row.mesh}"
            rows.append([model, said, _times(row.ratio), _times(row.fastest), _said(kept=row.ratio >= aim)])
    for call in first_calls:
        if call.tool == PER_LAYER:
            said = f"the first call takes less than {_FIRST_SECONDS:g} s"
            in_time = _said(kept=call.seconds < _FIRST_SECONDS)
            rows.append([f"{call.tensors:,} sharded tensors", said, f"{call.seconds:.2f} s", "", in_time])
    return _table(["model", f"target for {PER_LAYER}", "measured", "in the fastest rounds", "met"], rows)


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x"


def _said(*, kept: bool) -> str:
    return _KEPT if kept else _MISSED


def _growth(growth: Growth) -> str:
    names = dict.fromkeys(tool.name for times in growth.times.values() for tool in times.tools)
    rows = [
        [name, *(f"{1e3 * times.median(name):.3f}" if name in times else "" for times in growth.times.values())]
        for name in names
    ]
    table = _table(["ms, nothing clipped", *(f"{count:,} layers" for count in growth.times)], rows)
    return f"Layers of Linear(64, 64).\n\n{table}"


def _shares(shares: Sequence[Share]) -> str:
    rows = [
        [share.model, share.tool, _clips(share), f"{1e3 * share.seconds:.2f}", f"{share.share:.2%}"] for share in shares
    ]
    return _table(["model", "tool", "clipped", "clipping, ms", "share of the step"], rows)


def _clips(share: Share) -> str:
    return "everything" if share.clips else "nothing"


def _sharded(sharded: Sequence[Sharded], first_calls: Sequence[FirstCall]) -> str:
    head = ["mesh", "layers", "tool", "collectives", "ms", "x tamegrad"]
    rows = [
        [
            row.mesh,
            str(row.layers),
            row.tool,
            "" if row.problem else str(row.collectives),
            f"raises {row.problem}" if row.problem else f"{1e3 * row.seconds:.2f}",
            "" if row.problem or row.tool == PER_LAYER else _beside(row.ratio),
        ]
        for row in sharded
    ]
    calls = [[call.tool, f"{call.tensors:,}", f"{call.seconds:.2f}"] for call in first_calls]
    return _SHARDED.format(
        processes=PROCESSES, table=_table(head, rows), calls=_table(["first call", "sharded tensors", "s"], calls)
    )


_SHARDED = """\
Layers of Linear(64, 64) over {processes} processes on one machine, nothing clipped. On the 1-D mesh every tensor is
sharded as in FSDP2; the 2-D mesh adds tensor parallelism, with each bias replicated along one of the dimensions.

{table}

{calls}"""


def page(text: str, made: str, missing: Sequence[str], pictures: Sequence[tuple[str, str]]) -> str:
    """Formats the documentation page.

    Args:
        text: The tables.
        made: When, on what machine and with which versions the benchmark ran.
        missing: The libraries that were left out, one line each.
        pictures: The file name and the description of each picture.

    Returns:
        Markdown.
    """
    drawn = "\n\n".join(f"![{shows}](pictures/{name})" for name, shows in pictures)
    return _PAGE.format(text=text, made=made, missing="".join(f"\n{line}.\n" for line in missing), pictures=drawn)


_PAGE = """\
# Speed

How long clipping takes on the CPU: tamegrad, torch, optax and smartclip side by side, on the shapes of real models. The
floor is what none of them can avoid: reading every gradient once and, if something is clipped, reading and writing it
once more.

Generated by `make bench` on {made}.
{missing}
Read the ratios, which compare runs from the same minutes, not the milliseconds, which depend on this machine and its
load. A load average above the number of cores means that something else was running; torch's threads, which synchronize
in every operation, then lose more than their share, and the ratios flatter tamegrad.

{pictures}

{text}

## What limits the speed

- With 1,000 small layers, one thread has to ask 2,000 gradients for their addresses, sizes and dtypes, at about a
  hundred microseconds a question, before it can measure any. The rest is code that runs once a step with cold caches.
- After a backward pass, the first access to a gradient, by clipping or the optimizer, makes PyTorch create a Python
  object for it. The gradients timed here already have theirs, for every tool; those in "Share of a training step" do
  not.
- `ClipValue` must know that every value is finite before it changes any, so it reads before it writes.
  `clip_grad_value_` writes at once, whatever the values, and is faster in some runs in which everything is clipped.
- The first call loads Numba; the row "Numba loaded before" shows the rest of its time.

## What was not measured

GPUs: none was available. `backend="gpu"` takes four launches a step in Triton's interpreter and compiles for sm_80,
sm_90 and gfx942; its speed, and whether a CUDA graph can capture it, are not known yet.

## How it was measured

- The tools take turns on the same gradients, in a different order each round, so that none always follows the same
  other one. Times are medians over all rounds, ratios medians of the ratios within each round. Before each turn,
  outside the timing, the gradients are rewritten, as the backward pass does right before a step, so that no tool
  benefits from what another left in the CPU cache. Each tool first has one warm-up run.
- **x floor** is a tool's time divided by the floor's: with nothing clipped one read (`sum` of the flat values), with
  everything clipped a read, then a read and write (`mul_`). **x tamegrad** is a tool's time divided by that of its
  equivalent in tamegrad; below 1, in bold, tamegrad is slower.
- **in the fastest rounds** compares the fastest round of each tool, which a busy machine affects least. The median
  decides whether a target is met.
- The threshold is 1e9 to clip nothing and 1e-6 to clip everything; the gradients are float32, normally distributed with
  a standard deviation of 0.01. Collecting the gradients is part of the time, for every tool.
- tamegrad is called as `GradientNormalizer(model, strategy).normalize_()`, with the normalizer made once. The row
  "report read" also reads the norms and the total norm in every step.
- optax runs under `jax.jit`, already compiled, and with its input donated. Inside a jitted training step it would be
  fused with the operations around it, which this does not show.
- smartclip's thresholds follow the norms it has seen; it was first shown one norm far below or above all others. It
  looks up the layer of every parameter again in every step. A tool that takes over a second is timed in one round only.
- With 10,000 layers optax and smartclip are left out: compiling takes minutes, and a step minutes.
- Sharded models run in processes with one thread each, over gloo on loopback, which has less bandwidth and more
  latency than a cluster's network; there are more processes than cores. The times are those of the first process. The
  first call runs in new processes, one per core, and includes everything that is imported or read from disk; for
  tamegrad it includes making the normalizer, but its loops were compiled before. Most of it is loading Numba, which
  takes longer if SciPy is installed, as it is here for jax.
- A training step is `zero_grad`, forward, backward, clipping and AdamW, so that every gradient is a new tensor in every
  step. The tools take turns here too.
"""
