"""Image streams: reading folders and archives, cutting classes into blocks, and what a directory must hold."""

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cladapt.artifacts import write_tensors
from cladapt.data.images import ImageSet, ImageStream, digits_stream, make_stream, read_image_folder
from cladapt.errors import ConfigError, DataError


def png(value: int, side: int = 4, mode: str = "L") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (side, side), value if mode == "L" else (value, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


FILES = {
    "a/one/1.png": png(10),
    "a/one/2.png": png(20),
    "a/two/1.PNG": png(30),
    "b/one/1.jpg": png(40),
    "readme.txt": b"words",
}


@pytest.fixture(params=["folder", "zip", "zip with its own folder"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param != "folder":
        above = "images/" if request.param != "zip" else ""
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            for name, content in FILES.items():
                archive.writestr(above + name, content)
        return tmp_path / "images.zip"
    for name, content in FILES.items():
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(content)
    return tmp_path / "images"


def images(classes: int, each: int = 10) -> ImageSet:
    label = np.repeat(np.arange(classes), each)
    pixels = np.zeros((len(label), 2, 2, 1), dtype=np.uint8)
    pixels[:, 0, 0, 0], pixels[:, 1, 1, 0] = label, np.tile(np.arange(each), classes)
    return ImageSet(pixels, label, tuple(f"class {c}" for c in range(classes)))


def test_every_inner_folder_is_a_class_named_by_its_path_inside(source: Path) -> None:
    found = read_image_folder(source, 4)
    assert found.classes == ("a/one", "a/two", "b/one")
    assert found.label.tolist() == [0, 0, 1, 2]
    assert found.images.shape == (4, 4, 4, 1)
    assert found.images[:3, 0, 0, 0].tolist() == [10, 20, 30]
    assert found.ignored == 1
    inverted = read_image_folder(source, 4, invert=True)
    assert np.array_equal(inverted.images, 255 - found.images)
    assert read_image_folder(source, 2, 3).images.shape == (4, 2, 2, 3)


def test_a_smaller_image_is_the_mean_over_areas(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "c" / "1.png")
    found = read_image_folder(tmp_path, 4).images[0, :, :, 0]
    expected = pixels.reshape(4, 3, 4, 3).mean(axis=(1, 3))
    assert np.abs(found - expected).max() <= 1.0  # rounded along the rows, then along the columns


@pytest.mark.parametrize("blocks", [1, 3, 5])
def test_classes_are_cut_into_blocks_that_differ_by_one_and_splits_are_shares_of_each(blocks: int) -> None:
    stream = make_stream(images(11), blocks, seed=4)
    sizes = [len(stream.classes_of(b)) for b in range(1, blocks + 1)]
    assert sum(sizes) == 11
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    for c in range(11):
        own = stream.split[stream.label == c]
        assert [(own == s).sum() for s in range(3)] == [7, 1, 2]  # round half to even: 2 of 10 are tested on
        # the label in the pixels is the class's old number, which its name tells
        assert {f"class {p}" for p in stream.images[stream.label == c, 0, 0, 0]} == {stream.classes[c]}
    assert sorted(stream.images[:, [0, 1], [0, 1], 0].tolist()) == sorted(
        images(11).images[:, [0, 1], [0, 1], 0].tolist()
    )
    assert stream.seen(blocks).tolist() == list(range(11))
    rows = np.concatenate([stream.rows(b, s) for b in range(1, blocks + 1) for s in ("train", "valid", "test")])
    assert sorted(rows) == list(range(110))


def test_the_seed_alone_decides_the_stream() -> None:
    prints = [make_stream(images(6), 2, seed).fingerprint for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


def test_excluded_classes_are_left_out_and_a_share_of_zero_takes_none() -> None:
    stream = make_stream(images(6), 1, 0, test=0.0, exclude=["class 2", "class 5", "unknown"])
    assert set(stream.classes) == {"class 0", "class 1", "class 3", "class 4"}
    assert len(stream.rows(1, "test")) == 0
    assert len(stream.rows(1, "valid")) == 4


def test_a_stream_goes_through_its_directory(tmp_path: Path) -> None:
    stream = make_stream(images(5), 2, 0)
    stream.save(tmp_path / "s", source="made up", license_note="none")
    again = ImageStream.load(tmp_path / "s")
    assert again.fingerprint == stream.fingerprint
    assert np.array_equal(again.images, stream.images)
    assert (again.classes, again.n_blocks) == (stream.classes, 2)
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert (manifest["kind"], manifest["source"], manifest["licence"]) == ("images", "made up", "none")


def test_the_digits_are_all_there() -> None:
    stream = digits_stream(0)
    assert stream.images.shape == (1797, 8, 8, 1)
    assert [len(stream.classes_of(b)) for b in range(1, 6)] == [2] * 5
    assert stream.images.max() == 255


def test_omniglot_has_106_characters_that_the_smaller_set_lacks(real_data: Callable[[str], Path]) -> None:
    omniglot = real_data("omniglot")
    one, two = (read_image_folder(omniglot / f"images_background_small{n}.zip", 28, invert=True) for n in (1, 2))
    assert (len(one.classes), len(one.images)) == (136, 2720)
    stream = make_stream(two, 10, 0, exclude=one.classes)
    assert len(stream.classes) == 106
    assert {name.split("/")[0] for name in stream.classes} == {"Japanese_(katakana)", "Sanskrit", "Tagalog"}
    assert stream.images.mean() < 128  # light ink on black


def broken(tmp_path: Path, name: str, content: bytes) -> Path:
    (tmp_path / "c").mkdir(exist_ok=True)
    (tmp_path / "c" / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no image", r"c/1\.png cannot be read"),
        (png(1)[:-20], r"c/1\.png cannot be read"),
        (b"", r"c/1\.png cannot be read"),
    ],
)
def test_an_image_that_cannot_be_read_is_told_not_dropped(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_image_folder(broken(tmp_path, "1.png", content), 4)


def test_an_image_as_large_as_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match="exceeds limit of 10 pixels"):
        read_image_folder(broken(tmp_path, "1.png", png(1)), 4)


def test_what_holds_no_images_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no image \(1 other files\)"):
        read_image_folder(broken(tmp_path, "notes.txt", b"x"), 4)
    with pytest.raises(DataError, match="no such folder or archive"):
        read_image_folder(tmp_path / "nowhere", 4)
    (tmp_path / "bad.zip").write_bytes(b"PK nonsense")
    with pytest.raises(DataError, match=r"bad\.zip: cannot read the archive"):
        read_image_folder(tmp_path / "bad.zip", 4)
    (tmp_path / "c" / "1.png").symlink_to("nowhere.png")
    with pytest.raises(DataError, match=r"c/1\.png cannot be read: No such file"):
        read_image_folder(tmp_path, 4)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_an_archive_holds_twice_is_told(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        archive.writestr("c/1.png", png(1))
        archive.writestr("c/1.png", png(2))
    with pytest.raises(DataError, match=r"holds c/1\.png twice"):
        read_image_folder(tmp_path / "twice.zip", 4)


def archive_of(folder: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(folder / "some.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return folder / "some.zip"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"../c/1.png": png(1)}, r"holds \.\./c/1\.png, a path that leads out of it"),
        ({"/c/1.png": png(1)}, r"a path that leads out of it"),
        ({"c/1.png": png(1), "./c//1.png": png(2)}, r"holds c/1\.png twice"),
        ({"c/1.png": png(1), "2.png": png(2)}, r"2\.png is in no folder, so it has no class"),
    ],
)
def test_an_archive_with_misleading_names_is_refused(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_image_folder(archive_of(tmp_path, files), 4)


def test_a_damaged_entry_of_an_archive_is_told(tmp_path: Path) -> None:
    path = archive_of(tmp_path, {"c/1.png": bytes(range(256)) * 200})
    content = bytearray(path.read_bytes())
    content[60:120] = b"\xff" * 60
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"some\.zip: cannot read the archive"):
        read_image_folder(path, 4)


def test_an_entry_too_large_is_refused_and_what_is_no_image_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cladapt.data.images.LARGEST", 1000)
    path = archive_of(tmp_path, {"c/1.png": png(1), "notes.txt": b"x" * 2000})
    assert read_image_folder(path, 4).ignored == 1
    with pytest.raises(DataError, match=r"c/2\.png has 2000 bytes"):
        read_image_folder(archive_of(tmp_path, {"c/2.png": b"x" * 2000}), 4)


def test_sixteen_bits_are_refused_and_transparency_lies_on_white(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray((np.arange(16).reshape(4, 4) * 4096).astype(np.uint16)).save(buffer, "png")
    with pytest.raises(DataError, match="more than 8 bits per value"):
        read_image_folder(broken(tmp_path, "1.png", buffer.getvalue()), 4)
    ink = np.zeros((4, 4, 4), dtype=np.uint8)
    ink[0, 0, 3] = 255
    Image.fromarray(ink).save(tmp_path / "c" / "1.png")
    expected = np.full((4, 4), 255)
    expected[0, 0] = 0
    assert np.array_equal(read_image_folder(tmp_path, 4).images[0, :, :, 0], expected)


def test_shares_that_are_none_are_told() -> None:
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match=f"test={share}"):
            make_stream(images(4), 2, 0, test=share)


def test_classes_too_small_or_too_few_are_told() -> None:
    with pytest.raises(DataError, match="has 2 images, too few"):
        make_stream(images(4, each=2), 2, 0)
    with pytest.raises(ConfigError, match="5 blocks of 4 classes"):
        make_stream(images(4), 5, 0)


def rewrite(name: str, change: Callable[[dict], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        record = json.loads((folder / name).read_text())
        change(record)
        (folder / name).write_text(json.dumps(record))

    return damage


def other_images(folder: Path) -> None:
    write_tensors(folder / "images.safetensors", {"images": torch.zeros(3, 2, 2, 1, dtype=torch.uint8)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: os.remove(folder / "manifest.json"), "is not an image stream"),
        (lambda folder: os.remove(folder / "classes.parquet"), r"no such file: .*classes\.parquet"),
        (other_images, r"images\.safetensors has the hash"),
        (rewrite("manifest.json", lambda m: m.update(kind="interactions")), "kind"),
        (rewrite("manifest.json", lambda m: m.pop("hashes")), "hashes"),
        (rewrite("manifest.json", lambda m: m.update(classes=9)), "holds 5 classes, not 9 as its manifest says"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), r"manifest\.json"),
    ],
)
def test_a_damaged_directory_is_told(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    make_stream(images(5), 2, 0).save(tmp_path / "s", source="x")
    damage(tmp_path / "s")
    with pytest.raises(DataError, match=message):
        ImageStream.load(tmp_path / "s")
