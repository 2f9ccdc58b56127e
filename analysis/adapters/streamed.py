"""Pretrained models that are larger than memory: a layer's weights at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.adapters.pretrained import origin_of, pretrained_sha256, tokenizer_in
from analysis.adapters.shelf import Shelf, group_of
from analysis.adapters.transformers import TransformersAdapter
from cartmoe.hooks import RouterSite
from cartmoe.tokenizers import Tokenizer


class StreamedAdapter(TransformersAdapter):
    """See `TransformersAdapter`. Weights are on the disk but those of the layer that runs and of
    the next one, so it is run segment by segment, all batches inside (`measure.by_segment`); a
    router's `rows` have numbers where other weights of its site were asked for before.

    Raises `ValueError` as that does, and for a model of which layers cannot be called again.
    """

    streamed = True

    def __init__(
        self,
        shelf: Shelf,
        tokenizer: Any,
        identity: str,
        *,
        name: str,
        trained_on: Mapping[str, Any] | None = None,
    ):
        self.shelf, self._identity = shelf, identity
        super().__init__(shelf.model, tokenizer, name=name, trained_on=trained_on)
        if self.body.layers is None:
            raise ValueError(
                f"{name} has layers that cannot be called again by themselves, so it cannot be run "
                "segment by segment; load it whole"
            )

    def _check_weights(self) -> None:
        """They come when they are needed."""

    @property
    def identity(self) -> str:
        """Of the directory."""
        return self._identity

    @property
    def device(self) -> torch.device:
        """Where layers compute."""
        return self.shelf.device

    def _fetch(self, site: RouterSite) -> None:
        self.shelf.need(group_of(f"{site.name}."))

    def expert_weights(self, site: RouterSite) -> tuple[Tensor, Tensor, Tensor]:
        """See `TransformersAdapter`."""
        self._fetch(site)
        return super().expert_weights(site)

    def expert_outputs(
        self, site: RouterSite, x_TD: Tensor, ids: list[int] | None = None
    ) -> Tensor:
        """See `TransformersAdapter`."""
        self._fetch(site)
        return super().expert_outputs(site, x_TD, ids)

    def shared_weights(self, site: RouterSite) -> tuple[Tensor, Tensor, Tensor] | None:
        """See `TransformersAdapter`."""
        self._fetch(site)
        return super().shared_weights(site)

    def combine(self, site: RouterSite, x_TD: Tensor, routed_TD: Tensor) -> Tensor:
        """See `TransformersAdapter`."""
        self._fetch(site)
        return super().combine(site, x_TD, routed_TD)


def load_streamed(
    folder: Path,
    tokenizer: Tokenizer | None = None,
    *,
    name: str | None = None,
    device: str = "cpu",
) -> StreamedAdapter:
    """The causal language model of a directory, in the dtype that it is stored in, its weights on
    the disk. Raises as `Shelf` and `StreamedAdapter` do."""
    return StreamedAdapter(
        Shelf(folder, device),
        tokenizer or tokenizer_in(folder),
        pretrained_sha256(folder),
        name=name or folder.resolve().name,
        trained_on=origin_of(folder),
    )
