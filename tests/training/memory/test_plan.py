"""The memory plan against bytes that are really there: of built models, editors and optimisers, and of real steps."""

from __future__ import annotations

import json
import socket
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import transformers
from helpers.bases import REMARKS
from helpers.commandline import assert_says, call
from torch.profiler import record_function

from mend_lightning.data.datamodule import EditDataModule
from mend_lightning.editors.enn import EnnEditor
from mend_lightning.editors.knowledge_editor import KnowledgeEditor
from mend_lightning.editors.mend import MendEditor
from mend_lightning.editors.precondition import InputMoments
from mend_lightning.errors import ConfigError
from mend_lightning.models.architecture import Architecture, model_class
from mend_lightning.models.forward import head, length_groups
from mend_lightning.models.forward.phases import PHASES, phase
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.inputs.rows import IGNORED_LABEL
from mend_lightning.models.layers import find_stacks
from mend_lightning.models.random_weights import empty_model, random_model, stand_in_tokenizer
from mend_lightning.training.memory.activations import BatchCounts, RowCounts, step_bytes
from mend_lightning.training.memory.batch_sizes import _batch, _orders, batch_counts, measured_counts, most_counts
from mend_lightning.training.memory.live_bytes import LiveBytes
from mend_lightning.training.memory.plan import GIB, advice, devices_needed, plan_memory, sizes_of
from mend_lightning.training.step import edit_step, step_loss

pytestmark = pytest.mark.filterwarnings(*REMARKS)

CAUSAL = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4, vocab_size=900)
GROUPED = {**CAUSAL, "num_key_value_heads": 2}
# Large enough for masks and ids to be small beside states and logits.
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(n_embd=64, n_layer=4, n_head=4, vocab_size=900),
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "gemma2": lambda: transformers.Gemma2Config(**GROUPED, head_dim=16),
    "gptj": lambda: transformers.GPTJConfig(n_embd=64, n_layer=4, n_head=4, rotary_dim=8, vocab_size=900),
    "t5": lambda: transformers.T5Config(
        d_model=64, d_kv=16, d_ff=160, num_layers=3, num_heads=4, vocab_size=900, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, decoder_start_token_id=0,
    ),
    "bart": lambda: transformers.BartConfig(
        d_model=64, encoder_layers=3, decoder_layers=3, encoder_ffn_dim=160, decoder_ffn_dim=160,
        encoder_attention_heads=4, decoder_attention_heads=4, vocab_size=900,
    ),
}  # fmt: skip
EXPECTED = 0.03


@pytest.fixture(autouse=True)
def one_length(monkeypatch):
    """All rows of a pass padded to one length, as accelerators run them and the plan counts them."""
    monkeypatch.setattr(length_groups, "MOST_GROUPS", 1)


def built(name: str, dtype: torch.dtype = torch.float32, **changes):
    """(real model, the same without weights, tokenizer) of a config."""
    config = CONFIGS[name]()
    vars(config).update(changes)
    config.bos_token_id, config.pad_token_id, config.eos_token_id = None, 0, 1
    tokenizer = stand_in_tokenizer(config)
    options = {"revision": None, "trust_remote_code": False}
    real = random_model(Architecture("", config, tokenizer, model_class(config), dtype, options))
    return real.eval().requires_grad_(False), empty_model(config, dtype).eval().requires_grad_(False), tokenizer


def editors(real, empty, **settings):
    made = MendEditor.for_model(real, rank=48, **settings)
    with torch.device("meta"):
        return made.train(), MendEditor.for_model(empty, rank=48, **settings).train()


def batches(real, tokenizer, count: int, **settings):
    data = EditDataModule("world_facts/train", max_length=96, bucket_by_length=False, **settings)
    encoder = Encoder.for_model(real, tokenizer, data.format, data.max_length)
    sampler = data.sampler("train")
    return [_batch(data, sampler, encoder, keys) for keys in _orders(data, sampler, encoder, count)]


