"""Reads the layers of a Deeplearning4j network, and the strategy of each, from its parsed configuration."""

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from tamegrad.dl4j.document import Node, shown
from tamegrad.errors import closest, quoted
from tamegrad.strategies import GradientNormalization, Keep, Renormalize, Strategy

__all__ = ["Dl4jLayer", "Dl4jModel", "Network", "model_of"]

Network: TypeAlias = Literal["MultiLayerNetwork", "ComputationGraph"]

MOST_LAYERS = 25_000
MOST_NAME = 1_000

# Deeplearning4j's own classes without trainable parameters. Any other class is judged by its fields.
_PARAMETERLESS = frozenset(
    {
        "ActivationLayer",
        "CapsuleStrengthLayer",
        "Cnn3DLossLayer",
        "CnnLossLayer",
        "Cropping1D",
        "Cropping2D",
        "Cropping3D",
        "DropoutLayer",
        "GlobalPoolingLayer",
        "LocalResponseNormalization",
        "LossLayer",
        "MaskLayer",
        "RepeatVector",
        "RnnLossLayer",
        "SpaceToBatchLayer",
        "SpaceToDepthLayer",
        "Subsampling1DLayer",
        "Subsampling3DLayer",
        "SubsamplingLayer",
        "TFOpLayer",
        "Upsampling1D",
        "Upsampling2D",
        "Upsampling3D",
        "Yolo2OutputLayer",
        "ZeroPadding1DLayer",
        "ZeroPadding3DLayer",
        "ZeroPaddingLayer",
    }
)
_PACKAGE = "org.deeplearning4j."

# Release 0.9.1 writes these names for its own classes, and the simple class name for a user's class.
_CLASS_OF_0_9_1 = {
    "activation": "ActivationLayer",
    "autoEncoder": "AutoEncoder",
    "batchNormalization": "BatchNormalization",
    "convolution": "ConvolutionLayer",
    "convolution1d": "Convolution1DLayer",
    "dense": "DenseLayer",
    "dropout": "DropoutLayer",
    "ElementWiseMult": "ElementWiseMultiplicationLayer",
    "embedding": "EmbeddingLayer",
    "GlobalPooling": "GlobalPoolingLayer",
    "gravesBidirectionalLSTM": "GravesBidirectionalLSTM",
    "gravesLSTM": "GravesLSTM",
    "localResponseNormalization": "LocalResponseNormalization",
    "loss": "LossLayer",
    "output": "OutputLayer",
    "rnnoutput": "RnnOutputLayer",
    "subsampling": "SubsamplingLayer",
    "subsampling1d": "Subsampling1DLayer",
    "zeroPadding": "ZeroPaddingLayer",
    "zeroPadding1d": "ZeroPadding1DLayer",
}

# The field of each wrapper that holds the layer whose strategy counts.
_WRAPPED = {
    "Bidirectional": "fwd",
    "FrozenLayer": "layer",
    "FrozenLayerWithBackprop": "underlying",
    "FrozenVertex": "underlying",
    "LastTimeStep": "underlying",
    "MaskZeroLayer": "underlying",
    "TimeDistributed": "underlying",
}
_FROZEN = ("FrozenLayer", "FrozenVertex")
_BIDIRECTIONAL = ("Bidirectional",)
_BATCH_NORMALIZATION = ("BatchNormalization",)

_STRATEGY, _THRESHOLD = "gradientNormalization", "gradientNormalizationThreshold"
# Releases before GradientNormalization had this in its place, true or false: each parameter's update was divided by its
# norm, after the updater. RenormalizeL2PerParamType replaced it, and works before the updater.
_UNIT_NORM = "constrainGradientToUnitNorm"
_STRATEGIES = {member.value: member for member in GradientNormalization}
_WITHOUT_THRESHOLD = {
    name: member() for name, member in _STRATEGIES.items() if isinstance(member(), Keep | Renormalize)
}


@dataclass(frozen=True, slots=True)
class Dl4jLayer:
    """One layer of a Deeplearning4j network.

    Args:
        name: Its name; in a `ComputationGraph` that of its vertex. Unnamed layers are `layer0`, `layer1`, … by index.
        kind: Its simple class name; for a wrapper that of the wrapped layer, except for `Bidirectional`.
        n_in: The number of inputs in the file, None if not given.
        n_out: The number of outputs, likewise.
        strategy: What Deeplearning4j does to its gradients: `Keep()` for a layer inside a `FrozenLayer`.
        has_parameters: Whether it has trainable parameters.
        place: Its path in the file: `confs[3].layer`.
    """

    name: str
    kind: str
    n_in: int | None
    n_out: int | None
    strategy: Strategy
    has_parameters: bool
    place: str


