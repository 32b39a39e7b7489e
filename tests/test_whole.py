"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from selffl_ray.whole import remove_drafts, write_whole


def test_a_writer_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "deep" / "table.json"
    write_whole(path, lambda draft: draft.write_text("first"))

    def fail(draft):
        draft.write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_whole(path, fail)
    assert path.read_text() == "first"


def test_content_and_name_are_on_the_disk_when_the_call_returns(tmp_path, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.append(Path(f"/proc/self/fd/{fd}").readlink()), real(fd))
    )
    write_whole(tmp_path / "a.json", lambda draft: draft.write_text("{}"))
    assert synced == [tmp_path / f".a.json.{os.getpid()}", tmp_path]


def test_only_drafts_of_the_named_files_are_removed(tmp_path):
    kept = ("a.json", ".b.json.12", ".a.json.x1", ".a.json", "a.json.12", ".config")
    for name in (*kept, ".a.json.12", ".a.json.7"):
        (tmp_path / name).write_text("")
    (tmp_path / ".a.json.99").mkdir()
    remove_drafts(tmp_path, ["a.json", "other.json"])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted((*kept, ".a.json.99"))
