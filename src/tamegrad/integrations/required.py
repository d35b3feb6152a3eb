"""Says what to install where a trainer's library is missing."""

from importlib.util import find_spec

from tamegrad.errors import MissingExtraError

__all__ = ["require_one_of"]


def require_one_of(packages: tuple[str, ...], *, module: str, install: str) -> None:
    """Refuses to go on without a library; imports none.

    Args:
        packages: The packages of which one is enough.
        module: The module of tamegrad that needs it.
        install: What to install.

    Raises:
        MissingExtraError: If none of them is installed.
    """
    if all(find_spec(package) is None for package in packages):
        raise MissingExtraError(
            module,
            got=f"a Python without {' and '.join(packages)}",
            allowed=f"the package {' or '.join(packages)}",
            advice=f"pip install {install}",
        )
