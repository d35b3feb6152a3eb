"""Sets up the libraries before a test imports them: Keras on PyTorch, nothing from the network.

Warnings are errors here too, but for those that a library causes by itself.
"""

import importlib.util
import os
import warnings

import pytest

os.environ["KERAS_BACKEND"] = "torch"
os.environ["HF_HUB_OFFLINE"] = "1"

with warnings.catch_warnings():
    # What a library warns of while it is imported, such as its own use of torch.jit.script, is not about tamegrad.
    warnings.simplefilter("ignore")
    for library in (
        "accelerate",
        "keras",
        "lightning",
        "lightning_fabric",
        "opacus",
        "peft",
        "pytorch_lightning",
        "pytorch_optimizer",
        "schedulefree",
        "torch.distributed.optim",
        "torch_optimizer",
        "transformers",
        "trl",
    ):
        # The older Transformers are tested without the other libraries.
        if importlib.util.find_spec(library.partition(".")[0]) is not None:
            importlib.import_module(library)

FOREIGN_WARNINGS = [
    # Second-order optimizers need the graph of the gradients.
    "ignore:Using backward\\(\\) with create_graph=True:UserWarning",
    # torch_optimizer calls operators of PyTorch by their oldest signatures.
    "ignore:This overload of add.* is deprecated:UserWarning",
    # Opacus registers hooks on modules whose inputs need no gradients.
    "ignore:Full backward hook is firing when gradients:UserWarning",
    # PEFT asks for a property of Transformers by its old name.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    # TRL sets an argument of Transformers by its old name.
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning",
    # Older versions of Transformers and Accelerate use what PyTorch and NumPy have renamed, and load their own pickles.
    "ignore:numpy.core is deprecated:DeprecationWarning",
    "ignore:`torch.cpu.amp.autocast\\(args...\\)` is deprecated:FutureWarning",
    "ignore:Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD detected:UserWarning",
    # Lightning asks PyTorch's tree specifications in a way that PyTorch has deprecated.
    "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning",
]


def pytest_configure(config: pytest.Config) -> None:
    for line in FOREIGN_WARNINGS:
        config.addinivalue_line("filterwarnings", line)
