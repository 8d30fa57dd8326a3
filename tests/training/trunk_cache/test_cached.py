"""Training with a trunk cache against training without: the same losses and gradients, and the trunk does not run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from helpers.models import make_batch, make_rows, relative_error, spread_parameters, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from mend_lightning.data.batch import EditBatch
from mend_lightning.editors import MendEditor
from mend_lightning.errors import ConfigError, TrunkCacheWarning
from mend_lightning.models.forward.logits import run_model
from mend_lightning.models.forward.run_trunk import run_trunk
from mend_lightning.models.forward.trunk import StackOutput, TrunkOutputs, replayed
from mend_lightning.models.inputs.rows import Rows, concatenate_rows
from mend_lightning.models.layers import default_layers, find_stacks, match_layers
from mend_lightning.training.step import edit_step
from mend_lightning.training.trunk_cache import CachedTrunk
from mend_lightning.training.trunk_cache.row_keys import row_key, row_texts

DECODER_ONLY = {
    "t5": ["decoder.block.2.layer.2.DenseReluDense.*"],
    "t5_gated": ["decoder.block.2.layer.2.DenseReluDense.wo"],
    "bart": ["model.decoder.layers.2.fc*"],
}
OUTSIDE = {"llama": ["lm_head"], "t5": ["lm_head"], "bert": ["bert.pooler.dense", "classifier"]}


def losses_and_gradients(model: nn.Module, editor: MendEditor, batch: EditBatch, trunk_of=run_trunk) -> list[Tensor]:
    editor.zero_grad()
    output = edit_step(model, editor, batch, trunk_of=trunk_of)
    output.total(0.1).backward()
    return [output.edit, output.locality, output.inner, *(parameter.grad for parameter in editor.parameters())]


def editor_of(model: nn.Module) -> MendEditor:
    return spread_parameters(MendEditor.for_model(model, rank=4, edit_rate=0.01), 0.02).eval()


def layers_of(
    model: nn.Module, patterns: list[str] | None = None, last_blocks: int | None = None
) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    names = match_layers(model, patterns) if patterns else default_layers(model, last_blocks)
    return {name: modules[name] for name in names}


class BlockRuns:
    """Counts how often the insides of each block run: a replayed block's own hooks are called as well."""

    def __init__(self, model: nn.Module) -> None:
        self.counts: dict[str, int] = {}
        for name, stack in find_stacks(model).items():
            for index, block in enumerate(stack):
                inside = next(module for module in block.modules() if "norm" in type(module).__name__.lower())
                inside.register_forward_hook(self._counting(f"{name}.{index}"))

    def _counting(self, name: str):
        def count(*_) -> None:
            self.counts[name] = self.counts.get(name, 0) + 1

        return count

    def taken(self) -> dict[str, int]:
        counts, self.counts = self.counts, {}
        return counts


@pytest.mark.parametrize("common", [0, 5])
def test_steps_are_the_same_and_the_trunk_does_not_run(family, common, tmp_path):
    """From a cache that is filled, read in the same run, and in another one."""
    model, batch = tiny_model(family), make_batch(family, prefix=common)
    editor, runs = editor_of(model), BlockRuns(model)
    expected = losses_and_gradients(model, editor, batch)
    trunk = next(iter(runs.taken()))
    cached = CachedTrunk(tmp_path)
    first, after_first = losses_and_gradients(model, editor, batch, cached), runs.taken()
    found_at_first = cached.use.found
    second, after_second = losses_and_gradients(model, editor, batch, cached), runs.taken()
    another = losses_and_gradients(model, editor, batch, CachedTrunk(tmp_path))
    for found in (first, second, another):
        assert max(map(relative_error, found, expected)) < 1e-9
    assert all(torch.equal(a, b) for a, b in zip(second, first))
    assert cached.use.found - found_at_first == cached.use.rows // 2
    # Its blocks return tuples: one block makes what they hold beside the hidden states.
    again = after_second.pop(trunk, 0)
    assert (again > 0) == family.startswith("t5")
    assert after_first[trunk] > 0 and trunk not in after_second


