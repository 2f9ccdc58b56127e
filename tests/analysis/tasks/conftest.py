"""A small task of each kind, on the beginnings of lines of Python."""

import json

import pytest

LINES = [
    ("import ", "os", "zq"),
    ("def ", "main", "(((("),
    ("class A(obj", "ect", "xxz"),
    ("retur", "n", "q"),
    ("self.asser", "tEqual", "tZZZZ"),
    ("for i in ran", "ge", "qq"),
    ("    if not isinst", "ance", "xyzw"),
    ("except Val", "ueError", "ueXXXX"),
    ("raise Type", "Error", "Zrror"),
    ("print", "(", "&"),
    ("while Tru", "e", "k"),
    ("with open(", "self", "%%%%"),
]
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{start}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
LIKELIHOOD = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""
GENERATION = """
output_type: generate_until
doc_to_text: "{{start}}"
doc_to_target: "{{right}}"
generation_kwargs: {until: ["\\n", "("], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
SAMPLED = GENERATION.replace("do_sample: false", "do_sample: true")
TASKS = {"choice": CHOICE, "likelihood": LIKELIHOOD, "generation": GENERATION, "sampled": SAMPLED}


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory):
    """The directory with their files."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        dict(start=start, right=right, text=f"{start}{right}\n", choices=both, answer=i % 2)
        for i, (start, right, wrong) in enumerate(LINES)
        for both in [[right, wrong] if i % 2 == 0 else [wrong, right]]
    ]
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, text in TASKS.items():
        head = f"task: tiny_{name}\ndataset_path: json\ndataset_kwargs:\n  data_files: "
        head += f'"{folder}/lines.jsonl"\ntest_split: train\ntarget_delimiter: ""\n'
        (folder / f"{name}.yaml").write_text(head + text)
    return folder
