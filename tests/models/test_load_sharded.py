"""A base loaded in shards is the base; editors and edits work on it as on any other. One process that shares with nobody."""

from __future__ import annotations

import copy
import shutil
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers.bases import FORMATS, small_tokenizer
from helpers.edits import compute_deltas
from helpers.models import KINDS, ROUNDING, make_batch, make_rows, relative_error, rounds_alike, spread_parameters
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from mend_lightning import MendEditor
from mend_lightning.editors import Cache, EnnEditor, FineTuning, InContext, KnowledgeEditor
from mend_lightning.editors.factors import edit_factors
from mend_lightning.errors import ConfigError, ModelLoadError
from mend_lightning.models import load_sharded as loading
from mend_lightning.models.base import BaseModel
from mend_lightning.models.fingerprint import base_fingerprint, layer_fingerprints
from mend_lightning.models.forward.generation import generate_answers
from mend_lightning.models.forward.hooks import applied
from mend_lightning.models.forward.run_trunk import run_trunk
from mend_lightning.models.forward.trunk import replayed
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.load_sharded import load_base_in_shards, raise_on_all_ranks
from mend_lightning.models.sharding.collectives import is_sharded, whole_state
from mend_lightning.models.sharding.fsdp import blocks_of, keep_whole, load_whole_state, shard_model
from mend_lightning.models.sharding.meta import parameters_on_meta
from mend_lightning.models.sharding.weights import FileWeights, RandomWeights, SentWeights, places_of, safetensors_keys
from mend_lightning.training.checks import check_strategy
from mend_lightning.training.distributed.strategies import ShardedBaseStrategy, ShardedStrategy, shard_editor
from mend_lightning.training.step import edit_step

pytest_plugins = ["helpers.bases"]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    address = f"file://{tmp_path_factory.mktemp('group') / 'store'}"
    distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.fixture
def shard(mesh):
    return partial(shard_model, mesh=mesh)


def plain(folder: Path) -> nn.Module:
    return BaseModel(str(folder), "float32").load()[0]


def logits(model: nn.Module, family: str) -> torch.Tensor:
    rows = make_rows(family, [0, 0, 1], 2)
    with torch.no_grad():
        return model(**rows.inputs).logits


@pytest.mark.parametrize("dtype", ["bfloat16", "stored"])
def test_dtypes(dtype, base_folder, shard):
    check_loaded(BaseModel(str(base_folder("llama")), dtype), "llama", shard)


def test_the_model_is_the_one_that_transformers_loads(family, base_folder, shard):
    check_loaded(BaseModel(str(base_folder(family)), "float32"), family, shard)


def check_loaded(base: BaseModel, family: str, shard) -> None:
    expected, _ = base.load()
    model, tokenizer = load_base_in_shards(base, shard, "cpu")
    assert len(tokenizer) == len(base.load()[1]) and not model.training
    assert getattr(model, "generation_config", None) == getattr(expected, "generation_config", None)
    assert all(isinstance(p, DTensor) and not p.requires_grad for p in model.parameters())
    assert_same(whole_state(model), expected.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in expected.named_parameters()]
    assert relative_error(logits(model, family), logits(expected, family)) < ROUNDING