@pytest.mark.parametrize("patterns", [None, "decoder", "outside"])
def test_some_rows_found_beside_others_that_run(family, patterns, tmp_path):
    """Rows come again in another order, among longer and shorter ones, twice."""
    model = tiny_model(family)
    chosen = {"decoder": DECODER_ONLY, "outside": OUTSIDE}.get(patterns, {})
    if patterns and family not in chosen:
        pytest.skip("this family has no such layers")
    layers, cached = layers_of(model, chosen.get(family)), CachedTrunk(tmp_path)
    old, new = (make_rows(family, [0, 1, 2, 3], 4, seed) for seed in (1, 2))
    cached(model, old, layers)
    for index in ([3, 5, 1, 1, 6, 5], [1, 3], [0, 4, 7]):
        rows = concatenate_rows([old, new]).part(torch.tensor(index))
        # Padding that was never there when the rows were kept, and that holds other ids.
        longer = Rows(_longer(rows.inputs), rows.labels, rows.task, rows.tasks)
        expected = run_model(model, rows)
        with replayed(cached(model, longer, layers), slice(None)):
            found = run_model(model, longer)
        for row, length in enumerate(_lengths(rows, expected)):
            assert relative_error(found[row, :length], expected[row, :length]) < 1e-9
    assert cached.use.rows == 4 + 6 + 2 + 3
    assert 0 < cached.use.found < cached.use.rows


