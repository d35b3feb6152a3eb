"""Results of Deeplearning4j (`tests/data/dl4j`), and how closely tamegrad must match them; loads no framework.

Arrays come as `{layer name: {parameter: array}}`, the form that `tamegrad.normalize` takes.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tamegrad import GradientNormalization, Policy
from tamegrad.strategies import Strategy

Array: TypeAlias = NDArray[np.inexact[Any]]
Arrays: TypeAlias = dict[str, dict[str, Array]]

DATA = Path(__file__).parent.parent / "data" / "dl4j"
NETWORKS = ("dense", "lstm", "bidirectional", "convolution", "attention", "graph")
TRAINED = ("dense", "lstm")
DTYPES = {"f32": "float32", "f64": "float64"}

# Layers that ignore their own setting: Deeplearning4j builds them without it and gives them the default, as the
# resolved strategies in the manifests show.
IGNORE_OVERRIDES = ("SelfAttentionLayer",)

# The allowed error of a normalized gradient, relative to each value: a strategy multiplies every value by one factor,
# so small values have the same relative error as large ones. In float32 the error is Deeplearning4j's, which sums the
# squares in float32; the worst of all cases is 4e-7, in float64 1e-15. Values that a strategy leaves alone, or cuts
# element by element, have the same bits.
GRADIENT_TOLERANCE = {"float32": 5e-7, "float64": 1e-14}
EXACT = ("None", "ClipElementWiseAbsoluteValue")


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a network, with the strategy that Deeplearning4j resolved for it, and its parameter shapes."""

    key: str
    name: str
    kind: str
    strategy: str
    threshold: float
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Setting:
    """The strategy and threshold that a configuration sets, for all layers or for one."""

    strategy: str
    threshold: float

    @property
    def as_strategy(self) -> Strategy:
        return GradientNormalization(self.strategy)(self.threshold)


@dataclass(frozen=True)
class Entry:
    """One case or run of a manifest."""

    file: str
    id: str
    network: str
    dtype: str
    layers: tuple[Layer, ...]
    default: Setting
    set_by_layer: Mapping[str, Setting]

    @property
    def overrides(self) -> dict[str | type, object]:
        names = (layer.name for layer in self.layers if layer.kind not in IGNORE_OVERRIDES)
        return {name: self.set_by_layer[name].as_strategy for name in names if name in self.set_by_layer}

    @property
    def policy(self) -> Policy:
        return Policy(self.default.as_strategy, overrides=self.overrides)

    @property
    def label(self) -> str:
        """The name of the case in test ids and failures."""
        return f"{Path(self.file).name}-{self.id}"

    def arrays(self, when: str) -> Arrays:
        return {
            layer.name: {kind: load(self.file)[f"{when}/{layer.key}_{kind}"] for kind in layer.shapes}
            for layer in self.layers
        }

    def keys(self, when: str) -> set[str]:
        """The names of the arrays that `arrays` reads from the file."""
        return {f"{when}/{layer.key}_{kind}" for layer in self.layers for kind in layer.shapes}


@dataclass(frozen=True)
class Case(Entry):
    """One strategy, or several, applied once; `fill` names the values of the synthetic gradients in `edges`."""

    before_at: str
    after_at: str
    fill: str

    @property
    def label(self) -> str:
        rule = f"{self.default.strategy}({self.default.threshold:g})" + "+overrides" * bool(self.set_by_layer)
        return super().label if self.fill else f"{super().label}-{rule}-{self.before_at}"

    @property
    def before(self) -> Arrays:
        return self.arrays(self.before_at)

    @property
    def after(self) -> Arrays:
        return self.arrays(self.after_at)


@dataclass(frozen=True)
class Run(Entry):
    """One training run of twenty steps; `updater` is Deeplearning4j's own description of its optimizer."""

    updater: str

    @property
    def score(self) -> NDArray[np.float64]:
        """The loss before each step."""
        return load(self.file)[f"{self.id}/score"].astype(np.float64)

    def after_step(self, step: int) -> Arrays:
        return self.arrays(f"{self.id}/step{step}")


