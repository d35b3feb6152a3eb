"""Imports point downwards: a room may import from itself and from rooms below it, and the core from no framework."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tamegrad

SOURCE = Path(tamegrad.__file__).parent
# From the bottom to the top. A folder is one room, and so is each file that is not in one of these folders.
ROOMS = [
    "tamegrad.errors",
    "tamegrad.strategies",
    "tamegrad.policy",
    "tamegrad.groups",
    "tamegrad.report",
    "tamegrad.ranges",
    "tamegrad.decide",
    "tamegrad.reference",
    "tamegrad",
    "tamegrad.torch.living",
    "tamegrad.torch.memory",
    "tamegrad.torch.sharded",
    "tamegrad.torch.step_log",
    "tamegrad.torch.settings",
    "tamegrad.torch.model",
    "tamegrad.torch.gradients",
    "tamegrad.torch.backends",
    "tamegrad.torch.step",
    "tamegrad.torch.normalizer",
    "tamegrad.torch.optimizers",
    "tamegrad.torch.attach",
    "tamegrad.torch.backward",
    "tamegrad.torch.clip_grad",
    "tamegrad.torch.summary",
    "tamegrad.torch",
    "tamegrad.jax",
    "tamegrad.integrations",
    "tamegrad.streams",
    "tamegrad.terminal",
    "tamegrad.dl4j",
    "tamegrad.study",
    "tamegrad.cli",
    "tamegrad.__main__",
]
CORE = ROOMS[: ROOMS.index("tamegrad") + 1]


def name_of(file: Path) -> str:
    parts = ("tamegrad", *file.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The longest room that the module is or lies in; a package's `__init__` is a room above those of its files."""
    if module in ROOMS:
        return module
    inside = [room for room in ROOMS if room not in {"tamegrad", "tamegrad.torch"} and module.startswith(f"{room}.")]
    assert inside, f"{module} is in no room: add it to ROOMS, where it belongs"
    return max(inside, key=len)


def imports_of(source: str) -> Iterator[str]:
    """Every module that some source imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            files = [f"{node.module}.{alias.name}" for alias in node.names]
            inside = [file for file in files if (SOURCE.parent / file.replace(".", "/")).with_suffix(".py").exists()]
            yield from inside or [node.module]


def upward(module: str, source: str) -> list[str]:
    """The imports of a module that point upwards."""
    own = ROOMS.index(room_of(module))
    inside = [name for name in imports_of(source) if name.split(".")[0] == "tamegrad"]
    return [name for name in inside if ROOMS.index(room_of(name)) > own]


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_point_downwards(file: Path) -> None:
    assert upward(name_of(file), file.read_text(encoding="utf-8")) == []


def test_an_import_that_points_upwards_would_be_seen() -> None:
    assert upward("tamegrad.torch.memory", "def f():\n    from tamegrad.torch.backends import cpu") == [
        "tamegrad.torch.backends"
    ]
    assert upward("tamegrad.decide", "import tamegrad.torch.step") == ["tamegrad.torch.step"]


@pytest.mark.parametrize("file", [file for file in FILES if room_of(name_of(file)) in CORE], ids=name_of)
def test_the_core_imports_numpy_alone(file: Path) -> None:
    frameworks = {"torch", "jax", "numba", "triton", "click", "rich", "plotly", "jinja2"}
    roots = {name.split(".")[0] for name in imports_of(file.read_text(encoding="utf-8"))}
    assert not roots & frameworks
