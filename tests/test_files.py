"""What a result may replace: regular files and folders of ours, through links, and nothing else."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.commandline import assert_says, call
from safetensors.torch import load_file, save_file

from mend_lightning import Edit, LowRankDelta, MendEditor
from mend_lightning.cli.smollm2_download import get_smollm2
from mend_lightning.errors import OutputPathError
from mend_lightning.files import (
    check_free_folder,
    check_writable,
    check_writable_file,
    output_file,
    write_json,
    written,
    written_folder,
)
from mend_lightning.models.smollm2 import MODEL_NAME
from mend_lightning.training.run_callbacks import StartReport

# What is refused blocks for ever where it is opened.
pytestmark = pytest.mark.timeout(60)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def listening_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def device(path: Path) -> None:
    """As /dev/null, with a name of its own: what fails here must not take the machine's."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices")


SPECIAL = {"a FIFO": fifo, "a socket": listening_socket, "a device": device, "a folder": Path.mkdir}


@pytest.fixture(params=list(SPECIAL))
def special(request, tmp_path) -> SimpleNamespace:
    """A thing that is no regular file, and a link to it; at the end both are as they were."""
    path, link = tmp_path / "thing", tmp_path / "link"
    try:
        SPECIAL[request.param](path)
    except OSError as error:
        # Names of sockets must be short.
        pytest.skip(str(error))
    link.symlink_to("thing")
    before = path.lstat(), link.lstat(), sorted(os.listdir(tmp_path))
    yield SimpleNamespace(path=path, link=link, kind=request.param)
    after = path.lstat(), link.lstat(), sorted(os.listdir(tmp_path))
    assert [each.st_ino for each in after[:2]] == [each.st_ino for each in before[:2]]
    assert [each.st_mode for each in after[:2]] == [each.st_mode for each in before[:2]]
    assert after[2] == before[2]


def test_what_is_no_regular_file_is_refused(special):
    for path in (special.path, special.link):
        for write in (check_writable_file, lambda path: write_json(path, {}), lambda path: tiny_edit().save(path)):
            with pytest.raises(OutputPathError, match=f"Cannot write {path}: it is {special.kind}"):
                write(path)


def test_what_is_no_folder_is_refused(special):
    if special.kind == "a folder":
        pytest.skip("it is one")
    inside = [lambda path: write_json(path / "a.json", {}), lambda path: check_writable_file(path / "a.json")]
    for path in (special.path, special.link):
        for write in (check_writable, check_free_folder, fill, tiny_editor().save_pretrained, *inside):
            with pytest.raises(OutputPathError, match=f"it is {special.kind}. Give the path of a folder"):
                write(path)


def tiny_edit() -> Edit:
    return Edit({"fc": LowRankDelta(torch.ones(1, 1, 2), torch.ones(1, 1, 2))}, {})


def tiny_editor() -> MendEditor:
    return MendEditor({"fc": (4, 4)}, rank=2)


def fill(folder: Path, text: str = "x") -> None:
    with written_folder(folder, replaces="a.txt") as temporary:
        (temporary / "a.txt").write_text(text)


