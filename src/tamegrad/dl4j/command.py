"""The command `tamegrad dl4j`: what a Deeplearning4j model does to its gradients, as a table or as Python."""

import click

from tamegrad.dl4j import policy_as_python, policy_of, read_model

__all__ = ["dl4j"]

_HELP = """Show what a Deeplearning4j model does to the gradients of each layer.

FILE is a saved model (.zip) or its configuration (.json), of MultiLayerNetwork or ComputationGraph, from release 0.9.1
to 1.0.0-M2.1. No Java is needed.
"""

_EPILOG = """\b
Examples:
  tamegrad dl4j model.zip
  tamegrad dl4j model.zip --python > policy.py
"""


@click.command(help=_HELP, epilog=_EPILOG, short_help="Show what a Deeplearning4j model does to the gradients.")
@click.argument("file", metavar="FILE")
@click.option("--python", "as_python", is_flag=True, help="Print the lines of Python that build the policy instead.")
def dl4j(*, file: str, as_python: bool) -> None:
    """Reads a file and prints what it says."""
    model = read_model(file)
    if as_python:
        # Nothing else, so that the output is a program.
        click.echo(policy_as_python(policy_of(model)))
        return
    # Loads rich, for which the help does not wait.
    from tamegrad.dl4j.table import print_model

    print_model(model)
