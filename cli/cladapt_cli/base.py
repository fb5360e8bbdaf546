"""`cladapt base …`: the model that adapters are trained on."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cladapt_cli._verb import verb
from cladapt_cli.options import Overrides, overrides_of
from cladapt_cli.progress import Progress

app = typer.Typer(no_args_is_help=True, help="Make base+tokens directories.")
Data = Annotated[Path, typer.Option("--data", help="Stream directory with semantic IDs.")]
Out = Annotated[Path, typer.Option("--out", help="Base+tokens directory to write.")]


@verb(app)
def init(
    source: Annotated[str, typer.Option("--from", help="Hugging Face id or checkpoint directory of a causal LM.")],
    data: Data,
    out: Out,
    form: Annotated[str, typer.Option("--form", help="packed or prompt: how histories are written.")] = "prompt",
    override: Overrides = None,
) -> dict[str, Any]:
    """Add the ID tokens to a pretrained causal LM, fit their rows on block 1 and bake them in."""
    from cladapt.config import BaseConfig, resolve
    from cladapt.pipeline import bases

    config = resolve(BaseConfig, overrides_of(override), "base init")
    return bases.init_base(source, data, out, form, config, Progress())


@verb(app)
def pretrain(
    data: Data,
    out: Out,
    preset: Annotated[str | None, typer.Option("--preset", help="tiny, small or medium.")] = None,
    override: Overrides = None,
) -> dict[str, Any]:
    """Train a small Llama-family model from scratch on block 1."""
    from cladapt.config import BaseConfig, resolve
    from cladapt.pipeline import bases

    values = overrides_of(override) | ({} if preset is None else {"preset": preset})
    return bases.pretrain_base(data, out, resolve(BaseConfig, values, "base pretrain"), Progress())