# As root whoever forgets the check replaces these for all of the machine, so they are only looked at.
@pytest.mark.parametrize("path", ["/dev/null", "/dev/tty", "/dev/stdout", "/dev/stdin", "/proc/self/fd/1", "/dev"])
def test_of_the_system_nothing_is_replaced(path):
    if not os.path.lexists(path):
        pytest.skip("not on this system")
    with pytest.raises(OutputPathError, match=f"Cannot write {path}: it is a"):
        output_file(path)


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_an_open_stream_is_refused_even_where_it_is_a_file(tmp_path, name):
    """Replaced, the file would be one that the process does not write to any more."""
    if not os.path.exists(name):
        pytest.skip("not on this system")
    script = (
        "import sys; from mend_lightning.files import write_json; print('before', flush=True)\n"
        f"try: write_json({name!r}, {{}})\nexcept OSError as error: print(error)"
    )
    with (tmp_path / "out.txt").open("w") as out:
        inode = os.fstat(out.fileno()).st_ino
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        subprocess.run([sys.executable, "-c", script], stdout=out, env=environment, timeout=50, check=True)
    before, said = (tmp_path / "out.txt").read_text().splitlines()
    assert before == "before" and f"Cannot write {name}: it is a stream of a process" in said
    assert (tmp_path / "out.txt").stat().st_ino == inode and os.listdir(tmp_path) == ["out.txt"]


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """The place that links lead to."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


def relative(link: Path, target: Path) -> None:
    link.symlink_to(os.path.relpath(target, link.parent))


def chain(link: Path, target: Path) -> None:
    (link.parent / "between").symlink_to(target)
    link.symlink_to("between")


@pytest.mark.parametrize("link_to", [Path.symlink_to, relative, chain])
@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_its_target_is_replaced(tmp_path, elsewhere, link_to: Callable, there):
    link, target = tmp_path / "link.json", elsewhere / "target.json"
    if there:
        target.write_text("old")
        # What has it open reads the old one to its end.
        reader = target.open()
    link_to(link, target)
    check_writable_file(link)
    with written(link) as temporary:
        temporary.write_text("new")
        assert temporary.parent == elsewhere, "a rename is atomic within one file system only"
        assert target.exists() == there and (not there or target.read_text() == "old")
    assert link.is_symlink() and not target.is_symlink() and target.read_text() == "new"
    assert os.listdir(elsewhere) == ["target.json"] and "link.json" in os.listdir(tmp_path)
    if there:
        with reader:
            assert reader.read() == "old"


def test_links_to_folders_are_gone_through(tmp_path, elsewhere):
    """Those that are there, and those that are to be made."""
    (tmp_path / "linked").symlink_to("elsewhere")
    write_json(tmp_path / "linked" / "a.json", 1)
    (tmp_path / "dangling").symlink_to(elsewhere / "new" / "folder")
    check_writable_file(tmp_path / "dangling" / "b.json")
    tiny_editor().save_pretrained(tmp_path / "dangling")
    assert (elsewhere / "a.json").read_text() == "1\n"
    assert sorted(os.listdir(elsewhere / "new" / "folder")) == ["editor.json", "editor.safetensors"]
    assert (tmp_path / "linked").is_symlink() and (tmp_path / "dangling").is_symlink()


def test_links_in_a_circle(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for write in (check_writable_file, lambda path: write_json(path, {}), check_writable, check_free_folder, fill):
        for path in (tmp_path / "a", tmp_path / "a" / "inside"):
            with pytest.raises(OutputPathError, match="Cannot write .*Too many levels of symbolic links"):
                write(path)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_link_into_a_folder_that_takes_no_files(tmp_path):
    if not Path("/sys/kernel").is_dir():
        pytest.skip("not on this system")
    (tmp_path / "link").symlink_to("/sys/kernel/edit.safetensors")
    for write in (check_writable_file, lambda path: write_json(path, {}), check_free_folder, fill):
        with pytest.raises(OutputPathError, match="Cannot write .*/sys/kernel"):
            write(tmp_path / "link")


def test_permissions_are_kept(tmp_path):
    for mode in (0o600, 0o640, 0o444):
        path = tmp_path / f"{mode:o}"
        path.write_text("old")
        path.chmod(mode)
        write_json(path, mode)
        assert stat.S_IMODE(path.stat().st_mode) == mode and path.read_text() == f"{mode}\n"
    # safetensors puts a file of its own at the temporary path.
    path = tmp_path / "600"
    with written(path) as temporary:
        save_file({"a": torch.ones(2)}, temporary)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and load_file(path)["a"].tolist() == [1, 1]
    private = tmp_path / "private"
    private.mkdir(0o700)
    for text in ("empty before", "an earlier result"):
        fill(private, text)
        assert stat.S_IMODE(private.stat().st_mode) == 0o700 and (private / "a.txt").read_text() == text


def test_other_names_of_a_file_keep_what_they_have(tmp_path):
    """A backup that is made of hard links must not change with the next result."""
    (tmp_path / "a.json").write_text("old")
    os.link(tmp_path / "a.json", tmp_path / "backup.json")
    write_json(tmp_path / "a.json", "new")
    assert (tmp_path / "backup.json").read_text() == "old" and (tmp_path / "a.json").read_text() == '"new"\n'


def test_what_comes_there_meanwhile_is_not_replaced(tmp_path):
    """The work takes hours, and the check before it is long past."""
    path = tmp_path / "a.json"
    with pytest.raises(OutputPathError, match="it is a FIFO"), written(path) as temporary:
        temporary.write_text("new")
        os.mkfifo(path)
    assert stat.S_ISFIFO(path.stat().st_mode)
    path.unlink()
    with pytest.raises(OutputPathError, match="leads elsewhere now"), written(path) as temporary:
        temporary.write_text("new")
        path.symlink_to("b.json")
    assert path.is_symlink() and os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(OutputPathError, match="it is a FIFO"), written_folder(tmp_path / "folder"):
        os.mkfifo(tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["a.json", "folder"]


def test_a_folder_through_links(tmp_path, elsewhere):
    for name, there in (("old", True), ("new", False)):
        target, link = elsewhere / name, tmp_path / name
        if there:
            fill(target, "old")
        link.symlink_to(target)
        check_free_folder(link, replaces="a.txt")
        fill(link, "new")
        assert link.is_symlink() and not target.is_symlink() and (target / "a.txt").read_text() == "new"
    assert sorted(os.listdir(elsewhere)) == ["new", "old"]


def test_a_folder_that_cannot_be_exchanged_is_refused_before_the_work(tmp_path, monkeypatch):
    """Of a container, its results' folder is a mount point; the rename would fail after the merge."""
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "mounted")
    with pytest.raises(OutputPathError, match="mounted there cannot be renamed. Give a folder in it"):
        check_free_folder(tmp_path / "mounted")
    fill(tmp_path / "mounted" / "inside")


