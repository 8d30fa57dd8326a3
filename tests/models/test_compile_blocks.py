"""Compiled blocks: the same step, hooks that are seen, one code for all batches, and what is refused."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.bases import REMARKS, first_batches, given
from helpers.edits import changed, logits, random_edit
from helpers.models import ROUNDING, make_batch, make_rows, relative_error, spread_parameters, tiny_model
from torch import nn
from torch._dynamo.utils import counters

from mend_lightning import EditStack, MendModule
from mend_lightning.editors import EnnEditor, MendEditor
from mend_lightning.errors import ConfigError, UncompiledWarning
from mend_lightning.models import compile_blocks as block_compile
from mend_lightning.models.compile_blocks import check_compilable, compile_blocks, uncompile_blocks
from mend_lightning.training.step import edit_step

pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(*REMARKS)

FAMILIES = ("llama", "gpt2", "t5")


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch.compiler.reset()
    block_compile._compiled.clear()
    counters.clear()
    yield
    torch.compiler.reset()
    block_compile._compiled.clear()


@pytest.fixture
def quick(monkeypatch):
    """Blocks are traced, and their graphs run as they are: what Dynamo gets wrong shows, without a compiler's time."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def middle(model: nn.Module) -> list[str]:
    """Layers with blocks below and above, which gradients go through."""
    names = {
        "llama": ["model.layers.2.mlp.down_proj"], "gpt2": ["transformer.h.2.mlp.c_fc"],
        "t5": ["encoder.block.2.layer.1.DenseReluDense.wi", "decoder.block.2.layer.2.DenseReluDense.wo"],
    }  # fmt: skip
    return names[next(family for family in FAMILIES if family in type(model).__name__.lower())]


def editor_of(model: nn.Module, kind: type = MendEditor, **settings) -> nn.Module:
    editor = kind.for_model(model, middle(model), edit_rate=1e-2, **settings)
    return spread_parameters(editor)


