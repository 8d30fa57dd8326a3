"""The trunk in groups of rows of like lengths: which groups, that nothing changes, and how little padding is run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations, islice, pairwise

import pytest
import torch
from helpers.bases import small_tokenizer, tiny_base
from helpers.blocks import DECODER_ONLY, OUTSIDE, blocks_of, logits_twice, modules_named, norm_of
from helpers.models import make_batch, make_rows, relative_error, tiny_model
from helpers.questions import write_questions
from helpers.step_reference import C_EDIT, check_against_reference, spread_editor
from torch import Tensor, nn
from torch.nn import functional

from mend_lightning.data.batch import EditBatch
from mend_lightning.data.datamodule import EditDataModule
from mend_lightning.editors import MendEditor
from mend_lightning.models.forward import length_groups as groups_of
from mend_lightning.models.forward.length_groups import length_groups, trunk_groups
from mend_lightning.models.forward.logits import attended_mask
from mend_lightning.models.forward.run_trunk import SHORTEST_PREFIX, common_prefix, run_trunk
from mend_lightning.models.inputs.rows import IGNORED_LABEL, Rows, concatenate_rows
from mend_lightning.models.layers import default_layers, match_layers
from mend_lightning.training.step import edit_step


@pytest.fixture
def eager(monkeypatch) -> None:
    """Groups wherever they leave out any padding."""
    monkeypatch.setattr(groups_of, "PASS_TOKENS", 0)
    monkeypatch.setattr(groups_of, "LEAST_SAVING", 0.0)


@contextmanager
def passes(block: nn.Module) -> Iterator[list[tuple[int, int]]]:
    """(rows, length) of every time a block itself runs; where it is replayed, it does not."""
    found: list[tuple[int, int]] = []
    handle = norm_of(block).register_forward_pre_hook(lambda module, args: found.append(tuple(args[0].shape[:2])))
    yield found
    handle.remove()


def cheapest(lengths: list[int], pass_tokens: int, most: int) -> int:
    """Slow truth: every cut of the sorted lengths."""
    order, costs = sorted(lengths, reverse=True), []
    for count in range(1, min(most, len(order)) + 1):
        for cuts in combinations(range(1, len(order)), count - 1):
            parts = pairwise((0, *cuts, len(order)))
            costs.append(sum(order[a] * (b - a) for a, b in parts) + pass_tokens * (count - 1))
    return min(costs)


@pytest.mark.parametrize("pass_tokens", [0, 5, 40])
@pytest.mark.parametrize("most", [2, 4])
def test_groups_are_the_cheapest(pass_tokens, most):
    several = 0
    for seed in range(30):
        lengths = torch.randint(4, 60, (1 + seed % 10,), generator=torch.Generator().manual_seed(seed)).tolist()
        groups = length_groups(lengths, pass_tokens, most)
        assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
        cost = sum(len(group) * max(lengths[i] for i in group) for group in groups) + pass_tokens * (len(groups) - 1)
        best, whole = cheapest(lengths, pass_tokens, most), len(lengths) * max(lengths)
        assert cost == (best if whole - best >= 0.05 * whole else whole)
        longest = [max(lengths[i] for i in group) for group in groups]
        assert longest == sorted(longest, reverse=True) and all(group == sorted(group) for group in groups)
        several += len(groups) > 1
    assert several > 3


def test_one_group_where_several_save_little():
    assert length_groups([]) == [[]] and length_groups([7]) == [[0]]
    assert length_groups([20] * 30 + [19] * 30) == [list(range(60))]
    # 300 tokens less of 1200, for a pass that costs 32; and for one that costs 250.
    lengths = [10] * 30 + [20] * 30
    assert length_groups(lengths) == [list(range(30, 60)), list(range(30))]
    assert length_groups(lengths, pass_tokens=250) == [list(range(60))]


def widened(rows: Rows) -> Rows:
    """The same rows as part of a set whose longest row has two tokens more."""
    width = rows.inputs["attention_mask"].shape[1]

    def wide(ids: Tensor, value: int) -> Tensor:
        return functional.pad(ids, (0, 2), value=value) if ids.shape[1] == width else ids

    inputs = {name: wide(ids, 0) for name, ids in rows.inputs.items()}
    return replace(rows, inputs=inputs, labels=wide(rows.labels, IGNORED_LABEL))


def test_edited_logits_are_those_without_a_trunk(family, eager):
    """For every kind of trunk: below the default layers, the whole encoder, all blocks."""
    model, rows = tiny_model(family), widened(make_rows(family, [0, 0, 1, 1, 2, 2, 2], 3))
    real = attended_mask(rows)
    for patterns in (default_layers(model), DECODER_ONLY.get(family), OUTSIDE.get(family)):
        if patterns is not None:
            layers = modules_named(model, match_layers(model, patterns))
            with passes(blocks_of(model)[0]) as ran:
                again, plain, _ = logits_twice(model, rows, layers)
            # The last is the pass without a trunk.
            assert len(ran) > 2 and sum(count for count, _ in ran[:-1]) == len(rows)
            pairs = (again, plain) if again.dim() == 2 else (again[real], plain[real])
            assert relative_error(*pairs) < 1e-12, patterns


def test_behind_a_common_beginning(eager):
    model, rows = tiny_model("llama"), make_rows("llama", [0, 0, 1, 1, 2, 2], 3, prefix=4)
    with passes(blocks_of(model)[0]) as ran:
        again, plain, _ = logits_twice(model, rows, modules_named(model, default_layers(model)))
    assert ran[0] == (1, 4) and len(ran) > 3
    real = attended_mask(rows)
    assert relative_error(again[real], plain[real]) < 1e-12


@pytest.mark.parametrize("prefix", [0, 4])
def test_losses_and_gradients_are_the_papers(family, prefix, eager):
    model = tiny_model(family)
    with passes(blocks_of(model)[0]) as ran:
        check_against_reference(
            model, spread_editor(model), [make_batch(family, seed=seed, prefix=prefix) for seed in (0, 1)]
        )
    rows = len(make_batch(family).z_edit) + len(make_batch(family).x_out)
    assert any(1 < count < rows for count, _ in ran)


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_the_step_is_the_same_with_and_without(family, eager, monkeypatch):
    model, batch = tiny_model(family), make_batch(family)
    editor = spread_editor(model).double()
    results = []
    for most in (6, 1):
        monkeypatch.setattr(groups_of, "MOST_GROUPS", most)
        editor.zero_grad()
        out = edit_step(model, editor.eval(), batch)
        out.total(C_EDIT).backward()
        results.append([out.edit, out.locality, *(parameter.grad for parameter in editor.parameters())])
    for found, expected in zip(*results):
        assert relative_error(found, expected) < 1e-6


def test_what_was_run_already_does_not_count():
    model, mask = tiny_model("llama"), torch.ones(60, 40, dtype=torch.long)
    mask[:30, 36:] = 0
    rows = Rows({"input_ids": mask, "attention_mask": mask}, mask, torch.arange(60), 60)
    assert len(trunk_groups(model, rows)) == 1
    assert trunk_groups(model, rows, skipped=24) == [list(range(30, 60)), list(range(30))]


def test_nothing_is_run_where_the_first_block_is_edited(eager):
    model, rows = tiny_model("llama"), make_rows("llama", [0, 1, 2], 3)
    assert run_trunk(model, rows, modules_named(model, ["model.layers.0.mlp.down_proj"])).stacks == {}


class Numbered(nn.Module):
    """A block that also returns what cannot be told apart by rows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        return self.fc(states), states.sum((0, 1))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(40, 4), nn.ModuleList(Numbered() for _ in range(3))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.embedding(input_ids)
        for block in self.blocks:
            states = block(states)[0]
        return states


