"""Perturbations that are made of others, or of a function of yours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from torch import Tensor

from analysis.perturb.base import Identity, Perturbation, flat, import_name, parts_of, plain
from analysis.perturb.context import RouterContext
from analysis.perturb.masks import DropTop
from analysis.perturb.source import code_sha256
from cartmoe.fields import Count, declared


def _of_routing(value: Any) -> Any:
    if not isinstance(value, Perturbation) or value.expects == "output":
        raise ValueError("must be a perturbation of routing")
    return value


OfRouting = Annotated[Perturbation, BeforeValidator(_of_routing)]


@declared
class Compose(Perturbation):
    """Several perturbations, one after the other; each takes the decision so far for the clean
    one, and has draws of its own. Those after which there is another decision altogether (all that
    move logits, TopK, Replay) come before those that change one, which they would undo."""

    listed: ClassVar[frozenset[str]] = frozenset({"parts"})
    parts: Annotated[tuple[OfRouting, ...], Field(min_length=1)]

    def __post_init__(self) -> None:
        decided = None
        for part in parts_of(self):
            if isinstance(part, Compose):
                continue
            anew = part.anew or not hasattr(part, "decide")
            if anew and decided is not None and part != Identity():
                raise ValueError(
                    f"parts has {part.label} after {decided.label}, which it would undo: there "
                    "is another decision after it; put it before"
                )
            decided = part if hasattr(part, "decide") else decided

    @property
    def expects(self) -> str:
        """The most that any part expects."""
        kinds = ("none", "weights", "selection")
        return max((part.expects for part in self.parts), key=kinds.index)


@declared
class ResidualNoise(Perturbation):
    """The control that asks whether it is *wrong experts* that hurt, or any change of that size:
    routing stays, and a random direction is added to the layer's output, with the norm, token by
    token, of the change that the perturbation `of` would make there."""

    expects: ClassVar[str] = "output"
    of: OfRouting = DropTop(1)

    @property
    def strength(self) -> float:
        """That of the perturbation whose size it has."""
        return self.of.strength

    @property
    def label(self) -> str:
        """ "ResidualNoise(of=DropTop)"."""
        return f"ResidualNoise(of={flat(self.of.label)})"


@declared
class Custom(Perturbation):
    """A function of yours in a study: (logits_TE, ctx) -> logits_TE, pure.

    function   itself, or where it is, "package.module:name"
    title      what tables call it
    version    part of its identity, as its code is (`perturb.source`); raise it for what that
               cannot tell
    changes    what it must change to be a test: "none", "weights" or "selection"
    """

    function: Callable[[Tensor, RouterContext], Tensor] | str = ""
    title: str = ""
    version: Count = 0
    changes: Literal["none", "weights", "selection"] = "weights"

    def __post_init__(self) -> None:
        if isinstance(self.function, str):
            object.__setattr__(self, "function", import_name(self.function))
        if not callable(self.function):
            raise ValueError(f"function is {self.function!r}; give (logits_TE, ctx) -> logits_TE")
        if not self.title or set(self.title) & set("(),"):
            raise ValueError(f"title is {self.title!r}; it must be a text without '(', ')' or ','")

    @property
    def expects(self) -> str:
        """`changes`."""
        return self.changes

    @property
    def label(self) -> str:
        """The title."""
        return self.title

    def to_dict(self) -> dict[str, Any]:
        """Name, title and version; the function as the name it can be imported by (of a callable
        object, that of its class), and a hash of its code."""
        named = self.function if hasattr(self.function, "__qualname__") else type(self.function)
        function = f"{named.__module__}:{named.__qualname__}"
        code = {"source": code_sha256(self.function)}
        return (
            {"name": "Custom", "function": function}
            | code
            | {name: plain(getattr(self, name)) for name in ("title", "version", "changes")}
        )

    def __call__(self, logits_TE: Tensor, ctx: RouterContext) -> Tensor:
        """What the function returns."""
        assert callable(self.function)
        return self.function(logits_TE, ctx)
