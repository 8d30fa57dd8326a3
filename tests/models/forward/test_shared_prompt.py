"""Prompts that begin alike, against plain greedy decoding: a row at a time, no padding, no cache, dense weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pytest
import torch
import transformers
from helpers.architectures import ARCHITECTURES, GROUPED, SIZES, save_tiny
from helpers.bases import small_tokenizer
from helpers.edits import changed, dense_edit, ragged_edit
from torch import nn

from mend_lightning import Edit, EditStack
from mend_lightning.edits.deltas import LowRankDelta
from mend_lightning.models.base import load_base
from mend_lightning.models.forward import shared_prompt
from mend_lightning.models.forward.generation import generate_answers, stop_ids
from mend_lightning.models.forward.hooks import applied
from mend_lightning.models.forward.shared_prompt import beginning_cache, can_share, one_task, shared_beginning
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.inputs.prompts import RUNNING_TEXT, PromptFormat

CAUSAL = [name for name, architecture in ARCHITECTURES.items() if architecture.kind == "causal"]
EXAMPLES = "Q: What is the capital of France?\nA: Paris\nQ: Who wrote Hamlet?\nA: Shakespeare\n"
FORMAT = PromptFormat(EXAMPLES + "Q: {input}\nA:", stop="\n")
# Of different lengths; padded, a short one has more padding than tokens of its own.
PROMPTS = ["Which city?", "Where does the river that crosses Spain from east to west end?", "x"]
TOKENS = 6


@pytest.fixture(autouse=True)
def _short_beginnings(monkeypatch):
    """These prompts' few-shot examples are shorter than what pays."""
    monkeypatch.setattr(shared_prompt, "SHORTEST_BEGINNING", 16)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """`tiny(architecture)`: a tiny model of it, with an encoder that puts few-shot examples before a question."""
    folders = {}

    def model_and_encoder(name: str) -> tuple[nn.Module, Encoder]:
        if name not in folders:
            folders[name] = save_tiny(name, tmp_path_factory.mktemp(name))
        model, tokenizer = load_base(str(folders[name]), dtype="float32")
        return model, Encoder.for_model(model, tokenizer, FORMAT)

    return model_and_encoder


@pytest.fixture(scope="session")
def made():
    """`made(config, model, **sizes)`: a model of a class that no shipped config names, with an encoder."""
    tokenizer = small_tokenizer()

    def model_and_encoder(config: str, model: str, **sizes) -> tuple[nn.Module, Encoder]:
        ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = getattr(transformers, model)(getattr(transformers, config)(**ids, **sizes)).eval()
            for parameter in model.requires_grad_(False).parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3)
        return model, Encoder.for_model(model, tokenizer, FORMAT)

    return model_and_encoder


@torch.no_grad()
def greedy(
    model: nn.Module, encoder: Encoder, prompts: Sequence[str], lengths: Sequence[int] | None = None
) -> list[str]:
    """The answers, token by token; up to the stop, or (running text) of the lengths given."""
    stops = () if encoder.format.stop is None else stop_ids(encoder.tokenizer, encoder.format.stop)
    answers = []
    for i, prompt in enumerate(prompts):
        ids, said = encoder.prompt_ids(prompt), []
        while len(said) < (lengths[i] if lengths else TOKENS) and not (said and said[-1] in stops):
            said.append(int(model(torch.tensor([ids + said]), use_cache=False).logits[0, -1].argmax()))
        answers.append(encoder.format.read(encoder.tokenizer.decode(said, skip_special_tokens=True)))
    return answers


@contextmanager
def counted(model: nn.Module) -> Iterator[list[tuple[int, int]]]:
    """(rows, tokens) of every forward pass, in a list that fills up."""
    shapes: list[tuple[int, int]] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, args, __: shapes.append(tuple(args[0].shape)))
    yield shapes
    handle.remove()


