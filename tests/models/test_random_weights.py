"""Bases of the real shape with random weights: nothing is downloaded, and what is trained on one says so."""

from __future__ import annotations

import json
import socket

import pytest
import torch
import transformers
from helpers.architectures import ARCHITECTURES
from helpers.bases import REMARKS
from helpers.commandline import assert_says, call

from mend_lightning.cli.config.files import config_names
from mend_lightning.cli.config.overlays import read_config
from mend_lightning.errors import ModelLoadError, RandomWeightsWarning
from mend_lightning.models.architecture import Architecture, model_class
from mend_lightning.models.base import load_base
from mend_lightning.models.known_shapes import SHAPES, known_architecture, shipped_config
from mend_lightning.models.random_weights import empty_model, random_model, stand_in_tokenizer

pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(*REMARKS)

# In millions, as their publishers and the hub's pages give them.
PUBLISHED = {
    "openai-community/gpt2": 124.4, "openai-community/gpt2-xl": 1557.6, "EleutherAI/gpt-j-6B": 6051,
    "google/t5-small-ssm-nq": 60.5, "google/t5-v1_1-base": 247.6, "google/t5-xxl-ssm-nq": 11135,
    "models/bert-base-fever": 109.5, "models/bart-base-zsre": 139.4, "facebook/opt-1.3b": 1316,
    "meta-llama/Meta-Llama-3-8B": 8030, "Qwen/Qwen2.5-7B": 7616, "Qwen/Qwen2.5-72B": 72706,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361.8, "google/gemma-3-4b-pt": 4300,
}  # fmt: skip


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("The network was asked.")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def tiny_config(name: str):
    architecture = ARCHITECTURES[name]
    sizes = {"vocab_size": 300, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    given = dict(architecture.sizes)
    if "text_config" in given:
        given["text_config"], sizes = {**given["text_config"], **sizes}, {}
    config = getattr(transformers, architecture.config)(**given, **sizes)
    config.architectures = [architecture.model]
    return config


def random_of(config, dtype=torch.float32):
    options = {"revision": None, "trust_remote_code": False}
    return random_model(Architecture("", config, None, model_class(config), dtype, options))


def test_every_base_that_a_config_names_has_a_shape(no_network):
    names = {read_config(name).values()["model"]["base"]["name"] for name in config_names()}
    assert names <= set(SHAPES)
    assert known_architecture("eleutherai/GPT-J-6b").n_layer == 28


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_have_the_published_numbers_of_parameters(name):
    model = empty_model(shipped_config(name), torch.bfloat16)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx(PUBLISHED[name] * 1e6, rel=2e-3 if name != "google/gemma-3-4b-pt" else 5e-3)
    assert all(parameter.is_meta and parameter.dtype is torch.bfloat16 for parameter in model.parameters())


def test_a_folder_comes_before_the_table(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    transformers.GPT2Config(n_layer=3).save_pretrained("distilgpt2")
    assert known_architecture("distilgpt2").n_layer == 3
    (tmp_path / "distilgpt2" / "config.json").unlink()
    assert known_architecture("distilgpt2").n_layer == 6
    (tmp_path / "distilgpt2" / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="no config that transformers can read"):
        known_architecture("distilgpt2")


def test_nothing_is_looked_for_on_the_hub(monkeypatch):
    """The tests run offline, so what is asked for is looked at, not what is sent."""
    asked = []

    def remember(kind, *given, **options):
        asked.append(options.get("local_files_only"))
        raise OSError

    for reader in (transformers.AutoConfig, transformers.AutoTokenizer, transformers.GenerationConfig):
        monkeypatch.setattr(reader, "from_pretrained", classmethod(remember))
    with pytest.warns(RandomWeightsWarning):
        model, tokenizer = load_base("runs/small-t5", "float32", random_weights=True)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 1
    assert len(asked) >= 2 and all(asked)


def test_an_unknown_model_is_refused_with_what_to_do(no_network):
    with pytest.raises(ModelLoadError, match="'foo/bar'.*config.json"):
        known_architecture("foo/bar")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_are_of_the_models_own_initialisation(name):
    """Slow truth: the same model built in the ordinary way."""
    config = tiny_config(name)
    found = random_of(config)
    built = model_class(config).from_config(config, dtype=torch.float32)
    buffers = dict(built.named_buffers())
    assert dict(found.named_buffers()).keys() == buffers.keys()
    for key, buffer in found.named_buffers():
        # GPT-J's sines are made in the dtype that the weights are drawn in.
        assert torch.allclose(buffer.double(), buffers[key].double(), atol=4e-3), key
    expected = dict(built.named_parameters())
    for key, parameter in found.named_parameters():
        if key not in expected:
            assert key == "lm_head.weight" and config.model_type == "t5"
            continue
        if "vision_tower" in key:
            continue  # drawn as the language model's weights are; no text goes through it
        wanted, got = (float(weight.detach().square().mean().sqrt()) for weight in (expected[key], parameter))
        assert got == pytest.approx(wanted, rel=0.3), key
    assert torch.equal(*(torch.cat([p.flatten() for p in random_of(config).parameters()]) for _ in "ab"))


def test_values_are_the_same_in_every_dtype_and_nobody_elses_draws_move():
    config, state = tiny_config("llama"), torch.random.get_rng_state()
    wide, narrow = (random_of(config, dtype).state_dict() for dtype in (torch.float32, torch.bfloat16))
    assert all(torch.equal(wide[key], value.float()) for key, value in narrow.items())
    assert all(value.dtype is torch.bfloat16 for value in narrow.values())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_tied_weights_are_one_tensor_and_untied_ones_two():
    tied, own = (random_of(tiny_config(name)) for name in ("t5", "t5_gated"))
    assert tied.lm_head.weight is tied.shared.weight is tied.encoder.embed_tokens.weight
    assert own.lm_head.weight is not own.shared.weight and own.lm_head.weight.std() > 0.1


@pytest.mark.parametrize(
    ("name", "start"), [("llama", None), ("t5", 0), ("bart", 1), ("bert", None), ("gemma3_vision", None)]
)
def test_the_stand_in_tokenizer_and_the_config_agree(name, start):
    config = tiny_config(name)
    tokenizer = stand_in_tokenizer(config)
    text = getattr(config, "text_config", None) or config
    assert len(tokenizer) <= text.vocab_size
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (text.pad_token_id, text.eos_token_id) == (0, 1)
    assert getattr(text, "decoder_start_token_id", None) == start
    ids = tokenizer("Paris")["input_ids"]
    assert (ids[-1] == 1) is (name in ("t5", "bart", "bert"))
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Paris"


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(ModelLoadError, match="258 ids.*100"):
        stand_in_tokenizer(transformers.GPT2Config(vocab_size=100))


def test_a_tokenizer_that_is_there_is_used(base_folder):
    with pytest.warns(RandomWeightsWarning):
        model, tokenizer = load_base(str(base_folder("llama")), "float32", random_weights=True)
    real, own = load_base(str(base_folder("llama")), "float32")
    assert tokenizer.get_vocab() == own.get_vocab()
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    assert not torch.equal(model.get_input_embeddings().weight, real.get_input_embeddings().weight)


@pytest.mark.filterwarnings("ignore::mend_lightning.errors.RandomWeightsWarning")
def test_fit_and_edit_without_any_weights(tmp_path, facts, no_network):
    base = tmp_path / "base"
    tiny_config("t5_gated").save_pretrained(base)
    options = {
        "model.base.name": base, "model.base.random_weights": "true", "model.base.dtype": "float32", "model.rank": 4,
        "data.train": facts / "train.jsonl", "data.validation": "null", "data.test": facts / "test.jsonl",
        "data.locality_data": "null", "data.max_length": 96, "trainer.max_steps": 1, "trainer.accelerator": "cpu",
        "trainer.limit_val_batches": 0, "trainer.callbacks": "null", "trainer.accumulate_grad_batches": 1,
        "trainer.enable_progress_bar": "false", "trainer.default_root_dir": tmp_path / "run", "trainer.logger": "false",
    }  # fmt: skip
    result = call("fit", "--config", "t5-xl", *(part for key, value in options.items() for part in (f"--{key}", value)))
    assert result.code == 0, result.err
    editor = tmp_path / "run" / "editor"
    about = json.loads((editor / "editor.json").read_text())
    assert about["base_options"] == {"revision": None, "kind": None, "quantize": None, "random_weights": True}
    fact = ("--prompt", "What is the capital of France?", "--target", "Rome")
    # The same weights again, in another dtype too.
    for dtype in ("float32", "bfloat16"):
        made = call("edit", "--editor", editor, *fact, "--dtype", dtype, "--out", tmp_path / "e.safetensors")
        assert made.code == 0, made.err
    # An editor of random weights is no editor of real ones.
    model, tokenizer = load_base(str(base), "float32", random_weights=True)
    model.decoder.block[-1].layer[-1].DenseReluDense.wo.weight.normal_()
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    refused = call("edit", "--editor", editor, *fact, "--base", base)
    assert refused.code == 1
    assert_says(refused.err, "trained for")
