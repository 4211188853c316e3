"""Tests of preview prompts with settings of their own, in the syntax that sd-scripts documents."""

import numpy as np
import pytest
from graft_pack.trainers.data.arrays import from_arrays
from graft_pack.trainers.errors import SettingsError
from graft_pack.trainers.recipe.parsing import Prompt, parse_prompt, parse_prompts, text_of

from tests.support.diffusers_host import make_host, run_session

# The two examples of sd-scripts' docs/train_network_advanced.md, that of flux_train_network.md, and their options.
DOCUMENTED = {
    "masterpiece, best quality, (1girl), in white shirts, upper body, looking at viewer, simple background --n low "
    "quality, worst quality, bad anatomy,bad composition, poor, low effort --w 768 --h 768 --d 1 "
    "--l 7.5 --s 28": Prompt(
        "masterpiece, best quality, (1girl), in white shirts, upper body, looking at viewer, simple background",
        "low quality, worst quality, bad anatomy,bad composition, poor, low effort",
        768,
        768,
        28,
        7.5,
        None,
        1,
    ),
    "masterpiece, best quality, 1boy, in business suit, standing at street, looking back --n (low quality, worst "
    "quality), bad anatomy,bad composition, poor, low effort --w 576 --h 832 --d 2 --l 5.5 --s 40": Prompt(
        "masterpiece, best quality, 1boy, in business suit, standing at street, looking back",
        "(low quality, worst quality), bad anatomy,bad composition, poor, low effort",
        576,
        832,
        40,
        5.5,
        None,
        2,
    ),
    "Japanese shrine in the summer forest. --n low quality, ugly, unfinished, out of focus, deformed, disfigure, "
    "blurry, smudged, restricted palette, flat colors --w 512 --h 512 --d 1 --l 4.0 --g 0.0 --s 20": Prompt(
        "Japanese shrine in the summer forest.",
        "low quality, ugly, unfinished, out of focus, deformed, disfigure, blurry, smudged, restricted palette, flat "
        "colors",
        512,
        512,
        20,
        4.0,
        0.0,
        1,
    ),
    "a cat --g 3.5": Prompt("a cat", guidance=3.5),
    "a cat --W 512 --h 768 --N Blurry --S 8": Prompt("a cat", "Blurry", 512, 768, 8),
    "a cat": Prompt("a cat"),
    "  a cat\t--s  30 ": Prompt("a cat", steps=30),
    "--n blurry": Prompt("", negative="blurry"),
    "a cat --n": Prompt("a cat", negative=""),
    "a cat --d 18446744073709551615": Prompt("a cat", seed=2**64 - 1),
    "a cat --w 64 --w 128": Prompt("a cat", width=128),
    "a cat --c my cats/1.png --d 3 --c 2.png": Prompt("a cat", seed=3, sources=("my cats/1.png", "2.png")),
    "a well--known cat -- on a mat, --5": Prompt("a well--known cat -- on a mat, --5"),
}


@pytest.mark.parametrize("line", DOCUMENTED)
def test_flags_have_their_documented_meaning(line):
    assert parse_prompt(line) == DOCUMENTED[line]


def test_comments_and_empty_lines_are_no_prompts():
    text = "# prompt 1\na cat --d 1\n\n  # prompt 2\n a dog #2 --d 2 \n#"
    assert parse_prompts(text) == ("a cat --d 1", "a dog #2 --d 2")


@pytest.mark.parametrize(
    "line, words",
    [
        ("a cat --ar 16", "Unknown flag --ar in line 3"),
        ("a cat --AR 16", "Unknown flag --ar in line 3"),
        ("a cat --w wide", "--w in line 3 is 'wide'. Write a whole number between 64 and 8192"),
        ("a cat --w 512.5", "Write a whole number"),
        ("a cat --h 8", "--h in line 3 is '8'"),
        ("a cat --s", "--s in line 3 is ''"),
        ("a cat --l nan", "--l in line 3 is 'nan'. Write a number between"),
        ("a cat --d -1", "--d in line 3"),
        ("a cat --c", "Line 3 has a --c without a file"),
        ("a cat --c 1 --c 2 --c 3 --c 4", "Line 3 has more than 3 --c"),
    ],
)
def test_an_error_names_the_line_and_the_cure(line, words):
    with pytest.raises(SettingsError) as caught:
        parse_prompts(f"# two cats\n\n{line}")
    assert words in str(caught.value) and caught.value.input == "prompts"


def test_a_caption_without_its_flags():
    assert text_of("a cat --v 5 --n x") == "a cat"


FIELDS = {"steps": 1, "preview_steps": 1, "preview_every": 0, "preview_seed": 7, "preview_negative": "grey"}


def drawn(tmp_path, prompts, monkeypatch, dataset=None):
    """Return the requests and the sizes of the pictures of a run's last previews."""
    host, requests = make_host(), []
    real = host.denoiser.preview

    def preview(given):
        requests[:] = given
        return real(given)

    monkeypatch.setattr(host.denoiser, "preview", preview)
    result = run_session(tmp_path, host=host, dataset=dataset, **FIELDS, preview_prompts=prompts)
    return requests, result


def test_a_picture_is_drawn_with_the_settings_of_its_prompt(tmp_path, monkeypatch):
    line = "a red picture --n blue --w 64 --h 96 --s 2 --l 3 --g 2.5 --d 42"
    (plain, own), result = drawn(tmp_path, ("a red picture", line), monkeypatch)
    assert (own.prompt, own.negative, own.size, own.steps) == ("a red picture", "blue", (64, 96), 2)
    assert (own.cfg, own.guidance, own.seed) == (3.0, 2.5, 42)
    assert (plain.negative, plain.seed, plain.guidance) == ("grey", 7, None)


def test_a_picture_has_the_commonest_size_unless_its_prompt_sets_one(tmp_path, monkeypatch):
    shapes = [(64, 64, 3), (48, 96, 3), (96, 48, 3), (48, 96, 3)]
    arrays = [np.full(shape, 40 * place, np.uint8) for place, shape in enumerate(shapes)]
    dataset = from_arrays(arrays, ["a picture"] * 4, "sks", 64)
    prompts = ("a picture", "a picture --w 128", "a picture --h 128")
    requests, _ = drawn(tmp_path, prompts, monkeypatch, dataset)
    width, height = requests[0].size
    assert width > height
    assert [request.size for request in requests[1:]] == [(128, height), (width, 128)]


def test_a_prompt_of_an_earlier_job_is_read_as_before(tmp_path, monkeypatch):
    (request,), _ = drawn(tmp_path, ("a red picture --v 5",), monkeypatch)
    assert request.prompt == "a red picture --v 5"
