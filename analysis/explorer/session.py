"""A model, a text and the answers to what is asked about them; nothing here knows a browser."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from analysis.adapters import Adapter, check_documents, load, routed_adapter
from analysis.explorer.cards import Cards
from analysis.explorer.controls import Control, controls, perturbation_of
from analysis.explorer.passage import Passage, default_text
from analysis.explorer.wire import Json, passage_json, run_json
from analysis.perturb import Condition, Where
from cartmoe.config import check_choice
from cartmoe.data import Sequences

# What a question may end in: it is wrong, logits are not finite, there is no memory.
REFUSED = (ValueError, FloatingPointError, RuntimeError)


class Session:
    """All answers are plain JSON, and kept as long as the text stays.

    docs     what perturbations that need statistics are calibrated on, and experts' cards are made
             from; None: the text itself
    length   tokens of the windows that the text is read in
    """

    def __init__(
        self,
        model: Adapter,
        text: str | None = None,
        docs: Sequences | None = None,
        length: int = 256,
    ):
        if docs is not None:
            check_documents(docs, model)
        self.model, self.docs, self.length = model, docs, length
        self.sites = model.sites()
        self.controls = {control.name: control for control in controls(self.sites)}
        self._cards_of_docs = None if docs is None else Cards(Passage(model, docs))
        self.read(default_text() if text is None else text)

    @classmethod
    def of(cls, model: object, *given: Any) -> Session:
        """Of a model under study, a `cartmoe.LanguageModel`, or what `analysis.load` takes. Raises
        `ValueError` for a dense one."""
        return cls(routed_adapter(load(model) if isinstance(model, str | Path) else model), *given)

    def read(self, text: str) -> None:
        """Another text. Raises `ValueError` for one that cannot be read, and then stays with the
        one before."""
        self.passage = Passage.of(self.model, text, self.length, self.docs)
        self.text = text
        self._answers: dict[Condition, Json | Exception] = {}
        self.cards = self._cards_of_docs or Cards(self.passage)

    @cached_property
    def about(self) -> Json:
        """What does not change: places, sites, controls; the view ("whole", or the text alone,
        "tokens"), and whether it is live, with a kernel that answers."""
        return {
            "places": self.places,
            "sites": [
                {"name": str(s), "layer": s.layer, "stage": s.stage, "experts": s.num_experts}
                for s in self.sites
            ],
            "controls": [control._asdict() for control in self.controls.values()],
            "view": "whole",
            "live": True,
        }

    @cached_property
    def places(self) -> list[str]:
        """Where a condition may act: everywhere, at a stage, in a layer, at one site."""
        stages = sorted({site.stage for site in self.sites})
        found = ["all"]
        if len(stages) > 1:
            found += [f"stage {stage}" for stage in stages]
            found += [f"layer {layer}" for layer in sorted({site.layer for site in self.sites})]
        names = [str(site) if len(stages) > 1 else f"layer {site.layer}" for site in self.sites]
        return list(dict.fromkeys([*found, *names]))

    def clean(self) -> Json:
        """The text undisturbed; see `passage_json`."""
        return passage_json(self.passage, self.text)

    def answer(self, condition: Condition) -> Json:
        """What the condition does to the text; see `run_json`. Raises `ValueError` for one that
        cannot act on the model."""
        if not isinstance(self._answers.get(condition), dict):
            try:
                run = self.passage.run(condition)
                self._answers[condition] = run_json(run, self.passage.undisturbed)
            except REFUSED as error:
                self._answers[condition] = error
        answer = self._answers[condition]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def condition(self, perturbation: str, strength: float, where: str) -> Condition:
        """Raises `ValueError` with the choices for other names, and for strengths out of range."""
        self.control(perturbation)
        return Condition(perturbation_of(perturbation, strength), Where.parse(where))

    def control(self, perturbation: str) -> Control:
        """Of the perturbation of that name. Raises `ValueError` with the choices."""
        check_choice("perturbation", perturbation, self.controls)
        return self.controls[perturbation]

    def curve(self, perturbation: str, where: str) -> Json:
        """nats per token at each of the control's strengths; None where it was not asked for yet,
        "none" where the condition cannot act."""
        strengths = self.control(perturbation).strengths
        asked = [self.condition(perturbation, s, where) for s in strengths]
        answers = [self._answers.get(condition) for condition in asked]
        return {"nats": ["none" if isinstance(a, Exception) else a and a["nats"] for a in answers]}

    def card(self, site: int, expert: int) -> Json:
        """Of the expert of that number at the site of that number; see `Cards.card`."""
        check_choice("site", site, range(len(self.sites)))
        place = self.sites[site]
        check_choice("expert", expert, range(place.num_experts))
        return self.cards.card(place, expert)
