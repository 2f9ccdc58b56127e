"""A router's own forward, watched, or told what its logits, scores or choice are.

Whatever a model does between logits and weights (bias, groups, softcap, scale) stays its own code:
nothing of it is written again here. Shapes: T tokens, K slots, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# fmt: off
LINEAR = frozenset({
    F.linear, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.einsum,
    Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.addmm, Tensor.__matmul__,
})
SIGMOID = frozenset({F.sigmoid, torch.sigmoid, Tensor.sigmoid})
SCORE = SIGMOID | {F.softmax, torch.softmax, Tensor.softmax, torch.sqrt, Tensor.sqrt}
CHOICE = frozenset({torch.topk, Tensor.topk})
# fmt: on


class Op(NamedTuple):
    """An operation that was seen, and the last dimension of what it gives, or chooses from."""

    function: Callable
    width: int


class Roles(NamedTuple):
    """Which of a router's operations, counted among those of the three kinds, is which.

    num_ops     in one forward
    logits      gives the logits
    scores      makes scores of all experts; None where weights of the chosen are all it makes
    choice      chooses the experts; None where that is no top-k
    by_sigmoid  how it makes weights of the chosen where it makes no scores: else by softmax
    """

    num_ops: int
    logits: int
    scores: int | None
    choice: int | None
    by_sigmoid: bool

    @classmethod
    def of(cls, ops: Sequence[Op], num_experts: int) -> Roles | None:
        """None where none of the operations can give logits of at least so many experts."""
        chosen = [i for i, op in enumerate(ops) if op.function in CHOICE]
        choice = chosen[-1] if chosen else None
        width = num_experts if choice is None else ops[choice].width

        def numbers(kind: frozenset, after: int) -> list[int]:
            stop = len(ops) if choice is None else choice
            return [
                i for i in range(after, stop) if ops[i].function in kind and ops[i].width == width
            ]

        logits = numbers(LINEAR, 0)
        if not logits or width < num_experts:
            return None
        scores = [] if choice is None else numbers(SCORE, logits[-1])
        weighing = [] if choice is None or scores else [op.function for op in ops[choice:]]
        by_sigmoid = any(function in SIGMOID for function in weighing)
        return cls(len(ops), logits[-1], scores[-1] if scores else None, choice, by_sigmoid)


class Watching(TorchFunctionMode):
    """Within the block, notes operations of the three kinds; last: the number of the last linear
    one in these modules, None if there was none."""

    def __init__(self, inside: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.last: int | None = None
        self.inside, self.handles = inside, ExitStack()

    def __enter__(self):
        for module in self.inside:
            self.handles.callback(module.register_forward_hook(self._leaves).remove)
        return super().__enter__()

    def __exit__(self, *exception):
        self.handles.close()
        return super().__exit__(*exception)

    def _leaves(self, *_: Any) -> None:
        if self.last is None:  # a block is run more than once
            linear = [i for i, op in enumerate(self.ops) if op.function in LINEAR]
            self.last = linear[-1] if linear else None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in CHOICE or func in LINEAR or func in SCORE:
            seen = args[0] if func in CHOICE else result
            self.ops.append(Op(func, seen.shape[-1] if seen.ndim else 0))
        return result


class Stop(Exception):
    """Ends a router's forward where what was wanted of it is known."""


