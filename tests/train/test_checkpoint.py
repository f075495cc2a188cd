"""Checkpoints are whole or refused; pretrained weights fit or every misfit is listed."""

import json
import os
import re
import shutil
import threading
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from rvc_dist.features.identity import EmbedderId
from rvc_dist.models.state_dict import to_upstream
from rvc_dist.train import checkpoint
from rvc_dist.train.networks import Pretrained
from rvc_dist.train.optimizers import AnyPrecisionAdamW, OptimizerState, load_optimizer_state, optimizer_state
from rvc_dist.train.progress import Progress
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
    return checkpoint.Checkpoint(
        progress=Progress(step=step, epoch=2, batches_done=((8, 1), (4, 2)), best_metric=1.5, best_step=3),
        identity=IDENTITY,
        models={"generator": net.state_dict(), "discriminator": {}},
        optimizers={"generator": optimizer_state(optimizer, net), "discriminator": OptimizerState({}, [])},
        meter={"names": ["loss/d"], "ranks": [[0.1, 1.0], [1 / 3, 1.0]]},
        num_ranks=2,
    )


@pytest.mark.parametrize("kind", [AnyPrecisionAdamW, torch.optim.AdamW, torch.optim.RAdam])
def test_what_is_saved_comes_back_and_continues_to_the_bit(tmp_path, kind):
    net, optimizer = net_and_optimizer(kind)
    saved = make(7, net, optimizer)
    path = checkpoint.save(tmp_path, saved)
    assert path == checkpoint.latest(tmp_path) == tmp_path / "step_00000007"
    checkpoint.verify(path, IDENTITY)
    loaded = checkpoint.load(path)
    assert (loaded.progress, loaded.meter, loaded.num_ranks) == (saved.progress, saved.meter, 2)

    other, fresh = net_and_optimizer(kind)
    other.load_state_dict(loaded.models["generator"])
    load_optimizer_state(fresh, other, loaded.optimizers["generator"])
    for n, o in ((net, optimizer), (other, fresh)):
        for _ in range(3):
            o.zero_grad()
            n(torch.ones(2, 3)).square().sum().backward()
            o.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_training_goes_on_while_a_copy_is_written(tmp_path, monkeypatch):
    """The bytes on the disk are those of the moment of saving; the next one waits for the one before."""
    net, optimizer = net_and_optimizer()
    writer, release, order = checkpoint.AsyncCheckpointWriter(tmp_path, keep=9), threading.Event(), []
    save = checkpoint.save

    def slow(folder, saved):
        order.append(f"begin {saved.progress.step}")
        release.wait(30)
        save(folder, saved)
        order.append(f"end {saved.progress.step}")

    monkeypatch.setattr(checkpoint, "save", slow)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    writer.start(make(1, net, optimizer))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    assert not checkpoint.list_checkpoints(tmp_path), "still waiting"
    threading.Timer(0.2, release.set).start()
    writer.start(make(2, net, optimizer))
    writer.wait()
    assert order == ["begin 1", "end 1", "begin 2", "end 2"]
    assert writer.error is None
    first, second = (checkpoint.load(path).models["generator"] for path in checkpoint.list_checkpoints(tmp_path))
    assert all(torch.equal(first[k], v) for k, v in before.items())
    assert all(torch.equal(second[k], v + 1) for k, v in before.items())


def test_a_checkpoint_of_the_same_step_is_replaced_as_a_whole(tmp_path):
    net, optimizer = net_and_optimizer()
    checkpoint.save(tmp_path, make(1, net, optimizer))
    with torch.no_grad():
        net[1].bias.fill_(5.0)
    path = checkpoint.save(tmp_path, make(1, net, optimizer))
    checkpoint.verify(path)
    assert checkpoint.load(path).models["generator"]["1.bias"].item() == 5.0
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_space_is_checked_before_anything_is_written(tmp_path, monkeypatch):
    net, optimizer = net_and_optimizer()
    first = checkpoint.save(tmp_path, make(1, net, optimizer))
    saved = make(2, net, optimizer)
    usage = checkpoint.shutil.disk_usage(tmp_path)
    free = saved.num_bytes + checkpoint.SPARE_BYTES
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=free - 1))
    with pytest.raises(StageError, match=r"a checkpoint needs 17 MB, the disk has 17 MB free"):
        checkpoint.save(tmp_path, saved)
    assert [p.name for p in tmp_path.iterdir()] == [first.name]
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=free))
    checkpoint.save(tmp_path, saved)


