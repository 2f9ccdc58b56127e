"""Tasks of lm-eval under conditions: all from one pass over the questions, beside a run each."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import analysis as an
from analysis.perturb import condition_from_text
from benchmarks.timing import Row, interleaved, milliseconds
from cartmoe.config import ModelConfig
from cartmoe.model import LanguageModel
from cartmoe.tokenizers import ByteTokenizer

LAYERS, QUESTIONS, LENGTH = 8, 48, 320
CONDITIONS = [f"DropTop(1), layer {layer}" for layer in range(LAYERS // 2, LAYERS)]
TASK = """
task: sentences
dataset_path: json
dataset_kwargs: {data_files: "DATA"}
test_split: train
output_type: multiple_choice
doc_to_text: "{{start}}"
doc_to_choice: "{{ends}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def rows() -> Iterator[Row]:
    """lm-eval's HFLM under `perturbed`, a run a condition, over `evaluate`."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers.utils import logging

    from cartmoe import hf

    logging.disable_progress_bar()
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(num_layers=LAYERS, moe_interval=1)
    native = LanguageModel(ModelConfig.preset("nano", "smoe_share", **shape)).eval()
    model = an.adapt(native, ByteTokenizer())
    wrapped = hf.from_native(native)
    studied = an.adapt(wrapped, ByteTokenizer())
    conditions = [condition_from_text(text) for text in CONDITIONS]
    with tempfile.TemporaryDirectory() as folder:
        write_task(Path(folder))
        manager = TaskManager(include_path=folder, include_defaults=False)

        def apart() -> None:
            asking = HFLM(wrapped, tokenizer=hf.tokenizer_of("smoe"), batch_size=8)
            for condition in (None, *conditions):
                acts: Any = nullcontext()
                if condition is not None:
                    acts = an.perturbed(studied, condition.perturbation, condition.where)
                with acts:
                    how: dict[str, Any] = dict(task_manager=manager, bootstrap_iters=0)
                    simple_evaluate(asking, tasks=["sentences"], **how)

        def together() -> None:
            an.evaluate(model, "sentences", conditions, include_path=folder, progress=False)

        ways = {"a run each": apart, "at once": together}
        times = interleaved(ways, repeats=3, warm_up=1)
        what = f"lm-eval, {len(conditions)} conditions behind the first half: a run each / at once"
        ratio = times["a run each"] / times["at once"]
        yield Row(what, ratio, ">= 1.5", milliseconds(times))


def write_task(folder: Path) -> None:
    """Questions with two answers, of random letters: the cost is what counts."""
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (QUESTIONS, LENGTH), generator=generator)
    texts = [bytes(row).decode() for row in letters.tolist()]
    lines = [json.dumps({"start": text[:-20], "ends": [text[-20:], "no"]}) for text in texts]
    (folder / "data.jsonl").write_text("\n".join(lines))
    (folder / "task.yaml").write_text(TASK.replace("DATA", str(folder / "data.jsonl")))
