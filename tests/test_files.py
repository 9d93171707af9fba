"""Files are written atomically; disk errors state a remedy."""

import errno
import os
import stat

import pytest

from jlora.errors import ConfigError, StorageError
from jlora.files import check_output, staged_folder, storage_errors, write_atomic


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


RUST = "Error while serializing: I/O error: {words} (os error {code})"
TENSORSTORE = "OUT_OF_RANGE: Error writing local file: {words} [os_error_code='{code}']"


@pytest.mark.parametrize("text", [RUST, TENSORSTORE, "{words}"])
@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "the disk is full: 3.0 MiB needed, "),
        (errno.EDQUOT, "the disk is full .*quota.*: 3.0 MiB needed, "),
        (errno.EFBIG, "larger than the system allows: 3.0 MiB needed, "),
        (errno.EIO, "Input/output error"),
        (errno.EROFS, "Read-only file system"),
        (errno.EACCES, "permission denied"),
    ],
)
def test_errors_that_libraries_wrap_are_the_systems(tmp_path, text, code, words):
    said = text.format(code=code, words=os.strerror(code))
    file = tmp_path / "f"
    with pytest.raises(StorageError, match=words) as caught, storage_errors(file, 3 * 2**20):
        try:
            raise ValueError(said)
        except ValueError as error:
            raise ExceptionGroup("several", [RuntimeError("it failed"), error]) from None
    assert caught.value.where == str(file)
    assert ("MiB free" in caught.value.cause) == ("needed" in words)


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENOTDIR])
def test_a_folder_that_a_library_finds_removed_is_the_systems(code):
    words = os.strerror(code)
    with pytest.raises(StorageError, match=words), storage_errors("/out"):
        raise ValueError(RUST.format(words=words, code=code))


def test_other_errors_pass():
    with pytest.raises(ValueError, match="errno 111"), storage_errors("/out"):
        raise ValueError("connection refused (errno 111)")
    with pytest.raises(KeyError, match="bug"), storage_errors("/out"):
        try:
            raise PermissionError(errno.EACCES, "Permission denied")
        except PermissionError:
            raise KeyError("bug") from None
    with pytest.raises(KeyError, match="bug"), storage_errors("/out"):
        try:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", "a")
        except FileNotFoundError:
            raise KeyError("bug")  # noqa: B904


def test_a_staged_folder_is_all_or_nothing(tmp_path):
    out = tmp_path / "out"
    with staged_folder(out, last="a") as folder:
        (folder / "a").write_text("1")
        (folder / "deep").mkdir()
        (folder / "deep" / "b").write_text("1")
    assert sorted(os.listdir(out)) == ["a", "deep"] and os.listdir(out / "deep") == ["b"]
    with pytest.raises(StorageError) as caught, staged_folder(out) as folder:
        (folder / "a").write_text("2")
        with storage_errors(folder / "b"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert (out / "a").read_text() == "1" and sorted(os.listdir(out)) == ["a", "deep"]
    assert caught.value.where == str(out / "b")


def test_an_output_that_is_an_input_is_refused(tmp_path):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for out in (inner, tmp_path / "link" / "b", inner / ".." / "b", tmp_path / "a", tmp_path):
        with pytest.raises(ConfigError, match=r"the base.*would be overwritten"):
            check_output("out", out, {"the base": inner, "a hub name": "owner/name"})
    check_output("out", inner / "new", {"the base": inner, "nothing": None})
    check_output("out", tmp_path / "a", {"the base": inner}, above=False)
