"""ComfyUI's CLIP as a text encoder for training: literal captions, trainable embeddings, exact gradients."""

from __future__ import annotations

import functools
import hashlib
import itertools
import numbers
from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ....trainers.formats.embedding import WIDTHS
from ....trainers.memory.transfer import PinnedConstants
from ....trainers.preprocessing.prefetch import LRUCache
from . import compat, embeddings, prompt_nodes
from .fingerprint import patcher_digest, sampled_patcher_digest

if TYPE_CHECKING:
    import torch
    from comfy.sd import CLIP

# SD1 and SDXL checkpoints lack this weight, which they do not use: it then holds uninitialized memory.
_PROJECTION = "clip_l.transformer.text_projection.weight"
# Encoders whose rows do not depend on the rest of the batch; tests check it.
_ROW_BY_ROW = (*WIDTHS, "t5xxl")


class ComfyText:
    """The graph's CLIP, trained through a private tree over its own weights. The graph's CLIP does not change.

    Attributes:
        module: the private tree; only within `training`.
        device: device that computes; only within `training`.
    """

    def __init__(self, clip: CLIP):
        self.clip = clip
        self._live: CLIP | None = None
        self._prompts: dict[str, list] = {}
        self._embedded: dict[str, str] = {}
        self._trained: list[torch.Tensor] = []
        self._keep = LRUCache()
        self.module: torch.nn.Module | None = None
        self.device: torch.device | None = None

    def encode(self, caption: str) -> dict[str, torch.Tensor]:
        """Return ComfyUI's conditioning of a literal caption: `cross_attn`, `pooled_output` and any other tensors."""
        return self._with_finite_pooled(conditioning_tensors(self.clip, _literal_tokens(self.clip, caption)))

    @property
    def sees_pictures(self) -> bool:
        """Report whether the encoder can read source pictures beside the text."""
        return prompt_nodes.sees_pictures(self.clip)

    def check_prompt_node(self, node: str) -> None:
        """Raise ModelError if this ComfyUI lacks the node, or if this encoder does not see pictures."""
        prompt_nodes.check(node, self.clip)

    def encode_with_sources(
        self, node: str, text: str, pictures: Sequence[torch.Tensor], negative: bool = False
    ) -> dict[str, torch.Tensor]:
        """Return the conditioning that one of ComfyUI's nodes makes of a text and pictures, without their latents."""
        import torch

        with torch.no_grad():
            return _on_cpu(prompt_nodes.encode_text(node, self.clip, text, pictures, negative))

    def form(self, caption: str) -> Hashable:
        """Return the shape of a caption's tokens; None if it holds vectors, or no encoder is known to batch safely."""
        return form_of(self.clip, _literal_tokens(self.clip, caption))

    def encode_all(self, captions: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """Encode several captions of one form as `encode` does each."""
        import torch

        with torch.no_grad():
            encodings = encode_alike(self.clip, [_literal_tokens(self.clip, caption) for caption in captions])
        return [self._with_finite_pooled(_on_cpu(encoding)) for encoding in encodings]

    def _with_finite_pooled(self, encoding: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Replace a pooled output that an uninitialized, unused projection made non-finite."""
        import torch

        pooled = encoding.get("pooled_output")
        if pooled is not None and self._idle() and not pooled.isfinite().all():
            # No model with such an encoder alone reads it.
            encoding["pooled_output"] = torch.zeros_like(pooled)
        return encoding

    def encode_live(self, captions: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """Encode captions as `encode` does, through the private tree, with gradients if something is trained."""
        names = embeddings.names_of(self._live.tokenizer)
        tokens = [_literal_tokens(self._live, embeddings.spaced(caption, names)) for caption in captions]
        if any(part.requires_grad for part in (*self._trained, *self.module.parameters())):
            with compat.outputs_on(self.device), PinnedConstants():
                return encode_together(self._live, tokens, self._keep)
        # Nothing in the encoder is trained, so encode each caption once.
        pairs = zip(captions, tokens, strict=True)
        return [
            self._keep.get(caption, functools.partial(encoded, self._live, token_set)) for caption, token_set in pairs
        ]

    def prompt(self, prompt: str) -> list:
        """Return a prompt's conditioning as a CLIPTextEncode node does; in training, by the tree as trained so far."""
        if self._live is not None:
            return self._live.encode_from_tokens_scheduled(self._live.tokenize(prompt))
        # Cache the result, so that the encoder is loaded once.
        if prompt not in self._prompts:
            self._prompts[prompt] = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt))
        return self._prompts[prompt]

    def encode_for_sampling(self, caption: str) -> list:
        """Return the conditioning of a literal caption in the form that ComfyUI's sampler takes."""
        return self.clip.encode_from_tokens_scheduled(_literal_tokens(self.clip, caption))

    def count_tokens(self, caption: str) -> int:
        """Return the number of tokens in the encoder with the most, without start, end and padding."""
        tokens = _literal_tokens(self.clip, caption, return_word_ids=True)
        counts = [sum(1 for chunk in chunks for token in chunk if token[2] > 0) for chunks in tokens.values()]
        return max(counts, default=0)

    def is_word(self, name: str) -> bool:
        """Return True if one of the encoders has the name as a single token."""
        return any(len(_ids(self._tokenizer(key), name)) == 1 for key in self.encoders())

    def start_vectors(self, text: str) -> dict[str, torch.Tensor]:
        """Return [tokens, width] float32 on the CPU by encoder. `embedding:NAME` in the text gives its own vectors."""
        import torch

        vectors = {}
        for key in self.encoders():
            table = self._table(key)
            rows = [
                token if torch.is_tensor(token) else table[token] for token in _ids(self._tokenizer(key), text.strip())
            ]
            rows = [row.detach().to("cpu", torch.float32).clone() for row in rows if _fits(row, table.shape[1])]
            vectors[key] = torch.stack(rows) if rows else torch.zeros(0, table.shape[1])
        return vectors

    def median_norms(self) -> dict[str, float]:
        """Return the median norm of the vocabulary's vectors by encoder."""
        return {key: float(self._table(key).float().norm(dim=-1).median()) for key in self.encoders()}

    def attach(self, name: str, vectors: dict[str, torch.Tensor]) -> None:
        """Let the private tree's encoder read `embedding:<name>` as these vectors."""
        self._live.tokenizer = embeddings.with_embedding(self._live.tokenizer, name, vectors)
        self._trained += vectors.values()

    @contextmanager
    def training(self) -> Iterator[None]:
        """Load the whole encoder, build the private tree, and discard it at the end in any case."""
        import comfy.model_management
        import torch

        from ....trainers.memory.autograd import own_weights, private_tree
        from .lora import classic
        from .quantization.gguf import as_plain_layers
        from .quantization.quantized import as_linears

        with torch.inference_mode(False), torch.enable_grad():
            clip = self.clip.clone()
            clip.patcher = classic(clip.patcher, "clip")
            comfy.model_management.load_models_gpu([clip.patcher], force_full_load=True)
            own_weights(clip.patcher.model)
            self.module = private_tree(clip.patcher.model)
            as_plain_layers(self.module, "clip")
            as_linears(self.module, clip.patcher.model, "clip")
            for key in WIDTHS:
                # ComfyUI computes CLIP in float32. It would cast the weights at every pass, and autograd would keep
                # each copy until the backward. Casting once takes no more memory, and saves the time.
                getattr(self.module, key, torch.nn.Identity()).float()
            self.device = clip.patcher.load_device
            # The weights are in place, and ComfyUI cannot load a private tree.
            clip.cond_stage_model = self.module
            patcher = clip.patcher
            # Do not capture `clip`: the cycle would keep its float32 tree until Python's garbage collector runs.
            clip.load_model = lambda *args, **kwargs: patcher
            self._live = clip
            try:
                yield
            finally:
                self._live = None
                self._trained = []
                self._keep = LRUCache()
                self.module = None

    def fingerprint(self) -> str:
        """Return a hash that changes with weights, patches, clip skip, tokenizer options and attached embeddings."""
        return self._described(patcher_digest(self.clip.patcher, self._idle()))

    def earlier_fingerprint(self) -> str:
        """Return the fingerprint that earlier versions computed from samples of the weights."""
        return self._described(sampled_patcher_digest(self.clip.patcher, self._idle()))

    def _described(self, weights: str) -> str:
        clip = self.clip
        own = f"{weights}|{clip.layer_idx}|{sorted(clip.tokenizer_options.items())}"
        attached = embeddings.attached_digest(clip.tokenizer)
        return f"{own}|{attached}" if attached else own

    def embedded_digest(self, texts: Sequence[str], without: Sequence[str] = ()) -> str:
        """Return a hash of the embedding files that texts call, in each encoder; `fingerprint` covers attached ones."""
        skipped = {*without, *embeddings.names_of(self.clip.tokenizer)}
        digests = []
        for name in sorted({name for text in texts for name in embeddings.called_names(text)} - skipped):
            if name not in self._embedded:
                self._embedded[name] = embeddings.file_digest(self.clip.tokenizer, name)
            digests.append(f"{name}:{self._embedded[name]}" if self._embedded[name] else "")
        return hashlib.sha256("|".join(filter(None, digests)).encode()).hexdigest() if any(digests) else ""

    def _idle(self) -> tuple[str, ...]:
        """Return the weights without effect: CLIP-L's projection matters only beside an encoder that is not CLIP."""
        parts = {name for name, _ in self.clip.cond_stage_model.named_children()}
        return (_PROJECTION,) if parts <= {"clip_l", "clip_g"} else ()

    def encoders(self) -> list[str]:
        """Return the keys of the CLIP parts."""
        return embeddings.encoders(self.clip)

    def adapter_name(self, path: str) -> str:
        """Return kohya's name of a module: prefix lora_te_ for one encoder without T5, else lora_te1_, lora_te2_."""
        key, _, inner = path.partition(".transformer.")
        keys = self.encoders()
        alone = len(keys) == 1 and not hasattr(self.clip.cond_stage_model, "t5xxl")
        return f"lora_te{'' if alone else keys.index(key) + 1}_" + inner.replace(".", "_")

    def own_name(self, path: str) -> str:
        """Return the module's name in ComfyUI's files that hold the denoiser too."""
        return f"text_encoders.{path}"

    def published_name(self, path: str) -> str | None:
        """Return a module's path in transformers' CLIP. Only the encoder with a projection wraps the transformer."""
        key, _, inner = path.partition(".transformer.")
        return inner if key == "clip_g" else inner.removeprefix("text_model.")

    def _tokenizer(self, key: str):
        return getattr(self.clip.tokenizer, key)

    def _table(self, key: str) -> torch.Tensor:
        return getattr(self.clip.cond_stage_model, key).transformer.get_input_embeddings().weight.detach()


