"""Tests that every node has a help page and texts for translators that agree with the node."""

import json
import re

import pytest

from docs.build import make_choosing, make_locales
from tests.support.host import ROOT

HELP = ROOT / "web" / "docs"
README = ROOT / "README.md"
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *HELP.glob("**/*.md")]

# vue-i18n, which shows the locale files, reads these as syntax.
SYNTAX = re.compile(r"[@|{}]")


@pytest.fixture(scope="module")
def schemas(comfy):
    """Return {node id: schema} of the whole pack."""
    return {schema.node_id: schema for schema in (node.define_schema() for node in make_locales.list_nodes())}


def read_inputs(page):
    """Return a help page's list of inputs: {input: (description, typical value)}."""
    section = page.split("\n## Inputs\n")[1].split("\n## ")[0]
    rows = re.findall(r"^- `(\w+)`: (.+)$", section, re.M)
    return {name: tuple(re.split(r" (?:Typical|Left alone): ", text)) for name, text in rows}


def title_of(schema):
    """Return a node's title without its search words."""
    return schema.display_name.partition(" (")[0]


def list_pages():
    return {path.stem: path.read_text(encoding="utf-8") for path in HELP.glob("*.md")}


def test_every_node_has_its_help_page_and_no_page_is_left_over(schemas):
    assert sorted(list_pages()) == sorted(schemas)


def test_help_pages_show_a_workflow_and_training_nodes_lead_to_choosing(schemas):
    for node_id, page in list_pages().items():
        assert re.search(r"\n!\[[^\]]{20,}\]\(pictures/(?:\w+\.avif|workflows\.svg#\w+)\)\n", page), node_id
    trainers = [name for name in schemas if name.startswith("GraftTrain") or name == "GraftFineTune"]
    for node_id in trainers:
        assert "(extensions/graft/docs/choosing/index.html)" in list_pages()[node_id], node_id


def test_the_page_for_choosing_is_made_of_its_text():
    """If it fails, run python -m docs.build.make_choosing --page."""
    text = make_choosing.PAGE.read_text(encoding="utf-8")
    assert (make_choosing.FOLDER / "index.html").read_text(encoding="utf-8") == make_choosing.render(text)
    assert all(mark in text for mark in make_choosing.MARKS)
    for method in make_choosing.METHODS.values():
        assert f" {method.label} |" in text


def test_help_pages_explain_exactly_the_inputs_there_are(schemas):
    for node_id, page in list_pages().items():
        assert list(read_inputs(page)) == [given.id for given in schemas[node_id].inputs], node_id


@pytest.mark.parametrize("path", sorted(HELP.glob("*.md")), ids=lambda path: path.stem)
def test_help_fits_a_sidebar_of_300_pixels(path):
    """A table of three columns would leave one or two words per line there, so pages use lists."""
    rows = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    wide = [row for row in rows if len(re.findall(r"(?<!\\)\|", row)) > 3]
    assert wide == []


def test_help_pages_name_the_outputs_and_carry_the_title(schemas):
    for node_id, page in list_pages().items():
        assert page.startswith(f"# {title_of(schemas[node_id])}\n"), node_id
        outputs = re.split(r"\n## Outputs?\n", page)[1].split("\n## ")[0]
        for made in schemas[node_id].outputs:
            assert f"`{made.display_name or made.id}`" in outputs, (node_id, made.id)


def test_choices_named_on_help_pages_exist(schemas):
    """Every choice that a page lists for an input exists."""
    for node_id, page in list_pages().items():
        described = {name: text for name, (text, *_) in read_inputs(page).items()}
        for given in schemas[node_id].inputs:
            choices = getattr(given, "options", None)
            if not choices or given.id in ("folder", "adapter_name", "embedding_name"):
                continue
            for named in re.findall(r"`([^`]+)`", described[given.id]):
                assert named in choices, (node_id, given.id, named)


@pytest.fixture(scope="module")
def english(schemas):
    """Return {part: tree of texts} as the code has them now."""
    return make_locales.describe(make_locales.list_nodes())


def test_every_input_has_a_tooltip(schemas):
    bare = [(name, given.id) for name, schema in schemas.items() for given in schema.inputs if not given.tooltip]
    assert bare == []


@pytest.mark.parametrize("language", make_locales.LANGUAGES)
def test_every_text_is_translated_and_none_that_nothing_says(english, language):
    """If it fails, run `python -m docs.build.make_locales --missing`, then fill in the table it names."""
    table = make_locales.read_table(language)
    missing = make_locales.list_missing(english, table)
    lines = "".join(f"\n  {place}: {text}" for place, text in missing.items())
    assert not missing, f"docs/build/translations/{language}.json has no translation of{lines}"
    stale = make_locales.list_stale(english, table)
    assert not stale, f"docs/build/translations/{language}.json translates what nothing says any more: {stale}"


