"""Words and figures from tables.

text.py      what a study found, in words
verdicts.py  what its controls say
figures.py   its figures: of each the table, the picture, and what it shows
captions.py  the words beside figures
cite.py      how to cite
page.py      a study as one page: summary.py, its sentences; page_tables.py, which columns; html.py
             and templates, what any page is made of
study.py     the tables and figures that a study leaves in its directory; its tables as files that
             other programs read
overlap.py   those that `python -m analysis overlap` leaves
models.py    the models that come with the project
tasks.py     those that `python -m analysis eval` leaves
made.py      what a folder was made from; pictures drawn into it
"""

from analysis.report.captions import caption
from analysis.report.models import models_text
from analysis.report.overlap import overlap_into, write_overlap
from analysis.report.page import write_report
from analysis.report.study import export, plot, summarize
from analysis.report.tasks import evaluate_into
