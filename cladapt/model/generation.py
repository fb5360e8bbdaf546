"""The generation config of a base: greedy decoding, which is what its rankings mean."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig

FILE = "generation_config.json"
HARMLESS = {"output_attentions", "output_hidden_states", "transformers_version", "use_cache"}
"""Settings that change no answer."""
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id")


def greedy(config: "GenerationConfig | None", levels: int) -> "tuple[GenerationConfig, dict[str, Any]]":
    """A greedy config of `levels` new tokens with the special tokens of `config`, and what else `config` had set.

    Sampling, penalties and the like are tuned for text: over semantic IDs they change the ranking.
    """
    from transformers import GenerationConfig

    own: dict[str, Any] = {} if config is None else config.to_diff_dict()
    made = GenerationConfig(do_sample=False, max_new_tokens=levels, **{key: own[key] for key in KEPT if key in own})
    kept = made.to_diff_dict()
    return made, {k: v for k, v in own.items() if kept.get(k) != v and k not in HARMLESS and k[0] != "_"}


def write_greedy(folder: Path, levels: int) -> dict[str, Any]:
    """Put the greedy config in the place of a checkpoint's own; what that had set beside the special tokens."""
    from transformers import GenerationConfig

    own = GenerationConfig.from_pretrained(folder) if (folder / FILE).is_file() else None
    config, left_out = greedy(own, levels)
    config.save_pretrained(folder)
    return left_out
