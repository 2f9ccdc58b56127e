"""A corpus with a known answer: text of topics and styles that share as much as one says.

What a character is like after its context is a sum of four random tables, a common one, one of the
document's topic, one of its style, and one of the pair. How much two domains have in common is then
a number, not an opinion, and what metrics say of experts can be held against it.

Shapes: I topics, J styles, Z = I * J domains (i, j) in the order of rows of an I x J table,
H contexts, A symbols, D documents.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import string
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from cartmoe.config import check_choice, check_least, check_whole

# One byte each, so one token of a byte tokenizer; no white space, which readers may strip.
SYMBOLS = string.ascii_lowercase + string.digits + string.punctuation + string.ascii_uppercase
SHARES = ("common", "topic", "style", "pair")
LONGEST = 8  # of contexts: as numbers they fit into 64 bits
HASH_BITS = 10  # so many rows has a table at most; longer contexts share rows


@dataclass(frozen=True)
class Factorial:
    """The corpus "factorial": documents of topic i and style j, `documents` of `length` characters.

    The log-odds of the next of `alphabet` symbols behind a context h, the `context` characters
    before it, are

        scale * (sqrt(common) C[h] + sqrt(topic) T_i[h] + sqrt(style) S_j[h] + sqrt(pair) P_ij[h])

    less what makes probabilities sum to 1; entries of the tables are standard normal draws of
    `seed`. They do not depend on the shares, so that corpora of several shares are mixtures of the
    same tables, and `scale` is the standard deviation of log-odds in all of them.

    common, topic, style, pair   shares of the variance, which sum to 1

    Raises `ValueError` naming the parameter, its value and what it may be.
    """

    topics: int = 4
    styles: int = 4
    common: float = 0.25
    topic: float = 0.25
    style: float = 0.25
    pair: float = 0.25
    documents: int = 1600
    length: int = 1000
    alphabet: int = 32
    context: int = 1
    scale: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in dict(topics=1, styles=1, documents=1, length=1, alphabet=2).items():
            check_whole(name, getattr(self, name), least)
        for name, most in dict(alphabet=len(SYMBOLS), context=LONGEST).items():
            check_whole(name, getattr(self, name), 0)
            if getattr(self, name) > most:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at most {most}")
        check_whole("seed", self.seed, 0)
        for name in (*SHARES, "scale"):
            check_least(name, getattr(self, name), 0)
            object.__setattr__(self, name, float(getattr(self, name)))
        total = sum(getattr(self, name) for name in SHARES)
        if not math.isclose(total, 1, abs_tol=1e-9):
            shares = ", ".join(f"{name}={getattr(self, name):g}" for name in SHARES)
            raise ValueError(f"shares are {shares}; they must sum to 1, and sum to {total:g}")

    @classmethod
    def parse(cls, options: str) -> Factorial:
        """Of a text like "topic=0.4,pair=0.1"; what it does not name has its default."""
        kinds = {f.name: int if f.type == "int" else float for f in fields(cls)}
        given: dict[str, Any] = {}
        for item in filter(None, (part.strip() for part in options.split(","))):
            name, equals, value = (part.strip() for part in item.partition("="))
            if not equals:
                raise ValueError(
                    f"corpus 'factorial' has the option {item!r}; write field=value, with a field "
                    f"of {', '.join(kinds)}"
                )
            check_choice("field of corpus 'factorial'", name, kinds)
            if name in given:
                raise ValueError(f"corpus 'factorial' has two values of {name}: {options!r}")
            try:
                given[name] = kinds[name](value)
            except ValueError:
                kind = "whole" if kinds[name] is int else "finite"
                raise ValueError(f"{name} is {value!r}; it must be a {kind} number") from None
        return cls(**given)

    @property
    def name(self) -> str:
        """What any function that reads a corpus knows it by: "factorial:topic=0.4,pair=0.1"."""
        own = [(f.name, getattr(self, f.name)) for f in fields(self)]
        default = Factorial()
        options = ",".join(f"{n}={v!r}" for n, v in own if v != getattr(default, n))
        return f"factorial:{options}" if options else "factorial"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all parameters."""
        return hashlib.sha256(json.dumps(["factorial", asdict(self)]).encode()).hexdigest()

    @property
    def domains(self) -> list[str]:
        """Z names, in the order of `truth` and `log_odds`."""
        pairs = itertools.product(range(self.topics), range(self.styles))
        return [f"topic{i} style{j}" for i, j in pairs]

    def truth(self) -> np.ndarray:
        """(Z, Z) share of the variance of log-odds that two domains have in common: their expected
        correlation, common + topic [i = i'] + style [j = j'] + pair [both]."""
        topic_Z, style_Z = np.divmod(np.arange(self.topics * self.styles), self.styles)
        same_topic_ZZ = topic_Z[:, None] == topic_Z
        same_style_ZZ = style_Z[:, None] == style_Z
        shared_ZZ = self.common + self.topic * same_topic_ZZ + self.style * same_style_ZZ
        return shared_ZZ + self.pair * (same_topic_ZZ & same_style_ZZ)

    @property
    def _contexts(self) -> int:
        """Contexts that there are; as a number each of them has base `alphabet`."""
        return self.alphabet**self.context

    def rows(self, context_D: np.ndarray) -> np.ndarray:
        """The row h of a table for each context, a number of base `alphabet` in which the last
        character is the last digit: itself, or where there are too many of them its hash."""
        if self._contexts <= 2**HASH_BITS:
            return context_D
        mixed_D = context_D.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio
        return (mixed_D >> np.uint64(64 - HASH_BITS)).astype(np.int64)

    def log_odds(self) -> np.ndarray:
        """(Z, H, A) as defined above, natural logarithms, each row up to a constant."""
        topics, styles = self.topics, self.styles
        row = min(self._contexts, 2**HASH_BITS), self.alphabet
        sum_IJHA = np.zeros((topics, styles, *row))
        shapes = dict(common=(1, 1), topic=(topics, 1), style=(1, styles), pair=(topics, styles))
        for number, (share, shape) in enumerate(shapes.items()):
            table = np.random.default_rng([self.seed, number]).standard_normal((*shape, *row))
            sum_IJHA += math.sqrt(getattr(self, share)) * table
        return self.scale * sum_IJHA.reshape(topics * styles, *row)

    def texts(self) -> Iterator[tuple[str, str]]:
        """(domain, text) of each document; the domains take turns.

        All documents grow by a character at a time. Each begins behind a random context.
        """
        log_odds_ZHA = self.log_odds()
        odds_ZHA = np.exp(log_odds_ZHA - log_odds_ZHA.max(-1, keepdims=True))
        # Without the last column, which is 1 up to rounding: no draw lies beyond it.
        below_ZHA = (odds_ZHA.cumsum(-1) / odds_ZHA.sum(-1, keepdims=True))[..., :-1]
        rng = np.random.default_rng([self.seed, len(SHARES)])
        domain_D = np.arange(self.documents) % len(below_ZHA)
        context_D = rng.integers(self._contexts, size=self.documents)
        symbols_DL = np.empty((self.documents, self.length), np.uint8)
        for place in range(self.length):
            draw_D1 = rng.random((self.documents, 1))
            symbol_D = (below_ZHA[domain_D, self.rows(context_D)] <= draw_D1).sum(-1)
            symbols_DL[:, place] = symbol_D
            context_D = (context_D * self.alphabet + symbol_D) % self._contexts
        bytes_DL = np.frombuffer(SYMBOLS.encode(), np.uint8)[symbols_DL]
        domains = self.domains
        for z, row in zip(domain_D, bytes_DL, strict=True):
            yield domains[z], row.tobytes().decode()