def test_outputs_that_cannot_be_put_together_come_of_one_pass(eager):
    model, rows = Blocks(), make_rows("llama", [0, 1, 2, 3], 4)
    assert len(trunk_groups(model, rows)) > 1
    found = run_trunk(model, rows, {"blocks.2.fc": model.blocks[2].fc}).stacks["blocks"].output
    expected = model.blocks[1](model.blocks[0](model.embedding(rows.inputs["input_ids"]))[0])
    assert all(torch.equal(*pair) for pair in zip(found, expected))


def test_lengths_that_the_host_does_not_know(eager, monkeypatch):
    """Nothing is asked of a device, and where blocks are sharded all processes run one pass."""
    model, rows = tiny_model("llama"), make_rows("llama", [0, 1, 2, 3], 4)
    whole = [[0, 1, 2, 3]]
    assert trunk_groups(model, rows) != whole
    assert trunk_groups(model, rows.to("meta")) == whole
    assert trunk_groups(model, replace(rows, inputs={"input_ids": rows.inputs["input_ids"]})) == whole
    assert trunk_groups(model, replace(rows, inputs={**rows.inputs, "position_ids": rows.inputs["input_ids"]})) == whole
    monkeypatch.setattr(groups_of, "is_sharded", lambda model: True)
    assert trunk_groups(model, rows) == whole


def padded_shares(model: nn.Module, editor: MendEditor, batches: list[EditBatch]) -> tuple[float, float]:
    """Of the slots that the first block (trunk) and the last (edited) run in training steps, those that are padding."""
    first, last = blocks_of(model)[0], blocks_of(model)[-1]
    slots, real = [0, 0], [0, 0]
    for batch in batches:
        with passes(first) as below, passes(last) as above:
            edit_step(model, editor, batch)
        for i, ran in enumerate((below, above)):
            slots[i] += sum(count * length for count, length in ran)
        rows = concatenate_rows([batch.z_edit, batch.x_out, batch.x_in])
        shared = common_prefix(rows)
        shared = shared if shared >= SHORTEST_PREFIX else 0
        real[0] += int(rows.inputs["attention_mask"].sum()) - (len(rows) - 1) * shared
        # The unrelated rows run twice, unedited and edited.
        real[1] += sum(
            int(each.inputs["attention_mask"].sum()) for each in (batch.z_edit, batch.x_out, batch.x_out, batch.x_in)
        )
    return tuple(1 - tokens / ran for tokens, ran in zip(real, slots))


@pytest.mark.parametrize("data", ["questions", "world_facts"])
def test_less_than_a_tenth_of_what_a_step_runs_is_padding(data, tmp_path, monkeypatch):
    tokenizer = small_tokenizer()
    settings = {"prompt": "Geography quiz\nQ: {input}\nA:", "stop": "\n"}
    if data == "questions":
        settings = write_questions(tmp_path)
    model = tiny_base("llama", tokenizer)
    editor = MendEditor.for_model(model, rank=2)
    shares = []
    for bucket, most in ((True, 6), (False, 1)):
        monkeypatch.setattr(groups_of, "MOST_GROUPS", most)
        loader = EditDataModule(
            **settings, tokenizer=tokenizer, rephrases=3, locality=4, bucket_by_length=bucket
        ).train_dataloader()
        shares.append(padded_shares(model, editor, list(islice(loader, 12))))
    # A common beginning, which only the trunk runs once, has no padding.
    assert max(shares[0]) < 0.1 < 0.2 < shares[1][0] and shares[1][1] > 1.5 * shares[0][1]
