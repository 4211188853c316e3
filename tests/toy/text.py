"""The text side of the tiny base: a CLIP-L with random weights from a seed, and the toy captions' tokens.

Token and position vectors dominate the residual stream (the layers' outputs are scaled by 0.02), so a context is nearly
a table of (token, position) vectors: a caption's words are distinguishable, and a new embedding is a new direction.
Values are exactly representable in float16, so a host that stores text encoders in float16 computes the same numbers.
"""

import numpy as np
import torch
import torch.nn.functional as F

SEED = 7
VOCABULARY = 49408
POSITIONS = 77
WIDTH = 768
INNER = 3072
LAYERS = 12
HEADS = 12
START = 49406
END = 49407

TOKEN_STD = 0.3
POSITION_STD = 0.25
OUTPUT_SCALE = 0.02

# Ids of whole words in CLIP's vocabulary, for the captions of the toy world.
TOKENS = {
    "a": 320, "large": 3638, "on": 525, "background": 5994, "toy": 5988, "sks": 48136, "olis": 49397,
    "red": 736, "orange": 4287, "yellow": 4481, "green": 1901, "blue": 1746, "purple": 5496, "white": 1579,
    "black": 1449, "pink": 3360, "gray": 7048, "brown": 2866, "aqua": 18613, "circle": 7117, "square": 3999,
    "triangle": 14615, "diamond": 6235, "star": 1565, "cross": 3417, "ring": 2540, "heart": 1936,
}  # fmt: skip


def tokenize(caption):
    """Return a toy caption's token ids [77], like CLIP's tokenizer."""
    ids = [START] + [TOKENS[word] for word in caption.split()] + [END]
    return ids + [END] * (POSITIONS - len(ids))


def _uniform(rng, shape, std):
    """Return uniform float32 of a standard deviation, rounded to float16 values."""
    values = rng.random_sample(shape)
    values -= 0.5
    values *= std * 12**0.5
    return torch.from_numpy(values.astype(np.float16)).float()


def build_clip(seed=SEED):
    """Return the text model's parameters, float32, named as in transformers' CLIPTextModel."""
    rng = np.random.RandomState(seed)
    state = {
        "text_model.embeddings.token_embedding.weight": _uniform(rng, (VOCABULARY, WIDTH), TOKEN_STD),
        "text_model.embeddings.position_embedding.weight": _uniform(rng, (POSITIONS, WIDTH), POSITION_STD),
    }
    for i in range(LAYERS):
        state.update(_layer(rng, f"text_model.encoder.layers.{i}."))
    state.update(_norm("text_model.final_layer_norm"))
    return state


def _layer(rng, prefix):
    state = {}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        scale = OUTPUT_SCALE if name == "out_proj" else 1.0
        state.update(_linear(rng, f"{prefix}self_attn.{name}", WIDTH, WIDTH, scale))
    state.update(_linear(rng, prefix + "mlp.fc1", WIDTH, INNER))
    state.update(_linear(rng, prefix + "mlp.fc2", INNER, WIDTH, OUTPUT_SCALE))
    state.update(_norm(prefix + "layer_norm1"))
    state.update(_norm(prefix + "layer_norm2"))
    return state


def _linear(rng, name, inputs, outputs, scale=1.0):
    weight = _uniform(rng, (outputs, inputs), scale / inputs**0.5)
    return {name + ".weight": weight, name + ".bias": torch.zeros(outputs)}


def _norm(name):
    return {name + ".weight": torch.ones(WIDTH), name + ".bias": torch.zeros(WIDTH)}


@torch.no_grad()
def encode(state, ids):
    """Return the contexts of token ids [n, 77]: [n, 77, 768] float32, after the final norm."""
    x = state["text_model.embeddings.token_embedding.weight"][ids]
    x = x + state["text_model.embeddings.position_embedding.weight"]
    for i in range(LAYERS):
        prefix = f"text_model.encoder.layers.{i}."
        x = x + _attend(state, prefix + "self_attn.", _apply_norm(state, prefix + "layer_norm1", x))
        h = _apply_linear(state, prefix + "mlp.fc1", _apply_norm(state, prefix + "layer_norm2", x))
        x = x + _apply_linear(state, prefix + "mlp.fc2", h * torch.sigmoid(1.702 * h))
    return _apply_norm(state, "text_model.final_layer_norm", x)


def _attend(state, prefix, x):
    q, k, v = (_split(_apply_linear(state, prefix + name, x)) for name in ("q_proj", "k_proj", "v_proj"))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return _apply_linear(state, prefix + "out_proj", out.transpose(1, 2).flatten(2))


def _split(x):
    return x.unflatten(2, (HEADS, -1)).transpose(1, 2)


def _apply_linear(state, name, x):
    return F.linear(x, state[name + ".weight"], state[name + ".bias"])


def _apply_norm(state, name, x):
    return F.layer_norm(x, (WIDTH,), state[name + ".weight"], state[name + ".bias"])


def encode_captions(captions, state=None, batch=16):
    """Return the contexts of toy captions: [n, 77, 768] float32."""
    state = state or build_clip()
    ids = torch.tensor([tokenize(c) for c in captions])
    return torch.cat([encode(state, part) for part in ids.split(batch)])
