import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from support.dl4j_files import FILES, MODELS, WRAPPERS, Json, graph_of, layer, network_of, written, zip_of
from tamegrad import GradientNormalization, Keep
from tamegrad.dl4j import Dl4jFileError, policy_as_python, read_model, read_policy
from tamegrad.strategies import Strategy

repeatable = functools.partial(
    settings,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

HOSTILE = "abz019 .*?[]!^-/\\|\"'{}():,\0\n\té😀\ud800"
NAMES = st.text(HOSTILE, min_size=1, max_size=8) | st.text(min_size=1, max_size=20)
THRESHOLDS = st.floats(min_value=0, exclude_min=True, allow_infinity=True)
ANYTHING = (
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)
)
TRAINED = ("DenseLayer", "OutputLayer", "GravesLSTM", "ConvolutionLayer", "com.acme.Own", "Unheard")
UNTRAINED = ("ActivationLayer", "SubsamplingLayer")


class Written(NamedTuple):
    """One layer as written, and the strategy that must be read."""

    kind: str
    name: str | None
    wrappers: list[str]
    normalization: GradientNormalization | None
    threshold: object

    def as_json(self, *, old: bool) -> Json:
        # Jackson writes infinity as a string.
        threshold = "Infinity" if self.threshold == math.inf else self.threshold
        strategy = None if self.normalization is None else self.normalization.value
        return layer(self.kind, self.name, strategy, threshold, wrappers=self.wrappers, old=old)

    @property
    def expected(self) -> Strategy:
        if self.normalization is None or "FrozenLayer" in self.wrappers:
            return Keep()
        return self.normalization(self.threshold) if isinstance(self.threshold, float) else self.normalization()


@st.composite
def written_layers(draw: st.DrawFn) -> Written:
    normalization = draw(st.none() | st.sampled_from(GradientNormalization))
    needs = normalization is not None and normalization.value.startswith("Clip")
    return Written(
        draw(st.sampled_from(TRAINED + UNTRAINED)),
        draw(st.none() | NAMES),
        draw(st.lists(st.sampled_from(WRAPPERS), max_size=3)),
        normalization,
        draw(THRESHOLDS if needs else ANYTHING),
    )


@repeatable(max_examples=200)
@given(
    layers=st.lists(written_layers(), min_size=1, max_size=6),
    graph=st.booleans(),
    old=st.booleans(),
    zipped=st.booleans(),
    probe=NAMES,
)
def test_written_layers_are_read_back(
    tmp_path: Path, *, layers: list[Written], graph: bool, old: bool, zipped: bool, probe: str
) -> None:
    names = [f"layer{index}" if each.name is None else each.name for index, each in enumerate(layers)]
    assume(len(set(names)) == len(names))
    made = [each.as_json(old=old) for each in layers]
    configuration = graph_of(dict(zip(names, made, strict=True)), old=old) if graph else network_of(made)
    text = json.dumps(configuration)
    path = written(tmp_path, zip_of(text) if zipped else text)

    policy = read_policy(path)
    trained = {name: each for name, each in zip(names, layers, strict=True) if each.kind not in UNTRAINED}
    assert {name: policy.strategy_for(name) for name in trained} == {n: each.expected for n, each in trained.items()}
    assert len(policy.overrides) == len(trained)
    if probe not in trained:
        assert policy.strategy_for(probe) == Keep()
    assert [read.name for read in read_model(path).layers] == names

    scope: dict[str, Any] = {}
    exec(policy_as_python(policy), scope)  # noqa: S102 this is the code under test
    assert scope["policy"] == policy


@repeatable(max_examples=100)
@given(names=st.lists(NAMES, min_size=1, max_size=5, unique=True), targets=st.lists(NAMES, min_size=5, unique=True))
def test_names_are_mapped_exactly(tmp_path: Path, names: list[str], targets: list[str]) -> None:
    layers = [layer(name=name, threshold=index + 1.0) for index, name in enumerate(names)]
    path = written(tmp_path, network_of(layers))
    mapped = dict(zip(names, targets, strict=False))
    policy = read_policy(path, mapped)
    for index, name in enumerate(names):
        assert policy.strategy_for(mapped[name]) == GradientNormalization.CLIP_L2_PER_LAYER(index + 1.0)


def assert_only_the_documented_error(path: Path) -> bool:
    """Reads a damaged file; returns whether it was refused."""
    try:
        read_policy(path)
    except Dl4jFileError as error:
        assert str(error).startswith(str(path))  # noqa: PT017 a file that happens to be intact is read
        assert len(str(error)) < len(str(path)) + 1_000  # noqa: PT017
        return True
    return False


CONTENTS = {file: (MODELS / file).read_bytes() for file in FILES}
JSON_FILES = [file for file in FILES if file.endswith(".json")]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    content = bytearray(CONTENTS[draw(st.sampled_from(FILES))])
    for _ in range(draw(st.integers(1, 3))):
        # Half of the damage is in the last bytes, where an archive has its directory.
        last = draw(st.booleans())
        at = draw(st.integers(max(0, len(content) - 250) if last else 0, len(content)))
        match draw(st.sampled_from(["flip", "byte", "cut", "drop", "splice", "zeros"])):
            case "flip" if at < len(content):
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "byte" if at < len(content):
                content[at] = draw(st.sampled_from(b'\xff\x00{}[]":,0-e\\'))
            case "cut":
                del content[at:]
            case "drop":
                del content[at : at + draw(st.integers(1, 50))]
            case "zeros":
                content[at : at + 4] = bytes(4)
            case _:
                other = CONTENTS[draw(st.sampled_from(FILES))]
                start = draw(st.integers(0, len(other)))
                content[at:at] = other[start : start + draw(st.integers(1, 500))]
    return bytes(content)


@repeatable(max_examples=1000)
@given(content=damaged())
def test_damaged_files_raise_only_the_documented_error(tmp_path: Path, content: bytes) -> None:
    assert_only_the_documented_error(written(tmp_path, content))


def places(value: Any, trail: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [trail, *(found for key, each in inside for found in places(each, (*trail, key)))]


DOCUMENTS = {file: json.loads(CONTENTS[file]) for file in JSON_FILES}
PLACES = {file: places(document) for file, document in DOCUMENTS.items()}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["NaN", "None"]),
    lambda inside: st.lists(inside, max_size=2) | st.dictionaries(st.sampled_from(["@class", "layer", "x"]), inside),
    max_leaves=4,
)


def replaced(document: Any, trail: tuple[Any, ...], value: object) -> object:
    if not trail:
        return value
    copy = document.copy()
    copy[trail[0]] = replaced(document[trail[0]], trail[1:], value)
    return copy


@repeatable(max_examples=1000)
@given(data=st.data(), file=st.sampled_from(JSON_FILES), value=VALUES)
def test_replaced_values_raise_only_the_documented_error(
    tmp_path: Path, data: st.DataObject, file: str, value: object
) -> None:
    trail = data.draw(st.sampled_from(PLACES[file]))
    document = replaced(DOCUMENTS[file], trail, value)
    assert_only_the_documented_error(written(tmp_path, json.dumps(document)))


@pytest.mark.parametrize("file", FILES)
def test_a_file_truncated_anywhere_is_refused(tmp_path: Path, file: str) -> None:
    content = CONTENTS[file]
    for kept in range(0, len(content) - 1, 37):
        assert assert_only_the_documented_error(written(tmp_path, content[:kept])), kept
