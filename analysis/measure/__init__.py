"""Conditions at work in a model, and what they do to its loss and its routing.

clean.py, losses.py, doses.py     the clean pass of a batch; losses; how far decisions were changed
calibrate.py, intervene.py        statistics of clean routing; conditions at work in a running model
prepare.py, search.py             what a condition becomes on a batch; the worst flips
shard.py, by_segment.py           the unit of work, batches or segments outside: batch.py,
                                  bookmarks.py: one on its way, and how far it has come
arm.py, collector.py, reuse.py    a condition on a batch; its cell; outputs that many share
results.py, saved.py, sweep.py    tables, kept and read; models in memory
compare.py, comparison.py         checkpoints side by side
generate.py, regret.py, margins.py   text, better routes, flips that margins predict
rows.py                           sums of sequences, means over tokens with intervals over documents
"""

from analysis.measure.bookmarks import Bookmarks, forget_streams, marked
from analysis.measure.by_segment import check_streamed
from analysis.measure.calibrate import Calibrating, calibrate, calibration_documents
from analysis.measure.clean import CleanPass, check_finite
from analysis.measure.collector import Cell
from analysis.measure.compare import compare
from analysis.measure.comparison import Comparison
from analysis.measure.generate import Decoder, generation_agreement
from analysis.measure.intervene import Intervention, perturbed
from analysis.measure.losses import loss_gradient, output_slopes
from analysis.measure.margins import flip_prediction
from analysis.measure.prepare import prepared
from analysis.measure.regret import regret
from analysis.measure.results import FACTS, MODELS, Description, Results, describe, key_columns
from analysis.measure.reuse import worth_reusing
from analysis.measure.saved import is_saved
from analysis.measure.shard import measure
from analysis.measure.sweep import Asked, conditions_of, models_in, streams_folder, sweep
