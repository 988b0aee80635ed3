"""Files that are not local, with memory in place of a store."""

from pathlib import Path

import fsspec
import pytest

from kvlock_jax.errors import InputError
from kvlock_jax.media import storage


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path, memory):
    """A folder with files `a.txt` and `b/2.png`, `b/1.png`, `b/notes`, of either kind."""
    place = str(tmp_path) if request.param == "local" else "memory://work"
    for name, content in (("a.txt", b"a"), ("b/2.png", b"2"), ("b/1.png", b"1"), ("b/notes", b"n")):
        path = f"{place}/{name}"
        storage.make_folder(storage.parent(path))
        with fsspec.open(path, "wb") as file:
            file.write(content)
    return place


def test_names():
    assert storage.join("memory://", "a") == "memory://a"
    assert storage.join("/x", "a") == "/x/a" and storage.join("gs://b/x/", "a") == "gs://b/x/a"
    assert storage.parent("/x/a") == "/x" and storage.parent("gs://b/x/a") == "gs://b/x"
    assert storage.parent("memory://a") == "memory://"
    assert storage.resolve("~/a").endswith("/a") and "~" not in storage.resolve("~/a")
    assert storage.resolve("a", "/x/../y") == "/y/a"


def test_reading(folder):
    assert storage.read_bytes(f"{folder}/a.txt") == b"a"
    with storage.opened(f"{folder}/a.txt") as file:
        assert file.seek(1) == 1 and file.read() == b""
    assert storage.files(f"{folder}/a.txt", (".png",)) == [f"{folder}/a.txt"]
    assert storage.files(f"{folder}/b", (".png",)) == [f"{folder}/b/1.png", f"{folder}/b/2.png"]
    assert storage.sizes(folder) == {"a.txt": 1}
    assert storage.sizes(f"{folder}/absent") == {}


def test_copies(folder):
    with storage.local_copy(f"{folder}/a.txt", ()) as local:
        assert local.endswith("/a.txt") and Path(local).read_bytes() == b"a"
    with storage.local_copy(f"{folder}/b", (".png",)) as local:
        assert local.endswith("/b") and Path(local, "2.png").read_bytes() == b"2"


def test_a_copy_goes_when_it_is_done_with(memory, tmp_path):
    memory.pipe_file("/a.txt", b"a")
    with storage.local_copy("memory://a.txt", ()) as local:
        pass
    assert not (tmp_path / local).exists()


def test_upload_replaces(folder, tmp_path):
    local, part = tmp_path / "new", f"{folder}/.stage/a.txt"
    for content in (b"new", b"newer"):
        local.write_bytes(content)
        storage.upload(local, f"{folder}/a.txt", part)
        assert storage.read_bytes(f"{folder}/a.txt") == content
        assert not local.exists()
    assert storage.sizes(f"{folder}/.stage") == {}


def test_removal(folder):
    for name in ("a.txt", "b", "absent", "absent/too"):
        storage.remove(f"{folder}/{name}")
    assert storage.sizes(folder) == {} == storage.sizes(f"{folder}/b")


def test_identity_is_of_the_content(folder, memory):
    name = storage.identity(f"{folder}/a.txt")
    with fsspec.open(f"{folder}/copy", "wb") as file:
        file.write(b"a")
    assert storage.identity(f"{folder}/copy") == name != storage.identity(f"{folder}/b/1.png")
    assert name == "sha256:ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"


def test_a_store_is_asked_for_its_checksum(memory, monkeypatch):
    memory.pipe_file("/a.txt", b"a")
    known = memory.info("/a.txt") | {"md5Hash": "xyz"}
    monkeypatch.setattr(type(memory), "info", lambda self, path: known)
    monkeypatch.setattr(type(memory), "open", pytest.fail)
    assert storage.identity("memory://a.txt") == "md5Hash:xyz"


@pytest.mark.parametrize(
    "ask", [storage.read_bytes, storage.identity, lambda p: storage.files(p, ())]
)
def test_what_is_not_there(folder, ask):
    with pytest.raises(InputError, match="none: no such file or folder"):
        ask(f"{folder}/none")


def test_what_cannot_be(memory, no_gcsfs):
    with pytest.raises(InputError, match="memory://none: no such file"):
        storage.local_copy("memory://none", ()).__enter__()
    with pytest.raises(InputError, match=r"foo://x: cannot be read .*not known: foo"):
        storage.read_bytes("foo://x")
    with pytest.raises(InputError, match=r"gs://x/y: cannot be read .*gcsfs"):
        storage.read_bytes("gs://x/y")


