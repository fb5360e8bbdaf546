"""Folders of images to streams of classes, and the vision bases that learn them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cladapt.config import ImagesConfig, VitConfig
from cladapt.data.images import ImageStream, make_stream, read_image_folder
from cladapt.errors import ConfigError
from cladapt.export.place import refuse_existing
from cladapt.train.classes import describe_blocks, make_vision_base
from cladapt.train.sinks import Sink


def import_images(source: Path, out: Path, config: ImagesConfig, exclude: Sequence[Path] = ()) -> dict[str, Any]:
    """Read a folder or zip of images, a class for each inner folder, and write it as a stream of blocks of classes.

    `exclude`: sources whose classes, known by name, are left out.
    """
    refuse_existing(out)
    found = read_image_folder(source, config.size, config.channels, config.invert)
    known = {name for other in exclude for name in read_image_folder(other, 1).classes}
    if exclude and not known & {*found.classes}:
        own, theirs = found.classes[0], min(known)
        raise ConfigError(
            f"--exclude names no class of {source}: its classes are like {own!r}, theirs like {theirs!r}",
            "give sources whose folders are named alike, or leave out --exclude",
        )
    stream = make_stream(found, config.blocks, config.seed, exclude=known)
    stream.save(out, source=source.name)
    return {
        "stream": str(out),
        "images": len(stream.images),
        "classes": len(stream.classes),
        "excluded": len(set(found.classes) & known),
        "ignored_files": found.ignored,
        "blocks": describe_blocks(stream),
    }


def make_base(
    data: Path, out: Path, source: Path | None, init: str | None, config: VitConfig, sink: Sink
) -> dict[str, Any]:
    """Write a vision base for a stream; see `make_vision_base`."""
    refuse_existing(out)
    if source is not None and init is not None:
        raise ConfigError("--source and --init both say what the base is", "give one of them")
    return make_vision_base(ImageStream.load(data), out, source, init, config, sink)