def step(model: nn.Module, editor: nn.Module, batch) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Losses and gradients."""
    out = edit_step(model, editor, batch)
    return [out.edit, out.locality, out.inner], list(torch.autograd.grad(out.total(0.1), [*editor.parameters()]))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_the_same_with_one_code_for_all_batches(family, quick):
    model = tiny_model(family, torch.float64, blocks=5)
    editor = editor_of(model, rank=8)
    editor.train()
    step(model, editor, make_batch(family))
    editor.eval()
    # Rows, lengths and common beginnings differ; a causal model's common beginning is another kind of pass.
    for tasks, prefix in ((3, 4), (3, 0), (2, 0), (5, 4), (4, 0)):
        batch = make_batch(family, tasks=tasks, seed=tasks, prefix=prefix)
        losses, gradients = step(model, editor, batch)
        assert compile_blocks(model) == {"llama": 5, "gpt2": 5, "t5": 8}[family]
        compiled_losses, compiled_gradients = step(model, editor, batch)
        uncompile_blocks(model)
        # A norm computes in float32.
        assert max(map(relative_error, compiled_losses, losses)) < 1e-5
        assert max(map(relative_error, compiled_gradients, gradients)) < 1e-4
        assert counters["stats"]["unique_graphs"] == len(block_compile._compiled)
    # With gradients and without, with and without a common beginning; T5: of each stack, and with or without padding.
    assert len(block_compile._compiled) == {"llama": 3, "gpt2": 3, "t5": 5}[family]
    assert {key[4][0] for key in block_compile._compiled} == {True, False}


def test_the_code_of_a_c_compiler():
    """One kind of block in one kind of pass: compiling takes seconds."""
    model, exact = tiny_model("llama", torch.bfloat16, blocks=3), tiny_model("llama", torch.bfloat16, blocks=3).double()
    rows = make_rows("llama", [0, 0, 1], 2)
    expected, truth = logits(model, rows).double(), logits(exact, rows)
    compile_blocks(model)
    found = logits(model, rows).double()
    assert len(block_compile._compiled) == 1 and not torch.equal(found, expected)
    # It rounds at other places than plain torch, and not more: which of two such errors is larger is chance.
    assert relative_error(found, truth) < 2 * relative_error(expected, truth)


def test_second_order_gradients(quick):
    """torch cannot take them through compiled code: it is used where no gradient is asked for."""
    model, batch = tiny_model("llama", torch.float64, blocks=5), make_batch("llama")
    editor = editor_of(model, EnnEditor)
    losses, gradients = step(model, editor, batch)
    compile_blocks(model, gradients=False)
    found = step(model, editor, batch)
    assert max(map(relative_error, [*found[0], *found[1]], [*losses, *gradients])) < 1e-5
    assert {key[4][0] for key in block_compile._compiled} == {False}


def test_the_editor_says_whether_gradients_go_through_compiled_code(mend):
    for first_order in (True, False):
        module = mend("llama", compile_blocks=True, algorithm=partial(EnnEditor, first_order=first_order))
        module.configure_model()
        forwards = [block.__dict__["forward"] for block in module.base_model.model.layers]
        assert [forward.gradients for forward in forwards] == [first_order] * len(forwards)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_key_value_caches_are_filled(family, quick):
    plain, model = tiny_model(family, blocks=3), tiny_model(family, blocks=3)
    compile_blocks(model)
    ids = torch.randint(2, 20, (3, 7))
    first, second = ids[:, :4], ids[:, 4:]
    caches = []
    for each in (plain, model):
        cache = each(input_ids=first, use_cache=True).past_key_values
        found = each(input_ids=second, past_key_values=cache, use_cache=True)
        caches.append([found.logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))])
    assert [tensor.shape for tensor in caches[0]] == [tensor.shape for tensor in caches[1]]
    assert max(map(relative_error, *caches)) < 1e-5
    # From nothing, and from something.
    assert len(block_compile._compiled) == counters["stats"]["unique_graphs"] == 2


def test_lengths_that_happen_to_be_equal(quick):
    """As many rows as tokens, and as many as a head is wide: the code is for any number nevertheless."""
    model = tiny_model("llama", blocks=3)
    compile_blocks(model)
    width = model.config.hidden_size // model.config.num_attention_heads
    for rows, tokens in ((width, width), (width, 5), (3, 5), (4, 4)):
        model(input_ids=torch.ones(rows, tokens, dtype=torch.long), use_cache=False)
    assert len(block_compile._compiled) == counters["stats"]["unique_graphs"] == 1


def test_edits_and_hooks_in_compiled_blocks(quick):
    plain, rows = tiny_model("llama", blocks=4), make_rows("llama", [0, 0], 1)
    first, second = random_edit(plain, 1), random_edit(plain, 2)
    model = tiny_model("llama", blocks=4)
    compile_blocks(model)
    before = logits(model, rows)
    code = dict(block_compile._compiled)
    with first.applied(model):
        assert relative_error(logits(model, rows), logits(changed(plain, first), rows)) < 1e-6
    with EditStack(model) as stack:
        stack.add(first, "first")
        stack.add(second, "second")
        assert relative_error(logits(model, rows), logits(changed(plain, first, second), rows)) < 1e-6
    seen = []
    handle = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda *_: seen.append(1))
    logits(model, rows)
    handle.remove()
    assert seen == [1]
    assert torch.equal(logits(model, rows), before)
    # Nothing was compiled anew, nor forgotten.
    assert code == block_compile._compiled and counters["stats"]["unique_graphs"] == len(code) == 1


def test_it_stays_the_same_model(quick, tmp_path):
    plain, model = tiny_model("llama", torch.float32, blocks=3), tiny_model("llama", torch.float32, blocks=3)
    rows = make_rows("llama", [0, 0], 1)
    expected = logits(model, rows)
    compile_blocks(model)
    assert relative_error(logits(model, rows), expected) < 1e-5
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.save_pretrained(tmp_path)
    assert relative_error(logits(type(model).from_pretrained(tmp_path), rows), expected) < ROUNDING
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[1].mlp.down_proj.weight.zero_()
    assert relative_error(logits(twin, rows), expected) > 0.01
    assert relative_error(logits(model, rows), expected) < 1e-5
    ids = rows.inputs["input_ids"][:1]
    generated = [
        each.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, pad_token_id=0)
        for each in (plain, model)
    ]
    assert torch.equal(*generated)
    uncompile_blocks(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(logits(model, rows), expected)


def test_what_cannot_be_compiled(quick, monkeypatch):
    rows = make_rows("llama", [0, 0], 1)
    for sharded, quantized, said in ((True, False, "sharded"), (False, True, "quantised")):
        with pytest.raises(ConfigError, match=said):
            check_compilable(sharded, quantized)
    check_compilable(False, False)
    with pytest.raises(ConfigError, match="no two blocks"):
        compile_blocks(nn.Linear(2, 2))
    model = tiny_model("llama", blocks=3)
    compile_blocks(model)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: torch._dynamo.graph_break() or x @ self.weight.T)
    with pytest.raises(ConfigError, match="torch cannot compile LlamaDecoderLayer"):
        logits(model, rows)


def test_code_that_would_be_compiled_again_and_again(quick, monkeypatch):
    """Then the block runs as it is, and says so."""
    model, rows = tiny_model("llama", blocks=3), make_rows("llama", [0, 0], 1)
    expected = logits(model, rows)
    # Seen by Dynamo alone.
    monkeypatch.setattr(block_compile, "_signature", lambda value: None)
    compile_blocks(model)
    with torch._dynamo.config.patch(recompile_limit=1):
        logits(model, rows)
        with torch.autocast("cpu", torch.bfloat16), pytest.warns(UncompiledWarning, match="LlamaDecoderLayer") as said:
            logits(model, rows)
    assert len(said) == 1
    assert relative_error(logits(model, rows), expected) < 1e-6
    block_compile._given_up.clear()


def test_fit(mend, edit_data, trainer, quick):
    module, other = mend("llama", compile_blocks=True), mend("llama")
    batches = first_batches(module, edit_data(), 3)
    other.configure_model()
    other.editor.load_state_dict(module.editor.state_dict())
    for each in (module, other):
        trainer(max_steps=3).fit(each, given(batches))
    assert block_compile._compiled
    for name, value in other.editor.state_dict().items():
        torch.testing.assert_close(module.editor.state_dict()[name], value, rtol=1e-3, atol=1e-5)


def test_the_benchmark(quick, monkeypatch, tmp_path, capsys):
    """The same losses, a row, and a line; the blocks are left as they were."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks import compile as benchmark
    from benchmarks.__main__ import main

    made = []
    make = benchmark.make_case
    monkeypatch.setattr(
        benchmark, "make_case", lambda *args, **settings: made.append(make(*args, **settings)) or made[0]
    )
    options = [
        "--cases",
        "tiny-t5:float32",
        "--repeats",
        "1",
        "--rank",
        "8",
        "--batches",
        "2",
        "--edits",
        "2",
        "--threads",
        "1",
    ]
    line = main(["compile", *options, "--out", str(tmp_path)])
    found = line["cases"]["tiny-t5:float32"]
    assert found["difference"] < 1e-4 and found["blocks"] == 4
    assert set(found["seconds"]) == {"trunk", "trunk, compiled", "step", "step, compiled"}
    assert json.loads((tmp_path / "compile.jsonl").read_text())["cases"] == line["cases"]
    assert "tiny-t5:float32" in capsys.readouterr().out
    assert not any("forward" in module.__dict__ for module in made[0].model.modules())


def test_fit_of_a_quantised_base_says_no_before_it_loads(trainer, edit_data):
    from mend_lightning import BaseModel

    module = MendModule(BaseModel("not/there", quantize="int8"), compile_blocks=True)
    with pytest.raises(ConfigError, match="the base is quantised"):
        trainer(max_steps=1).fit(module, edit_data(tokenizer="not/there"))
