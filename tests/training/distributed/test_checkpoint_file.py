"""Checkpoint files: whole or not there whenever the writer dies, and never read as something that was not written."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.cloud_io import _atomic_save
from lightning.pytorch.plugins import AsyncCheckpointIO, MixedPrecision
from lightning.pytorch.strategies import DDPStrategy

from mend_lightning.cli.trainer_settings import with_checkpoint_io
from mend_lightning.errors import CheckpointNotFoundError, ConfigError, OutputPathError, StateDictError
from mend_lightning.files import umask, written
from mend_lightning.training.distributed import checkpoint_io
from mend_lightning.training.distributed.checkpoint_file import SUFFIX, read_checkpoint, write_checkpoint
from mend_lightning.training.distributed.checkpoint_io import EditorCheckpointIO, snapshot

# Children of the tests only write a file and die; they use no thread of their parent's.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def numbered(number: int, size: int = 1000) -> dict:
    """A checkpoint that shows at a glance whether all of it is of one save."""
    weights = {name: torch.full((size,), float(number)) for name in "abc"}
    return {"state_dict": weights, "number": number}


def number_of(path: Path) -> int:
    checkpoint = read_checkpoint(path)
    values = torch.cat(list(checkpoint["state_dict"].values()))
    assert bool((values == checkpoint["number"]).all())
    return checkpoint["number"]


def unfinished(folder: Path) -> list[Path]:
    return list(folder.glob(f".*{SUFFIX}"))


# Where a writer may die: before and after each call by which a file gets to its place.
STAGES = ["before os.fsync", "after os.fsync", "before os.replace", "after os.replace"]


@pytest.mark.parametrize("stage", STAGES)
def test_killed_while_saving(tmp_path, stage):
    path = tmp_path / "last.ckpt"
    write_checkpoint(numbered(1), path)
    if not (child := os.fork()):
        when, name = stage.split(" ")
        _kill_at(when, name)
        write_checkpoint(numbered(2), path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert number_of(path) == (2 if stage == "after os.replace" else 1)
    assert len(unfinished(tmp_path)) == (0 if stage == "after os.replace" else 1)
    write_checkpoint(numbered(3), tmp_path / "other.ckpt")
    assert not unfinished(tmp_path) and {entry.name for entry in tmp_path.iterdir()} == {"last.ckpt", "other.ckpt"}


def _kill_at(when: str, name: str) -> None:
    module, function = name.split(".")
    call = getattr(os, function)

    def killed(*arguments):
        if when == "after":
            call(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, function, killed)


def test_killed_at_any_moment(tmp_path):
    """A process that saves again and again, killed at moments that nothing chose."""
    path = tmp_path / "last.ckpt"
    write_checkpoint(numbered(0, 100_000), path)
    before = 0
    for attempt in range(20):
        if not (child := os.fork()):
            # The threads of a pool do not live on in a fork, and work that is shared among them would wait for ever.
            torch.set_num_threads(1)
            for number in range(before + 1, before + 1000):
                write_checkpoint(numbered(number, 100_000), path)
            os._exit(0)
        time.sleep(0.02 + 0.0037 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert number_of(path) >= before
        before = number_of(path)
    assert before > 0
    # One that is empty is left alone while it is new: its writer may be about to lock it.
    for left in unfinished(tmp_path):
        os.utime(left, (0, 0))
    write_checkpoint(numbered(before), path)
    assert not unfinished(tmp_path)


def test_a_file_that_somebody_writes_now_is_left_alone(tmp_path):
    with written(tmp_path / "a.ckpt", SUFFIX) as temporary:
        temporary.write_bytes(b"x")
        write_checkpoint(numbered(1), tmp_path / "b.ckpt")
    assert (tmp_path / "a.ckpt").read_bytes() == b"x"


def test_several_write_to_one_folder(tmp_path):
    """Each process looks for unfinished files, and takes none of the others'."""
    children = []
    for name in "abc":
        if not (child := os.fork()):
            for number in range(150):
                write_checkpoint(numbered(number, 10), tmp_path / name)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert {path.name: number_of(path) for path in tmp_path.iterdir()} == dict.fromkeys("abc", 149)