def really_alive(real, editor, batch, at_once: int | None = None) -> dict[str, int]:
    """Slow truth: bytes of the tensors of one real step at the worst moment by phase, less the new gradient."""
    gradient = sum(4 * p.numel() for p in editor.parameters())
    with LiveBytes("") as live:
        loss = step_loss(real, editor, batch, 0.1, at_once)[0]
        forward = live.peak, live.parts
        editor.zero_grad()
        live.reset_peak()
        loss.backward()
    return forward[1] if forward[0] > live.peak - gradient else {**live.parts, "gradient": -gradient}


def assert_planned(parts, alive):
    assert sum(parts.values()) == pytest.approx(sum(alive.values()), rel=EXPECTED), (parts, alive)
    assert parts["logits"] == pytest.approx(alive.get("logits", 0), rel=0.02), (parts, alive)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 6), (torch.bfloat16, 2)])
def test_activations_are_those_of_a_real_step(name, dtype, size):
    real, empty, tokenizer = built(name, dtype)
    editor, planned = editors(real, empty)
    first, batch = batches(real, tokenizer, 2, batch_size=size, locality=2, rephrases=2)
    # Statistics and the shapes that torch keeps are there before.
    edit_step(real, editor, first).total(0.1).backward()
    parts = step_bytes(empty, planned, batch_counts(batch, "all"))
    assert_planned(parts, really_alive(real, editor, batch))
    assert tuple(parts) == PHASES and all(size >= 0 for size in parts.values())
    assert min(parts["edited pass"], parts["transforms"], parts["logits"]) > 0
    assert all(parameter.grad is None for parameter in planned.parameters())


@pytest.mark.parametrize(("name", "confidence"), [("llama", None), ("t5", 0.9)])
def test_a_step_in_parts_takes_less(name, confidence):
    real, empty, tokenizer = built(name)
    editor, planned = editors(real, empty, confidence=confidence)
    first, batch = batches(real, tokenizer, 2, batch_size=8, locality=4, rephrases=2)
    edit_step(real, editor, first).total(0.1).backward()
    counts = batch_counts(batch, "all")
    whole, parts = (step_bytes(empty, planned, counts, at_once) for at_once in (None, 1))
    assert sum(parts.values()) < 0.7 * sum(whole.values())
    assert sum(parts.values()) == pytest.approx(sum(really_alive(real, editor, batch, 1).values()), rel=EXPECTED)
    # With the edited pass of a single edit, the search for the size of all edits takes most.
    assert (parts["confidence"] > parts["edited pass"]) is (confidence is not None)


def test_bytes_count_as_of_the_innermost_phase():
    with LiveBytes("none") as live, phase("trunk"):
        kept = [torch.ones(1)]
        with record_function("anybody's"), phase("logits"):
            kept.append(torch.ones(2))
        kept.append(torch.ones(4))
    with live:
        kept.append(torch.ones(8))
    assert live.parts == {"none": 32, "trunk": 20, "logits": 8}


@pytest.fixture
def few_logits(monkeypatch):
    """Of 9000 entries, 16 positions at a time."""
    monkeypatch.setattr(head, "LOGITS_BYTES", 16 * 4 * 9000)


@pytest.mark.parametrize(("name", "dtype"), [("gemma2", torch.float16), ("bart", torch.bfloat16)])
def test_logits_are_those_of_a_few_positions_or_of_all_where_the_model_is_sharded(few_logits, name, dtype):
    real, empty, tokenizer = built(name, dtype, vocab_size=9000)
    editor, planned = editors(real, empty)
    first, batch = batches(real, tokenizer, 2, batch_size=6, locality=2)
    edit_step(real, editor, first).total(0.1).backward()
    counts, logits = batch_counts(batch, "all"), []
    for sharded in (False, True):
        parts = step_bytes(empty, planned, counts, sharded=sharded)
        with head.whole_logits(real) if sharded else nullcontext():
            assert_planned(parts, really_alive(real, editor, batch))
        logits.append(parts["logits"])
    assert logits[0] < 0.6 * logits[1], (logits, counts)


