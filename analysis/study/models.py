"""The models of a study: found where they are, or trained.

Whether there is anything to do is told from manifests and configurations alone, which is quick;
weights are read, and every byte of them checked, by who measures or trains.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from analysis.adapters import identity_of
from analysis.study.specs import ModelSpec
from analysis.study.study import Study
from cartmoe import checkpoint as checkpoints
from cartmoe.data import Corpus
from cartmoe.recipe import MAY_CHANGE
from cartmoe.run import check_same, read_run


@dataclass(frozen=True)
class Checkpoint:
    """A model of the study that is there to be measured."""

    spec: ModelSpec
    path: Path
    identity: str

    @classmethod
    def of(cls, spec: ModelSpec, path: Path) -> Checkpoint:
        """By what its manifest says; of a pretrained one by its files."""
        return cls(spec, path, identity_of(path))


def find(study: Study, spec: ModelSpec, corpus: Corpus, out: Path) -> Checkpoint | None:
    """The model's checkpoint if it is there, finished; None for one that is to be trained.

    Raises `ValueError` or `OSError` for a given one that is damaged, or cannot read the study's
    tokens, and where a run of another configuration stands in the way of training.
    """
    if spec.hf:
        return Checkpoint.of(spec, Path(spec.hf))
    if spec.path:
        given = last_checkpoint(Path(spec.path))
        _check_tokens(study, spec, given, corpus)
        return Checkpoint.of(spec, given)
    path = _trained(spec, run_folder(out, spec), corpus)
    return Checkpoint.of(spec, path) if path else None


def check_bytes(study: Study, checkpoint: Checkpoint) -> Checkpoint:
    """The same with every byte read: of a run whose newest checkpoint is damaged the one before.

    Raises as `find` does.
    """
    spec = checkpoint.spec
    if spec.hf:
        return checkpoint  # all were read for its identity
    try:
        return Checkpoint.of(spec, checkpoints.newest(spec.path or checkpoint.path.parent.parent))
    except (ValueError, OSError) as error:
        raise ValueError(f"{study.origin}: {place_of(spec)}: {error}") from error


def trained(spec: ModelSpec, out: Path) -> Checkpoint:
    """The checkpoint of a model that has been trained in `out`, with every byte read."""
    return Checkpoint.of(spec, checkpoints.newest(run_folder(out, spec)))


def run_folder(out: Path, spec: ModelSpec) -> Path:
    """Where the study trains the model."""
    return out / "models" / f"{spec.name}-s{spec.train_seed}"


def place_of(spec: ModelSpec) -> str:
    """Where the study speaks of the model, for what is wrong with it."""
    given = f"path {spec.path}" if spec.path else f"hf {spec.hf}"
    return f"models, {given}" if spec.given else f"model {spec.name!r}"


def last_checkpoint(directory: Path) -> Path:
    """The checkpoint itself, or the newest one of a run, damaged or not."""
    return [directory, *checkpoints.run_checkpoints(directory)][-1]


def _trained(spec: ModelSpec, folder: Path, corpus: Corpus) -> Path | None:
    """The last checkpoint of a finished run of exactly what is asked for."""
    asked = {
        "model": spec.config.to_dict(),
        "train": asdict(spec.train),
        "data": {"corpus_sha256": corpus.sha256},
    }
    path = last_checkpoint(folder)
    try:
        there = read_run(folder)["asked"]
    except (ValueError, KeyError, OSError):  # `train` begins, or says what is wrong
        return None
    check_same(folder, there, asked, MAY_CHANGE)  # as `train` will
    try:
        check_same(folder, there, asked, may_change=())
        return path if checkpoints.read_meta(path)["step"] >= spec.train.steps else None
    except (ValueError, KeyError, OSError):  # `train` goes on, or makes it good
        return None


def _check_tokens(study: Study, spec: ModelSpec, path: Path, corpus: Corpus) -> None:
    tokenizer, size = checkpoints.read_tokenizer(path), checkpoints.read_config(path).vocab_size
    name = study.data.tokenizer
    if tokenizer and tokenizer.identity != corpus.tokenizer.identity:
        raise ValueError(
            f"model {spec.name!r} reads tokens of {tokenizer.name!r}; those of the study are of "
            f"{name!r} (data.tokenizer)"
        )
    if size < corpus.vocab_size:
        raise ValueError(
            f"model {spec.name!r} has a vocabulary of {size}; data.tokenizer {name!r} needs "
            f"{corpus.vocab_size}"
        )
