import json
from itertools import islice

import pytest
import zstandard

from cartmoe.corpora import (
    CORPORA,
    Document,
    _split_docstrings,
    _tested_module,
    open_source,
    read_corpus,
)
from cartmoe.duplicates import drop_near_duplicates


def pile_line(text, domain=None):
    meta = {"meta": {"pile_set_name": domain}} if domain else {}
    return json.dumps({"text": text} | meta) + "\n"


def prose(seed, num_words=200):
    return " ".join(f"word{(seed * 7919 + i * i * 31) % 100003}" for i in range(num_words))


def documents(*texts):
    return [Document(f"d{i}", f"g{i}", "x", text) for i, text in enumerate(texts)]


class TestFiles:
    def test_folder_is_read_in_order_with_domains_from_folders(self, tmp_path):
        for name in ("b.txt", "a.md", "law/x/deep.txt", "law/c.py", "pile.jsonl"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(pile_line(name, "Wiki"))
        (tmp_path / "empty.txt").touch()
        (tmp_path / "image.png").write_bytes(b"\xff")
        (tmp_path / ".git").mkdir()
        (tmp_path / ".git/log.txt").write_text("no document")
        found = [(d.id, d.domain) for d in read_corpus(tmp_path)]
        assert found == [
            ("a.md", "md"),
            ("b.txt", "txt"),
            ("law/c.py", "law"),
            ("law/x/deep.txt", "law"),
            ("pile.jsonl:1", "Wiki"),
        ]

    def test_pile_lines(self, tmp_path):
        path = tmp_path / "val.jsonl"
        odd = '{"text": "lone \\ud800 surrogate", "meta": null}\n'
        path.write_text(pile_line("law text", "FreeLaw") + "\n" + pile_line("bare") + odd)
        first, bare, lone = read_corpus(path)
        assert (first.id, first.domain, first.text) == ("val.jsonl:1", "FreeLaw", "law text")
        assert (bare.id, bare.domain) == ("val.jsonl:3", "unknown")
        assert lone.text == "lone ? surrogate"

    def test_zst_of_several_frames(self, tmp_path):
        path = tmp_path / "val.jsonl.zst"
        frames = [zstandard.compress(pile_line(text).encode()) for text in ("one", "two")]
        path.write_bytes(b"".join(frames))
        assert [d.text for d in read_corpus(path)] == ["one", "two"]

    def test_byte_order_mark_and_line_ends_are_no_text(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
        assert next(read_corpus(tmp_path)).text == "one\ntwo"

    def test_group_follows_content_not_place(self, tmp_path):
        for name, order in (("a", "xy"), ("b", "yx")):
            (tmp_path / f"{name}.jsonl").write_text("".join(map(pile_line, order)))
        a, b = ({d.text: d.group for d in read_corpus(tmp_path / f"{n}.jsonl")} for n in ("a", "b"))
        assert a == b
        assert a["x"] != a["y"]

    def test_fingerprint_follows_names_and_contents(self, tmp_path):
        (tmp_path / "a.txt").write_text("one")
        first = open_source(tmp_path).fingerprint
        assert open_source(str(tmp_path)).fingerprint == first
        (tmp_path / "notes.pdf").write_text("not read")
        assert open_source(tmp_path).fingerprint == first
        (tmp_path / "a.txt").write_text("two")
        changed = open_source(tmp_path).fingerprint
        (tmp_path / "a.txt").rename(tmp_path / "b.txt")
        assert len({first, changed, open_source(tmp_path).fingerprint}) == 3


class TestErrors:
    def test_missing_path_names_the_built_in_corpora(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere.*no file or folder.*'stdlib'"):
            read_corpus(tmp_path / "nowhere")

    def test_folder_without_usable_files(self, tmp_path):
        (tmp_path / "a.csv").write_text("1,2")
        with pytest.raises(ValueError, match=r"has no \.txt, \.md, \.py, \.jsonl, \.jsonl\.zst"):
            read_corpus(tmp_path)
        with pytest.raises(ValueError, match=r"has no \.txt"):
            read_corpus(tmp_path / "a.csv")

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
    def test_empty_file(self, tmp_path, name):
        (tmp_path / name).write_text("\n")
        with pytest.raises(ValueError, match=f"corpus '{name}' is empty"):
            list(read_corpus(tmp_path / name))

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"text": "cut', "is not JSON"),
            ('{"body": "x"}', 'is no object with a string "text"'),
            ('{"text": 3}', 'is no object with a string "text"'),
            ('["text"]', 'is no object with a string "text"'),
            ("\udcff", "is not JSON"),
        ],
    )
    def test_bad_line_is_named(self, tmp_path, line, message):
        path = tmp_path / "val.jsonl"
        path.write_text(pile_line("fine") + line + "\n", errors="surrogateescape")
        with pytest.raises(ValueError, match=f"val.jsonl:2 {message}"):
            list(read_corpus(path))

    def test_text_that_is_not_utf8(self, tmp_path):
        (tmp_path / "a.txt").write_bytes("caf\xe9".encode("latin-1"))
        with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text"):
            list(read_corpus(tmp_path))

    def test_damaged_zst(self, tmp_path):
        path = tmp_path / "a.jsonl.zst"
        path.write_bytes(b"not compressed")
        with pytest.raises(ValueError, match="is not a whole zstandard file"):
            list(read_corpus(path))


class TestStdlib:
    def test_documents_come_in_a_fixed_order(self):
        first = list(islice(read_corpus("stdlib"), 40))
        assert first == list(islice(read_corpus("stdlib"), 40))
        assert {d.domain for d in first} == {"code", "docstrings"}
        assert open_source("stdlib").fingerprint == open_source("stdlib").fingerprint

    def test_docstrings_leave_the_code(self):
        source = '"""Module."""\n\nclass A:\n    """Class."""\n    if 1:\n'
        source += '        def f(self):\n            """Function.\n\n            More."""\n'
        source += "            return 'text'  # \x0c form feed\n"
        code, docstrings = _split_docstrings(source)
        assert docstrings == "Module.\n\nClass.\n\nFunction.\n\nMore."
        assert '"""' not in code
        assert "return 'text'  # \x0c form feed\n" in code

    @pytest.mark.parametrize(
        ("name", "group"),
        [
            ("test/test_json/test_dump.py", "json"),
            ("test/test_multiprocessing_fork.py", "multiprocessing"),
            ("test/test_strptime.py", "strptime"),
            ("test/test_dict.py", "test.dict"),
            ("test/support/__init__.py", "test.support"),
            ("unittest/test/test_case.py", "unittest"),
        ],
    )
    def test_tests_go_with_what_they_test(self, name, group):
        assert _tested_module(name, {"json", "multiprocessing", "strptime", "unittest"}) == group

    def test_another_corpus_is_one_function_and_one_line(self, monkeypatch):
        def tiny():
            source = open_source("stdlib")
            return source._replace(name="tiny", documents=iter(documents("text", " ")))

        monkeypatch.setitem(CORPORA, "tiny", tiny)
        assert [d.text for d in read_corpus("tiny")] == ["text"]


class TestNearDuplicates:
    def kept(self, *texts):
        return [d.id for d in drop_near_duplicates(documents(*texts))]

    def test_first_of_identical_texts_stays(self):
        assert self.kept(prose(1), prose(2), prose(1), "short", "short") == ["d0", "d1", "d3"]

    def test_edited_and_reindented_copies_go(self):
        edited = prose(1).replace("word", "WORD").replace(" ", "\n    ", 50)
        edited = "A new heading, " + edited[:1500]
        assert self.kept(edited, prose(1), prose(2)) == ["d1", "d2"]

    def test_an_excerpt_goes_but_not_its_book(self):
        book = prose(1, 2000)
        assert self.kept(book[4000:6000], book) == ["d1"]

    def test_a_shared_quotation_is_no_duplicate(self):
        license_text = prose(9, 60)
        assert self.kept(license_text + prose(1), license_text + prose(2)) == ["d0", "d1"]

    def test_nothing_to_compare(self):
        assert drop_near_duplicates([]) == []
