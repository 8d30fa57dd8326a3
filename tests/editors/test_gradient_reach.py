"""How far gradients reach, and factors of tokens of which some turn out to be zero, against those of which all count."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.models import KINDS, ROUNDING, make_rows, relative_error, spread_parameters, tiny_model
from torch import Tensor, nn

from mend_lightning.editors import EnnEditor, KnowledgeEditor, MendEditor, factors
from mend_lightning.editors.factors import Factors, descent, edit_factors, kept_factors
from mend_lightning.editors.gradient_reach import gradient_reach
from mend_lightning.editors.knowledge_editor import gated
from mend_lightning.editors.normalizer import RunningNormalizer
from mend_lightning.models.inputs.positions import Positions, Tokens
from mend_lightning.models.inputs.rows import Rows, concatenate_rows
from mend_lightning.models.layers import editable_layers, select_layers

WIDTH, VOCABULARY = 6, 40
MLP = {
    "gpt2": (".mlp.", "transformer.h.3"), "llama": (".mlp.", "model.layers.3"), "t5": ("DenseReluDense", "decoder.block.2"),
    "t5_gated": ("DenseReluDense", "decoder.block.2"), "bart": (".fc", "model.decoder.layers.2"),
    "bert": ("dense", "bert.encoder.layer.3"),
}  # fmt: skip


def test_every_family(family):
    """The MLPs of the last block see labels alone; those before see what is before a label, or in an encoder all tokens."""
    model = tiny_model(family, torch.float32)
    word, last = MLP[family]
    found = gradient_reach(model, editable_layers(model), make_rows(family, [0, 0, 1], 2))
    for name in (name for name in found if word in name and "pooler" not in name):
        if name.startswith(last):
            expected = "first" if family == "bert" else "labels"
        elif family == "bert" or "encoder" in name.split(".")[:2]:
            expected = "inputs"
        else:
            expected = "until"
        assert found[name] == expected, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_factors_are_those_of_all_tokens_that_count(family, dtype, monkeypatch):
    """Of every layer there is: what is kept, and its order."""
    model, rows = tiny_model(family, dtype), make_rows(family, [0, 2, 1, 2], 3, seed=5)
    layers, tokens = editable_layers(model), 0
    found, _, skipped = edit_factors(model, layers, rows)
    monkeypatch.setattr(factors, "gradient_reach", nothing_known)
    asked, _, share = edit_factors(model, layers, rows)
    assert found.keys() == asked.keys()
    for name, each in found.items():
        assert asked[name].kept is None and each.kept is not None, name
        for ours, theirs in ((each.u, asked[name].u), (each.delta, asked[name].delta)):
            assert torch.equal(ours[each.kept], theirs), name
            assert not ours[~each.kept].any(), name
        assert torch.equal(each.task[each.kept], asked[name].task) and torch.equal(each.row[each.kept], asked[name].row)
        tokens += len(each.u) - len(asked[name].u)
    assert float(skipped) == pytest.approx(float(share))
    # An MLP's first layer may be dead at a token, and a first token's query has no gradient; no more than those is in vain.
    assert tokens <= 0.1 * sum(len(each.u) for each in found.values())


def nothing_known(model: nn.Module, layers: Mapping[str, nn.Module], rows: Rows) -> dict[str, None]:
    return dict.fromkeys(layers)


class TinyLM(nn.Module):
    """Embeds, mixes tokens by a matrix that is not the data's, and predicts.

    Args:
        mixing: `[length, length]` -> what each token reads of the others.
        gate: what is read is multiplied by it.
    """

    def __init__(self, mixing, gate: float = 1.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head, self.mixing = nn.Linear(WIDTH, VOCABULARY, bias=False), mixing
        self.gate = nn.Parameter(torch.tensor(gate))

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.first(self.embed(input_ids))
        reads = self.mixing(torch.ones(input_ids.shape[1], input_ids.shape[1])) * self.mask(attention_mask)
        return SimpleNamespace(logits=self.head(self.second(h + self.gate * (reads @ h))))

    @staticmethod
    def mask(attention_mask: Tensor) -> Tensor:
        return attention_mask[:, None]


class Unmasked(TinyLM):
    """Padding is read as well."""

    @staticmethod
    def mask(attention_mask: Tensor) -> Tensor:
        return torch.ones_like(attention_mask[:, None])


class Alone(TinyLM):
    """No token reads another, which is more than to read it times zero."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.second(self.first(self.embed(input_ids)))))


