"""`analysis.explore`: the explorer in a notebook."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.explorer.session import Session
from cartmoe.data import Sequences

if TYPE_CHECKING:
    from analysis.explorer.widget import Explorer


def explore(
    model: object,
    text: str | None = None,
    perturbation: str = "DropTop",
    strength: float | None = None,
    where: str = "all",
    *,
    docs: Sequences | None = None,
    length: int = 256,
) -> Explorer:
    """A text under the model's eyes, as a widget: what a perturbation does to each token, the
    damage curve, experts before and after, their cards. Everything is computed when it is asked
    for, from one clean pass over the text.

    model    a model under study, a `cartmoe.LanguageModel`, or what `analysis.load` takes
    text     at most 2,048 tokens of it are read; None: a passage of the standard library
    perturbation, strength, where   to begin with: a name of `PERTURBATIONS` that a number makes
             a perturbation, that number (None: the class's own), and where it acts (see `Where`)
    docs     from `analysis.documents`: what perturbations that draw from clean routing are
             calibrated on, and what experts' cards are made from, all at once, so a few thousand
             tokens; None: the text itself
    length   tokens of the windows that the text is read in, each without those before it

    The widget's `text`, `perturbation`, `strength`, `where` and `expert` can be set from Python
    too; what is wrong with them is then its `message`. Raises `ImportError` without anywidget,
    `ValueError` with the choices for a dense model, an empty text, another perturbation.
    """
    try:
        from analysis.explorer.widget import Explorer
    except ModuleNotFoundError as error:
        needed = "analysis.explore needs anywidget: pip install 'cartmoe[lab]'"
        raise ImportError(needed) from error
    session = Session.of(model, text, docs, length)
    start = session.control(perturbation).start if strength is None else strength
    session.answer(session.condition(perturbation, start, where))
    return Explorer(session, perturbation, start, where)