def asked(model: nn.Module, encoder: Encoder, prompts: Sequence[str] = PROMPTS, *given, **more) -> tuple[list, list]:
    """Answers, and the shapes of the passes until the first token came."""
    more = {"max_new_tokens": TOKENS, **more}
    with counted(model) as shapes:
        answers = generate_answers(model, encoder, prompts, *given, **more)
    return answers, shapes[: 2 if shapes[0][0] < len(prompts) else 1]


def shapes_of(encoder: Encoder, prompts: Sequence[str] = PROMPTS, shared: bool = True) -> list[tuple[int, int]]:
    """What `asked` must find, with and without a common beginning."""
    rows = [encoder.prompt_ids(prompt) for prompt in prompts]
    longest = max(map(len, rows))
    if not shared:
        return [(len(rows), longest)]
    common = next(i for i, tokens in enumerate(zip(*rows)) if len(set(tokens)) > 1)
    return [(1, common), (len(rows), longest - common)]


def layers_of(model: nn.Module, edit: Edit) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if name in edit.deltas}


@pytest.mark.parametrize("name", CAUSAL)
def test_answers_are_those_of_plain_greedy_decoding(name, tiny):
    model, encoder = tiny(name)
    answers, shapes = asked(model, encoder)
    assert answers == greedy(model, encoder, PROMPTS) and len(set(answers)) > 1
    # The beginning is run once, on one row, and each row's own tokens behind it.
    assert shapes == shapes_of(encoder)


@pytest.mark.parametrize("name", CAUSAL)
def test_answers_under_an_edit(name, tiny):
    """The beginning too is read by the edited model, however the edit came on it."""
    model, encoder = tiny(name)
    edit = ragged_edit(model, size=0.5)
    expected = greedy(changed(model, edit), encoder, PROMPTS)
    assert expected != greedy(model, encoder, PROMPTS)
    assert asked(model, encoder, PROMPTS, layers_of(model, edit), edit.deltas) == (expected, shapes_of(encoder))
    with edit.applied(model):
        assert asked(model, encoder) == (expected, shapes_of(encoder))
    with EditStack(model) as edits:
        edits.add(edit)
        assert asked(model, encoder) == (expected, shapes_of(encoder))
    assert asked(model, encoder)[0] == greedy(model, encoder, PROMPTS)


def test_answers_under_several_edits_and_a_dense_one(tiny):
    model, encoder = tiny("gpt2")
    edits = [ragged_edit(model, 1, size=0.3), dense_edit(model)]
    with ExitStack() as stack:
        for edit in edits:
            stack.enter_context(edit.applied(model))
        answers, shapes = asked(model, encoder)
    assert answers == greedy(changed(model, *edits), encoder, PROMPTS)
    assert shapes == shapes_of(encoder)


def two_tasks(model: nn.Module) -> tuple[dict[str, LowRankDelta], list[Edit]]:
    """Two edits as the tasks of one set of deltas, and each for itself."""
    edits = [ragged_edit(model, seed, size=0.5) for seed in (1, 2)]
    deltas = {
        name: LowRankDelta(
            *(torch.cat([getattr(edit.deltas[name], part) for edit in edits]) for part in ("down", "up"))
        )
        for name in edits[0].deltas
    }
    return deltas, edits


@pytest.mark.parametrize("task_of_row, shared", [([0, 1, 0], False), ([1, 1, 1], True), ([0, 0, 0], True)])
def test_every_row_under_its_own_tasks_edit(task_of_row, shared, tiny):
    model, encoder = tiny("llama")
    deltas, edits = two_tasks(model)
    copies = [changed(model, edit) for edit in edits]
    expected = [greedy(copies[task], encoder, [prompt])[0] for task, prompt in zip(task_of_row, PROMPTS)]
    given = (layers_of(model, edits[0]), deltas, torch.tensor(task_of_row))
    assert asked(model, encoder, PROMPTS, *given) == (expected, shapes_of(encoder, shared=shared))


