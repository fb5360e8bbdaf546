"""Lists of item or user ids that a person writes."""

from pathlib import Path

from cladapt.errors import DataError


def read_ids(path: Path, what: str) -> list[str]:
    """Ids of a text file, one per line; `what` they are is named in errors."""
    if not path.is_file():
        raise DataError(f"no such file: {path}", "check the path")
    try:
        ids = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read {path}: {error}", f"expected a UTF-8 text file, one {what} id per line"
        ) from error
    if not ids:
        raise DataError(f"{path} lists no {what}", f"write one {what} id per line")
    return ids
