"""Nodes that bring pictures and captions together and show them."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..trainers.data import examples, scan
from .host import paths
from .schema import CATEGORY, Dataset, named, refusal

_CATEGORY = f"{CATEGORY}/dataset"


def _resolution() -> io.Int.Input:
    return io.Int.Input(
        "resolution",
        default=0,
        min=0,
        max=8192,
        step=8,
        tooltip="Side in pixels of the square whose area pictures are scaled to. 0: what the model was made for.",
    )


def _trigger() -> io.String.Input:
    return io.String.Input(
        "trigger",
        default="",
        tooltip="The word that will call up what is learnt. Put in front of every caption that does not hold it.",
    )


class GraftLoadDataset(io.ComfyNode):
    """A folder of pictures with captions beside them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        choices = paths.dataset_choices()
        return io.Schema(
            node_id="GraftLoadDataset",
            display_name="Graft Load Dataset",
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
            ],
            outputs=[Dataset.Output("dataset", display_name="dataset")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, folder) -> bool | str:
        return refusal(cls, "folder", folder, paths.dataset_path)

    @classmethod
    def fingerprint_inputs(cls, folder, trigger, resolution, repeats) -> str | float:
        """Changes with any picture or caption in the folder; a folder that comes over a wire is not known yet."""
        if not isinstance(folder, str):
            return float("nan")
        return scan.folder_fingerprint(paths.dataset_path(folder))

    @classmethod
    def execute(cls, folder, trigger, resolution, repeats) -> io.NodeOutput:
        with named(cls):
            return io.NodeOutput(scan.scan_folder(paths.dataset_path(folder), trigger, resolution, repeats))


class GraftDatasetFromImages(io.ComfyNode):
    """Pictures and captions that come over wires."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GraftDatasetFromImages",
            display_name="Graft Dataset from Images",
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
            ],
            outputs=[Dataset.Output("dataset", display_name="dataset")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, images, captions, trigger, resolution, masks=None) -> io.NodeOutput:
        with named(cls):
            pictures = [_eight_bits(picture) for batch in images for picture in batch]
            weights = [_eight_bits(mask) for batch in masks or [] for mask in _batch(batch)]
            return io.NodeOutput(scan.from_arrays(pictures, captions, trigger[0], resolution[0], weights))


def _eight_bits(values):
    """A float tensor in 0..1 as a uint8 array; alpha is dropped."""
    array = (values[..., :3] if values.ndim == 3 else values).clamp(0, 1) * 255.0
    return array.round().byte().cpu().numpy()


def _batch(mask):
    return mask if mask.ndim == 3 else mask[None]


class GraftCombineDatasets(io.ComfyNode):
    """Two datasets as one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GraftCombineDatasets",
            display_name="Graft Combine Datasets",
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
        with named(cls):
            return io.NodeOutput(examples.combine(dataset_a, dataset_b))


class GraftInspectDataset(io.ComfyNode):
    """What training will see."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GraftInspectDataset",
            display_name="Graft Inspect Dataset",
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

        from ..trainers.data import sheet
        from .host import training

        with named(cls):
            geometry = training.geometry(dataset, model, vae)
            count = training.token_counter(clip)
            picture = sheet.contact_sheet(dataset, geometry)
            report = sheet.report(dataset, geometry, count)
            image = torch.from_numpy(picture)[None]
            return io.NodeOutput(image, report, ui={**ui.PreviewImage(image, cls=cls).as_dict(), "text": (report,)})


NODES = [GraftLoadDataset, GraftDatasetFromImages, GraftCombineDatasets, GraftInspectDataset]