@pytest.mark.parametrize("inside", [True, False])
def test_rows_grouped_by_task(inside, tiny):
    """Also where the edits are on the model already: one row cannot stand for rows under different edits."""
    model, encoder = tiny("llama")
    deltas, edits = two_tasks(model)
    layers, prompts = layers_of(model, edits[0]), [*PROMPTS, "Who?"]
    copies = [changed(model, edit) for edit in edits]
    expected = greedy(copies[0], encoder, prompts[:2]) + greedy(copies[1], encoder, prompts[2:])
    with applied(layers, {} if inside else deltas):
        given = (layers, deltas) if inside else ()
        assert asked(model, encoder, prompts, *given) == (expected, shapes_of(encoder, prompts, shared=False))


def test_the_deltas_of_rows_of_one_task():
    delta = LowRankDelta(torch.randn(2, 3, 4), torch.randn(2, 3, 5))
    assert one_task(None, None) == {} and one_task({"fc": delta}, None) is None
    assert one_task({"fc": delta}, torch.tensor([0, 1])) is None
    torch.testing.assert_close(one_task({"fc": delta}, torch.tensor([1, 1]))["fc"].dense()[0], delta.dense()[1])
    single = {"fc": delta.of_task(0)}
    assert one_task(single, None) == one_task(single, torch.tensor([0, 0])) == single


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_running_text(name, tiny):
    model, encoder = tiny(name)
    running = Encoder.for_model(model, encoder.tokenizer, RUNNING_TEXT)
    texts = [f"{EXAMPLES}The river{end}" for end in (" rises in the hills", "", " and runs west for ninety miles")]
    answers, shapes = asked(model, running, texts, lengths=[7, 3, 5])
    assert answers == greedy(model, running, texts, [7, 3, 5])
    # The second text is the beginning of the others: a token of it is left to be run.
    common = len(running.prompt_ids(texts[1])) - 1
    assert shapes == [(1, common), (3, max(len(running.prompt_ids(text)) for text in texts) - common)]


@pytest.mark.parametrize(
    "prompts, format",
    [
        (PROMPTS[:1], FORMAT),
        (PROMPTS, PromptFormat("Q: {input}\nA:", stop="\n")),
        (["", "1", "2 and 3"], PromptFormat("{input}" + EXAMPLES, stop="\n")),
    ],
    ids=["one row", "short beginning", "no beginning"],
)
def test_nothing_to_share(prompts, format, tiny):
    model, encoder = tiny("llama")
    encoder = Encoder.for_model(model, encoder.tokenizer, format)
    answers, shapes = asked(model, encoder, prompts)
    assert shapes == [(len(prompts), max(len(encoder.prompt_ids(prompt)) for prompt in prompts))]
    assert answers == greedy(model, encoder, prompts)


def test_the_shortest_beginning(tiny):
    model, _ = tiny("llama")
    start = list(range(2, 2 + shared_prompt.SHORTEST_BEGINNING))
    assert shared_beginning(model, [[*start, 40, 41], [*start, 50]], 4) == shared_prompt.SHORTEST_BEGINNING
    assert shared_beginning(model, [[*start, 40, 41], start], 4) == 0
    assert shared_beginning(model, [start[1:] + [40], start[1:] + [50]], 4) == 0


def test_the_same_question_twice(tiny):
    model, encoder = tiny("llama")
    answers, shapes = asked(model, encoder, PROMPTS[:1] * 3)
    assert answers == greedy(model, encoder, PROMPTS[:1]) * 3
    assert shapes == [(1, len(encoder.prompt_ids(PROMPTS[0])) - 1), (3, 1)]


