"""Text to token ids and back, with the bytes that ids stand for: bits per byte needs them exact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm.auto import tqdm

from cartmoe.files import path_of
from cartmoe.foreign import named, read_text

BOS_TOKENS = ("<s>", "<bos>", "<|begin_of_text|>", "<|endoftext|>", "[BOS]", "[CLS]")


class Tokenizer(Protocol):
    """What the data layer asks of a tokenizer.

    name        for people
    vocab_size  ids lie in 0..vocab_size-1
    bos_id      starts every document, stands for no byte of it
    identity    SHA-256 of all that defines the tokenizer
    """

    name: str
    vocab_size: int
    bos_id: int
    identity: str

    def encode(self, text: str) -> np.ndarray:
        """(N,) int64 ids of the text, without `bos_id`."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; `bos_id` and other special tokens have none."""

    def num_bytes(self, ids: Iterable[int]) -> int:
        """How many bytes of UTF-8 text the ids stand for, also where they begin or end within a
        character."""


class ByteTokenizer:
    """One id per byte of UTF-8. The NUL byte starts a document; in a text it becomes a space."""

    name = "bytes"
    vocab_size = 256
    bos_id = 0
    identity = hashlib.sha256(b"cartmoe bytes, NUL starts a document").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        data = text.replace("\0", " ").encode()
        return np.frombuffer(data, np.uint8).astype(np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        ids = np.asarray(ids)
        return bytes(ids[ids != self.bos_id].astype(np.uint8)).decode(errors="replace")

    def num_bytes(self, ids: Iterable[int]) -> int:
        return int(np.count_nonzero(np.asarray(ids)))


class JsonTokenizer:
    """A tokenizer of the tokenizers library, from the text of its JSON file (kept as `json`).

    starts   tokens that may start a document, the best first, before those of `BOS_TOKENS`

    Special tokens are never read from a text: a document about <s> does not start another one.
    Raises `ValueError` for text that defines no tokenizer, or one without any of these tokens.
    """

    def __init__(self, definition: str, name: str, starts: Sequence[str] = ()):
        self.json, self.name, self.starts = definition, name, tuple(starts)
        library = _library()
        with named(f"tokenizer {name!r} is not one of the tokenizers library"):
            self._tokenizer = library.Tokenizer.from_str(definition)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        bos = next((token for token in (*starts, *BOS_TOKENS) if token in vocabulary), None)
        if bos is None:
            raise ValueError(
                f"tokenizer {name!r} has no token that could start a document; it needs one of "
                f"{', '.join(BOS_TOKENS)}"
            )
        self.bos_id = vocabulary[bos]
        named_start = f"\n{bos}" if bos in starts else ""
        self.identity = hashlib.sha256((definition + named_start).encode()).hexdigest()
        self._bytes_V = self._token_bytes(vocabulary)
        self._prefixed_V = self._prefixed_tokens(vocabulary)
        self._fallback_V = self._byte_tokens(vocabulary)
        self._letter = [id for token, id in vocabulary.items() if token == "<0x41>"]

    def __reduce__(self):
        return JsonTokenizer, (self.json, self.name, self.starts)

    def _token_bytes(self, vocabulary: dict[str, int]) -> np.ndarray | None:
        """Bytes each id stands for, where every character of a token stands for one byte."""
        if not isinstance(self._tokenizer.decoder, _library().decoders.ByteLevel):
            return None
        bytes_V = np.zeros(self.vocab_size, np.int64)
        for token, id in vocabulary.items():
            bytes_V[id] = len(token)
        for id, token in self._tokenizer.get_added_tokens_decoder().items():
            bytes_V[id] = 0 if token.special else len(token.content.encode())
        return bytes_V

    def _prefixed_tokens(self, vocabulary: dict[str, int]) -> np.ndarray:
        """(V,) which ids begin with a space that, at the beginning of a text, is not the text's but
        was put before it. (Where it was the text's own, nothing was put: one byte too few.)"""
        prefixed_V = np.zeros(self.vocab_size, bool)
        if '"add_prefix_space": true' in json.dumps(json.loads(self.json).get("pre_tokenizer")):
            prefixed_V[[id for token, id in vocabulary.items() if token.startswith("Ġ")]] = True
        return prefixed_V

    def _byte_tokens(self, vocabulary: dict[str, int]) -> np.ndarray:
        """(V,) which ids stand for a byte of a character that has no token: <0xE2>, where the
        decoder takes them for that."""
        bytes_V = np.zeros(self.vocab_size, bool)
        if '"ByteFallback"' in json.dumps(json.loads(self.json).get("decoder")):
            names = (f"<0x{byte:02X}>" for byte in range(256))
            bytes_V[[vocabulary[name] for name in names if name in vocabulary]] = True
        return bytes_V

    def encode(self, text: str) -> np.ndarray:
        # Without the offsets into the text, which nobody reads and which cost as much again.
        with named(f"tokenizer {self.name!r} cannot encode a text"):
            batch = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.array(batch[0].ids, dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(id) for id in ids], skip_special_tokens=True)

    def num_bytes(self, ids: Iterable[int]) -> int:
        ids = np.asarray(ids, dtype=np.int64)
        if self._bytes_V is not None:
            is_start = len(ids) > 1 and ids[0] == self.bos_id
            return int(self._bytes_V[ids].sum() - (is_start and self._prefixed_V[ids[1]]))
        # In parts, since half a character decodes to something else; but for the first behind a
        # byte, since a decoder may drop a space at the beginning of a text.
        is_byte = self._fallback_V[ids]
        parts = np.split(ids, np.flatnonzero(is_byte[1:] != is_byte[:-1]) + 1)
        count = 0
        for number, part in enumerate(parts):
            if len(part) and self._fallback_V[part[0]]:
                count += len(part)
            else:
                before = self._letter[: number > 0]
                count += len(self.decode([*before, *part]).encode()) - len(before)
        return count


