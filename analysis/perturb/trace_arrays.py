"""Recorded routing as serving engines return it: arrays (tokens, layers, slots) a sequence.

Shapes: N tokens, P positions of the middle axis, L those of them that are kept, K slots.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Literal, get_args

import numpy as np
import torch

from analysis.perturb.context import Tokens
from analysis.perturb.trace_files import MAX_EXPERTS, Batch, site_of
from cartmoe.config import check_choice, check_whole
from cartmoe.hooks import RouterSite

Uncaptured = Literal["refuse", "leave out"]
EXACT = {"bfloat16": 2**8, "float16": 2**11}  # up to which a type holds every whole number
GIVE = "give an array (tokens, layers, K) for each sequence"


def read_arrays(
    routed_experts: Iterable[Any],
    sequence_ids: Iterable[int],
    places: Sequence[tuple[int, int] | None] | None,
    num_experts: int | None,
    weights: Iterable[Any] | None,
    uncaptured: Uncaptured,
) -> tuple[list[RouterSite], Iterator[Batch]]:
    """The sites, and a batch a sequence. The parameters are those of `Trace.from_arrays`, and it
    raises as that does, of all but the first array when it comes to them."""
    check_choice("uncaptured", uncaptured, get_args(Uncaptured))
    arrays = iter(routed_experts)
    first: Any = next(arrays, None)
    ids_NPK = _joined("routed_experts", 0, first)
    if ids_NPK.ndim != 3:
        what = f"{type(first).__name__} of shape {np.shape(first)}"
        raise ValueError(f"routed_experts has {what} first; {GIVE}")
    _, positions, slots = ids_NPK.shape
    if num_experts is not None:
        num_experts = check_whole("num_experts", num_experts, 1)
    if places is None:
        places = [(p, 0) if captured else None for p, captured in enumerate(_captured(ids_NPK))]
    places = [_place(place) for place in places]
    kept = [p for p, place in enumerate(places) if place is not None]
    sites = [site_of(*place, slots, num_experts) for place in places if place is not None]
    if len(places) != positions or len({s.place for s in sites}) != len(sites) or not sites:
        raise ValueError(
            f"places is {places!r}; give a different (layer, stage) for each of the {positions} "
            "positions of the middle axis, None for one to leave out"
        )

    def batches() -> Iterator[Batch]:
        ids, own = iter(sequence_ids), None if weights is None else iter(weights)
        number = -1
        for number, array in enumerate(chain([first], arrays)):
            shape = (positions, slots)
            yield _batch(number, array, shape, ids, own, kept, sites, uncaptured == "leave out")
        for name, rest in {"sequence_ids": ids, "weights": own or iter(())}.items():
            if next(rest, None) is not None:
                raise ValueError(f"{name} has more than the {number + 1} of routed_experts")

    return sites, batches()


def _place(place: Any) -> tuple[int, int] | None:
    try:
        layer, stage = (0, 0) if place is None else place
    except (TypeError, ValueError):
        raise ValueError(f"places has {place!r}; give (layer, stage), or None") from None
    at = check_whole("layer of places", layer, 0), check_whole("stage of places", stage, 0)
    return None if place is None else at


def _captured(ids_NPK: np.ndarray) -> list[bool]:
    """Which positions have a decision, unless none has; a warning names the others."""
    empty_P: Any = _uncaptured(ids_NPK).all(0)
    if not empty_P.any() or empty_P.all():
        return [True] * len(empty_P)
    layers = ", ".join(map(str, np.flatnonzero(empty_P)))
    warnings.warn(
        f"layers {layers} have no decision in the first of routed_experts: they are left out, as "
        "dense ones. Give places if they are none",
        stacklevel=4,
    )
    return (~empty_P).tolist()


def _batch(
    number: int,
    array: Any,
    shape: tuple[int, int],
    sequence_ids: Iterator[int],
    weights: Iterator[Any] | None,
    kept: list[int],
    sites: Sequence[RouterSite],
    leave_out: bool,
) -> Batch:
    """Of one sequence, the positions that are kept."""
    ids_NPK, own_NPK = _joined("routed_experts", number, array), None
    if ids_NPK.ndim != 3 or ids_NPK.shape[1:] != shape:
        raise ValueError(
            f"routed_experts has for sequence {number} {ids_NPK.dtype} of shape {ids_NPK.shape}; "
            f"it must be whole numbers of shape (tokens, {shape[0]}, {shape[1]})"
        )
    broken_NPK = np.isfinite(ids_NPK) & (ids_NPK != np.trunc(ids_NPK))
    if broken_NPK.any():
        raise ValueError(
            f"routed_experts has for sequence {number} ids that are not whole numbers, "
            f"{ids_NPK[broken_NPK][0]} first; weights stand in an array of their own, and a tuple "
            "holds parts of a sequence"
        )
    if weights is not None:
        own_NPK = _joined("weights", number, next(weights, None))
        if own_NPK.shape != ids_NPK.shape:
            raise ValueError(
                f"weights has shape {own_NPK.shape} for sequence {number}; routed_experts has "
                f"{ids_NPK.shape}"
            )
    id = next(sequence_ids, None)
    if id is None:
        raise ValueError(f"sequence_ids has only {number}; routed_experts has more sequences")
    ids_NLK = ids_NPK[:, kept]
    own_NLK = None if own_NPK is None else own_NPK[:, kept].astype(np.float32)
    lost_NL = _uncaptured(ids_NLK, own_NLK)
    if lost_NL.any() and not leave_out:
        raise ValueError(_no_decision(number, lost_NL, sites))
    ids_NLK = _experts(number, ids_NLK, lost_NL, sites[0].num_experts or MAX_EXPERTS)
    own = None if own_NLK is None else list(_weights(number, own_NLK, lost_NL).swapaxes(0, 1))
    return Batch(
        [_number(number, id)], [len(ids_NLK)], None, list(ids_NLK.swapaxes(0, 1)), own, None
    )


def _number(number: int, id: Any) -> int:
    """A sequence's id as 64 bits."""
    try:
        whole = operator.index(id)
    except TypeError:
        whole = 2**63
    if not -(2**63) <= whole < 2**63:
        raise ValueError(f"sequence_ids has {id!r} for sequence {number}; give whole numbers")
    return whole


