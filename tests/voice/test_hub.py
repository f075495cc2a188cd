"""The hub folder, read as ZeroRVC reads it, and push, against a hub of our own on this machine."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from helpers import changed, make_checkpoint, make_generator, narrow_recipe, workspace_of, write_features
from huggingface_hub import ModelCard, PyTorchModelHubMixin, constants
from torch import nn

from rvc_dist import __main__ as cli
from rvc_dist.config import Recipe
from rvc_dist.models.generator import Generator
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.models.state_dict import from_upstream, to_upstream
from rvc_dist.train import checkpoint
from rvc_dist.train.progress import Progress
from rvc_dist.voice import export, hub
from rvc_dist.voice.file import Voice
from rvc_dist.workspace import Shard, StageError

ALONE = Shard(0, 1)
FILES = {"README.md", "config.json", "model.safetensors", "tiny.pth"}


class Hub(http.server.ThreadingHTTPServer):
    """As much of the Hugging Face hub as a push asks for: one repository, in memory."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files: dict[str, bytes] | None = None
        """None: there is no repository yet."""
        self.blobs: dict[str, bytes] = {}
        """Large files by SHA-256."""
        self.uploads: list[str] = []
        self.commits: list[str] = []
        self.is_private = False
        self.token = "hf_right"
        self.always = b""
        """The answer to everything, where there is one."""
        self.url = f"http://127.0.0.1:{self.server_port}/me/tiny"


class Answers(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, data: object, status: int = 200) -> None:
        body = self.server.always or json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        oid = self.path.rpartition("/")[2]
        self.server.blobs[oid] = self.body()
        self.server.uploads.append(oid)
        self.answer({})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_GET(self) -> None:
        hub = self.server
        if hub.files is None:
            self.answer({"error": "Repository not found"}, 404)
        elif "/tree/" in self.path:
            tree = [{"type": "file", "path": n, "size": len(d), "oid": git_hash(d)} for n, d in hub.files.items()]
            self.answer(tree)
        else:
            self.answer({"id": "me/tiny", "sha": hub.commits[-1], "private": hub.is_private})

    def do_POST(self) -> None:
        hub, body = self.server, self.body()
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            self.answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            exists, asked = hub.files is not None, json.loads(body)
            if not exists:
                hub.files, hub.commits = {".gitattributes": b""}, [40 * "0"]
                hub.is_private = asked.get("private") is True or asked.get("visibility") == "private"
            self.answer({"url": self.server.url, "error": "exists"}, 409 if exists else 200)
        elif self.path == "/api/validate-yaml":
            self.answer({})
        elif "/preupload/" in self.path:
            self.answer({"files": [self.mode(file) for file in json.loads(body)["files"]]})
        elif self.path.endswith("/objects/batch"):
            objects = [self.upload(o) for o in json.loads(body)["objects"]]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            self.commit([json.loads(line) for line in body.splitlines()])
        else:
            self.answer({"error": self.path}, 500)

    def mode(self, file: dict[str, Any]) -> dict[str, Any]:
        is_large = file["path"].endswith((".pth", ".safetensors", ".index"))
        known = (self.server.files or {}).get(file["path"])
        digest = None if known is None else (hashlib.sha256(known).hexdigest() if is_large else git_hash(known))
        return {
            "path": file["path"],
            "uploadMode": "lfs" if is_large else "regular",
            "shouldIgnore": False,
            "oid": digest,
        }

    def upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        oid, size = wanted["oid"], wanted["size"]
        href = f"http://127.0.0.1:{self.server.server_port}/blob/{oid}"
        actions = {} if oid in self.server.blobs else {"actions": {"upload": {"href": href, "header": {}}}}
        return {"oid": oid, "size": size} | actions

    def commit(self, lines: list[dict[str, Any]]) -> None:
        hub = self.server
        assert hub.files is not None
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.files[value["path"]] = hub.blobs[value["oid"]]
        hub.commits.append(hashlib.sha1(str(len(hub.commits)).encode()).hexdigest())
        oid = hub.commits[-1]
        self.answer({"commitUrl": f"{self.server.url}/commit/{oid}", "commitOid": oid, "success": True})


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that the library is sent to, with a token that it accepts."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", server.token)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A trained run."""
    recipe = changed(narrow_recipe(tmp_path), "export", author="A. Singer")
    write_features(recipe, [[np.zeros((90, 768), np.float32)] * 2])
    workspace_of(recipe).save_recipe(recipe)
    save(recipe, 10)
    return recipe


def save(recipe: Recipe, step: int) -> Generator:
    generator = make_generator(recipe)
    with torch.no_grad():
        generator.emb_g.weight += step
    saved = make_checkpoint(recipe, generator, Progress(step=step, epoch=2))
    checkpoint.save(workspace_of(recipe).checkpoints_dir, saved)
    return generator


class Synthesizer(nn.Module, PyTorchModelHubMixin):  # type: ignore[misc]
    """A network with ZeroRVC's arguments and weights, and how its library reads a folder."""

    def __init__(
        self,
        spec_channels: int,
        segment_size: int,
        inter_channels: int,
        hidden_channels: int,
        filter_channels: int,
        n_heads: int,
        n_layers: int,
        kernel_size: int,
        p_dropout: float,
        resblock: str,
        resblock_kernel_sizes: list[int],
        resblock_dilation_sizes: list[list[int]],
        upsample_rates: list[int],
        upsample_initial_channel: int,
        upsample_kernel_sizes: list[int],
        spk_embed_dim: int,
        gin_channels: int,
        sr: int,
    ) -> None:
        super().__init__()
        arguments = [value for key, value in locals().items() if key not in ("self", "__class__")]
        shape = GeneratorShape.from_export_config(
            arguments, version="v2", f0=True, content_channels=768, vocoder="HiFi-GAN"
        )
        self.inner = Generator(shape)
        self.arguments = arguments

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        return self.inner.load_state_dict(from_upstream(state), strict=strict)

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return to_upstream(self.inner.state_dict())