def _fits(row: torch.Tensor, width: int) -> bool:
    return row.shape[-1] == width


def _ids(tokenizer, text: str) -> list:
    chunks = tokenizer.tokenize_with_weights(text, return_word_ids=True, disable_weights=True) if text else []
    return [token for chunk in chunks for token, _, word_id in chunk if word_id > 0]


def _literal_tokens(clip: CLIP, text: str, **options) -> dict:
    try:
        return clip.tokenize(text, disable_weights=True, **options)
    except TypeError:
        # Encoders that never weight their words pass disable_weights themselves, so it would arrive twice.
        return clip.tokenize(text, **options)


def conditioning_tensors(clip: CLIP, tokens: dict) -> dict[str, torch.Tensor]:
    """Return ComfyUI's encoding of tokens as ordinary tensors on the CPU."""
    import torch

    with torch.no_grad():
        return _on_cpu(encoded(clip, tokens))


def _on_cpu(encoding: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().to("cpu").clone() for name, value in encoding.items()}


# Batches: one pass for all captions if an encoder is trained, cached outputs if not. ComfyUI's own code around its
# encoders (chunks, joining, padding) still runs. Only the calls of the inner encoders return results that were computed
# for all captions together.


def encode_together(clip: CLIP, tokens: Sequence[dict], keep: LRUCache) -> list[dict[str, torch.Tensor]]:
    """Return ComfyUI's encoding of each set of tokens, with its autograd graph.

    Args:
        clip: a CLIP whose module is a private tree.
        tokens: results of `clip.tokenize` for literal captions.
        keep: cache for the outputs of encoders without trained parameters.
    """
    return _each(clip, tokens, WIDTHS, keep)


