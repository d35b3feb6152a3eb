import subprocess
import sys
from pathlib import Path

import pytest

from support.command import OPTIONS, Run
from support.processes import run_python
from tamegrad import __version__, cli
from tamegrad.study import command
from tamegrad.study.settings import STRATEGIES

# Options and help


def test_the_options() -> None:
    assert [option for parameter in command.compare.params for option in parameter.opts] == OPTIONS


def test_the_commands() -> None:
    assert list(cli._commands().commands) == ["compare", "dl4j"]


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_help_names_the_commands(run: Run, arguments: tuple[str, ...]) -> None:
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert "compare" in out
    assert "Examples:" in out


def test_help_of_compare_names_all_options_strategies_and_defaults(run: Run) -> None:
    code, out, _ = run("compare", "--help")
    assert code == 0
    words = " ".join(out.split())
    assert all(name in words for name in STRATEGIES)
    assert all(option in words for parameter in command.compare.params for option in parameter.opts)
    assert "[default: 300]" in words
    assert "0.25 for rnn, 2 for lstm" in words
    assert "0.003 for ClipElementWiseAbsoluteValue, 0.5 for ClipL2PerLayer" in words
    assert "[default: tamegrad-compare]" in words
    assert "tamegrad compare --text my-corpus/ --network lstm" in words


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"tamegrad {__version__}\n", "")


def test_help_loads_no_framework() -> None:
    code = (
        "import sys\nfrom tamegrad.cli import main\ntry:\n    main(['compare', '--help'])\nexcept SystemExit:\n"
        "    heavy = {'torch', 'plotly', 'jinja2', 'rich'} & set(sys.modules)\n    assert not heavy, heavy\n"
    )
    run_python(code)


# Errors


def test_an_unknown_command_names_the_closest(run: Run) -> None:
    code, _, err = run("compair")
    assert code == 2
    assert err == (
        "tamegrad: got unknown command 'compair'; allowed: compare, dl4j; closest: 'compare'; next: tamegrad --help\n"
    )


@pytest.mark.parametrize("module", ["click", "rich", "plotly", "jinja2", "torch"])
def test_a_missing_extra_is_named(module: str, tmp_path: Path) -> None:
    code = (
        f"import sys\nsys.modules[{module!r}] = None\n"
        "from tamegrad.cli import main\nmain(['compare', '--steps', '1'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False, timeout=60
    )
    extra = "torch" if module == "torch" else "study"
    assert done.stderr == (
        f"tamegrad: got a Python environment without {module}; allowed: one with the extra '{extra}'; "
        "next: pip install 'tamegrad[torch,study]'\n"
    )
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, "", [])


def test_a_missing_module_that_no_extra_installs_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: list[str]) -> int:
        raise ModuleNotFoundError(name="tamegrad.nothing")

    monkeypatch.setattr(cli, "_run_click", broken)
    with pytest.raises(ModuleNotFoundError):
        cli.main([])
