"""A tokenized corpus on disk: documents without near-duplicates, split, as ids end to end."""

from __future__ import annotations

import csv
import hashlib
import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from cartmoe.config import check_choice
from cartmoe.corpora import Document, Source, open_source
from cartmoe.duplicates import drop_near_duplicates
from cartmoe.files import path_of
from cartmoe.folders import cached_folder, read_manifest
from cartmoe.tokenizers import JsonTokenizer, Tokenizer, load_tokenizer, tokenizer_key

FORMAT = 2  # raise it when a cached corpus' files change, or what a reader makes of a corpus
SPLITS = ("train", "validation")
VALIDATION_SHARE = 0.1


@dataclass(frozen=True, eq=False)
class Corpus:
    """A tokenized corpus, documents one after the other, those to train on first.

    tokens     (N,) ids, mapped from disk; every document starts with the tokenizer's bos_id
    documents  a row each: document_id, group, domain, split ("train", "validation"), start, end
               (tokens[start:end] are its ids), num_bytes (UTF-8 bytes that the ids stand for)
    sha256     of tokens, documents and tokenizer: the same wherever the corpus is prepared
    fingerprint   of the text that it was made of
    """

    name: str
    tokens: np.memmap
    documents: pd.DataFrame
    tokenizer: Tokenizer
    sha256: str
    fingerprint: str

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def group_of(self) -> dict[str, str]:
        """The group of each document, by its id."""
        return dict(zip(self.documents.document_id, self.documents.group, strict=True))

    def split(self, name: str) -> pd.DataFrame:
        """Its documents. Raises `ValueError` for an unknown split or one without documents."""
        check_choice("split", name, SPLITS)
        documents = self.documents[self.documents.split == name]
        if documents.empty:
            raise ValueError(_no_documents(self.name, name))
        return documents


def prepare(
    corpus: str | Path,
    tokenizer: str | Path | Tokenizer = "bytes",
    cache_dir: str | Path | None = None,
) -> Corpus:
    """The tokenized corpus, from the cache or made now.

    corpus     "stdlib", "factorial" or the path of files; `cartmoe.corpora` tells which
    tokenizer  "bytes", "bpe:8192", the path of a JSON file or a tokenizer, as `load_tokenizer`
               takes it
    cache_dir  default: $CARTMOE_CACHE, or cartmoe in $XDG_CACHE_HOME or ~/.cache

    Near-duplicates are dropped; about a tenth of the bytes is for validation, whole groups of
    documents at a time, chosen by hash. Making it holds the text in memory. A cached corpus is
    checked byte by byte and made anew, with a warning, if it is damaged. Raises as `open_source`
    and `load_tokenizer` do.
    """
    source = open_source(corpus)
    key = {
        "format": FORMAT,
        "corpus": source.fingerprint,
        "tokenizer": tokenizer_key(tokenizer),
    }
    cache = path_of("cache_dir", cache_dir or _default_cache())
    folder = cached_folder(cache, source.name, key, lambda new: _write(new, source, tokenizer))
    return _open(folder, source, tokenizer)


def documents_of(source: Source, split: str, trained: Collection[str] = ()) -> list[Document]:
    """The documents of a split, chosen as `prepare` does, without tokens; `trained`: the groups to
    train on, if that is settled. Raises `ValueError` for an unknown split or one without documents.
    """
    check_choice("split", split, SPLITS)
    documents = drop_near_duplicates(source.documents)
    split_of = _split(documents)
    if trained:
        split_of = {group: SPLITS[group not in trained] for group in split_of}
    chosen = [document for document in documents if split_of[document.group] == split]
    if not chosen and trained:
        raise ValueError(
            f"corpus {source.name!r} has no {split} documents: of each it is settled otherwise, by "
            'what the model was trained on; split="all" takes them all the same'
        )
    if not chosen:
        raise ValueError(_no_documents(source.name, split))
    return chosen


