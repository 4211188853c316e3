"""Another model of the graph for sample pictures, drawn on as Graft Apply Adapter and KSampler would."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from comfy.model_management import minimum_inference_memory

from ....trainers.errors import ModelError
from ....trainers.families import GENERAL
from . import compat, families
from .embeddings import apply_embedding
from .lora import apply_adapter
from .sampling import PromptSampler
from .text_encoder import ComfyText

if TYPE_CHECKING:
    import torch
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE
    from PIL import Image

    from ....trainers.formats.embedding import Embedding
    from ....trainers.protocols import PictureRequest
    from .denoiser import ComfyDenoiser


@dataclass(frozen=True)
class PreviewChoice:
    """The model that a user connected for sample pictures.

    Attributes:
        node: id of the option node that it is connected to.
    """

    model: ModelPatcher
    node: str

    def check_family(self, trained: ModelPatcher) -> None:
        """Raise ModelError if the model is of another family than the trained one."""
        names = [_family(model) for model in (self.model, trained)]
        if names[0] != names[1]:
            raise ModelError(
                f"The model of Graft Preview Options is {names[0]}, and the trained model is {names[1]}.",
                f"Connect a model that {names[1]} adapters fit, or disconnect it.",
                "options",
            )


def _family(model: ModelPatcher) -> str:
    name = families.family_name(model)
    return type(model.model.model_config).__name__ if name == GENERAL.name else name


class ComfyPreviewModel:
    """A MODEL of the graph that draws sample pictures with the trained adapter. ComfyUI loads it only meanwhile.

    Args:
        denoiser: the trained model, which shares the device.
        clip, vae: those of the training.
        strength: of the adapter, on the model and on the text encoder.
    """

    def __init__(self, choice: PreviewChoice, denoiser: ComfyDenoiser, clip: CLIP, vae: VAE, strength: float):
        self.node = choice.node
        self._model = choice.model
        self._denoiser = denoiser
        self._vae = vae
        self._strength = strength
        # The training's own ComfyText would read prompts through its private tree.
        self._text = ComfyText(clip)

    def check(self, adapter: Mapping[str, torch.Tensor]) -> None:
        """Raise ModelError if the adapter does not fit the model."""
        try:
            apply_adapter(self._model, self._text.clip, adapter, 1.0, 1.0)
        except ModelError as error:
            raise ModelError(
                f"The adapter does not fit the model of Graft Preview Options. {error.message}",
                "Connect a model of the same family and size as the trained one, or disconnect it.",
                "options",
            ) from error

    def draw(
        self,
        requests: Sequence[PictureRequest],
        export: Callable[[], tuple[Mapping[str, torch.Tensor] | None, Embedding | None]],
        factor: float = 1.0,
    ) -> list[Image.Image | list[Image.Image]]:
        """Return a picture for each request, drawn with the exported adapter and embedding applied."""
        size = self._model.model_size() - self._model.loaded_size() + minimum_inference_memory()
        with self._denoiser.sharing_device(int(size)), compat.training_flag(False):
            model, text = self._applied(*export(), self._strength * factor)
            return PromptSampler(model, text, self._vae).draw(requests)

    def _applied(
        self, adapter: Mapping[str, torch.Tensor] | None, embedding: Embedding | None, strength: float
    ) -> tuple[ModelPatcher, ComfyText]:
        model, text = self._model, self._text
        clip = text.clip
        if adapter is not None and strength:
            model, clip = apply_adapter(model, clip, adapter, strength, strength)
        if embedding is not None:
            clip = apply_embedding(clip, embedding)
        return model, text if clip is text.clip else ComfyText(clip)
