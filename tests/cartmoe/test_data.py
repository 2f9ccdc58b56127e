import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cartmoe.corpora import Document
from cartmoe.data import IGNORE, Sequences, TrainBatches, prepare, sequences, sequences_from
from cartmoe.files import temporary
from cartmoe.tokenized import SPLITS
from cartmoe.tokenizers import ByteTokenizer


def write_folder(path, num_documents=60, size=40):
    """Documents of random words in three domains, the larger the more numerous."""
    rng = random.Random(0)
    for i in range(num_documents):
        file = path / "abc"[min(i % 6, 2)] / f"{i:04}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(" ".join(f"é{rng.getrandbits(24):x}" for _ in range(size + i)))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def corpus(folder, cache):
    return prepare(folder, cache_dir=cache)


@pytest.fixture(scope="module")
def stdlib(cache):
    return prepare("stdlib", cache_dir=cache)


class TestCorpus:
    def test_tokens_are_the_documents_end_to_end(self, corpus, folder):
        table = corpus.documents
        assert (corpus.vocab_size, corpus.tokens.dtype) == (256, np.uint16)
        assert len(table) == 60
        assert table.start.tolist() == [0, *table.end[:-1]]
        assert table.end.iloc[-1] == len(corpus.tokens)
        for row in table.itertuples():
            ids = corpus.tokens[row.start : row.end]
            text = (folder / row.document_id).read_text()
            assert ids[0] == corpus.tokenizer.bos_id
            assert corpus.tokenizer.decode(ids) == text
            assert row.num_bytes == len(text.encode())
            assert row.domain == row.document_id[0]

    def test_split_is_a_tenth_and_independent_of_names_and_order(self, corpus, folder, tmp_path):
        share = corpus.split("validation").num_bytes.sum() / corpus.documents.num_bytes.sum()
        assert 0.05 < share < 0.15
        for i, path in enumerate(sorted(folder.rglob("*.txt"), reverse=True)):
            (tmp_path / "x").mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / "x" / f"{i:03}.txt")
        renamed = prepare(tmp_path / "x", cache_dir=tmp_path / "cache")
        assert set(renamed.split("validation").group) == set(corpus.split("validation").group)

    def test_one_document_is_for_training(self, tmp_path):
        (tmp_path / "a.txt").write_text("NA null nan")
        corpus = prepare(tmp_path / "a.txt", cache_dir=tmp_path)
        assert corpus.documents.split.tolist() == ["train"]
        with pytest.raises(ValueError, match=r"'a.txt' has no validation documents.*at least two"):
            sequences(corpus, 8)

    def test_two_documents_are_one_for_each(self, tmp_path):
        for name in "ab":
            (tmp_path / f"{name}.txt").write_text(f"text of {name}")
        assert prepare(tmp_path, cache_dir=tmp_path).documents.split.nunique() == 2

    def test_domains_may_look_like_missing_values(self, tmp_path):
        for domain in ("NA", "007"):
            line = {"text": f"about {domain}", "meta": {"pile_set_name": domain}}
            with (tmp_path / "a.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        assert set(prepare(tmp_path, cache_dir=tmp_path).documents.domain) == {"NA", "007"}

    def test_near_duplicates_leave_no_trace_on_the_other_side(self, folder, corpus, tmp_path):
        shutil.copytree(folder, tmp_path / "x")
        for path in sorted(folder.rglob("*.txt")):
            copy = "Copied. " + path.read_text()[:-30]
            (tmp_path / "x" / path.name).write_text(copy)
        doubled = prepare(tmp_path / "x", cache_dir=tmp_path / "cache")
        assert doubled.sha256 == corpus.sha256


class TestCache:
    def test_found_again(self, corpus, folder, cache):
        before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
        assert prepare(str(folder), "bytes", cache).sha256 == corpus.sha256
        assert before == {path: path.stat().st_mtime_ns for path in cache.rglob("*")}

    def test_manifest_has_every_file(self, corpus, cache, folder):
        (made,) = cache.glob(f"{folder.name}-*")
        files = json.loads((made / "manifest.json").read_text())["files"]
        assert set(files) == {"tokens.bin", "documents.csv"}
        for name, entry in files.items():
            data = (made / name).read_bytes()
            expected = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            assert entry == expected

    def test_default_place(self, monkeypatch, tmp_path):
        (tmp_path / "a.txt").write_text("text")
        for name in ("CARTMOE_CACHE", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.setenv(name, str(tmp_path / name))
        for place in ("CARTMOE_CACHE", "XDG_CACHE_HOME/cartmoe", "HOME/.cache/cartmoe"):
            prepare(tmp_path / "a.txt")
            assert len(list((tmp_path / place).glob("a.txt-*/tokens.bin"))) == 1
            monkeypatch.delenv(place.split("/")[0]) if "/." not in place else None

    def test_another_content_or_tokenizer_is_another_folder(self, tmp_path):
        write_folder(tmp_path / "x", 4)
        first = prepare(tmp_path / "x", cache_dir=tmp_path / "cache")
        bpe = prepare(tmp_path / "x", "bpe:300", tmp_path / "cache")
        (tmp_path / "x/a/0000.txt").write_text("changed")
        changed = prepare(tmp_path / "x", cache_dir=tmp_path / "cache")
        assert len({first.sha256, bpe.sha256, changed.sha256}) == 3
        assert len(list((tmp_path / "cache").iterdir())) == 3

    def test_bpe_is_trained_on_the_training_split_and_kept(self, folder, cache):
        trained = prepare(folder, "bpe:400", cache)
        found = prepare(folder, "bpe:400", cache)
        assert found.tokenizer.identity == trained.tokenizer.identity
        assert (found.sha256, found.tokenizer.name) == (trained.sha256, "bpe:400")
        row = found.split("validation").iloc[0]
        text = (folder / row.document_id).read_text()
        assert found.tokenizer.decode(found.tokens[row.start : row.end]) == text
        assert row.num_bytes == len(text.encode())

    @pytest.mark.parametrize(
        ("file", "damage", "message"),
        [
            ("tokens.bin", lambda b: b[:-2], "tokens.bin has"),
            ("tokens.bin", lambda b: b[:50] + bytes([b[50] ^ 1]) + b[51:], "SHA-256 of tokens"),
            ("documents.csv", lambda b: b.replace(b"train", b"drain"), "SHA-256 of documents"),
            ("documents.csv", None, "documents.csv is missing"),
            ("manifest.json", None, "manifest.json is missing"),
            ("manifest.json", lambda b: b[:40], "manifest.json cannot be read"),
            ("manifest.json", lambda b: b"[]", "manifest.json cannot be read"),
            ("manifest.json", lambda b: b.replace(b"bytes", b"kilos"), "cannot be read"),
            ("manifest.json", lambda b: b.replace(b'format": ', b'format": 9'), "cannot be read"),
        ],
    )
    def test_damage_is_repaired_with_a_warning(
        self, corpus, folder, tmp_path, file, damage, message
    ):
        prepare(folder, cache_dir=tmp_path)
        (made,) = tmp_path.iterdir()
        if damage:
            (made / file).write_bytes(damage((made / file).read_bytes()))
        else:
            (made / file).unlink()
        with pytest.warns(UserWarning, match=f"is damaged.*{message}.*made anew"):
            repaired = prepare(folder, cache_dir=tmp_path)
        assert repaired.sha256 == corpus.sha256
        assert list(tmp_path.iterdir()) == [made]
        assert prepare(folder, cache_dir=tmp_path).sha256 == corpus.sha256

    def test_a_failed_reading_leaves_nothing(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{')
        with pytest.raises(ValueError, match=r"a\.jsonl:2 is not JSON"):
            prepare(tmp_path / "a.jsonl", cache_dir=tmp_path / "cache")
        assert list((tmp_path / "cache").iterdir()) == []


PREPARE = """
import pathlib, sys, time
from cartmoe.data import prepare
folder, cache, ready, go = map(pathlib.Path, sys.argv[1:])
ready.touch()
while not go.exists():
    time.sleep(0.001)
print(prepare(folder, cache_dir=cache).sha256)
"""


def start_preparing(folder, cache, tmp_path, names):
    """Processes that begin together."""
    ready = [tmp_path / f"ready-{name}" for name in names]
    command = [sys.executable, "-c", PREPARE, folder, cache]
    go = tmp_path / "go"
    processes = [
        subprocess.Popen([*command, r, go], stdout=subprocess.PIPE, text=True) for r in ready
    ]
    while not all(r.exists() for r in ready):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    go.touch()
    return processes


class TestProcesses:
    def test_two_at_once(self, corpus, folder, tmp_path):
        cache = tmp_path / "cache"
        processes = start_preparing(folder, cache, tmp_path, "ab")
        outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
        assert outputs == [corpus.sha256] * 2
        assert len(list(cache.iterdir())) == 1

    def test_killed_half_way(self, tmp_path):
        folder = write_folder(tmp_path / "x", 1500)
        cache = tmp_path / "cache"
        cache.mkdir()
        (process,) = start_preparing(folder, cache, tmp_path, "a")
        while not list(cache.iterdir()):
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        (left,) = cache.iterdir()
        assert f".partial-{process.pid}-" in left.name
        with temporary(cache / "other") as alive:
            alive.mkdir()
            corpus = prepare(folder, cache_dir=cache)
            assert not left.exists()
            assert alive.exists()
        assert corpus.sha256 == prepare(folder, cache_dir=tmp_path / "fresh").sha256


class TestStdlib:
    def test_all_domains_on_both_sides(self, stdlib):
        table = stdlib.documents
        assert table.document_id.is_unique
        assert {"code", "docstrings", "reference"} <= set(table.domain)
        assert set(stdlib.split("validation").domain) == set(table.domain)
        share = stdlib.split("validation").num_bytes.sum() / table.num_bytes.sum()
        assert 0.05 < share < 0.2

    def test_a_package_is_on_one_side(self, stdlib):
        assert (stdlib.documents.groupby("group").split.nunique() == 1).all()
        of_json = stdlib.documents[stdlib.documents.group == "json"].document_id
        assert {"code/json/decoder.py", "docstrings/json/decoder.py"} <= set(of_json)

    def test_packages_are_the_units_and_take_turns(self, stdlib):
        files = sequences(stdlib, 256, limit=40, max_tokens_per_document=256)
        units = files.by_group(stdlib.group_of)
        assert torch.equal(units.sequence_id_S, files.sequence_id_S)
        groups = stdlib.split("validation").groupby("domain").group.nunique()
        for domain, packages in groups.items():
            of_domain = [
                u for u, d in zip(units.document_id, units.domain, strict=True) if d == domain
            ]
            assert len(set(of_domain)) == min(packages, len(of_domain))

    def test_no_long_passage_is_on_both_sides(self, stdlib):
        """Of what a model could copy word for word: paragraphs of 400 bytes and more."""
        passages = {"train": set(), "validation": set()}
        text = stdlib.tokenizer.decode
        for row in stdlib.documents.itertuples():
            paragraphs = text(stdlib.tokens[row.start : row.end]).split("\n\n")
            passages[row.split] |= {" ".join(p.split()) for p in paragraphs if len(p) >= 400}
        shared = passages["train"] & passages["validation"]
        assert len(shared) < 0.01 * len(passages["validation"])

    @pytest.mark.parametrize("limit", [12, 50, 200])
    def test_domains_have_their_share_of_the_sample(self, stdlib, limit):
        s = sequences(stdlib, 256, limit=limit, max_tokens_per_document=500)
        assert len(set(s.document_id)) == limit
        table = stdlib.split("validation")
        size = (table.end - table.start - 1).groupby(table.domain).sum()
        counts_S = (s.targets_SL != IGNORE).sum(-1).tolist()
        for domain, share in (size / size.sum()).items():
            taken = sum(n for n, d in zip(counts_S, s.domain, strict=True) if d == domain)
            assert abs(taken - share * s.num_tokens) <= 500


class TestTrainBatches:
    def test_pure_function_of_seed_and_step(self, corpus):
        a, b = (TrainBatches(corpus, 4, 16, seed=1) for _ in range(2))
        late = [a.batch(step) for step in (900, 3, 901)]
        assert all(torch.equal(x, b.batch(s)) for x, s in zip(late, (900, 3, 901), strict=True))
        assert not torch.equal(a.batch(0), TrainBatches(corpus, 4, 16, seed=2).batch(0))
        assert a.batch(0).shape == (4, 17)
        assert a.batch(0).dtype == torch.int64

    @pytest.mark.parametrize("length", [1, 16, 1000])
    def test_every_token_is_a_target_at_most_once_in_an_epoch(self, corpus, length):
        batches = TrainBatches(corpus, 1, length)
        train = corpus.tokens[: corpus.split("train").end.max()]
        n = batches.windows_per_epoch
        assert n == len(train) // length
        for epoch in range(2):
            starts = batches._epoch(epoch)
            targets = (starts[:, None] + 1 + np.arange(length)) % len(train)
            assert len(np.unique(targets)) == n * length
        assert not np.array_equal(batches._epoch(0), batches._epoch(1))
        window = batches.batch(n + 1)[0].numpy()
        start = batches._epoch(1)[1]
        np.testing.assert_array_equal(window, np.resize(np.roll(train, -start), length + 1))

    def test_only_training_documents(self, corpus):
        train = corpus.split("train")
        ids = set(corpus.tokens[: train.end.max()].tolist())
        seen = TrainBatches(corpus, 64, 32).batch(0).unique().tolist()
        assert set(seen) <= ids
        assert train.num_bytes.sum() + len(train) == train.end.max()

    def test_small_corpus_starts_over(self, corpus):
        batch = TrainBatches(corpus, 50, len(corpus.tokens) // 2).batch(3)
        assert batch.shape[0] == 50

    def test_errors(self, corpus):
        with pytest.raises(ValueError, match=r"does not fit into the \d+ training tokens of"):
            TrainBatches(corpus, 1, len(corpus.tokens))
        with pytest.raises(ValueError, match="batch_size is 0; it must be at least 1"):
            TrainBatches(corpus, 0, 8)


def in_memory(texts):
    return [Document(f"doc{i}", "", "ab"[i % 2], text) for i, text in enumerate(texts)]


class CountsWhatItDecodes(ByteTokenizer):
    """Drops a space at the beginning, and makes three bytes of half a character."""

    def num_bytes(self, ids):
        return len(self.decode(ids).removeprefix(" ").encode())


def by_document(s: Sequences):
    """Per document, in order: targets, inputs and bytes."""
    found: dict[str, tuple[list, list, int]] = {}
    for i, id in enumerate(s.document_id):
        targets, inputs, num_bytes = found.get(id, ([], [], 0))
        real = s.targets_SL[i] != IGNORE
        targets += s.targets_SL[i][real].tolist()
        inputs += s.tokens_SL[i][real].tolist()
        found[id] = targets, inputs, num_bytes + int(s.num_bytes_S[i])
    return found


texts_with_content = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40),
    min_size=1,
    unique=True,
)


class TestSequences:
    @settings(deadline=None)
    @given(texts_with_content, st.integers(1, 20))
    def test_every_token_is_predicted_once_and_bytes_add_up(self, texts, length):
        tokenizer = ByteTokenizer()
        s = sequences_from(in_memory(texts), tokenizer, length)
        found = by_document(s)
        for document in in_memory(texts):
            targets, inputs, num_bytes = found[document.id]
            ids = tokenizer.encode(document.text).tolist()
            assert targets == ids
            assert inputs == [tokenizer.bos_id, *ids[:-1]]
            assert num_bytes == len(document.text.encode())
        assert s.num_tokens == s.num_bytes_S.sum() == len("".join(texts).encode())
        assert s.tokens_SL.shape == s.targets_SL.shape == (len(s), length)

    def test_documents_that_repeat_others_count_once(self):
        with pytest.warns(UserWarning, match="2 of the documents repeat others to the last char"):
            s = sequences_from(in_memory(["one", "two", "one", "one"]), ByteTokenizer(), 8)
        assert (
            s.document_id
            == sequences_from(in_memory(["one", "two"]), ByteTokenizer(), 8).document_id
        )

    @pytest.mark.parametrize("length", [1, 2, 3, 50])
    def test_bytes_add_up_where_only_a_whole_text_decodes(self, length):
        text = "the café — on the mat"
        s = sequences_from(in_memory([text]), CountsWhatItDecodes(), length)
        assert s.num_bytes_S.sum() == len(text.encode())

    def test_of_a_corpus_as_of_its_documents(self, corpus, folder):
        s = sequences(corpus, 32)
        ids = corpus.split("validation").document_id
        documents = [Document(id, "", id[0], (folder / id).read_text()) for id in ids]
        assert s.sha256 == sequences_from(documents, corpus.tokenizer, 32).sha256
        assert s.num_bytes_S.sum() == corpus.split("validation").num_bytes.sum()

    def test_no_validation_document_in_training(self, corpus):
        train, validation = (set(sequences(corpus, 64, s).document_id) for s in SPLITS)
        assert not train & validation
        assert len(train | validation) == 60

    def test_limit_nests_and_spreads(self, corpus):
        all_, six, three = (sequences(corpus, 32, "train", limit=n) for n in (None, 6, 3))
        for part, n in ((six, 6), (three, 3)):
            assert len(set(part.document_id)) == n
            assert all_[: len(part)].sha256 == part.sha256

    def test_the_first_tokens_of_documents(self, corpus):
        whole = by_document(sequences(corpus, 32))
        cut = sequences(corpus, 32, max_tokens_per_document=40, windows="first")
        for id, (targets, _, num_bytes) in by_document(cut).items():
            assert targets == whole[id][0][:40]
            assert num_bytes == 40

    @pytest.mark.parametrize("most", [1, 31, 32, 40, 70])
    def test_windows_that_are_spread(self, corpus, most):
        """Each a part of its document, behind the one before, and at the same places again."""
        whole, s = (sequences(corpus, 32, max_tokens_per_document=n) for n in (None, most))
        whole_of, starts = by_document(whole), {}
        for i, id in enumerate(s.document_id):
            real_L = s.targets_SL[i] != IGNORE
            targets, before = s.targets_SL[i][real_L].tolist(), s.tokens_SL[i][real_L].tolist()
            ids = [0, *whole_of[id][0]]  # bos, and all that follows
            places = [
                n for n in range(len(ids)) if ids[n : n + len(targets) + 1] == before[:1] + targets
            ]
            starts.setdefault(id, []).append(places)
        for id, (targets, _, num_bytes) in by_document(s).items():
            assert len(targets) == num_bytes == min(most, len(whole_of[id][0]))
            assert all(starts[id])
            assert min(starts[id][0]) <= max(starts[id][-1])
        assert len({min(places[0]) for places in starts.values()}) > 3  # not all at the beginning
        assert len(s.sequence_id_S.unique()) == len(s)
        assert s.sha256 == sequences(corpus, 32, max_tokens_per_document=most).sha256
        few = sequences(corpus, 32, limit=3, max_tokens_per_document=most)
        assert s[: len(few)].sha256 == few.sha256

    def test_every_place_of_a_window_is_as_likely(self):
        text = "".join(chr(33 + i) for i in range(10))
        counts = np.zeros(8)
        for number in range(2000):
            document = Document(f"{number}", "g", "d", text)
            s = sequences_from([document], ByteTokenizer(), 3, max_tokens_per_document=3)
            counts[int(s.targets_SL[0, 0]) - 33] += 1
        assert scipy.stats.chisquare(counts).pvalue > 0.01

    def test_windows_of_another_name(self, corpus):
        with pytest.raises(ValueError, match="windows is 'last'; choose one of 'spread', 'first'"):
            sequences(corpus, 8, windows="last")

    def test_identity(self, corpus):
        s = sequences(corpus, 32)
        assert s.sequence_id_S.dtype == torch.int64
        assert (s.sequence_id_S >= 0).all()
        assert len(s.sequence_id_S.unique()) == len(s)
        order = sequences(corpus, 32, limit=2)
        assert torch.equal(s.sequence_id_S[: len(order)], order.sequence_id_S)
        assert s[:2].sha256 != s[1:3].sha256
        assert s[1:3].document_id == s.document_id[1:3]
        assert len(s[1:3]) == 2

    def test_errors(self, corpus):
        twice = in_memory(["one"]) + in_memory(["two"])
        with pytest.raises(ValueError, match="'doc0' stands for more than one document"):
            sequences_from(twice, ByteTokenizer(), 8)
        with pytest.raises(ValueError, match="documents have no text"):
            sequences_from(in_memory([""]), ByteTokenizer(), 8)
        with pytest.raises(ValueError, match=r"split is 'test'; choose one of 'train', 'valid"):
            sequences(corpus, 8, "test")
        for name in ("limit", "length", "max_tokens_per_document"):
            arguments = {"length": 8, name: 0}
            with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
                sequences(corpus, **arguments)

    def test_tokens_of_a_trained_vocabulary(self, folder, cache):
        corpus = prepare(folder, "bpe:400", cache)
        s = sequences(corpus, 16)
        assert s.num_bytes_S.sum() == corpus.split("validation").num_bytes.sum()
        assert s.num_tokens < s.num_bytes_S.sum()
        text = "naïve café — ☕ and 日本語"
        every = sequences_from(in_memory([text]), corpus.tokenizer, 1)
        assert every.num_bytes_S.sum() == len(text.encode())
        assert every.num_bytes_S.min() == 1
