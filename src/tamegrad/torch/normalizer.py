"""The four steps for a PyTorch model: measure, reduce, decide, apply."""

from collections.abc import Iterable, Sequence

import torch
from tamegrad.errors import NonFiniteGradientError, SettingError
from tamegrad.groups import Plan, make_plan
from tamegrad.policy import Overrides, as_policy
from tamegrad.report import Report
from tamegrad.strategies import GradientNormalization, OnNonfinite, check_on_nonfinite
from tamegrad.torch.decide import Decision, Thresholds, decide
from tamegrad.torch.kernels import BACKENDS, BackendName, choose
from tamegrad.torch.layers import find_layers
from torch import Tensor, nn

__all__ = ["GradientNormalizer", "normalize_grad_"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class GradientNormalizer:
    """Normalizes the gradients of a model in place, whenever `normalize_` is called.

    Args:
        model: The model; its layers are the modules that own parameters.
        policy: A `Policy`, a strategy, or a member of `GradientNormalization` (threshold 1.0).
        overrides: Strategies for some layers, as in `Policy`; only beside a strategy.
        layers: Globs on module paths: each module that matches is one layer with all below it.
        parameters: The parameters to normalize, where not all of the model's.
        on_nonfinite: What happens to a group with NaN or infinity. `"keep"` leaves it as it is, `"zero"` makes it zero,
            and other groups are normalized as ever; `"skip"` leaves all groups as they are, `"raise"` raises. The last
            two read the device once a step.
        backend: `"auto"`, or the backend to use.

    Attributes:
        plan: Every layer, its parameter types, its strategy.
        backend: The backend that is used.
        report: What the last step did; None before the first.

    Raises:
        SettingError: If a setting is unknown or there is no parameter to normalize.
        UnmatchedError: If an override or a pattern of `layers` matches nothing; the message names the closest.

    Example:
        >>> import torch
        >>> from tamegrad import Clip
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> normalizer = GradientNormalizer(model, Clip(1.0))
        >>> normalizer.normalize_()["(root)"].norm
        5.0
        >>> model.weight.grad
        tensor([[0.6000, 0.8000]])
    """

    def __init__(
        self,
        model: nn.Module,
        policy: object,
        *,
        overrides: Overrides | None = None,
        layers: Sequence[str] | None = None,
        parameters: Iterable[nn.Parameter] | None = None,
        on_nonfinite: OnNonfinite = "keep",
        backend: BackendName = "auto",
    ) -> None:
        check_on_nonfinite(on_nonfinite)
        whole = find_layers(model, layers or ())
        chosen = whole if parameters is None else whole.restricted_to(parameters)
        self.plan: Plan = make_plan(chosen.layers, as_policy(policy, overrides, "policy"), known=whole.layers)
        self.backend: str = choose(backend)
        self.report: Report[Tensor] | None = None
        self._parameters = chosen.parameters
        self._thresholds = Thresholds.of(self.plan)
        self._on_nonfinite = on_nonfinite

    @torch.no_grad()
    def normalize_(self) -> Report[Tensor]:
        """Normalizes the gradients that the parameters have now, in place.

        A parameter without a gradient counts as nothing; a group without any has norm 0.

        Returns:
            What was done; also kept as `report`.

        Raises:
            SettingError: If a gradient is of a kind that cannot be normalized.
            NonFiniteGradientError: If a gradient is not finite under `on_nonfinite="raise"`. No gradient was changed.
        """
        gradients = self._gradients()
        kernels = BACKENDS[self.backend]
        table = kernels.measure(gradients, self.plan)
        self._thresholds = self._thresholds.to(table.device)
        decision = decide(table, self._thresholds, self._on_nonfinite)
        # Reading the device is what "keep" and "zero" spare.
        stopped = self._on_nonfinite in {"skip", "raise"} and bool(decision.nonfinite.any())
        if stopped and self._on_nonfinite == "raise":
            raise self._nonfinite_error(gradients)
        if not stopped:
            kernels.apply_(gradients, self.plan, decision)
        self.report = _report(self.plan, decision, skipped=stopped)
        return self.report

    def _gradients(self) -> list[Tensor | None]:
        """Collects the gradients in the order of the plan, one that two parameters share only once."""
        seen: set[int] = set()
        gradients: list[Tensor | None] = []
        for parameter, entry in zip(self._parameters, self.plan.parameters, strict=True):
            gradient = parameter.grad
            if gradient is not None and id(gradient) in seen:
                gradient = None
            if gradient is not None:
                _check_kind(entry.name, gradient)
                seen.add(id(gradient))
            gradients.append(gradient)
        return gradients

    def _nonfinite_error(self, gradients: Sequence[Tensor | None]) -> NonFiniteGradientError:
        counts = {}
        for entry, gradient in zip(self.plan.parameters, gradients, strict=True):
            if gradient is not None and not gradient.isfinite().all():
                kinds = gradient.isnan(), gradient.isposinf(), gradient.isneginf()
                nan, plus, minus = (int(kind.sum()) for kind in kinds)
                counts[entry.name] = nan, plus, minus
        return NonFiniteGradientError(counts, self.plan.layers_of(counts))


def normalize_grad_(
    model: nn.Module,
    policy: object,
    *,
    threshold: float | None = None,
    overrides: Overrides | None = None,
    layers: Sequence[str] | None = None,
    on_nonfinite: OnNonfinite = "keep",
    backend: BackendName = "auto",
) -> Report[Tensor]:
    """Normalizes the gradients of a model once, now, in place.

    Args:
        model: The model.
        policy: A `Policy`, a strategy, or a member of `GradientNormalization`.
        threshold: The threshold for a member of `GradientNormalization` (1.0 if not given); strategies have their own.
        overrides: As in `GradientNormalizer`.
        layers: As in `GradientNormalizer`.
        on_nonfinite: As in `GradientNormalizer`.
        backend: As in `GradientNormalizer`.

    Returns:
        What was done.

    Raises:
        SettingError: As `GradientNormalizer` does, and if a threshold stands beside a strategy or a policy.
        UnmatchedError: As `GradientNormalizer` does.
        NonFiniteGradientError: As `GradientNormalizer.normalize_` does.

    Example:
        >>> import torch
        >>> from tamegrad import GradientNormalization
        >>> model = torch.nn.Linear(2, 1)
        >>> model(torch.ones(4, 2)).sum().backward()
        >>> report = normalize_grad_(model, GradientNormalization.CLIP_L2_PER_LAYER, threshold=0.5)
        >>> report["(root)"].norm_after
        0.5
    """
    if threshold is not None:
        if not isinstance(policy, GradientNormalization):
            raise SettingError(
                "normalize_grad_(threshold)",
                got=f"{threshold!r} together with {policy!r}, which has thresholds of its own",
                allowed="threshold= beside a member of GradientNormalization only",
                advice="leave threshold= out, or build the strategy with it: Clip(threshold)",
            )
        policy = policy(threshold)
    normalizer = GradientNormalizer(
        model, policy, overrides=overrides, layers=layers, on_nonfinite=on_nonfinite, backend=backend
    )
    return normalizer.normalize_()


def _check_kind(name: str, gradient: Tensor) -> None:
    if gradient.layout != torch.strided or gradient.dtype not in DTYPES:
        raise SettingError(
            f"gradient of {name}",
            got=f"{gradient.dtype} in the layout {gradient.layout}",
            allowed="dense gradients of float16, bfloat16, float32 or float64",
            advice="normalize the other parameters only: parameters=[...], or an optimizer of their own",
        )


def _report(plan: Plan, decision: Decision, *, skipped: bool) -> Report[Tensor]:
    return Report(
        groups=tuple(group.name for group in plan.groups),
        norms=decision.norms,
        scales=torch.ones_like(decision.scales) if skipped else decision.scales,
        norms_after=decision.norms if skipped else decision.norms_after,
        clipped=torch.zeros_like(decision.clipped) if skipped else decision.clipped,
        nonfinite=decision.nonfinite,
        total_norm=decision.total_norm,
        skipped=skipped,
    )
