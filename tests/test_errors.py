import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from support.processes import run_python
from tamegrad import TamegradWarning
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
