"""For JAX: `normalize_gradients`, an optax transformation that chains before any optimizer."""

try:
    import jax  # noqa: F401  only to say which extra is missing
    import optax  # noqa: F401
except ModuleNotFoundError as error:
    from tamegrad.errors import MissingExtraError

    raise MissingExtraError(
        "tamegrad.jax",
        got=f"a Python without {error.name}",
        allowed="JAX and optax",
        advice="pip install 'tamegrad[jax]'",
    ) from error

from tamegrad.jax.state import NormalizeState, report_of
from tamegrad.jax.transformation import normalize_gradients, plan_of

__all__ = ["NormalizeState", "normalize_gradients", "plan_of", "report_of"]
