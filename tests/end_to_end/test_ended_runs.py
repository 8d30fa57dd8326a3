"""Runs that a signal ends: what they keep, what they say, and what the shell is told."""

from __future__ import annotations

import os
import signal

import lightning as L
import pytest
import torch
from helpers.bases import REMARKS, run_config
from helpers.commandline import call
from safetensors.torch import load_file

from mend_lightning.cli.trainer_settings import note_sigterm_only
from mend_lightning.training.distributed.checkpoint_file import editor_state, read_checkpoint
from mend_lightning.training.module import MendModule

pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(*REMARKS)


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
def test_the_editor_so_far_is_kept_and_the_run_has_not_succeeded(sent, code, base_folder, facts, tmp_path, monkeypatch):
    step = MendModule.training_step

    def signalled(self, *args):
        assert self.trainer._signal_connector._sigterm_notifier_fn.__module__ == note_sigterm_only.__module__
        if self.global_step == 2:
            os.kill(os.getpid(), sent)
        return step(self, *args)

    monkeypatch.setattr(MendModule, "training_step", signalled)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        result = call("fit", "--config", run_config(tmp_path, base_folder("llama"), facts, max_steps=9))
    finally:
        # Lightning leaves Ctrl-C switched off.
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert result.code == code
    assert "Interrupted. To resume: the same command with --ckpt_path last" in result.out
    last = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert 2 <= last["global_step"] < 9
    kept, expected = load_file(tmp_path / "editor" / "editor.safetensors"), editor_state(last)
    assert kept.keys() == expected.keys() and all((kept[name] == expected[name]).all() for name in kept)


def test_a_signals_handler_waits_for_no_other_process(monkeypatch):
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    note_sigterm_only(trainer)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(
        torch.distributed, "broadcast", lambda *args, **kwargs: pytest.fail("the others may never answer")
    )
    before = signal.getsignal(signal.SIGTERM)
    trainer._signal_connector.register_signal_handlers()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert trainer.received_sigterm
