"""Words and figures from tables.

text.py      what a study found, in words
study.py     the tables and figures that a study leaves in its directory; its tables as files that
             other programs read
overlap.py   those that `python -m analysis overlap` leaves
models.py    the models that come with the project
made.py      what a folder was made from; pictures drawn into it
"""

from analysis.report.models import models_text
from analysis.report.overlap import finished, named, write_overlap
from analysis.report.study import export, plot, summarize