def _longer(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Three more tokens of padding, of an id that is no padding."""
    return {
        name: nn.functional.pad(value, (0, 3), value=0 if "mask" in name else 7) for name, value in inputs.items()
    }  # fmt: skip


def _lengths(rows: Rows, logits: Tensor) -> list[int]:
    """Tokens of the sequence that the logits belong to; of a classifier, all it has."""
    if logits.dim() == 2:
        return [logits.shape[1]] * len(rows)
    mask = rows.inputs.get("decoder_attention_mask", rows.inputs["attention_mask"])
    return mask.sum(1).tolist()


def test_nothing_reads_padding(family):
    """The states of padding are whatever the cache gives: losses and gradients are the same with any."""
    model, batch = tiny_model(family), make_batch(family)
    editor = editor_of(model)

    def poisoned(model: nn.Module, rows: Rows, layers: Mapping[str, nn.Module]) -> TrunkOutputs:
        trunk = run_trunk(model, rows, layers)
        stacks = {
            name: StackOutput(stack.blocks, _poisoned(stack.output, rows)) for name, stack in trunk.stacks.items()
        }
        return replace(trunk, stacks=stacks)

    plain = losses_and_gradients(model, editor, batch)
    assert max(map(relative_error, losses_and_gradients(model, editor, batch, poisoned), plain)) < 1e-9


def _poisoned(output, rows: Rows):
    hidden = output if isinstance(output, Tensor) else output[0]
    hidden = hidden.masked_fill(~rows.inputs["attention_mask"].bool()[..., None], 50.0)
    return hidden if isinstance(output, Tensor) else (hidden, *output[1:])


def test_a_common_beginning_is_kept_once(causal_family, tmp_path):
    model, cached = tiny_model(causal_family), CachedTrunk(tmp_path)
    layers, width = layers_of(model), 16 * 8
    for seed in range(3):
        cached(model, make_rows(causal_family, [0, 1, 2, 3], 4, seed, prefix=5), layers)
    rows = [make_rows(causal_family, [0, 1, 2, 3], 4, seed, prefix=5) for seed in range(3)]
    tokens = sum(int(each.inputs["attention_mask"].sum()) for each in rows)
    beginnings = {entry.start for entry in cached._opened.rows.store._entries.values()} - {0}
    kept = sum(entry.size for entry in cached._opened.rows.store._entries.values()) // width
    # Rows that share one token more by chance may have made the first beginning longer.
    assert min(beginnings) >= 5
    assert kept <= tokens - 12 * 5 + 5 * len(beginnings) + 4


def test_an_encoders_trunk_does_not_ask_for_the_answer(encoder_decoder_family, tmp_path):
    """Only the decoder reads it, which is above: other targets of a question are found; below the decoder they are not."""
    model, rows = tiny_model(encoder_decoder_family), make_rows(encoder_decoder_family, [0, 1, 2], 3)
    other = make_rows(encoder_decoder_family, [0, 1, 2], 3, seed=5)
    answers = {name: value for name, value in other.inputs.items() if name.startswith("decoder")}
    asked_again = replace(rows, inputs={**rows.inputs, **answers}, labels=other.labels)
    for patterns, found in ((None, 3), (DECODER_ONLY[encoder_decoder_family], 0)):
        cached = CachedTrunk(tmp_path)
        for each in (rows, asked_again):
            cached(model, each, layers_of(model, patterns))
        assert cached.use.found == found


def caches(folder) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir()}


def changed(model: nn.Module, name: str) -> nn.Module:
    """The same model with one value of one weight changed by a little."""
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[-1].add_(1e-9)
    return model


def test_what_a_cache_belongs_to(tmp_path):
    rows = make_rows("llama", [0, 1], 2)

    def used(model: nn.Module, last_blocks: int = 3, tokenizer=None) -> str:
        before = caches(tmp_path)
        cached = CachedTrunk(tmp_path, tokenizer)
        cached(model, rows, layers_of(model, last_blocks=last_blocks))
        return "old" if cached.use.found == 2 and caches(tmp_path) == before else "new"

    assert used(tiny_model("llama")) == "new"
    assert used(tiny_model("llama")) == "old"
    for name in (
        "model.embed_tokens.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.input_layernorm.weight",
    ):
        assert used(changed(tiny_model("llama"), name)) == "new", name
    # Above the trunk.
    assert used(changed(tiny_model("llama"), "model.layers.1.mlp.down_proj.weight")) == "old"
    assert used(tiny_model("llama"), last_blocks=2) == "new"
    assert used(tiny_model("llama", torch.float32)) == "new"
    other = tiny_model("llama")
    other.config.rms_norm_eps *= 2
    assert used(other) == "new"
    for words in ("ab", "ba"):
        assert used(tiny_model("llama"), tokenizer=vocabulary(words)) == "new"
    assert used(tiny_model("llama"), tokenizer=vocabulary("ba")) == "old"


def vocabulary(words: str) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    )


def test_one_cache_of_two_trunks_in_turn(tmp_path):
    model, rows, cached = tiny_model("llama"), make_rows("llama", [0, 1], 2), CachedTrunk(tmp_path)
    for found, last_blocks in ((0, 1), (0, 3), (2, 1), (4, 3)):
        trunk = cached(model, rows, layers_of(model, last_blocks=last_blocks))
        assert len(trunk.stacks["model.layers"].blocks) == 4 - last_blocks
        assert cached.use.found == found


def test_a_key_is_what_the_model_reads():
    """Ids where they are attended to, wherever that is; padding behind, and what lies under a mask, are no part of it."""

    def key(ids: list[int], mask: list[int]) -> bytes:
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.tensor([mask])}
        return row_key(row_texts(Rows(inputs, inputs["input_ids"], torch.tensor([0]), 1), ["input_ids"])[0])

    plain = key([5, 6, 7], [1, 1, 1])
    assert plain == key([5, 6, 7, 0, 9], [1, 1, 1, 0, 0])
    assert len({plain, key([5, 6, 7], [1, 0, 1]), key([6, 7], [1, 1]), key([0, 5, 6, 7], [0, 1, 1, 1])}) == 4
    assert key([5, 6, 7], [1, 0, 1]) == key([5, 8, 7], [1, 0, 1])


def test_other_precision_is_another_cache(tmp_path):
    """Also within one run; and what autocast returned comes back in its dtype."""
    model, rows, cached = tiny_model("llama", torch.float32), make_rows("llama", [0, 1], 2), CachedTrunk(tmp_path)
    layers = layers_of(model)
    for found in (0, 2):
        with torch.autocast("cpu", torch.bfloat16):
            trunk, plain = cached(model, rows, layers), run_trunk(model, rows, layers)
        mask = rows.inputs["attention_mask"].bool()
        stack, expected = trunk.stacks["model.layers"].output, plain.stacks["model.layers"].output
        assert stack.dtype == expected.dtype
        assert torch.equal(stack[mask], expected[mask])
        assert cached.use.found == found
    cached(model, rows, layers)
    assert (cached.use.found, len(caches(tmp_path))) == (2, 2)


def test_tasks_of_the_same_row_run_once(tmp_path):
    model, cached, lengths = tiny_model("llama"), CachedTrunk(tmp_path), []
    rows = make_rows("llama", [0, 1], 2)
    cached(model, make_rows("llama", [0], 1, seed=3), layers_of(model))
    model.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[0]))
    cached(model, concatenate_rows([rows, rows, rows]), layers_of(model))
    assert max(lengths) == 2


class Mixing(nn.Module):
    """A block after which a row depends on its neighbours."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.attention_type = getattr(block, "attention_type", None)

    def forward(self, hidden: Tensor, *args, **kwargs) -> Tensor:
        return self.block(hidden, *args, **kwargs) + 3 * hidden.mean(0, keepdim=True)


def test_a_trunk_that_cannot_be_kept_runs_as_without(tmp_path):
    model, rows = tiny_model("llama"), make_rows("llama", [0, 1], 2)
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = Mixing(block)
    layers, cached = layers_of(model, ["model.layers.2.block.mlp.*"]), CachedTrunk(tmp_path)
    with pytest.warns(TrunkCacheWarning, match="depends on the rows beside it"):
        first = cached(model, rows, layers)
    again, expected = cached(model, rows, layers), run_trunk(model, rows, layers)
    for trunk in (first, again):
        assert torch.equal(trunk.stacks["model.layers"].output, expected.stacks["model.layers"].output)
    assert cached.use.rows == 0


def test_blocks_that_return_tensors_of_their_own(tmp_path):
    """T5's hand on what the first one made; where each adds to it, the first one does not tell what the last returns."""
    model, rows = tiny_model("t5"), make_rows("t5", [0, 1], 2)
    layers = layers_of(model, ["encoder.block.2.layer.1.DenseReluDense.*"])
    for block in model.encoder.block:
        block.register_forward_hook(lambda block, args, output: (output[0], output[1] + 1, *output[2:]))
    with pytest.warns(TrunkCacheWarning, match="tensors beside the hidden states, and each block others"):
        CachedTrunk(tmp_path)(model, rows, layers)


def test_two_processes_find_what_the_other_one_adds(tmp_path):
    model, rows = tiny_model("gpt2"), [make_rows("gpt2", [0, 1], 2, seed) for seed in range(4)]
    layers, both = layers_of(model), [CachedTrunk(tmp_path), CachedTrunk(tmp_path)]
    for number, each in enumerate(rows):
        both[number % 2](model, each, layers)
        both[1 - number % 2](model, each, layers)
    assert [cached.use.found for cached in both] == [4, 4]


def test_edits_in_the_first_block_leave_nothing_to_keep(tmp_path):
    model, rows = tiny_model("gpt2"), make_rows("gpt2", [0, 1], 2)
    with pytest.warns(TrunkCacheWarning, match="nothing lies below"):
        assert not CachedTrunk(tmp_path)(model, rows, layers_of(model, last_blocks=9)).stacks


def test_inputs_that_are_no_token_ids(tmp_path):
    model, rows = tiny_model("bert"), make_rows("bert", [0, 1], 2)
    rows = replace(rows, inputs={**rows.inputs, "token_type_ids": torch.zeros_like(rows.inputs["input_ids"])})
    with pytest.warns(TrunkCacheWarning, match="reads token_type_ids"):
        CachedTrunk(tmp_path)(model, rows, layers_of(model))


def test_a_sharded_base_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mend_lightning.training.trunk_cache.cached.is_sharded", lambda model: True)
    with pytest.raises(ConfigError, match="cannot serve a base in shards.*ddp"):
        CachedTrunk(tmp_path)(tiny_model("llama"), make_rows("llama", [0], 1), {})


def test_damaged_rows_run_again(tmp_path):
    model, rows, layers = tiny_model("llama"), make_rows("llama", [0, 1, 2], 3), None
    layers = layers_of(model)
    CachedTrunk(tmp_path)(model, rows, layers)
    (data,) = tmp_path.glob("*/*.rows")
    raw = bytearray(data.read_bytes())
    raw[-9] ^= 1
    data.write_bytes(raw)
    cached = CachedTrunk(tmp_path)
    with pytest.warns(TrunkCacheWarning, match="damaged or gone"):
        trunk = cached(model, rows, layers)
    mask = rows.inputs["attention_mask"].bool()
    expected = run_trunk(model, rows, layers).stacks["model.layers"].output
    assert relative_error(trunk.stacks["model.layers"].output[mask], expected[mask]) < 1e-12
    assert cached.use.found == 2
