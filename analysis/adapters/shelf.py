"""Weights of a pretrained model that stay on the disk until a module that has them is run.

A layer's are converted by the transformers library's own rules from the safetensors as they were
published (one tensor an expert, fused, renamed), while the layer before it computes, and are let go
when another layer is run. What is in no layer (embedding, last norm, head) is read once and stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from analysis.adapters.pretrained import (
    ADAPTER,
    is_packed,
    tensor_files,
    unpacking,
    without_bars,
)
from cartmoe.foreign import named

SMALL = 1000  # a part of its layer that is so many times smaller stays: routers, norms
LAYER = re.compile(r".*?\.\d+(?=\.)")  # of a tensor's name, what names its layer


@dataclass(frozen=True, eq=False)
class Fetch:
    """The hook that fetches a module's weights before it is run."""

    shelf: Shelf
    group: str

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if any(p.is_meta for p in module.parameters(recurse=False)):
            self.shelf.need(self.group)


class Shelf:
    """A directory's model, all of its weights on the device meta but those that are needed.

    model   with hooks that fetch a module's weights before it is run
    reads   layers that were read so far

    Weights in MXFP4 are dequantized. Raises `ValueError` naming the directory where the library
    cannot build the model, where weights are not safetensors, or quantized in another way, and
    where some are missing.
    """

    def __init__(self, folder: Path, device: str = "cpu"):
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.conversion_mapping import get_model_conversion_mapping

        if (folder / ADAPTER).is_file():
            raise ValueError(f"{folder} has an adapter ({ADAPTER}); merge it, or load it whole")
        self.folder, self.sources = folder, tensor_files(folder)
        with named(folder):
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            self.quantizer = _quantizer(folder, config.to_dict())
            if self.quantizer:
                del config.quantization_config
            with init_empty_weights(include_buffers=False):
                self.dtype = config.dtype or _first_dtype(self.sources)
                made = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        self.model: Any = made.eval().requires_grad_(False)
        self.device = torch.device(device)
        self.dtypes = made._get_dtype_plan(self.dtype)  # of what the model keeps in others
        self.rules = get_model_conversion_mapping(self.model, None, self.quantizer)
        for part in made.modules():
            for name, buffer in part.named_buffers(recurse=False):
                part._buffers[name] = buffer.to(self.device)
        self.groups = self._grouped()
        tied = getattr(made, "all_tied_weights_keys", {})
        for name, _ in made.named_parameters():
            if group_of(name) not in self.groups and name not in tied:
                raise ValueError(f"{folder} has no weights for {name}")
        self.layers = [group for group in self._in_order() if group in self.groups]
        self.there: dict[str, Future] = {}
        self.now, self.reads = "", 0
        self.pool = ThreadPoolExecutor(1, "shelf")
        for name, module in self.model.named_modules():
            for own, _ in module.named_parameters(recurse=False):
                fetch = Fetch(self, group_of(f"{name}.{own}"))
                module.register_forward_pre_hook(fetch, prepend=True)
                break

    def _grouped(self) -> dict[str, list[str]]:
        """By group, names of the tensors in the files that its parameters are made from."""
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

        rename = [rule for rule in self.rules if isinstance(rule, WeightRenaming)]
        convert = [rule for rule in self.rules if isinstance(rule, WeightConverter)]
        prefix, state = self.model.base_model_prefix, self.model.state_dict()
        groups: dict[str, list[str]] = {}
        for key in self.sources:
            target, _ = rename_source_key(key, rename, convert, prefix, state)
            groups.setdefault(group_of(target), []).append(key)
        return groups

    def _in_order(self) -> Iterator[str]:
        """Every layer once, as the model has them."""
        names = (LAYER.match(name) for name, _ in self.model.named_parameters())
        yield from dict.fromkeys(found[0] for found in names if found)

    def need(self, group: str) -> None:
        """Wait until the group's weights are there; of a layer, let go those of others but the next
        one, which is read meanwhile."""
        if group == self.now:
            return
        if group not in self.layers:
            if group not in self.there and group in self.groups:
                self.there[group] = self.pool.submit(self._read, group)
                self._wait(group)
            return
        self.now = ""  # until it is there; whatever comes between
        following = self.layers[self.layers.index(group) + 1 :][:1]
        for other in [name for name in self.there if name in self.layers]:
            if other not in (group, *following):
                self._wait(other)
                self._let_go(other)
                del self.there[other]
        for wanted in (group, *following):
            if wanted not in self.there:
                self.there[wanted] = self.pool.submit(self._read, wanted)
        self._wait(group)
        self.now = group

    def _wait(self, group: str) -> None:
        """Until it is read; what could not be is read again when it is needed again."""
        try:
            self.there[group].result()
        except Exception:
            del self.there[group]
            raise

    def _read(self, group: str) -> None:
        from safetensors import safe_open
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        self.reads += 1
        how = LoadStateDictConfig(
            device_map={"": str(self.device)},
            dtype=self.dtype,
            dtype_plan=self.dtypes,
            hf_quantizer=self.quantizer,
            weight_mapping=self.rules,  # type: ignore[arg-type]
        )
        # Opened for as long as it is read: a mapped file counts as memory of this process.
        with ExitStack() as stack, without_bars():
            keys = self.groups[group]
            paths = dict.fromkeys(self.sources[key] for key in keys)
            files = {path: stack.enter_context(safe_open(path, "pt")) for path in paths}
            tensors = {key: files[self.sources[key]].get_slice(key) for key in keys}
            convert_and_load_state_dict_in_model(self.model, tensors, how)
        if group not in self.layers:
            self.model.tie_weights()
        missing = [name for name, p in self._parameters(group) if p.is_meta]
        if missing:
            raise ValueError(f"{self.folder} has no weights for {missing[0]}")

    def _let_go(self, group: str) -> None:
        parameters = self._parameters(group)
        least = sum(parameter.nbytes for _, parameter in parameters) / SMALL
        for name, parameter in parameters:
            holder, _, own = name.rpartition(".")
            small = parameter.nbytes < least  # a copy: it may be a part of a mapped file
            left = parameter.clone() if small else torch.empty_like(parameter, device="meta")
            setattr(self.model.get_submodule(holder), own, nn.Parameter(left, requires_grad=False))

    def _parameters(self, group: str) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self.model.named_parameters() if group_of(n) == group]


def _quantizer(folder: Path, config: Mapping[str, Any]) -> Any:
    """What dequantizes the weights while they are read, None where there is nothing to do."""
    from transformers.quantizers.auto import AutoHfQuantizer

    if not config.get("quantization_config"):
        return None
    if not is_packed(config):
        raise ValueError(f"{folder} is quantized; load it whole, dequantized")
    return AutoHfQuantizer.from_config(unpacking(), pre_quantized=True)


def _first_dtype(sources: Mapping[str, Path]) -> torch.dtype:
    """Of the first tensor of floating point, as the library takes it where nothing is said."""
    from safetensors import safe_open

    with safe_open(next(iter(sources.values())), "pt") as file:
        for key in file.keys():  # noqa: SIM118
            dtype = file.get_tensor(key).dtype
            if dtype.is_floating_point:
                return dtype
    return torch.float32


def group_of(name: str) -> str:
    """Of a parameter: its layer, or the module that has it."""
    layer = LAYER.match(name)
    return layer[0] if layer else name.rpartition(".")[0]
