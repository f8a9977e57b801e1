"""Files that are there whole or not at all."""

import os

from distillm_ext.files import move_into_place, write_text


def test_the_content_is_on_the_disk_before_the_name_and_the_name_before_the_call_returns(tmp_path, monkeypatch):
    calls, sync, replace = [], os.fsync, os.replace

    def noted_sync(handle):
        calls.append(("sync", os.fstat(handle).st_ino))
        sync(handle)

    def noted_replace(source, target):
        calls.append(("replace", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    (tmp_path / "a").write_text("before")
    (tmp_path / "new").write_text("after")
    content, folder = (tmp_path / "new").stat().st_ino, tmp_path.stat().st_ino
    move_into_place(tmp_path / "new", tmp_path / "a")
    assert calls == [("sync", content), ("replace", content), ("sync", folder)]
    assert (tmp_path / "a").read_text() == "after" and not (tmp_path / "new").exists()


def test_text_replaces_what_was_there_and_leaves_nothing_beside_it(tmp_path):
    for text in ("one\n", "zwei φ\n"):
        assert write_text(tmp_path / "a.md", text) == tmp_path / "a.md"
        assert (tmp_path / "a.md").read_bytes() == text.encode()
    assert [path.name for path in tmp_path.iterdir()] == ["a.md"]
