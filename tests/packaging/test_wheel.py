"""The built wheel: exactly our packages, all of their files, the command and its metadata."""

import configparser
import re
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

from cladapt import __version__

pytest.importorskip("build", reason="the build tools come with the dev extra")
pytest.importorskip("hatchling", reason="the build tools come with the dev extra")

ROOT = Path(__file__).parents[2]
DIST_INFO = f"cladapt-{__version__}.dist-info"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this checkout."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = out.iterdir()
    assert path.name == f"cladapt-{__version__}-py3-none-any.whl"
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    """The wheel's METADATA."""
    return Parser().parsestr(wheel.read(f"{DIST_INFO}/METADATA").decode())


def test_top_level_names_are_exactly_ours(wheel: zipfile.ZipFile) -> None:
    names = {name.split("/")[0] for name in wheel.namelist()}
    assert names == {"cladapt", "cladapt_kernels", "cladapt_cli", DIST_INFO}


def test_every_source_file_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    sources = {
        str(path.relative_to(root))
        for root, package in ((ROOT, "cladapt"), (ROOT / "kernels", "cladapt_kernels"), (ROOT / "cli", "cladapt_cli"))
        for path in (root / package).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert sources == {name for name in wheel.namelist() if name.endswith((".py", "py.typed"))}


def test_the_routes_measured_on_gpus_are_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    folder = "cladapt_kernels/lora/routes"
    tables = {f"{folder}/{path.name}" for path in (ROOT / "kernels" / folder).glob("*.csv")}
    assert tables
    assert tables <= {*wheel.namelist()}


def test_the_command_is_the_only_entry_point(wheel: zipfile.ZipFile) -> None:
    parser = configparser.ConfigParser()
    parser.read_string(wheel.read(f"{DIST_INFO}/entry_points.txt").decode())
    assert {section: dict(parser[section]) for section in parser.sections()} == {
        "console_scripts": {"cladapt": "cladapt_cli.app:main"}
    }


def test_metadata_states_version_python_and_licence(wheel: zipfile.ZipFile, metadata: Message) -> None:
    assert (metadata["Name"], metadata["Version"], metadata["Requires-Python"]) == ("cladapt", __version__, ">=3.11")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in wheel.read(f"{DIST_INFO}/licenses/LICENSE").decode()


def test_every_extra_is_used_by_the_sources(metadata: Message) -> None:
    names = {"sentence-transformers": "sentence_transformers", "pillow": "PIL"}
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "cladapt").rglob("*.py"))
    extras: dict[str, list[str]] = {}
    for line in metadata.get_all("Requires-Dist", []):
        if match := re.search(r"^([\w.-]+).*extra == '(\w+)'", line):
            extras.setdefault(match[2], []).append(match[1])
    del extras["dev"]
    assert {*extras} == {"embed", "gguf", "images", "quant", "track"}
    used = re.compile(r"(?:import |from |find_spec\(\"|: \"(?:torch\.utils\.)?)(\w+)")
    imported = {*used.findall(sources)}
    assert [p for packages in extras.values() for p in packages if names.get(p, p) not in imported] == []


def test_triton_is_asked_for_on_linux_alone(metadata: Message) -> None:
    (triton,) = [line for line in metadata.get_all("Requires-Dist", []) if line.startswith("triton")]
    assert triton == "triton>=3.6; platform_system == 'Linux'"
