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
    source: Annotated[
        str, typer.Option("--from", help="Hugging Face id, checkpoint directory or .gguf file of a causal LM.")
    ],
    data: Data,
    out: Out,
    form: Annotated[str, typer.Option("--form", help="How histories become tokens: packed or prompt.")] = "packed",
    refit: Annotated[
        bool, typer.Option("--refit", help="Fit the ID rows of a source that has them already again, too.")
    ] = False,
    override: Overrides = None,
) -> dict[str, Any]:
    """Add the ID tokens to a pretrained causal LM, fit their rows on block 1 and write a base+tokens directory."""
    from cladapt.config import InitConfig, resolve
    from cladapt.pipeline import bases

    config = resolve(InitConfig, overrides_of(override, "base"), "base init")
    return bases.init_base(source, data, out, form, config, Progress(), refit)


@verb(app)
def tune(
    source: Annotated[
        str, typer.Option("--from", help="A base of `base init`, or a Hugging Face id, checkpoint or .gguf file.")
    ],
    data: Data,
    out: Out,
    rank: Annotated[
        int | None, typer.Option("--rank", help="Tune a LoRA of this rank and the ID rows instead of all weights.")
    ] = None,
    form: Annotated[
        str | None, typer.Option("--form", help="Histories as packed or prompt.", show_default="packed")
    ] = None,
    override: Overrides = None,
) -> dict[str, Any]:
    """Fit a pretrained causal LM on block 1 and write a base+tokens directory; stopped and given again, it goes on."""
    from cladapt.config import TuneConfig, resolve
    from cladapt.pipeline import bases

    named = {key: value for key, value in (("rank", rank), ("form", form)) if value is not None}
    config = resolve(TuneConfig, overrides_of(override, "tune") | named, "base tune")
    return bases.tune_base(source, data, out, config, Progress())


@verb(app)
def vision(
    data: Annotated[Path, typer.Option("--data", help="Image stream that the base is for.")],
    out: Annotated[Path, typer.Option("--out", help="Vision base directory to write.")],
    source: Annotated[
        Path | None, typer.Option("--source", help="Folder or .zip of other images to train it on, all classes.")
    ] = None,
    init_from: Annotated[
        str | None, typer.Option("--from", help="Hugging Face id or directory of an image classifier, taken as it is.")
    ] = None,
    override: Overrides = None,
) -> dict[str, Any]:
    """Write the base of `train --task classify`; without --source or --from a small one trained on block 1."""
    from cladapt.config import VitConfig, resolve
    from cladapt.pipeline import images

    config = resolve(VitConfig, overrides_of(override, "base"), "base vision")
    return images.make_base(data, out, source, init_from, config, Progress())


@verb(app)
def sequential(
    data: Annotated[Path, typer.Option("--data", help="Stream directory, with or without semantic IDs.")],
    out: Annotated[Path, typer.Option("--out", help="Sequential base directory to write.")],
    backbone: Annotated[
        str | None, typer.Option("--backbone", show_default="sasrec", help="sasrec, gru4rec or bert4rec.")
    ] = None,
    override: Overrides = None,
) -> dict[str, Any]:
    """Write the base of `train --task sequential`: a sequential model trained from scratch on block 1."""
    from cladapt.config import resolve
    from cladapt.pipeline import bases
    from cladapt.sequential import SequentialBaseConfig

    values = overrides_of(override, "base") | ({} if backbone is None else {"backbone": backbone})
    return bases.sequential_base(data, out, resolve(SequentialBaseConfig, values, "base sequential"), Progress())


@verb(app)
def pretrain(
    data: Data,
    out: Out,
    preset: Annotated[str | None, typer.Option("--preset", show_default="tiny", help="tiny, small or medium.")] = None,
    override: Overrides = None,
) -> dict[str, Any]:
    """Train a small Llama-family model from scratch on block 1 and write a base+tokens directory."""
    from cladapt.config import PretrainConfig, resolve
    from cladapt.pipeline import bases

    values = overrides_of(override, "base") | ({} if preset is None else {"preset": preset})
    return bases.pretrain_base(data, out, resolve(PretrainConfig, values, "base pretrain"), Progress())
