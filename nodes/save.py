"""Nodes that write pictures and captions of the graph into dataset folders, and give a dataset's pictures to it."""

from dataclasses import replace
from itertools import repeat

from comfy_api.latest import io

from ..trainers.curation import captioning, save_dataset
from ..trainers.data import arrays, scan
from . import inputs
from .checks import checked
from .dataset import eight_bits
from .host import dataset_folders, paths
from .schema import CATEGORY, Dataset, describe, execution_id, named

_CATEGORY = f"{CATEGORY}/dataset"


class GraftSaveDataset(io.ComfyNode):
    """Node that writes linked images, captions and masks into a folder below the input folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftSaveDataset",
            display_name="Graft Save Dataset",
            words="Captions, Masks",
            aliases=["export dataset", "save training images", "write captions", "save masks"],
            category=_CATEGORY,
            description="Writes pictures, captions and masks of the graph into a folder below input, and loads it as "
            "a dataset.",
            is_input_list=True,
            is_output_node=True,
            inputs=[
                inputs.images(),
                inputs.captions(),
                inputs.text("folder", "Folder below input, or subfolders a/b.", default="my_dataset"),
                inputs.choice(
                    "existing",
                    save_dataset.EXISTING,
                    "For pictures whose number the folder holds. keep: leave its files. replace: write them "
                    "again. add: give new pictures the next numbers.",
                ),
                inputs.trigger(),
                inputs.dataset_resolution(),
                inputs.masks(),
            ],
            outputs=[Dataset.Output("dataset", display_name="dataset")],
        )

    validate_inputs = checked(captions=None, folder=dataset_folders.new_dataset_path, existing=None, trigger=None)

    @classmethod
    def fingerprint_inputs(cls, folder, **others) -> str | float:
        """Return a value that changes with any file in the folder. A folder from a link is not known yet."""
        if not isinstance(folder[0], str):
            return float("nan")
        return scan.folder_fingerprint(dataset_folders.new_dataset_path(folder[0]))

    @classmethod
    def execute(cls, images, captions, folder, existing, trigger, resolution, masks=None) -> io.NodeOutput:
        from .host.server.progress import counter

        with named(cls, images=images, masks=masks):
            path = dataset_folders.new_dataset_path(folder[0])
            count = _count(images)
            texts = captioning.read_captions(captions, count)
            arrays.check_counts(count, len(texts), _count(masks or []))
            saved = save_dataset.save_pictures(
                path,
                eight_bits(images, "images", channels=4),
                ["\n".join(text) for text in (texts if len(texts) > 1 else texts * count)],
                _each(masks, count),
                existing[0],
                counter(execution_id(cls)),
            )
            dataset = scan.scan_folder(path, trigger[0], resolution[0], 1, index_folder=paths.index_folder())
            report = f"{path}: {saved.written} written, {saved.kept} kept."
            warnings = saved.warnings()
            dataset = replace(dataset, warnings=(*dataset.warnings, *warnings))
            return io.NodeOutput(dataset, ui={"text": ("\n".join([report, *warnings]),)})


def _count(batches) -> int:
    return sum(len(batch) if batch.ndim > 2 else 1 for batch in batches)


def _each(masks, count: int):
    arrived = eight_bits(masks or [], "masks")
    return arrived if _count(masks or []) > 1 else repeat(next(arrived, None), count)


class GraftImagesFromDataset(io.ComfyNode):
    """Node that gives a dataset's pictures and captions to the graph."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftImagesFromDataset",
            display_name="Graft Images from Dataset",
            words="Captions",
            aliases=["caption a folder", "load images", "dataset to images"],
            category=_CATEGORY,
            description="Gives a dataset's pictures and captions to other nodes, such as a captioner.",
            inputs=[
                Dataset.Input("dataset", tooltip="From Graft Load Dataset."),
                io.Boolean.Input(
                    "only_without_caption", default=True, tooltip="Leaves out pictures that have a caption."
                ),
                io.Int.Input(
                    "most",
                    default=0,
                    min=0,
                    max=100_000,
                    tooltip="Largest number of pictures in one go; they need memory. 0 means all.",
                ),
            ],
            outputs=[
                io.Image.Output("images", display_name="images", is_output_list=True),
                io.String.Output("captions", display_name="captions", is_output_list=True),
                Dataset.Output("dataset_out", display_name="dataset"),
            ],
        )

    @classmethod
    def execute(cls, dataset, only_without_caption, most) -> io.NodeOutput:
        import torch

        from .host.server.progress import counter

        with named(cls, dataset=dataset):
            pictures, chosen = captioning.decode_pictures(
                dataset, only_without_caption, most, counter(execution_id(cls))
            )
            images = [torch.tensor(picture)[None].float() / 255.0 for picture in pictures]
            captions = ["\n".join(example.captions) for example in chosen.examples]
            return io.NodeOutput(images, captions, chosen)


class GraftSaveCaptions(io.ComfyNode):
    """Node that writes captions beside the pictures of a dataset's folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftSaveCaptions",
            display_name="Graft Save Captions",
            words="Tags",
            aliases=["write captions", "caption files", "save tags", "txt"],
            category=_CATEGORY,
            description="Writes captions as text files beside a dataset's pictures; the first one that it replaces "
            "stays as name.txt.bak.",
            is_input_list=True,
            is_output_node=True,
            inputs=[
                Dataset.Input("dataset", tooltip="From Graft Images from Dataset."),
                io.String.Input(
                    "captions",
                    default="",
                    force_input=True,
                    tooltip="One caption for each picture, in the dataset's order.",
                ),
            ],
            outputs=[Dataset.Output("dataset_out", display_name="dataset")],
        )

    validate_inputs = checked(captions=None)

    @classmethod
    def execute(cls, dataset, captions) -> io.NodeOutput:
        from .host.server.progress import counter

        with named(cls, dataset=dataset):
            captioned, written = captioning.save_captions(dataset[0], captions, counter(execution_id(cls)))
            report = f"{written} of {len(captioned.examples)} captions written."
            return io.NodeOutput(captioned, ui={"text": (report,)})


NODES = [GraftSaveDataset, GraftImagesFromDataset, GraftSaveCaptions]
