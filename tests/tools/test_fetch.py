"""Files of the hub are fetched once, whole, by one process, and are then enough without a network."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import resource
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import FakeHub, fake_hub
from helpers import NARROW, make_ssl_folder, narrow_recipe
from huggingface_hub import constants

from rvc_dist import __main__ as cli
from rvc_dist.choices import BASE_MODELS, DISCRIMINATORS, BaseModelSpec
from rvc_dist.config import DataConfig
from rvc_dist.features import hub as hub_module
from rvc_dist.features import rmvpe
from rvc_dist.features.extractor import Extractor
from rvc_dist.features.hub import hub_file
from rvc_dist.models.discriminator import MultiPeriodDiscriminator
from rvc_dist.models.generator import Generator
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.models.state_dict import to_upstream
from rvc_dist.train import networks
from rvc_dist.train.dataset import ClipTable
from rvc_dist.workspace import Shard, StageError

REPOSITORY = "owner/files"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with a few files, and an empty cache, in this process."""
    folder = tmp_path / "hub"
    (folder / REPOSITORY).mkdir(parents=True)
    (folder / REPOSITORY / "config.json").write_text('{"a": 1}')
    (folder / REPOSITORY / "weights.bin").write_bytes(bytes(range(256)) * 400)
    with fake_hub(folder) as server:
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(time, "sleep", lambda _: None)  # between the attempts of huggingface_hub
        hub_module.hub_silence.cache_clear()
        yield server
    hub_module.hub_silence.cache_clear()


def words(folder: Path) -> list[str]:
    """A recipe of a narrow encoder and tracker of the fake hub, and of a base model."""
    recipe = narrow_recipe(folder)
    config = folder / "recipe.yaml"
    config.write_text(recipe.to_yaml())
    hub_names = ["--extract.embedder_model", "owner/encoder", "--extract.f0_model", "owner/files/rmvpe.pt"]
    return ["fetch", "--config", str(config), "--extract.f0_method", "rmvpe", "--data.sample_rate", "48000", *hub_names]


