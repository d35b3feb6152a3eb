import copy
import multiprocessing
import pickle
import pkgutil
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import pytest

import tamegrad
from support.processes import run_python
from tamegrad import (
    Clip,
    NonFiniteGradientError,
    Policy,
    SettingError,
    TamegradError,
    TamegradWarning,
    UnmatchedError,
    normalize,
)
from tamegrad.errors import warn

Call = Callable[[], object]


def called_through(modules: list[str], function: Call) -> Call:
    """Returns a function of the last of these modules, which calls one of the module before it, down to `function`."""
    for module in modules:
        scope: dict[str, Any] = {"__name__": module, "function": function}
        exec(compile("def call():\n    function()", f"<{module}>", "exec"), scope)  # noqa: S102  a module made here
        function = scope["call"]
    return function


# From the innermost call to the outermost.
LIBRARIES = [
    ["tamegrad.torch.attach"],
    ["tamegrad.torch.attach", "torch.optim.optimizer", "torch.optim.adam"],
    ["tamegrad", "torch", "accelerate.optimizer", "contextlib", "lightning.pytorch.loops.optimization.automatic"],
    ["tamegrad.torch.step", "torch.optim.optimizer", "transformers.trainer"],
]


@pytest.mark.parametrize("libraries", LIBRARIES, ids=lambda modules: modules[-1])
@pytest.mark.parametrize("outside", [[], ["torch.distributed.run"], ["another_script", "contextlib"]])
@pytest.mark.parametrize("users", ["__main__", "my_training", "torch_models.train"])
def test_a_warning_points_at_the_innermost_line_of_the_users_code(
    libraries: list[str], users: str, outside: list[str]
) -> None:
    call = called_through([*libraries, users, *outside], partial(warn, "look here"))
    with pytest.warns(TamegradWarning, match="^look here$") as caught:
        call()
    (warning,) = caught
    assert (warning.filename, warning.lineno) == (f"<{users}>", 2)


def test_a_warning_without_a_users_line_points_at_the_outermost_call() -> None:
    code = (
        "__name__ = 'torch'\n"
        "from tamegrad.errors import warn\n"
        "inside = {'__name__': 'lightning', 'warn': warn, 'message': 'look here'}\n"
        "exec(compile('warn(message)', 'inside', 'exec'), inside)"
    )
    assert run_python(code).stderr.splitlines()[0] == "<string>:4: TamegradWarning: look here"


def test_warns_once_a_line_and_can_be_an_error_or_silent() -> None:
    code = "from tamegrad.errors import warn\nfor _ in range(3):\n    warn('look here')\nwarn('look here')"
    lines = run_python(code).stderr.splitlines()
    assert lines == ["<string>:3: TamegradWarning: look here", "<string>:4: TamegradWarning: look here"]
    assert run_python(code, PYTHONWARNINGS="ignore").stderr == ""
    failed = run_python(code, check=False, PYTHONWARNINGS="error")
    assert (failed.returncode, failed.stderr.splitlines()[-1]) == (1, "tamegrad.errors.TamegradWarning: look here")


def test_a_warning_keeps_no_variable_of_the_callers_in_memory() -> None:
    class Activation:
        pass

    def step() -> weakref.ref[Activation]:
        activation = Activation()
        warn("look here")
        return weakref.ref(activation)

    with pytest.warns(TamegradWarning):
        left = step()
    assert left() is None


def subclasses(base: type[Exception]) -> Iterator[type[Exception]]:
    """The class and all classes below it that tamegrad defines."""
    yield base
    for each in base.__subclasses__():
        if each.__module__.startswith("tamegrad."):
            yield from subclasses(each)


for module in pkgutil.walk_packages(tamegrad.__path__, "tamegrad."):
    with suppress(ImportError):  # of an extra that is not installed
        import_module(module.name)

# Classes with a constructor of their own need an example here; all others take what `TamegradError` takes.
EXAMPLES: dict[type[Exception], Exception] = {
    NonFiniteGradientError: NonFiniteGradientError({"rnn.weight_hh_l0": (2, 1, 0)}, ["rnn.l0"]),
    TamegradWarning: TamegradWarning("look here"),
}


def example_of(kind: type[Exception]) -> Exception:
    if kind not in EXAMPLES and issubclass(kind, TamegradError):
        return kind("Clip(threshold=0)", got="0", allowed="a number above 0", advice="use Keep()")
    return EXAMPLES[kind]


class ServerError(SettingError):
    """A user's own error, with a constructor of its own."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__("the server", got=str(status), allowed="200", advice="start it again")


def pickled(protocol: int, error: Exception) -> object:
    return pickle.loads(pickle.dumps(error, protocol))  # noqa: S301  what was pickled here


COPIES: dict[str, Callable[[Exception], object]] = {"copy": copy.copy, "deepcopy": copy.deepcopy}
COPIES |= {f"pickle protocol {number}": partial(pickled, number) for number in range(pickle.HIGHEST_PROTOCOL + 1)}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize(
    "error",
    [ServerError(503), *map(example_of, [*subclasses(TamegradError), *subclasses(TamegradWarning)])],
    ids=lambda error: type(error).__name__,
)
def test_every_error_and_warning_survives_a_copy(error: Exception, copied: Callable[[Exception], Exception]) -> None:
    error.__notes__ = ["in trial 7"]
    again = copied(error)
    assert isinstance(again, Exception)
    assert type(again) is type(error)
    assert (str(again), repr(again), again.args, vars(again)) == (str(error), repr(error), error.args, vars(error))
    assert str(again)


def test_the_classes_are_found() -> None:
    found = {kind.__name__ for kind in subclasses(TamegradError)}
    assert {"SettingError", "UnmatchedError", "NonFiniteGradientError", "MissingExtraError", "Dl4jFileError"} <= found
    assert {name for name in tamegrad.__all__ if name.endswith("Error")} <= found


def test_an_error_reaches_the_parent_of_a_pool_of_processes() -> None:
    gradients = {"out": {"weight": np.array([np.nan, 1.0])}}
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        refused = pool.submit(Clip, -1.0).exception(timeout=60)
        unmatched = pool.submit(normalize, gradients, Policy(Clip(1.0), overrides={"in": None})).exception(timeout=60)
        nonfinite = pool.submit(normalize, gradients, Clip(1.0), on_nonfinite="raise").exception(timeout=60)
    assert isinstance(refused, SettingError)
    assert (refused.where, refused.got) == ("Clip(threshold)", "-1.0")
    assert str(refused).startswith("Clip(threshold): got -1.0; allowed: ")
    assert isinstance(unmatched, UnmatchedError)
    assert isinstance(nonfinite, NonFiniteGradientError)
    assert (nonfinite.counts, nonfinite.layers) == ({"out.weight": (1, 0, 0)}, ("out",))