def test_leftovers_of_killed_runs_are_removed_and_a_folder_in_the_way_is_named(tmp_path):
    (tmp_path / "run" / ".step_00000003.tmp").mkdir(parents=True)
    checkpoint.prepare_folder(tmp_path / "run", 1)
    assert not list((tmp_path / "run").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(StageError, match=r"checkpoints cannot be written there .*nothing was trained"):
        checkpoint.prepare_folder(tmp_path / "file", 1)


def test_damage_is_refused_with_every_file_named_and_the_previous_checkpoint_offered(tmp_path):
    net, optimizer = net_and_optimizer()
    checkpoint.save(tmp_path, make(1, net, optimizer))
    path = checkpoint.save(tmp_path, make(2, net, optimizer))
    weights = path / "generator.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    state = path / "state.json"
    state.write_text(state.read_text().replace('"step": 2', '"step": 9'))
    (path / "optimizer_generator.safetensors").unlink()
    with pytest.raises(StageError) as caught:
        checkpoint.verify(path)
    message = str(caught.value)
    assert "generator.safetensors has" in message
    assert "state.json was changed" in message
    assert "optimizer_generator.safetensors is missing" in message
    assert "step_00000001" in message
    assert path.exists()


def test_other_settings_are_refused_with_every_mismatch_listed(tmp_path):
    path = checkpoint.save(tmp_path, make(1, *net_and_optimizer()))
    with pytest.raises(StageError) as caught:
        checkpoint.verify(path, {"rate": 40000, "embedder": {"name": "mfcc"}, "new": 1})
    assert "rate: 48000, now 40000" in str(caught.value)
    assert "new: None, now 1" in str(caught.value)
    assert "embedder:" not in str(caught.value)


def test_an_encoder_is_its_weights_and_its_mix_whatever_it_is_called(tmp_path):
    def identity(name, digest, **mix):
        return {"embedder": {"name": name, "width": 768, "hash": digest} | ({"mix": mix} if mix else {})}

    made = replace(make(1, *net_and_optimizer()), identity=identity("contentvec", "aa", layers=[9], ratio=0.5))
    path = checkpoint.save(tmp_path, made)
    checkpoint.verify(path, identity("/models/cv", "aa", layers=[9], ratio=0.5))
    before = r"embedder: contentvec \(weights aa, 0\.5 of layers 9 mixed in\), now "
    for other, now in (
        (identity("contentvec", "bb", layers=[9], ratio=0.5), r"contentvec \(weights bb, 0\.5 of layers 9 mixed in\)"),
        (identity("contentvec", "aa", layers=[9], ratio=0.4), r"contentvec \(weights aa, 0\.4 of layers 9 mixed in\)"),
        (identity("contentvec", "aa"), r"contentvec \(weights aa\)"),
    ):
        with pytest.raises(StageError, match=before + now):
            checkpoint.verify(path, other)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "manifest.json is not what was written"),
        ("{}", "state.json is not in manifest.json"),
        (None, "is missing"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, text, problem):
    path = checkpoint.save(tmp_path, make(1, *net_and_optimizer()))
    if text is None:
        (path / "manifest.json").unlink()
    else:
        (path / "manifest.json").write_text(text)
    with pytest.raises(StageError, match=problem):
        checkpoint.verify(path)


def test_a_checkpoint_of_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    path = checkpoint.save(tmp_path, make(1, *net_and_optimizer()))
    monkeypatch.undo()
    with pytest.raises(StageError, match="has format 99, this version of rvc_dist reads 2"):
        checkpoint.verify(path)


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
    assert not checkpoint.find_corruption(first)
    assert not list(tmp_path.glob("*00000002*"))
    writer = checkpoint.AsyncCheckpointWriter(tmp_path, keep=1)
    writer.start(make(2, net, optimizer))
    writer.wait()
    assert "No space left on device" in str(writer.error)


@pytest.mark.parametrize(
    ("stops", "kept"),
    [
        ((), "356"),
        ((4, 5, 6), "1236"),  # three stops in a row: neither the regular ones nor the best went
        ((2, 5), "346"),  # a stop's is needed no more when a later one is there
        ((3, 6), "3456"),  # the best is kept, though a stop wrote it
    ],
)
def test_prune_keeps_the_newest_the_best_and_the_last_stops(tmp_path, stops, kept):
    net, optimizer = net_and_optimizer()
    for step in range(1, 7):
        made = make(step, net, optimizer)
        checkpoint.save(tmp_path, replace(made, why="stop" if step in stops else "due"))
        assert checkpoint.load(checkpoint.latest(tmp_path)).why == ("stop" if step in stops else "due")
    if stops == (2, 5):  # of a version that did not say why
        state = tmp_path / "step_00000004" / "state.json"
        state.write_text(state.read_text().replace('"why": "due",', ""))
    checkpoint.prune(tmp_path, keep=2 if len(stops) < 3 else 3, best_step=3)
    assert "".join(p.name[-1] for p in checkpoint.list_checkpoints(tmp_path)) == kept


