"""`import tamegrad` loads no framework; and the check that says so would notice if it did."""

import pytest

from support.processes import run_python

FRAMEWORKS = ("torch", "jax", "click", "plotly")


def frameworks_loaded_by(code: str) -> list[str]:
    """Runs some code in a fresh interpreter and returns which frameworks it left loaded."""
    probe = f"{code}\nimport sys\nprint(*(name for name in {FRAMEWORKS!r} if name in sys.modules))"
    done = run_python(probe)
    return done.stdout.split()


@pytest.mark.parametrize("module", ["tamegrad", "tamegrad.reference", "tamegrad.cli"])
def test_loads_no_framework(module: str) -> None:
    assert frameworks_loaded_by(f"import {module}") == []


def test_would_notice_a_framework() -> None:
    assert frameworks_loaded_by("import tamegrad, torch") == ["torch"]


def test_says_which_extra_is_missing_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None\nimport tamegrad.torch"
    done = run_python(code, check=False)
    assert "pip install 'tamegrad[torch]'" in done.stderr.splitlines()[-1]