@pytest.mark.parametrize(
    "model, expected",
    [
        (TinyLM(torch.tril), "until"),
        (TinyLM(torch.ones_like), "inputs"),
        (Alone(torch.tril), "labels"),
        (TinyLM(torch.triu), "inputs"),
        (Unmasked(torch.tril), "until"),
        (Unmasked(torch.ones_like), None),
        # Nothing is read, for now: training may change that.
        (TinyLM(torch.tril, gate=0.0), None),
    ],
    ids=["causal", "both ways", "alone", "backwards", "causal unmasked", "unmasked", "closed gate"],
)
def test_mixing(model, expected):
    found = gradient_reach(model, {"first": model.first, "second": model.second}, make_rows("llama", [0, 1], 2))
    assert found == {"first": expected, "second": "labels"}


def test_what_is_found_is_kept(monkeypatch):
    model, calls = tiny_model("gpt2", torch.float32), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    layers, rows = select_layers(model), make_rows("gpt2", [0, 1], 2)
    assert gradient_reach(model, layers, rows) == gradient_reach(model, layers, rows)
    assert len(calls) == 1
    copied = copy.deepcopy(model)
    gradient_reach(copied, select_layers(copied), rows)
    assert len(calls) == 2
    assert all(parameter.grad is None for parameter in model.parameters())


def test_anomaly_detection_is_not_disturbed():
    model = tiny_model("llama", torch.float32)
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        assert None not in gradient_reach(model, select_layers(model), make_rows("llama", [0], 1)).values()


def test_a_layer_that_is_called_twice():
    """It has twice as many tokens as the rows, of which the host knows nothing."""
    model = TinyLM(torch.tril)
    model.second = model.first
    found, _, _ = edit_factors(model, {"first": model.first}, make_rows("llama", [0, 1], 2))
    assert found["first"].kept is None and len(found["first"].u) > 0


# Tokens that turn out to be zero


def _zero_tokens() -> tuple[Tensor, Tensor, Rows, Tokens]:
    """Raw factors of rows of 5 tokens, of which some have no u and some no delta; and the tokens asked for."""
    torch.manual_seed(1)
    task = torch.tensor([0, 1, 1, 2])
    u, delta = torch.randn(4, 5, 12), torch.randn(4, 5, 3)
    u[0, 1], u[2, 0], delta[1, 3], delta[2, 2], delta[3, 4] = 0, 0, 0, 0, 0
    # Nobody asks for the last token of the first row, nor would it count.
    delta[0, 4] = 0
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[0, 4] = False
    rows = Rows({}, torch.zeros(4, 5, dtype=torch.long), task, 3, grouped=False)
    return u, delta, rows, Tokens.of(mask, task, 3)


def _both() -> tuple[Factors, Factors, Rows]:
    u, delta, rows, tokens = _zero_tokens()
    return kept_factors(u, delta, rows.task, 3), kept_factors(u, delta, rows.task, 3, tokens), rows


@pytest.mark.parametrize(
    "settings", [{}, {"inputs": "separate"}, {"ridge": 0.5}, {"normalize": False}, {"init": "xavier"}]
)
def test_zero_tokens_leave_no_trace_in_mend(settings):
    """Statistics, edits and gradients, from two batches; the statistics hold the numbers that were seen."""
    fewer, more, _ = _both()
    editor = spread_parameters(MendEditor({"a": (12, 3), "b": (12, 3)}, rank=4, **settings)).train()
    other = copy.deepcopy(editor)
    for scale in (1.0, 3.0):
        scaled = [
            {name: replace(each, u=each.u * scale * part) for name, part in (("a", 1.0), ("b", 2.0))}
            for each in (fewer, more)
        ]
        expected, found = editor(scaled[0]), other(scaled[1])
        for name in expected:
            assert relative_error(found[name].dense(), expected[name].dense()) < ROUNDING
            assert [found[name].of_task(t).rank for t in range(3)] == [expected[name].of_task(t).rank for t in range(3)]
            for model_deltas in (expected, found):
                model_deltas[name].dense().square().sum().backward(retain_graph=True)
    for (name, value), theirs in zip(editor.state_dict().items(), other.state_dict().values()):
        assert relative_error(theirs, value) < ROUNDING, name
    for (name, value), theirs in zip(editor.named_parameters(), other.parameters()):
        assert relative_error(theirs.grad, value.grad) < ROUNDING, name


