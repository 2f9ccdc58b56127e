"""A text under a model's eyes: in a notebook, and as pages that need no kernel.

passage.py    a text read in one clean pass, and what conditions do to each token
controls.py   sliders from what perturbations declare;  cards.py  one expert
session.py    questions and answers;  wire.py  as JSON
notebook.py, widget.py    analysis.explore;  page.py  pages
explorer.js, explorer.css    what both show;  page.js, page.html  a page in a kernel's place
"""

from analysis.explorer.notebook import explore
from analysis.explorer.page import Page, explorer_page, tokens_page
