"""The models against paper.md's equations, written once more: token by token, in float64.

Nothing here is shared with the package but the names of the parameters.
"""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cartmoe import LanguageModel, ModelConfig

EPS = 2.0**-23  # of float32


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def rms_norm(x, gain, eps):
    return gain * x / np.sqrt(np.mean(x**2) + eps)


def swiglu(x, gate, up, down):
    a = gate @ x
    return down @ (a / (1 + np.exp(-a)) * (up @ x))


def turned(head, position, base):
    """Channels i and i + d/2 as a complex number, turned by position * base^(-2i/d)."""
    d = len(head)
    pairs = head[: d // 2] + 1j * head[d // 2 :]
    pairs = pairs * np.exp(1j * position * base ** (-np.arange(0, d, 2) / d))
    return np.concatenate([pairs.real, pairs.imag])


def attention(h_L, qkv, out, num_heads, base):
    """Of one sequence: every token attends to itself and what stands before it."""
    q, k, v = (
        [(part @ h).reshape(num_heads, -1) for h in h_L] for part in np.split(qkv, 3, axis=0)
    )
    y_L = []
    for t in range(len(h_L)):
        heads = []
        for n in range(num_heads):
            query = turned(q[t][n], t, base)
            z = [query @ turned(k[s][n], s, base) / np.sqrt(len(query)) for s in range(t + 1)]
            heads.append(sum(a * v[s][n] for s, a in enumerate(softmax(np.array(z)))))
        y_L.append(out @ np.concatenate(heads))
    return y_L


def route(z, config: ModelConfig, k, bias) -> dict[int, float]:
    """Expert -> weight."""
    p = softmax(z) if config.score == "softmax" else 1 / (1 + np.exp(-z))
    selection = p + bias
    order = sorted(range(len(p)), key=lambda i: (-selection[i], i))
    if config.top_p is None:
        chosen = order[:k]
    else:
        chosen = []
        while order and sum(p[i] for i in chosen) <= config.top_p:
            chosen.append(order.pop(0))
    # paper.md: K > 1 divides by the sum, K = 1 does not; raw with top-p.
    by_default = config.top_p is None and k > 1
    renormalize = by_default if config.renormalize is None else config.renormalize
    total = max(sum(p[i] for i in chosen), EPS) if renormalize else 1.0
    return {i: p[i] / total for i in chosen}


class Equations:
    """The equations with the weights of a model."""

    def __init__(self, model: LanguageModel):
        self.config = model.config
        self.w = {k: t.detach().double().numpy() for k, t in model.state_dict().items()}

    def logits(self, tokens_BL) -> np.ndarray:
        return np.array([self.of_sequence(tokens) for tokens in tokens_BL.tolist()])

    def norm(self, x, name):
        return rms_norm(x, self.w[f"{name}.weight"], self.config.norm_eps)

    def of_sequence(self, tokens):
        c, w = self.config, self.w
        x_L = [w["trunk.embed.weight"][t] for t in tokens]
        for layer in range(c.num_layers):
            block = f"trunk.blocks.{layer}"
            h_L = [self.norm(x, f"{block}.norm") for x in x_L]
            qkv, out = (w[f"{block}.attention.{n}.weight"] for n in ("qkv", "out"))
            y_L = attention(h_L, qkv, out, c.num_heads, c.rope_base)
            u_L = [x + y for x, y in zip(x_L, y_L, strict=True)]
            x_L = [self.ffn(u, t, layer) for u, t in zip(u_L, tokens, strict=True)]
        return [w["head.weight"] @ self.norm(x, "trunk.norm") for x in x_L]

    def ffn(self, u, token, layer):
        c, ffn = self.config, f"trunk.blocks.{layer}.ffn"
        past = layer - c.first_moe_layer
        if c.family == "dense" or past < 0 or past % c.moe_interval:
            gate, up = np.split(self.w[f"{ffn}.ffn.gate_up.weight"], 2)
            h = self.norm(u, f"{ffn}.norm")
            return u + swiglu(h, gate, up, self.w[f"{ffn}.ffn.down.weight"])
        if c.composition == "parallel":
            h = self.norm(u, f"{ffn}.norms.0")
            return u + sum(self.stage(h, token, ffn, s) for s in range(c.num_stages))
        for s in range(c.num_stages):
            u = u + self.stage(self.norm(u, f"{ffn}.norms.{s}"), token, ffn, s)
        return u

    def stage(self, h, token, ffn, s):
        c, w, stage = self.config, self.w, f"{ffn}.stages.{s}"
        if c.family == "hash":
            z = w[f"{stage}.router.gate.table_VE"][token]
        else:
            z = w[f"{stage}.router.gate.weight"] @ h
        bias = w.get(f"{stage}.router.selection_bias_E", np.zeros(len(z)))
        y = np.zeros_like(h)
        for i, weight in route(z, c, c.top_k[s], bias).items():
            gate, up = np.split(w[f"{stage}.experts.gate_up_ECD"][i], 2)
            y += weight * swiglu(h, gate, up, w[f"{stage}.experts.down_EDF"][i])
        if not c.shared_experts:
            return y
        mix = softmax(w[f"{stage}.mix.weight"] @ h + w[f"{stage}.mix.bias"])
        return mix[0] * y + mix[1] * self.shared(h, f"{stage}.shared")

    def shared(self, h, name):
        """The mean of `grain` FFNs of an expert's width, side by side in one matrix."""
        g = self.config.grain
        gate, up = np.split(self.w[f"{name}.gate_up.weight"], 2)
        parts = zip(
            np.split(gate, g),
            np.split(up, g),
            np.split(self.w[f"{name}.down.weight"], g, axis=1),
            strict=True,
        )
        return sum(swiglu(h, *part) for part in parts) / g


@settings(max_examples=150)
@given(st.data())
def test_logits_of_any_configuration(any_config, data):
    config = data.draw(any_config)
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    model = LanguageModel(config)
    for tensor in model.state_dict().values():
        if tensor.dim() == 1:  # norms, mix biases and selection biases start out without effect
            tensor += 0.3 * torch.randn_like(tensor)
    tokens_BL = torch.randint(
        config.vocab_size, data.draw(st.sampled_from([(1, 1), (1, 5), (2, 4)]))
    )
    with torch.no_grad():
        logits = model(tokens_BL).numpy()
    np.testing.assert_allclose(logits, Equations(model).logits(tokens_BL), rtol=1e-4, atol=1e-5)
