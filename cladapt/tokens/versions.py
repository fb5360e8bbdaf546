"""Versions of a stream's ID table: the first lies in the stream directory, every later one in a folder of its own.

`ids.json` names the one that counts and says how each came about. It is written last, so a refresh that is killed
leaves the table that it found. A version gains rows as the stream grows and never changes one; all are kept, for what
was made with them.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PositiveInt, model_validator

from cladapt.artifacts import read_record, write_json
from cladapt.errors import DataError

VERSIONS = "ids.json"
FOLDER = "ids"
_RESTORE = "restore the stream directory"


class Version(BaseModel):
    """How a version came about: what it was aligned with, and the last block that it was fitted on.

    `report`: what the refresh has changed, as it said then.
    """

    version: Annotated[int, Field(ge=2)]
    parent: PositiveInt
    through: PositiveInt
    aligned: bool
    fingerprint: str
    report: dict[str, Any] = {}


class Versions(BaseModel):
    """What ids.json must hold; a stream without it has version 1 alone."""

    schema_version: Literal[1] = 1
    current: PositiveInt = 1
    versions: list[Version] = []

    @model_validator(mode="after")
    def _in_order(self) -> "Versions":
        if [each.version for each in self.versions] != list(range(2, self.newest + 1)) or self.current > self.newest:
            raise ValueError("versions 2, 3, … in order, current one of them or 1")
        return self

    @property
    def newest(self) -> int:
        """The last version that was made, whichever is current."""
        return len(self.versions) + 1

    def get(self, version: int) -> Version | None:
        """How a version came about; None for the first."""
        return self.versions[version - 2] if version > 1 else None

    def through(self, version: int) -> int:
        """The last block that a version was fitted on."""
        found = self.get(version)
        return 1 if found is None else found.through


def versions_of(folder: Path) -> Versions:
    """The versions of a stream directory's ID table; `DataError` where `ids.json` is damaged."""
    if not os.path.lexists(folder / VERSIONS):
        return Versions()
    return Versions.model_validate(read_record(folder / VERSIONS, Versions, _RESTORE))


def save_versions(folder: Path, versions: Versions) -> None:
    """Write `ids.json`, by which the versions that it names count."""
    write_json(folder / VERSIONS, versions.model_dump(mode="json"))


def version_folder(folder: Path, version: int | None = None) -> Path:
    """Where the table of a version lies, and the encoder behind it; by default of the current one.

    `DataError` where the stream has no such version.
    """
    known = versions_of(folder)
    version = known.current if version is None else version
    if not 1 <= version <= known.newest:
        there = "version 1 alone" if known.newest == 1 else f"versions 1 to {known.newest}"
        raise DataError(
            f"{folder} has no version {version} of its IDs, it has {there}",
            "name the stream that the IDs were refreshed in, or one of these versions",
        )
    return folder_of(folder, version)


def folder_of(folder: Path, version: int) -> Path:
    """Where a version is kept, whether it is there or not."""
    return folder if version == 1 else folder / FOLDER / f"{version:05d}"
