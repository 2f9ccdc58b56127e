"""Tasks of lm-eval under perturbations: what wrong routing does to answers.

scores.py, continuations.py   likelihoods of answers, and texts, clean and under conditions
loaded.py, harness.py         tasks, and a model as lm-eval asks it; nothing else knows lm-eval
words.py                      texts of tasks as tokens
samples.py, results.py        what it logs as a table of documents; differences from the clean run
evaluate.py                   tasks, models and conditions together
"""

from analysis.tasks.evaluate import evaluate, tasks_sha256
from analysis.tasks.results import TaskResults