def test_the_folder_is_read_by_from_pretrained(recipe: Recipe, tmp_path: Path) -> None:
    generator, folder = save(recipe, 20), tmp_path / "hub"
    export.run(changed(recipe, "export", format="hub", folder=str(folder)), ALONE)
    assert {path.name for path in folder.iterdir()} == FILES
    read = Synthesizer.from_pretrained(str(folder))
    assert read.arguments[0:2] == [513, generator.shape.segment_frames]
    for key, value in generator.state_dict().items():
        if not key.startswith("enc_q."):
            assert torch.equal(read.inner.state_dict()[key], value.half().float()), key
    voice = Voice.load(folder / "tiny.pth", torch.device("cpu"))
    assert torch.equal(voice.generator.state_dict()["emb_g.weight"], generator.emb_g.weight.half().float())
    card = ModelCard.load(folder / "README.md")
    assert (card.data.pipeline_tag, card.data.tags) == ("audio-to-audio", ["rvc", "voice-conversion"])
    for told in ("# tiny", "| sample rate | 24000 Hz |", "| content encoder | mfcc |", "| author | A. Singer |"):
        assert told in card.text
    config = json.loads((folder / "config.json").read_text())
    assert config["embedder_model"] == "mfcc"
    for file in folder.iterdir():  # nobody needs to know where things lie on this machine
        assert str(tmp_path).encode() not in file.read_bytes()


def push(recipe: Recipe) -> int:
    return cli.main(["push", recipe.run_dir, "me/tiny"])


def test_push_uploads_what_the_hub_lacks_and_nothing_twice(
    recipe: Recipe, server: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert push(recipe) == 0
    assert server.files is not None
    assert server.files.keys() == FILES | {".gitattributes"}
    assert (server.is_private, len(server.commits), len(server.uploads)) == (True, 2, 2)
    assert "me/tiny: 4 files" in caplog.text
    assert server.files["tiny.pth"][:2] == b"PK"
    with caplog.at_level(logging.INFO):
        assert push(recipe) == 0
    assert (len(server.commits), len(server.uploads)) == (2, 2)
    assert "me/tiny: has it already, nothing is uploaded" in caplog.text
    save(recipe, 20)
    assert push(recipe) == 0
    assert (len(server.commits), len(server.uploads)) == (3, 4)
    assert json.loads(server.files["config.json"])["step"] == 20
    assert not list(workspace_of(recipe).root.glob(".push*"))


def test_what_keeps_a_push_from_being_done_is_one_sentence(
    recipe: Recipe, server: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(repository: str = "me/tiny") -> str:
        assert cli.main(["push", recipe.run_dir, repository]) == cli.EXIT_FAILED
        return capsys.readouterr().err.splitlines()[-1]

    assert "push: 'a b' is no name of a repository; expected OWNER/NAME" in told("a b")
    server.token = "hf_other"
    assert re.search(r"push: http\S+ refuses me/tiny \(401\): the token is not valid$", told())
    server.token = "hf_right"
    server.files, server.commits = {"pytorch_model.bin": b""}, [40 * "0"]
    assert "push: me/tiny exists and holds other files (pytorch_model.bin); give a repository of" in told()
    assert not server.uploads
    for nonsense in (b"<html>log in</html>", b"[]", b"{}", b'{"url": 3}', b'[{"type": "file"}]'):
        server.always = nonsense
        assert re.search(r"push: http\S+ does not answer as the hub does \(.+\)$", told())
    monkeypatch.delenv("HF_TOKEN")
    assert "push: there is no token of the hub; log in with `hf auth login`, or set HF_TOKEN" in told()
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert re.search(r"push: http://127\.0\.0\.1:9 does not answer \(.*\); try again$", told())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "push: HF_HUB_OFFLINE is set, so the hub is not asked; unset it" in told()
    assert cli.main(["push", recipe.run_dir]) == cli.EXIT_USAGE
    assert "expected two: rvc-dist push RUN OWNER/NAME" in capsys.readouterr().err
    assert cli.main(["push", "/nowhere", "me/tiny"]) == cli.EXIT_USAGE
    assert "/nowhere/config.yaml does not exist" in capsys.readouterr().err


def test_a_run_that_was_not_trained_is_not_pushed(recipe: Recipe, server: Hub, tmp_path: Path) -> None:
    untrained = changed(narrow_recipe(tmp_path / "other"), "export", author="")
    with pytest.raises(StageError, match=r"checkpoints has no checkpoint: run `rvc-dist train` first"):
        hub.run(untrained, ALONE, "me/tiny")
    assert server.files is None
    assert huggingface_hub.__version__
