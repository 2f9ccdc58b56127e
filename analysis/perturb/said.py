"""Conditions as people write them: "DropTop(1), stage 0, scores"."""

from __future__ import annotations

import ast
from typing import Any

from analysis.perturb.base import POINTS, Perturbation
from analysis.perturb.catalogue import PERTURBATIONS
from analysis.perturb.condition import DOWNSTREAM, Condition
from analysis.perturb.effects import EFFECTS
from analysis.perturb.where import Where
from cartmoe.config import check_choice

KINDS: dict[str, Any] = {"point": POINTS, "effect": EFFECTS, "downstream": DOWNSTREAM}


def condition_from_text(text: str, seed: int = 0) -> Condition:
    """The condition of such a text: a perturbation with its arguments, then, after commas, where it
    acts, at which point, with which effect, and whether later routers replay the clean run.

    Raises `ValueError` for what is none, naming the text and, where there are, the choices.
    """
    first, *rest = _parts(text)
    said: dict[str, Any] = {"where": "all"}
    for part in rest:
        kind = next((kind for kind, words in KINDS.items() if part in words), "where")
        if kind in said and (kind, said[kind]) != ("where", "all"):
            both = f"{said[kind]!r} and {part!r}"
            raise ValueError(f"condition is {text!r}, in which {both} both say its {kind}")
        said[kind] = part
    said["where"] = Where.parse(said["where"])
    return Condition(_perturbation(_parsed(first, text), text), eval_seed=seed, **said)


def _parts(text: str) -> list[str]:
    """Between the commas that stand in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _parsed(part: str, text: str) -> ast.expr:
    try:
        return ast.parse(part, mode="eval").body
    except SyntaxError:
        raise ValueError(
            f"condition is {text!r}; write it like 'DropTop(1)', 'GaussianNoise(sigma=0.5)' or "
            "'DropTop(1), stage 0'"
        ) from None


def _perturbation(node: ast.expr, text: str) -> Perturbation:
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if not isinstance(call.func, ast.Name):
        raise ValueError(f"condition is {text!r}, which begins with no perturbation")
    check_choice("perturbation", call.func.id, PERTURBATIONS)
    cls = PERTURBATIONS[call.func.id]
    given = [_value(argument, text) for argument in call.args]
    named = {word.arg: _value(word.value, text) for word in call.keywords if word.arg}
    if len(named) < len(call.keywords):
        raise ValueError(f"condition is {text!r}, which gives a parameter twice, or none by name")
    try:
        return cls(*given, **named)
    except TypeError as error:
        raise ValueError(f"condition is {text!r}: {error}") from None


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Call | ast.Name):
        return _perturbation(node, text)
    kinds = (ast.Call, ast.Name)
    if isinstance(node, ast.List | ast.Tuple) and any(isinstance(n, kinds) for n in node.elts):
        return tuple(_value(n, text) for n in node.elts)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise ValueError(f"condition is {text!r}: {ast.unparse(node)} is no value") from None
