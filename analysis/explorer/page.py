"""Pages that hold their answers: no kernel, no network, nothing else to send along."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment
from tqdm.auto import tqdm

from analysis.explorer.controls import OFF, ON, Control, about_of, neutral_of
from analysis.explorer.session import Session
from analysis.explorer.wire import Json
from analysis.measure import Asked, conditions_of
from analysis.perturb import Condition, Perturbation
from analysis.stats import PLAIN, label_of
from cartmoe.data import Sequences
from cartmoe.files import path_of, write_atomically

HERE = Path(__file__).parent
LARGEST = 1_000_000  # bytes of a page whose conditions nobody chose
# Those: everywhere, at the strengths that the model's controls have; then DropTop(1) by place.
GRID = {
    "DropTop": (1, 2, 3, 4),
    "DropChosen": (1, 2),
    "GaussianNoise": (0.25, 0.5, 1.0, 2.0),
    "RandomRouting": (0.3, 0.6, 1.0),
    "TopK": (1, 2, 3, 4),
    "NoRouted": (ON,),
}
POLICY = (
    "default-src 'none'; script-src '{script}'; style-src '{style}'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)


class Page(str):
    """A page of HTML as a text. A notebook shows it in a frame that may run its script and do
    nothing else."""

    def save(self, path: str | Path) -> Path:
        """Write it, whole or not at all; the path."""
        path = path_of("path", path)
        write_atomically(path, self)
        return path

    def __repr__(self) -> str:
        return f"Page({len(self):,} characters); save(path) writes it"

    def _repr_html_(self) -> str:
        frame = 'sandbox="allow-scripts" title="explorer" width="100%" height="720"'
        return f'<iframe {frame} style="border: 0" srcdoc="{html.escape(self)}"></iframe>'


def explorer_page(
    model: object,
    text: str | None = None,
    conditions: Asked | None = None,
    *,
    where: str = "all",
    docs: Sequences | None = None,
    length: int = 256,
    cards: bool = True,
    title: str | None = None,
    progress: bool = True,
) -> Page:
    """The explorer as a page that needs no kernel, with the answers to these conditions in it.

    model        a model under study, a `cartmoe.LanguageModel`, or what `analysis.load` takes
    text         None: a passage of the standard library
    conditions   perturbations, which then act at `where`, and conditions, as in `sweep`; None: a
                 selection, as much of it as fits a megabyte
    docs, length   as in `explore`
    cards        whether every expert has its card, which is a run for each; left out where they
                 alone would fill the page of a selection

    Raises `ValueError` for a dense model, an empty text, and conditions that cannot act on it.
    """
    session = Session.of(model, text, docs, length)
    title = title or f"Routing of {session.model.name}"
    about = "Choose what happens to the routers; the text shows what that does to each token."
    chosen = list(selection(session)) if conditions is None else conditions_of(conditions, where)
    if not chosen:
        raise ValueError("conditions is empty; give at least one, or None for a selection")
    experts = [(n, e) for n, site in enumerate(session.sites) for e in range(site.num_experts)]
    answers = Answers(session)
    with tqdm(total=len(experts) * cards + len(chosen), unit="run", disable=not progress) as bar:
        for number, expert in experts if cards else ():
            answers.cards.append(session.card(number, expert))
            bar.update()
        for condition in chosen:
            answers.add(condition)
            bar.update()
            if conditions is None and len(page_of(answers, title, about).encode()) > LARGEST:
                if len(answers.runs) > 1:
                    answers.runs.pop()
                    break
                answers.cards.clear()  # of very many experts: a text without an answer says less
    return page_of(answers, title, about)


def tokens_page(
    model: object,
    text: str | None,
    perturbation: Perturbation | Condition,
    *,
    where: str = "all",
    length: int = 256,
    title: str | None = None,
) -> Page:
    """One text, and what one perturbation does to each of its tokens: for a mail or an appendix.

    The parameters are those of `explorer_page`. Raises as it does.
    """
    session = Session.of(model, text, None, length)
    chosen = conditions_of(perturbation, where)
    if len(chosen) != 1:
        raise ValueError(f"perturbation has {len(chosen)} of them; a text alone shows one")
    (condition,) = chosen
    answers = Answers(session, view="tokens")
    answers.add(condition)
    p = condition.perturbation
    shown = label_of(p.label, p.strength, **_options(condition))
    about = f"Each token of a text under {shown}, beside the same text undisturbed."
    return page_of(answers, title or f"{session.model.name} under {shown}", about)


def selection(session: Session) -> Iterator[Condition]:
    """The conditions of a page for which nobody chose any."""
    for name, strengths in GRID.items():
        for strength in strengths:
            if strength in session.controls[name].strengths:
                yield session.condition(name, strength, "all")
    for place in session.places[1:]:
        yield session.condition("DropTop", 1, place)


class Answers:
    """What `page.js` answers from: a run a condition, and cards.

    view   "whole", or "tokens": the text alone
    """

    def __init__(self, session: Session, view: str = "whole"):
        self.session, self.view = session, view
        self.runs: list[tuple[Condition, Json]] = []
        self.cards: list[Json] = []

    def add(self, condition: Condition) -> None:
        """What the condition does to the text."""
        self.runs.append((condition, self.session.answer(condition)))

    def json(self) -> str:
        """All of it; without "<", so that no text can end the script that it stands in."""
        clean = self.session.clean()
        runs = [_keys(c) | run for c, run in self.runs]
        told = {
            "about": self.session.about | self._choices() | {"view": self.view, "live": False},
            "passage": clean,
            "runs": runs,
            "cards": self.cards,
            **_keys(self.runs[0][0]),
            "expert": [],
            "asked": 0,
        }
        return json.dumps(told, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")

    def _choices(self) -> Json:
        """The controls and places that there are answers for, and strengths that change nothing."""
        found: dict[str, Control] = {}
        for condition, _ in self.runs:
            p = condition.perturbation
            name, strength, _ = _keys(condition).values()
            parameter = None if math.isnan(p.strength) else p.strength_field or "strength"
            neutral = OFF if parameter is None else neutral_of(p)
            before = found[name].strengths if name in found else ()
            stops = {*before, strength, strength if neutral is None else neutral}
            start = found[name].start if name in found else strength
            about = about_of(p)
            found[name] = Control(name, about, parameter, tuple(sorted(stops)), start, neutral)
        places = dict.fromkeys(str(condition.where) for condition, _ in self.runs)
        return {"controls": [c._asdict() for c in found.values()], "places": [*places]}


def page_of(answers: Answers, title: str, about: str) -> Page:
    """The page of these answers."""
    style = _read("page.css") + _read("explorer.css")
    script = _read("explorer.js") + _read("page.js")
    policy = POLICY.format(script=_hash(script), style=_hash(style))
    parts = dict(title=title, about=about, policy=policy, style=style, script=script)
    template = Environment(autoescape=True).from_string(_read("page.html"))
    return Page(template.render(parts, answers=answers.json()))


def _keys(condition: Condition) -> Json:
    """What the page's controls call it."""
    p = condition.perturbation
    options = _options(condition) | {"where": PLAIN["where"]}
    name = label_of(p.label, math.nan, **options)
    if condition.eval_seed:
        name += f", seed {condition.eval_seed}"
    strength = ON if math.isnan(p.strength) else p.strength
    return {"perturbation": name, "strength": strength, "where": str(condition.where)}


def _options(condition: Condition) -> dict[str, str]:
    return {name: str(getattr(condition, name)) for name in PLAIN}


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a policy names what may run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
