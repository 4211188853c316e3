"""Nodes that build datasets of images and captions and show them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from comfy_api.latest import io, ui

from ..trainers.data import arrays, examples, scan
from ..trainers.data.source_images import WORSE_FOLDER
from ..trainers.errors import DatasetError, SettingsError
from ..trainers.video import PIECES
from . import inputs
from .checks import checked
from .host import dataset_folders, paths
from .schema import CATEGORY, Dataset, LossMap, advanced, describe, named

if TYPE_CHECKING:
    import numpy as np

_CATEGORY = f"{CATEGORY}/dataset"


def _control_folder_input(name: str, ordinal: str) -> io.String.Input:
    return advanced(
        inputs.text(
            name,
            f"For models that take several source pictures: the folder of the {ordinal} source pictures, like "
            "control_folder. A picture may lack one.",
            optional=True,
        )
    )


def _mask_folder(choice: str) -> str:
    """Return the absolute path of the mask folder, empty if none is set. Raises DatasetError as `dataset_path` does."""
    return dataset_folders.dataset_path(choice, "mask_folder") if not isinstance(choice, str) or choice.strip() else ""


class GraftLoadDataset(io.ComfyNode):
    """Node that loads a folder of images with captions beside them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        choices = dataset_folders.dataset_choices()
        return describe(
            node_id="GraftLoadDataset",
            display_name="Graft Load Dataset",
            words="Images, Captions",
            aliases=["training images", "image folder", "captions", "load folder"],
            category=_CATEGORY,
            description="Loads a folder of pictures; name.txt beside name.png holds its caption.",
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=choices,
                    default=choices[0] if choices else None,
                    tooltip="A folder below ComfyUI's input folder, below a 'datasets' entry of "
                    "extra_model_paths.yaml, or below a folder that ComfyUI's settings allow.",
                ),
                inputs.trigger(),
                inputs.dataset_resolution(),
                io.Int.Input(
                    "repeats", default=1, min=1, max=10000, tooltip="Number of times that an epoch visits each picture."
                ),
                *inputs.augmentation_inputs(),
                inputs.choice(
                    "masks",
                    scan.MASKS,
                    "auto: mask files (name-masklabel.png or masks/name.png), if there are any. alpha: these, "
                    "or else transparency. off: none.",
                    optional=True,
                ),
                advanced(
                    inputs.text(
                        "mask_folder",
                        "Folder of masks that are named like their pictures. Empty: the folder 'masks' inside "
                        "the dataset's folder.",
                        optional=True,
                    )
                ),
                advanced(
                    inputs.text(
                        "validation_folder",
                        "A folder inside the dataset's folder. Its pictures are not trained on: they measure "
                        "the training.",
                        optional=True,
                    )
                ),
                inputs.text(
                    "control_folder",
                    "For models that edit pictures: the folder of source pictures, inside the dataset's "
                    "folder or elsewhere. Each has the name of its result picture.",
                    optional=True,
                ),
                _control_folder_input("control_folder_2", "second"),
                _control_folder_input("control_folder_3", "third"),
                advanced(
                    io.Boolean.Input(
                        "sources_optional",
                        default=False,
                        optional=True,
                        tooltip="Train on pictures without a source picture too. Off: Graft skips them.",
                    )
                ),
                advanced(
                    inputs.text(
                        "worse_folder",
                        "For Graft Train Preference: the folder of worse pictures, inside the dataset's folder "
                        "or elsewhere. Each has the name of its better picture.",
                        optional=True,
                    )
                ),
                io.Int.Input(
                    "frames",
                    default=0,
                    min=0,
                    max=10000,
                    optional=True,
                    tooltip="For video models: frames of a clip, rounded down to what the VAE takes. 0: stills alone.",
                ),
                io.Float.Input(
                    "frame_rate",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.001,
                    optional=True,
                    tooltip="Frames per second that the model was made for. 0: all frames of each file.",
                ),
                inputs.choice(
                    "clips",
                    PIECES,
                    "first: the first frames. uniform: four clips at even distances. random: four random ones "
                    "take turns. whole: all frames, in clips one after another.",
                    optional=True,
                ),
            ],
            outputs=[Dataset.Output("dataset", display_name="dataset")],
        )

    validate_inputs = checked(
        folder=dataset_folders.dataset_path,
        trigger=None,
        **inputs.AUGMENTATION_RULES,
        masks=None,
        mask_folder=_mask_folder,
        validation_folder=None,
        control_folder=None,
        control_folder_2=None,
        control_folder_3=None,
        worse_folder=None,
        frame_rate=None,
        clips=None,
    )

    @classmethod
    def fingerprint_inputs(
        cls,
        folder,
        mask_folder="",
        control_folder="",
        control_folder_2="",
        control_folder_3="",
        worse_folder="",
        **others,
    ) -> str | float:
        """Return a value that changes with any file in the folders. A folder from a link is not known yet."""
        controls = control_folder, control_folder_2, control_folder_3
        if not all(isinstance(name, str) for name in (folder, mask_folder, *controls, worse_folder)):
            return float("nan")
        worse = dataset_folders.control_path(folder, worse_folder, WORSE_FOLDER)
        paired = *dataset_folders.control_paths(folder, controls), worse
        return scan.folder_fingerprint(dataset_folders.dataset_path(folder), _mask_folder(mask_folder), *paired)

    @classmethod
    def execute(
        cls,
        folder,
        trigger,
        resolution,
        repeats,
        masks="auto",
        mask_folder="",
        validation_folder="",
        control_folder="",
        control_folder_2="",
        control_folder_3="",
        sources_optional=False,
        worse_folder="",
        frames=0,
        frame_rate=0.0,
        clips=PIECES[0],
        **varying,
    ) -> io.NodeOutput:
        from .host.server.progress import counter

        with named(cls):
            controls = control_folder, control_folder_2, control_folder_3
            control, *more_controls = dataset_folders.control_paths(folder, controls)
            reading = scan.ScanOptions(
                varying.get("lines_are_variants", False),
                masks,
                _mask_folder(mask_folder),
                validation_folder,
                control,
                tuple(more_controls),
                sources_optional,
                dataset_folders.control_path(folder, worse_folder, WORSE_FOLDER),
                frames=frames,
                frame_rate=frame_rate,
                pieces=clips,
            )
            dataset = scan.scan_folder(
                dataset_folders.dataset_path(folder),
                trigger,
                resolution,
                repeats,
                inputs.augmentation(**varying),
                reading,
                paths.index_folder(),
                counter(cls.hidden.unique_id),
            )
            return io.NodeOutput(dataset)


