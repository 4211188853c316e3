"""Kinds of training over diffusers, each as a dataset, a text encoder and fields of a recipe."""

from dataclasses import replace

ADAPTER = {"steps": 3, "batch_size": 3, "schedule": "cosine", "keep_last": 10, "save_every": 2}
WORD = {"embedding_name": "my-word", "embedding_init": "red circle", "embedding_vectors": 2}
WORD |= {"embedding_learning_rate": 1e-2, "embedding_templates": "object"}
ALONE = {"method": "embedding", "rank": 0, "alpha": 0.0, **WORD}
# AdamW's first step follows a gradient's sign, even if rounding decides it; hence an epsilon as large as the gradients.
ALL = {"method": "all weights", "rank": 0, "alpha": 0.0, "targets": "all weights", "max_grad_norm": 0.0}
ALL |= {"learning_rate": 1e-4, "optimizer": "Adafactor"}
TEXT = {"text_encoder": True, "text_encoder_rank": 2, "text_encoder_learning_rate": 1e-2}

SLIDER = {"slider_strength": 1.0, "slider_anchors": ("a green house", "a white cup")}
PROMPTS = (("a shape", "a red shape", "a blue shape"), ("a dog", "a red dog", "a blue dog"), ("", "big", "small"))

FIELDS = {
    "LoRA": {"validation_fraction": 0.2, "validate_every": 2, "preview_prompts": ("a red picture",), "preview_every": 2}
    | {"gradient_check": "on"},
    "DoRA": {"method": "DoRA"},
    "PiSSA": {"method": "PiSSA"},
    "class images": {},
    "differential": {},
    "embedding": ALONE,
    "pivotal": {**WORD, "embedding_stop": 0.5},
    "text encoder": TEXT,
    "all weights": ALL,
    "all weights, differential": ALL,
    # Their gradients are differences of nearly equal ones. Adam would enlarge their rounding.
    "preference": {"preference_beta": 100.0, "optimizer": "SGD", "validation_fraction": 0.2, "validate_every": 2},
    "all weights, preference": {**ALL, "preference_beta": 100.0},
    "slider": {**SLIDER, "slider_prompts": PROMPTS, "preview_prompts": ("a red shape",), "preview_every": 2},
    "slider of pairs": {
        **SLIDER,
        "optimizer": "SGD",
        "learning_rate": 10.0,
        "validation_fraction": 0.2,
        "validate_every": 2,
    },
}


def fields_of(kind):
    return {**ADAPTER, "preview_steps": 1, **FIELDS[kind]}


def dataset_of(kind):
    from graft_pack.trainers.data import prior
    from graft_pack.trainers.data.examples import Augmentation

    from .diffusers_host import make_dataset

    dataset = make_dataset()
    if kind == "class images":
        rows = (replace(one, trigger="") for one in make_dataset(4).examples)
        return prior.add_class_images(dataset, replace(dataset, examples=tuple(rows), trigger=""), 0.4)
    if "differential" in kind:
        anchored = prior.add_prior_target(dataset, "a picture", 0.5)
        # Every other picture has a prior target.
        rows = [one if number % 2 else two for number, (one, two) in enumerate(_pairs(dataset, anchored))]
        return replace(anchored, examples=tuple(rows))
    if kind == "slider":
        return replace(dataset, examples=())
    if "preference" in kind:
        return in_pairs(dataset)
    if kind == "slider of pairs":
        anchors = (prior.PriorTarget(text, 1.0) for text in SLIDER["slider_anchors"])
        examples = in_pairs(dataset).examples
        rows = (replace(example, anchor=anchor) for anchor in anchors for example in examples)
        return replace(dataset, examples=tuple(rows))
    if kind == "embedding":
        # Every other text lacks the embedding, the only trained part, so one of two processes has no gradient.
        rows = enumerate(dataset.examples)
        rows = (replace(one, handling=Augmentation(caption_dropout=float(number % 2))) for number, one in rows)
        return replace(dataset, examples=tuple(rows))
    return dataset


def in_pairs(dataset):
    """Return the dataset of `make_dataset` with the picture of equal shape, three places further, as each worse one."""
    examples = dataset.examples
    rows = (replace(one, paired=examples[(place + 3) % len(examples)]) for place, one in enumerate(examples))
    return replace(dataset, examples=tuple(rows))


def text_of(kind):
    from .diffusers_host import LayeredEncoder

    return LayeredEncoder() if kind == "text encoder" else None


def _pairs(dataset, other):
    return zip(dataset.examples, other.examples, strict=True)
