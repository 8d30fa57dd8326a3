"""Checkpoints of every layout are resumed in every other; this file is also the script that two processes run."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from helpers.bases import REMARKS, assert_same_state, run_config
from helpers.processes import launch
from helpers.training import assert_same_moments, assert_same_training
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from mend_lightning.data.datamodule import EditDataModule
from mend_lightning.editors.mend import MendEditor
from mend_lightning.errors import OutputPathError, StateDictError
from mend_lightning.models.base import BaseModel
from mend_lightning.models.sharding.collectives import whole_state
from mend_lightning.training.distributed import sharded_checkpoint as shards
from mend_lightning.training.distributed.checkpoint_io import EditorCheckpointIO
from mend_lightning.training.distributed.sharded_checkpoint import read_full, remove_shards, write_sharded
from mend_lightning.training.distributed.strategies import ShardedStrategy
from mend_lightning.training.module import MendModule
from mend_lightning.training.run_callbacks import SaveEditor

pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(
    *REMARKS, "ignore:The dirpath has changed from.*", "ignore:This process .* is multi-threaded:DeprecationWarning"
)
GLOBAL_BATCH, SAVED, STEPS, RATE = 4, 2, 5, 1e-4
# "sharded" and "full" are two ways to write of one layout, fsdp2.
WRITERS = ["one", "ddp", "full", "sharded"]
READERS = ["one", "ddp", "full"]


class SaveFinal(L.Callback):
    """The state after the last step, before SaveEditor puts the best checkpoint's editor into the module."""

    def on_train_end(self, trainer, module) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "final.ckpt")