def test_sets_of_rows_whose_lengths_cannot_be_told_apart():
    _, empty, _ = built("t5")
    with torch.device("meta"):
        editor = MendEditor.for_model(empty, rank=48).train()
    rows = RowCounts(2, 6, 12, 8, decoder_length=4)
    counts = BatchCounts(2, rows, rows, replace(rows, length=9, decoder_length=9), 16)
    assert sum(step_bytes(empty, editor, counts).values()) > 0


def test_activations_grow_with_edits():
    real, empty, tokenizer = built("llama")
    _, editor = editors(real, empty)
    (batch,) = batches(real, tokenizer, 1, batch_size=4)
    counts = batch_counts(batch, "all")
    twice = {name: replace(getattr(counts, name), rows=2 * getattr(counts, name).rows, tokens=2 * getattr(counts, name).tokens,
                           labels=2 * getattr(counts, name).labels) for name in ("z_edit", "x_in", "x_out")}  # fmt: skip
    more = replace(counts, tasks=2 * counts.tasks, locality=2 * counts.locality, **twice)
    parts, doubled = (step_bytes(empty, editor, each) for each in (counts, more))
    assert sum(doubled.values()) == pytest.approx(2 * sum(parts.values()), rel=0.05)


def test_logits_grow_with_the_vocabulary_until_only_some_are_made_at_a_time(monkeypatch):
    real, empty, tokenizer = built("llama")
    _, editor = editors(real, empty)
    (batch,) = batches(real, tokenizer, 1, batch_size=8)
    counts = batch_counts(batch, "all")

    def logits(vocabulary: int) -> int:
        config = transformers.LlamaConfig(**{**GROUPED, "vocab_size": vocabulary})
        model = empty_model(config, torch.float32).eval().requires_grad_(False)
        return step_bytes(model, editor, counts)["logits"]

    assert logits(9000) > 8 * logits(900)
    monkeypatch.setattr(head, "LOGITS_BYTES", 100 * 4 * 9000)
    # But for a few positions' float32 copies.
    assert logits(18000) < 1.3 * logits(9000)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
@pytest.mark.parametrize("precondition", [None, 1e-3])
def test_what_stays_is_what_is_really_there(name, precondition):
    """Slow truth: the tensors of a built model, of its editor after one step, and of Adam."""
    real, empty, tokenizer = built(name, torch.bfloat16)
    editor, planned = editors(real, empty, precondition=precondition)
    for preconditioner in editor.preconditioners:
        preconditioner.calibrated.fill_(True)
    adam = torch.optim.Adam(editor.parameters())
    edit_step(real, editor, batches(real, tokenizer, 1, batch_size=2)[0]).total(0.1).backward()
    adam.step()

    def total(tensors) -> int:
        return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())

    plan = plan_memory(sizes_of(empty, planned), {}, "one")
    assert plan.base == total([*real.parameters(), *real.buffers()])
    assert plan.editor == total(editor.parameters())
    assert plan.gradient == total(p.grad for p in editor.parameters())
    assert plan.moments == total(s[key] for s in adam.state.values() for key in ("exp_avg", "exp_avg_sq"))
    assert plan.buffers == total(editor.buffers())
    assert (plan.calibration > 0) is (precondition is not None)


def test_calibration_holds_the_moments_of_every_layer():
    editor = MendEditor({"a": (64, 32), "b": (32, 64)}, rank=4, precondition=1e-3, rephrase_ridge=0.1)
    kept = [InputMoments.empty(width) for width in (64, 32)]
    moments = sum(8 * m.products.numel() for each in kept for m in (each.all, each.answers, each.paired, each.pairs))
    found = sizes_of(torch.nn.ModuleList(), editor).calibration
    # And one layer's inverses.
    assert moments < found <= moments + 4 * 8 * 64**2


