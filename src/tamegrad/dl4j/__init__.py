"""Reads the gradient normalization of Deeplearning4j models from their own files, without a JVM or a framework.

Saved models (`.zip`) and bare configurations (`.json`) of `MultiLayerNetwork` and `ComputationGraph` are read, in the
formats of 0.9.1 and of 1.0.0-beta3 to 1.0.0-M2.1.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from tamegrad.dl4j.document import Dl4jFileError, read_document
from tamegrad.dl4j.layers import Dl4jLayer, Dl4jModel, Network, model_of
from tamegrad.dl4j.policies import policy_as_python, policy_of
from tamegrad.policy import Policy

__all__ = [
    "Dl4jFileError",
    "Dl4jLayer",
    "Dl4jModel",
    "Network",
    "policy_as_python",
    "policy_of",
    "read_model",
    "read_policy",
]


def read_model(path: str | os.PathLike[str]) -> Dl4jModel:
    """Reads the layers of a Deeplearning4j network, and what it does to the gradients of each.

    Args:
        path: A saved model (`.zip`) or a bare configuration (`.json`); recognized by content, not by name.

    Returns:
        The network and its layers.

    Raises:
        Dl4jFileError: If the file is neither, or holds a value that Deeplearning4j does not write; the message names
            the file and the place in it.

    Example:
        >>> import json, tempfile
        >>> dense = {
        ...     "@class": "org.deeplearning4j.nn.conf.layers.DenseLayer", "layerName": "first", "nin": 4, "nout": 8,
        ...     "gradientNormalization": "ClipL2PerLayer", "gradientNormalizationThreshold": 0.5,
        ... }
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "model.json")
        ...     _ = path.write_text(json.dumps({"confs": [{"layer": dense}]}))
        ...     (layer,) = read_model(path).layers
        >>> layer.kind, layer.n_in, layer.n_out, layer.strategy
        ('DenseLayer', 4, 8, Clip(threshold=0.5, per='layer'))
    """
    return model_of(read_document(Path(path)))


def read_policy(path: str | os.PathLike[str], names: Mapping[str, str] | None = None) -> Policy:
    """Reads the policy that does in PyTorch what a Deeplearning4j network does: one override per layer, by name.

    Layers without parameters are left out, including batch normalization with locked gamma and beta. The default is
    `Keep()`. Thresholds of renormalizations, which Deeplearning4j ignores, are dropped.

    Args:
        path: A saved model (`.zip`) or a bare configuration (`.json`); recognized by content, not by name.
        names: Maps Deeplearning4j's layer names to the PyTorch model's; other names stay as they are.

    Returns:
        The policy, for `attach` and `GradientNormalizer`.

    Raises:
        Dl4jFileError: If the file is neither, or holds a value that Deeplearning4j does not write; the message names
            the file and the place in it.
        SettingError: If `names` is not a mapping of names, or gives two layers the same name.
        UnmatchedError: If a key of `names` is not a layer of the network.

    Example:
        >>> import json, tempfile
        >>> lstm = {
        ...     "@class": "org.deeplearning4j.nn.conf.layers.LSTM", "layerName": None, "nin": 4, "nout": 8,
        ...     "gradientNormalization": "ClipL2PerParamType", "gradientNormalizationThreshold": 0.5,
        ... }
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "model.json")
        ...     _ = path.write_text(json.dumps({"confs": [{"layer": lstm}]}))
        ...     read_policy(path, names={"layer0": "rnn"})
        Policy(Keep(), overrides={'rnn': Clip(threshold=0.5, per='param_type')})
    """
    return policy_of(read_model(path), names)
