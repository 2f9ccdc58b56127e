"""Tables of sums in, tables of damage with intervals out.

bootstrap.py   intervals of ratios of sums, resampling whole documents
pairs.py       rows of losses -> one checkpoint's conditions paired with its clean run
doses.py       how much each condition disturbed the routing, damage per dose, curves in few numbers
damage.py      damage of every condition, contrasts of two conditions or two checkpoints
seeds.py       two models over their training seeds
contrasts.py   one model against each other one: named beforehand, adjusted for their number
robustness.py  the paper's Table 4, its controls, and its printed form
parts.py       a condition's damage beside what other conditions make of it
apart.py       set, weights and mass (Shapley); with and without the routers behind; single sites
               against all of them; the worst flips against as many random ones
tokens.py      every token's loss, a condition at a time; how unevenly damage is spread
groups.py      damage by position, frequency and domain
relation.py    damage of dropping an expert against what it shares with those that take over
metric_facts.py     what a metric of overlap is called, and how it is read
overlap_tables.py   tables of overlap: what their rows are of
texts.py       numbers and intervals as people read them; latex.py: tables for a paper
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