@dataclass(frozen=True, slots=True)
class Dl4jModel:
    """A Deeplearning4j network, as its configuration describes it.

    Args:
        file: The file it was read from.
        network: Its class.
        layers: Its layers, in the order of the file, those without parameters included.
    """

    file: str
    network: Network
    layers: tuple[Dl4jLayer, ...]


class _Typed(NamedTuple):
    """An object of the configuration and its Java class; `own` is whether that class is Deeplearning4j's own."""

    kind: str
    own: bool
    node: Node
    fields: dict[str, object]

    def is_a(self, kinds: Container[str]) -> bool:
        """Returns whether it is one of these Deeplearning4j classes, not a user's class of that name."""
        return self.own and self.kind in kinds

    @property
    def wrapped(self) -> Node | None:
        """The layer inside one of Deeplearning4j's wrappers, or of a user's wrappers built like them."""
        if self.is_a(_WRAPPED):
            return self.node.at(_WRAPPED[self.kind])
        underlying = self.fields.get("underlying")
        return self.node.at("underlying") if isinstance(underlying, dict) and "@class" in underlying else None


def model_of(root: Node) -> Dl4jModel:
    """Finds the layers in a configuration.

    Args:
        root: The whole configuration.

    Returns:
        The network.

    Raises:
        Dl4jFileError: If it holds a value that Deeplearning4j does not write.
    """
    confs, vertices = root.at("confs"), root.at("vertices")
    if (confs.value is None) == (vertices.value is None):
        allowed = 'either "confs" (a MultiLayerNetwork) or "vertices" (a ComputationGraph)'
        found = 'neither "confs" nor "vertices"' if confs.value is None else 'both "confs" and "vertices"'
        raise root.refused(allowed, got=f"an object with {found}")
    network: Network = "ComputationGraph" if confs.value is None else "MultiLayerNetwork"
    held = vertices if confs.value is None else confs
    if isinstance(held.value, list | dict) and len(held.value) > MOST_LAYERS:
        raise held.refused(f"up to {MOST_LAYERS}", "check where the file comes from", got=f"{len(held.value)} layers")
    layers = tuple(_layers_of_graph(vertices) if confs.value is None else _layers_of_list(confs))
    if not layers:
        raise held.refused("at least one layer", got="a network without layers")
    return Dl4jModel(root.file, network, layers)


def _layers_of_list(confs: Node) -> list[Dl4jLayer]:
    return [_layer(conf.at("layer"), conf, f"layer{index}") for index, conf in enumerate(confs.items())]


def _layers_of_graph(vertices: Node) -> list[Dl4jLayer]:
    layers = []
    for name in vertices.fields():
        vertex = vertices.at(name)
        chain = _unwrapped(vertex)
        innermost = chain[-1]
        if innermost.fields.get("layerConf") is not None:
            conf = innermost.node.at("layerConf")
            layers.append(_layer(conf.at("layer"), conf, name, outside=chain))
        elif any(innermost.fields.get(key) is not None for key in (_STRATEGY, "vertexParams")):
            # A vertex with its own parameters, such as an attention vertex.
            layers.append(_layer(vertex, innermost.node, name, outside=chain))
    return layers


def _layer(node: Node, conf: Node, name: str, outside: Sequence[_Typed] = ()) -> Dl4jLayer:
    # `outside` is the vertex and its wrappers; the vertex's name takes precedence over the layer's.
    chain = _unwrapped(node)
    innermost = chain[-1]
    whole = next((typed for typed in chain if typed.is_a(_BIDIRECTIONAL)), innermost)
    named_by = None if outside else _first(chain, "layerName")
    if named_by is not None:
        name = named_by.text()
    if len(name) > MOST_NAME:
        raise (named_by or node).refused(f"up to {MOST_NAME} characters", got=f"a name of {len(name)} characters")
    frozen = any(typed.is_a(_FROZEN) for typed in (*outside, *chain))
    return Dl4jLayer(
        name=name,
        kind=whole.kind,
        n_in=_size(_first(chain, "nin")),
        n_out=_size(_first(chain, "nout")),
        strategy=Keep() if frozen else _strategy(chain, conf),
        has_parameters=_has_parameters(innermost, conf),
        place=node.place,
    )


def _unwrapped(node: Node) -> list[_Typed]:
    chain = [_typed(node)]
    while (wrapped := chain[-1].wrapped) is not None:
        chain.append(_typed(wrapped))
    return chain


