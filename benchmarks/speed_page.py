"""Formats the measurements as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

from speed_measure import Growth, Measured
from speed_sharded import PROCESSES, FirstCall, Sharded
from speed_start import FirstStep
from speed_steps import Share
from speed_tools import FOREACH, LOOP, PER_LAYER, PLAIN, READ, WHOLE

__all__ = ["Results", "page", "tables"]

# Targets with nothing clipped: at least how many times as fast as torch's loop and its global clip, clipping per layer,
# and at most how many times as long as the floor.
_AIMS: dict[str, dict[str, float]] = {
    "GPT-2 124M": {WHOLE: 2.5, READ: 1.25},
    "ResNet-50": {WHOLE: 2.5, READ: 1.25},
    "1000 x Linear(64, 64)": {LOOP: 20, WHOLE: 5},
}
# The plain backend, which needs no Numba, takes at most this many times as long as torch's global clip on this model.
_PLAIN_MODEL, _PLAIN_AIM = "GPT-2 124M", 2.0
# With few layers, where all of the time is overhead, tamegrad is no slower than torch's global clip.
_FEW_LAYERS = 10
# Compiling for float32 takes at most this many seconds, what measures and what changes gradients together.
_COMPILE_SECONDS = 5.0
# The same for sharded models with this many layers, and the limit of a first call in seconds.
_SHARDED_LAYERS, _SHARDED_AIMS, _FIRST_SECONDS = 100, {LOOP: 15, WHOLE: 1}, 1.0
_KEPT = "yes"
_MISSED = "**no**"


@dataclass(frozen=True)
class Results:
    """What was measured.

    Args:
        measured: On each model.
        growth: With growing numbers of layers.
        shares: Of training steps.
        sharded: On sharded models.
        first_calls: On the first call there.
        first_steps: On the first steps of a process.
    """

    measured: Sequence[Measured]
    growth: Growth
    shares: Sequence[Share]
    sharded: Sequence[Sharded]
    first_calls: Sequence[FirstCall]
    first_steps: Sequence[FirstStep]


def tables(results: Results) -> str:
    """Formats all measurements.

    Args:
        results: The measurements.

    Returns:
        Markdown sections.
    """
    sections = {
        "Targets and results": _aims(results),
        "Where tamegrad is slower": _losses(results.measured, results.sharded),
        **{f"{case.name}: {case.size}": _case(case) for case in results.measured},
        "Growing numbers of layers": _growth(results.growth),
        "The first steps of a process": _first_steps(results.first_steps),
        "Share of a training step": _shares(results.shares),
        "Sharded models": _sharded(results.sharded, results.first_calls),
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


def _aims(results: Results) -> str:
    rows = [row for case in results.measured for row in _aims_of(case)]
    if (few := results.growth.times.get(_FEW_LAYERS)) is not None:
        ratio, fastest = few.ratio(WHOLE, PER_LAYER), few.ratio_of_fastest(WHOLE, PER_LAYER)
        said = f"nothing clipped: never slower than {WHOLE}"
        rows.append([f"{_FEW_LAYERS} x Linear(64, 64)", said, _times(ratio), _times(fastest), _said(kept=ratio >= 1)])
    for row in results.sharded:
        if row.layers == _SHARDED_LAYERS and row.tool in _SHARDED_AIMS and not row.problem:
            aim = _SHARDED_AIMS[row.tool]
            said = f"nothing clipped: at least {aim:g}x as fast as {row.tool}"
            model = f"{row.layers} layers, {row.mesh}"
            rows.append([model, said, _times(row.ratio), _times(row.fastest), _said(kept=row.ratio >= aim)])
    for call in results.first_calls:
        if call.tool == PER_LAYER:
            said = f"the first call takes less than {_FIRST_SECONDS:g} s"
            in_time = _said(kept=call.seconds < _FIRST_SECONDS)
            rows.append([f"{call.tensors:,} sharded tensors", said, f"{call.seconds:.2f} s", "", in_time])
    compiling = sum(step.seconds for step in results.first_steps if step.is_cold)
    said = f"the first steps, compiling included, take at most {_COMPILE_SECONDS:g} s"
    rows.append(["10 x Linear(8, 8)", said, f"{compiling:.1f} s", "", _said(kept=compiling <= _COMPILE_SECONDS)])
    return _table(["model", f"target for {PER_LAYER}", "measured", "in the fastest rounds", "met"], rows)


def _aims_of(case: Measured) -> list[list[str]]:
    rows = []
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
    if case.name == _PLAIN_MODEL:
        for what, times, _ in case.both():
            ratio, fastest = times.ratio(PLAIN, WHOLE), times.ratio_of_fastest(PLAIN, WHOLE)
            said = f"{what}: without Numba at most {_PLAIN_AIM:g}x the time of {WHOLE}"
            rows.append([case.name, said, _times(ratio), _times(fastest), _said(kept=ratio <= _PLAIN_AIM)])
    return rows


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


def _first_steps(steps: Sequence[FirstStep]) -> str:
    rows = [[step.what, "empty" if step.is_cold else "filled", f"{step.seconds:.2f}"] for step in steps]
    return _table(["a float32 model of 10 layers", "cache of compiled code", "s"], rows)


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

All scales are logarithmic: read the numbers at the bars, not their lengths.

{pictures}

{text}

## What limits the speed

- With 1,000 small layers, one thread has to ask 2,000 gradients for their addresses, sizes, dtypes and layouts before
  it can measure any. With cold caches a question takes one or two hundred microseconds, and reading all values less
  than one millisecond.
- That is slower than it was. Until commit ab9bc07, compiled code walked over Python's own objects by address while
  other threads measured: 1.4 ms for this model, 15 times as fast as torch's global clip. It was given up because a
  copied normalizer changed the gradients of another model that way, and an unpickled one crashed the process. Nothing
  is kept now that a copy, a pickle or another thread could make stale, and every gradient is asked in every step.
- With few layers nearly all of the time is the overhead of calls to NumPy and PyTorch, in tamegrad as in torch.
- After a backward pass, the first access to a gradient, by clipping or the optimizer, makes PyTorch create a Python
  object for it. The gradients timed here already have theirs, for every tool; those in "Share of a training step" do
  not.
- `ClipValue` must know that every value is finite before it changes any, so it reads before it writes.
  `clip_grad_value_` writes at once, whatever the values, and is faster in some runs in which everything is clipped.
- The first call loads Numba; the row "Numba loaded before" shows the rest of its time. The first step ever also
  compiles, which the logger `tamegrad` reports; the result is cached on disk.

## What was not measured

GPUs: none was available. Counted on PyTorch's meta device, a step of `backend="foreach"` launches at most 120
operations for GPT-2 124M and 100 for 1,000 small layers, never makes the host wait, and adds up without atomics; under
`on_nonfinite="zero"` each large tensor takes one launch more. `backend="gpu"` takes four launches in Triton's
interpreter and compiles for sm_80, sm_90 and gfx942. How fast they are, and whether a CUDA graph can capture them, is
not known yet: `make gpu` finds out, and writes the page.

Apple's MPS has no float64. There `backend="foreach"`, which `auto` takes, measures in float32 after a multiplication by
a power of two: norms are right to 1e-6, and the host reads them in every step. Tested on the CPU as if it had none
either, not on a Mac.

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
