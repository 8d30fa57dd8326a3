"""Losses at the head a few positions at a time, against whole matrices of logits in float64."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers.models import KINDS, VOCABULARY, make_batch, make_rows, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mend_lightning.editors import MendEditor
from mend_lightning.errors import LayerNotCalledError
from mend_lightning.models.forward import head as head_module
from mend_lightning.models.forward.head import HeadStates, head_kl, head_nll, states_at
from mend_lightning.training.step import edit_step

GENERATIVE = [family for family, kind in KINDS.items() if kind != "classifier"]


@pytest.fixture
def few_at_once(monkeypatch):
    """Three positions at a time."""
    monkeypatch.setattr(head_module, "_at_once", lambda head: 3)


def scaled(hidden: Tensor, weight: Tensor, at_once: int) -> HeadStates:
    return HeadStates(hidden, lambda part: part @ weight.T, at_once)


def dense_means(values: Tensor, task: Tensor, tasks: int) -> Tensor:
    return torch.stack([values[task == i].mean() for i in range(tasks)])


@pytest.mark.parametrize("at_once", [1, 3, 50])
def test_losses_and_gradients(at_once):
    generator = torch.Generator().manual_seed(0)
    hidden, base = (torch.randn(11, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    targets, task = torch.randint(9, (11,), generator=generator), torch.arange(11) % 3
    coefficients = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    hidden.requires_grad_()

    nll = dense_means(F.cross_entropy(hidden @ weight.T, targets, reduction="none"), task, 3)
    log_p, log_q = (F.log_softmax(states @ weight.T, -1) for states in (base, hidden))
    kl = dense_means((log_p.exp() * (log_p - log_q)).sum(-1), task, 3)
    found = (
        head_nll(scaled(hidden, weight, at_once), targets, task, 3),
        head_kl(scaled(base, weight, at_once), scaled(hidden, weight, at_once), task, 3),
    )
    for expected, actual in zip((nll, kl), found):
        assert actual.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
        gradients = [torch.autograd.grad((each * coefficients).sum(), hidden)[0] for each in (expected, actual)]
        assert torch.allclose(*gradients, rtol=1e-5, atol=1e-6)


def test_a_task_without_positions_is_not_zero():
    states = HeadStates(torch.zeros(1, 4), lambda part: part, 2)
    found = head_nll(states, torch.tensor([1]), torch.tensor([1]), 2)
    assert found[0].isnan() and float(found[1]) == pytest.approx(1.3862944)


def whole_logits(model: nn.Module, rows, where) -> Tensor:
    return model(**rows.inputs).logits[where.row, where.column]


@pytest.mark.parametrize("family", GENERATIVE)
def test_rest_of_the_model(family, few_at_once):
    """Logits of some states are those of the whole model, which runs no block for them."""
    model, rows = tiny_model(family), make_rows(family, [0, 1, 2], 3)
    where, ran = rows.attended_positions, []
    states = states_at(model, rows, where)
    handles = [
        m.register_forward_hook(lambda *_: ran.append(1)) for m in model.modules() if isinstance(m, nn.Embedding)
    ]
    logits = torch.cat([states.logits_of(part) for part in states.hidden.split(states.at_once)])
    for handle in handles:
        handle.remove()
    assert not ran and states.at_once == 3
    assert torch.allclose(logits, whole_logits(model, rows, where), rtol=1e-12)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_what_comes_behind_the_head():
    """A cap on the logits, as Gemma 2 has."""
    config = transformers.Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5, query_pre_attn_scalar=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model, rows = transformers.Gemma2ForCausalLM(config).double().eval(), make_rows("llama", [0, 1], 2)
    model.lm_head.weight.data *= 40
    states = states_at(model, rows, rows.label_positions)
    logits = states.logits_of(states.hidden)
    assert torch.allclose(logits, whole_logits(model, rows, rows.label_positions), rtol=1e-12)
    assert 0.4 < logits.detach().abs().max().item() <= 0.5


def test_an_edited_head_sees_whole_rows():
    model, rows = tiny_model("llama"), make_rows("llama", [0, 1], 2)
    expected = whole_logits(model, rows, rows.label_positions)
    handle = model.lm_head.register_forward_hook(lambda module, args, output: output + args[0].shape[0])
    states = states_at(model, rows, rows.label_positions)
    handle.remove()
    assert torch.allclose(states.logits_of(states.hidden), expected + 2)


def test_a_model_that_goes_around_its_head(monkeypatch):
    model, rows = tiny_model("llama"), make_rows("llama", [0], 1)
    monkeypatch.setattr(model, "forward", lambda **inputs: inputs)
    with pytest.raises(LayerNotCalledError, match="LlamaForCausalLM returned without a call of its output head"):
        states_at(model, rows, rows.label_positions)


class Widest(TorchDispatchMode):
    """The most rows that any matrix as wide as the vocabulary had."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape[1] == self.width:
                # The head's own matrix has it the other way round, or is one of the model's.
                self.rows = max(self.rows, 0 if tensor.shape[0] == WIDTH else tensor.shape[0])
        return result


WIDTH = 16  # of the tiny models


@pytest.mark.parametrize(
    ("family", "layer"), [("gpt2", "transformer.h.3.attn.c_proj"), ("t5", "decoder.block.2.layer.0.SelfAttention.o")]
)
def test_no_matrix_of_all_positions_and_the_vocabulary(family, layer, few_at_once):
    # The MLPs' transforms would be as wide as the vocabulary.
    model, batch = tiny_model(family), make_batch(family)
    editor = MendEditor.for_model(model, [layer], rank=4, edit_rate=0.01)
    with Widest(VOCABULARY) as seen:
        edit_step(model, editor, batch).total(0.1).backward()
    assert 0 < seen.rows <= 3 < len(batch.x_out.attended_positions)
