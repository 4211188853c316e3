"""Nodes that bring pictures and captions together and show them."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..trainers.data import examples, scan
from ..trainers.errors import DatasetError
from . import inputs
from .checks import checked
from .host import paths
from .schema import CATEGORY, Dataset, advanced, describe, named

_CATEGORY = f"{CATEGORY}/dataset"


def _resolution() -> io.Int.Input:
    return inputs.resolution(
        "Side in pixels of the square whose area pictures are scaled to. 0: what the model was made for."
    )


def _trigger() -> io.String.Input:
    return io.String.Input(
        "trigger",
        default="",
        tooltip="The word that will call up what is learnt. Put in front of every caption that does not hold it.",
    )


def _varying() -> list:
    """How pictures and captions are varied: the same inputs on every node that makes a dataset, in `_handling`'s order.

    All are optional and vary nothing until they are set.
    """
    return [
        io.Boolean.Input(
            "shuffle_tags",
            default=False,
            optional=True,
            tooltip="Puts the comma-separated parts of a caption into another order at each showing.",
        ),
        io.Int.Input(
            "keep_tokens",
            default=0,
            min=0,
            max=1000,
            optional=True,
            tooltip="So many parts at a caption's beginning are neither moved nor dropped, besides the trigger.",
        ),
        io.Float.Input(
            "tag_dropout",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip="Chance of each comma-separated part to be left out at a showing. Typical: 0.1.",
        ),
        io.Float.Input(
            "caption_dropout",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip="Chance of a showing without any caption, trigger included. Typical: 0.05 to 0.1.",
        ),
        advanced(
            io.Boolean.Input(
                "wildcards",
                default=False,
                optional=True,
                tooltip="Of words in braces with bars between them one is chosen. Off: braces are text.",
            )
        ),
        advanced(
            io.Boolean.Input(
                "lines_are_variants",
                default=False,
                optional=True,
                tooltip="Each line of a caption is a caption of its own, shown in turn. Off: it is one caption.",
            )
        ),
        advanced(
            io.Int.Input(
                "caption_variants",
                default=0,
                min=0,
                max=10000,
                optional=True,
                tooltip="How many versions of a varying caption are encoded. 0: 4 to 64, fewer for more pictures.",
            )
        ),
        io.Boolean.Input(
            "flip",
            default=False,
            optional=True,
            tooltip="Mirrors half of the showings. Not for faces, text, or anything that has a left and a right.",
        ),
        advanced(
            io.Boolean.Input(
                "upscale",
                default=False,
                optional=True,
                tooltip="Enlarges small pictures to the resolution. Off: they are trained at their own size.",
            )
        ),
        advanced(
            io.String.Input(
                "more_resolutions",
                default="",
                optional=True,
                tooltip="Further resolutions, such as 512, 768: each picture is trained at each that it reaches.",
            )
        ),
        advanced(
            io.Float.Input(
                "mask_minimum",
                default=0.0,
                min=0.0,
                max=1.0,
                step=0.01,
                optional=True,
                tooltip="Least weight in the loss where a mask is black. Typical: 0 to 0.1.",
            )
        ),
    ]


# What is checked of those inputs before anything runs.
_VARYING = {
    "tag_dropout": None,
    "caption_dropout": None,
    "more_resolutions": examples.read_resolutions,
    "mask_minimum": None,
}


def _mask_folder(choice: str) -> str:
    """The absolute path of a folder of masks, empty where none was chosen. Raises DatasetError as `dataset_path`."""
    return paths.dataset_path(choice, "mask_folder") if not isinstance(choice, str) or choice.strip() else ""


def _handling(
    shuffle_tags=False,
    keep_tokens=0,
    tag_dropout=0.0,
    caption_dropout=0.0,
    wildcards=False,
    lines_are_variants=False,
    caption_variants=0,
    flip=False,
    upscale=False,
    more_resolutions="",
    mask_minimum=0.0,
) -> examples.Handling:
    """`lines_are_variants` is settled when captions are read; it is taken so that both can be given the same inputs."""
    return examples.Handling(
        shuffle_tags=shuffle_tags,
        keep_tokens=keep_tokens,
        tag_dropout=tag_dropout,
        caption_dropout=caption_dropout,
        wildcards=wildcards,
        caption_variants=caption_variants,
        flip=flip,
        upscale=upscale,
        resolutions=examples.read_resolutions(more_resolutions),
        mask_minimum=mask_minimum,
    )


class GraftLoadDataset(io.ComfyNode):
    """A folder of pictures with captions beside them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        choices = paths.dataset_choices()
        return describe(
            node_id="GraftLoadDataset",
            display_name="Graft Load Dataset",
            aliases=["training images", "image folder", "captions", "load folder"],
            category=_CATEGORY,
            description="Loads a folder of pictures; name.txt beside name.png holds its caption.",
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=choices,
                    default=choices[0] if choices else None,
                    tooltip="A folder below ComfyUI's input folder, or below a 'datasets' folder of the host.",
                ),
                _trigger(),
                _resolution(),
                io.Int.Input("repeats", default=1, min=1, max=10000, tooltip="How often an epoch shows each picture."),
                *_varying(),
                io.Combo.Input(
                    "masks",
                    options=list(scan.MASKS),
                    default=scan.MASKS[0],
                    optional=True,
                    tooltip="auto: name-masklabel.png or masks/name.png where there is one; alpha: else transparency; "
                    "off: none.",
                ),
                advanced(
                    io.String.Input(
                        "mask_folder",
                        default="",
                        optional=True,
                        tooltip="Masks by their pictures' names, in a folder of its own. Empty: 'masks' inside.",
                    )
                ),
                advanced(
                    io.String.Input(
                        "validation_folder",
                        default="",
                        optional=True,
                        tooltip="A folder inside whose pictures are not trained on but measure how well it goes.",
                    )
                ),
                io.String.Input(
                    "control_folder",
                    default="",
                    optional=True,
                    tooltip="For models that edit pictures: a folder, inside or of its own, of the pictures before the "
                    "edit, each under the name of the one it becomes.",
                ),
            ],
            outputs=[Dataset.Output("dataset", display_name="dataset")],
            hidden=[io.Hidden.unique_id],
        )

    validate_inputs = checked(
        folder=paths.dataset_path,
        trigger=None,
        **_VARYING,
        masks=None,
        mask_folder=_mask_folder,
        validation_folder=None,
        control_folder=None,
    )

    @classmethod
    def fingerprint_inputs(cls, folder, mask_folder="", control_folder="", **others) -> str | float:
        """Changes with any file in the folders; a folder that comes over a wire is not known yet."""
        if not all(isinstance(name, str) for name in (folder, mask_folder, control_folder)):
            return float("nan")
        controls = paths.control_path(folder, control_folder)
        return scan.folder_fingerprint(paths.dataset_path(folder), _mask_folder(mask_folder), controls)

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
        **varying,
    ) -> io.NodeOutput:
        from .host.progress import counter

        with named(cls):
            reading = scan.Reading(
                varying.get("lines_are_variants", False),
                masks,
                _mask_folder(mask_folder),
                validation_folder,
                paths.control_path(folder, control_folder),
            )
            dataset = scan.scan_folder(
                paths.dataset_path(folder),
                trigger,
                resolution,
                repeats,
                _handling(**varying),
                reading,
                paths.index_folder(),
                counter(cls.hidden.unique_id),
            )
            return io.NodeOutput(dataset)


