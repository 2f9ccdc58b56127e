"""What can be told of a pretrained model from its configuration alone: how large it is, and a
shallow one of its shape, with random weights, to be timed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from analysis.adapters.pretrained import CONFIG, without_bars
from analysis.adapters.shelf import group_of
from analysis.adapters.transformers import TransformersAdapter
from cartmoe.foreign import named, read_text

PACKED = 4.25 / 16  # of bf16: MXFP4 has 4 bits a number and 8 a block of 32
BLOCK = 2**20  # random numbers that weights are made of, over and over


class Shape(NamedTuple):
    """total, layer, rest   bytes of weights as they are computed with: of all, of the largest
                         layer, and of what is in no layer
    stored   bytes of all as they lie in files
    depth    number of layers;  routed: numbers of those with experts
    """

    total: int
    layer: int
    rest: int
    stored: int
    depth: int
    routed: tuple[int, ...]


def published_config(folder: Path) -> dict[str, Any]:
    """What the directory's config.json says. Raises `ValueError` naming it where it is none."""
    with named(folder / CONFIG):
        return json.loads(read_text(folder / CONFIG))


def shape_of(config: Mapping[str, Any]) -> Shape:
    """Of the model of this configuration, a dict as in config.json. Raises `ValueError` where the
    library cannot build it."""
    model = _on_meta(config)
    layers: dict[str, int] = {}
    routed: dict[str, int] = {}  # bytes of experts, whose parameters are stacked
    total = 0
    for name, parameter in model.named_parameters():
        total += parameter.nbytes
        group = group_of(name)
        if group.rpartition(".")[2].isdecimal():
            layers[group] = layers.get(group, 0) + parameter.nbytes
            if parameter.ndim == 3:
                routed[group] = routed.get(group, 0) + parameter.nbytes
    saved = (1 - PACKED) * sum(routed.values()) if "quantization_config" in config else 0
    numbers = tuple(i for i, group in enumerate(layers) if group in routed)
    if not numbers:
        raise ValueError(f"a {config.get('model_type')!r} of this configuration has no experts")
    rest = total - sum(layers.values())
    return Shape(total, max(layers.values()), rest, total - int(saved), len(layers), numbers)


def shallow(config: Mapping[str, Any], layers: int) -> TransformersAdapter:
    """A model of this configuration with so few layers and random weights. Raises `ValueError` as
    `shape_of` and `TransformersAdapter` do."""
    model = _on_meta(config, layers)
    base = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) / 50
    for name, parameter in list(model.named_parameters()):
        holder, _, own = name.rpartition(".")
        flat = base.to(parameter.dtype).repeat(math.ceil(parameter.numel() / BLOCK))
        filled = flat[: parameter.numel()].view(parameter.shape)
        if parameter.ndim == 1 and "norm" in name:
            filled = torch.ones_like(filled)
        setattr(model.get_submodule(holder), own, nn.Parameter(filled, requires_grad=False))
    model.tie_weights()
    return TransformersAdapter(model.eval())


def _on_meta(config: Mapping[str, Any], layers: int | None = None) -> Any:
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    made = _library_config(config, layers)
    with named("configuration"), init_empty_weights(include_buffers=False), without_bars():
        return AutoModelForCausalLM.from_config(made, dtype=made.dtype or torch.bfloat16)


def _library_config(config: Mapping[str, Any], layers: int | None = None) -> Any:
    """The library's; with so few layers what is said layer by layer is cut, too."""
    from transformers import CONFIG_MAPPING

    from cartmoe.hf import AutoConfig

    said = {key: value for key, value in config.items() if key != "quantization_config"}
    kind = str(said.get("model_type"))
    if kind not in CONFIG_MAPPING:
        near = " or ".join(get_close_matches(kind, list(CONFIG_MAPPING), 3))
        raise ValueError(f"model_type is {kind!r}, which there is not; near it: {near or 'none'}")
    with named("configuration"):
        whole = AutoConfig.for_model(**said)
        if layers is None:
            return whole
        depth = whole.get_text_config().num_hidden_layers
        every = whole.to_dict()
        cut = {k: v[:layers] for k, v in every.items() if isinstance(v, list) and len(v) == depth}
        return AutoConfig.for_model(**(said | cut | {"num_hidden_layers": layers}))
