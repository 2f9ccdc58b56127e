"""Which families of the installed transformers library can be measured, and how far.

    python -m studies.families --out runs/families

makes a tiny random model of every family that marks its experts with the library's decorator, and
of a few that have experts without it; tries each, and writes families.csv and families.md.
"""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import transformers
import typer
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

import analysis as an
from analysis.adapters import clean_routing
from analysis.adapters.transformers import TransformersAdapter

LIBRARY = Path(transformers.__file__).parent / "models"
DECORATOR = "@use_experts_implementation"
# Those with experts of another kind, or with an older form of them.
UNMARKED = ["dbrx", "doge", "jetmoe", "llama4", "longcat_flash", "nllb_moe", "switch_transformers"]
COLUMNS = ["identity", "mask", "capture", "outputs", "weights", "scores", "reuse"]
MOST = 30_000_000  # parameters of a model that counts as tiny

# fmt: off
# What a configuration has of these, it gets: as a number, or in each place of a list.
SHRUNK: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24, "shared_intermediate_size": 24,
    "expert_ffn_hidden_size": 24, "ffn_hidden_size": 24, "moe_shared_expert_intermediate_size": 24,
    "num_experts": 6, "num_local_experts": 6, "n_routed_experts": 6, "moe_num_experts": 6,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2, "moe_top_k": 2,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_shared_experts": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "sliding_window": 8, "zero_expert_num": 2, "num_layers": 2,
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_chunk_size": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "router_hidden_size": 16,
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8,
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 256, "num_kv_shared_layers": 0,
    "global_head_dim": 8, "num_global_key_value_heads": 2, "num_keys": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
OWN: dict[str, dict[str, Any]] = {
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "zaya": {"num_experts_per_tok": 1},
    "gemma4": {"enable_moe_block": True},
    "llama4": {"interleave_moe_layer_step": 1},
    "doge": {"is_moe": True},
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64, "resid_pdrop": 0.0,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 2,
                       "ffn_act_fn": {"name": "silu"}},
    },
}
# What shapes must agree in is another thing in every family; the first of these that runs is taken.
TRIES: list[dict[str, Any]] = [
    {}, {"num_key_value_heads": 4}, {"num_key_value_heads": 4, "head_dim": 16},
    {"num_key_value_heads": 4, "num_experts_per_tok": 1}, {"hidden_size": 64, "head_dim": 16},
]
# fmt: on


TEXT = ("text_config",)


def marked() -> list[str]:
    """Families of the library whose experts have the decorator."""
    files = sorted(LIBRARY.glob("*/modeling_*.py"))
    return [file.parent.name for file in files if DECORATOR in file.read_text(encoding="utf-8")]


def classes_of(family: str) -> list[type]:
    """Its models that make logits of text, the plainest first."""
    found = []
    for file in LIBRARY.glob(f"{family}/modeling_*.py"):
        module = importlib.import_module(f"transformers.models.{family}.{file.stem}")
        source = file.read_text(encoding="utf-8")
        names = re.findall(r"^class (\w+For(?:CausalLM|ConditionalGeneration))\(", source, re.M)
        found += [getattr(module, name) for name in names]
    plain = [cls for cls in found if "PreTrained" not in cls.__name__]
    return sorted(plain, key=lambda cls: not cls.__name__.endswith("CausalLM"))


def tiny(family: str, **changes: Any) -> Any:
    """A model of that family, with weights large enough for its experts to differ.

    Raises `ValueError` saying why none could be made.
    """
    problem: Exception = ValueError("it has no model that makes logits of text")
    own = OWN.get(family, {})
    for cls, shrunk, one in itertools.product(classes_of(family), (TEXT, None), TRIES):
        try:
            return _model(cls, own | one | changes, shrunk)
        except Exception as error:  # whatever a family says of a shape
            problem = error
    raise ValueError(f"{family}: no tiny model could be made: {problem}") from problem


def _model(cls: Any, changes: dict[str, Any], parts: Collection[str] | None) -> Any:
    config = cls.config_class(**_shape(cls.config_class, changes, parts))
    with torch.device("meta"):
        size = sum(p.numel() for p in cls._from_config(config).parameters())
    if size > MOST:
        raise ValueError(f"{size} parameters are left")
    torch.manual_seed(0)
    model = cls._from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.3)
        if not config.is_encoder_decoder:
            model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
    return model


def _shape(
    config_class: Any, changes: dict[str, Any], parts: Collection[str] | None = None
) -> dict[str, Any]:
    """Its fields; parts: those of its configurations of parts that are shrunk too (None: all)."""
    default = config_class()
    have = {*vars(default), *getattr(default, "attribute_map", {})}
    shape = {}
    for name, value in (SHRUNK | changes).items():
        if name in have:
            several = isinstance(vars(default).get(name), list) and not isinstance(value, list)
            shape[name] = [value] * len(vars(default)[name]) if several else value
    for name in {"layer_types", "mlp_layer_types"} - changes.keys():
        if isinstance(kinds := vars(default).get(name), list):  # each of them, if there is room
            layers: Any = shape.get("num_hidden_layers", len(kinds))
            shape[name] = ([*dict.fromkeys(kinds)] * layers)[:layers]
    for name, part in getattr(config_class, "sub_configs", {}).items():
        if name not in changes and (parts is None or name in parts):
            with suppress(Exception):  # of which the default is taken
                shape[name] = _shape(part, changes)
    return shape


