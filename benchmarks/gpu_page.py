"""Formats what the GPU check found: a short table for the terminal, and the documentation page."""

import datetime as dt
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from gpu_names import TITLES

__all__ = ["page", "table"]

Record: TypeAlias = dict[str, Any]

NOTHING, EVERYTHING = "nothing clipped", "everything clipped"
GLOBAL, LOOP, BY_VALUE = "torch clip_grad_norm_", "torch loop over layers", "torch clip_grad_value_"
ABOUT = """One run on one machine; times are medians. The floor is one read of all gradients, and where everything is
clipped a read, then a read and write. GPU time is between two events, behind a kernel that waits, so that launches do
not count; host time is what a call takes to return."""
# What Triton's kernels are to reach: times the floor, and against torch's global clip.
FLOOR, SMALL_LAYERS = 1.15, 5.0


def table(outcomes: Sequence[Any]) -> str:
    """Returns a table of what was found, for the terminal.

    Args:
        outcomes: What `gpu.Outcome` holds, one a section.
    """
    return "\n".join(_lines(outcomes))


def page(outcomes: Sequence[Any]) -> str:
    """Returns the documentation page.

    Args:
        outcomes: As in `table`.
    """
    env = next((record for record in _of(outcomes, "env")), {})
    today = dt.datetime.now(tz=dt.UTC).date()
    died = [f"- `{one.section}`: {one.ended}" for one in outcomes if one.ended != "ok"]
    losing = [f"- {line}" for line in _missed(outcomes)] or ["None."]
    device = f"{env.get('device', 'an unknown device')}, PyTorch {env.get('torch')}, Triton {env.get('triton')}"
    lines = [
        "# Speed on a GPU",
        "",
        f"Measured with `make gpu` on {today:%Y-%m-%d}: {device}, Python {env.get('python')}.",
        ABOUT,
        "",
        "## Where it loses",
        "",
        *losing,
        "",
        "## What was found",
        "",
        "```",
        *_lines(outcomes),
        "```",
        "",
    ]
    return "\n".join([*lines, *(["## What did not end", "", *died, ""] if died else [])])


def _of(outcomes: Sequence[Any], kind: str) -> list[Record]:
    return [record for outcome in outcomes for record in outcome.records if record["kind"] == kind]


def _lines(outcomes: Sequence[Any]) -> Iterator[str]:
    for env in _of(outcomes, "env"):
        yield (
            f"{env['device']}, torch {env['torch']}, triton {env['triton']}, python {env['python']}, "
            f"copies {env['copy_gbs']:.0f} GB/s"
        )
        yield f"auto takes {env['auto']}"
    yield from _correctness(outcomes)
    if rows := _of(outcomes, "launches"):
        yield "\nlaunches of a step, and copies"
        yield from (f"  {r['tool']:24}{r['model']:10}{r['kernels']} {r.get('copies', '')}" for r in rows)
    for model in TITLES:
        yield from _times(outcomes, model)
    if rows := _of(outcomes, "train"):
        plain = next((r["ms"] for r in rows if r["tool"] == "nothing"), None)
        yield "\na training step of GPT-2 124M"
        for r in rows:
            share = f"  {100 * (r['ms'] / plain - 1):+.1f}%" if plain and r["ms"] else ""
            yield f"  {r['tool']:38}{_ms(r['ms'])} ms{share}"
    for outcome in outcomes:
        if outcome.ended != "ok":
            last = (outcome.log.strip().splitlines() or [""])[-1]
            yield f"\n{outcome.section} did not end: {outcome.ended}; {last[:150]}"


def _correctness(outcomes: Sequence[Any]) -> Iterator[str]:
    yield "\ncorrectness         cases failed  first failure"
    for r in _of(outcomes, "correct"):
        yield f"  {r['backend']:8}{r['dtype']:10}{r['cases']:5}{r['failed']:7}  {(r['first'] or [''])[0][:110]}"
    checks = _of(outcomes, "check")
    for topic, backend in dict.fromkeys((r["topic"], r["backend"]) for r in checks):
        rows = [r for r in checks if (r["topic"], r["backend"]) == (topic, backend)]
        bad = [r for r in rows if r["result"] != "ok"]
        yield f"{topic}, {backend}: {len(rows) - len(bad)} of {len(rows)} ok"
        yield from (f"  {r['what']}: {r['result'][:130]}" for r in bad[:3])


