"""The explorer as a widget: what is asked and answered, as traits of plain JSON."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from analysis.explorer.session import REFUSED, Session

HERE = Path(__file__).parent
QUESTION = ("text", "perturbation", "strength", "where")


class Explorer(anywidget.AnyWidget):
    """One session in a notebook. Set these, or read them:

    text, perturbation, strength, where   the question
    expert   [number of the site, number of the expert] whose card is shown, or []
    message  what is wrong with the question; "" if nothing is, and then `run` is its answer

    The browser asks for points of the curve (`wanted`), one after the other while nobody else
    waits, and counts what it `asked`; the kernel has then `answered` as much.
    """

    _esm = (HERE / "explorer.js").read_text(encoding="utf-8")
    _css = (HERE / "explorer.css").read_text(encoding="utf-8")

    text = traitlets.Unicode().tag(sync=True)
    perturbation = traitlets.Unicode().tag(sync=True)
    strength = traitlets.Float().tag(sync=True)
    where = traitlets.Unicode("all").tag(sync=True)
    expert = traitlets.List(traitlets.Int()).tag(sync=True)
    wanted = traitlets.Int(allow_none=True, default_value=None).tag(sync=True)
    asked = traitlets.Int().tag(sync=True)

    about = traitlets.Dict().tag(sync=True)
    passage = traitlets.Dict().tag(sync=True)
    run = traitlets.Dict().tag(sync=True)
    curve = traitlets.Dict().tag(sync=True)
    card = traitlets.Dict().tag(sync=True)
    message = traitlets.Unicode().tag(sync=True)
    answered = traitlets.Int().tag(sync=True)

    def __init__(self, session: Session, perturbation: str, strength: float, where: str):
        self._session = session
        question = dict(perturbation=perturbation, strength=strength, where=where)
        passage = session.clean()
        super().__init__(text=session.text, about=session.about, passage=passage, **question)
        self._answer()
        self.observe(self._change, [*QUESTION, "expert", "wanted", "asked"])

    def _change(self, change: Any) -> None:
        with self.hold_sync():
            if change.name in QUESTION:
                self._answer()
            elif change.name == "expert":
                self._pick()
            elif change.name == "wanted" and self.wanted is not None:
                self._want(self.wanted)
            self.answered = self.asked

    def _answer(self) -> None:
        """The question's answer, or what is wrong with it beside the undisturbed text."""
        session = self._session
        try:
            if self.text != session.text:
                session.read(self.text)
                self.passage, self.expert, self.card = session.clean(), [], {}
            condition = session.condition(self.perturbation, self.strength, self.where)
            self.run, self.message = session.answer(condition), ""
        except REFUSED as error:
            self.run, self.message = {}, str(error)
        self.curve = {"nats": []}  # not that of the question before
        with suppress(*REFUSED):
            self.curve = session.curve(self.perturbation, self.where)

    def _want(self, number: int) -> None:
        """One more point of the curve."""
        session = self._session
        with suppress(*REFUSED):  # the curve says so
            strength = session.controls[self.perturbation].strengths[number]
            session.answer(session.condition(self.perturbation, strength, self.where))
        self.curve, self.wanted = session.curve(self.perturbation, self.where), None

    def _pick(self) -> None:
        try:
            if len(self.expert) not in (0, 2):
                raise ValueError(f"expert is {self.expert}; give [site, expert], or []")
            self.card = self._session.card(*self.expert) if self.expert else {}
            self.message = "" if self.run else self.message
        except REFUSED as error:
            self.card, self.message = {}, str(error)
