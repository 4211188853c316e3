"""Prompts in API format, as the browser queues them: the pack between core's own nodes."""

from __future__ import annotations

CHECKPOINT = "graft_tiny.safetensors"


def node(kind: str, **inputs) -> dict:
    """Return one node of a prompt; a link is [node id, output index]."""
    return {"class_type": kind, "inputs": inputs}


def training(
    folder: str,
    steps: int,
    checkpoint: str = CHECKPOINT,
    trigger: str = "",
    option_nodes: dict | None = None,
    **widgets,
) -> dict:
    """Return a prompt of checkpoint, dataset and trainer; node 3 is the trainer.

    Args:
        option_nodes: further nodes by id; the last of them is connected to the trainer.
        widgets: the trainer's widgets, over the tiny base's usual ones.
    """
    values = {"steps": steps, "learning_rate": 2e-3, "rank": 8, "batch_size": 4, "seed": 0, **widgets}
    prompt = {
        "1": node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "2": node("GraftLoadDataset", folder=folder, trigger=trigger, resolution=64, repeats=1),
        "3": node("GraftTrainLoRA", model=["1", 0], clip=["1", 1], vae=["1", 2], dataset=["2", 0], **values),
    }
    if option_nodes:
        prompt.update(option_nodes)
        prompt["3"]["inputs"]["options"] = [list(option_nodes)[-1], 0]
    return prompt


def options(kind: str, defaults: dict, after: str | None = None, **fields) -> dict:
    """Return an option node with its defaults except for some fields, chained after another."""
    inputs = {**defaults, **fields}
    if after:
        inputs["options"] = [after, 0]
    return node(kind, **inputs)


def defaults_of(info: dict) -> dict:
    """Return a fresh node's widget values, from its /object_info."""
    found = {}
    for group in ("required", "optional"):
        for name, (kind, *rest) in info["input"].get(group, {}).items():
            if rest and "default" in rest[0]:
                found[name] = rest[0]["default"]
            elif isinstance(kind, list):
                found[name] = kind[0]
    return found


def sampling(
    prompt: dict,
    text: str,
    model: list,
    clip: list,
    prefix: str,
    seed: int = 1,
    count: int = 1,
    steps: int = 20,
    cfg: float = 4.0,
    start: int = 100,
) -> str:
    """Add nodes that draw `count` pictures and save them; return the saving node's id."""
    ids = [str(start + offset) for offset in range(6)]
    prompt[ids[0]] = node("CLIPTextEncode", clip=clip, text=text)
    prompt[ids[1]] = node("CLIPTextEncode", clip=clip, text="")
    prompt[ids[2]] = node("EmptyLatentImage", width=64, height=64, batch_size=count)
    prompt[ids[3]] = node(
        "KSampler",
        model=model,
        positive=[ids[0], 0],
        negative=[ids[1], 0],
        latent_image=[ids[2], 0],
        seed=seed,
        steps=steps,
        cfg=cfg,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
    )
    prompt[ids[4]] = node("VAEDecode", samples=[ids[3], 0], vae=["1", 2])
    prompt[ids[5]] = node("SaveImage", images=[ids[4], 0], filename_prefix=prefix)
    return ids[5]
