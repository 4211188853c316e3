"""Tests of a slider's run over diffusers: resuming, anchors, previews, jobs, refusals."""

from dataclasses import replace

import pytest
from graft_pack.trainers.data.examples import Dataset, PriorTarget
from graft_pack.trainers.engine.job import export_job, read_job
from graft_pack.trainers.engine.session import run_recipe
from graft_pack.trainers.engine.updater import ParameterUpdater
from graft_pack.trainers.engine.validation import check_recipe
from graft_pack.trainers.errors import ModelError, SettingsError
from graft_pack.trainers.objective.options import Objective
from graft_pack.trainers.preprocessing.prepare import prepare
from graft_pack.trainers.runs.folders import Folders

from tests.support import models
from tests.support.diffusers_host import (
    LayeredEncoder,
    make_dataset,
    make_host,
    run_session,
    same_state,
    same_tensors,
    state_of,
)

EMPTY = Dataset((), "", 64, "slider")
SLIDER = {
    "batch_size": 1,
    "slider_prompts": (("a shape", "a red shape", "a blue shape"), ("a dog", "a red dog", "a blue dog")),
    "slider_anchors": ("a green house", "a white cup"),
    "slider_strength": 1.0,
}
PREVIEWS = {"preview_prompts": ("a red shape",), "preview_every": 2, "preview_steps": 2}


class Cancelled(BaseException):
    """The user's cancellation."""


def folders_in(path):
    return Folders(*(str(path / name) for name in ("runs", "cache", "loras", "embeddings")))


def stopping_at(step):
    """Return a report that cancels after a step."""

    def report(event, payload):
        if event == "step" and payload["step"] == step:
            raise Cancelled

    return report


def paired():
    """Return three pairs, each with two anchors."""
    dataset, others = make_dataset(3), make_dataset(6).examples[3:]
    anchors = [PriorTarget("a green house", 1.0), PriorTarget("a white cup", 1.0)]
    rows = [
        replace(one, paired=other, anchor=anchor)
        for anchor in anchors
        for one, other in zip(dataset.examples, others, strict=True)
    ]
    return replace(dataset, examples=tuple(rows))


@pytest.mark.parametrize("more", [{}, {"slider_prompts": ()}, {"text_encoder": True}], ids=["text", "pairs", "encoder"])
def test_a_killed_slider_resumes_to_the_same_bits(tmp_path, more):
    fields = {**SLIDER, "steps": 4, "save_every": 1, "checkpointing": "on", **more}
    if "text_encoder" in more:
        fields |= {"text_encoder_rank": 2, "text_encoder_learning_rate": 1e-2}
    dataset = EMPTY if fields["slider_prompts"] else paired()
    text = LayeredEncoder() if "text_encoder" in more else None
    straight = run_session(tmp_path / "a", dataset=dataset, host=make_host(text=text), **fields)
    text = LayeredEncoder() if "text_encoder" in more else None
    with pytest.raises(Cancelled):
        run_session(tmp_path / "b", dataset=dataset, host=make_host(stopping_at(2), text), **fields)
    resumed = run_session(tmp_path / "b", dataset=dataset, host=make_host(text=text), **fields)
    assert resumed.resumed_from == 2
    assert same_state(state_of(straight), state_of(resumed))
    assert same_tensors(straight.adapter, resumed.adapter)
    assert len(set(straight.losses)) == 4


@pytest.mark.parametrize("pictures", [False, True], ids=["text", "pairs"])
def test_no_pass_has_more_rows_than_a_micro_batch(tmp_path, pictures):
    """Neither of the trained model nor of the base; the losses and the adapter stay the same."""
    trained, most = [], []
    fields = {**SLIDER, "batch_size": 2, "steps": 2, "optimizer": "SGD"} | ({"slider_prompts": ()} if pictures else {})
    for size in (0, 1):
        host, rows = make_host(), []
        predict = host.denoiser.predict
        host.denoiser.predict = lambda x, *more, own=predict, rows=rows: rows.append(len(x)) or own(x, *more)
        dataset = paired() if pictures else EMPTY
        trained.append(run_session(tmp_path / str(size), host=host, dataset=dataset, micro_batch=size, **fields))
        most.append(max(rows))
    assert most == [2 if pictures else 8, 1]
    assert trained[1].losses == pytest.approx(trained[0].losses, rel=1e-3)
    first, second = (models.joined(one.adapter[name] for name in sorted(one.adapter)) for one in trained)
    assert models.distance(first, second) <= 1e-4


def test_memory_for_one_row_is_enough(tmp_path):
    """A slider's base predicts several prompts at once, until memory runs out, although its batch is one sample."""
    fields = {**SLIDER, "steps": 2, "optimizer": "SGD"}
    host = make_host()
    predict = host.denoiser.predict

    def limited(x, *more):
        if len(x) > 1:
            raise RuntimeError("out of memory")
        return predict(x, *more)

    host.denoiser.predict = limited
    found = run_session(tmp_path / "low", host=host, dataset=EMPTY, **fields)
    wanted = run_session(tmp_path / "high", dataset=EMPTY, **fields)
    assert found.losses == pytest.approx(wanted.losses, rel=1e-3)