def assert_same(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and torch.equal(actual[name], value), name


def test_whole_models_are_loaded_so_as_well(family, base_folder, mesh):
    """As under ddp: each process its own copy."""
    base = BaseModel(str(base_folder(family)), "float32")
    model, _ = load_base_in_shards(base, keep_whole, "cpu")
    expected, _ = base.load()
    assert not is_sharded(model)
    assert_same(model.state_dict(), expected.state_dict())
    assert relative_error(logits(model, family), logits(expected, family)) < ROUNDING


def renamed(folder: Path, target: Path, change) -> Path:
    """A copy of a saved model whose tensors are stored under other names."""
    shutil.copytree(folder, target)
    state = load_file(target / "model.safetensors")
    save_file(change(state), target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("family, prefix", [("gpt2", "transformer."), ("bert", "bert."), ("llama", "model.")])
def test_files_without_the_base_models_prefix(family, prefix, base_folder, shard, tmp_path):
    """As GPT-2's on the hub: h.0.attn… for transformer.h.0.attn…"""
    folder = renamed(
        base_folder(family), tmp_path / "bare", lambda state: {k.removeprefix(prefix): v for k, v in state.items()}
    )
    model, _ = load_base_in_shards(BaseModel(str(folder), "float32"), shard, "cpu")
    assert_same(whole_state(model), plain(base_folder(family)).state_dict())


def test_old_files_come_through_transformers(base_folder, shard, tmp_path, monkeypatch):
    """No safetensors at all: process 0 loads the whole model and sends it."""
    folder = tmp_path / "old"
    shutil.copytree(base_folder("t5"), folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    sources = []
    allocate = loading.allocate
    monkeypatch.setattr(loading, "allocate", lambda *args: (sources.append(type(args[2])), allocate(*args)))
    model, _ = load_base_in_shards(BaseModel(str(folder), "float32"), shard, "cpu")
    assert set(sources) == {SentWeights}
    expected = plain(base_folder("t5"))
    assert_same(whole_state(model), expected.state_dict())
    assert relative_error(logits(model, "t5"), logits(expected, "t5")) < ROUNDING


def test_half_precision_that_transformers_keeps_in_float32(base_folder, shard):
    """T5's wo under float16."""
    base = BaseModel(str(base_folder("t5")), "float16")
    model, _ = load_base_in_shards(base, shard, "cpu")
    dtypes = {name: value.dtype for name, value in whole_state(model).items()}
    assert torch.float32 in dtypes.values() and torch.float16 in dtypes.values()
    assert dtypes == {name: value.dtype for name, value in base.load()[0].state_dict().items()}


def test_a_process_holds_one_block_at_a_time(base_folder, shard, monkeypatch):
    """Blocks get their values in turn, and only what is sharded already holds any before."""
    seen = []
    fill = FileWeights.fill

    def watched(self, prefix, module, names):
        fill(self, prefix, module, names)
        model = watched.model
        alive = [n for n, p in model.named_parameters() if not p.is_meta and not isinstance(p, DTensor)]
        seen.append((prefix, {prefix and name.startswith(f"{prefix}.") for name in alive}))

    build = BaseModel.architecture

    def architecture(self):
        found = build(self)
        make = found.build
        object.__setattr__(found, "build", lambda: setattr(watched, "model", make()) or watched.model)
        return found

    monkeypatch.setattr(FileWeights, "fill", watched)
    monkeypatch.setattr(BaseModel, "architecture", architecture)
    model, _ = load_base_in_shards(BaseModel(str(base_folder("llama")), "float32"), shard, "cpu")
    assert [prefix for prefix, _ in seen] == [*blocks_of(model), ""]
    assert all(inside == {True} for _, inside in seen[:-1])


def test_random_weights_do_not_depend_on_who_holds_them(base_folder):
    """The same numbers whether a unit is filled alone or after others; another seed gives others."""
    base = BaseModel(str(base_folder("t5")), "float32")

    def filled(order: int, seed: int = 0) -> dict:
        with parameters_on_meta():
            model = base.architecture().build()
        source = RandomWeights(model, seed)
        for name, module in list(blocks_of(model).items())[::order]:
            loading.allocate(name, module, source)
        loading.allocate("", model, source)
        return model.state_dict()

    first, again, other = filled(1), filled(-1), filled(1, seed=1)
    assert_same(again, first)
    matrices = [name for name, value in first.items() if value.dim() > 1]
    assert matrices and all(float(first[name].std()) > 0 for name in matrices)
    assert not any(torch.equal(first[name], other[name]) for name in matrices)
    # Of the architecture's own initialisation: T5's norms start at 1, its feed-forward matrices at 1/sqrt(width).
    assert torch.equal(first["encoder.final_layer_norm.weight"], torch.ones(16))
    wi = torch.cat([first[name].flatten() for name in matrices if ".wi" in name])
    assert float(wi.std()) == pytest.approx(16**-0.5, rel=0.1)


@pytest.mark.filterwarnings("ignore:The weights of .* are random")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_bases_are_the_same_in_shards(dtype, base_folder, shard):
    base = BaseModel(str(base_folder("t5")), dtype, random_weights=True)
    expected, _ = base.load()
    model, _ = load_base_in_shards(base, shard, "cpu")
    assert is_sharded(model)
    assert_same(whole_state(model), expected.state_dict())
    assert not torch.equal(logits(model, "t5"), logits(plain(base_folder("t5")), "t5"))


@pytest.fixture
def pair(family, base_folder, mesh, shard):
    """A plain base with an editor, and the same sharded."""
    folder = base_folder(family)
    whole = plain(folder)
    editor = spread_parameters(MendEditor.for_model(whole, rank=4, edit_rate=0.05), 0.02)
    model, _ = load_base_in_shards(BaseModel(str(folder), "float32"), shard, "cpu")
    sharded = MendEditor(editor.layers, **editor.settings)
    shard_editor(sharded, mesh)
    load_whole_state(sharded, editor.state_dict())
    return (whole, editor), (model, sharded)


@pytest.fixture
def exact(pair):
    """The plain base and its editor in float64: what both of the pair round."""
    return tuple(copy.deepcopy(module).double() for module in pair[0])


def test_a_step_is_the_same(pair, exact, family):
    """Losses, gradients and statistics; and once more, for the first step leaves gathered parameters behind."""
    batch = make_batch(family)
    for _ in range(2):
        found = []
        for model, editor in (*pair, exact):
            editor.zero_grad()
            out = edit_step(model, editor, batch)
            out.total(0.1).backward()
            found.append([out.edit, out.locality, out.inner])
            found.append(
                [getattr(each.grad, "full_tensor", lambda each=each: each.grad)() for each in editor.parameters()]
            )
            found.append([*whole_state(editor).values()])
        assert all(isinstance(parameter.grad, DTensor) for parameter in pair[1][1].parameters())
        for plain, sharded, truth in zip(found[:3], found[3:6], found[6:]):
            assert rounds_alike(sharded, plain, truth)


def test_an_edit_changes_what_it_changes_elsewhere(pair, exact, family):
    rows = make_rows(family, [0, 1], 2)
    outputs = []
    for model, editor in (*pair, exact):
        editor.eval()
        before = logits(model, family)
        with torch.no_grad():
            deltas = compute_deltas(model, editor, rows)
            with applied(editor.modules_in(model), {n: d.of_task(0) for n, d in deltas.items()}):
                outputs.append(logits(model, family))
        assert torch.equal(logits(model, family), before)
        assert relative_error(outputs[-1], before) > 1e-4
    assert rounds_alike([outputs[1]], [outputs[0]], [outputs[2]])


def test_fingerprints_are_those_of_the_whole_weights(pair):
    marks = [[f(editor.modules_in(model)) for f in (base_fingerprint, layer_fingerprints)] for model, editor in pair]
    assert marks[0] == marks[1]


def test_a_replayed_block_is_not_gathered(base_folder, shard):
    model, _ = load_base_in_shards(BaseModel(str(base_folder("llama")), "float32"), shard, "cpu")
    editor = MendEditor.for_model(model, last_blocks=1, rank=4)
    rows = make_rows("llama", [0, 0], 1)
    layers = editor.modules_in(model)
    trunk = run_trunk(model, rows, layers)
    gathered = []
    for name, block in blocks_of(model).items():
        # FSDP's own hook comes first; what a hook of ours sees is what it left.
        block.register_forward_pre_hook(lambda m, args, name=name: gathered.append(name))
    expected = logits_of(model, rows)
    assert gathered == list(blocks_of(model))
    gathered.clear()
    with replayed(trunk, slice(None)):
        # Gathered weights lie in other memory each time.
        assert relative_error(logits_of(model, rows), expected) < ROUNDING
    assert gathered == list(blocks_of(model))[-1:]
    assert not any("_call_impl" in vars(block) for block in blocks_of(model).values())


def logits_of(model, rows) -> torch.Tensor:
    with torch.no_grad():
        return model(**rows.inputs).logits


def test_editors_that_cannot(mesh, base_folder):
    layers = {"a": (4, 4)}
    for editor in (EnnEditor(layers), KnowledgeEditor(layers), FineTuning(layers), Cache(layers), InContext(layers)):
        with pytest.raises(ConfigError, match=f"{type(editor).__name__} cannot work on a sharded model.*ddp"):
            shard_editor(editor, mesh)


def test_loading_that_fails_says_so_everywhere(shard, tmp_path):
    with pytest.raises(ModelLoadError, match="nowhere"):
        load_base_in_shards(BaseModel("nowhere/at-all", "float32"), shard, "cpu")
    with pytest.raises(KeyError, match="mine"), raise_on_all_ranks():
        raise KeyError("mine")


def test_whole_and_sharded_state(pair):
    (_, editor), (_, sharded) = pair
    assert is_sharded(sharded) and not is_sharded(editor)
    assert_same(whole_state(sharded, "x."), {f"x.{name}": value for name, value in editor.state_dict().items()})
    changed = {name: value + 1 for name, value in editor.state_dict().items()}
    for module in (editor, sharded):
        load_whole_state(module, changed)
        assert_same(whole_state(module), changed)
        with pytest.raises(RuntimeError):
            load_whole_state(module, {"nothing": torch.ones(1)})


def test_a_state_is_loaded_after_a_validation(pair, family):
    """Whose passes gather the edit rates, and no backward pass shards them again."""
    (_, editor), (model, sharded) = pair
    with torch.no_grad():
        sharded.eval()(edit_factors(model, sharded.modules_in(model), make_rows(family, [0, 1], 2))[0])
    assert not isinstance(sharded.edit_rates, DTensor)
    changed = {name: value + 1 for name, value in editor.state_dict().items()}
    load_whole_state(sharded, changed)
    assert_same(whole_state(sharded), changed)


@pytest.mark.parametrize("family", ["t5", "bart", "llama"])
def test_the_first_thing_asked_is_an_answer(family, base_folder, shard):
    """Before and after an edit; an encoder-decoder's encoder runs before the model as a whole does."""
    answers = []
    base = BaseModel(str(base_folder(family)), "float32")
    for model in (base.load()[0], load_base_in_shards(base, shard, "cpu")[0]):
        encoder = Encoder.for_model(model, small_tokenizer(KINDS[family]), FORMATS[KINDS[family]], 96)
        editor = MendEditor.for_model(model, rank=4)
        prompts = ["Which continent is North Korea in?", "What is the capital of France?"]
        answers.append(generate_answers(model, encoder, prompts))
        compute_deltas(model, editor, encoder.rows([(prompts[0], "Oceania")], [0], 1))
        answers.append(generate_answers(model, encoder, prompts))
    assert answers == [answers[0]] * 4 and any(answers[0])


def test_a_head_that_files_hold_though_it_is_tied(base_folder, shard, tmp_path):
    """T5 v1.1: transformers ties every T5's head, until it reads another one."""
    head = torch.randn_like(load_file(base_folder("t5") / "model.safetensors")["shared.weight"])
    folder = renamed(base_folder("t5"), tmp_path / "untied", lambda state: {**state, "lm_head.weight": head})
    base = BaseModel(str(folder), "float32")
    model, _ = load_base_in_shards(base, shard, "cpu")
    assert torch.equal(dict(model.named_parameters())["lm_head.weight"].full_tensor(), head)
    assert_same(whole_state(model), base.load()[0].state_dict())
    # Stored twice with the same values it stays one parameter.
    twice = renamed(
        base_folder("t5"), tmp_path / "twice", lambda state: {**state, "lm_head.weight": state["shared.weight"].clone()}
    )
    model, _ = load_base_in_shards(BaseModel(str(twice), "float32"), shard, "cpu")
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_names_in_files(base_folder):
    folder = str(base_folder("t5"))
    files = safetensors_keys(folder)
    with parameters_on_meta():
        model = BaseModel(folder, "float32").architecture().build()
    assert set(places_of(model, files)) == set(dict(model.named_parameters()))
    assert places_of(model, {name: file for name, file in files.items() if "block.0" not in name}) is None
    assert safetensors_keys(str(Path(folder).parent)) is None


def test_strategies_that_cannot():
    with pytest.raises(ConfigError, match="tensor_parallel_size=2: tensor parallelism is not supported.*Leave it at 1"):
        ShardedStrategy(tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="ModelParallelStrategy cannot shard this model.*fsdp2"):
        check_strategy(ModelParallelStrategy())
    for strategy in (ShardedStrategy(), ShardedBaseStrategy(), DDPStrategy(), None):
        check_strategy(strategy)


def test_strategies_have_names():
    for name, kind in (("fsdp2", ShardedStrategy), ("fsdp1", ShardedBaseStrategy)):
        assert (
            type(L.Trainer(accelerator="cpu", strategy=name, logger=False, enable_checkpointing=False).strategy) is kind
        )
