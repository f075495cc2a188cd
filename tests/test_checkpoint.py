"""Checkpoints are whole or refused; pretrained weights fit or every misfit is listed."""

import json

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from rvc_dist import checkpoint
from rvc_dist.models.state_dict import to_upstream
from rvc_dist.optim import AnyPrecisionAdamW
from rvc_dist.workspace import StageError

IDENTITY = {"rate": 48000, "embedder": {"name": "mfcc"}}


def net_and_optimizer(kind=AnyPrecisionAdamW):
    torch.manual_seed(0)
    net = nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Linear(4, 1))
    optimizer = kind(net.parameters())
    net(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    return net, optimizer


def make(step: int, net, optimizer) -> checkpoint.Checkpoint:
    state = checkpoint.optimizer_state(optimizer, net)
    return checkpoint.Checkpoint(
        progress=checkpoint.Progress(step=step, epoch=2, clips_in_epoch=8, best_metric=1.5, best_step=3),
        identity=IDENTITY,
        models={"generator": net.state_dict(), "discriminator": {}},
        optimizers={"optimizer_generator": state, "optimizer_discriminator": {"tensors": {}}},
        rng=[torch.get_rng_state(), torch.get_rng_state()],
    )


@pytest.mark.parametrize("kind", [AnyPrecisionAdamW, torch.optim.AdamW, torch.optim.RAdam])
def test_what_is_saved_comes_back_and_continues_to_the_bit(tmp_path, kind):
    net, optimizer = net_and_optimizer(kind)
    saved = make(7, net, optimizer)
    path = checkpoint.save(tmp_path, saved)
    assert path.name == "step_00000007"
    loaded = checkpoint.load(path, IDENTITY)
    assert loaded.progress == saved.progress
    assert torch.equal(loaded.rng[1], saved.rng[1])

    other, fresh = net_and_optimizer(kind)
    other.load_state_dict(loaded.models["generator"])
    checkpoint.load_optimizer_state(fresh, other, loaded.optimizers["optimizer_generator"])
    for n, o in ((net, optimizer), (other, fresh)):
        for _ in range(3):
            o.zero_grad()
            n(torch.ones(2, 3)).square().sum().backward()
            o.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_damage_is_refused_with_every_file_named_and_the_previous_checkpoint_offered(tmp_path):
    net, optimizer = net_and_optimizer()
    checkpoint.save(tmp_path, make(1, net, optimizer))
    path = checkpoint.save(tmp_path, make(2, net, optimizer))
    weights = path / "generator.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    state = path / "state.json"
    state.write_text(state.read_text().replace('"step": 2', '"step": 9'))
    (path / "rng.safetensors").unlink()
    with pytest.raises(StageError) as caught:
        checkpoint.load(path)
    message = str(caught.value)
    assert "generator.safetensors has" in message
    assert "state.json was changed" in message
    assert "rng.safetensors is missing" in message
    assert "step_00000001" in message
    assert path.exists()


def test_other_settings_are_refused_with_every_mismatch_listed(tmp_path):
    path = checkpoint.save(tmp_path, make(1, *net_and_optimizer()))
    with pytest.raises(StageError) as caught:
        checkpoint.load(path, {"rate": 40000, "embedder": {"name": "mfcc"}, "new": 1})
    assert "rate: 48000, now 40000" in str(caught.value)
    assert "new: None, now 1" in str(caught.value)
    assert "embedder:" not in str(caught.value)


def test_an_unfinished_write_is_no_checkpoint_and_a_failed_one_leaves_nothing(tmp_path, monkeypatch):
    net, optimizer = net_and_optimizer()
    first = checkpoint.save(tmp_path, make(1, net, optimizer))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_save_tensors", full)
    with pytest.raises(StageError, match="No space left on device"):
        checkpoint.save(tmp_path, make(2, net, optimizer))
    (tmp_path / ".step_00000003.tmp").mkdir()
    assert checkpoint.latest(tmp_path) == first
    assert not checkpoint.damage(first)
    assert not list(tmp_path.glob("*00000002*"))


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    net, optimizer = net_and_optimizer()
    for step in range(1, 7):
        checkpoint.save(tmp_path, make(step, net, optimizer))
    checkpoint.prune(tmp_path, keep=2, best_step=3)
    assert [p.name[-1] for p in checkpoint.all_in(tmp_path)] == ["3", "5", "6"]


@pytest.mark.parametrize("spelling", [to_upstream, dict])
def test_pretrained_weights_load_in_both_spellings(tmp_path, spelling):
    net, _ = net_and_optimizer()
    file = tmp_path / "G.pth"
    torch.save({"model": spelling(net.state_dict()), "iteration": 1, "learning_rate": 1e-4}, file)
    torch.manual_seed(9)
    fresh = nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Linear(4, 1))
    state = checkpoint.read_pretrained(file, "train.pretrained_g")
    checkpoint.load_pretrained(file, state, fresh, "train.pretrained_g")
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), fresh.parameters(), strict=True))


def test_pretrained_weights_that_do_not_fit_are_listed(tmp_path):
    file = tmp_path / "G.pth"
    torch.save({"model": {"0.weight": torch.zeros(5, 3), "other": torch.zeros(1)}}, file)
    state = checkpoint.read_pretrained(file, "train.pretrained_g")
    with pytest.raises(StageError) as caught:
        checkpoint.load_pretrained(file, state, nn.Sequential(nn.Linear(3, 4)), "train.pretrained_g")
    message = str(caught.value)
    assert "0.weight: [5, 3], this network has [4, 3]" in message
    assert "0.bias: missing" in message
    assert "other: not part" in message


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)


@pytest.mark.parametrize("content", [b"", b"not a pickle", json.dumps({"model": 1}).encode()])
def test_what_is_no_weights_file_is_named(tmp_path, content):
    file = tmp_path / "G.pth"
    file.write_bytes(content)
    with pytest.raises(StageError, match="not a file of plain weights"):
        checkpoint.read_pretrained(file, "train.pretrained_g")


def test_pickled_code_is_never_run(tmp_path, capsys):
    file = tmp_path / "G.pth"
    torch.save({"model": Evil()}, file)
    with pytest.raises(StageError, match="not a file of plain weights"):
        checkpoint.read_pretrained(file, "train.pretrained_g")
    assert "unpickled" not in capsys.readouterr().out


def test_missing_and_empty_pretrained_files_are_named(tmp_path):
    with pytest.raises(StageError, match="does not exist"):
        checkpoint.read_pretrained(tmp_path / "none.pth", "train.pretrained_g")
    file = tmp_path / "list.pth"
    torch.save([1, 2], file)
    with pytest.raises(StageError, match="holds no state dict"):
        checkpoint.read_pretrained(file, "train.pretrained_g")
