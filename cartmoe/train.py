"""Training: one loop for every family, resumed exactly after any kind of end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from cartmoe import run
from cartmoe.checkpoint import load, read_meta, read_optimizer, save, step_folder
from cartmoe.config import ModelConfig
from cartmoe.data import Corpus, TrainBatches, prepare
from cartmoe.distributed import Ranks, ranks
from cartmoe.files import path_of
from cartmoe.hooks import router_sites
from cartmoe.interrupt import Interrupt
from cartmoe.metrics import Metrics, summary, violations, worst
from cartmoe.model import LanguageModel
from cartmoe.objective import Gradient, num_parts
from cartmoe.optim import (
    clip_gradients,
    gradient_norm,
    learning_rate_factor,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
)
from cartmoe.precision import probe_precision
from cartmoe.recipe import MAY_CHANGE, TrainConfig
from cartmoe.routing import update_selection_bias

__all__ = ["TrainConfig", "train"]

GROUPS = 10_000  # at most so many are listed in a checkpoint

ADVICE = (
    "nothing of this step is kept, earlier checkpoints are good; a lower learning_rate, a longer "
    "warmup or precision fp32 may help, in another directory"
)


def train(
    model_config: ModelConfig,
    train_config: TrainConfig,
    out: str | Path,
    *,
    device: str | None = None,
    threads: int | None = None,
    progress: bool = True,
    watch: Callable[[Mapping[str, Any]], None] | None = None,
) -> Path:
    """Train a model in the directory `out`, or go on where an earlier process ended; returns it.

    A resumed run computes, bit by bit, what it would have computed without an end: on a CPU of the
    same kind with the same number of processes (sums on a GPU have no fixed order). Precision and
    number of threads are kept. A finished run is left as it is. Ctrl-C and SIGTERM write a
    checkpoint after the step and raise `KeyboardInterrupt` with a message. Under torchrun all
    processes share `out`.

    device   default: a GPU if there is one, else "cpu"
    threads  of a run that begins; default: as many as this process has
    watch    is called with every step's row of metrics

    Raises `ValueError` if `out` holds a run of another configuration or is being trained in, and
    for a vocabulary that does not fit; `FloatingPointError` naming the step for a loss, gradient
    or router that is not finite; `CheckpointError` if every checkpoint is damaged.
    """
    out = path_of("out", out)
    with ExitStack() as stack:
        group = stack.enter_context(ranks(device))
        start = None
        if group.first:
            stack.enter_context(run.training_in(out))
            corpus = prepare(train_config.corpus, train_config.tokenizer)
            found = _start(model_config, train_config, corpus, group, out, threads)
            start = found, run.resume_point(out)
        # The others read what the first has written, the corpus in the cache too.
        found, checkpoint = group.from_first(start)
        if not group.first:
            corpus = prepare(train_config.corpus, train_config.tokenizer)
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(found["threads"])
        gpus = [] if group.device == "cpu" else [group.device]
        stack.enter_context(torch.random.fork_rng(gpus))
        config = replace(train_config, precision=found["precision"]["precision"])
        if checkpoint is None or read_meta(checkpoint)["step"] < config.steps:
            _Trainer(model_config, config, corpus, group, checkpoint).run(out, progress, watch)
        elif progress and group.first:
            tqdm.write(f"{out} is finished: it has all of its {config.steps} steps")
    return out


def _start(
    model_config: ModelConfig,
    config: TrainConfig,
    corpus: Corpus,
    group: Ranks,
    out: Path,
    threads: int | None,
) -> dict[str, Any]:
    """Write run.json, or check the one that is there; returns what was found at the run's start."""
    # What cannot be trained is refused before it leaves a trace.
    tokens = config.batch_size // num_parts(config, group) * config.length
    _batches(config, corpus)
    if corpus.vocab_size > model_config.vocab_size:
        raise ValueError(
            f"vocab_size is {model_config.vocab_size}; tokenizer {config.tokenizer!r} needs at "
            f"least {corpus.vocab_size}"
        )
    asked = {
        "model": model_config.to_dict(),
        "train": asdict(config),
        "data": {"corpus_sha256": corpus.sha256},
    }
    if (out / run.RUN).exists():
        there = run.read_run(out)
        run.check_same(out, there["asked"], asked, MAY_CHANGE)
        return run.resumed(out, torch.backends.cpu.get_cpu_capability())
    precision = {"precision": config.precision}
    if config.precision == "auto":
        precision = probe_precision(model_config, tokens, group.device)
    found = {
        "precision": precision,
        "threads": threads or torch.get_num_threads(),
        "processes": group.size,
        "device": group.device,
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    run.start_run(out, asked, found)
    return found


def _batches(config: TrainConfig, corpus: Corpus) -> TrainBatches:
    return TrainBatches(corpus, config.batch_size, config.length, config.seed)


class _Trainer:
    """A model on its way from step `step` to the last one."""

    def __init__(
        self,
        model_config: ModelConfig,
        config: TrainConfig,
        corpus: Corpus,
        group: Ranks,
        checkpoint: Path | None,
    ):
        self.config, self.corpus, self.group = config, corpus, group
        self.batches = _batches(config, corpus)
        if checkpoint is None:
            torch.manual_seed(config.seed)
            self.step, self.model = 0, LanguageModel(model_config)
        else:
            self.step, self.model = read_meta(checkpoint)["step"], load(checkpoint)
        self.model.to(group.device).train()
        self.parameters = list(self.model.parameters())
        self.optimizer = make_optimizer(
            self.model, config.learning_rate, config.betas, config.weight_decay
        )
        if checkpoint is not None:
            restore_optimizer(self.optimizer, self.model, read_optimizer(checkpoint))
        self.gradient = Gradient(self.model, config, group)
        self.sites = router_sites(self.model)

    def run(
        self, out: Path, progress: bool, watch: Callable[[Mapping[str, Any]], None] | None
    ) -> None:
        """All steps that are left, with metrics and checkpoints."""
        config, first = self.config, self.group.first
        with ExitStack() as stack:
            interrupt = stack.enter_context(Interrupt(patient=dist.is_torchelastic_launched()))
            bar = tqdm(
                total=config.steps,
                initial=self.step,
                unit="step",
                disable=not (progress and first),
            )
            stack.enter_context(bar)
            if first:
                metrics = Metrics(out / "metrics.csv", self.step)
                stack.enter_context(closing(metrics))
            while self.step < config.steps:
                row = self.take_step()
                stop = self.group.any(interrupt.signal is not None)
                if first:
                    metrics.add(row)
                    bar.set_postfix_str(summary(row), refresh=False)
                    bar.update()
                    if watch:
                        watch(row)
                    last = stop or self.step == config.steps or self.step in config.milestones
                    if last or self.step % config.checkpoint_every == 0:
                        metrics.sync()
                        self.save(out)
                if stop:
                    raise KeyboardInterrupt(
                        f"stopped after step {self.step} of {config.steps}, which is saved in "
                        f"{out}; the same again goes on from there"
                    )

    def take_step(self) -> dict[str, Any]:
        """One optimizer step; returns its row of metrics."""
        config, start = self.config, time.perf_counter()
        step = self.step + 1
        factor = learning_rate_factor(step, config.steps, config.warmup, config.min_lr_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        self.optimizer.zero_grad()
        try:
            parts, counts_SE = self.gradient(self.batches.batch(self.step), step)
        except FloatingPointError as error:
            raise FloatingPointError(f"step {step}: {error}; {ADVICE}") from error
        # One synchronisation for all numbers.
        numbers = [parts, gradient_norm(self.parameters)[None], violations(counts_SE)]
        nll, balance, z, norm, *violation = torch.cat(numbers).tolist()
        for name, value in (("loss", nll + balance + z), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise FloatingPointError(f"step {step}: the {name} is {value}; {ADVICE}")
        clip_gradients(self.parameters, norm, config.clip)
        self.optimizer.step()
        self._update_selection_biases(counts_SE)
        self.step = step
        seconds = time.perf_counter() - start
        return {
            "step": step,
            "loss": nll,
            "balance": balance,
            "z": z,
            "learning_rate": config.learning_rate * factor,
            "gradient_norm": norm,
            **worst(violation, list(self.sites)),
            "tokens_per_second": round(config.batch_size * config.length / seconds, 1),
        }

    def _update_selection_biases(self, counts_SE: Tensor) -> None:
        for router, counts_E in zip(self.sites.values(), counts_SE, strict=True):
            if router.score_function == "sigmoid":
                update_selection_bias(router, counts_E, self.model.config.bias_rate)

    def _groups(self) -> dict[str, list[str]]:
        """Of the documents trained on, unless they are too many to be listed."""
        groups = self.corpus.split("train").group.unique()
        return {"groups": sorted(groups)} if len(groups) <= GROUPS else {}

    def save(self, out: Path) -> None:
        """A checkpoint of this step, in place of the oldest."""
        config = self.config
        meta = {
            "step": self.step,
            "steps": config.steps,
            "tokens": self.step * config.batch_size * config.length,
            "train_seed": config.seed,
            "corpus": config.corpus,
            "corpus_sha256": self.corpus.sha256,
            "corpus_fingerprint": self.corpus.fingerprint,
            **self._groups(),
            "tokenizer": config.tokenizer,
            "length": config.length,
            "precision": config.precision,
        }
        save(
            self.model,
            step_folder(out, self.step),
            meta,
            tokenizer_json=getattr(self.corpus.tokenizer, "json", None),
            optimizer=optimizer_tensors(self.optimizer, self.model),
        )
        run.keep_newest(out, config.keep, config.milestones)
