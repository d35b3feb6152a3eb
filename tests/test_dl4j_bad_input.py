import json
import os
import re
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest

from support.dl4j_files import MODELS, Json, graph_of, layer, network_of, typed, written, zip_of
from tamegrad import TamegradError
from tamegrad.dl4j import Dl4jFileError, document, layers, read_policy

CONFIGURATION = json.dumps(network_of([layer()]))
MODEL = (MODELS / "dense.zip").read_bytes()
STRATEGY = "confs[0].layer.gradientNormalization"
THRESHOLD = f"{STRATEGY}Threshold"


def refusal(path: Path) -> Dl4jFileError:
    """Returns the error, after a check that it names the file, has its four parts, is short and comes fast."""
    start = time.process_time()
    with pytest.raises(Dl4jFileError) as caught:
        read_policy(path)
    assert time.process_time() - start < 2, "a second on an idle core"
    message = str(caught.value)
    assert message.startswith(str(path))
    assert re.search(r": got .+; allowed: .+; next: .+", message, re.DOTALL)
    assert len(message) < len(str(path)) + 600
    return caught.value


def assert_refused(path: Path, place: str, got: str) -> None:
    error = refusal(path)
    assert error.where == (f"{path}: {place}" if place else str(path))
    assert got in error.got


def test_the_error_is_a_value_error() -> None:
    assert issubclass(Dl4jFileError, TamegradError)
    assert issubclass(Dl4jFileError, ValueError)


def test_paths_that_are_not_files(tmp_path: Path) -> None:
    assert_refused(tmp_path / "absent.zip", "", "no file")
    assert_refused(tmp_path, "", "a directory")
    assert_refused(tmp_path / ("x" * 5000), "", "a file that cannot be read (File name too long)")
    os.mkfifo(tmp_path / "pipe")
    assert_refused(tmp_path / "pipe", "", "no file")


@pytest.mark.parametrize(
    ("content", "place", "got"),
    [
        (b"", "", "an empty file"),
        (b" \n\t ", "", "an empty file"),
        (CONFIGURATION[:-20].encode(), "line 1 column ", "text that is not JSON"),
        (b"\x89PNG\r\n\x1a\n\0\0", "", "a binary file, or text that is not UTF-8 (at byte 0)"),
        (bytes(1000), "line 1 column 1", "text that is not JSON"),
        (b"class: LSTM\nunits: 5\n", "line 1 column 1", "text that is not JSON"),
        (CONFIGURATION.encode("utf-16"), "", "a binary file"),
        (b"[]", "", "a list"),
        (b"null", "", "nothing"),
        (b'{"class_name": "Sequential", "config": []}', "", 'an object with neither "confs" nor "vertices"'),
        (b'{"confs": [], "vertices": {}}', "", 'an object with both "confs" and "vertices"'),
    ],
)
def test_empty_truncated_foreign_and_binary_files(tmp_path: Path, content: bytes, place: str, got: str) -> None:
    error = refusal(written(tmp_path, content, name="model.zip"))
    assert error.where.removeprefix(str(tmp_path / "model.zip")).startswith(f": {place}" if place else "")
    assert got in error.got
    assert error.advice.startswith("save the model again with Deeplearning4j's ModelSerializer")


