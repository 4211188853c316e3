"""Recipes from user settings: chained option nodes, and defaults for the options that the user leaves alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import SettingsError
from ..methods import METHODS, Method
from ..methods.textual_inversion import EMBEDDING_RATE
from ..objective.options import objective_of
from ..optimizers import OPTIMIZERS, default_learning_rate, finds_its_rate
from ..recipe.options import OPTIONS, RECIPE_OPTIONS, Basis
from ..recipe.presets import PRESETS
from ..recipe.recipe import EmbeddingSpec, Recipe, SliderSpec
from .validation import check_option, check_recipe

if TYPE_CHECKING:
    from ..families import Family


class Options(dict):
    """Options that the user has set, as {(node, input): value}. Option nodes chain them.

    Attributes:
        preview_model: the host's model for sample pictures, which no recipe holds; None to draw on the trained one.
    """

    preview_model: Any = None

    def adding(self, node: str, values: dict[str, Any]) -> Options:
        """Return these options with a node's set inputs on top. The node nearest the trainer wins.

        Raises:
            SettingsError: the node has no such input, or a value is out of range.
        """
        merged = Options(self)
        merged.preview_model = self.preview_model
        known = OPTIONS[node]
        for name, value in values.items():
            if name not in known:
                raise SettingsError(f"There is no {node} option '{name}'.", f"Known options: {', '.join(known)}.")
            if value != known[name].unset:
                check_option(node, name, value)
                merged[(known[name].node, name)] = value
        return merged

    def value(self, node: str, name: str, default: Any) -> Any:
        """Return the input's value if it is set, else the default."""
        return self.get((node, name), default)

    def values_of(self, node: str) -> dict[str, Any]:
        """Return the values of a node that are set, by input."""
        return {name: value for (other, name), value in self.items() if other == node}


@dataclass(frozen=True)
class RecipeInputs:
    """Values of a training node's own widgets and of its dataset.

    Attributes:
        learning_rate: 0 for the default of family, method and optimizer.
        rank: 0 for that of the adapter to start from; ignored if the method has no rank.
        resolution: 0 for the family's default.
        embedding_spec: the node's own embedding; None for the embedding of the pivotal options, if any.
        preference_beta: 0 for no preference.
        slider: the node's slider; None for none.
        ranks: `rank`, `alpha` and others of the adapter to start from (`ranks_of`); empty without one.
    """

    method: str
    steps: int
    learning_rate: float
    rank: int
    batch_size: int
    seed: int
    resolution: int
    trigger: str
    embedding_spec: EmbeddingSpec | None = None
    preference_beta: float = 0.0
    slider: SliderSpec | None = None
    ranks: Mapping[str, Any] = field(default_factory=dict)


# Default learning rate of a preference, as a factor on the method's usual one; 1e-5 for a LoRA, as in diffusers.
PREFERENCE_RATE = 0.1

# Fields of a recipe by those of an EmbeddingSpec.
_EMBEDDING = {
    "name": "embedding_name",
    "init_text": "embedding_init",
    "vectors": "embedding_vectors",
    "learning_rate": "embedding_learning_rate",
    "stop": "embedding_stop",
    "templates": "embedding_templates",
}


def resolve(options: Options, family: Family, inputs: RecipeInputs) -> Recipe:
    """Build the recipe from a training node's inputs and its options.

    Raises:
        SettingsError: a value is out of range, or two values contradict each other.
    """
    given, options = options, _with_preset(options)
    name = _method_name(options, inputs)
    # `check_recipe` refuses an unknown method and lists the known ones.
    method = METHODS.get(name, Method())
    _check_adapter_type(options, method)
    _check_text_encoder(options)
    fields = {
        **(_ranks_of_start(inputs, options) if method.ranked and not inputs.rank else {}),
        **_option_fields(options),
        **_embedding_fields(options, inputs.embedding_spec),
        **_input_fields(inputs),
        **({f"slider_{name}": value for name, value in vars(inputs.slider).items()} if inputs.slider else {}),
        "method": name,
        "rank": (inputs.rank or inputs.ranks["rank"]) if method.ranked else 0,
        "family": family.name,
        "objective": objective_of(options.values_of("objective")),
    }
    recipe = Recipe(**_with_defaults(fields, family, method, alone=inputs.embedding_spec is not None))
    try:
        check_recipe(recipe)
    except SettingsError as error:
        # The user may have left it unset, as the cure says.
        if not any(error.message.startswith(f"{input} is ") for _, input in options.keys() - given.keys()):
            raise
        cure = f"{error.cure} The preset {recipe.preset} has set it: choose another, or none."
        raise SettingsError(error.message, cure, error.input) from error
    return recipe