def tried(model: Any) -> dict[str, str]:
    """Each of `COLUMNS` -> "yes" or why not."""
    adapted = TransformersAdapter(model)
    tokens_BL = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(1))
    checks: dict[str, Callable[[TransformersAdapter, Tensor], bool]] = {
        "identity": _identity,
        "mask": _mask,
        "capture": _capture,
        "outputs": _outputs,
        "weights": _weights,
        "scores": lambda adapted, _: all(adapted.router(s).scored for s in adapted.sites()),
        "reuse": lambda adapted, _: len(adapted.segments()) > 2,
    }
    return {name: _said(check, adapted, tokens_BL) for name, check in checks.items()}


def _said(check: Callable, adapted: TransformersAdapter, tokens_BL: Tensor) -> str:
    try:
        with torch.no_grad():
            return "yes" if check(adapted, tokens_BL) else "no"
    except (ValueError, RuntimeError, AttributeError) as error:
        return str(error).splitlines()[0]


def _logits(adapted: TransformersAdapter, tokens_BL: Tensor) -> Tensor:
    return adapted.model(input_ids=tokens_BL, use_cache=False).logits


def _identity(adapted: TransformersAdapter, tokens_BL: Tensor) -> bool:
    """Watched, it gives the same bits."""
    plain = _logits(adapted, tokens_BL)
    with an.perturbed(adapted, an.Identity()):
        return torch.equal(plain, _logits(adapted, tokens_BL))


def _mask(adapted: TransformersAdapter, tokens_BL: Tensor) -> bool:
    """At every site no expert that is masked gets a token."""
    hit = []

    def watch(x_TD, routing, site, own):
        masked_TK = routing.logits_TE.gather(-1, routing.ids_TK) == -torch.inf
        hit.append(bool((masked_TK & (routing.weights_TK != 0)).any()))
        hit.append(not routing.logits_TE.isneginf().any())

    with an.perturbed(adapted, an.DropTop(1)), adapted.hooked(experts=watch):
        changed = _logits(adapted, tokens_BL)
    moved = not torch.equal(changed, _logits(adapted, tokens_BL))
    return moved and len(hit) == 2 * len(adapted.sites()) and not any(hit)


def _capture(adapted: TransformersAdapter, tokens_BL: Tensor) -> bool:
    """Ids and weights that are told are those that the experts are called with."""
    received: list[tuple[Tensor, Tensor]] = []
    with ExitStack() as stack:
        for seat in adapted.seats.values():

            def note(_, args, kwargs, at=seat.places):
                given = dict(enumerate(args)) | kwargs
                received.append((given[at.ids], given[at.weights].float()))

            hook = seat.experts.register_forward_pre_hook(note, with_kwargs=True)
            stack.callback(hook.remove)
        told = clean_routing(adapted, tokens_BL).values()
    return all(
        torch.equal(_sorted(*got), _sorted(routing.ids_TK, routing.weights_TK))
        for got, routing in zip(received, told, strict=True)
    )


def _sorted(ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    order_TK = ids_TK.argsort(-1)
    return torch.stack([ids_TK.gather(-1, order_TK), weights_TK.gather(-1, order_TK)])


def _outputs(adapted: TransformersAdapter, tokens_BL: Tensor) -> bool:
    """Those of single experts sum to what all of them make."""
    right = []

    def watch(x_TD, routing, site, own):
        whole_TD = own(x_TD, routing)
        each_ETD = adapted.expert_outputs(site, x_TD)
        chosen_TKD = each_ETD[routing.ids_TK, torch.arange(len(x_TD))[:, None]]
        summed_TD = (routing.weights_TK[..., None] * chosen_TKD).sum(1)
        right.append(torch.allclose(summed_TD, whole_TD, rtol=1e-4, atol=1e-4))
        return whole_TD

    with adapted.hooked(experts=watch):
        _logits(adapted, tokens_BL)
    return len(right) == len(adapted.sites()) and all(right)


def _weights(adapted: TransformersAdapter, tokens_BL: Tensor) -> bool:
    """Those of every site, in the shapes of three projections."""
    for site in adapted.sites():
        gate, up, down = adapted.expert_weights(site)
        if gate.shape != up.shape or down.shape != (len(up), up.shape[2], up.shape[1]):
            return False
    return True


def table(families: list[str]) -> pd.DataFrame:
    """A row a family: its `COLUMNS`, or in `refused` why it is."""
    return pd.DataFrame([_row(family) for family in tqdm(families, unit="family")])


def _row(family: str) -> dict[str, str]:
    nothing = dict.fromkeys(COLUMNS, "")
    try:
        model = tiny(family)
    except ValueError as error:
        return {"family": family, **nothing, "refused": f"not tried: {_short(error)}"}
    try:
        return {"family": family, **tried(model), "refused": ""}
    except ValueError as error:
        return {"family": family, **nothing, "refused": _short(error)}


def _short(error: Exception) -> str:
    return str(error).splitlines()[0]


def markdown(found: pd.DataFrame) -> str:
    """The table as docs/pretrained.md has it."""
    lines = [f"| {' | '.join(['family', *COLUMNS])} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for row in found.to_dict("records"):
        cells = [row["refused"]] if row["refused"] else [row[name] for name in COLUMNS]
        lines.append(f"| {' | '.join([row['family'], *cells])} |")
    return "\n".join(lines) + "\n"


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the library says of configurations."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def main(out: Annotated[Path, typer.Option(help="Directory for the table.")]) -> None:
    """Try all, and write the table."""
    with quiet():
        found = table(sorted({*marked(), *UNMARKED}))
    out.mkdir(parents=True, exist_ok=True)
    found.to_csv(out / "families.csv", index=False)
    (out / "families.md").write_text(markdown(found), encoding="utf-8")
    works = (found.refused == "").sum()
    typer.echo(f"transformers {transformers.__version__}: {works} of {len(found)} families work")
    typer.echo(found.to_string(index=False, max_colwidth=60))


if __name__ == "__main__":
    typer.run(main)