def encode_alike(clip: CLIP, tokens: Sequence[dict]) -> list[dict[str, torch.Tensor]]:
    """Return ComfyUI's encoding of each set of tokens, all of one form."""
    return _each(clip, tokens, _ROW_BY_ROW, None)


def form_of(clip: CLIP, tokens: dict) -> Hashable:
    """Return number and lengths of the chunks for each encoder; None for tokens that must be encoded alone.

    That is so if a place holds vectors instead of a number, or if no encoder is known to compute row by row.
    """
    form = []
    for key, _ in _inner(clip, [tokens]):
        sections = _sections(tokens, key)
        if not all(isinstance(place, numbers.Integral) for section in sections for place in section):
            return None
        form.append((key, *(len(section) for section in sections)))
    return tuple(form) if any(key in _ROW_BY_ROW for key, *_ in form) else None


def _each(clip: CLIP, tokens: Sequence[dict], keys: Collection[str], keep: LRUCache | None) -> list[dict]:
    together = {key: _Rows(inner, tokens, key) for key, inner in _inner(clip, tokens) if key in keys}
    encodings = []
    for number, token_set in enumerate(tokens):
        with _answered(clip, tokens, number, together, keep):
            encodings.append(encoded(clip, token_set))
    return encodings


def encoded(clip: CLIP, tokens: dict) -> dict[str, torch.Tensor]:
    """Return ComfyUI's encoding of tokens, under the names that its conditioning nodes use."""
    import torch

    encoding = clip.encode_from_tokens(tokens, return_pooled=True, return_dict=True)
    encoding["cross_attn"] = encoding.pop("cond")
    return {name: value for name, value in encoding.items() if torch.is_tensor(value)}