def _joined(name: str, number: int, given: Any) -> np.ndarray:
    """One array of numbers, from one or from a tuple of parts, whatever library it is of."""
    parts = given if isinstance(given, tuple) else (given,)
    try:
        arrays = [_array(part, exact=name == "routed_experts") for part in parts]
        joined = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} has for sequence {number} no array: {error}; {GIVE}") from None
    if joined.dtype.kind not in "iuf" and given is not None:
        raise ValueError(f"{name} has for sequence {number} {joined.dtype}; {GIVE}")
    return joined


def _array(part: Any, exact: bool) -> np.ndarray:
    """Any library's array as one of numpy's, which has no bf16. Raises `ValueError` for a mask, and
    if it must be exact for numbers so large that their type has not all of them."""
    if np.ma.isMaskedArray(part):
        raise ValueError("it is masked: fill what was not captured with -1")
    largest = EXACT.get(str(getattr(part, "dtype", "")).removeprefix("torch."))
    if isinstance(part, torch.Tensor):
        part = part.detach().cpu()
        part = part.float() if part.dtype == torch.bfloat16 else part
    array = np.asarray(part)
    array = array.astype(np.float32) if array.dtype.name == "bfloat16" else array
    if exact and largest and (np.abs(array) > largest).any():
        raise ValueError(f"its type holds whole numbers up to {largest}, and there are larger ones")
    return array


