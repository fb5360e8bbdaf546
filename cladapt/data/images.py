"""Image streams: blocks of classes for class-incremental learning, from folders and archives of images.

A stream directory holds `images.safetensors`, `images.parquet` (label, split), `classes.parquet` (name, block) and
`manifest.json`. Images are small and whole in memory: uint8 [N, side, side, channels].
"""

import hashlib
import io
import itertools
import lzma
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from pydantic import BaseModel, NonNegativeInt

from cladapt.artifacts import (
    atomic_dir,
    hash_file,
    read_parquet,
    read_record,
    read_tensors,
    write_json,
    write_parquet,
    write_tensors,
)
from cladapt.errors import ConfigError, DataError, EnvironmentProblem

SPLITS = ("train", "valid", "test")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
FILES = ("images.safetensors", "images.parquet", "classes.parquet")
SCHEMA_VERSION = 1
LARGEST = 1 << 28
"""Bytes of one image file in an archive: a few kilobytes can unpack to gigabytes."""
AGAIN = "write the stream again with `cladapt data images`"
IMAGES = {"label": pl.Int64, "split": pl.Int8}
CLASSES = {"name": pl.String, "block": pl.Int64}


class ManifestRecord(BaseModel):
    """What the manifest of an image stream must hold."""

    kind: Literal["images"]
    schema_version: Literal[1]
    hashes: dict[str, str]
    inverted: bool
    images: NonNegativeInt
    classes: NonNegativeInt
    blocks: NonNegativeInt


@dataclass(frozen=True)
class ImageSet:
    """Labelled images before they are cut into blocks: uint8 [N, side, side, channels], int64 [N]."""

    images: np.ndarray
    label: np.ndarray
    classes: tuple[str, ...]
    inverted: bool = False
    ignored: int = 0
    """Files that are no images."""


@dataclass(frozen=True)
class ImageStream:
    """Images of classes that arrive in blocks; classes are numbered in the order of their blocks."""

    images: np.ndarray
    label: np.ndarray
    split: np.ndarray
    classes: tuple[str, ...]
    block_of_class: np.ndarray
    inverted: bool = False

    @property
    def n_blocks(self) -> int:
        return int(self.block_of_class.max())

    @cached_property
    def fingerprint(self) -> str:
        """Identity of images, labels, splits, classes and blocks."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for array in (self.images, self.label, self.split, self.block_of_class):
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]

    def rows(self, block: int, split: str) -> np.ndarray:
        """Row numbers of a block's images in a split."""
        own = self.block_of_class[self.label] == block
        return np.flatnonzero(own & (self.split == SPLITS.index(split)))

    def classes_of(self, block: int) -> np.ndarray:
        """Class numbers of a block."""
        return np.flatnonzero(self.block_of_class == block)

    def seen(self, block: int) -> np.ndarray:
        """Class numbers of all blocks up to this one."""
        return np.flatnonzero(self.block_of_class <= block)

    def save(self, folder: Path, source: str, license_note: str = "") -> None:
        """Write the stream directory, whole or not at all."""
        with atomic_dir(folder) as temporary:
            write_tensors(temporary / FILES[0], {"images": torch.from_numpy(self.images)})
            images = pl.DataFrame({"label": self.label, "split": self.split}, schema=IMAGES)
            write_parquet(temporary / FILES[1], images)
            classes = pl.DataFrame({"name": self.classes, "block": self.block_of_class}, schema=CLASSES)
            write_parquet(temporary / FILES[2], classes)
            record = {
                "kind": "images",
                "schema_version": SCHEMA_VERSION,
                "source": source,
                "licence": license_note,
                "inverted": self.inverted,
                "images": len(self.images),
                "classes": len(self.classes),
                "blocks": self.n_blocks,
                "hashes": {name: hash_file(temporary / name) for name in FILES},
            }
            write_json(temporary / "manifest.json", record)

    @classmethod
    def load(cls, folder: Path) -> "ImageStream":
        """Read a stream directory; `DataError` where a file is not the one that was written."""
        manifest = folder / "manifest.json"
        if not manifest.is_file():
            raise DataError(f"{folder} is not an image stream: it has no manifest.json", AGAIN)
        record = read_record(manifest, ManifestRecord, AGAIN)
        for name in FILES:
            path = folder / name
            if not path.is_file():
                raise DataError(f"no such file: {path}", AGAIN)
            if (found := hash_file(path)) != record["hashes"].get(name):
                raise DataError(f"{path} has the hash {found}, the manifest says {record['hashes'].get(name)}", AGAIN)
        images = read_tensors(folder / FILES[0]).get("images", torch.empty(0)).numpy()
        rows, classes = read_parquet(folder / FILES[1], IMAGES), read_parquet(folder / FILES[2], CLASSES)
        stream = cls(
            images,
            rows["label"].to_numpy(),
            rows["split"].to_numpy(),
            tuple(classes["name"]),
            classes["block"].to_numpy(),
            record.get("inverted", False),
        )
        _check(stream, folder)
        counts = {"images": len(images), "classes": len(stream.classes), "blocks": stream.n_blocks}
        if wrong := [f"{count} {name}, not {record[name]}" for name, count in counts.items() if count != record[name]]:
            raise DataError(f"{folder} holds {', '.join(wrong)} as its manifest says", AGAIN)
        return stream