@pytest.mark.parametrize(
    "more, terms",
    [({"batch_size": 2}, 4), ({"batch_size": 2, "micro_batch": 1}, 8), ({"slider_anchors": ()}, 2)],
    ids=["anchors", "micro-batches", "no anchors"],
)
def test_the_last_backward_of_a_step_is_known(more, terms, tmp_path, monkeypatch):
    """Several processes send their gradients in it."""
    lasts = []
    real = ParameterUpdater.backward

    def backward(self, loss, is_last):
        lasts.append(is_last)
        real(self, loss, is_last)

    monkeypatch.setattr(ParameterUpdater, "backward", backward)
    run_session(tmp_path, dataset=EMPTY, **{**SLIDER, "steps": 2, "accumulation": 2, **more})
    assert lasts == 2 * [*(2 * terms - 1) * [False], True]


def test_previews_draw_five_strengths_in_a_row(tmp_path):
    rows = []

    def report(event, payload):
        if event == "sample":
            rows.append(payload["pictures"])

    run_session(tmp_path, report, dataset=EMPTY, steps=2, **SLIDER, **PREVIEWS)
    (first,), (last,) = rows
    # The host's pictures are of latents, 8 pixels a side.
    assert first.size == last.size == (5 * 8, 8)

    def cells(row):
        return [row.crop((8 * place, 0, 8 * place + 8, 8)).tobytes() for place in range(5)]

    # Before the first step the adapter has no effect; afterwards the middle is the base still, to the bit.
    assert len(set(cells(first))) == 1
    assert cells(last)[2] == cells(first)[2]
    assert len(set(cells(last))) == 5


def test_visits_take_turns_at_the_anchors(tmp_path):
    recipe = models.recipe("SD1", **SLIDER)
    prepared = prepare(EMPTY, recipe, make_host(), folders_in(tmp_path))
    first, second = prepared.training
    assert (first.name, second.name) == ("a red shape - a blue shape", "a red dog - a blue dog")
    drawn = [item.show(visit).prior_target.conditioning.tensors for item in (first, second) for visit in range(8)]
    texts = [make_host().text.encode(anchor)["cross_attn"] for anchor in SLIDER["slider_anchors"]]
    chosen = [[bool((one["cross_attn"] == text).all()) for text in texts] for one in drawn]
    assert all(sum(row) == 1 for row in chosen)
    assert all(any(row[place] for row in chosen) for place in range(2))


def test_an_exported_job_trains_the_same_slider(tmp_path):
    recipe = models.recipe("SD1", **SLIDER, steps=2)
    path = export_job(str(tmp_path / "jobs"), recipe, EMPTY, make_host(), folders_in(tmp_path), {})
    job = read_job(path)
    assert job.recipe == recipe
    there = run_recipe(job.recipe, job.dataset, make_host(), job.folders(folders_in(tmp_path / "there")))
    here = run_recipe(recipe, EMPTY, make_host(), folders_in(tmp_path))
    assert same_state(state_of(here), state_of(there))


def test_prompts_decide_the_run_and_runs_without_a_slider_keep_theirs():
    plain = models.recipe("SD1")
    assert not any(name.startswith("slider") for name in plain.deciding())
    slider = models.recipe("SD1", **SLIDER)
    others = [
        replace(slider, slider_strength=2.0),
        replace(slider, slider_anchors=()),
        replace(slider, slider_prompts=slider.slider_prompts[:1]),
    ]
    assert len({recipe.identity("", "") for recipe in (plain, slider, *others)}) == 5


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"embedding_name": "my-word", "embedding_vectors": 1}, "embedding"),
        ({"validation_fraction": 0.2}, "validation_fraction"),
        ({"prompt_node": "TextEncodeQwenImageEdit"}, "prompt_node"),
        ({"objective": Objective(masked_prior_weight=1.0)}, "masked_prior_weight"),
        ({"objective": Objective(input_perturbation=0.1)}, "input_perturbation"),
        ({"slider_prompts": (), "slider_anchors": ("a", "b"), "validation_fraction": 0.2}, "one anchor"),
    ],
)
def test_options_without_a_meaning_are_refused(fields, named):
    check_recipe(models.recipe("SD1", **SLIDER))
    with pytest.raises(SettingsError, match=named):
        check_recipe(models.recipe("SD1", **{**SLIDER, "embedding_learning_rate": 1e-3, **fields}))


def test_a_model_that_needs_pictures_is_refused(tmp_path):
    host = make_host()
    host.denoiser.conditioning_kind = "hole"
    with pytest.raises(ModelError, match="masked"):
        prepare(EMPTY, models.recipe("SD1", **SLIDER), host, folders_in(tmp_path))


def test_validation_measures_both_pictures_of_a_pair(tmp_path):
    """Before the adapter has learned, pictures that change places make no difference to the mean of both sides."""
    losses = []
    for swaps in (False, True):

        def report(event, payload):
            if event == "validation":
                losses.append(payload["loss"])

        first, *rest = (replace(example, anchor=None) for example in paired().examples[:3])
        if swaps:
            first = replace(first, source=first.paired.source, digest=first.paired.digest, paired=first)
        dataset = replace(paired(), examples=(replace(first, held_out=True), *rest))
        fields = {**SLIDER, "slider_prompts": (), "slider_anchors": (), "learning_rate": 1e-12}
        run_session(tmp_path / str(swaps), report, dataset=dataset, steps=1, validate_every=1, **fields)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
