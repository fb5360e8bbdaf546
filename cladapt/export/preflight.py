"""What a server would refuse of an adapter, or answer differently, before anybody starts the server.

The rules are those that vLLM's LoRA loader (PEFT configuration, tensor names, ranks) and llama.cpp's
`convert_lora_to_gguf.py` apply. `error`: refused, or served with other answers than PEFT's; `note`: served, with a
limit to know of.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cladapt.artifacts import read_json
from cladapt.errors import CheckFailed

MAX_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` accepts (vLLM also takes 1)."""
MAX_HEAD_ROWS = 258_048
"""The largest vocabulary whose logits vLLM adapts."""
LINEAR = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
"""What vLLM adapts in the architectures below; it packs q, k, v and gate, up itself."""
ADAPTS_HEAD: Mapping[str, bool] = {
    "LlamaForCausalLM": True,
    "MistralForCausalLM": True,
    "Qwen2ForCausalLM": False,
    "Qwen3ForCausalLM": True,
}
"""Architectures whose rules are known here, and whether vLLM takes an adapter of their `lm_head`."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
VARIANTS = ("use_qalora", "kasa_config", "monteclora_config", "arrow_config")
UNADAPTED = "leave these modules out (adapter.targets=all-linear takes no head), or use --target merged"
MERGE = "use --target merged"

_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_KINDS = (
    (re.compile(r"token_adapter|trainable_tokens"), "rows of single tokens"),
    (re.compile(r"lora_embedding_"), "factors of an embedding"),
    (re.compile(r"lora_magnitude_vector"), "magnitudes of DoRA"),
    (re.compile(r"\.bias$"), "biases"),
    (re.compile(r""), "tensors that are no LoRA factors"),
)


@dataclass(frozen=True)
class Finding:
    """One thing that a server minds: what, where it stands, with which value, and how to be rid of it."""

    server: str
    level: Literal["error", "note"]
    what: str
    where: str
    value: str
    fix: str

    def row(self) -> dict[str, str]:
        """As a line of a table."""
        return asdict(self)


@dataclass(frozen=True)
class Subject:
    """What a server sees: `adapter_config.json`, the adapter's tensor shapes, and the base's configuration.

    `tokenizer`: the kind of the base's tokenizer as tokenizer.json has it, "" where it has other files, None for none.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    base: Mapping[str, Any]
    tokenizer: str | None = "BPE"

    @property
    def architecture(self) -> str:
        """The model class that the base names, or ""."""
        return str((self.base.get("architectures") or [""])[0])

    @property
    def modules(self) -> set[str]:
        """Last part of the name of every adapted linear layer."""
        return {m["module"].rpartition(".")[2] for name in self.shapes if (m := _FACTOR.fullmatch(name))}

    @property
    def ranks(self) -> set[int]:
        """Ranks of the factors."""
        sides = ((shape, m["side"]) for name, shape in self.shapes.items() if (m := _FACTOR.fullmatch(name)))
        return {shape[0 if side == "A" else 1] for shape, side in sides}


Complaint = tuple[Literal["error", "note"], str, str, Any, str]
Rule = Callable[[Subject], Iterator[Complaint]]


def subject(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], base_folder: Path) -> Subject:
    """The subject of an adapter and the base directory that serves it."""
    found = [name for name in TOKENIZERS if (base_folder / name).is_file()]
    tokenizer = None if not found else ""
    if "tokenizer.json" in found:
        tokenizer = str(read_json(base_folder / "tokenizer.json")["model"]["type"])
    return Subject(config, shapes, read_json(base_folder / "config.json"), tokenizer)


def preflight(checked: Subject, *servers: str) -> list[Finding]:
    """Everything that the `servers` (all of them by default) mind, errors first."""
    found = [
        Finding(server, level, what, where, str(value), fix)
        for server in servers or RULES
        for rule in RULES[server]
        for level, what, where, value, fix in rule(checked)
    ]
    return sorted(found, key=lambda finding: finding.level)


def refuse(what: str, findings: list[Finding]) -> None:
    """`CheckFailed` with every error among `findings`, if there is one."""
    errors = [f for f in findings if f.level == "error"]
    if errors:
        server = " and ".join(dict.fromkeys(f.server for f in errors))
        listed = "; ".join(f"{f.what}: {f.where}={f.value}" for f in errors)
        raise CheckFailed(
            f"{server} would not serve {what} as it is: {len(errors)} found: {listed}",
            "; ".join(dict.fromkeys(f.fix for f in errors)),
        )


def max_lora_rank(rank: int) -> int:
    """The smallest value of vLLM's `--max-lora-rank` that holds adapters of `rank`."""
    fitting = [allowed for allowed in MAX_LORA_RANKS if allowed >= rank]
    if not fitting:
        raise CheckFailed(f"rank {rank} is above vLLM's largest, {MAX_LORA_RANKS[-1]}", MERGE)
    return fitting[0]


def _kind(checked: Subject) -> Iterator[Complaint]:
    kind = checked.config.get("peft_type")
    if kind != "LORA":
        yield "error", "not a LoRA adapter", "peft_type", kind, "train a LoRA adapter"


def _features(checked: Subject) -> Iterator[Complaint]:
    config = checked.config
    if config.get("modules_to_save"):
        yield "error", "whole modules beside the factors", "modules_to_save", config["modules_to_save"], MERGE
    if config.get("trainable_token_indices"):
        count = f"{len(config['trainable_token_indices'])} entries"
        fix = "bake the rows into the base (cladapt base init does), or use --target merged"
        yield "error", "rows of single tokens are trained", "trainable_token_indices", count, fix
    if config.get("use_dora"):
        yield "error", "DoRA", "use_dora", True, MERGE
    if config.get("bias", "none") != "none":
        yield "error", "biases are trained", "bias", config["bias"], MERGE
    if config.get("lora_bias"):
        yield "error", "the factors have a bias", "lora_bias", True, MERGE
    if config.get("layer_replication"):
        yield "error", "layers of the base are repeated", "layer_replication", config["layer_replication"], MERGE
    for key in VARIANTS:
        if config.get(key):
            yield "error", "a variant of LoRA that is not read", key, config[key], MERGE