class GraftDatasetFromImages(io.ComfyNode):
    """Node that builds a dataset from linked images and captions."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftDatasetFromImages",
            display_name="Graft Dataset from Images",
            words="Captions",
            aliases=["training images", "captions", "batch to dataset"],
            category=_CATEGORY,
            description="Makes a dataset from pictures in the graph, with one caption for all or one for each.",
            is_input_list=True,
            inputs=[
                inputs.images(),
                inputs.captions(),
                inputs.trigger(),
                inputs.dataset_resolution(),
                inputs.masks(),
                *inputs.augmentation_inputs(),
                io.Image.Input(
                    "control_images",
                    optional=True,
                    tooltip="For models that edit pictures: the source pictures, one for each picture in images.",
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="Trains in place of captions, as ComfyUI's sampler would use it: one for all pictures, or "
                    "a list with one for each.",
                ),
                io.Image.Input(
                    "worse_images",
                    optional=True,
                    tooltip="For Graft Train Preference: the worse pictures, one for each picture in images.",
                ),
                io.Int.Input(
                    "clips",
                    default=0,
                    min=0,
                    max=10000,
                    optional=True,
                    tooltip="For video models: splits each batch into so many clips of equal length. 0: pictures.",
                ),
            ],
            outputs=[Dataset.Output("dataset", display_name="dataset")],
        )

    validate_inputs = checked(captions=None, trigger=None, **inputs.AUGMENTATION_RULES)

    @classmethod
    def execute(
        cls,
        images,
        captions,
        trigger,
        resolution,
        masks=None,
        control_images=None,
        conditioning=None,
        worse_images=None,
        clips=(0,),
        **varying,
    ) -> io.NodeOutput:
        from .host.model.encoded_prompts import encoded_prompts

        arrived = {"images": images, "masks": masks, "control_images": control_images, "conditioning": conditioning}
        with named(cls, **arrived, worse_images=worse_images):
            pictures = _pictures(images, clips[0])
            weights = list(eight_bits(masks or [], "masks"))
            sources = list(eight_bits(control_images or [], "control_images"))
            worse = list(eight_bits(worse_images or [], "worse_images"))
            prompts = encoded_prompts(conditioning or [])
            ways = {name: values[0] for name, values in varying.items()}
            lines = ways.get("lines_are_variants", False)
            augmentation = inputs.augmentation(**ways)
            return io.NodeOutput(
                arrays.from_arrays(
                    pictures, captions, trigger[0], resolution[0], weights, augmentation, lines, sources, prompts, worse
                )
            )


def _pictures(batches, clips: int) -> list:
    """Return the images of batches as pictures, or each batch split into so many clips if `clips` is not 0."""
    if not clips:
        return list(eight_bits(batches, "images"))
    return [clip for batch in batches for clip in arrays.split_clips(list(eight_bits([batch], "images")), clips)]


def eight_bits(batches, input: str, channels: int = 3) -> Iterator[np.ndarray]:
    """Convert the images of float batches in 0..1, or single masks, to uint8 arrays, one by one.

    Args:
        input: name of the node's input, for the error.
        channels: 3 drops an alpha channel, 4 leaves it.

    Raises:
        DatasetError: a number is not finite.
    """
    for batch in batches:
        for values in batch if batch.ndim > 2 else batch[None]:
            if not values.isfinite().all():
                raise DatasetError(
                    "A picture or mask contains numbers that are not finite.",
                    "Check the node that made it. A VAE in half precision can give such pictures.",
                    input,
                )
            array = (values[..., :channels] if values.ndim == 3 else values).clamp(0, 1) * 255.0
            yield array.round().byte().cpu().numpy()


class GraftCombineDatasets(io.ComfyNode):
    """Node that joins two datasets."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftCombineDatasets",
            display_name="Graft Combine Datasets",
            words="Merge",
            aliases=["merge datasets", "concatenate datasets", "join datasets"],
            category=_CATEGORY,
            description="Joins two datasets; each picture keeps its caption, trigger and repeats.",
            inputs=[
                Dataset.Input("dataset_a", tooltip="The first dataset."),
                Dataset.Input("dataset_b", tooltip="The second dataset."),
            ],
            outputs=[Dataset.Output("dataset", display_name="dataset")],
        )

    @classmethod
    def execute(cls, dataset_a, dataset_b) -> io.NodeOutput:
        with named(cls, dataset_a=dataset_a, dataset_b=dataset_b):
            return io.NodeOutput(examples.combine(dataset_a, dataset_b))