def test_zero_tokens_leave_no_trace_in_plain_descent_and_gates():
    fewer, more, rows = _both()
    expected, found = (descent(each.u, each.delta, each, torch.tensor(0.3)) for each in (fewer, more))
    assert relative_error(found.dense(), expected.dense()) < ROUNDING
    gates = KnowledgeEditor({"fc": (12, 3)}, embedding=4, hidden=5, condition=6).gates["0"](torch.randn(4, 6))
    expected, found = (gated(each, gates, rows) for each in (fewer, more))
    assert relative_error(found.dense(), expected.dense()) < ROUNDING


def test_enn_with_zero_tokens_keeps_its_second_derivative(monkeypatch):
    """Its factors are functions of ΔW⁰; the gate lets them through."""
    model, rows = tiny_model("llama", torch.float32), make_rows("llama", [0, 1, 1], 2)
    gradients = []
    for _ in range(2):
        editor = EnnEditor.for_model(model, edit_rate=0.1)
        sum(delta.dense().square().sum() for delta in editor.make_deltas(model, rows).deltas.values()).backward()
        monkeypatch.setattr(factors, "gradient_reach", nothing_known)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in editor.parameters()]))
    assert relative_error(*gradients) < ROUNDING
    assert gradients[0].abs().max() > 0


def test_statistics_of_no_token():
    normalizer = RunningNormalizer(2)
    normalizer.update(torch.ones(3, 2), torch.zeros(3, dtype=torch.bool))
    assert normalizer.count == 0 and not normalizer.mean.any() and not normalizer.m2.any()


# Rows


@pytest.mark.parametrize("family", KINDS)
def test_tokens_by_hand(family):
    rows = make_rows(family, [0, 1, 1], 2, seed=3)
    attended = rows.inputs["attention_mask"].bool()
    labelled = rows.labels != -100
    last = (labelled * torch.arange(1, labelled.shape[1] + 1)).amax(1)
    expected = {
        "labels": labelled, "inputs": attended, "until": torch.arange(labelled.shape[1]) < last[:, None],
        "first": torch.arange(attended.shape[1]).expand_as(attended) == 0,
    }  # fmt: skip
    for reach, mask in expected.items():
        tokens = rows.tokens(reach)
        assert torch.equal(tokens.where.row, mask.nonzero()[:, 0]) and torch.equal(
            tokens.where.column, mask.nonzero()[:, 1]
        )
        counts = [int(mask[rows.task == task].sum()) for task in range(2)]
        assert (tokens.length, tokens.rank) == (mask.shape[1], max(counts))
        for task in range(2):
            assert tokens.slot[tokens.task == task].tolist() == list(range(counts[task]))


def test_rows_remember_what_they_were_on_the_host():
    """Moved, cut, joined: the copy on the host is of the same rows."""
    first, second = (make_rows("t5", [0, 1, 1], 2, seed) for seed in (0, 4))
    moved = [rows.to("cpu", copy=True) for rows in (first, second)]
    assert moved[0].host is first
    made = [concatenate_rows(moved), concatenate_rows(moved).part(slice(1, 5)), moved[1].of_task_range(slice(1, 2))]
    for rows in made:
        assert torch.equal(rows.host.labels, rows.labels) and torch.equal(rows.host.task, rows.task)
        assert all(torch.equal(rows.host.inputs[name], value) for name, value in rows.inputs.items())
        assert rows.host.labels.untyped_storage().data_ptr() != rows.labels.untyped_storage().data_ptr()
        assert torch.equal(rows.label_positions.row, Positions.of(rows.labels != -100).row)
    # What was changed after it was moved is not what it was.
    changed = replace(moved[0], labels=moved[0].labels.clone().fill_(-100))
    assert changed.unlabelled_task == 0