@pytest.mark.parametrize("replaced", [False, True])
def test_a_kill_inside_a_removal_leaves_no_half_of_a_checkpoint(tmp_path, monkeypatch, replaced):
    net, optimizer = net_and_optimizer()
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, make(step, net, optimizer))

    def killed(folder):
        next(folder.iterdir()).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    again = make(1, net, optimizer)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, again) if replaced else checkpoint.prune(tmp_path, keep=2, best_step=3)
    monkeypatch.undo()
    assert [p.name[-1] for p in checkpoint.whole_in(tmp_path)] == (["1", "2", "3"] if replaced else ["2", "3"])
    assert len(checkpoint.list_checkpoints(tmp_path)) == len(checkpoint.whole_in(tmp_path))
    checkpoint.prepare_folder(tmp_path, 1)
    assert not list(tmp_path.glob(".*"))


def test_copies_links_and_halves_are_no_checkpoints_to_go_on_from(tmp_path, caplog):
    net, optimizer = net_and_optimizer()
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "another disk"
    for step in (4, 5, 8):
        checkpoint.save(folder, make(step, net, optimizer))
    for copy in ("step_best", "step_00000008_copy", "step_9", "step_000000009", "step_0000000९"):
        shutil.copytree(folder / "step_00000004", folder / copy)
    (folder / "step_00000005").rename(elsewhere)
    (folder / "step_00000005").symlink_to(elsewhere)
    shutil.copytree(folder / "step_00000008", folder / "step_00000009")  # a copy that is not done
    (folder / "step_00000009" / "manifest.json").unlink()
    assert checkpoint.latest(folder).name == "step_00000008"
    assert [p.name[-1] for p in checkpoint.whole_in(folder)] == ["4", "5", "8"]
    assert "step_00000009 is damaged and was passed over (manifest.json is missing); remove it" in caplog.text
    checkpoint.prune(folder, keep=1, best_step=4)
    assert [p.name[-1] for p in checkpoint.whole_in(folder)] == ["4", "8"]
    assert not checkpoint.find_corruption(elsewhere), "only the link is gone"
    (folder / "step_00000008").rename(tmp_path / "moved")
    (folder / "step_00000008").symlink_to(tmp_path / "gone")
    checkpoint.save(folder, make(8, net, optimizer))
    assert checkpoint.latest(folder).name == "step_00000008"
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_a_checkpoint_has_the_mode_that_the_umask_asks_for(tmp_path, umask):
    before = os.umask(umask)
    try:
        path = checkpoint.save(tmp_path, make(1, *net_and_optimizer()))
    finally:
        os.umask(before)
    assert {oct(p.stat().st_mode & 0o777) for p in path.iterdir()} == {oct(0o666 & ~umask)}
    assert path.stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("error", [SafetensorError("I/O error: File too large (os error 27)"), OSError(27, "x")])
def test_what_safetensors_raises_is_an_error_of_the_disk(tmp_path, monkeypatch, error):
    monkeypatch.setattr(checkpoint, "save_file", lambda *_: (_ for _ in ()).throw(error))
    writer = checkpoint.AsyncCheckpointWriter(tmp_path, keep=1)
    writer.start(make(2, *net_and_optimizer()))
    writer.wait()
    reason = r"step_00000002: cannot be written \(.*File too large.*\); 16\.\d+ MB needed, \d+ MB free; earlier .* Free"
    assert re.search(reason, str(writer.error))
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_ours_in_the_writer_ends_the_run_too(tmp_path, monkeypatch):
    monkeypatch.setattr(Progress, "to_file", lambda _: object())  # no JSON
    writer = checkpoint.AsyncCheckpointWriter(tmp_path, keep=1)
    writer.start(make(2, *net_and_optimizer()))
    writer.wait()
    assert "checkpoint of step 2 cannot be written (TypeError" in str(writer.error)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spelling", [to_upstream, dict])
def test_pretrained_weights_load_in_both_spellings(tmp_path, spelling):
    net, _ = net_and_optimizer()
    file = tmp_path / "G.pth"
    torch.save({"model": spelling(net.state_dict()), "iteration": 1, "learning_rate": 1e-4}, file)
    torch.manual_seed(9)
    fresh = nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Linear(4, 1))
    read = Pretrained.read(file, "train.pretrained_g")
    assert read.embedder is None
    read.fill(fresh)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), fresh.parameters(), strict=True))


