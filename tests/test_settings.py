"""Values that nothing reads are refused where something is made of them."""

import pytest

from cladapt.embedding import EmbeddingConfig
from cladapt.errors import ConfigError
from cladapt.sequential import SequentialBaseConfig, TableConfig
from cladapt.settings import Settings, resolve


@pytest.mark.parametrize(
    ("settings", "name", "reader"),
    [
        (EmbeddingConfig(components=8), "components=8", "reduce=pca, whiten or rec-pca"),
        (EmbeddingConfig(reduce="pca", smoothness=0.5), "smoothness=0.5", "reduce=rec-pca"),
        (EmbeddingConfig(neighbours=5), "neighbours=5", "reduce=rec-pca or embedding=cooccurrence"),
        (EmbeddingConfig(embedding="some/model", dimensions=8), "dimensions=8", "embedding=tfidf or cooccurrence"),
        (TableConfig(use="frozen"), "use=frozen", "table.source=llm"),
        (TableConfig(source="llm", whitening=0.5), "whitening=0.5", "table.reduction=rec-pca"),
        (TableConfig(source="llm", learned=8), "learned=8", "table.reduction=alphafuse"),
        (SequentialBaseConfig(mask=0.5), "mask=0.5", "backbone=bert4rec"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_value_that_nothing_reads_is_refused(settings: Settings, name: str, reader: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} changes nothing here: it is read with {reader} alone"):
        settings.refuse_unread()
    with pytest.raises(ConfigError, match=name):
        settings.refuse_unread([name.partition("=")[0]])
    settings.refuse_unread([])


@pytest.mark.parametrize(
    "settings",
    [
        EmbeddingConfig(),
        EmbeddingConfig(reduce="rec-pca", smoothness=0.5, components=8, neighbours=5),
        EmbeddingConfig(embedding="cooccurrence", dimensions=8, neighbours=5),
        TableConfig(embedding="some/model"),
        TableConfig(source="llm", reduction="alphafuse", learned=8),
        SequentialBaseConfig(backbone="bert4rec", mask=0.5),
    ],
)
def test_a_value_that_is_read_is_not(settings: Settings) -> None:
    settings.refuse_unread()


def test_alphafuse_freezes_a_direction() -> None:
    table = {"source": "llm", "reduction": "alphafuse", "learned": 64}
    with pytest.raises(ConfigError, match=r"table\.learned=64 leaves none of hidden=64 directions frozen"):
        resolve(SequentialBaseConfig, {"table": table})