def test_a_full_disk(tmp_path):
    """The old file stays, and the error says what to do."""
    path = tmp_path / "last.ckpt"
    write_checkpoint(numbered(1), path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(
            OutputPathError,
            match=r"Cannot write the checkpoint .*last.ckpt: OSError: .*File too large.* is as it was. Make room",
        ):
            write_checkpoint(numbered(2, 100_000), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert number_of(path) == 1 and not unfinished(tmp_path)


def test_an_error_while_saving(tmp_path):
    path = tmp_path / "last.ckpt"
    write_checkpoint(numbered(1), path)
    with pytest.raises(TypeError, match="pickle"):
        write_checkpoint({"state_dict": {}, "lock": threading.Lock()}, path)
    assert number_of(path) == 1 and not unfinished(tmp_path)
    with pytest.raises(OutputPathError, match="is a folder"):
        write_checkpoint(numbered(1), tmp_path)


def test_through_a_link(tmp_path):
    """A run's folder on a small disk, its checkpoints on a large one: unfinished files are looked for there."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "last.ckpt").symlink_to("disk/last.ckpt")
    (tmp_path / "disk" / f".a.ckpt.x{SUFFIX}").write_text("left behind")
    for number in (1, 2):
        write_checkpoint(numbered(number), tmp_path / "last.ckpt")
        assert (tmp_path / "last.ckpt").is_symlink() and number_of(tmp_path / "disk" / "last.ckpt") == number
    assert os.listdir(tmp_path / "disk") == ["last.ckpt"]
    os.mkfifo(tmp_path / "b.ckpt")
    with pytest.raises(OutputPathError, match="it is a FIFO"):
        write_checkpoint(numbered(1), tmp_path / "b.ckpt")


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_a_file_that_is_cut_off(tmp_path, kept):
    path = tmp_path / "last.ckpt"
    write_checkpoint(numbered(1), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(StateDictError, match=r"last.ckpt \([\d,]+ bytes\) cannot be read.*cut off.*Take another"):
        read_checkpoint(path)


def test_a_damaged_byte_is_seen(tmp_path):
    """torch.load itself would read other numbers and say nothing."""
    path = tmp_path / "last.ckpt"
    write_checkpoint(numbered(1), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)
    with pytest.raises(StateDictError, match="is not what was written"):
        read_checkpoint(path)


class Foreign:
    pass


def test_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "a.ckpt"
    for content in (b"no checkpoint", b"\x80\x02]q\x00.", "länger".encode("utf-16") * 100):
        path.write_bytes(content)
        with pytest.raises(StateDictError, match="another kind of file"):
            read_checkpoint(path)
    torch.save({"state_dict": {}, "object": Foreign()}, path)
    with pytest.raises(StateDictError, match="Unsupported global.*Foreign"):
        read_checkpoint(path)
    assert isinstance(EditorCheckpointIO().load_checkpoint(path, weights_only=False)["object"], Foreign)
    torch.save([1], path)
    with pytest.raises(StateDictError, match="no 'state_dict'.*--model.editor"):
        read_checkpoint(path)
    with pytest.raises(StateDictError, match="is a folder"):
        read_checkpoint(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="has: a.ckpt"):
        read_checkpoint(tmp_path / "b.ckpt")
    with pytest.raises(FileNotFoundError, match="has none"):
        read_checkpoint(tmp_path / "nowhere" / "b.ckpt")


class Gate:
    """A writer that waits until it is let go, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.open, self.error, self.written = threading.Event(), error, []

    def __call__(self, checkpoint: dict, path: Path) -> None:
        assert self.open.wait(10)
        if self.error is not None:
            raise self.error
        write_checkpoint(checkpoint, path)
        self.written.append(checkpoint["number"])


@pytest.fixture
def gate(monkeypatch):
    def put(error: Exception | None = None) -> Gate:
        made = Gate(error)
        monkeypatch.setattr(checkpoint_io, "write_checkpoint", made)
        return made

    return put


def test_asynchronous_holds_the_moment_of_the_call(tmp_path, gate):
    """What the optimizer does meanwhile, and what callbacks add to their dicts, is not in the file."""
    files, held = EditorCheckpointIO(asynchronous=True), gate()
    checkpoint = {**numbered(1), "callbacks": {"best": {"a": 1}, "order": OrderedDict(x=[torch.ones(2)])}}
    files.save_checkpoint(checkpoint, tmp_path / "a.ckpt")
    for value in checkpoint["state_dict"].values():
        value.fill_(7)
    checkpoint["callbacks"]["best"]["b"] = 2
    checkpoint["callbacks"]["order"]["x"][0].zero_()
    assert not (tmp_path / "a.ckpt").exists()
    held.open.set()
    files.teardown()
    assert number_of(tmp_path / "a.ckpt") == 1
    saved = read_checkpoint(tmp_path / "a.ckpt")["callbacks"]
    assert saved["best"] == {"a": 1} and saved["order"]["x"][0].tolist() == [1, 1]


@pytest.mark.parametrize("call", ["save", "load", "remove", "teardown"])
def test_asynchronous_what_comes_next_waits(tmp_path, gate, call):
    files, held = EditorCheckpointIO(asynchronous=True), gate()
    path = tmp_path / "a.ckpt"
    files.save_checkpoint(numbered(1), path)
    threading.Timer(0.1, held.open.set).start()
    {
        "save": lambda: files.save_checkpoint(numbered(2), tmp_path / "b.ckpt"),
        "load": lambda: files.load_checkpoint(path),
        "remove": lambda: files.remove_checkpoint(path),
        "teardown": files.teardown,
    }[call]()
    assert held.written[0] == 1 and path.exists() == (call != "remove")
    files.teardown()
    assert held.written == ([1, 2] if call == "save" else [1])


@pytest.mark.parametrize("call", ["save", "teardown"])
def test_asynchronous_errors_are_raised_once(tmp_path, gate, call):
    files, held = EditorCheckpointIO(asynchronous=True), gate(OutputPathError("the disk is full"))
    held.open.set()
    files.save_checkpoint(numbered(1), tmp_path / "a.ckpt")
    with pytest.raises(OutputPathError, match="the disk is full"):
        files.save_checkpoint(numbered(2), tmp_path / "a.ckpt") if call == "save" else files.teardown()
    files.teardown()


def test_snapshot_keeps_types():
    value = {"a": (1, [torch.ones(1)]), "b": OrderedDict(c=None), "d": {"e"}}
    copied = snapshot(value)
    assert copied == value and type(copied["b"]) is OrderedDict and copied["d"] is not value["d"]


def test_remove_and_refuse(tmp_path):
    files = EditorCheckpointIO()
    files.save_checkpoint(numbered(1), tmp_path / "new" / "a.ckpt")
    assert (tmp_path / "new" / "a.ckpt").stat().st_mode & 0o777 == 0o666 & ~umask()
    files.remove_checkpoint(tmp_path / "new" / "a.ckpt")
    files.remove_checkpoint(tmp_path / "new" / "a.ckpt")
    assert not list((tmp_path / "new").iterdir())
    with pytest.raises(ConfigError, match="storage_options"):
        files.save_checkpoint(numbered(1), tmp_path / "a.ckpt", storage_options={})


def test_remote_paths_are_lightnings(tmp_path):
    files = EditorCheckpointIO(asynchronous=True)
    files.save_checkpoint(numbered(5), f"file://{tmp_path}/a.ckpt")
    assert files.load_checkpoint(f"file://{tmp_path}/a.ckpt")["number"] == 5
    files.remove_checkpoint(f"file://{tmp_path}/a.ckpt")
    assert not (tmp_path / "a.ckpt").exists()


def test_the_process_ends_after_the_write(tmp_path):
    """A script that ends, or is interrupted, without a teardown."""
    script = (
        "import sys, time, torch\n"
        "from mend_lightning.training.distributed import checkpoint_io as io\n"
        "write = io.write_checkpoint\n"
        "def slow(*arguments): time.sleep(0.3), write(*arguments)\n"
        "io.write_checkpoint = slow\n"
        "io.EditorCheckpointIO(True).save_checkpoint({'state_dict': {}, 'number': 1}, sys.argv[1])\n"
        "raise KeyboardInterrupt\n"
    )
    path = tmp_path / "a.ckpt"
    result = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=60)
    assert "KeyboardInterrupt" in result.stderr
    assert read_checkpoint(path)["number"] == 1


def test_what_lightning_does_instead(tmp_path, monkeypatch):
    """The reason for all this: its temporary file lies elsewhere. When this fails, see whether ours can go."""
    seen = []
    move = shutil.move
    monkeypatch.setattr(shutil, "move", lambda source, target: (seen.append(Path(source)), move(source, target)))
    _atomic_save(numbered(1), tmp_path / "a.ckpt")
    assert seen and seen[0].parent != tmp_path


def test_the_command_line_brings_it_unless_told_otherwise():
    mine, precision = AsyncCheckpointIO(), MixedPrecision("bf16-mixed", "cpu")
    assert [type(plugin) for plugin in with_checkpoint_io(None, "ddp")] == [EditorCheckpointIO]
    assert [type(plugin) for plugin in with_checkpoint_io(precision, None)] == [MixedPrecision, EditorCheckpointIO]
    assert with_checkpoint_io([precision, mine], "ddp") == [precision, mine]
    assert with_checkpoint_io(None, DDPStrategy(checkpoint_io=mine)) == []