def fill(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the recipe needs, all of it narrow."""
    make_ssl_folder(folder / "owner" / "encoder", "Hubert", num_layers=2)
    monkeypatch.setattr(rmvpe, "TOP_CHANNELS", 2)
    monkeypatch.setattr(rmvpe, "BLOCKS", 1)
    torch.save(rmvpe.RMVPE().state_dict(), folder / REPOSITORY / "rmvpe.pt")
    recipe = narrow_recipe(folder, data=DataConfig(sample_rate=48000))
    modules = {
        "G": Generator(GeneratorShape.from_recipe(recipe, 16, 109)),
        "D": MultiPeriodDiscriminator(DISCRIMINATORS["v2"], NARROW.discriminator_channels),
    }
    target = folder / "owner" / "base"
    target.mkdir(parents=True)
    for letter, module in modules.items():
        torch.save({"model": to_upstream(module.state_dict())}, target / f"f0{letter}48k.pth")
    # One hash is published, of the other there is only the hub's own.
    hashes = {"f0G48k.pth": hashlib.sha256((target / "f0G48k.pth").read_bytes()).hexdigest(), "f0D48k.pth": ""}
    spec = BaseModelSpec("owner/base", {"v2": "{f0}{network}{k}k.pth"}, hashes)
    monkeypatch.setitem(BASE_MODELS, "ours", spec)


def test_all_that_a_recipe_needs_is_fetched_and_then_enough_without_network(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill(hub.folder, monkeypatch)
    command = [*words(tmp_path), "--train.pretrained", "ours"]
    assert cli.main(command) == 0
    files = ["config.json", "f0D48k.pth", "f0G48k.pth", "model.safetensors", "rmvpe.pt"]
    assert sorted(hub.given) == files
    assert "fetch: all that the recipe needs of the hub is there (5 files" in caplog.text
    assert cli.main(command) == 0
    assert len(hub.given) == 5
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    recipe = cli.parse("fetch", command[1:])[0]
    assert Extractor.load(recipe, device=torch.device("cpu")).embedder.name == "owner/encoder"
    networks.build(recipe, ClipTable((), (), 16, {"name": "owner/encoder", "width": 16, "hash": ""}, 1))
    assert cli.main(command) == 0


def test_a_base_model_must_have_its_published_hash(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fill(hub.folder, monkeypatch)
    hashes = BASE_MODELS["rvc"].hashes
    monkeypatch.setitem(
        BASE_MODELS,
        "ours",
        BASE_MODELS["ours"]._replace(
            hashes={name: hashes[f"pretrained_v2/{name}"] for name in ("f0G48k.pth", "f0D48k.pth")}
        ),
    )
    assert cli.main([*words(tmp_path), "--train.pretrained", "ours"]) == 1
    err = capfd.readouterr().err
    assert "rvc-dist fetch: 2 of what the recipe needs cannot be had" in err
    for name, wanted in (("generator", "b5d51f589cc3632d"), ("discriminator", "2269b73c7a4cf34d")):
        assert f"train.pretrained: the {name} of ours cannot be had" in err
        assert f"expected {wanted}..." in err
    assert not list((tmp_path / "cache").glob("models--owner--base/blobs/*"))  # nothing that could be taken for it


def test_only_one_rank_of_a_host_fetches(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rvc_dist.tools import fetch

    recipe = cli.parse("fetch", words(tmp_path)[1:])[0]
    monkeypatch.setenv("LOCAL_RANK", "1")
    fetch.run(recipe, Shard(3, 4))
    assert hub.given == []
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(StageError, match="2 of what the recipe needs cannot be had"):
        fetch.run(recipe, Shard(2, 4))


@pytest.mark.parametrize(
    ("fault", "name", "reason"),
    [
        ("wrong", "weights.bin", r"102400 bytes and the hash .*, expected"),
        ("wrong", "config.json", r"8 bytes and the hash .*, expected"),
        ("short", "weights.bin", "."),
        ("", "missing.bin", "Entry Not Found"),
    ],
)
def test_a_damaged_short_or_missing_download_is_one_sentence_and_leaves_nothing(
    hub: FakeHub, tmp_path: Path, fault: str, name: str, reason: str
) -> None:
    hub.fault = fault
    with pytest.raises(FileNotFoundError, match=rf"{name} of owner/files is not in the cache .*{hub.url} .*{reason}"):
        hub_file(REPOSITORY, name)
    assert not list((tmp_path / "cache").glob("models--*/blobs/[0-9a-f]*[0-9a-f]"))
    hub.fault = ""
    if name != "missing.bin":
        assert hub_file(REPOSITORY, name).read_bytes() == (hub.folder / REPOSITORY / name).read_bytes()


def test_a_file_that_was_damaged_in_the_cache_is_fetched_again_or_named_without_network(
    hub: FakeHub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = hub_file(REPOSITORY, "weights.bin")
    whole = path.read_bytes()
    path.resolve().write_bytes(whole[:-7])
    assert hub_file(REPOSITORY, "weights.bin") == path  # as every stage does: nothing is read twice
    with hub_module.checked() as files:
        assert hub_file(REPOSITORY, "weights.bin").read_bytes() == whole
    assert files == [path]
    assert "weights.bin: damaged: it has 102393 bytes" in caplog.text
    path.resolve().write_bytes(whole[:-7])
    damaged = r"the file there is damaged: it has 102393 bytes"
    with monkeypatch.context() as without, hub_module.checked():  # nothing is removed that cannot be had again
        without.setattr(constants, "HF_HUB_OFFLINE", True)
        for _ in range(2):
            with pytest.raises(FileNotFoundError, match=rf"{damaged} .*; and HF_HUB_OFFLINE is set"):
                hub_file(REPOSITORY, "weights.bin")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    hub_module.hub_silence.cache_clear()
    with hub_module.checked():
        for _ in range(2):
            with pytest.raises(FileNotFoundError, match=rf"{damaged} .*; and http://127\.0\.0\.1:9 did not .*refused"):
                hub_file(REPOSITORY, "weights.bin")


def test_a_disk_without_room_is_one_sentence(hub: FakeHub, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(
            StageError, match=r"weights\.bin of owner/files cannot be written to the cache .*; .* MB free"
        ):
            hub_file(REPOSITORY, "weights.bin")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(tmp_path) in constants.HF_HUB_CACHE


def test_processes_that_want_the_same_file_download_it_once_from_a_mirror(hub: FakeHub, tmp_path: Path) -> None:
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache")}
    environment.pop("CI", None)
    code = "from rvc_dist.features.hub import hub_file; from rvc_dist.screen import set_up_logging; "
    code += "from rvc_dist.workspace import Shard; set_up_logging(Shard()); "
    code += f"print(hub_file({REPOSITORY!r}, 'weights.bin'))"
    hub.delay.clear()
    terminal, end = os.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    options: dict[str, Any] = {"env": environment, "stdout": subprocess.PIPE, "stderr": end, "text": True}
    options["env"] |= {"TERM": "xterm"}
    ranks = [subprocess.Popen([sys.executable, "-c", code], **options) for _ in range(2)]
    while not hub.given and all(rank.poll() is None for rank in ranks):
        hub.delay.wait(0.05)
    hub.delay.wait(1.0)  # the other waits for the first by then, or comes after it
    hub.delay.set()
    found = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert hub.given == ["weights.bin"]
    assert found[0] == found[1]
    os.set_blocking(terminal, False)
    shown = b""
    with contextlib.suppress(BlockingIOError):
        while True:
            shown += os.read(terminal, 1 << 16)
    assert b"fetching weights.bin \x1b[" in shown, "a bar, once the hub has said how long the file is"
    assert b"0%, 0/0 MB" in shown
    os.close(terminal)
    os.close(end)
