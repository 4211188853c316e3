"""Protocols between training and its host: denoiser, text encoder, image codec, process group, callbacks.

`nodes/host/` implements them for ComfyUI. The tests have an implementation for diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from .process_group import ALONE, Group

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from .families import LayerSplit


@dataclass(frozen=True)
class Conditioning:
    """Conditioning of one sample.

    Attributes:
        tensors: the text encoder's output by the host's names, each [1, ...]; or an encoded prompt's, as it packs them.
        original_size: (width, height) of the picture before scaling, pixels.
        crop: (left, top) of the crop in the scaled picture, pixels.
        target_size: (width, height) of the crop that is trained on, pixels.
        sources: unscaled latents [1, C, ...] of the source images for an edit model.
        inpaint_mask: [1, 1, H, W] in pixels, 1 where an inpainting model fills the picture; None for none.
        masked_image_latent: with an inpaint mask, the unscaled latent [1, C, ...] of the picture with a gray hole.
        first_frame: scaled latent [1, C, 1, h, w] that replaces the first of x_t, without noise; None for none.
    """

    tensors: dict[str, torch.Tensor]
    original_size: tuple[int, int] = (0, 0)
    crop: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] = (0, 0)
    sources: tuple[torch.Tensor, ...] = ()
    inpaint_mask: torch.Tensor | None = None
    masked_image_latent: torch.Tensor | None = None
    first_frame: torch.Tensor | None = None


# Kinds of extra conditioning that a denoiser takes besides text: an inpaint mask, or a source image.
HOLE = "hole"
SOURCE = "source"
MAX_SOURCES = 3  # most source images of a picture


@dataclass(frozen=True)
class Geometry:
    """Picture sizes that a model is trained at.

    Attributes:
        resolution: a picture is scaled to the area of a square of this side, pixels.
        step: width and height of every bucket are multiples of this, pixels.
    """

    resolution: int
    step: int

    @property
    def side(self) -> int:
        """Return the side of a square picture sampled at this resolution, pixels."""
        return max(self.step, self.resolution // self.step * self.step)


@dataclass(frozen=True)
class PictureRequest:
    """Request to sample one picture with the host's own sampler.

    Attributes:
        prompt, negative: texts with the host's prompt syntax, such as weights.
        size: (width, height) in pixels.
        seed: of the noise, 0 to 2 ** 64 - 1.
        guidance: for models that were distilled with guidance; None for the host's default.
        frames: of a clip; 1 for a picture.
        beside: conditioning with the source images, inpaint mask or first frame, if the model takes one.
        encoded: conditioning tensors of prompt and negative, if they were encoded together with the source images.
    """

    prompt: str
    size: tuple[int, int]
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    seed: int
    negative: str = ""
    guidance: float | None = None
    beside: Conditioning | None = None
    encoded: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] | None = None
    frames: int = 1


class Command(Enum):
    """User commands to a running training. Anything else that ends it early is an exception of the host."""

    SAVE = "save"  # save now and continue
    STOP = "stop"  # end after this step; its state is the result


class PreviewSkipped(Exception):
    """Signal from the preview sampler that a user command should not wait for the previews."""


class TextEncoder(Protocol):
    """Text encoder: turns captions, as literal text, into conditioning tensors.

    Attributes:
        sees_pictures: it can read source pictures beside the text.
    """

    sees_pictures: bool

    def encode(self, caption: str) -> dict[str, torch.Tensor]:
        """Encode one caption. Return its conditioning tensors, each [1, ...] on the CPU, no inference tensors."""

    def form(self, caption: str) -> Hashable:
        """Return a key: captions with equal keys can be encoded in one batch. None if a caption needs its own batch."""

    def encode_all(self, captions: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """Encode several captions of equal `form` in one batch. The result equals `encode`'s except for rounding."""

    def count_tokens(self, caption: str) -> int:
        """Return the number of tokens of the caption, without start, end and padding."""

    # Training uses the two methods below only if the recipe's `prompt_node` shows source pictures to the encoder.

    def check_prompt_node(self, node: str) -> None:
        """Raise ModelError if the host lacks the node, or if this encoder does not see pictures."""

    def encode_with_sources(
        self, node: str, text: str, pictures: Sequence[torch.Tensor], negative: bool = False
    ) -> dict[str, torch.Tensor]:
        """Encode a text and pictures [1, H, W, 3] in 0..1 as the host's node does. Return tensors as `encode` does."""

    def fingerprint(self) -> str:
        """Return a hash of the weights, the pending patches and the clip skip."""

    def embedded_digest(self, texts: Sequence[str], without: Sequence[str] = ()) -> str:
        """Return a hash of the embedding files that texts use by `embedding:<name>`; empty if they use none.

        Args:
            without: names to ignore, because they do not stand for a file.
        """

    # Training uses the members below only if it trains an embedding or the text encoder itself.

    module: torch.nn.Module
    device: torch.device

    def is_word(self, name: str) -> bool:
        """Report whether a name is a single token of the vocabulary."""

    def start_vectors(self, text: str) -> dict[str, torch.Tensor]:
        """Return the embedding vectors of a text's tokens, [tokens, width] by encoder that supports new embeddings.

        Raises:
            ModelError: none of the encoders supports them.
        """

    def median_norms(self) -> dict[str, float]:
        """Return the median norm of the vocabulary's vectors, by encoder."""

    def training(self) -> AbstractContextManager:
        """Load the encoder and build its private copy, `module`. Use it only within the denoiser's `training`."""

    def attach(self, name: str, vectors: dict[str, torch.Tensor]) -> None:
        """Let `embedding:<name>` in captions stand for these vectors from now on, [n, width] by encoder."""

    def encoders(self) -> list[str]:
        """Return the keys of the trainable encoders. Each is the name of a submodule of `module`.

        Raises:
            ModelError: there is none.
        """

    def adapter_name(self, path: str) -> str:
        """Return the name that kohya's adapter files use for the submodule at `path` in `module`."""

    def own_name(self, path: str) -> str:
        """Return the name that the host's files, of any method, use for the submodule at `path` in `module`."""

    def published_name(self, path: str) -> str | None:
        """Return the path of a submodule in the encoder as transformers publishes it; None if it has none there."""

    def encode_live(self, captions: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """Encode several captions as `encode` does, but through `module` and with the autograd graph."""


class ImageCodec(Protocol):
    """Image codec, such as a VAE: turns pictures into latents.

    Attributes:
        pixels_at_once: largest number of pixels in a batch of pictures of one size. If a picture has more, it is
            encoded alone.
    """

    pixels_at_once: int

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode pixels [B, H, W, 3], float in 0..1, to mean and log-variance of the unscaled latents' posterior.

        Each is [B, C, (T,) h, w], float32 on the CPU. The log-variance is None if the codec has no posterior.
        """

    # Training uses the two methods below only for clips.

    def snap_frames(self, frames: int) -> int:
        """Return the largest number of frames, up to `frames`, that the codec takes; 0 if it encodes stills alone."""

    def encode_clip(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode the frames of one clip [T, H, W, 3] as `encode` does, to [1, C, latent frames, h, w]."""

    def encode_sources(self, node: str, pictures: Sequence[torch.Tensor], size: tuple[int, int]) -> list[torch.Tensor]:
        """Encode source pictures [1, H, W, 3] in 0..1 to unscaled latents as the host's node does.

        Training uses it only if the recipe's `prompt_node` shows source pictures to the text encoder.

        Args:
            size: (width, height) of the picture that they become, pixels.
        """

    def fingerprint(self) -> str:
        """Return a hash of the weights and their dtype."""


class Denoiser(Protocol):
    """Frozen pretrained denoiser. Training may add adapters to its module tree.

    Attributes:
        conditioning_kind: the extra conditioning besides text: HOLE, SOURCE, or empty for none.
        takes_first_frame: it continues a first frame that lies in the latent without noise.
        max_sources: with SOURCE, the largest number of source images of a picture.
        adds_in_place: True if the module or a patch of it may change activations in place that autograd has saved.
        position_options: entries of the blocks' option dicts that tell patches which block runs. The module itself
            does not read them. Empty if there may be patches.
    """

    module: torch.nn.Module
    parameterization: str
    sigma_data: float
    noise_scale: float
    family: str
    conditioning_kind: str
    takes_first_frame: bool
    max_sources: int
    adds_in_place: bool
    position_options: Collection[str]
    device: torch.device
    compute_dtype: torch.dtype

    def geometry(self, resolution: int) -> Geometry:
        """Return the picture sizes for a resolution; 0 for the model's own resolution."""

    def empty_latent(self, size: tuple[int, int]) -> torch.Tensor:
        """Return zeros [1, C, ...] in the shape of the latent of a picture of (width, height) pixels."""

    def check_inputs(self, latent: torch.Tensor, conditioning: dict[str, torch.Tensor]) -> None:
        """Raise ModelError if the codec's latent or the text encoder's output does not fit this model."""

    def sigmas(self) -> torch.Tensor:
        """Return the model's noise levels in rising order, [N] float32."""

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Apply the model's scale and shift to VAE latents. Call it exactly once."""

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Return x_t for x0 and noise [B, C, ...] at sigma [B]."""

    def denoised(self, output: torch.Tensor, x_t: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Return the x0 that a raw output stands for at x_t and sigma [B]."""

    def predict(self, x_t: torch.Tensor, sigma: torch.Tensor, conditioning: Sequence[Conditioning]) -> torch.Tensor:
        """Return the network's raw output for x_t [B, C, ...] at sigma [B], each sample with its own conditioning."""

    def preview(self, requests: Sequence[PictureRequest]) -> list[Image.Image | list[Image.Image]]:
        """Sample a picture, or the frames of a clip, for each request with the model as trained so far.

        May raise PreviewSkipped.
        """

    def make_room(self, weights: bool = False) -> None:
        """Free device memory that training does not use, such as other models and caches.

        Args:
            weights: also unload the host's copy of this model, whose weights training has offloaded or sharded.
        """

    def free_memory(self) -> int | None:
        """Return the free memory of the device in bytes; None if the host cannot tell."""

    def pin(self, weight: torch.Tensor) -> bool:
        """Pin a weight's CPU memory in place, so that the device can read it directly. Use it only within `training`.

        Return False if the host does not pin memory, or its limit is reached. The memory is unpinned when training
        ends.
        """

    def training(self, compute_dtype: str, offloaded: bool = False) -> AbstractContextManager:
        """Load the weights and prepare the host for a backward in the block. Undo both afterwards in any case.

        Args:
            offloaded: keep the weights of blocks (`autograd.blocks_of`) off the device, marked by
                `offload.mark_offloaded`. The caller then moves them to the device.
        """

    def adapter_name(self, path: str) -> str:
        """Return the name that kohya's adapter files use for the submodule at `path` in `module`."""

    def own_name(self, path: str) -> str:
        """Return the name that the host's files, of any method, use for the submodule or parameter at `path`."""

    def published_name(self, path: str) -> str | None:
        """Return the path of a submodule in the model as diffusers publishes it; None if it has none there."""

    def published_splits(self, path: str) -> tuple[LayerSplit, ...]:
        """Return the layers into which diffusers splits a submodule; empty if it does not, or if that is unknown."""

    def check_adapter(self, tensors: dict[str, torch.Tensor]) -> list[str]:
        """Return the keys of an adapter file that the host would not use."""

    def fingerprint(self) -> str:
        """Return a hash of the base: keys, shapes, dtypes, weights, pending patches."""


class PreviewModel(Protocol):
    """Another model of the host, to draw sample pictures on with the trained adapter applied."""

    def check(self, adapter: Mapping[str, torch.Tensor]) -> None:
        """Raise ModelError if the adapter does not fit the model."""

    def draw(
        self,
        requests: Sequence[PictureRequest],
        export: Callable[[], tuple[Mapping[str, torch.Tensor] | None, Mapping[str, torch.Tensor] | None]],
        factor: float = 1.0,
    ) -> list[Image.Image | list[Image.Image]]:
        """Sample as `Denoiser.preview` does. Use it only within the denoiser's `training`. May raise PreviewSkipped.

        Args:
            export: returns the adapter and the embedding as they are saved, with the host's names; None if none is
                trained. Called once the trained model has made way, whose weights they may refer to.
            factor: on the adapter's strength.
        """


class Keeper(Protocol):
    """Keeper of the denoiser's tree from one training of a run to the next, as long as the host has memory for it."""

    def keep(self, key: Any, rest: Any) -> None:
        """Keep the denoiser's tree when its training ends now, and `rest` with it, or do nothing."""

    def take(self, key: Any) -> Any:
        """Replace the denoiser's tree by the one kept under an equal key, and return what was kept with it.

        Return None without one, or if the weights of the base have changed. Use it only within `training`.
        """


@dataclass(frozen=True)
class Host:
    """The host's three models, and its callbacks during training.

    Attributes:
        report: called with (event name, payload) after each event; may raise to interrupt.
        next_command: called after each step; returns the user's next command, None for none.
        check_interrupt: called within a step wherever the step can be abandoned; may raise to interrupt.
        group: the process group.
        preview_model: the model to draw sample pictures on; None for the trained one.
        graph: the ComfyUI graph that queued the run, JSON-able, saved next to the recipe; None for none. It has no
            effect on training.
        start: an `Adapter` to start from, or an `Embedding` if nothing else is trained; None for none.
        keeper: keeps the tree while the run is paused; None to build it each time.
    """

    denoiser: Denoiser
    text: TextEncoder
    codec: ImageCodec
    report: callable = field(default=lambda event, payload: None)
    next_command: Callable[[], Command | None] = field(default=lambda: None)
    check_interrupt: Callable[[], None] = field(default=lambda: None)
    group: Group = ALONE
    preview_model: PreviewModel | None = None
    graph: dict[str, Any] | None = None
    start: Mapping[str, torch.Tensor] | None = None
    keeper: Keeper | None = None

    def report_phase(self, name: str) -> None:
        """Report a phase of work before the first step or between steps. May raise to interrupt, as `report` does.

        Args:
            name: "loading", "gradients", "measuring", "previews", or "training" when the steps continue.
        """
        self.report("phase", {"name": name})
