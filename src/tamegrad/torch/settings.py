"""What a user sets, checked once and passed on as one value."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

from tamegrad.errors import SettingError, closest, quoted
from tamegrad.policy import Overrides, Policy, as_policy
from tamegrad.strategies import OnNonfinite, check_on_nonfinite
from tamegrad.torch.sharded.distributed import check_process_groups
from tamegrad.torch.step_log import Sink, StepLog

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["BackendName", "Keywords", "Settings", "checked_state"]

BackendName: TypeAlias = Literal["auto", "cpu", "gpu", "foreach"]


class Keywords(TypedDict, total=False):
    """The keywords that every front door takes; `GradientNormalizer` says what they mean."""

    overrides: Overrides | None
    layers: Sequence[str] | None
    on_nonfinite: OnNonfinite
    backend: BackendName
    process_groups: Sequence["ProcessGroup"]
    sinks: Sequence[Sink]
    log_every: int


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
    log: StepLog = field(default_factory=StepLog)

    @classmethod
    def of(
        cls,
        policy: object,
        *,
        overrides: Overrides | None = None,
        sinks: Sequence[Sink] = (),
        log_every: int = 50,
        **others: Any,  # noqa: ANN401
    ) -> "Settings":
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
        return cls(as_policy(policy, overrides, "policy"), log=StepLog(sinks, log_every), **others)

    def with_policy(self, policy: object) -> "Settings":
        """Returns the same settings with another policy, or a strategy.

        Raises:
            SettingError: If `policy` is neither.
        """
        return replace(self, policy=as_policy(policy, None, "policy"))

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", self.layers or ())
        check_on_nonfinite(self.on_nonfinite)
        check_process_groups(self.process_groups)


def checked_state(state: object) -> Mapping[str, Any]:
    """Refuses anything but the counters that a normalizer's `state_dict` returns.

    Args:
        state: What the user passed.

    Returns:
        The same.

    Raises:
        SettingError: If a counter is missing, unknown or no count.
    """
    given: Mapping[Any, Any] = state if isinstance(state, Mapping) else {}
    match given:
        case {"steps": int(), "skipped_steps": int(), "nonfinite_steps": dict(counts), **others} if not others:
            if all(isinstance(name, str) and isinstance(count, int) for name, count in counts.items()):
                return given
    raise SettingError(
        "load_state_dict(state)",
        got=f"a {type(state).__name__} with the keys {quoted(given)}",
        allowed='what state_dict() of a normalizer returned: "steps", "skipped_steps" and "nonfinite_steps"',
        advice="pass the entry of the checkpoint in which you saved it",
    )