def _inner(clip: CLIP, tokens: Sequence[dict]) -> Iterator[tuple[str, torch.nn.Module]]:
    for name in tokens[0]:
        for key in (name, f"clip_{name}"):
            inner = getattr(clip.cond_stage_model, key, None)
            if hasattr(inner, "encode"):
                yield key, inner


def _name(key: str, tokens: dict) -> str:
    return key if key in tokens else key[len("clip_") :]


def _sections(tokens: dict, key: str) -> list[list]:
    return [[place[0] for place in chunk] for chunk in tokens[_name(key, tokens)]]


class _Rows:
    """An encoder's outputs for the chunks of all captions, computed at ComfyUI's first call.

    Not earlier: ComfyUI places the weights and sets the output layer just before that call.
    """

    def __init__(self, inner: torch.nn.Module, tokens: Sequence[dict], key: str):
        self._encode = inner.encode
        sections = [_sections(token_set, key) for token_set in tokens]
        self._rows = [section for rows in sections for section in rows]
        self._spans = list(itertools.pairwise([0, *itertools.accumulate(len(rows) for rows in sections)]))
        self._together = len({len(row) for row in self._rows}) == 1 and len(tokens) > 1
        self._found: tuple | None = None

    def answer(self, number: int, wanted: list[list]):
        start, stop = self._spans[number]
        # ComfyUI asks for one more row for a prompt with weights; captions have none.
        if not self._together or len(wanted) != stop - start:
            return self._encode(wanted)
        if self._found is None:
            self._found = self._encode(self._rows)
        return _slice(self._found, start, stop)


@contextmanager
def _answered(
    clip: CLIP, tokens: Sequence[dict], number: int, together: dict[str, _Rows], keep: LRUCache | None
) -> Iterator[None]:
    """Let the encoders answer caption `number` with results that are computed already."""
    changed = []
    try:
        for key, inner in _inner(clip, tokens):
            answer = _answer(inner, key, number, together.get(key), keep)
            if answer is not None:
                inner.encode = answer
                changed.append(inner)
        yield
    finally:
        for inner in changed:
            del inner.encode


def _answer(inner, key: str, number: int, rows: _Rows | None, keep: LRUCache | None):
    if rows is not None:
        return functools.partial(rows.answer, number)
    if keep is None or any(parameter.requires_grad for parameter in inner.parameters()):
        return None
    encode = inner.encode
    return lambda wanted: keep.get(f"{key} {wanted}", lambda: _Kept(encode(wanted))).value


def _slice(value, start: int, stop: int):
    if isinstance(value, tuple):
        return tuple(_slice(part, start, stop) for part in value)
    if isinstance(value, dict):
        return {name: _slice(part, start, stop) for name, part in value.items()}
    return value if value is None else value[start:stop]


class _Kept(dict):
    """An encoder's output in a form that `LRUCache` can measure."""

    def __init__(self, value: tuple):
        import torch

        super().__init__({str(place): part for place, part in enumerate(value) if torch.is_tensor(part)})
        self.value = value
