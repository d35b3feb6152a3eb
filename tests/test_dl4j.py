import json
import time
from pathlib import Path
from typing import Any

import pytest

from support.dl4j_files import FILES, MODELS, Json, graph_of, layer, network_of, settings, typed, written, zip_of
from tamegrad import Clip, ClipValue, GradientNormalization, Keep, Policy, Renormalize, SettingError, UnmatchedError
from tamegrad.dl4j import Dl4jFileError, policy_as_python, policy_of, read_model, read_policy
from tamegrad.strategies import Strategy

EXPECTED: dict[str, list[dict[str, Any]]] = {
    file: entry["layers"]
    for entry in json.loads((MODELS / "expected.json").read_text(encoding="utf-8"))
    for file in entry["files"]
}


def strategy_of(expected: dict[str, Any]) -> Strategy:
    return GradientNormalization(expected["strategy"])(expected["threshold"])


def test_every_file_has_an_expectation() -> None:
    assert sorted(EXPECTED) == FILES
    assert len(FILES) == 22


@pytest.mark.parametrize("file", FILES)
def test_layers_are_what_deeplearning4j_reports(file: str) -> None:
    layers = [layer for layer in read_model(MODELS / file).layers if layer.has_parameters]
    expected = EXPECTED[file]
    assert [(layer.name, layer.kind) for layer in layers] == [(each["name"], each["kind"]) for each in expected]
    assert [layer.strategy for layer in layers] == [strategy_of(each) for each in expected]


@pytest.mark.parametrize("file", FILES)
def test_the_policy_agrees_with_deeplearning4j(file: str) -> None:
    policy = read_policy(str(MODELS / file))
    assert [policy.strategy_for(each["name"]) for each in EXPECTED[file]] == [strategy_of(e) for e in EXPECTED[file]]
    assert [override.key for override in policy.overrides] == [each["name"] for each in EXPECTED[file]]
    assert policy.default == Keep()


def test_the_files_cover_every_strategy() -> None:
    shown = {each["strategy"] for layers in EXPECTED.values() for each in layers}
    assert shown == {member.value for member in GradientNormalization}


def test_a_model_has_sizes_places_and_layers_without_parameters() -> None:
    model = read_model(MODELS / "convolution.zip")
    rows = [(each.name, each.kind, each.n_in, each.n_out, each.has_parameters, each.place) for each in model.layers]
    assert (model.network, model.file) == ("MultiLayerNetwork", str(MODELS / "convolution.zip"))
    assert rows == [
        ("convolution", "ConvolutionLayer", 2, 4, True, "confs[0].layer"),
        ("normalization", "BatchNormalization", 4, 4, True, "confs[1].layer"),
        ("pool", "SubsamplingLayer", None, None, False, "confs[2].layer"),
        ("dense", "DenseLayer", 36, 6, True, "confs[3].layer"),
        ("out", "OutputLayer", 6, 3, True, "confs[4].layer"),
    ]
    bidirectional = read_model(MODELS / "bidirectional.json").layers[0]
    assert (bidirectional.n_in, bidirectional.n_out) == (4, 10)
    assert read_model(MODELS / "graph.json").network == "ComputationGraph"
    assert read_model(MODELS / "v0_9_1_graph.json").layers[0].place == "vertices.left.LayerVertex.layerConf.layer"


def only_layer(folder: Path, made: Json) -> tuple[str, str, Strategy, bool]:
    (read,) = read_model(written(folder, network_of([made]))).layers
    return read.name, read.kind, read.strategy, read.has_parameters


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("wrappers", "kind", "strategy"),
    [
        (["LastTimeStep"], "LSTM", Clip(0.5)),
        (["MaskZeroLayer"], "LSTM", Clip(0.5)),
        (["TimeDistributed"], "LSTM", Clip(0.5)),
        (["FrozenLayer"], "LSTM", Keep()),
        (["FrozenLayerWithBackprop"], "LSTM", Clip(0.5)),
        (["Bidirectional"], "Bidirectional", Clip(0.5)),
        (["FrozenLayer", "LastTimeStep"], "LSTM", Keep()),
        (["LastTimeStep", "FrozenLayer"], "LSTM", Keep()),
        (["LastTimeStep", "Bidirectional"], "Bidirectional", Clip(0.5)),
        (["Bidirectional", "LastTimeStep", "MaskZeroLayer"], "Bidirectional", Clip(0.5)),
        (["FrozenLayer", "Bidirectional"], "Bidirectional", Keep()),
    ],
)
def test_wrappers(tmp_path: Path, wrappers: list[str], kind: str, strategy: Strategy, *, old: bool) -> None:
    made = layer("LSTM", wrappers=wrappers, old=old)
    assert only_layer(tmp_path, made) == ("first", kind, strategy, True)


