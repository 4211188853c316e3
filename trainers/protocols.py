"""The three things training needs from a host: a denoiser, a text encoder and an image codec.

ComfyUI's implementation is `nodes/host/`; the tests hold one over diffusers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import nn

    from .families import LayerSplit


class Group:
    """The processes of a training, seen from one of them; this one is alone.

    Attributes:
        rank: its number among them, from 0.
        world: how many there are.
        sharded: whether they hold the denoiser's frozen weights in shares.
        paired: whether all of them have to make the same passes through the denoiser at this moment.
    """

    rank = 0
    world_size = 1
    sharded = False
    lockstep = False

    @property
    def is_main(self) -> bool:
        """Whether this is the one that opens the run, saves, and tells the host."""
        return self.rank == 0

    def all_reduce(self, number: float = 0.0) -> float:
        """Waits until all have come here; the sum of their numbers, the same to the bit in each.

        Raises:
            Parted: one of them has left instead.
        """
        return number

    def abort(self) -> None:
        """Tells the others, who are on their way to a meeting, that this one leaves."""

    def all_reduce_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Puts the sum over all processes in place of each gradient; none where none has one."""

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Gives all the leader's values."""

    def gather(self, values: list[float], whole: int) -> list[float]:
        """The numbers of a step's examples, so many, of which each process has those of its rows."""
        return values

    def broadcast_text(self, text: str) -> str:
        """The leader's text, in all of them. Raises Parted as `meet` does."""
        return text

    def shard(self, tree: nn.Module, keep: Iterable[torch.Tensor], needs_input_grad: bool) -> None:
        """Shares the frozen weights of a tree's blocks out, as `shards.Shards` says; not where one trains alone."""

    @contextmanager
    def main_process_only(self) -> Iterator[bool]:
        """Within it the one that leads works alone, which is told True; the others have nothing to do meanwhile.

        All have to come to it, since the weights that it needs may be theirs.

        Raises:
            Parted: one of them has left.
        """
        yield self.is_main

    def reset_after_failure(self) -> None:
        """Lets the denoiser be asked again after a pass that did not come to its end."""


ALONE = Group()


@dataclass(frozen=True)
class Conditioning:
    """What one example is conditioned on.

    Attributes:
        tensors: the text encoder's output by the host's own names, each [1, ...].
        original_size: (width, height) of the picture before scaling, pixels.
        crop: (left, top) of the crop in the scaled picture, pixels.
        target_size: (width, height) of the crop that is trained on, pixels.
        source: None, or the unscaled latent [1, C, ...] of the picture that this one is made of.
        hole: None, or [1, 1, H, W] over pixels: 1 where an inpainting model is to fill the picture.
        around: with a hole, the unscaled latent [1, C, ...] of the picture with the hole grey.
    """

    tensors: dict[str, torch.Tensor]
    original_size: tuple[int, int] = (0, 0)
    crop: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] = (0, 0)
    source: torch.Tensor | None = None
    inpaint_mask: torch.Tensor | None = None
    masked_image_latent: torch.Tensor | None = None


# What a denoiser may take beside noise and text.
HOLE = "hole"
SOURCE = "source"


