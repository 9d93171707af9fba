"""Files are written atomically; disk errors state a remedy."""

import errno
import os
import stat

import pytest

from jlora.errors import StorageError
from jlora.files import storage_errors, write_atomic


def test_replaces_the_content_and_leaves_no_other_file(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_atomic(path, "one")
    write_atomic(path, "zwölf")
    assert path.read_bytes() == "zwölf".encode()
    assert os.listdir(path.parent) == ["a.txt"]
    (path.parent / "plain").write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((path.parent / "plain").stat().st_mode)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch, code, words):
    path = tmp_path / "a.txt"
    write_atomic(path, "old")

    def fail(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match=words) as caught:
        write_atomic(path, "new")
    assert caught.value.where == str(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_permission_is_its_own_remedy():
    with pytest.raises(StorageError, match="you may write"), storage_errors("/out"):
        raise PermissionError(errno.EACCES, "Permission denied")