class Tap(TorchFunctionMode):
    """Within the block, which is one forward of a router, its operations are watched or replaced.

    logits_TE     in place of what its logits operation gives; an expert whose logit is -inf is not
                  chosen with a weight, whatever comes behind
    scores_TE     in place of its scores; likewise for a score of 0
    ids_TK, k     in place of what it chooses; how many it chooses
    until_logits  raises `Stop` behind them

    Then `logits`, `scores`, `choosing` (what the choice is made from) and `values` (those of the
    chosen) are what the router had, in its own shapes and dtypes; `never_TE` what was masked.
    """

    def __init__(
        self,
        roles: Roles,
        *,
        logits_TE: Tensor | None = None,
        scores_TE: Tensor | None = None,
        ids_TK: Tensor | None = None,
        k: int | None = None,
        until_logits: bool = False,
    ):
        super().__init__()
        self.roles, self.until_logits, self.count = roles, until_logits, 0
        self.new_logits_TE, self.new_scores_TE = logits_TE, scores_TE
        self.ids_TK, self.k = ids_TK, k
        self.logits: Any = None
        self.scores: Any = None
        self.choosing: Any = None
        self.values: Any = None
        self.never_TE: Any = None
        if scores_TE is not None:
            self.never_TE = scores_TE == 0
        elif logits_TE is not None:
            self.never_TE = logits_TE == -torch.inf

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in LINEAR and func not in SCORE and func not in CHOICE:
            return func(*args, **kwargs)
        # A block that keeps its experts in a list is run more than once for one decision.
        number, roles = self.count % self.roles.num_ops, self.roles
        self.count += 1
        if number == roles.logits:
            return self._logits(func, args, kwargs)
        if number == roles.scores:
            return self._scores(func, args, kwargs)
        if number == roles.choice:
            return self._choice(func, args, kwargs)
        return func(*args, **kwargs)

    def check(self, name: str) -> None:
        """Raise `RuntimeError` unless the forward did what it did when the model was attached."""
        if self.count != self.roles.num_ops:
            raise RuntimeError(
                f"{name} ran {self.count} operations where it had {self.roles.num_ops} when the "
                "model was attached: its code was changed since, or depends on its input"
            )

    def _logits(self, func, args, kwargs) -> Tensor:
        if self.new_logits_TE is None:
            self.logits = func(*args, **kwargs)
        else:
            dtype, shape = _made(func, args, kwargs)
            self.logits = self.new_logits_TE.to(dtype).view(shape)
        if self.until_logits:
            raise Stop
        return self.logits

    def _scores(self, func, args, kwargs) -> Tensor:
        if self.new_scores_TE is not None:
            own = func(*args, **kwargs)
            self.scores = self.new_scores_TE.to(own.dtype).view(own.shape)
        elif self.never_TE is None:
            self.scores = func(*args, **kwargs)
        else:  # a softcap makes a finite number of -inf, and a softmax of nothing is NaN
            never = self.never_TE.view(args[0].shape)
            scores = func(args[0].masked_fill(never, -torch.inf), *args[1:], **kwargs)
            self.scores = scores.masked_fill(never, 0)
        return self.scores

    def _choice(self, func, args, kwargs) -> Any:
        given, rest = args[0], args[1:]
        self.choosing = given
        if self.never_TE is not None:  # a bias lifts a score of 0, and masked groups may have 0 too
            self.choosing = given.masked_fill(self.never_TE.view(given.shape), -torch.inf)
        if self.k is not None:
            rest = (self.k, *rest[1:]) if rest else rest
            kwargs = kwargs | ({"k": self.k} if "k" in kwargs else {})
        if self.ids_TK is not None:
            ids = self.ids_TK.view(*given.shape[:-1], -1)
        else:
            ids = func(self.choosing, *rest, **kwargs).indices
        self.values = self.choosing.gather(-1, ids)
        # The score of a masked expert is 0: it has a sum with others, as -inf has not.
        worth = self.choosing if self.roles.scores is None else given
        return torch.return_types.topk((worth.gather(-1, ids), ids))


def _made(func: Callable, args: tuple, kwargs: dict) -> tuple[torch.dtype, torch.Size]:
    """Dtype and shape of what an operation gives, without it where that is easily told."""
    if func is F.linear and len(args) > 1:
        x, weight = args[:2]
        if not torch.is_autocast_enabled(x.device.type):
            return x.dtype, torch.Size((*x.shape[:-1], len(weight)))
    result = func(*args, **kwargs)
    return result.dtype, result.shape