def run(config: Path, root: Path, layout: str, ckpt_path: Path | None = None) -> MendModule:
    """Trains by `config`, from a checkpoint or from the start; checkpoints go to `root`."""
    settings = yaml.safe_load(config.read_text())
    L.seed_everything(0, verbose=False)
    processes = 1 if layout == "one" else 2
    fsdp2 = layout in ("full", "sharded")
    strategy = ShardedStrategy(save_distributed_checkpoint=layout == "sharded") if fsdp2 else "ddp"
    rates = {"lr": RATE, "edit_rate_lr": RATE}
    module = MendModule(BaseModel(**settings["model"].pop("base")), **{**settings["model"], **rates})
    keep = ModelCheckpoint(root, "{step}", every_n_train_steps=SAVED, save_top_k=-1, save_last=True)
    trainer = L.Trainer(
        accelerator="cpu", devices=processes, strategy=strategy if processes > 1 else "auto", max_steps=STEPS,
        max_epochs=-1, default_root_dir=root, inference_mode=False, logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0, gradient_clip_val=1.0,
        callbacks=[keep, SaveFinal(), SaveEditor()], plugins=[EditorCheckpointIO(asynchronous=layout == "ddp")],
    )  # fmt: skip
    trainer.fit(
        module, EditDataModule(**{**settings["data"], "batch_size": GLOBAL_BATCH // processes}), ckpt_path=ckpt_path
    )
    return module


def step_file(folder: Path, writer: str) -> Path:
    return folder / writer / f"step={SAVED}.ckpt"


def work(folder: Path) -> None:
    """What two processes do: write in every layout, resume from every other's, and fail to write."""
    for layout in ("ddp", "full", "sharded"):
        module = run(folder / "run.yaml", folder / layout, layout)
        states = [None, None]
        distributed.all_gather_object(states, whole_state(module.editor))
        torch.save(states, folder / layout / "editors.pt")
    for reader in READERS[1:]:
        for writer in WRITERS:
            run(folder / "run.yaml", folder / f"{reader} from {writer}", reader, step_file(folder, writer))
    fail_to_write(folder / "failed")


def fail_to_write(folder: Path) -> None:
    """One process cannot write its part: both hear of it, and what was there stays."""
    mesh = init_device_mesh("cpu", (2,))
    old, new = (
        {"state_dict": {"w": distribute_tensor(torch.full((3, 2), value), mesh, [Shard(0)])}} for value in (1.0, 2.0)
    )
    write_sharded(old, folder / "a.ckpt")
    (folder / "shards").chmod(0o777)
    write = shards._write_part
    if distributed.get_rank() == 1:
        shards._write_part = lambda *_: (_ for _ in ()).throw(OSError("no space left"))
    try:
        write_sharded(new, folder / "a.ckpt")
    except OutputPathError as error:
        (folder / f"said {distributed.get_rank()}").write_text(str(error))
    shards._write_part = write


@pytest.fixture(scope="module")
def folder(base_folder, facts, tmp_path_factory) -> Path:
    """With a run of each layout, and one that resumes from each for each of two processes."""
    folder = tmp_path_factory.mktemp("layouts")
    run_config(folder, base_folder("llama"), facts)
    run(folder / "run.yaml", folder / "one", "one")
    launch(__file__, 2, folder)
    return folder


def assert_close(actual: dict, expected: dict) -> None:
    """Weights, statistics and Adam's state; rounding apart, for layouts add up in another order."""
    assert actual["global_step"] == expected["global_step"] == STEPS
    assert actual["lr_schedulers"] == expected["lr_schedulers"]
    assert_same_training(actual["state_dict"], expected["state_dict"], RATE, STEPS)
    assert_same_moments(*(checkpoint["optimizer_states"][0]["state"] for checkpoint in (actual, expected)))


def flat(checkpoint: dict) -> dict[str, torch.Tensor]:
    state = checkpoint["optimizer_states"][0]["state"]
    moments = {f"{index} {name}": value for index, entry in state.items() for name, value in entry.items()}
    return {**checkpoint["state_dict"], **moments}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("reader", READERS)
def test_resumes_in_any_layout(folder, reader, writer):
    root = folder / f"{reader} from {writer}"
    if reader == "one":
        run(folder / "run.yaml", root, "one", step_file(folder, writer))
    actual = read_full(root / "final.ckpt")
    assert_close(actual, read_full(folder / "one" / "final.ckpt"))
    same = {"sharded": "full"}.get(writer, writer)
    if same == reader:
        assert_same_state(flat(actual), flat(read_full(folder / same / "final.ckpt")))


@pytest.mark.parametrize("writer", WRITERS)
def test_the_editor_alone_in_the_format_of_one_process(folder, writer):
    expected, actual = (read_full(step_file(folder, name)) for name in ("one", writer))
    assert list(actual["state_dict"]) == list(expected["state_dict"])
    assert all(name.startswith("editor.") for name in actual["state_dict"])
    (adam,), (expected_adam,) = actual["optimizer_states"], expected["optimizer_states"]
    assert adam["param_groups"] == expected_adam["param_groups"] and list(adam["state"]) == list(expected_adam["state"])
    assert len(actual["random_states"]) == (1 if writer == "one" else 2)


@pytest.mark.parametrize("layout", ["ddp", "full", "sharded"])
def test_every_process_has_the_best_editor_after_fit(folder, layout):
    best = read_full(folder / layout / "step=4.ckpt")["state_dict"]
    saved = MendEditor.from_pretrained(folder / layout / "editor").state_dict()
    for state in [*torch.load(folder / layout / "editors.pt", weights_only=True), saved]:
        assert_same_state({f"editor.{name}": value for name, value in state.items()}, best)
    assert not torch.equal(
        best["editor.edit_rates"], read_full(folder / layout / "final.ckpt")["state_dict"]["editor.edit_rates"]
    )


def test_what_a_sharded_checkpoint_is_made_of(folder):
    """A file, and for each name one folder of parts, though `last` was written twice."""
    root = folder / "sharded"
    names = ["final", "last", "step=2", "step=4"]
    assert sorted(path.stem for path in root.glob("*.ckpt")) == names
    assert sorted(path.name[:-33] for path in (root / "shards").iterdir()) == names
    file = torch.load(root / "last.ckpt", weights_only=True)
    parts = sorted((root / file["shards"]["folder"]).iterdir())
    assert [part.name for part in parts] == ["00000.safetensors", "00001.safetensors"]
    kept = [name for name, value in file["state_dict"].items() if value is not None]
    # Statistics are the same on all processes; of what is learned nothing is in the file.
    assert kept and all("stats" in name for name in kept), kept
    whole, part = ((path / "step=2.ckpt").stat().st_size for path in (folder / "full", root))
    assert part < whole


def test_one_process_that_cannot_write(folder):
    said = [(folder / "failed" / f"said {rank}").read_text() for rank in range(2)]
    assert said[0] == said[1] and "a.ckpt could not be written: no space left" in said[0]
    assert read_full(folder / "failed" / "a.ckpt")["state_dict"]["w"].tolist() == [[1, 1]] * 3
    assert len(list((folder / "failed" / "shards").iterdir())) == 1


def test_read_without_the_plugin(folder, mend, edit_data, trainer):
    with pytest.raises(StateDictError, match=r"sharded checkpoint.*plugins=\[.*EditorCheckpointIO"):
        trainer(max_steps=1).fit(mend("llama"), edit_data(), ckpt_path=step_file(folder, "sharded"))


def in_one_process(function) -> int:
    """Runs `function(mesh)` in a child with a process group of its own; the child's exit code."""
    if not (child := os.fork()):
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        function(init_device_mesh("cpu", (1,)))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def sharded(mesh, number: float) -> dict:
    parts = {name: distribute_tensor(torch.full((4,), number), mesh, [Shard(0)]) for name in "ab"}
    return {"state_dict": {**parts, "c": torch.full((1,), number)}, "number": number}


def number_of(path: Path) -> float:
    checkpoint = read_full(path)
    assert {float(value) for tensor in checkpoint["state_dict"].values() for value in tensor} == {checkpoint["number"]}
    return checkpoint["number"]


def test_killed_while_saving_shards(tmp_path):
    """At every call that puts something in its place or takes it away: the old checkpoint or the new one."""
    path, found = tmp_path / "last.ckpt", []
    assert in_one_process(lambda mesh: write_sharded(sharded(mesh, 0.0), path)) == 0
    for deadly in range(1, 20):
        number = float(deadly)
        code = in_one_process(lambda mesh, n=deadly: killed_at(n, write_sharded, sharded(mesh, float(n)), path))
        found.append(number_of(path) == number)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    # Killed before the file was replaced, and after it.
    assert code == 0 and found[0] is False and found[-2:] == [True, True] and found == sorted(found)
    assert len(list((tmp_path / "shards").iterdir())) == 1, "parts of killed saves are removed by the next one"


def killed_at(deadly: int, function, *arguments) -> None:
    calls = 0

    def counted(call):
        def counting(*arguments, **keywords):
            nonlocal calls
            calls += 1
            if calls == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **keywords)

        return counting

    for name in ("fsync", "replace", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    function(*arguments)


def test_damaged_and_missing_shards(tmp_path):
    path = tmp_path / "a.ckpt"
    in_one_process(lambda mesh: write_sharded(sharded(mesh, 1.0), path))
    (part,) = (tmp_path / "shards").rglob("*.safetensors")
    content = part.read_bytes()
    for damaged in (content[:-1], content[:-1] + b"\x7f"):
        part.write_bytes(damaged)
        with pytest.raises(StateDictError, match="cannot be read: it is not what was written"):
            read_full(path)
    part.unlink()
    with pytest.raises(StateDictError, match="cannot be read: .*No such file"):
        read_full(path)
    part.parent.rename(tmp_path / "elsewhere")
    with pytest.raises(StateDictError, match="are not there. Copy that folder along"):
        read_full(path)


def test_shards_go_with_their_checkpoint(tmp_path):
    files = EditorCheckpointIO()
    for name in ("last", "last-v1", "other"):
        in_one_process(lambda mesh, n=name: write_sharded(sharded(mesh, 1.0), tmp_path / f"{n}.ckpt"))
    files.remove_checkpoint(tmp_path / "last.ckpt")
    assert sorted(path.name[:-33] for path in (tmp_path / "shards").iterdir()) == ["last-v1", "other"]
    files.save_checkpoint({"state_dict": {}}, tmp_path / "other.ckpt")
    assert [path.name[:-33] for path in (tmp_path / "shards").iterdir()] == ["last-v1"]
    assert number_of(tmp_path / "last-v1.ckpt") == 1
    remove_shards(tmp_path / "nothing.ckpt")


def test_shards_lie_beside_what_a_link_leads_to(tmp_path):
    """There they are looked for, whichever name the checkpoint is read by."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "last.ckpt").symlink_to("disk/a.ckpt")
    files = EditorCheckpointIO()
    assert in_one_process(lambda mesh: write_sharded(sharded(mesh, 1.0), tmp_path / "last.ckpt")) == 0
    assert number_of(tmp_path / "last.ckpt") == number_of(tmp_path / "disk" / "a.ckpt") == 1
    assert (tmp_path / "last.ckpt").is_symlink() and sorted(os.listdir(tmp_path)) == ["disk", "last.ckpt"]
    files.save_checkpoint({"state_dict": {}, "number": 2}, tmp_path / "last.ckpt")
    assert read_full(tmp_path / "disk" / "a.ckpt")["number"] == 2 and not list((tmp_path / "disk" / "shards").iterdir())
    os.mkfifo(tmp_path / "b.ckpt")
    assert in_one_process(lambda mesh: refused(sharded(mesh, 1.0), tmp_path / "b.ckpt")) == 0
    assert sorted(os.listdir(tmp_path)) == ["b.ckpt", "disk", "last.ckpt"]


def refused(checkpoint: dict, path: Path) -> None:
    with pytest.raises(OutputPathError, match="it is a FIFO"):
        write_sharded(checkpoint, path)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    work(Path(sys.argv[1]))
