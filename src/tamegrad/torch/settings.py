"""What a user sets, checked once and passed on as one value."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from tamegrad.policy import Overrides, Policy, as_policy
from tamegrad.strategies import OnNonfinite, check_on_nonfinite
from tamegrad.torch.backends import BackendName
from tamegrad.torch.sharded.distributed import check_process_groups

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Keywords", "Settings"]


class Keywords(TypedDict, total=False):
    """The keywords that every front door takes; `Settings` says what they mean and what they default to."""

    overrides: Overrides | None
    layers: Sequence[str] | None
    on_nonfinite: OnNonfinite
    backend: BackendName
    process_groups: Sequence["ProcessGroup"]


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a normalizer.

    Args:
        policy: Which layer gets which strategy.
        layers: Globs on module paths: each module that matches is one layer with all below it.
        on_nonfinite: What happens to a group with NaN or infinity.
        backend: `"auto"`, or the backend to use.
        process_groups: For a pipeline: groups with one rank of every stage.
    """

    policy: Policy
    layers: Sequence[str]
    on_nonfinite: OnNonfinite
    backend: BackendName
    process_groups: tuple["ProcessGroup", ...]

    @classmethod
    def of(
        cls,
        policy: object,
        *,
        overrides: Overrides | None = None,
        layers: Sequence[str] | None = None,
        on_nonfinite: OnNonfinite = "keep",
        backend: BackendName = "auto",
        process_groups: Sequence["ProcessGroup"] = (),
    ) -> "Settings":
        """Checks what a user passed to a front door.

        Args:
            policy: A `Policy`, a strategy, a member of `GradientNormalization`, or None for `Keep()`.
            overrides: As in `Policy`; only beside a strategy.
            layers: As above.
            on_nonfinite: As above.
            backend: As above.
            process_groups: As above.

        Returns:
            The settings.

        Raises:
            SettingError: If one is unknown. What depends on the model is checked when the plan is made.
        """
        check_on_nonfinite(on_nonfinite)
        check_process_groups(process_groups)
        return cls(
            as_policy(policy, overrides, "policy"), layers or (), on_nonfinite, backend, tuple(process_groups)
        )
