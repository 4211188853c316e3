"""The node that imports the settings of other trainers."""

from comfy_api.latest import io

from ..trainers.engine.imports.settings import import_settings, recognize
from ..trainers.engine.resolve import Options as Chosen
from .checks import checked
from .option_fields import CATEGORY
from .schema import Options, describe, named, options_input


class GraftImportRecipe(io.ComfyNode):
    """Node that turns the settings of another trainer into options."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftImportRecipe",
            display_name="Graft Import Recipe",
            words="kohya",
            aliases=["sd-scripts", "onetrainer", "ai-toolkit", "config", "preset", "toml", "yaml", "json"],
            category=CATEGORY,
            description="Reads the settings of kohya, OneTrainer or ai-toolkit, and reports what Graft takes.",
            inputs=[
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    tooltip="The whole file: TOML or JSON of kohya, JSON of OneTrainer, YAML of ai-toolkit.",
                ),
                options_input(),
            ],
            outputs=[
                Options.Output("options_out", display_name="options"),
                io.String.Output("report", display_name="report"),
                io.Int.Output("steps", display_name="steps"),
                io.Float.Output("learning_rate", display_name="learning_rate"),
                io.Int.Output("rank", display_name="rank"),
                io.Int.Output("batch_size", display_name="batch_size"),
                io.Int.Output("seed", display_name="seed"),
            ],
        )

    validate_inputs = checked(text=lambda text: recognize(text) if text.strip() else None)

    @classmethod
    def execute(cls, text, options=None) -> io.NodeOutput:
        with named(cls, options=options):
            imported = import_settings(text)
            chosen = imported.added_to(options or Chosen())
            return io.NodeOutput(chosen, imported.report, *imported.widgets.values(), ui={"text": (imported.report,)})


NODES = [GraftImportRecipe]