@pytest.mark.parametrize("language", ["en", *make_locales.LANGUAGES])
def test_locales_are_those_of_the_nodes_and_tables(english, language):
    """No missing key, no stale key, no outdated text. If it fails, run python -m docs.build.make_locales."""
    table = make_locales.read_table(language)
    folder = make_locales.LOCALES / language
    written = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
    assert written == make_locales.files_of(language, english, table), language


# A letter that only this language has, or its script's range.
SCRIPTS = {
    "zh": "[\u4e00-\u9fff]",
    "ja": "[\u3040-\u30ff]",
    "ko": "[\uac00-\ud7af]",
    "ru": "[\u0430-\u044f]",
    "fr": "[\u00e8\u00ea\u00e7]| (le|la|les|de|du|des|un|une) ",
    "de": "[\u00e4\u00f6\u00fc\u00df]| (der|die|das|des|ein|eine|und|nicht) ",
    "es": "[\u00f1\u00f3\u00ed]| (el|la|los|las|de|del|un|una) ",
}


@pytest.mark.parametrize("language", make_locales.LANGUAGES)
def test_translations_keep_what_is_no_language(language):
    """Numbers, files, embedding:NAME and the page's $places stay unchanged; sentences are in the language."""
    kept = re.compile(
        r"\d+(?:\.\d+)?(?:e-\d+)?|\w+=[\d.e-]*\d|embedding:NAME|(?:output|masks|my_run)[\w/*-]*/[\w*-]+|\$\w+|LoRA"
    )
    table = make_locales.read_table(language)
    for text, said in table.items():
        lost = [part for part in set(kept.findall(text)) if part not in said]
        assert not lost, (text, said, lost)
    long = [said for text, said in table.items() if len(text) > 60]
    assert sum(bool(re.search(SCRIPTS[language], said)) for said in long) >= 0.9 * len(long)


def test_settings_say_the_same_in_the_browser_and_to_translators():
    script = (ROOT / "web" / "settings.js").read_text(encoding="utf-8")
    for name, texts in make_locales.SETTINGS.items():
        assert f'id: "{name.replace("_", ".")}"' in script
        for _, text in make_locales.list_texts(texts):
            assert f'"{text}"' in script


def test_locales_hold_nothing_that_the_frontend_reads_as_syntax():
    for path in make_locales.LOCALES.glob("*/*.json"):
        for _, text in make_locales.list_texts(json.loads(path.read_text(encoding="utf-8"))):
            assert not SYNTAX.search(text), (path.name, text)


def test_nodes_are_found_by_the_words_that_users_know(schemas):
    """Each node has search words if the host supports them, and none of them is part of its own name."""
    if not hasattr(next(iter(schemas.values())), "search_aliases"):
        pytest.skip("this ComfyUI searches by names alone")
    for schema in schemas.values():
        assert schema.search_aliases, schema.node_id
        assert all(alias == alias.lower() for alias in schema.search_aliases), schema.node_id
    found = {alias for schema in schemas.values() for alias in schema.search_aliases}
    assert {"dreambooth", "ti", "textual inversion", "finetune", "train", "dora", "vram"} <= found


def test_readme_lists_every_node(schemas):
    table = README.read_text(encoding="utf-8").split("\n## Nodes\n")[1].split("\n## ")[0]
    assert sorted(re.findall(r"^\| \*\*([^*]+)\*\*", table, re.M)) == sorted(map(title_of, schemas.values()))


def test_readme_is_short_and_links_every_page():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    for page in ROOT.glob("docs/*.md"):
        assert f"(docs/{page.name})" in text, page.name


@pytest.mark.parametrize("path", sorted(PAGES), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    """Check the files and headings that a page links to. Help pages link nothing outside the pack."""
    for target, heading in re.findall(r"\]\(([^)#\s]+)(?:#([\w-]+))?", path.read_text(encoding="utf-8")):
        if target.startswith("extensions/graft/"):
            # In the help viewer links are relative to the page; only pictures are looked up beside the text.
            target = f"../{target.removeprefix('extensions/graft/')}"
        if target.startswith(("http:", "https:")):
            assert HELP not in path.parents, target
            continue
        linked = path.parent / target.replace("%20", " ")
        assert linked.exists(), target
        assert not heading or heading in list_anchors(linked), f"{target}#{heading}"


def list_anchors(path):
    """Return the anchors of a page's headings as GitHub makes them, or the names of a file's pictures."""
    if path.suffix == ".svg":
        return re.findall(r'<view id="(\w+)"', path.read_text(encoding="ascii"))
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
