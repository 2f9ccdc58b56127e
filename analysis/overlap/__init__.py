"""What the experts of a model have in common, measured on documents, and what that says of damage.

metrics/          on tensors
request.py        what a measurement is asked for
probes.py         documents as the sites of a model see them; traced.py: as a trace tells of them;
                  routed.py: which tokens experts have
measure.py        streams over one pass, by_segment.py: a layer at a time; tables.py: its tables
removal.py        experts dropped one at a time; relation.py: what that costs against overlap
substitution.py   experts in each other's place
truth.py          against a corpus with a known answer
training.py       over the checkpoints of a run
"""

from analysis.overlap.measure import measure_overlap
from analysis.overlap.metrics import METRICS, TABLES, ExpertWeights, Metric, outputs, usage, weights
from analysis.overlap.relation import Relation, relate
from analysis.overlap.removal import expert_damage, takeover
from analysis.overlap.request import check_request
from analysis.overlap.substitution import calibration, substitution
from analysis.overlap.tables import Overlap
from analysis.overlap.training import Training, over_training, saturation
from analysis.overlap.truth import factor_information, truth_scores