# Longer than the common beginning, and shorter than the longest row.
WINDOW = 60
UNFIT = {
    "recurrent": ("MambaConfig", "MambaForCausalLM", {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    # Bloom and MPT know no positions but a token's place in its row.
    "bloom": ("BloomConfig", "BloomForCausalLM", {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "mpt": ("MptConfig", "MptForCausalLM", {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 256}),
    "convolution": ("Lfm2Config", "Lfm2ForCausalLM", {
        **SIZES, "num_key_value_heads": 1, "layer_types": ["conv", "full_attention"] * 2,
    }),
    "bidirectional": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**GROUPED, "use_bidirectional_attention": True}),
    "sliding window": ("MistralConfig", "MistralForCausalLM", {**GROUPED, "sliding_window": WINDOW}),
    "every other window": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**GROUPED, "sliding_window": WINDOW}),
    "local attention": ("GPTNeoConfig", "GPTNeoForCausalLM", {
        "hidden_size": 16, "num_layers": 4, "num_heads": 2, "attention_types": [[["global", "local"], 2]],
        "window_size": WINDOW,
    }),
    "chunks": ("Llama4TextConfig", "Llama4ForCausalLM", {
        **GROUPED, "intermediate_size_mlp": 24, "num_local_experts": 2, "attention_chunk_size": WINDOW,
    }),
    "longer rotation": ("Phi3Config", "Phi3ForCausalLM", {
        **SIZES, "original_max_position_embeddings": WINDOW,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
        },
    }),
    "no cache": ("LlamaConfig", "LlamaForCausalLM", {**GROUPED, "use_cache": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_models_that_cannot_share(name, made):
    config, kind, sizes = UNFIT[name]
    model, encoder = made(config, kind, **sizes)
    rows = [encoder.prompt_ids(prompt) for prompt in PROMPTS]
    assert max(map(len, rows)) > WINDOW and not can_share(model, max(map(len, rows)) + TOKENS)
    assert asked(model, encoder)[1] == shapes_of(encoder, shared=False)


@pytest.mark.parametrize(
    "name", ["sliding window", "every other window", "local attention", "chunks", "longer rotation"]
)
def test_a_window_that_holds_the_whole_row(name, made):
    config, kind, sizes = UNFIT[name]
    for longest, fits in ((WINDOW - 1, True), (WINDOW, False)):
        assert can_share(made(config, kind, **sizes)[0], longest) == fits


@pytest.mark.parametrize("kind", ["static", "quantized", "offloaded"])
def test_settings_for_another_cache(kind, tiny):
    model, _ = tiny("llama")
    assert can_share(model, 100)
    model.generation_config.cache_implementation = kind
    assert not can_share(model, 100)


def test_models_in_training_and_models_with_code_of_their_own(tiny):
    model, _ = tiny("llama")
    assert not can_share(model.train(), 100) and can_share(model.eval(), 100)

    class Own(type(model)):
        _auto_class = "AutoModelForCausalLM"

    model.__class__ = Own
    assert not can_share(model, 100)
    for name in ("t5", "bert"):
        assert not can_share(tiny(name)[0], 100)


def test_a_model_that_fills_no_cache(tiny):
    """The rows are run whole, with their padding where it is."""
    model, encoder = tiny("llama")
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "past_key_values": None, "use_cache": False}), with_kwargs=True
    )
    assert beginning_cache(model, torch.arange(2, 22)[None], 3) is None
    with counted(model) as shapes:
        answers = generate_answers(model, encoder, PROMPTS, max_new_tokens=1)
    handle.remove()
    assert shapes[1:] == shapes_of(encoder, shared=False)
    assert answers == greedy(model, encoder, PROMPTS, [1] * 3)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", CAUSAL)
def test_the_head_gets_no_slice(name, shared, tiny):
    """Of a slice torch makes a product for each row, with a copy of the head for each."""
    model, encoder = tiny(name)
    if not shared:
        encoder = Encoder.for_model(model, encoder.tokenizer, PromptFormat("Q: {input}\nA:", stop="\n"))
    head, contiguous = model.get_output_embeddings(), []
    handle = head.register_forward_hook(lambda _, args, __: contiguous.append(args[0].is_contiguous()))
    generate_answers(model, encoder, PROMPTS, max_new_tokens=TOKENS)
    handle.remove()
    assert contiguous and all(contiguous)
    assert not head._forward_pre_hooks