def _names(checked: Subject) -> Iterator[Complaint]:
    kinds: dict[str, list[str]] = {}
    for name in checked.shapes:
        if not _FACTOR.fullmatch(name):
            kinds.setdefault(next(kind for pattern, kind in _KINDS if pattern.search(name)), []).append(name)
    for kind, names in kinds.items():
        yield "error", f"{len(names)} {kind} in the file", "adapter_model.safetensors", names[0], MERGE
    if not checked.ranks:
        yield "error", "no LoRA factors in the file", "adapter_model.safetensors", 0, "export another adapter"


def _uniform(checked: Subject) -> Iterator[Complaint]:
    """Both servers scale every module by the one alpha; vLLM by alpha / r of the configuration, too."""
    for key in ("rank_pattern", "alpha_pattern"):
        if pattern := checked.config.get(key):
            fix = "use --target vllm: it writes the same adapter with one rank and one scale"
            yield "error", "modules differ in rank or scale, which is not read", key, f"{len(pattern)} entries", fix
    stated, ranks = checked.config.get("r"), checked.ranks
    if ranks and not checked.config.get("rank_pattern") and ranks != {stated}:
        yield "error", f"the factors have rank {', '.join(map(str, sorted(ranks)))}", "r", stated, "save it with PEFT"


def _rank(checked: Subject) -> Iterator[Complaint]:
    rank = max(checked.ranks, default=0)
    if rank > MAX_LORA_RANKS[-1]:
        fix = f"train with adapter.rank of at most {MAX_LORA_RANKS[-1]}, or use --target merged"
        yield "error", f"rank above {MAX_LORA_RANKS[-1]}, the largest --max-lora-rank", "r", rank, fix


def _modules(checked: Subject) -> Iterator[Complaint]:
    name, modules = checked.architecture, checked.modules
    where = "target_modules"
    if name not in ADAPTS_HEAD:
        fix = "see vLLM's list of supported models for LoRA"
        yield "note", "which modules vLLM adapts of this architecture is not known here", "architectures", name, fix
        return
    if strange := sorted(modules - LINEAR - {"lm_head"}):
        yield "error", f"vLLM does not adapt these modules of {name}", where, ", ".join(strange), UNADAPTED
    if "lm_head" not in modules:
        return
    rows = checked.base.get("vocab_size", 0)
    if checked.base.get("tie_word_embeddings"):
        yield "error", "the head is adapted and shares its weights with the embedding", where, "lm_head", UNADAPTED
    elif not ADAPTS_HEAD[name]:
        yield "error", f"vLLM does not adapt the head of {name}", where, "lm_head", UNADAPTED
    elif rows > MAX_HEAD_ROWS:
        yield "error", f"vLLM adapts a head of at most {MAX_HEAD_ROWS} tokens", "vocab_size", rows, UNADAPTED
    else:
        what = f"the head is adapted: recent vLLM takes it for {name}, other servers and older releases may not"
        yield "note", what, where, "lm_head", "for every server: adapter.targets=all-linear"


def _base(checked: Subject) -> Iterator[Complaint]:
    if not checked.architecture:
        yield "error", "the base names no model class", "architectures", None, "make the base again"
    if checked.tokenizer is None:
        yield "error", "the base has no tokenizer files", " or ".join(TOKENIZERS), "missing", "make the base again"


def _precision(checked: Subject) -> Iterator[Complaint]:
    dtype = checked.base.get("dtype") or checked.base.get("torch_dtype")
    if dtype not in ("bfloat16", "float16"):
        fix = "serve with --dtype bfloat16, compare its rankings with `cladapt recommend`"
        yield "note", "vLLM applies adapters in 16 bits only, so close ranks may swap", "dtype", dtype, fix
    heads, size = checked.base.get("num_attention_heads"), checked.base.get("hidden_size")
    width = checked.base.get("head_dim") or (size // heads if size and heads else None)
    if width is not None and (width < 32 or width > 256 or width % 8):
        fix = "needs a vLLM attention backend of this head size; bases of the presets have 32"
        yield "note", "a head size that several attention backends lack", "head_dim", width, fix


def _gguf_scale(checked: Subject) -> Iterator[Complaint]:
    if checked.config.get("use_rslora"):
        fix = "train with adapter.rslora=false, or use --target merged"
        yield "error", "llama.cpp scales by alpha / r, not by alpha / sqrt(r)", "use_rslora", True, fix


def _gguf_base(checked: Subject) -> Iterator[Complaint]:
    if checked.base.get("tie_word_embeddings") and "lm_head" in checked.modules:
        yield (
            "error",
            "the head is adapted and shares its weights with the embedding",
            "target_modules",
            "lm_head",
            (UNADAPTED),
        )
    if checked.tokenizer not in ("BPE", "Unigram", "", None):
        fix = "start from a pretrained model: cladapt base init"
        yield (
            "error",
            "the converter of the base does not know this tokenizer",
            "tokenizer.json",
            checked.tokenizer,
            (fix),
        )


RULES: Mapping[str, tuple[Rule, ...]] = {
    "vllm": (_kind, _features, _names, _uniform, _rank, _modules, _base, _precision),
    "llama.cpp": (_kind, _features, _names, _uniform, _gguf_scale, _base, _gguf_base),
}