class GraftInspectDataset(io.ComfyNode):
    """Node that shows a dataset as training will use it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftInspectDataset",
            display_name="Graft Inspect Dataset",
            words="Preview",
            aliases=["preview dataset", "check dataset", "contact sheet", "buckets"],
            category=_CATEGORY,
            description="Shows the cropped pictures with their captions, and reports problems. Returns the dataset "
            "unchanged: a trainer connected to it waits for the report.",
            inputs=[
                Dataset.Input("dataset", tooltip="The dataset to inspect."),
                io.Model.Input(
                    "model", optional=True, tooltip="Gives the resolution and the step between picture shapes."
                ),
                io.Clip.Input("clip", optional=True, tooltip="Counts the captions' tokens."),
                io.Vae.Input("vae", optional=True, tooltip="Gives the size of a latent."),
                LossMap.Input(
                    "loss",
                    optional=True,
                    tooltip="From a training node: shows which pictures it found hard, and which it has memorized.",
                ),
                inputs.text(
                    "run",
                    "The same for a run on disk: the name of its folder in output/graft. Empty: none.",
                    optional=True,
                ),
            ],
            outputs=[
                io.Image.Output("image", display_name="image"),
                io.String.Output("report", display_name="report"),
                Dataset.Output("dataset_out", display_name="dataset"),
            ],
            is_output_node=True,
        )

    validate_inputs = checked(run=lambda name: not name.strip() or paths.named_run(name))

    @classmethod
    def fingerprint_inputs(cls, run="", **others) -> str | float:
        """Return a value that changes with each save of the named run. A name from a link is not known yet."""
        if not isinstance(run, str):
            return float("nan")
        return os.stat(paths.named_run(run).folder).st_mtime_ns if run.strip() else ""

    @classmethod
    def execute(cls, dataset, model=None, clip=None, vae=None, loss=None, run="") -> io.NodeOutput:
        import torch

        from ..trainers.inspection import contact_sheet
        from ..trainers.inspection import report as inspect
        from ..trainers.preprocessing.cache import cache_size
        from .host.actions import train
        from .host.server.progress import counter

        with named(cls, dataset=dataset, model=model, clip=clip, vae=vae, loss=loss):
            findings = inspect.inspect(
                dataset,
                train.geometries(dataset, model, vae),
                train.token_counter(clip),
                paths.index_folder(),
                counter(cls.hidden.unique_id),
                _marked(loss, run),
                train.snapping(vae),
            )
            picture = contact_sheet.contact_sheet(findings)
            report = inspect.report(findings, cache_size(paths.folders().cache))
            warnings = inspect.warnings(findings, train.family_name(model))
            image = torch.from_numpy(picture)[None]
            ui_output = {**ui.PreviewImage(image, cls=cls).as_dict(), "text": (report,), "warnings": warnings}
            return io.NodeOutput(image, report, dataset, ui=ui_output)


def _marked(loss: dict | None, run: str) -> dict[str, tuple[float, str]]:
    """Return loss and mark of each picture by name, from a loss map or else from a named run; empty without both.

    Raises:
        GraftError: there is no such run, or no loss by picture. The error names the input.
    """
    from ..trainers.runs.loss_by_picture import BY_PICTURE, LossByPicture
    from ..trainers.runs.records import read_loss_by_picture

    if loss is not None:
        with contextlib.suppress(ValueError):
            losses = LossByPicture.of_json(loss.get(BY_PICTURE))
            if losses.rows:
                return losses.marked()
        raise SettingsError(
            "The connected loss has no loss by picture: its run finished before Graft kept it, or another node made "
            "it.",
            "Train that run for more steps.",
            "loss",
        )
    return read_loss_by_picture(paths.named_run(run)).marked() if run.strip() else {}


NODES = [GraftLoadDataset, GraftDatasetFromImages, GraftCombineDatasets, GraftInspectDataset]