def test_fsdp2_divides_and_ddp_copies():
    real, empty, _ = built("llama")
    _, editor = editors(real, empty)
    sizes = sizes_of(empty, editor)
    stack = next(iter(find_stacks(real).values()))
    block = sum(p.numel() * p.element_size() for p in stack[0].parameters())
    whole = sum(p.numel() * p.element_size() for p in real.parameters())
    one, ddp, sharded = (plan_memory(sizes, {"logits": 7}, *given) for given in (("one",), ("ddp", 4), ("fsdp2", 4)))
    assert ddp.base == one.base and ddp.communication == ddp.gradient and one.communication == 0
    assert sharded.base == -(-sizes.base // 4) and sharded.moments == 2 * -(-sizes.editor // 4)
    largest = max(sum(4 * p.numel() for p in transform.parameters()) for transform in editor.transforms)
    outside = sizes.base - 4 * block
    assert sharded.communication == 2 * block + outside + 2 * largest and outside >= whole - 4 * block
    older = plan_memory(sizes, {}, "fsdp", 4)
    assert (
        older.base == outside + block and older.editor == one.editor and older.communication == 2 * block + ddp.gradient
    )
    assert sharded.step == sum(sharded.parts().values())
    assert plan_memory(sizes, {}, "fsdp2", 1).total == plan_memory(sizes, {}, "one").total


def test_a_quantised_base_has_smaller_blocks_alone():
    _, empty, _ = built("gpt2")
    _, editor = editors(*built("gpt2")[:2])
    plain, eight, four = (sizes_of(empty, editor, quantize) for quantize in (None, "int8", "int4"))
    weights = sum(m.weight.numel() for block in empty.transformer.h for m in block.modules() if hasattr(m, "nf"))
    assert plain.base - eight.base == 3 * weights and plain.base - four.base == 3.5 * weights
    assert plain.outside == eight.outside


def test_advice_is_what_makes_it_fit():
    _, empty, _ = built("llama")
    _, editor = editors(*built("llama")[:2])
    sizes = replace(sizes_of(empty, editor), base=40 * GIB, block=GIB, outside=GIB, editor=4 * GIB, unit=GIB)
    plan = plan_memory(sizes, {"logits": 8 * GIB}, "one")
    count = devices_needed(sizes, plan.activations, 24 * GIB)
    assert count == 8 and plan_memory(sizes, plan.activations, "fsdp2", 8).total <= 24 * GIB
    assert plan_memory(sizes, plan.activations, "fsdp2", 4).total > 24 * GIB
    said = "\n".join(advice(plan, sizes, "one", tasks=8, at_once=8, rank=1920, memory=24 * GIB))
    for part in (
        "accumulate_grad_batches 8",
        "--model.tasks_at_once 1",
        "--model.rank 256",
        "fsdp2 --trainer.devices 8",
        "quantize int8",
    ):
        assert part in said
    assert said.splitlines()[0].startswith("--trainer.strategy fsdp2")
    tight = plan_memory(sizes, {}, "fsdp2", 2)
    # A sharded base is not quantised, nor the other way round.
    for strategy, quantized in (("fsdp", False), ("fsdp2", False), ("ddp", True)):
        hints = " ".join(advice(plan, sizes, strategy, 8, 8, 1920, 24 * GIB, quantized))
        assert "rank" in hints and "quantize" not in hints and ("fsdp2" in hints) == (strategy == "fsdp")
    assert advice(tight, sizes, "fsdp2", 1, 1, None, GIB, quantized=True) == [
        "A smaller model, or devices with more memory."
    ]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (EnnEditor, {}),
        (EnnEditor, {"first_order": True}),
        (MendEditor, {"rank": 48, "precondition": 1e-3, "ridge": 1e-2}),
    ],
)
def test_whatever_an_editor_does_is_planned(kind, settings):
    real, empty, tokenizer = built("t5")
    with torch.device("meta"):
        planned = kind.for_model(empty, **settings).train()
    editor = kind.for_model(real, **settings).train()
    for preconditioner in getattr(editor, "preconditioners", ()):
        preconditioner.calibrated.fill_(True)
    first, batch = batches(real, tokenizer, 2, batch_size=4)
    edit_step(real, editor, first).total(0.1).backward()
    counts = batch_counts(batch, "all")
    assert_planned(step_bytes(empty, planned, counts), really_alive(real, editor, batch))
    if kind is EnnEditor:
        with pytest.raises(ConfigError, match="takes the whole batch"):
            step_bytes(empty, planned, counts, 1)