class GraftDatasetFromImages(io.ComfyNode):
    """Pictures and captions that come over wires."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftDatasetFromImages",
            display_name="Graft Dataset from Images",
            aliases=["training images", "captions", "batch to dataset"],
            category=_CATEGORY,
            description="Makes a dataset of pictures in the graph, with one caption for all or one for each.",
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="Pictures, as a batch or a list."),
                io.String.Input(
                    "captions",
                    multiline=True,
                    default="",
                    tooltip="One caption for all pictures, or a list with one for each.",
                ),
                _trigger(),
                _resolution(),
                io.Mask.Input("masks", optional=True, tooltip="Where it counts: white is learnt, black is not."),
                *_varying(),
                io.Image.Input(
                    "control_images",
                    optional=True,
                    tooltip="For models that edit pictures: the pictures before the edit, one for each.",
                ),
            ],
            outputs=[Dataset.Output("dataset", display_name="dataset")],
            hidden=[io.Hidden.unique_id],
        )

    validate_inputs = checked(captions=None, trigger=None, **_VARYING)

    @classmethod
    def execute(
        cls, images, captions, trigger, resolution, masks=None, control_images=None, **varying
    ) -> io.NodeOutput:
        with named(cls, images=images, masks=masks, control_images=control_images):
            pictures = [_eight_bits(picture) for batch in images for picture in batch]
            weights = [_eight_bits(mask) for batch in masks or [] for mask in _batch(batch)]
            controls = [_eight_bits(picture) for batch in control_images or [] for picture in batch]
            ways = {name: values[0] for name, values in varying.items()}
            lines = ways.get("lines_are_variants", False)
            handling = _handling(**ways)
            return io.NodeOutput(
                scan.from_arrays(pictures, captions, trigger[0], resolution[0], weights, handling, lines, controls)
            )


def _eight_bits(values):
    """A float tensor in 0..1 as a uint8 array; alpha is dropped. Raises DatasetError where a number is none."""
    if not values.isfinite().all():
        raise DatasetError(
            "A picture or mask holds numbers that are not finite.",
            "Look at what made it; a VAE in half precision gives such pictures.",
            "images" if values.ndim == 3 else "masks",
        )
    array = (values[..., :3] if values.ndim == 3 else values).clamp(0, 1) * 255.0
    return array.round().byte().cpu().numpy()


def _batch(mask):
    return mask if mask.ndim == 3 else mask[None]


class GraftCombineDatasets(io.ComfyNode):
    """Two datasets as one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftCombineDatasets",
            display_name="Graft Combine Datasets",
            aliases=["merge datasets", "concatenate datasets", "join datasets"],
            category=_CATEGORY,
            description="Joins two datasets; each picture keeps its caption, trigger and repeats.",
            inputs=[
                Dataset.Input("dataset_a", tooltip="The first dataset."),
                Dataset.Input("dataset_b", tooltip="The second dataset."),
            ],
            outputs=[Dataset.Output("dataset", display_name="dataset")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, dataset_a, dataset_b) -> io.NodeOutput:
        with named(cls, dataset_a=dataset_a, dataset_b=dataset_b):
            return io.NodeOutput(examples.combine(dataset_a, dataset_b))