def _no_documents(corpus: str, split: str) -> str:
    return (
        f"corpus {corpus!r} has no {split} documents: it takes at least two documents that differ "
        f"to have both {' and '.join(SPLITS)}"
    )


def _default_cache() -> str:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return os.environ.get("CARTMOE_CACHE") or f"{cache}/cartmoe"


def _write(folder: Path, source: Source, tokenizer_spec: str | Path | Tokenizer) -> None:
    documents = drop_near_duplicates(source.documents)
    split = _split(documents)
    # Those to train on first: a training window is then one slice of the tokens.
    documents.sort(key=lambda document: SPLITS.index(split[document.group]))
    texts = [d.text for d in documents if split[d.group] == "train"]
    tokenizer = load_tokenizer(tokenizer_spec, texts)
    if isinstance(tokenizer, JsonTokenizer):
        (folder / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
    rows, end, dtype = [], 0, _dtype(tokenizer)
    with (folder / "tokens.bin").open("wb") as file:
        for document in tqdm(documents, desc="tokenizing", delay=1):
            ids = document_ids(document, tokenizer)
            file.write(ids.astype(dtype).tobytes())
            start, end = end, end + len(ids)
            id, group, domain, _ = document
            num_bytes = tokenizer.num_bytes(ids)
            rows.append((id, group, domain, split[group], start, end, num_bytes))
    columns = ["document_id", "group", "domain", "split", "start", "end", "num_bytes"]
    table = pd.DataFrame(rows, columns=columns)
    # A carriage return is left bare by csv, and then taken for the end of a line.
    bare = table[["document_id", "domain"]].map(lambda text: "\r" in text).any(axis=None)
    quoting = csv.QUOTE_ALL if bare else csv.QUOTE_MINIMAL
    table.to_csv(folder / "documents.csv", index=False, quoting=quoting)


def _open(folder: Path, source: Source, tokenizer_spec: str | Path | Tokenizer) -> Corpus:
    if isinstance(tokenizer_spec, str | Path) and (folder / "tokenizer.json").exists():
        json = (folder / "tokenizer.json").read_text(encoding="utf-8")
        tokenizer: Tokenizer = JsonTokenizer(json, Path(tokenizer_spec).stem)
    else:
        tokenizer = load_tokenizer(tokenizer_spec)
    text = dict.fromkeys(["document_id", "group", "domain", "split"], str)
    # A document may be called "NA".
    documents = pd.read_csv(folder / "documents.csv", dtype=text, keep_default_na=False)
    tokens = np.memmap(folder / "tokens.bin", _dtype(tokenizer), mode="r")
    files = read_manifest(folder)
    parts = [tokenizer.identity, *(files[f]["sha256"] for f in ("tokens.bin", "documents.csv"))]
    sha256 = hashlib.sha256("".join(parts).encode()).hexdigest()
    return Corpus(source.name, tokens, documents, tokenizer, sha256, source.fingerprint)


def _dtype(tokenizer: Tokenizer) -> str:
    return "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"


def document_ids(document: Document, tokenizer: Tokenizer) -> np.ndarray:
    """(N,) int64: bos_id and the ids of the text."""
    return np.concatenate([[tokenizer.bos_id], tokenizer.encode(document.text)])


def _split(documents: list[Document]) -> dict[str, str]:
    """The split of each group: in the order of their hashes, the first tenth of the bytes is for
    validation, but at least one group, and never all."""
    sizes: Counter[str] = Counter()
    for document in documents:
        sizes[document.group] += len(document.text.encode())
    groups = sorted(sizes, key=lambda group: hashlib.sha256(group.encode()).digest())
    size = np.array([sizes[group] for group in groups])
    middle = (size.cumsum() - size / 2) / size.sum()
    num_validation = min(max(1, int(sum(middle < VALIDATION_SHARE))), len(groups) - 1)
    return {group: SPLITS[i < num_validation] for i, group in enumerate(groups)}
