"""Objects and their checksums, against a real S3 server whose connections break."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import fsspec
import pytest
from object_store import URL, Faults, served

from rvc_dist.data import storage
from rvc_dist.data.storage import Manifest, Storage, Stored
from rvc_dist.workspace import StageError

NAME, DATA = "clips/00000.safetensors", bytes(range(256)) * 2000


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[dict[str, str], Faults]]:
    with served() as found:
        yield found


@pytest.fixture
def remote(
    server: tuple[dict[str, str], Faults], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[Storage, Faults, Stored]:
    """A storage that holds NAME; between attempts nobody sleeps."""
    environment, faults = server
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage.random, "uniform", lambda *_: 0.001)
    faults.next.clear()
    faults.asked.clear()
    (tmp_path / "data").write_bytes(DATA)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    made = Storage(URL)
    made.put(tmp_path / "data", NAME)
    return made, faults, Stored(size=len(DATA), sha256=sha256(DATA).hexdigest())


@pytest.mark.parametrize("fault", ["reset", "503", "truncated", "cut", "flipped", "stall"])
def test_a_fault_of_the_network_is_tried_again(
    remote, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, faults, stored = remote
    if fault == "stall":  # elsewhere a busy machine is no fault
        monkeypatch.setattr(storage, "STALL_S", 1.0)
    faults.next[NAME] = [fault]
    found.fetch(NAME, tmp_path / "clips" / "x", stored)
    assert (tmp_path / "clips" / "x").read_bytes() == DATA
    assert faults.asked[NAME] > 1
    assert [p.name for p in (tmp_path / "clips").iterdir()] == ["x"], "nothing half-written is left"


def test_a_connection_that_stays_lost_names_itself(remote, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found, faults, stored = remote
    faults.next[NAME] = ["reset"] * 1000
    with pytest.raises(StageError, match=rf"{URL}/{NAME} was not fetched 7 times \(.+\): see whether the storage ans"):
        found.fetch(NAME, tmp_path / "x", stored)
    assert caplog.text.count("again in") == storage.ATTEMPTS - 1
    assert not (tmp_path / "x").exists()


def test_an_object_that_changed_or_is_gone_is_no_fault_of_the_network(remote, tmp_path: Path) -> None:
    found, faults, stored = remote
    (tmp_path / "other").write_bytes(DATA[::-1])
    found.put(tmp_path / "other", NAME)
    with pytest.raises(StageError, match=r"3 times \(other bytes came than its manifest says.*`rvc-dist upload`"):
        found.fetch(NAME, tmp_path / "x", stored)
    faults.asked.clear()
    with pytest.raises(StageError, match=r"clips/00009.safetensors was not fetched \(there is no such object\)"):
        found.fetch("clips/00009.safetensors", tmp_path / "x", stored)
    assert not (tmp_path / "x").exists()


def test_what_is_there_is_listed_by_name_and_size(remote) -> None:
    assert remote[0].sizes() == {NAME: len(DATA)}
    assert Storage(URL + "/nothing").sizes() == {}


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install gcsfs")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(
        StageError, match=r"data.remote: gs://a/b needs the package gcsfs.*pip install gcsfs .*extra gcs"
    ):
        Storage("gs://a/b")


@pytest.mark.parametrize("name", ["../x", "clips/../../x.safetensors", "/etc/passwd", "clips/0001.safetensors", "a"])
def test_a_manifest_writes_nowhere_else(name: str, tmp_path: Path) -> None:
    (tmp_path / "m").write_text(
        f'{{"version": 1, "files": {{"{name}": {{"size": 1, "sha256": "{"0" * 64}"}}}}, "f0_medians": {{}}}}'
    )
    with pytest.raises(StageError, match="not a manifest of ours"):
        Manifest.read(tmp_path / "m", "s3://a/b/manifest.json")