def _check(stream: ImageStream, folder: Path) -> None:
    blocks = stream.block_of_class
    problems = {
        "images are not uint8 [N, side, side, 1 or 3]": stream.images.dtype != np.uint8
        or stream.images.ndim != 4
        or stream.images.shape[1] != stream.images.shape[2]
        or stream.images.shape[3] not in (1, 3),
        "there is not one label for each image": len(stream.images) != len(stream.label),
        "labels are not class numbers": bool(len(stream.label))
        and not (stream.label.min() >= 0 and stream.label.max() < len(stream.classes)),
        "splits are not 0, 1 or 2": not np.isin(stream.split, range(len(SPLITS))).all(),
        "blocks are not 1, 2, … in the order of the classes": not len(blocks)
        or not np.array_equal(np.unique(blocks), np.arange(1, blocks.max() + 1))
        or bool((np.diff(blocks) < 0).any()),
    }
    for text, wrong in problems.items():
        if wrong:
            raise DataError(f"{folder}: {text}", AGAIN)


def read_image_folder(source: Path, size: int, channels: int = 1, invert: bool = False) -> ImageSet:
    """Images below a folder or in a .zip, a class for every folder that holds some, resized to `size` x `size`.

    `invert`: 255 - value, for dark drawings on white. `DataError` for an image that cannot be read: none is dropped.
    """
    images, names, ignored = [], [], 0
    for name, content in _files(source):
        path = PurePosixPath(name)
        if content is None:
            ignored += 1
            continue
        if path.parent == PurePosixPath():
            raise DataError(f"{source}: {name} is in no folder, so it has no class", "move it into a class folder")
        images.append(_pixels(content, f"{source}: {name}", size, channels))
        names.append(str(path.parent))
    if not images:
        raise DataError(
            f"{source} holds no image ({ignored} other files)", f"expected class folders of {', '.join(SUFFIXES)} files"
        )
    classes, label = np.unique(_class_names(names, source), return_inverse=True)
    stacked = np.stack(images)
    return ImageSet(255 - stacked if invert else stacked, label, tuple(classes.tolist()), invert, ignored)


def _class_names(names: list[str], source: Path) -> list[str]:
    """Folder names, without the one that an archive's content often lies in and that bears the archive's name."""
    inside = source.is_file() and all(name.split("/")[0] == source.stem for name in names)
    return [name.removeprefix(f"{source.stem}/") for name in names] if inside else names


