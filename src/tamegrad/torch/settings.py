"""What a user sets, checked once and passed on as one value."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

from tamegrad.errors import closest, quoted
from tamegrad.policy import Overrides, Policy, as_policy
from tamegrad.strategies import OnNonfinite, check_on_nonfinite
from tamegrad.torch.sharded.distributed import check_process_groups

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["BackendName", "Keywords", "Settings"]

BackendName: TypeAlias = Literal["auto", "cpu", "gpu", "foreach"]


class Keywords(TypedDict, total=False):
    """The keywords that every front door takes; `GradientNormalizer` says what they mean."""

    overrides: Overrides | None
    layers: Sequence[str] | None
    on_nonfinite: OnNonfinite
    backend: BackendName
    process_groups: Sequence["ProcessGroup"]


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a normalizer, as `GradientNormalizer` explains them; what needs the model is checked later.

    Raises:
        SettingError: If one is unknown.
    """

    policy: Policy
    layers: Sequence[str] = ()
    on_nonfinite: OnNonfinite = "keep"
    backend: BackendName = "auto"
    process_groups: Sequence["ProcessGroup"] = ()

    @classmethod
    def of(cls, policy: object, *, overrides: Overrides | None = None, **others: Any) -> "Settings":  # noqa: ANN401
        """Returns the settings that a user passed to a front door: a policy, or what it is made from, and keywords.

        Raises:
            TypeError: If a keyword is unknown; the message names the closest.
            SettingError: If a setting is invalid.
        """
        unknown = next((name for name in others if name not in Keywords.__annotations__), None)
        if unknown is not None:
            known = Keywords.__annotations__
            raise TypeError(
                f"got an unexpected keyword argument {unknown!r}; allowed: {', '.join(known)}; "
                f"closest: {quoted(closest(unknown, known, most=1))}"
            )
        return cls(as_policy(policy, overrides, "policy"), **others)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", self.layers or ())
        check_on_nonfinite(self.on_nonfinite)
        check_process_groups(self.process_groups)
