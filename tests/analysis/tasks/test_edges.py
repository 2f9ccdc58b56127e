"""What tasks have that small ones have not: merges, special tokens, several contexts, lengths."""

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

import analysis as an
from analysis.tasks.continuations import _text
from analysis.tasks.samples import sample_table
from analysis.tasks.words import Words
from cartmoe import LanguageModel, ModelConfig, hf
from cartmoe.tokenizers import JsonTokenizer, load_tokenizer

TEXTS = ["import os", "return node", "def main():", "class A(object):", "except ValueError"] * 20


def write_task(folder, name, rows, **fields):
    """A task of these rows and fields."""
    data = folder / f"{name}.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    said = {"task": name, "dataset_path": "json", "test_split": "train", "target_delimiter": ""}
    said |= {"dataset_kwargs": {"data_files": str(data)}} | fields
    (folder / f"{name}.yaml").write_text(json.dumps(said))  # which YAML is
    return folder


ACC = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
CHOICE = dict(
    output_type="multiple_choice",
    doc_to_text="{{start}}",
    doc_to_choice="{{ends}}",
    doc_to_target="{{right}}",
    metric_list=ACC,
)
ROWS = [dict(start=s, ends=["os", "sys.path"], right=i % 2) for i, s in enumerate(TEXTS[:6])]


def ask(folder, task, *conditions, model=None, **options):
    conditions = conditions or (an.DropTop(1),)
    how = dict(include_path=folder, progress=False) | options
    return an.evaluate(model or an.load("smoe"), task, [*conditions], **how)


def of_merges(starts: bool):
    """A model with a byte-level BPE, which puts a token before a text or does not."""
    tokenizer: Any = load_tokenizer("bpe:320", TEXTS)
    if starts:
        library = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer).backend_tokenizer
        start = ("<|endoftext|>", tokenizer.bos_id)
        library.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[start]
        )
        tokenizer = JsonTokenizer(library.to_str(), "bpe")
    torch.manual_seed(0)
    shape = dict(vocab_size=tokenizer.vocab_size, d_model=32, ffn_width=64, num_heads=2)
    model = LanguageModel(ModelConfig.preset("micro", "smoe", **shape)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model, tokenizer


@pytest.mark.parametrize("starts", [False, True])
def test_answers_in_merged_tokens_are_those_of_lm_eval(starts, tmp_path):
    native, tokenizer = of_merges(starts)
    write_task(tmp_path, "merged", ROWS, **CHOICE)
    found = ask(tmp_path, "merged", model=an.adapt(native, tokenizer)).samples
    start = "<|endoftext|>"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, bos_token=start, eos_token=start, pad_token=start
    )
    asking = HFLM(hf.from_native(native), tokenizer=fast, batch_size=4, max_length=256)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    how = dict(task_manager=manager, log_samples=True, bootstrap_iters=0)
    logged = simple_evaluate(asking, tasks=["merged"], **how)["samples"]["merged"]
    clean = found[(found.condition == "clean") & (found.metric == "answer nats")]
    expected = [-sample["filtered_resps"][sample["target"]][0] for sample in logged]
    np.testing.assert_allclose(clean.value, expected, rtol=1e-4)


def test_an_answer_that_is_merged_into_its_question(tmp_path):
    native, tokenizer = of_merges(starts=False)
    assert len(tokenizer.encode("import")) == 1
    rows = [dict(start="impor", ends=["t", "x"], right=0)]
    write_task(tmp_path, "merged", rows, **CHOICE)
    with pytest.raises(ValueError, match="task merged has an answer, 't' to document 0"):
        ask(tmp_path, "merged", model=an.adapt(native, tokenizer))


def test_special_tokens_that_a_prompt_names():
    native, tokenizer = of_merges(starts=True)
    words = Words(an.adapt(native, tokenizer))
    assert words.encode("os")[0] == tokenizer.bos_id
    assert words.encode("<|endoftext|>os") == words.encode("os")
    assert words.encode("os", start=False) == words.encode("os")[1:]


def test_texts_end_at_the_first_stop_or_end():
    native, tokenizer = of_merges(starts=False)
    words = Words(an.adapt(native, tokenizer))
    ids = tokenizer.encode("import os\nreturn").tolist()
    assert _text(words, ids, ["\n", "o"]) == ("imp", True)
    assert _text(words, ids, ["\n"]) == ("import os", True)
    assert _text(words, ids, []) == ("import os\nreturn", False)
    cut = [*ids[:2], tokenizer.bos_id, *ids[2:]]
    assert _text(words, cut, []) == (tokenizer.decode(ids[:2]), True)
    assert _text(words, cut, ["<|endoftext|>"]) == (tokenizer.decode(ids[:2]), True)


def test_several_contexts_with_one_ending_have_no_right_answer(tmp_path):
    """As winogrande asks: which of the beginnings fits the end."""
    rows = [dict(starts=["import ", "return "], end="os", right=i % 2) for i in range(4)]
    write_task(
        tmp_path,
        "contexts",
        rows,
        output_type="multiple_choice",
        doc_to_text="{{right}}",
        doc_to_choice="{{starts}}",
        doc_to_target="{{end}}",
        multiple_input=True,
    )
    logged = [
        dict(
            filter="none", doc_id=0, doc_hash="", prompt_hash="", target_hash="", metrics=["acc"],
            acc=1.0, target="os", arguments=[("import ", "os"), ("return ", "os")],
            filtered_resps=[(-1.0, False), (-2.0, False)],
        )
    ]  # fmt: skip
    table = sample_table({"contexts": logged}, {"contexts": {"acc": "mean"}})
    assert table.metric.tolist() == ["acc"]