def _files(source: Path) -> Iterator[tuple[str, bytes | None]]:
    """Path inside the source and content of every file, in the order of the paths; None for what is no image."""
    if source.is_dir():
        for path in sorted(p for p in source.rglob("*") if not p.is_dir()):
            try:
                yield path.relative_to(source).as_posix(), path.read_bytes() if _is_image(path) else None
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}", "mend or remove this file") from error
        return
    if not source.is_file():
        raise DataError(f"no such folder or archive: {source}", "check the path")
    try:
        with zipfile.ZipFile(source) as archive:
            found = [(PurePosixPath(entry.filename), entry) for entry in archive.infolist() if not entry.is_dir()]
            entries = sorted(found, key=lambda pair: str(pair[0]))
            if twice := next((a for (a, _), (b, _) in itertools.pairwise(entries) if a == b), None):
                raise DataError(f"{source} holds {twice} twice", "make the archive again")
            for name, entry in entries:
                if name.is_absolute() or ".." in name.parts:
                    raise DataError(f"{source} holds {name}, a path that leads out of it", "make the archive again")
                if _is_image(name) and entry.file_size > LARGEST:
                    raise DataError(f"{source}: {name} has {entry.file_size} bytes", f"at most {LARGEST} are read")
                yield str(name), archive.read(entry) if _is_image(name) else None
    except (zipfile.BadZipFile, OSError, RuntimeError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{source}: cannot read the archive: {error}", "give a folder, or a whole .zip") from error


def _is_image(path: PurePath) -> bool:
    return path.suffix.lower() in SUFFIXES


def _pixels(content: bytes, where: str, size: int, channels: int) -> np.ndarray:
    """uint8 [size, size, channels]"""
    try:
        from PIL import Image
    except ImportError as error:
        raise EnvironmentProblem("reading images needs Pillow", "pip install 'cladapt[images]'") from error

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as image:
                if image.mode.startswith(("I", "F")):
                    raise ValueError(f"mode {image.mode}, more than 8 bits per value, would be cut off at 255")
                if image.has_transparency_data:  # what lies under transparent pixels is often black, as the ink is
                    rgba = image.convert("RGBA")
                    shown = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
                else:
                    shown = image
                grey = shown.convert("L" if channels == 1 else "RGB")
                # a reduced image keeps thin strokes only where areas are averaged
                small = grey if grey.size == (size, size) else grey.resize((size, size), Image.Resampling.BOX)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"{where} cannot be read: {error}", "mend or remove this image") from error
    return np.asarray(small, dtype=np.uint8).reshape(size, size, channels)


def make_stream(
    images: ImageSet, blocks: int, seed: int, test: float = 0.25, valid: float = 0.1, exclude: Iterable[str] = ()
) -> ImageStream:
    """Classes shuffled by the seed and cut into blocks that differ by one class at most; splits drawn class by class.

    `test` and `valid` are shares of each class, at least one image each; a share of 0 takes none.
    """
    if not (0.0 <= test < 1.0 and 0.0 <= valid < 1.0):
        raise ConfigError(f"test={test}, valid={valid}", "give shares of at least 0 and below 1")
    excluded = set(exclude)
    kept = [c for c, name in enumerate(images.classes) if name not in excluded]
    if not 1 <= blocks <= len(kept):
        raise ConfigError(f"{blocks} blocks of {len(kept)} classes", "use at least one block, and a class for each")
    rng = np.random.default_rng(seed)
    order = rng.permutation(kept)
    sizes = [len(kept) // blocks + (b < len(kept) % blocks) for b in range(blocks)]
    rows, label, split = [], [], []
    for number, c in enumerate(order):
        own = rng.permutation(np.flatnonzero(images.label == c))
        held = [max(1, round(share * len(own))) if share > 0 else 0 for share in (test, valid)]
        if len(own) <= sum(held):
            raise DataError(
                f"class {images.classes[c]!r} has {len(own)} images, too few to train, validate and test on",
                "leave it out, or give it more images",
            )
        marks = np.zeros(len(own), dtype=np.int8)
        marks[: held[0]], marks[held[0] : sum(held)] = 2, 1
        rows.append(own)
        split.append(marks)
        label.append(np.full(len(own), number))
    chosen = np.concatenate(rows)
    return ImageStream(
        images.images[chosen],
        np.concatenate(label),
        np.concatenate(split),
        tuple(images.classes[c] for c in order),
        np.repeat(np.arange(1, blocks + 1), sizes),
        images.inverted,
    )


def digits_stream(seed: int, blocks: int = 5) -> ImageStream:
    """scikit-learn's digits, 8 x 8 pixels, in blocks of classes."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = (digits.images[..., None] * (255.0 / 16.0)).round().astype(np.uint8)
    names = tuple(str(name) for name in digits.target_names)
    return make_stream(ImageSet(images, digits.target.astype(np.int64), names, True), blocks, seed)
