"""A stream before and after it has grown, and the base that both share."""

import shutil
from pathlib import Path

import pytest

from cladapt.config import PretrainConfig, SimulateConfig, TokensConfig
from cladapt.data.schema import Stream
from cladapt.data.simulate import simulate
from cladapt.pipeline import bases, streams
from cladapt.train.sinks import MemorySink

SIMULATE = SimulateConfig(users=50, items=40, topics=4, blocks=4, births=0.3)
TOKENS = TokensConfig(dimensions=8, levels=2, codes=4)


@pytest.fixture(scope="session")
def growth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`short` has two blocks; `stream` is the same after two more came, `whole` was made of the four at once."""
    folder = tmp_path_factory.mktemp("growth")
    whole = simulate(SIMULATE).stream
    whole.save(folder / "whole")
    streams.build_tokens(folder / "whole", TOKENS, None)
    whole.prefix(2).save(folder / "short")
    streams.build_tokens(folder / "short", TOKENS, None)
    bases.pretrain_base(folder / "short", folder / "base", PretrainConfig(epochs=1), MemorySink())
    shutil.copytree(folder / "short", folder / "stream")
    grow(folder / "stream")
    return folder


def grow(folder: Path) -> None:
    """Let the two blocks come that `short` lacks."""
    whole, kept = simulate(SIMULATE).stream, Stream.load(folder).manifest
    Stream(whole.interactions, whole.items, kept).save_after(folder, 2)
    streams.extend_tokens(folder)