def test_the_layer_inside_a_wrapper_decides_the_strategy(tmp_path: Path) -> None:
    made = layer("LSTM", wrappers=["LastTimeStep"])
    made |= {"gradientNormalization": "RenormalizeL2PerLayer", "layerName": "outside"}
    assert only_layer(tmp_path, made) == ("outside", "LSTM", Clip(0.5), True)
    made["layerName"] = None
    assert only_layer(tmp_path, made)[0] == "first"


def test_a_users_own_wrapper_is_unwrapped(tmp_path: Path) -> None:
    made = {"@class": "com.acme.Twice", "underlying": layer("LSTM"), "layerName": "own"}
    assert only_layer(tmp_path, made) == ("own", "LSTM", Clip(0.5), True)
    made = {"@class": "com.acme.FrozenLayer", "underlying": layer("LSTM")}
    assert only_layer(tmp_path, made)[2] == Clip(0.5), "a user's class of that name freezes nothing"


def test_unnamed_layers_are_named_by_index(tmp_path: Path) -> None:
    layers = [layer(name=None), layer("ActivationLayer", name=None), layer(name=None, strategy="None")]
    policy = read_policy(written(tmp_path, network_of(layers)))
    assert policy == Policy(Keep(), overrides={"layer0": Clip(0.5), "layer2": Keep()})


def test_a_graphs_vertex_names_its_layer(tmp_path: Path) -> None:
    (read,) = read_model(written(tmp_path, graph_of({"left": layer(name="something else")}))).layers
    assert read.name == "left"


NO_PARAMETERS: Json = {"gradientNormalization": "None", "gradientNormalizationThreshold": 0.0, "layerName": "x"}
LAMBDA: Json = settings("x", "ClipL2PerLayer", 0.5) | {"layerParams": {"weightParams": {}, "biasParams": {}}}


@pytest.mark.parametrize(
    ("made", "has_parameters"),
    [
        (layer("SubsamplingLayer"), False),
        (layer("ActivationLayer", old=True), False),
        (layer("DropoutLayer", wrappers=["FrozenLayer"]), False),
        (layer("com.acme.Gated"), True),
        (layer("com.acme.SubsamplingLayer"), True),
        (layer("Gated", old=True), True),
        (layer("com.acme.Net$Gated", strategy="None"), True),
        ({"@class": "com.acme.Flatten", **NO_PARAMETERS}, False),
        ({"@class": "com.acme.Flatten"}, False),
        ({"@class": "com.acme.Dense", "nin": 3, "gradientNormalization": None}, True),
        ({"@class": "com.acme.Lambda", **LAMBDA}, False),
        ({"@class": "com.acme.SameDiff", **LAMBDA, "layerParams": {"weightParams": {"W": [3, 4]}}}, True),
        (typed("BatchNormalization", settings("x", "ClipL2PerLayer", 1.0), old=False), True),
        (typed("BatchNormalization", settings("x", "None", 1.0) | {"lockGammaBeta": True}, old=False), False),
    ],
)
def test_which_layers_have_parameters(tmp_path: Path, made: Json, has_parameters: bool) -> None:  # noqa: FBT001
    assert only_layer(tmp_path, made)[3] is has_parameters


def test_an_unknown_class_with_listed_variables_has_parameters(tmp_path: Path) -> None:
    configuration = network_of([{"@class": "com.acme.Odd", **NO_PARAMETERS}])
    configuration["confs"][0]["variables"] = ["W"]
    assert read_model(written(tmp_path, configuration)).layers[0].has_parameters


def test_vertices_with_their_own_parameters_and_frozen_vertices(tmp_path: Path) -> None:
    attention = typed(
        "org.deeplearning4j.nn.conf.graph.AttentionVertex", settings(None, "ClipL2PerLayer", 2), old=False
    )
    configuration = graph_of({"dense": layer(name="dense")})
    vertices = configuration["vertices"]
    vertices["attention"] = attention
    frozen = "org.deeplearning4j.nn.conf.graph.FrozenVertex"
    vertices["frozen attention"] = {"@class": frozen, "underlying": attention}
    vertices["frozen dense"] = {"@class": frozen, "underlying": vertices["dense"]}
    read = read_model(written(tmp_path, configuration)).layers
    assert [(each.name, each.kind, each.strategy) for each in read] == [
        ("dense", "DenseLayer", Clip(0.5)),
        ("attention", "AttentionVertex", Clip(2.0)),
        ("frozen attention", "AttentionVertex", Keep()),
        ("frozen dense", "DenseLayer", Keep()),
    ]