def test_a_disk_that_takes_nothing(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be made"):
        storage.make_folder(str(tmp_path / "file" / "x"))
    with pytest.raises(InputError, match="cannot be written"):
        storage.upload(tmp_path / "file", str(tmp_path / "no" / "x"), "")


# --- names that are no patterns -----------------------------------------------------------------


@pytest.fixture
def odd(folder):
    """A folder of odd name with odd files, beside others that such patterns would match."""
    for name in ("runs[1]/a*.mp4", "runs[1]/a1.mp4", "runs1/a*.mp4", "runs1/0.json"):
        storage.make_folder(storage.parent(f"{folder}/{name}"))
        storage.write_bytes(f"{folder}/{name}", name.encode())
    return folder


def everything(folder) -> set[str]:
    system, place = fsspec.core.url_to_fs(folder)
    return {path.removeprefix(f"{place}/") for path in system.find(place) if "/runs" in path}


REST = {"runs[1]/a1.mp4", "runs1/a*.mp4", "runs1/0.json"}


def test_removal_takes_a_name_for_a_name(odd):
    storage.remove(f"{odd}/runs[1]/0.json")
    assert everything(odd) == {"runs[1]/a*.mp4", *REST}
    storage.remove(f"{odd}/runs[1]/a*.mp4")
    assert everything(odd) == REST
    storage.remove(f"{odd}/runs[1]")
    assert everything(odd) == {"runs1/a*.mp4", "runs1/0.json"}


def test_everything_takes_a_name_for_a_name(odd, tmp_path):
    path = f"{odd}/runs[1]/a*.mp4"
    assert storage.read_bytes(path) == b"runs[1]/a*.mp4"
    assert storage.files(f"{odd}/runs[1]", (".mp4",)) == [path, f"{odd}/runs[1]/a1.mp4"]
    assert storage.sizes(f"{odd}/runs[1]") == {"a*.mp4": 14, "a1.mp4": 14}
    with storage.local_copy(path, ()) as local:
        assert Path(local).name == "a*.mp4" and Path(local).read_bytes() == b"runs[1]/a*.mp4"
    with storage.local_copy(f"{odd}/runs[1]", (".mp4",)) as local:
        assert sorted(p.name for p in Path(local).iterdir()) == ["a*.mp4", "a1.mp4"]
    (tmp_path / "new").write_bytes(b"new")
    storage.upload(tmp_path / "new", path, f"{odd}/runs[1]/.part[1]*")
    assert storage.read_bytes(path) == b"new" and everything(odd) == {"runs[1]/a*.mp4", *REST}
    storage.check_writable(path)
    with storage.replacing(path) as part:
        Path(part).write_bytes(b"newer")
    assert storage.read_bytes(path) == b"newer" and everything(odd) == {"runs[1]/a*.mp4", *REST}


# --- probes -------------------------------------------------------------------------------------


def test_a_path_that_can_be_written_is_left_alone(folder):
    storage.check_writable(f"{folder}/a.txt")
    storage.check_writable(f"{folder}/new.txt")
    assert storage.sizes(folder) == {"a.txt": 1}


def test_paths_that_cannot_be_written(folder, tmp_path):
    with pytest.raises(InputError, match="b: is a folder, not a file to write"):
        storage.check_writable(f"{folder}/b")
    (tmp_path / "file").touch()
    for name, reason in (("file/x", "does not exist"), ("x" * 256, "File name too long")):
        with pytest.raises(InputError, match=reason):
            storage.check_writable(str(tmp_path / name))
    with pytest.raises(InputError, match="foo://x/y: cannot be written"):
        storage.check_writable("foo://x/y")


def test_a_temporary_name_is_never_too_long(tmp_path):
    for name in ("x" * 251 + ".mp4", "\u00e9" * 125 + ".mp4"):
        part = storage.temporary(str(tmp_path / name))
        assert len(Path(part).name.encode()) <= 75
        storage.write_bytes(str(tmp_path / name), b"x")


def test_a_full_disk_is_told_from_other_errors():
    try:
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise InputError("cannot be written") from error
    except InputError as error:
        assert storage.is_full(error)
    assert not storage.is_full(InputError("x")) and not storage.is_full(OSError(2, "none"))
