"""Lays out what was measured, as Markdown."""

from collections.abc import Sequence

from speed_measure import Growth, Measured
from speed_sharded import PROCESSES, FirstCall, Sharded
from speed_steps import Share
from speed_tools import FOREACH, LOOP, PER_LAYER, READ, WHOLE

__all__ = ["page", "tables"]

# What we aim at with nothing clipped: how many times as fast, per layer, as torch's loop and as its global clip, and
# at most how many times as long as the floor.
_AIMS: dict[str, dict[str, float]] = {
    "GPT-2 124M": {LOOP: 2, WHOLE: 2, READ: 1.3},
    "ResNet-50": {LOOP: 3, WHOLE: 2, READ: 1.5},
    "1000 x Linear(64, 64)": {LOOP: 48, WHOLE: 12},
}
# The same for sharded models of so many layers, and the seconds that a first call may take.
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
    """Lays everything out.

    Args:
        measured: What was measured on each model.
        growth: With growing numbers of layers.
        shares: Of training steps.
        sharded: On sharded models.
        first_calls: On the first call there.

    Returns:
        Markdown sections.
    """
    sections = {
        "What we aim at, and what was measured": _aims(measured, sharded, first_calls),
        "Where tamegrad loses": _losses(measured, sharded),
        **{f"{case.name}: {case.size}": _case(case) for case in measured},
        "More and more layers": _growth(growth),
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
        f"- {case.name}, {what}: {tool.name} takes {ratio:.2f} of the time of {tool.rival}."
        for case in measured
        for what, times, _ in case.both()
        for tool in times.tools
        if tool.rival is not None and (ratio := times.ratio(tool.name, tool.rival)) < 1
    ]
    lines += [
        f"- {row.mesh}, {row.layers} layers: {row.tool} takes {row.ratio:.2f} of the time of {PER_LAYER}."
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
    return _table(["model", f"what we aim at for {PER_LAYER}", "measured", "in the fastest rounds", "kept"], rows)


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
Layers of Linear(64, 64) over {processes} processes of one machine, nothing clipped. On the 1-D mesh every tensor is
sharded as FSDP2 does it, on the 2-D mesh as with tensor parallelism on top, where each bias is copied along one of the
dimensions.

{table}

{calls}"""


def page(text: str, made: str, missing: Sequence[str], pictures: Sequence[tuple[str, str]]) -> str:
    """Writes the page of the documentation.

    Args:
        text: The tables.
        made: Where, when and with what was measured.
        missing: What was left out, one line each.
        pictures: The file name of each picture, and what it shows.

    Returns:
        Markdown.
    """
    drawn = "\n\n".join(f"![{shows}](pictures/{name})" for name, shows in pictures)
    return _PAGE.format(text=text, made=made, missing="".join(f"\n{line}.\n" for line in missing), pictures=drawn)


_PAGE = """\
# Speed

How long clipping takes on the CPU: tamegrad, torch, optax and smartclip side by side, on the shapes of real models,
and the floor under all of them, which is reading every gradient once and, where something is clipped, reading and
writing it once more.

Made by `make bench` on {made}.
{missing}
Read the ratios, which compare what ran in the same minutes, and not the milliseconds: they are of this machine, and of
what else ran on it. A load average above the number of cores means that something did; torch's threads, which wait for
each other in every operation, then lose more than their share, and the ratios flatter tamegrad.

{pictures}

{text}

## What stands in the way

- Of 1,000 small layers every gradient is an object of Python that has to be found in memory, through three pointers, by
  the one thread that may; the other measures meanwhile what was found, as fast as one core can read. What comes before
  and after is code that runs once a step with cold caches.
- After a backward pass whatever first asks for a gradient, clipping or the optimizer, has PyTorch make an object of
  Python for it. The gradients timed here have theirs already, for every tool; those in "Share of a training step" have
  not.
- `ClipValue` has to know that every value is finite before it changes one, so it reads before it writes.
  `clip_grad_value_` writes at once, whatever it finds, and where everything is cut it comes out ahead in some runs.
- The first call loads Numba; what it does for the model itself is in the line "Numba loaded before".

## What was not measured

GPUs: none was at hand. `backend="gpu"` makes four launches a step in Triton's interpreter and compiles for sm_80, sm_90
and gfx942; how long it takes, and whether a CUDA graph captures it, nobody has seen yet.

## How it was measured

- The tools take turns on the same gradients, in every round in another order, so that none always comes after the same
  other; the times are medians of all rounds, the ratios medians of the ratios within each round. Before each turn, out
  of time, the gradients are written anew, as backward does right before a step, so that no tool finds what another has
  left in the cache. One run of each before does not count.
- **x floor** is how many times as long as the floor a tool takes; with nothing clipped that is one read (`sum` of the
  values laid flat), with everything clipped a read, then a read and write (`mul_`). **x tamegrad** is how many times as
  long a tool takes as what tamegrad does that means the same; under 1, in bold, tamegrad loses.
- **in the fastest rounds** compares the fastest round of each tool, which a busy machine disturbs least. Whether an aim
  is kept is said by the median.
- Clipping nothing takes a threshold of 1e9, clipping everything one of 1e-6; the gradients are float32, normally
  distributed with a standard deviation of 0.01. Collecting the gradients is part of the time, for every tool.
- tamegrad is called as `GradientNormalizer(model, strategy).normalize_()`, made once. Each tensor of its report is made
  when it is first read; the line "report read" reads the norms and the total norm in every step.
- optax runs under `jax.jit`, compiled before, and may write its result over its input. Inside a jitted training step
  it would be fused with what is around it, which this does not show.
- smartclip's thresholds follow the norms it saw; it was first shown one norm far below or above all others. It looks
  up the layer of every parameter anew in every step. A tool that takes over a second is timed in one round alone.
- With 10,000 layers optax and smartclip are left out: compiling takes minutes, and a step minutes.
- The processes of sharded models have one thread each and talk over gloo on loopback, which is slower and starts
  slower than a cluster's network, and the cores are fewer than the processes. What the first process takes is shown.
  The first call is in new processes, one a core, with everything that is imported or read from the disk then; for
  tamegrad making the normalizer counts, and its loops were compiled before. Most of it is loading Numba, which takes
  longer where SciPy is installed, as it is here for jax.
- The training steps are forward, backward, clipping and AdamW, with `zero_grad` before, so that every gradient is a new
  tensor in every step. The tools take turns here too.
"""