def test_an_editor_that_reads_text_is_counted_by_its_parameters():
    real, empty, tokenizer = built("gpt2")
    with torch.device("meta"):
        editor = KnowledgeEditor.for_model(empty, embedding=64).train()
    (batch,) = batches(real, tokenizer, 1, batch_size=2)
    assert sum(step_bytes(empty, editor, batch_counts(batch, "all")).values()) > 0
    parameters = KnowledgeEditor.for_model(real, embedding=64).parameters()
    assert sizes_of(empty, editor).editor == sum(4 * p.numel() for p in parameters)


def test_a_classifier_has_one_position_a_row():
    config = transformers.BertConfig(**CAUSAL, num_labels=1)
    empty = empty_model(config, torch.float32, "classifier").eval().requires_grad_(False)
    with torch.device("meta"):
        editor = MendEditor.for_model(empty, rank=48).train()
    rows = RowCounts(4, 9, 30, 4)
    parts = step_bytes(empty, editor, BatchCounts(2, rows, rows, rows, 4))
    assert 0 < parts["logits"] < 4096 < parts["transforms"]


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_counts_are_the_largest_of_the_batches_and_never_more_than_the_settings_allow(name):
    real, _, tokenizer = built(name)
    data = EditDataModule("world_facts/train", max_length=96, batch_size=4, locality=2, edits_at_once=2)
    encoder = Encoder.for_model(real, tokenizer, data.format, data.max_length)
    found = measured_counts(data, encoder, "all")
    assert (found.tasks, found.z_edit.rows, found.x_in.rows, found.x_out.rows) == (4, 8, 8, 16)
    sampler = data.sampler("train")
    seen = [_batch(data, sampler, encoder, keys) for keys in _orders(data, sampler, encoder, 24)]
    assert len(seen) == 24 and len({text.prompt for batch in seen for text in batch.texts}) == 192
    for which in ("z_edit", "x_in", "x_out"):
        rows, counts = [getattr(batch, which) for batch in seen], getattr(found, which)
        assert counts.length == max(each.inputs["input_ids"].shape[1] for each in rows)
        assert counts.tokens == max(int(each.inputs["attention_mask"].sum()) for each in rows)
        assert counts.labels == max(int((each.labels != IGNORED_LABEL).sum()) for each in rows)
    # Long rows come together.
    data.bucket_by_length = False
    assert measured_counts(data, encoder, "all").z_edit.tokens < found.z_edit.tokens
    most = most_counts(data, "causal" if name == "llama" else "encoder_decoder", "all")
    for which in ("z_edit", "x_in", "x_out"):
        assert all(vars(getattr(most, which))[key] >= value for key, value in vars(getattr(found, which)).items())
    assert most.locality >= found.locality


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("The network was asked.")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_the_command(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    found = call("plan", "--config", "t5-xxl", "--memory", 24, "--out", "plan.json")
    assert found.code == 1 and "Does not fit into 24 GiB" in found.out and "--model.rank 256" in found.out
    assert "max_length (32) of every row" in found.out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["parts"]["base"] == pytest.approx(2 * 11135e6, rel=1e-3)
    assert plan["total"] == sum(plan["parts"].values()) and plan["strategy"] == "one"
    editors = {}
    for rank in (1920, 256):
        less = call("plan", "--config", "t5-small", "--memory", 80, "--model.rank", rank, "--out", "less.json")
        assert less.code == 0 and "Fits into 80 GiB" in less.out
        editors[rank] = json.loads((tmp_path / "less.json").read_text())["sizes"]["editor"]
    assert editors[256] < editors[1920] / 7


def test_the_strategy_is_the_trainers_unless_one_is_asked_for(tmp_path, no_network):
    out = tmp_path / "plan.json"

    def planned(*options):
        result = call("plan", "--config", "gpt2", "--out", out, *options)
        assert result.code == 0, result.err
        return json.loads(out.read_text())

    ddp = planned("--trainer.strategy", "ddp", "--trainer.devices", 2)
    assert (ddp["strategy"], ddp["processes"]) == ("ddp", 2) and ddp["parts"]["communication"] == ddp["sizes"]["editor"]
    # On the shipped facts, with a stand-in for GPT-2's tokenizer.
    assert "measured" in ddp["lengths"] and "stand-in" in ddp["lengths"]
    own = planned(
        "--trainer.strategy", "mend_lightning.training.distributed.strategies.ShardedStrategy", "--trainer.num_nodes", 2
    )
    assert (own["strategy"], own["processes"]) == ("fsdp2", 2)
    # Where processes share the base, all logits of a pass are made at once.
    assert own["parts"]["step: logits"] > 1.5 * ddp["parts"]["step: logits"]
    asked = planned("--strategy", "fsdp2", "--devices", 2, "--nodes", 2, "--trainer.strategy", "ddp")
    assert (asked["strategy"], asked["processes"]) == ("fsdp2", 4)
    assert asked["parts"]["base"] == -(-ddp["parts"]["base"] // 4)


def test_what_cannot_be_planned_is_said(tmp_path, no_network):
    assert_says(call("plan", "--config", "gpt2", "--model.base.name", "foo/bar").err, "'foo/bar'.*config.json")
    assert_says(call("plan", "--config", "gpt2", "--strategy", "one", "--devices", 2).err, "2 are asked for")
    many = ["plan", "--config", "gpt2", "--strategy", "fsdp2", "--devices", 2]
    assert_says(
        call(*many, "--model.base.quantize", "int8").err, "quantize 'int8' and a sharded base cannot go together"
    )
    assert_says(
        call(*many, "--model.algorithm.class_path", "EnnEditor").err, "EnnEditor cannot work on a sharded model"
    )
    unknown = call("plan", "--config", "gpt2", "--model.rnk", 3)
    assert unknown.code == 2 and "Did you mean 'model.rank'" in unknown.err


def test_formats_that_make_rows_longer_are_planned_for(tmp_path, no_network):
    """Also chats, of a model whose tokenizer is not on this machine."""
    found = {}
    for formats in ("null", "[bare]", "[chat_turns]"):
        out = tmp_path / "plan.json"
        result = call("plan", "--config", "gpt2", "--data.formats", formats, "--out", out)
        assert (result.code, result.err) == (0, ""), result.err
        found[formats] = json.loads(out.read_text())["total"]
    assert found["[chat_turns]"] > 1.05 * found["[bare]"], found


def test_wordings_are_counted():
    """Three wordings more are about as many edits more, each a little longer; and the editor keeps its settings."""
    real, empty, tokenizer = built("llama")
    (batch,) = batches(real, tokenizer, 1, batch_size=4)
    counts, parts = batch_counts(batch, "all"), []
    for wordings in (0, 3):
        _, editor = editors(real, empty, confidence=0.9, wordings=wordings)
        parts.append(step_bytes(empty, editor, counts))
        assert editor.wordings == wordings
    for name in ("inner pass", "transforms"):
        assert 3.5 < parts[1][name] / parts[0][name] < 12, name