def _typed(node: Node) -> _Typed:
    fields = node.fields()
    if "@class" in fields:
        name, body = node.at("@class").text(), node
    elif len(fields) == 1:
        (key,) = fields
        name, body = _CLASS_OF_0_9_1.get(key, key), node.at(key)
    else:
        raise node.refused('"@class", or a single key, the class (release 0.9.1)', got="an object without a class")
    kind = name.replace("$", ".").rpartition(".")[2]
    if not kind:
        raise node.refused("the name of a Java class", got=f"the class {shown(name)}")
    # Only 0.9.1 writes simple names, for Deeplearning4j's own classes and for users' classes alike.
    return _Typed(kind, name == kind or name.startswith(_PACKAGE), body, body.fields())


def _first(chain: list[_Typed], key: str) -> Node | None:
    return next((typed.node.at(key) for typed in chain if typed.fields.get(key) is not None), None)


def _size(node: Node | None) -> int | None:
    if node is None:
        return None
    if not isinstance(node.value, float) or not node.value.is_integer():
        raise node.refused("a whole number")
    return int(node.value)


def _strategy(chain: list[_Typed], conf: Node) -> Strategy:
    named = _named_strategy(chain)
    unit_norm = _unit_norm(chain, conf)
    replaced_by = Renormalize(per="param_type")
    if unit_norm is None or named == replaced_by:
        return named
    if named != Keep():
        # The releases that knew both settings did both, one before and one after the updater.
        raise unit_norm.refused(
            f"false, or {_STRATEGY} None or RenormalizeL2PerParamType",
            advice=f"remove one of the two from the file; {_UNIT_NORM} alone is read as RenormalizeL2PerParamType",
            got=f"true beside {_STRATEGY} with {named}",
        )
    return replaced_by


def _unit_norm(chain: list[_Typed], conf: Node) -> Node | None:
    """Returns the old setting of a layer if it is true; it stands beside the layer, in its configuration."""
    for node in (place.at(_UNIT_NORM) for place in (conf, *(typed.node for typed in chain))):
        if not isinstance(node.value, bool | None):
            raise node.refused("true or false")
        if node.value:
            return node
    return None


def _named_strategy(chain: list[_Typed]) -> Strategy:
    # Deeplearning4j uses the innermost layer's strategy; a wrapper's own field only repeats it.
    owner = next((typed.node for typed in reversed(chain) if typed.fields.get(_STRATEGY) is not None), None)
    if owner is None:
        return Keep()
    name = owner.at(_STRATEGY).text()
    if name in _WITHOUT_THRESHOLD:
        return _WITHOUT_THRESHOLD[name]
    if name not in _STRATEGIES:
        raise owner.at(_STRATEGY).refused(
            f"{quoted(_STRATEGIES)}; closest: {quoted(closest(name[:100], _STRATEGIES, most=1))}",
            advice="write one of these into the file, or save the model again",
        )
    return _STRATEGIES[name](_threshold(owner, name))


def _threshold(owner: Node, name: str) -> float:
    node = owner.at(_THRESHOLD)
    if node.value == "Infinity":  # as Jackson writes it: a threshold that never clips
        return math.inf
    if not isinstance(node.value, float) or not 0 < node.value < math.inf:
        raise node.refused(
            "a number above 0",
            advice=f'{name} needs a threshold: write one into the file, or the strategy "None" to keep the gradients',
        )
    return node.value


def _has_parameters(layer: _Typed, conf: Node) -> bool:
    fields = layer.fields
    if layer.is_a(_PARAMETERLESS) or (layer.is_a(_BATCH_NORMALIZATION) and fields.get("lockGammaBeta") is True):
        # With gamma and beta locked, only the running statistics are left, which PyTorch does not train.
        return False
    variables = conf.at("variables")
    if variables.value is not None and any(True for _ in variables.items()):
        return True  # this list is empty in a bare configuration and inside a wrapper
    for declared in ("layerParams", "vertexParams"):
        if fields.get(declared) is not None:
            return any(layer.node.at(declared).fields().get(group) for group in ("weightParams", "biasParams"))
    if conf.at(_UNIT_NORM).value is not True and (
        fields.get(_STRATEGY) in (None, "None") and fields.get(_THRESHOLD) in (None, 0.0)
    ):
        # Typical of a class with nothing to normalize; one that trains has at least an updater or a size.
        return any(fields.get(key) is not None for key in ("iupdater", "nin"))
    return True