def _uncaptured(ids_NLK: np.ndarray, weights_NLK: np.ndarray | None = None) -> np.ndarray:
    """(N, L) bool: where no router can have decided this."""
    sorted_NLK = np.sort(ids_NLK, -1)
    lost_NL = (sorted_NLK[..., 1:] == sorted_NLK[..., :-1]).any(-1)
    lost_NL |= np.isnan(ids_NLK).any(-1) | (ids_NLK == -1).any(-1)
    if weights_NLK is not None:
        lost_NL |= np.isnan(weights_NLK).any(-1) | (weights_NLK == 0).all(-1)
    return lost_NL


def _no_decision(number: int, lost_NL: np.ndarray, sites: Sequence[RouterSite]) -> str:
    worst = int(lost_NL.sum(0).argmax())
    token = int(lost_NL[:, worst].argmax())
    return (
        f"routed_experts has for sequence {number} no decision for {lost_NL[:, worst].sum()} of "
        f"{len(lost_NL)} tokens at {sites[worst]}, token {token} first: an expert twice, as in "
        "zeros, an id of -1 or NaN, or weights that are NaN or all 0. They were not captured (a "
        'prefix from a cache?): uncaptured="leave out" keeps them as such'
    )


def _experts(number: int, ids_NLK: np.ndarray, lost_NL: np.ndarray, num_experts: int) -> np.ndarray:
    """The ids, -1 where there is no decision; `ValueError` where others are no experts."""
    wide = np.float64 if ids_NLK.dtype.kind == "f" else np.int64  # an unsigned type has no -1
    ids_NLK = np.where(lost_NL[..., None], -1, ids_NLK.astype(wide))
    known_X = ids_NLK[~lost_NL]
    if known_X.size and not 0 <= known_X.min() <= known_X.max() < num_experts:
        raise ValueError(
            f"routed_experts has for sequence {number} experts {known_X.min():.0f} to "
            f"{known_X.max():.0f}; they must be 0 to {num_experts - 1}"
        )
    return ids_NLK.astype(np.int64)


def _weights(number: int, weights_NLK: np.ndarray, lost_NL: np.ndarray) -> np.ndarray:
    """The weights, 0 where there is no decision; `ValueError` for what no weight is."""
    weights_NLK = np.where(lost_NL[..., None], 0, weights_NLK)
    wrong_NLK = ~(np.isfinite(weights_NLK) & (weights_NLK >= 0))
    if wrong_NLK.any():
        raise ValueError(
            f"weights has for sequence {number} {wrong_NLK.sum()} that are negative or infinite, "
            f"{weights_NLK[wrong_NLK][0]} first"
        )
    return weights_NLK


def check_lengths(trace: Any, tokens: Tokens, read_T: torch.Tensor) -> None:
    """Raise `ValueError` where the trace has more rows for a text than it has tokens, its last one
    among `read_T`: its rows are then of another text, or all shifted, as by a token that an engine
    puts before it. As many as with the padding are right too, and a trace that knows its tokens
    tells by them."""
    if trace.tokens_N is not None:
        return
    width = int(tokens.position_T.max()) + 1
    sequence_T, position_T = (t[read_T] for t in (tokens.sequence_T, tokens.position_T))
    ids, number_T = np.unique(sequence_T.cpu().numpy(), return_inverse=True)
    length_S = np.zeros(len(ids), np.int64)
    np.maximum.at(length_S, number_T, position_T.cpu().numpy() + 1)
    at_S = trace.sequence_id_S.searchsorted(ids).clip(max=len(trace.sequence_id_S) - 1)
    recorded_S = np.where(trace.sequence_id_S[at_S] == ids, trace.length_S[at_S], 0)
    if (longer_S := (recorded_S > length_S) & (recorded_S != width)).any():
        first = int(longer_S.argmax())
        raise ValueError(
            f"trace {trace.name} has {recorded_S[first]} rows for a sequence of {length_S[first]} "
            f"tokens, and so for {longer_S.sum()} of {len(ids)}: cut the arrays to the tokens of "
            "the documents, from the first one on"
        )