def _with_preset(options: Options) -> Options:
    filled = Options(PRESETS.get(options.value("adapter", "preset", ""), {}))
    filled.update(options)
    filled.preview_model = options.preview_model
    return filled


def describe_preset(recipe: Recipe) -> str:
    """Name a recipe's preset and the values of the recipe that are the preset's; empty without one."""
    values = []
    for (node, input), value in PRESETS.get(recipe.preset, {}).items():
        declared = OPTIONS[node][input]
        if getattr(recipe.objective if node == "objective" else recipe, declared.name) == declared.value_of(value):
            values.append(f"{input} {value}")
    return f"Preset {recipe.preset}: {', '.join(values) or 'nothing to fill'}" if recipe.preset else ""


def _ranks_of_start(inputs: RecipeInputs, options: Options) -> Mapping[str, Any]:
    if not inputs.ranks:
        raise SettingsError(
            "rank is 0, which stands for the rank of the adapter to start from, and there is no adapter with a rank.",
            "Set rank to at least 1, or connect an adapter.",
            "rank",
        )
    unused = () if options.value("adapter", "text_encoder", "") == "on" else ("text_encoder_rank",)
    return {name: RECIPE_OPTIONS[name].value_of(value) for name, value in inputs.ranks.items() if name not in unused}


def _method_name(options: Options, inputs: RecipeInputs) -> str:
    """Return the method's name. If the node trains an adapter, the adapter options choose its type."""
    return options.value("adapter", "type", inputs.method) if inputs.method == "LoRA" else inputs.method


def _check_adapter_type(options: Options, method: Method) -> None:
    if method.in_backward and ("adapter", "type") in options:
        raise SettingsError(
            "type is set, but this node trains all weights, not an adapter: it would have no effect.",
            "Leave type unset in Graft Adapter Options, or train a LoRA.",
            "type",
        )


def _check_text_encoder(options: Options) -> None:
    trained = options.value("adapter", "text_encoder", "off") == "on"
    for name in ("text_encoder_rank", "text_encoder_learning_rate"):
        if not trained and ("adapter", name) in options:
            raise SettingsError(
                f"{name} is set, but text_encoder is off: it would have no effect.",
                f"In Graft Adapter Options set text_encoder to on, or leave {name} unset.",
                name,
            )


def _option_fields(options: Options) -> dict[str, Any]:
    declared = {key: OPTIONS[key[0]][key[1]] for key in options if key[0] != "objective"}
    return {entry.name: entry.value_of(options[key]) for key, entry in declared.items()}


def _embedding_fields(options: Options, embedding: EmbeddingSpec | None) -> dict[str, Any]:
    """Return the recipe's fields of the node's own embedding; without one, and without pivotal options, those of none.

    Raises:
        SettingsError: the pivotal options have no name, or the node trains its own embedding.
    """
    pivotal = options.values_of("pivotal")
    if pivotal and embedding is not None:
        raise SettingsError(
            "Graft Pivotal Options add an embedding to the training of a model, and this node trains no model.",
            "Remove them from this node's options: it trains its own embedding.",
            "options",
        )
    if pivotal and not pivotal.get("name", "").strip():
        raise SettingsError(
            "Graft Pivotal Options have no name for the embedding.", "Set name in Graft Pivotal Options.", "options"
        )
    if pivotal:
        return {}
    if embedding is None:
        return {field: RECIPE_OPTIONS[field].before for field in _EMBEDDING.values()}
    fields = {_EMBEDDING[name]: value for name, value in asdict(embedding).items()}
    return _without_unset(fields, "embedding_learning_rate")