@pytest.mark.parametrize("kept", [4, 30, 200, len(MODEL) // 2, len(MODEL) - 1])
def test_a_truncated_zip(tmp_path: Path, kept: int) -> None:
    assert_refused(written(tmp_path, MODEL[:kept], name="cut.zip"), "", "a zip file that is truncated or damaged")


def with_header(model: bytes, offset: int, value: bytes) -> bytes:
    """Changes both headers of the first entry: the local one, and the central one, whose fields are two bytes later."""
    central = model.index(b"PK\x01\x02")
    changed = bytearray(model)
    changed[offset : offset + len(value)] = value
    changed[central + offset + 2 : central + offset + 2 + len(value)] = value
    return bytes(changed)


@pytest.mark.parametrize(
    ("model", "got"),
    [
        (zip_of("{}", name="config.json"), "0 entries of that name; closest: 'config.json'"),
        (zip_of("{}", name="model/configuration.json"), "0 entries of that name; closest: 'model/configuration.json'"),
        (zip_of("{}", name="configuration.json-.exe").replace(b"-.exe", b"\0.exe"), "0 entries"),
        (b"PK\x05\x06" + bytes(18), "0 entries of that name; closest: none"),
        (with_header(MODEL, 6, b"\x01"), "an encrypted entry"),
        (with_header(MODEL, 8, struct.pack("<H", 14)), "compression method 14, not deflate"),
        (zip_of(CONFIGURATION, method=zipfile.ZIP_BZIP2), "compression method 12, not deflate"),
        (zip_of(CONFIGURATION, method=zipfile.ZIP_LZMA), "compression method 14, not deflate"),
    ],
)
def test_a_zip_without_a_readable_configuration(tmp_path: Path, model: bytes, got: str) -> None:
    assert_refused(written(tmp_path, model, name="model.zip"), "configuration.json", got)


def test_a_zip_with_two_configurations(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("configuration.json", CONFIGURATION)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("configuration.json", "{}")
    assert_refused(tmp_path / "model.zip", "configuration.json", "2 entries")


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/../../b", "..\\evil", "C:\\evil", "\\evil", "a/.."])
def test_a_zip_with_a_path_that_leaves_the_archive(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("configuration.json", CONFIGURATION)
        archive.writestr(name, "evil")
    assert_refused(path, repr(name), "a path that leaves the archive")
    assert os.listdir(tmp_path) == ["model.zip"]  # noqa: PTH208 the names are compared


def test_a_harmless_path_with_dots_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("configuration.json", CONFIGURATION)
        archive.writestr("extras/..hidden/a..b/c:d", "")
    assert len(read_policy(path).overrides) == 1


def test_a_zip_with_corrupted_content(tmp_path: Path) -> None:
    stored = bytearray(zip_of(CONFIGURATION, method=zipfile.ZIP_STORED))
    stored[stored.index(b"0.5")] = ord("9")
    assert "Bad CRC-32" in refusal(written(tmp_path, bytes(stored))).got
    deflated = bytearray(MODEL)
    deflated[60:80] = b"\xff" * 20
    assert "truncated or damaged" in refusal(written(tmp_path, bytes(deflated))).got


def test_a_zip_with_unsupported_features_or_sizes(tmp_path: Path) -> None:
    central = MODEL.index(b"PK\x01\x02")
    version = bytearray(MODEL)
    version[central + 6] = 99
    assert "damaged (zip file version 9.9)" in refusal(written(tmp_path, bytes(version))).got
    assert "damaged (compressed patched data" in refusal(written(tmp_path, with_header(MODEL, 6, b"\x20"))).got
    longer = zip_of("{}", method=zipfile.ZIP_STORED)
    longer = with_header(longer, 18, struct.pack("<II", 10**6, 10**6))
    # Newer versions of Python first notice that the entry would overlap what follows.
    too_long = "damaged (an entry ends too early)", "damaged (Overlapped entries: "
    assert any(one in refusal(written(tmp_path, longer)).got for one in too_long)


@pytest.mark.parametrize(("offset", "got"), [(2**64 - 1, "damaged"), (2**62, "cannot be read"), (2**40, "damaged")])
def test_a_zip_whose_entry_starts_beyond_its_end(tmp_path: Path, offset: int, got: str) -> None:
    central = MODEL.index(b"PK\x01\x02")
    extra = struct.pack("<HHQ", 1, 8, offset)  # where an archive of more than 4 GB has the offset
    header = bytearray(MODEL[central : central + 46])
    header[30:34] = struct.pack("<HH", len(extra), 0)
    header[42:46] = b"\xff" * 4
    directory = bytes(header) + b"configuration.json" + extra
    end = b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 1, 1, len(directory), central, 0)
    assert got in refusal(written(tmp_path, MODEL[:central] + directory + end)).got


def test_a_zip_that_unpacks_to_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("configuration.json", "w", force_zip64=True) as entry,
    ):
        for _ in range(300):
            entry.write(b" " * 2**20)
    lying = bytearray(path.read_bytes())  # the central directory says that it unpacks to 99 bytes
    at = lying.index(b"PK\x01\x02") + 24
    lying[at : at + 4] = struct.pack("<I", 99)
    for content, got in ((path.read_bytes(), "more than 41943040 bytes"), (bytes(lying), "Bad CRC-32")):
        assert got in refusal(written(tmp_path, content)).got


def peak_of_refusal(path: Path) -> int:
    tracemalloc.start()
    try:
        refusal(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_bounded(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("configuration.json", bytes(200 * 2**20))
    assert peak_of_refusal(tmp_path / "bomb.zip") < 2 * document.MOST_BYTES
    with (tmp_path / "sparse.json").open("wb") as file:
        file.truncate(2**34)
    assert peak_of_refusal(tmp_path / "sparse.json") < 2 * document.MOST_BYTES
    nested = written(tmp_path, b'{"a":' * (document.MOST_OBJECTS // 2))
    assert peak_of_refusal(nested) < document.MOST_BYTES


def test_a_zip_with_too_many_entries(tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(20_000):
            archive.writestr(f"entry{index}", b"")
    assert_refused(path, "", "a list of entries longer than 1048576 bytes")


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        (b"[" * 65 + b"]" * 65),
        b'{"confs": [{"layer": ' + b'{"FrozenLayer": {"layer": ' * 100 + b"{}" + b"}}" * 100 + b"}]}",
        b'["]",' * 100 + b"1" + b"]" * 100,
        b'["\\"]",' * 100 + b"1" + b"]" * 100,
        b'["\\\\","]",' * 100 + b"1" + b"]" * 100,
    ],
)
def test_values_nested_too_deep(tmp_path: Path, content: bytes) -> None:
    assert_refused(written(tmp_path, content), "configuration", "values nested more than 64 deep")


def test_values_nested_as_deep_as_allowed(tmp_path: Path) -> None:
    deep = f'{{"a": {"[" * 63}{"]" * 63}, "b": "{"[" * 1000}", {CONFIGURATION[1:]}'
    assert len(read_policy(written(tmp_path, deep)).overrides) == 1


def test_limits_on_counts_and_lengths(tmp_path: Path) -> None:
    objects = b"[" + b"{}," * document.MOST_OBJECTS + b"1]"
    assert_refused(written(tmp_path, objects), "configuration", "300000 objects and lists or more")
    values = b"[" + b"0," * (document.MOST_COMMAS + 1) + b"0]"
    assert_refused(written(tmp_path, values), "configuration", "more than 1200000 values")
    texts = b"[" + b'["["],"[",' * (document.MOST_OBJECTS // 2) + b"1]"
    assert_refused(written(tmp_path, texts), "configuration", "300000 objects and lists or more")
    many = b'{"confs":[' + b"{}," * layers.MOST_LAYERS + b"{}]}"
    assert_refused(written(tmp_path, many), "confs", f"{layers.MOST_LAYERS + 1} layers")
    long = network_of([layer(name="x" * 1001)])
    assert_refused(written(tmp_path, long), "confs[0].layer.layerName", "a name of 1001 characters")
    key = graph_of({"x" * 1001: layer()})
    assert "a name of 1001 characters" in refusal(written(tmp_path, key)).got


def test_duplicate_keys(tmp_path: Path) -> None:
    twice = CONFIGURATION.replace('"nin": 3', '"nin": 3, "nin": 3')
    assert_refused(written(tmp_path, twice), "confs[0].layer.nin", "a duplicate key")
    inside = '{"vertices": {"a b": 1, "a b": {"x": 1, "x": 2}}, "networkInputs": []}'
    assert_refused(written(tmp_path, inside), "vertices['a b']", "a duplicate key")


DIGITS = "9" * 1_000_000


@pytest.mark.parametrize(
    ("threshold", "got"),
    [
        ('"NaN"', "'NaN'"),
        ("NaN", "'NaN'"),
        ('"-Infinity"', "'-Infinity'"),
        ('"0.5"', "'0.5'"),
        ("-1.0", "-1.0"),
        ("0", "0.0"),
        ("-0.0", "-0.0"),
        ("1e-400", "0.0"),
        ("1e999", "a number too large for 64 bits"),
        (DIGITS, "a number too large for 64 bits"),
        (f"1e{DIGITS}", "a number too large for 64 bits"),
        ("true", "true"),
        ("null", "nothing"),
        ("[1.0]", "a list"),
        ("{}", "an object"),
    ],
)
@pytest.mark.parametrize("strategy", ["ClipL2PerLayer", "ClipL2PerParamType", "ClipElementWiseAbsoluteValue"])
def test_an_invalid_threshold(tmp_path: Path, strategy: str, threshold: str, got: str) -> None:
    made = json.dumps(network_of([layer(strategy=strategy, threshold="?")])).replace('"?"', threshold)
    error = refusal(written(tmp_path, made))
    assert error.where.endswith(f": {THRESHOLD}")
    assert (error.got, error.allowed) == (got, "a number above 0")
    assert error.advice.startswith(f"{strategy} needs a threshold")
    ignored = made.replace(strategy, "RenormalizeL2PerLayer")
    assert len(read_policy(written(tmp_path, ignored)).overrides) == 1


def test_a_missing_threshold(tmp_path: Path) -> None:
    made = layer()
    del made["gradientNormalizationThreshold"]
    assert_refused(written(tmp_path, network_of([made])), THRESHOLD, "nothing")


def test_the_place_is_inside_the_wrapper_and_the_graph(tmp_path: Path) -> None:
    made = graph_of({"a/b": layer(threshold=-1, wrappers=["Bidirectional"], old=True)}, old=True)
    place = "vertices['a/b'].LayerVertex.layerConf.layer.Bidirectional.fwd.dense.gradientNormalizationThreshold"
    assert_refused(written(tmp_path, made), place, "-1.0")


@pytest.mark.parametrize(
    ("strategy", "got"), [("ClipL2PerLayr", "'ClipL2PerLayr'"), ("", "''"), (3, "3.0"), ([], "a list"), (True, "true")]
)
def test_an_unknown_strategy(tmp_path: Path, strategy: Any, got: str) -> None:
    error = refusal(written(tmp_path, network_of([layer(strategy=strategy)])))
    assert error.where.endswith(f": {STRATEGY}")
    assert error.got == got
    if isinstance(strategy, str) and strategy:
        six = "'None', 'RenormalizeL2PerLayer', 'RenormalizeL2PerParamType', 'ClipElementWiseAbsoluteValue', "
        assert error.allowed == f"{six}'ClipL2PerLayer', 'ClipL2PerParamType'; closest: 'ClipL2PerLayer'"


def test_a_huge_strategy_name_is_shortened(tmp_path: Path) -> None:
    error = refusal(written(tmp_path, network_of([layer(strategy="Clip" * 1_000_000)])))
    assert error.got.startswith("'ClipClip")
    assert error.allowed.startswith("'None', ")


def with_layer(**changes: object) -> Json:
    return network_of([layer() | changes])


@pytest.mark.parametrize(
    ("configuration", "place", "got"),
    [
        ({"confs": {}}, "confs", "an object"),
        ({"confs": []}, "confs", "a network without layers"),
        ({"confs": [3]}, "confs[0]", "3.0"),
        ({"confs": [{}]}, "confs[0].layer", "nothing"),
        ({"confs": [{"layer": []}]}, "confs[0].layer", "a list"),
        ({"confs": [{"layer": {"a": 1, "b": 2}}]}, "confs[0].layer", "an object without a class"),
        ({"confs": [{"layer": {"dense": []}}]}, "confs[0].layer.dense", "a list"),
        ({"confs": [{"layer": {"@class": 3}}]}, "confs[0].layer.@class", "3.0"),
        ({"confs": [{"layer": {"@class": "a."}}]}, "confs[0].layer", "the class 'a.'"),
        ({"vertices": []}, "vertices", "a list"),
        ({"vertices": {}}, "vertices", "a network without layers"),
        ({"vertices": {"a.b": "text"}}, "vertices['a.b']", "'text'"),
        (graph_of({"x": []}), "vertices.x.layerConf.layer", "a list"),  # type: ignore[dict-item]
        (with_layer(layerName=3), "confs[0].layer.layerName", "3.0"),
        (with_layer(nin="many"), "confs[0].layer.nin", "'many'"),
        (with_layer(nout=1.5), "confs[0].layer.nout", "1.5"),
        (with_layer(nout=True), "confs[0].layer.nout", "true"),
        (with_layer(layerParams=[1]), "confs[0].layer.layerParams", "a list"),
        (network_of([typed("LastTimeStep", {}, old=False)]), "confs[0].layer.underlying", "nothing"),
        (network_of([typed("Bidirectional", {"fwd": 3}, old=True)]), "confs[0].layer.Bidirectional.fwd", "3.0"),
        (network_of([typed("FrozenLayer", {"layer": []}, old=False)]), "confs[0].layer.layer", "a list"),
        ({"confs": [{"layer": layer(), "variables": 3}]}, "confs[0].variables", "3.0"),
    ],
)
def test_values_of_the_wrong_type(tmp_path: Path, configuration: Json, place: str, got: str) -> None:
    assert_refused(written(tmp_path, configuration), place, got)


@pytest.mark.parametrize("strategy", ["ClipL2PerLayer", "RenormalizeL2PerLayer"])
def test_the_setting_before_gradient_normalization_beside_another_strategy(tmp_path: Path, strategy: str) -> None:
    configuration = network_of([layer(strategy=strategy)])
    configuration["confs"][0]["constrainGradientToUnitNorm"] = True
    path = written(tmp_path, configuration)
    assert_refused(path, "confs[0].constrainGradientToUnitNorm", "true beside gradientNormalization with ")
    assert "remove one of the two" in refusal(path).advice


@pytest.mark.parametrize(("value", "got"), [("true", "'true'"), (1, "1.0"), ([], "a list"), ({}, "an object")])
def test_the_setting_before_gradient_normalization_is_true_or_false(tmp_path: Path, value: object, got: str) -> None:
    configuration = network_of([layer()])
    configuration["confs"][0]["constrainGradientToUnitNorm"] = value
    assert_refused(written(tmp_path, configuration), "confs[0].constrainGradientToUnitNorm", got)