@pytest.mark.parametrize(
    ("strategy", "threshold", "expected"),
    [
        ("None", "NaN", Keep()),
        ("None", -1, Keep()),
        (None, "a text", Keep()),
        ("RenormalizeL2PerLayer", "NaN", Renormalize()),
        ("RenormalizeL2PerParamType", None, Renormalize(per="param_type")),
        ("ClipL2PerLayer", 2, Clip(2.0)),
        ("ClipL2PerLayer", "Infinity", Clip(float("inf"))),
        ("ClipElementWiseAbsoluteValue", 1e-300, ClipValue(1e-300)),
    ],
)
def test_a_threshold_counts_only_if_the_strategy_needs_one(
    tmp_path: Path, strategy: str | None, threshold: object, expected: Strategy
) -> None:
    assert only_layer(tmp_path, layer(strategy=strategy, threshold=threshold))[2] == expected


UNIT_NORM = "constrainGradientToUnitNorm"


def before_gradient_normalization(kind: str, *, unit_norm: object) -> Json:
    """Returns a layer's configuration as releases wrote it that had no GradientNormalization."""
    body = {"activationFunction": "tanh", "layerName": None, "nin": 3, "nout": 4, "updater": "SGD"}
    return {"layer": {kind: body}, UNIT_NORM: unit_norm, "numIterations": 5, "variables": ["W", "b"]}


def test_the_setting_before_gradient_normalization_is_read_as_what_replaced_it(tmp_path: Path) -> None:
    confs = [
        before_gradient_normalization("dense", unit_norm=True),
        before_gradient_normalization("gravesLSTM", unit_norm=False),
        before_gradient_normalization("subsampling", unit_norm=True),
        before_gradient_normalization("output", unit_norm=None),
    ]
    unit_norm = Renormalize(per="param_type")
    expected = {"layer0": unit_norm, "layer1": Keep(), "layer3": Keep()}
    assert read_policy(written(tmp_path, {"confs": confs})) == Policy(Keep(), overrides=dict(expected))
    vertices = {"left": {"LayerVertex": {"layerConf": confs[0]}}, "right": {"LayerVertex": {"layerConf": confs[1]}}}
    read = read_model(written(tmp_path, {"vertices": vertices})).layers
    assert [(each.name, each.strategy) for each in read] == [("left", unit_norm), ("right", Keep())]


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("strategy", [None, "None", "RenormalizeL2PerParamType"])
def test_the_old_setting_may_stand_beside_the_new_one(tmp_path: Path, strategy: str | None, *, beside: bool) -> None:
    configuration = network_of([layer(strategy=strategy)])
    (conf,) = configuration["confs"]
    (conf if beside else conf["layer"])[UNIT_NORM] = True
    (read,) = read_model(written(tmp_path, configuration)).layers
    assert read.strategy == Renormalize(per="param_type")
    conf[UNIT_NORM] = conf["layer"][UNIT_NORM] = False
    (read,) = read_model(written(tmp_path, configuration)).layers
    assert read.strategy == (Keep() if strategy in (None, "None") else Renormalize(per="param_type"))


def test_a_layer_with_the_old_setting_has_parameters_though_its_sizes_are_not_in_it(tmp_path: Path) -> None:
    conf = {"layer": {"RBM": {}}, "nIn": 3, "nOut": 4, "variables": []}
    for unit_norm in (True, False):
        (read,) = read_model(written(tmp_path, {"confs": [conf | {UNIT_NORM: unit_norm}]})).layers
        assert read.has_parameters is unit_norm


def test_the_old_setting_of_a_frozen_layer_does_nothing(tmp_path: Path) -> None:
    configuration = network_of([layer(strategy=None, wrappers=["FrozenLayer"])])
    configuration["confs"][0][UNIT_NORM] = True
    assert read_model(written(tmp_path, configuration)).layers[0].strategy == Keep()


def test_names_are_never_patterns(tmp_path: Path) -> None:
    names = ["*", "a[b]", "block/conv.1", "a?", "[!a]"]
    layers = [layer(name=name, threshold=index + 1) for index, name in enumerate(names)]
    policy = read_policy(written(tmp_path, network_of(layers)))
    assert [policy.strategy_for(name) for name in names] == [Clip(index + 1.0) for index in range(len(names))]
    for other in ("anything", "ab", "block", "ax", "b", "block/conv.2"):
        assert policy.strategy_for(other) == policy.strategy_for(other, "bias") == Keep()


