"""Table of all options in docs/options.md, from their declarations.

    python -m docs.build.make_options

A test compares the page with the declarations.
"""

from tests.support import pack
from tests.support.host import ROOT

PAGE = ROOT / "docs" / "options.md"
HEAD = "| option | node | values | default | identity |"
WORDS = {"": "none", (): "none", True: "on", False: "off"}
_INTRODUCTION = """## Every option

The defaults are those of a LoRA of rank 16 on SD1.5 with AdamW. With `*` they depend on the model, the method, the
optimizer or another option. Identity: with *yes*, another value is another run; with *no*, the run continues. The
content of `start_from` counts as part of the base model. `name` and `on_existing` choose the run.
`python -m docs.build.make_options` writes this table from `trainers/recipe/options.py`.

"""


def describe_default(option, recipe) -> str:
    """Return an option's default as the table shows it."""
    owner = recipe if hasattr(recipe, option.name) else recipe.objective
    value = getattr(owner, option.name) if callable(option.default) else option.default
    if isinstance(value, (str, tuple, bool)):
        text = WORDS.get(value) or str(value)
    else:
        text = f"{value:g}"
    return text + "*" * callable(option.default)


def describe_values(option) -> str:
    """Return an option's range or choices."""
    from graft_pack.trainers.engine.validation import choices_of

    if option.range is not None:
        low, high = option.range[0], option.bounds[1]
        return f"{low:g} to {high:g}" if isinstance(low, float) else f"{low} to {high}"
    choices = choices_of(option.offered or option.choices)
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    return "text" if option.unset == "" else "a list of the host"


def make_table() -> str:
    """Return the section with the table."""
    from graft_pack.trainers.engine.resolve import Options, RecipeInputs, resolve
    from graft_pack.trainers.families import family_of
    from graft_pack.trainers.recipe.options import OPTIONS

    # The defaults of an embedding and of the text encoder show only where they are trained.
    options = Options().adding("pivotal", {"name": "word"}).adding("adapter", {"text_encoder": "on"})
    recipe = resolve(options, family_of("SD1"), RecipeInputs("LoRA", 1000, 0.0, 16, 1, 0, 0, ""))
    rows = [
        f"| {name} | {node} | {describe_values(option)} | {describe_default(option, recipe)} "
        f"| {'yes' if option.decides else 'no'} |"
        for node, declared in OPTIONS.items()
        for name, option in declared.items()
    ]
    return _INTRODUCTION + "\n".join([HEAD, "|" + "---|" * HEAD.count(" | ") + "---|", *rows]) + "\n"


def add_table(page: str) -> str:
    """Return the page with the table at its end, in place of an earlier one."""
    return page.partition(_INTRODUCTION.splitlines()[0])[0].rstrip() + "\n\n" + make_table()


if __name__ == "__main__":
    pack.hide_root()
    pack.load_pack()
    PAGE.write_text(add_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