def test_pretrained_weights_that_do_not_fit_are_listed(tmp_path):
    file = tmp_path / "G.pth"
    torch.save({"model": {"0.weight": torch.zeros(5, 3), "other": torch.zeros(1)}}, file)
    read = Pretrained.read(file, "train.pretrained_g")
    with pytest.raises(StageError) as caught:
        read.fill(nn.Sequential(nn.Linear(3, 4)))
    message = str(caught.value)
    assert "0.weight: [5, 3], this network has [4, 3]" in message
    assert "0.bias: missing" in message
    assert "other: not part" in message


def test_pretrained_weights_of_another_encoder_are_refused_or_warned_of(tmp_path, caplog):
    file, key = tmp_path / "G.pth", "train.pretrained_g"

    def check(features: EmbedderId, **fields: object) -> str:
        torch.save({"model": {"x": torch.zeros(1)}} | fields, file)
        caplog.clear()
        Pretrained.read(file, key).check_embedder(features)
        return caplog.text

    spin = EmbedderId("spin", "aa")
    assert "G.pth does not say which content encoder" in check(spin)
    assert "the features are of spin (weights aa)" in check(spin)
    assert check(EmbedderId("contentvec", "cc")) == ""
    assert check(spin, embedder_model="spin") == ""
    assert check(spin, embedder_model="folder", embedder_hash="aa") == ""
    unknown = check(EmbedderId("/models/cv", "cc"), embedder_model="contentvec")
    assert "trained with contentvec, the features are of /models/cv (weights cc): whether these are the same" in unknown
    with pytest.raises(
        StageError, match=r"pretrained_g: .*G\.pth was trained with contentvec, the features are of spin"
    ):
        check(spin, embedder_model="contentvec")
    with pytest.raises(StageError, match=r"with spin \(weights bb\), the features are of spin \(weights aa\)\. Run"):
        check(spin, embedder_model="spin", embedder_hash="bb")
    with pytest.raises(StageError, match=r"with spin \(weights aa, 1 of layers 9 mixed in\), the features are of spin"):
        check(spin, embedder_model="spin", embedder_hash="aa", embedder_mix={"layers": [9], "ratio": 1.0})
    with pytest.raises(StageError, match=r"train\.pretrained_g: .*does not say .*embedder_mix: got 9, expected keys"):
        check(spin, embedder_model="spin", embedder_mix=9)


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)


@pytest.mark.parametrize("content", [b"", b"not a pickle", json.dumps({"model": 1}).encode()])
def test_what_is_no_weights_file_is_named(tmp_path, content):
    file = tmp_path / "G.pth"
    file.write_bytes(content)
    with pytest.raises(StageError, match="not a file of weights"):
        Pretrained.read(file, "train.pretrained_g")


def test_pickled_code_is_never_run(tmp_path, capsys):
    file = tmp_path / "G.pth"
    torch.save({"model": Evil()}, file)
    with pytest.raises(StageError, match="not a file of weights"):
        Pretrained.read(file, "train.pretrained_g")
    assert "unpickled" not in capsys.readouterr().out


def test_missing_and_empty_pretrained_files_are_named(tmp_path):
    with pytest.raises(StageError, match="does not exist"):
        Pretrained.read(tmp_path / "none.pth", "train.pretrained_g")
    file = tmp_path / "list.pth"
    torch.save([1, 2], file)
    with pytest.raises(StageError, match="holds no state dict"):
        Pretrained.read(file, "train.pretrained_g")


def test_numbers_that_are_not_finite_are_named_with_file_and_tensor(tmp_path):
    file = tmp_path / "G.pth"
    torch.save({"model": {"a.weight_g": torch.ones(2), "b.weight_v": torch.tensor([1.0, torch.nan])}}, file)
    with pytest.raises(
        StageError,
        match=r"pretrained_g: .*G\.pth is not a file .*\(numbers that are not finite .* in its tensor b\.weight_v\)",
    ):
        Pretrained.read(file, "train.pretrained_g")


@pytest.mark.parametrize(("name", "lacks"), [("g", r"posterior encoder \(enc_q\)"), ("d", "discriminator")])
def test_a_voice_file_is_no_pretrained_one_unless_it_has_what_training_needs(tmp_path, name, lacks):
    file, key = tmp_path / "v.pth", f"train.pretrained_{name}"
    voice = {"weight": {"emb_g.weight": torch.ones(1, 2)}, "config": [1], "sr": 48000}
    torch.save(voice, file)
    letter = name.upper()
    with pytest.raises(StageError, match=rf"{key}: .*v\.pth is a voice file.* no {lacks}.* give the {letter}_\*\.pth"):
        Pretrained.read(file, key)
    voice["weight"]["enc_q.pre.bias"] = torch.ones(1)
    torch.save(voice, file)
    assert "enc_q.pre.bias" in Pretrained.read(file, key).state