def _times(outcomes: Sequence[Any], model: str) -> Iterator[str]:
    subject = next((r for r in _of(outcomes, "subject") if r["model"] == model), None)
    if subject is None:
        return
    rows = [r for r in _of(outcomes, "time") if r["model"] == model]
    yield f"\n{TITLES[model]}: {subject['tensors']:,} tensors, {subject['bytes'] / 1e6:,.0f} MB; milliseconds"
    floor = f"  {'floor':38}GPU {_ms(subject['read'])}{'':14}GPU {_ms(subject['read'] + subject['write'])}"
    yield f"  {'':38}{NOTHING:24}{EVERYTHING:24}extra memory"
    yield floor
    for tool in dict.fromkeys(r["tool"] for r in rows):
        found = {r["share"]: r for r in rows if r["tool"] == tool}
        cells = []
        for share in (NOTHING, EVERYTHING):
            r = found.get(share, {"error": "-"})
            text = r["error"][:20] if "error" in r else f"GPU {_ms(r['gpu'])} host {_ms(r['host'])}"
            cells.append(f"{text:26}")
        peak = max((r.get("peak", 0) for r in found.values()), default=0)
        yield f"  {tool:36}{''.join(cells)}{100 * peak / subject['bytes']:8.1f}%"


def _ms(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds:.3f}"


def _missed(outcomes: Sequence[Any]) -> Iterator[str]:
    """Yields where a backend is wrong, or slower than it should be."""
    for r in _of(outcomes, "correct"):
        if r["failed"]:
            yield f"`{r['backend']}` is wrong in {r['failed']} of {r['cases']} cases of {r['dtype']}."
    for r in _of(outcomes, "check"):
        if r["result"] != "ok":
            yield f"`{r['backend']}`, {r['topic']}, {r['what']}: {r['result'][:200]}"
    subjects = {r["model"]: r for r in _of(outcomes, "subject")}
    times = {(r["model"], r["share"], r["tool"]): r for r in _of(outcomes, "time")}
    for (model, share, tool), r in times.items():
        where = f"{TITLES[model]}, {share}: `{tool}`"
        if "error" in r:
            yield f"{where} raised or got no time: {r['error'][:150]}"
        elif tool.startswith("tamegrad"):
            other = times.get((model, share, BY_VALUE if "ClipValue" in tool else GLOBAL), {})
            yield from (f"{where} {what}" for what in _losses(r, other, subjects[model]))


def _losses(r: Record, other: Record, subject: Record) -> Iterator[str]:
    """Yields how one time misses what it should be; `other` is that of PyTorch."""
    for clock in ("gpu", "host"):
        if r.get(clock) and other.get(clock) and r[clock] > other[clock]:
            yield f"takes {r[clock] / other[clock]:.2f} times the {clock} time of `{other['tool']}`."
    if r["tool"] == "tamegrad gpu, Clip" and r.get("gpu"):
        floor = subject["read"] + (subject["write"] if r["share"] == EVERYTHING else 0.0)
        if r["model"] in {"gpt2", "xl"} and r["gpu"] > FLOOR * floor:
            yield f"takes {r['gpu'] / floor:.2f} times the floor; the aim is {FLOOR}."
        if r["model"] == "linears" and other.get("gpu") and SMALL_LAYERS * r["gpu"] > other["gpu"]:
            yield f"is {other['gpu'] / r['gpu']:.1f} times as fast as `{GLOBAL}`; the aim is {SMALL_LAYERS:g}."
    if r.get("peak", 0) > subject["bytes"] / 100:
        yield f"takes {100 * r['peak'] / subject['bytes']:.1f}% of the gradients' memory; the aim is 1%."