class GraftInspectDataset(io.ComfyNode):
    """What training will see."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftInspectDataset",
            display_name="Graft Inspect Dataset",
            aliases=["preview dataset", "check dataset", "contact sheet", "buckets"],
            category=_CATEGORY,
            description="Shows the pictures as they will be cropped, with captions, and reports what to look after.",
            inputs=[
                Dataset.Input("dataset", tooltip="The dataset to look at."),
                io.Model.Input("model", optional=True, tooltip="Gives resolution and bucket step."),
                io.Clip.Input("clip", optional=True, tooltip="Counts the captions' tokens."),
                io.Vae.Input("vae", optional=True, tooltip="Gives the size of a latent."),
            ],
            outputs=[
                io.Image.Output("image", display_name="image"),
                io.String.Output("report", display_name="report"),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, dataset, model=None, clip=None, vae=None) -> io.NodeOutput:
        import torch

        from ..trainers.data import inspect, sheet
        from ..trainers.data.cache import cache_size
        from .host import training
        from .host.progress import counter

        with named(cls, dataset=dataset, model=model, clip=clip, vae=vae):
            findings = inspect.inspect(
                dataset,
                training.geometries(dataset, model, vae),
                training.token_counter(clip),
                paths.index_folder(),
                counter(cls.hidden.unique_id),
            )
            picture = sheet.contact_sheet(findings)
            report = inspect.report(findings, cache_size(paths.folders().cache))
            image = torch.from_numpy(picture)[None]
            return io.NodeOutput(image, report, ui={**ui.PreviewImage(image, cls=cls).as_dict(), "text": (report,)})


NODES = [GraftLoadDataset, GraftDatasetFromImages, GraftCombineDatasets, GraftInspectDataset]
