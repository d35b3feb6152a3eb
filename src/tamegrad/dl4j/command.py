"""The command `tamegrad dl4j`: what a Deeplearning4j model does to its gradients, as a table or as Python."""

import click

from tamegrad.dl4j import policy_as_python, policy_of, read_model
from tamegrad.errors import SettingError

__all__ = ["dl4j"]

_HELP = """Show what a Deeplearning4j model does to the gradients of each layer.

FILE is a MultiLayerNetwork or ComputationGraph of release 0.9.1 to 1.0.0-M2.1: a saved model (.zip) or its
configuration (.json). No Java is needed.
"""

_EPILOG = """\b
Examples:
  tamegrad dl4j model.zip
  tamegrad dl4j model.zip --python > policy.py
"""


@click.command(help=_HELP, epilog=_EPILOG, short_help="Show what a Deeplearning4j model does to its gradients.")
@click.argument("file", metavar="FILE")
@click.option("--python", "as_python", is_flag=True, help="Print Python code that builds the policy instead.")
def dl4j(*, file: str, as_python: bool) -> None:
    """Reads a file and prints its layers or its policy."""
    if not file:  # pathlib takes it for the current folder
        raise SettingError(
            "tamegrad dl4j", got="''", allowed="the path of a file", advice="pass a saved model or its configuration"
        )
    model = read_model(file)
    if as_python:
        # Nothing else, so that the output is valid Python.
        click.echo(policy_as_python(policy_of(model)))
        return
    # Imported late, because it loads rich: help comes at once.
    from tamegrad.dl4j.table import print_model

    print_model(model)
