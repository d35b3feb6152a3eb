"""Trains a flax model on scikit-learn's handwritten digits, clipped per layer, and draws the norms of its layers.

pip install 'tamegrad[jax]' flax scikit-learn matplotlib
python examples/jax_digits.py norms.png
"""

import sys

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from tamegrad import Clip
from tamegrad.jax import normalize_gradients, report_of

mpl.use("Agg")
from matplotlib import pyplot as plt


@nnx.jit
def train_step(model: nnx.Module, optimizer: nnx.Optimizer, images: jnp.ndarray, labels: jnp.ndarray) -> jnp.ndarray:
    """Takes one step, and returns the loss."""

    def loss_of(model: nnx.Module) -> jnp.ndarray:
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


def main(picture: str, steps: int = 300) -> float:
    """Trains, draws the norms before and after clipping, and returns the accuracy on images that were held out."""
    digits = load_digits()
    images, held_out, labels, held_out_labels = train_test_split(
        digits.data.astype(np.float32) / 16, digits.target, test_size=0.25, random_state=0
    )
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(64, 64, rngs=rngs), nnx.relu, nnx.Linear(64, 64, rngs=rngs), nnx.relu, nnx.Linear(64, 10, rngs=rngs)
    )
    transformation = optax.chain(normalize_gradients(Clip(0.2)), optax.sgd(0.3, momentum=0.9))
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)

    reports = []
    random = np.random.default_rng(0)
    for _ in range(steps):
        batch = random.integers(len(images), size=64)
        train_step(model, optimizer, images[batch], labels[batch])
        reports.append(report_of(optimizer.opt_state).rows())

    figure, axes = plt.subplots(figsize=(8, 4))
    for index, row in enumerate(reports[0]):
        (line,) = axes.plot([rows[index].norm for rows in reports], label=row.name)
        axes.plot([rows[index].norm_after for rows in reports], color=line.get_color(), linestyle=":")
    axes.set(yscale="log", xlabel="step", ylabel="norm of the gradient", title="Dotted: after Clip(0.2) per layer")
    axes.legend()
    figure.savefig(picture, bbox_inches="tight")
    plt.close(figure)
    return float((model(held_out).argmax(-1) == held_out_labels).mean())


if __name__ == "__main__":
    print(f"accuracy {main(sys.argv[1] if len(sys.argv) > 1 else 'norms.png'):.3f}")