@functools.cache
def load(file: str) -> dict[str, Array]:
    """Reads all arrays of a file; tests share them, so they are read-only."""
    with np.load(DATA / f"{file}.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    for array in arrays.values():
        array.flags.writeable = False
    return arrays


@functools.cache
def manifest(file: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DATA / f"{file}.json").read_text(encoding="utf-8"))
    return loaded


def gradient_cases() -> list[Case]:
    return [case for network in NETWORKS for dtype in DTYPES for case in _cases(f"gradients/{network}-{dtype}")]


def edge_cases() -> list[Case]:
    return [case for dtype in DTYPES for case in _cases(f"gradients/edges-{dtype}")]


def training_runs() -> list[Run]:
    files = [f"training/{network}-{dtype}" for network in TRAINED for dtype in DTYPES]
    return [Run(**_entry(file, raw), updater=raw["updater"]) for file in files for raw in manifest(file)["runs"]]


def _cases(file: str) -> Iterator[Case]:
    for raw in manifest(file)["cases"]:
        if "fill" in raw:  # in the edges all layers have the same setting, repeated in each
            raw = {"default": raw["layers"][0], "set_by_layer": {}, **raw}  # noqa: PLW2901
            before, after = f"{raw['id']}/before", f"{raw['id']}/after"
        else:
            before, after = raw["before"], raw["id"]
        yield Case(**_entry(file, raw), before_at=before, after_at=after, fill=raw.get("fill", ""))


def _entry(file: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    layers = tuple(
        Layer(
            layer["key"],
            layer["name"],
            layer["kind"],
            layer["strategy"],
            layer["threshold"],
            {name.removeprefix(f"{layer['key']}_"): tuple(shape) for name, shape in layer["parameters"].items()},
        )
        for layer in raw["layers"]
    )
    return {
        "file": file,
        "id": raw["id"],
        "network": manifest(file)["network"],
        "dtype": manifest(file)["dtype"],
        "layers": layers,
        "default": (default := Setting(raw["default"]["strategy"], raw["default"]["threshold"])),
        "set_by_layer": {name: _inherited(setting, default) for name, setting in raw["set_by_layer"].items()},
    }


def _inherited(raw: Mapping[str, Any], default: Setting) -> Setting:
    """Resolves a layer's own setting: if strategy or threshold is null, it is inherited, each on its own."""
    strategy, threshold = raw["strategy"], raw["threshold"]
    return Setting(
        default.strategy if strategy is None else strategy, default.threshold if threshold is None else threshold
    )


def same_bits(first: Array, second: Array) -> bool:
    """Returns whether two arrays agree in dtype, shape and every bit, including NaN and the sign of zero."""
    return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()


def relative_error(actual: Array, expected: Array) -> float:
    """Returns the largest relative error of any value.

    NaN equals NaN and infinity itself; if zero, NaN or infinity is expected and missed, the error is infinite.
    """
    wide, wanted = actual.astype(np.float64), expected.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.abs(wide - wanted) / np.abs(wanted)
    same = (wide == wanted) | (np.isnan(wide) & np.isnan(wanted))
    return float(np.max(np.where(same, 0.0, np.nan_to_num(error, nan=np.inf)), initial=0.0))


def assert_gradients_agree(case: Case, door: str, actual: Arrays) -> None:
    """Asserts that gradients match Deeplearning4j's within the tolerance, and to the bit if it left them alone."""
    before, after = case.before, case.after
    assert {layer: list(kinds) for layer, kinds in actual.items()} == {name: list(v) for name, v in after.items()}
    for layer in case.layers:
        for kind, got in actual[layer.name].items():
            where = f"{case.label}, {door}: {layer.name}/{kind} ({layer.strategy}, threshold {layer.threshold:g})"
            expected = after[layer.name][kind]
            assert got.dtype == expected.dtype == case.dtype, f"{where}: {got.dtype}"
            assert got.shape == expected.shape, f"{where}: shape {got.shape}, expected {expected.shape}"
            if layer.strategy in EXACT or same_bits(expected, before[layer.name][kind]):
                assert same_bits(got, expected), f"{where}: not the same bits"
            error = relative_error(got, expected)
            assert error <= GRADIENT_TOLERANCE[case.dtype], f"{where}: relative error {error:.3g}"