@dataclass(frozen=True)
class Geometry:
    """How a model wants its pictures cut.

    Attributes:
        resolution: side of the square whose area a picture is scaled to, pixels.
        step: width and height of every bucket are multiples of this, pixels.
    """

    resolution: int
    step: int

    @property
    def side(self) -> int:
        """Of the square that is drawn at this resolution, pixels."""
        return max(self.step, self.resolution // self.step * self.step)


@dataclass(frozen=True)
class PreviewRequest:
    """Pictures to be drawn by the host's own sampler.

    Attributes:
        prompts: one picture each.
        negative: the negative prompt, shared.
        size: (width, height) in pixels.
        seed: noise seed of the first picture; picture i uses seed + i.
        beside: examples whose source picture or hole the pictures are drawn with, one after the other; empty for none.
    """

    prompts: tuple[str, ...]
    size: tuple[int, int]
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    seed: int
    negative: str = ""
    beside: tuple[Conditioning, ...] = ()


class Command(Enum):
    """What may be asked of a training while it runs; all else that ends it early is an exception of the host's."""

    SAVE = "save"  # write what there is, and go on
    STOP = "stop"  # this step was the last: what was reached is the result


class PreviewSkipped(Exception):
    """Raised by what draws previews: something was asked that should not wait until they are drawn."""


class TextEncoder(Protocol):
    """Turns captions, as literal text, into conditioning tensors."""

    def encode(self, caption: str) -> dict[str, torch.Tensor]:
        """The conditioning tensors of one caption, each [1, ...] on the CPU, ordinary tensors."""

    def form(self, caption: str) -> Hashable:
        """Captions of one form can be encoded together; None for one that has to be encoded alone."""

    def encode_all(self, captions: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """As `encode` for each of several captions of one form, but for rounding."""

    def count_tokens(self, caption: str) -> int:
        """Number of tokens of the caption without start, end and padding."""

    def fingerprint(self) -> str:
        """Hash that changes with weights, waiting patches and clip skip."""

    def embedded_digest(self, texts: Sequence[str], without: Sequence[str] = ()) -> str:
        """Hash of the embedding files that texts call by `embedding:<name>`; empty where they call none.

        Args:
            without: names that stand for something else.
        """

    # What follows is asked only where a word or the encoder itself is trained.

    module: torch.nn.Module
    device: torch.device

    def is_word(self, name: str) -> bool:
        """Whether the vocabulary holds a name as a whole."""

    def start_vectors(self, text: str) -> dict[str, torch.Tensor]:
        """The vocabulary's vectors of a text's tokens, [tokens, width] by encoder; encoders take new words.

        Raises ModelError when none of the encoders does.
        """

    def median_norms(self) -> dict[str, float]:
        """Median norm of the vocabulary's vectors by encoder."""

    def training(self) -> AbstractContextManager:
        """Places the encoder and gives it a private tree, `module`; within the denoiser's `training` only."""

    def attach(self, name: str, vectors: dict[str, torch.Tensor]) -> None:
        """From now on `embedding:<name>` in a caption stands for these vectors, [n, width] by encoder."""

    def encoders(self) -> list[str]:
        """Keys of the encoders that can be trained, each the name of a module in `module`.

        Raises ModelError when there is none.
        """

    def adapter_name(self, path: str) -> str:
        """Name of a module, by its path in `module`, in kohya's adapter files."""

    def own_name(self, path: str) -> str:
        """Name of a module, by its path in `module`, in the host's files of any method."""

    def published_name(self, path: str) -> str | None:
        """Path of a module in its encoder as transformers publishes it; None where that has no such module."""

    def encode_live(self, captions: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """As `encode` for each of several captions, through the private tree, with its graph."""


class ImageCodec(Protocol):
    """Turns pictures into latents.

    Attributes:
        pixels_at_once: of pictures of one size that are to be encoded together; less than a picture's for one alone.
    """

    pixels_at_once: int

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, H, W, 3] float in 0..1 -> mean and log-variance of the unscaled latents' posterior.

        Each [B, C, (T,) h, w], float32 on the CPU; the log-variance is None where the codec has no posterior.
        """

    def fingerprint(self) -> str:
        """Hash that changes with the weights and their dtype."""


class Denoiser(Protocol):
    """A frozen pretrained denoiser whose module tree may be given adapters.

    Attributes:
        takes: what it takes beside noise and text: HOLE, SOURCE, or empty for nothing.
    """

    module: torch.nn.Module
    parameterization: str
    sigma_data: float
    noise_scale: float
    family: str
    conditioning_kind: str
    device: torch.device
    compute_dtype: torch.dtype

    def geometry(self, resolution: int) -> Geometry:
        """Cut of the pictures for a wished resolution, 0 for the model's own."""

    def check_inputs(self, latent: torch.Tensor, conditioning: dict[str, torch.Tensor]) -> None:
        """Raises ModelError when a codec's latent or an encoder's output does not fit this model."""

    def sigmas(self) -> torch.Tensor:
        """The model's noise levels in rising order, [N] float32."""

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """VAE latents as the model wants them (scale and shift, exactly once)."""

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """x_t for x0 and noise [B, C, ...] at sigma [B]."""

    def predict(self, x_t: torch.Tensor, sigma: torch.Tensor, conditioning: Sequence[Conditioning]) -> torch.Tensor:
        """The network's raw output for x_t [B, C, ...] at sigma [B], each example on its own conditioning."""

    def preview(self, request: PreviewRequest) -> list[Image.Image]:
        """Pictures by the model as trained so far. May raise Hurried."""

    def make_room(self, weights: bool = False) -> None:
        """Lets go of what lies on the device beside the training; weights: also of weights that the tree gave up."""

    def free_memory(self) -> int | None:
        """Bytes that the device has for what is not on it yet; None where the host cannot tell."""

    def pin(self, weight: torch.Tensor) -> bool:
        """Locks a weight's memory on the CPU where it is, so that the device reads it by itself; within `training`.

        False where the host does not, or not any more of it. Undone when the training ends.
        """

    def training(self, compute_dtype: str, offloaded: bool = False) -> AbstractContextManager:
        """Places the weights and sets what the host needs for a backward; undoes it in any case.

        Args:
            away: whether the weights of blocks (`autograd.blocks_of`) stay off the device, marked as `offload.place`
                knows them; whoever asks for that brings them there.
        """

    def adapter_name(self, path: str) -> str:
        """Name of a module, by its path in `module`, in kohya's adapter files."""

    def own_name(self, path: str) -> str:
        """Name of a module or a bare parameter, by its path in `module`, in the host's files of any method."""

    def published_name(self, path: str) -> str | None:
        """Path of a module in the model as diffusers publishes it; None where it has no such module."""

    def published_splits(self, path: str) -> tuple[LayerSplit, ...]:
        """The layers that diffusers has for a module, where it cuts the model otherwise; none where that is unknown."""

    def check_adapter(self, tensors: dict[str, torch.Tensor]) -> list[str]:
        """Keys of an adapter file that the host would not use."""

    def fingerprint(self) -> str:
        """Hash of what makes this base: keys, shapes, dtypes, weights, waiting patches."""


def earlier_fingerprint(part: Denoiser | TextEncoder | ImageCodec) -> str:
    """The fingerprint that versions before gave a part of a base, by which the files they made are found.

    A host without such a past has no method `earlier_fingerprint`, and its fingerprint stands for both.
    """
    return getattr(part, "earlier_fingerprint", part.fingerprint)()


def embedded_digest(text: TextEncoder, texts: Sequence[str], without: Sequence[str] = ()) -> str:
    """As the text encoder's own; empty for a host without embedding files."""
    given = getattr(text, "embedded_digest", None)
    return given(texts, without) if given is not None else ""


def base_digest(*fingerprints: str) -> str:
    """One hash of the fingerprints of a base's parts: denoiser, text encoder, codec, and what it starts from."""
    return hashlib.sha256("|".join(fingerprints).encode()).hexdigest()


@dataclass(frozen=True)
class Host:
    """The three parts together, and what the host wants to be asked while training runs.

    Attributes:
        report: called with (event name, payload) after each event; may raise to interrupt.
        asked: called after each step; what was asked since, None for nothing.
        heed: called within a step where it can be given up; may raise to interrupt.
        group: the processes that train together.
        graph: what the run was queued as, JSON-able, kept beside its recipe; None for nothing. It decides nothing.
    """

    denoiser: Denoiser
    text: TextEncoder
    codec: ImageCodec
    report: callable = field(default=lambda event, payload: None)
    next_command: Callable[[], Command | None] = field(default=lambda: None)
    check_interrupt: Callable[[], None] = field(default=lambda: None)
    group: Group = ALONE
    graph: dict[str, Any] | None = None

    def report_phase(self, name: str) -> None:
        """Report the work between two steps or before the first; may raise to interrupt, as `report` does.

        Args:
            name: "loading", "gradients", "measuring", "previews", or "training" when the steps go on.
        """
        self.report("phase", {"name": name})
