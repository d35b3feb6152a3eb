"""A trainer's module without the trainer says what to install."""

import pytest

from support.processes import run_python


@pytest.mark.parametrize(
    ("module", "missing", "install"),
    [
        ("lightning", ["lightning", "pytorch_lightning"], "pip install lightning"),
        ("transformers", ["transformers"], "pip install transformers accelerate"),
    ],
)
def test_says_what_to_install(module: str, missing: list[str], install: str) -> None:
    code = f"import sys; sys.modules |= dict.fromkeys({missing}); import tamegrad.integrations.{module}"
    last = run_python(code, check=False).stderr.splitlines()[-1]
    assert "MissingExtraError" in last
    assert install in last
