"""Builds configurations and saved models as Deeplearning4j's releases write them."""

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

Json: TypeAlias = dict[str, Any]

MODELS = Path(__file__).parent.parent / "data" / "dl4j" / "models"
FILES = sorted(path.name for path in MODELS.iterdir() if path.name != "expected.json")

_PACKAGES = {
    "Bidirectional": "recurrent.",
    "FrozenLayer": "misc.",
    "FrozenLayerWithBackprop": "misc.",
    "LastTimeStep": "recurrent.",
    "MaskZeroLayer": "util.",
    "TimeDistributed": "recurrent.",
}
WRAPPERS = tuple(_PACKAGES)
NAMES_0_9_1 = {
    "DenseLayer": "dense",
    "OutputLayer": "output",
    "GravesLSTM": "gravesLSTM",
    "ConvolutionLayer": "convolution",
    "ActivationLayer": "activation",
    "SubsamplingLayer": "subsampling",
}


def java_class(kind: str) -> str:
    """Returns the full name of a Deeplearning4j class; a name with a dot is a user's own class."""
    return kind if "." in kind else f"org.deeplearning4j.nn.conf.layers.{_PACKAGES.get(kind, '')}{kind}"


def typed(kind: str, body: Json, *, old: bool) -> Json:
    """Returns an object with its class: as the key of the object in 0.9.1 (`old`), as a field since."""
    return {NAMES_0_9_1.get(kind, kind): body} if old else {"@class": java_class(kind), **body}


def settings(name: str | None, strategy: str | None, threshold: object, sizes: tuple[int, int] = (3, 4)) -> Json:
    return {
        "activationFn": {"TanH": {}},
        "epsilon": "NaN",
        "gradientNormalization": strategy,
        "gradientNormalizationThreshold": threshold,
        "iupdater": {"@class": "org.nd4j.linalg.learning.config.Sgd", "learningRate": 0.1},
        "layerName": name,
        "nin": sizes[0],
        "nout": sizes[1],
    }


def layer(
    kind: str = "DenseLayer",
    name: str | None = "first",
    strategy: str | None = "ClipL2PerLayer",
    threshold: object = 0.5,
    *,
    wrappers: Sequence[str] = (),
    old: bool = False,
) -> Json:
    """Returns a layer, inside wrappers (outermost first) that repeat its name and strategy, as in Deeplearning4j."""
    made = typed(kind, settings(name, strategy, threshold), old=old)
    for wrapper in reversed(wrappers):
        outside: Json = {
            "layerName": name,
            "gradientNormalization": strategy,
            "gradientNormalizationThreshold": threshold,
        }
        if wrapper == "Bidirectional":
            outside |= {"fwd": made, "bwd": made}
        else:
            outside["layer" if wrapper == "FrozenLayer" else "underlying"] = made
        made = typed(wrapper, outside, old=old)
    return made


def network_of(layers: Sequence[Json]) -> Json:
    """Returns a MultiLayerNetwork."""
    return {"confs": [{"layer": each, "seed": 5, "variables": []} for each in layers], "tbpttFwdLength": 20}


def graph_of(layers: dict[str, Json], *, old: bool = False) -> Json:
    """Returns a ComputationGraph, with a vertex that is not a layer."""
    body = {
        name: {"layerConf": {"layer": each, "variables": []}, "outputVertex": False} for name, each in layers.items()
    }
    kind = "LayerVertex" if old else "org.deeplearning4j.nn.conf.graph.LayerVertex"
    merge = typed("MergeVertex" if old else "org.deeplearning4j.nn.conf.graph.MergeVertex", {}, old=old)
    vertices = {name: typed(kind, each, old=old) for name, each in body.items()}
    return {"vertices": {**vertices, "a vertex that is not a layer": merge}, "networkInputs": ["x"]}


def zip_of(content: str | bytes, name: str = "configuration.json", method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Returns a saved model."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", method) as archive:
        archive.writestr(name, content)
        archive.writestr("coefficients.bin", b"\0" * 100)
    return held.getvalue()


def written(folder: Path, content: Json | bytes | str, name: str = "model.json") -> Path:
    path = folder / name
    if isinstance(content, dict):
        content = json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path
