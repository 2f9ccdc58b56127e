"""What stands in the place of a module's own forward, and calls it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from analysis.adapters.base import Experts, ExpertsFunction
from cartmoe.hooks import Hook, RouterSite
from cartmoe.routing import Routing


class Forward(Hook):
    """Stands where an instance's `forward` does.

    stand_in   is called with that forward, and the arguments
    own        that forward
    before     the same where the instance had it of its own, None for its class's: what it has
               again at the end, and what a copy of the module has
    """

    def __init__(self, stand_in: Callable, module: nn.Module):
        super().__init__(partial(stand_in, module.forward))
        self.module, self.own = module, module.forward
        self.before = vars(module).get("forward")

    def enter(self) -> None:
        """From now on it stands there."""
        self.module.forward = self  # type: ignore[method-assign]

    def leave(self) -> None:
        """The module is as it was."""
        del self.module.forward
        if self.before is not None:
            self.module.forward = self.before  # type: ignore[method-assign]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.check()
        return self.fn(*args, **kwargs)

    def __reduce__(self):
        return _own_forward, (self.module, self.before)


def _own_forward(module: nn.Module, before: Callable | None) -> Callable:
    """What a copy of the module has in its place."""
    return before or type(module).forward.__get__(module)


def answer(
    fn: ExpertsFunction, site: RouterSite, own: Experts, x_TD: Tensor, routing: Routing
) -> Tensor:
    """What the function says that the experts give, or what they give."""
    output_TD = fn(x_TD, routing, site, own)
    return own(x_TD, routing) if output_TD is None else output_TD
