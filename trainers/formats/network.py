"""kohya's metadata of an adapter's network, read from its tensors.

Sources: sd-scripts (networks/lora.py, train_network.py) and LyCORIS (lycoris/kohya.py) for names and arguments.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from .json_files import parse_json
from .keys import ALPHA, DORA, DOWN, common_name, is_text, split

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from .adapter import Adapter

_SD_SCRIPTS, _LYCORIS = "networks.lora", "lycoris.kohya"
LYCORIS_NETWORK = {"ss_network_module": _LYCORIS}
_ALGORITHMS = {"hada_": "loha", "lokr_": "lokr", "oft_": "diag-oft", "a1.": "glora"}
RANKED = (DOWN, "hada_w1_b", "lokr_w2_b", "lokr_w1_b", "b2.weight")
# Layers outside the blocks, which sd-scripts' networks.lora has no place for.
_OUTSIDE = re.compile(
    r"(conv_in|conv_out|time_embedding|add_embedding|input_blocks_0_0|time_embed|label_emb|out_\d|final_layer)(_|$)"
)


def network_fields(tensors: Mapping[str, torch.Tensor], by_lycoris: bool = False) -> dict:
    """Return `network_module`, `network_args`, `network_dim` and `network_alpha` without kohya's prefix `ss_`.

    Rank and alpha are the most common of the denoiser's layers, and absent if no layer has them.

    Args:
        tensors: tensors of an adapter with kohya's key suffixes.
        by_lycoris: whether the file is for LyCORIS, whose formula for a DoRA's magnitudes is not ComfyUI's.
    """
    layers = split(tensors)[0]
    algorithm = _algorithm_of(layers)
    args = {"algo": algorithm}
    module = _LYCORIS
    has_magnitudes = any(DORA in held for held in layers.values())
    if has_magnitudes and not by_lycoris and algorithm in ("loha", "lokr"):
        # LyCORIS would read them by its own formula.
        module = _SD_SCRIPTS
    if algorithm == "lora":
        is_beyond = any(_OUTSIDE.match(common_name(name)[1]) for name in layers) and not has_magnitudes
        if not (by_lycoris or is_beyond):
            module, args = _SD_SCRIPTS, {}
        args |= {"dora_wd": "True"} if has_magnitudes else {}
    own = {name: held for name, held in layers.items() if not is_text(name)} or layers
    flat = _common_rank(held for held in own.values() if not _is_spatial(held))
    spatial = _common_rank(held for held in own.values() if _is_spatial(held))
    if spatial:
        args |= {"conv_dim": str(spatial[0]), "conv_alpha": str(spatial[1])}
    rank, alpha = flat or spatial or (None, None)
    return {"network_module": module, "network_args": args, "network_dim": rank, "network_alpha": alpha}


def ranks_of(adapter: Adapter) -> dict[str, Any]:
    """Return an adapter's `rank`, `alpha` and `block_ranks` as options have them; empty if it has no rank."""
    try:
        recipe = parse_json(adapter.metadata["graft_recipe"])
        blocks = "\n".join(f"{pattern}={rank}" for pattern, rank in recipe["block_ranks"])
        rank, alpha = int(recipe["rank"]), float(recipe["alpha"])
    except (KeyError, TypeError, ValueError, OverflowError):
        # Another program made it, or a tool of Graft.
        config, fields = {} if adapter.native is None else adapter.native.config, network_fields(adapter)
        rank = config.get("r") or fields["network_dim"]
        alpha = config.get("lora_alpha", config.get("alpha")) or fields["network_alpha"]
        blocks = ""
    return (
        {"rank": rank, "alpha": float(alpha), "block_ranks": blocks} if rank and alpha and math.isfinite(alpha) else {}
    )


def has_host_magnitudes(adapter: Mapping[str, torch.Tensor]) -> bool:
    """Report whether magnitudes are for ComfyUI's formula: in Graft's kohya files, and in dicts of other nodes."""
    if not hasattr(adapter, "made_by"):
        return True
    return (
        adapter.made_by() in ("DoRA", "IA3", "LoHa", "LoKr") and adapter.metadata.get("ss_network_module") != _LYCORIS
    )


def as_dora(metadata: dict[str, str]) -> dict[str, str]:
    """Return the metadata of a DoRA whose magnitudes are for ComfyUI's formula."""
    return {"graft_recipe": json.dumps({"method": "DoRA"}), **metadata, "ss_network_module": _SD_SCRIPTS}


def _algorithm_of(layers) -> str:
    """Return LyCORIS' name of the algorithm. Full differences count only if the file holds nothing else."""
    ends = {end for held in layers.values() for end in held}
    if "oft_blocks" in ends and any("oft_blocks" in held and held["oft_blocks"].dim() == 4 for held in layers.values()):
        return "boft"
    named = next((name for start, name in _ALGORITHMS.items() if any(end.startswith(start) for end in ends)), None)
    return named or ("lora" if DOWN in ends else "full")


def _is_spatial(held: dict[str, torch.Tensor]) -> bool:
    down = held.get(DOWN)
    return down is not None and ("lora_mid.weight" in held or (down.dim() == 4 and down.shape[2:].numel() > 1))


def _common_rank(layers) -> tuple[int, float] | None:
    pairs: Counter = Counter()
    for held in layers:
        factor = next((held[end] for end in RANKED if end in held), None)
        if factor is not None:
            alpha = float(held[ALPHA]) if ALPHA in held else float(factor.shape[0])
            pairs[factor.shape[0], alpha] += 1
    return pairs.most_common(1)[0][0] if pairs else None