def test_names_are_mapped_to_the_models(tmp_path: Path) -> None:
    path = written(tmp_path, network_of([layer(name=None), layer("DropoutLayer", name=None), layer(name="out")]))
    policy = read_policy(path, names={"layer0": "rnn[0]", "layer1": "dropout"})
    assert policy.strategy_for("rnn[0]") == policy.strategy_for("out") == Clip(0.5)
    assert [policy.strategy_for(name) for name in ("layer0", "rnn0", "dropout")] == [Keep()] * 3
    swapped = Policy(Keep(), overrides={"out": Clip(0.5), "layer0": Clip(0.5)})
    assert read_policy(path, names={"layer0": "out", "out": "layer0"}) == swapped
    assert policy_of(read_model(path)) == read_policy(path)


def test_an_invalid_mapping_of_names_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, network_of([layer(name="encoder"), layer(name="decoder")]))
    with pytest.raises(UnmatchedError, match=r"model.json, names\): got 'encodr', .*closest: 'encoder'.*read_model"):
        read_policy(path, names={"encodr": "rnn"})
    with pytest.raises(SettingError, match=r"got 'rnn' for both 'encoder' and 'decoder'.*next: give one of them"):
        read_policy(path, names={"encoder": "rnn", "decoder": "rnn"})
    with pytest.raises(SettingError, match="got 'decoder' for both 'encoder' and 'decoder'"):
        read_policy(path, names={"encoder": "decoder"})
    for wrong in ({"encoder": 3}, {"encoder": ""}, {3: "rnn"}, ["encoder"]):
        with pytest.raises(SettingError, match=r"allowed: a .*next: pass, for example, names="):
            read_policy(path, names=wrong)  # type: ignore[arg-type]


def test_layers_of_the_same_name_need_the_same_strategy(tmp_path: Path) -> None:
    twins = [layer(name="same"), layer(name="same")]
    assert read_policy(written(tmp_path, network_of(twins))) == Policy(Keep(), overrides={"same": Clip(0.5)})
    path = written(tmp_path, network_of([*twins, layer(name="same", threshold=2)]))
    with pytest.raises(Dl4jFileError, match=r"confs\[2\].layer: got 'same' with .*confs\[1\].layer has the same name"):
        read_policy(path)


def test_an_empty_name_must_be_mapped(tmp_path: Path) -> None:
    path = written(tmp_path, network_of([layer(name="")]))
    with pytest.raises(Dl4jFileError, match=r'confs\[0\].layer: got a layer with an empty name.*names={"":'):
        read_policy(path)
    assert read_policy(path, names={"": "dense"}).strategy_for("dense") == Clip(0.5)


def built(code: str) -> Policy:
    scope: dict[str, Any] = {}
    exec(code, scope)  # noqa: S102 this is the code under test
    policy = scope["policy"]
    assert isinstance(policy, Policy)
    return policy


@pytest.mark.parametrize("file", FILES)
def test_python_builds_the_same_policy(file: str) -> None:
    policy = read_policy(MODELS / file)
    assert built(policy_as_python(policy)) == policy


def test_python_keeps_every_digit_and_every_character() -> None:
    overrides: dict[str | type, object] = {
        Policy.escape('it\'s "*" \\ \n 😀'): Clip(1 / 3, per="param_type"),
        "*/bias": None,
        "b": ClipValue(float("inf")),
        "c": Renormalize(per="model"),
    }
    policy = Policy(Clip(1e-320), overrides=overrides)
    assert built(policy_as_python(policy)) == policy
    with pytest.raises(SettingError, match=r"policy_as_python\(policy\): got the module class int"):
        policy_as_python(Policy(None, overrides={int: None}))


@pytest.mark.parametrize("zipped", [False, True])
def test_files_are_recognized_by_content_not_by_name(tmp_path: Path, *, zipped: bool) -> None:
    text = "\ufeff" + json.dumps(network_of([layer()]), indent=2)
    path = written(tmp_path, zip_of(text) if zipped else text, name="model.json" if zipped else "model.zip")
    assert read_policy(path).strategy_for("first") == Clip(0.5)


def test_ten_thousand_layers_are_read_fast(tmp_path: Path) -> None:
    text = (MODELS / "bidirectional.json").read_text(encoding="utf-8")
    configuration = json.loads(text)
    bidirectional = json.dumps(configuration["confs"][0], indent=2)
    confs = ",".join(bidirectional.replace('"layer0"', f'"block{index}"') for index in range(10_000))
    path = written(tmp_path, zip_of(f'{{"confs": [{confs}]}}'))
    start = time.process_time()
    layers = read_model(path).layers
    seconds = time.process_time() - start
    assert [layers[0].name, layers[-1].name, len(layers)] == ["block0", "block9999", 10_000]
    assert seconds < 5, "a fifth of that on an idle core; quadratic cost would take minutes"