def test_a_name_that_is_too_long(tmp_path):
    for name in ("a" * 300, "a" * 300 + "/b"):
        for write in (check_writable_file, lambda path: write_json(path, {})):
            with pytest.raises(OutputPathError, match="File name too long"):
                write(tmp_path / name)


@pytest.mark.parametrize(
    "command",
    [
        "edit --editor nowhere --prompt a --target b --out OUT",
        "edit --editor nowhere --interactive true --out OUT",
        "edit --editor nowhere --edits facts.jsonl --separate true --out FOLDER",
        "plan --config nowhere --out OUT",
        "import-peft nowhere --out OUT",
        "make-generation-data text.txt --base nowhere --out FOLDER",
    ],
)
def test_commands_refuse_it_before_they_look_for_anything_else(tmp_path, monkeypatch, command):
    """What is made is lost where it cannot be written: an error about `nowhere` would come too late."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "facts.jsonl").write_text('{"prompt": "a", "target": "b"}\n')
    (tmp_path / "text.txt").write_text("Some text.\n")
    (tmp_path / "folder").mkdir()
    fifos = [tmp_path / "out", *(tmp_path / "folder" / name for name in ("a-b.safetensors", "train.jsonl"))]
    for path in fifos:
        os.mkfifo(path)
    result = call(*command.replace("OUT", "out").replace("FOLDER", "folder").split())
    assert result.code == 1
    assert_says(result.err, "Cannot write (out|folder/[a-z.-]+): it is a FIFO")
    assert all(stat.S_ISFIFO(path.stat().st_mode) for path in fifos)


def test_the_place_of_the_prepared_model(tmp_path, monkeypatch):
    monkeypatch.setenv("MEND_LIGHTNING_CACHE", str(tmp_path))
    os.mkfifo(tmp_path / MODEL_NAME)
    with pytest.raises(OutputPathError, match=f"{MODEL_NAME}: it is a FIFO.*MEND_LIGHTNING_CACHE"):
        get_smollm2(wheel=tmp_path / "nowhere")
    assert os.listdir(tmp_path) == [MODEL_NAME]


@pytest.mark.parametrize(
    "stage, name",
    [
        ("fit", "editor/editor.json"),
        ("fit", "editor"),
        ("fit", "curves.png"),
        ("test", "results.json"),
        ("predict", "predictions.jsonl"),
    ],
)
def test_a_run_refuses_it_at_its_start(tmp_path, stage, name):
    run = SimpleNamespace(checkpoint_callbacks=[], default_root_dir=str(tmp_path))
    StartReport().setup(run, None, stage)
    assert not list(tmp_path.iterdir()), "looking leaves nothing"
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(OutputPathError, match="it is a FIFO"):
        StartReport().setup(run, None, stage)