def test_random_routing_of_a_task_does_not_depend_on_others(tmp_path):
    for name, rows in (("one", ROWS[:4]), ("two", ROWS[4:])):
        write_task(tmp_path, name, rows, **CHOICE)
    alone = ask(tmp_path, "two", an.RandomRouting()).samples
    both = ask(tmp_path, ["one", "two"], an.RandomRouting()).samples
    second = both[both.task == "two"].reset_index(drop=True)
    pd.testing.assert_frame_equal(second, alone)


def test_patterns_and_groups(tmp_path):
    for name in ("line_a", "line_b"):
        write_task(tmp_path, name, ROWS[:2], **CHOICE)
    (tmp_path / "group.yaml").write_text("group: lines\ntask: [line_a, line_b]\n")
    for asked in ("line_*", "lines"):
        found = ask(tmp_path, asked)
        assert set(found.samples.task) == {"line_a", "line_b"}
    rows = found.differences().query("metric == 'acc'").set_index("task")
    assert list(rows.index) == ["line_a", "line_b", "lines"]
    assert rows.num_documents.to_dict() == {"line_a": 2, "line_b": 2, "lines": 4}
    tasks, group = rows.loc[["line_a", "line_b"]], rows.loc["lines"]
    assert group.value == tasks.value.mean()
    assert group.lost == tasks.lost.sum()
    assert group.p_holm == group.p  # one of its kind
    assert "lines difference" in found.table()


def test_questions_that_are_too_long_lose_the_same_beginning(tmp_path):
    rows = [dict(start="x" * 40 + "import ", ends=["os", "sys.path"], right=0)]
    write_task(tmp_path, "long", rows, **CHOICE)
    with pytest.warns(UserWarning, match="longer than max_length, 24 tokens"):
        short = ask(tmp_path, "long", max_length=24)
    rows = [dict(start="x" * 40 + "import ", ends=["os", "sys.path"], right=0)]
    rows[0]["start"] = rows[0]["start"][-(24 + 1 - len("sys.path")) :]
    write_task(tmp_path, "cut", rows, **CHOICE)
    with pytest.warns(UserWarning, match="longer"):  # by what starts the text
        same = ask(tmp_path, "cut", max_length=24)
    values = [found.samples.query("condition == 'clean'").value for found in (short, same)]
    np.testing.assert_allclose(*values, rtol=1e-5)
    with pytest.raises(ValueError, match="tokens, and nothing before it fits"):
        ask(tmp_path, "long", max_length=4)


def test_examples_before_a_question(tmp_path):
    write_task(tmp_path, "shots", ROWS, fewshot_split="train", **CHOICE)
    none, two = (ask(tmp_path, "shots", num_fewshot=n).samples for n in (0, 2))
    assert set(none.prompt_hash).isdisjoint(two.prompt_hash)
    write_task(tmp_path, "never", ROWS, num_fewshot=0, **CHOICE)
    with pytest.raises(ValueError, match="num_fewshot is 2; task never is asked without any"):
        ask(tmp_path, "never", num_fewshot=2)
    with pytest.raises(ValueError, match="num_fewshot is -1"):
        ask(tmp_path, "shots", num_fewshot=-1)


def test_metrics_that_are_no_means_are_left_out(tmp_path):
    f1 = {"metric": "f1", "aggregation": "f1", "higher_is_better": True}
    write_task(tmp_path, "both", ROWS, **(CHOICE | {"metric_list": [*ACC, f1]}))
    with pytest.warns(UserWarning, match="left out: f1 of both"):
        found = ask(tmp_path, "both")
    assert set(found.samples.metric) == {"acc", "answer nats"}


GENERATE = dict(
    output_type="generate_until",
    doc_to_text="{{start}}",
    doc_to_target="{{ends[0]}}",
    metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"do_sample": True, "temperature": 1.0}, "samples its texts"),
        ({"num_beams": 4}, "asks for num_beams"),
    ],
)
def test_texts_that_are_not_greedy(tmp_path, options, said):
    how = {"until": ["\n"], "max_gen_toks": 4} | options
    write_task(tmp_path, "texts", ROWS, generation_kwargs=how, **GENERATE)
    with pytest.raises(ValueError, match=f"task texts {said}"):
        ask(tmp_path, "texts")


def test_other_names_of_a_length(tmp_path):
    how = {"until": ["\n"], "max_new_tokens": 4, "do_sample": False, "temperature": 0.7}
    write_task(tmp_path, "texts", ROWS, generation_kwargs=how, **GENERATE)
    assert len(ask(tmp_path, "texts", max_length=24).samples) == 2 * len(ROWS)


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        (an.Worst(1), "Worst"),
        (an.Condition(an.DropTop(1), downstream="replay"), "recorded decisions"),
    ],
)
def test_conditions_that_texts_cannot_have(tmp_path, condition, said):
    write_task(tmp_path, "texts", ROWS, generation_kwargs={"max_gen_toks": 4}, **GENERATE)
    with pytest.raises(ValueError, match=said):
        ask(tmp_path, "texts", condition)


def test_calibration_that_is_none(tmp_path):
    write_task(tmp_path, "merged", ROWS, **CHOICE)
    with pytest.raises(ValueError, match="calibration is a str"):
        ask(tmp_path, "merged", calibration="x")
    with pytest.raises(ValueError, match="perturbations is empty"):
        an.evaluate(an.load("smoe"), "merged", [], include_path=tmp_path)