def load_tokenizer(
    spec: str | Path | Tokenizer = "bytes", training_texts: Iterable[str] | None = None
) -> Tokenizer:
    """ "bytes", "bpe:8192" (a byte-level BPE of that size, trained on the texts), the path of a
    JSON file of the tokenizers library, or a tokenizer itself.

    `prepare` hands over a corpus' training split, and keeps what was trained. Raises `ValueError`
    for a BPE without texts or smaller than its alphabet, `FileNotFoundError` for a path that does
    not exist, `ImportError` without the tokenizers library.
    """
    if not isinstance(spec, str | Path):
        return _made(spec)
    if spec == "bytes":
        return ByteTokenizer()
    size = _bpe_size(spec)
    if size is not None:
        if training_texts is None:
            raise ValueError(
                f"tokenizer is {spec!r}, which is trained on a corpus; "
                f"take prepare(corpus, {spec!r}).tokenizer"
            )
        return JsonTokenizer(_train_bpe(training_texts, size), str(spec))
    path = path_of("tokenizer", spec)
    if not path.is_file():
        raise FileNotFoundError(
            f"tokenizer is {str(spec)!r}; give 'bytes', 'bpe:<vocabulary size>', or the path of a "
            f"JSON file of the tokenizers library"
        )
    text = read_text(path)
    with named(path):
        return JsonTokenizer(text, path.stem)


def tokenizer_key(spec: str | Path | Tokenizer) -> str:
    """Which tokenizer a spec means, known before it is trained. Errors as `load_tokenizer`."""
    if not isinstance(spec, str | Path) or _bpe_size(spec) is None:
        return load_tokenizer(spec).identity
    return f"{spec} of tokenizers {_library().__version__}"


def _made(given: Tokenizer) -> Tokenizer:
    if not (hasattr(given, "encode") and hasattr(given, "identity")):
        raise ValueError(f"tokenizer is a {type(given).__name__}; give a path, or a tokenizer")
    return given


def _bpe_size(spec: str | Path) -> int | None:
    """8192 for "bpe:8192", None for any other kind; raises `ValueError` for "bpe:many"."""
    kind, colon, size = str(spec).partition(":")
    if kind != "bpe" or not colon:
        return None
    if not (size.isascii() and size.isdecimal()) or not 257 <= int(size) < 2**31:
        raise ValueError(
            f"tokenizer is {spec!r}; the size of a byte-level BPE is at least 257, every byte and "
            f"the start of a document, and below 2**31"
        )
    return int(size)


def _train_bpe(texts: Iterable[str], size: int) -> str:
    """JSON of a byte-level BPE. The library breaks ties by id, so the same texts give the same."""
    library = _library()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tqdm(texts, desc="training tokenizer", delay=1), trainer)
    return tokenizer.to_str()


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError('this tokenizer needs tokenizers: pip install "cartmoe[hf]"') from error
    return tokenizers