def _input_fields(inputs: RecipeInputs) -> dict[str, Any]:
    names = ("steps", "learning_rate", "batch_size", "seed", "resolution", "trigger", "preference_beta")
    return _without_unset({name: getattr(inputs, name) for name in names}, "learning_rate", "resolution")


def _without_unset(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names or value != RECIPE_OPTIONS[name].unset}


def _with_defaults(fields: dict[str, Any], family: Family, method: Method, alone: bool) -> dict[str, Any]:
    """Add the defaults of the fields that are not set, in the order of their declaration.

    Args:
        alone: the node trains an embedding, and nothing else.
    """
    optimizer = fields.get("optimizer", RECIPE_OPTIONS["optimizer"].default)
    usual = method.usual_rate(family) * (PREFERENCE_RATE if fields["preference_beta"] else 1)
    rate = default_learning_rate(optimizer, EMBEDDING_RATE if alone else usual)
    embedding_rate = default_learning_rate(optimizer, EMBEDDING_RATE)
    if alone or finds_its_rate(optimizer):
        # One rate serves everything that is trained.
        embedding_rate = fields.get("learning_rate", rate)
    settled: dict[str, Any] = {}
    # `check_recipe` refuses an unknown optimizer.
    defaults = OPTIMIZERS.get(optimizer, OPTIMIZERS["AdamW"])
    basis = Basis(family, method, defaults, rate, embedding_rate, settled)
    for name, declared in RECIPE_OPTIONS.items():
        settled[name] = fields[name] if name in fields else declared.default_of(basis)
    return settled


def summarize(recipe: Recipe) -> str:
    """Summarize the options of a recipe in one line."""
    scale = METHODS[recipe.method].scale(recipe.rank, recipe.alpha)
    strength = "" if scale is None else f"alpha {recipe.alpha:g} (effective scale {scale:g}), "
    size = f"rank {recipe.rank}, {strength}on {recipe.targets}, " if recipe.rank else ""
    if METHODS[recipe.method].in_backward:
        size = f"on {recipe.targets} in {recipe.weight_dtype}, "
    word = ""
    if recipe.embedding_name:
        start = f"{recipe.embedding_vectors} vectors from '{recipe.embedding_init}'"
        word = f"embedding:{recipe.embedding_name} ({start}, learning rate {recipe.embedding_learning_rate:g}), "
    return (
        f"{recipe.method} for {recipe.family}, {recipe.optimizer}, "
        f"learning rate {recipe.learning_rate:g} {recipe.schedule}, "
        f"{size}{_summarize_text_encoder(recipe)}{word}{_summarize_preference(recipe)}{_summarize_slider(recipe)}"
        f"batch {recipe.batch_size} x {recipe.accumulation}, resolution {recipe.resolution}, seed {recipe.seed}"
        + "".join(f", {name} {value}" for name, value in recipe.objective.set_fields().items())
    )


def _summarize_text_encoder(recipe: Recipe) -> str:
    if not recipe.text_encoder:
        return ""
    rank = f"rank {recipe.text_encoder_rank}, " if recipe.text_encoder_rank else ""
    return f"text encoder too ({rank}learning rate {recipe.text_encoder_learning_rate:g}), "


def _summarize_preference(recipe: Recipe) -> str:
    return f"preference with beta {recipe.preference_beta:g}, " if recipe.preference_beta else ""


def _summarize_slider(recipe: Recipe) -> str:
    if not recipe.slider_strength:
        return ""
    prompts = "".join(f"'{positive}' - '{negative}' on '{on}', " for on, positive, negative in recipe.slider_prompts)
    anchors = f"{len(recipe.slider_anchors)} anchors, " if recipe.slider_anchors else ""
    return f"slider at strength {recipe.slider_strength:g}, {prompts}{anchors}"
