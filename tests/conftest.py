"""Sets up one thread a test, Triton's interpreter, and the profiles of the property tests.

The profiles draw the same examples in every run: about a hundred or, for `make test-long`, many more.
"""

import os
import signal
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# Small tensors on several threads take longer, and cost all cores; what tests threads sets their number itself.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton reads this when a kernel is defined, so it is set before any test can import one. Nothing else here uses
# Triton. On a machine with a GPU, TRITON_INTERPRET=0 compiles the kernels instead.
os.environ.setdefault("TRITON_INTERPRET", "1")
# JAX reads this when it is imported: sharded trees need several devices.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Compiling takes most of the time of these tests; this makes it a third.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import pytest
from hypothesis import HealthCheck, settings

from support.command import Run
from tamegrad import cli

# A shell makes its background jobs ignore Ctrl-C, and so would the processes of the tests that press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

common = settings(derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("default", common, max_examples=120)
settings.register_profile("long", common, max_examples=5_000)
settings.load_profile("default")


def _is_older(package: str, oldest: tuple[int, int]) -> bool:
    """Returns whether a package is missing, or older than a major and a minor version."""
    try:
        major, minor = version(package).split(".")[:2]
    except PackageNotFoundError:
        return True
    return (int(major), int(minor)) < oldest


# What `make test-oldest` cannot run: sharded models and benchmarks need a newer PyTorch, kernels a newer Triton.
collect_ignore_glob = []
if _is_older("torch", (2, 6)):
    collect_ignore_glob += ["*sharded*", "torch/sharded/*", "support/warm.py", "benchmarks/*"]
if _is_older("jax", (0, 10)):
    # The folder is not called "jax": where JAX is missing, it could be imported in its place.
    collect_ignore_glob += ["jax_trees/*", "ecosystem/test_jax*", "support/jax_contract.py"]
if _is_older("triton", (3, 5)):
    collect_ignore_glob += ["torch/backends/test_gpu*", "support/interpreted.py"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in an empty folder; returns exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def start(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        assert isinstance(exit_.value.code, int)
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return start
