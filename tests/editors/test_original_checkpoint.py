"""The importer of the original repository's editor checkpoints."""

from __future__ import annotations

import pytest
import torch
from helpers.models import ROUNDING, relative_error
from torch import Tensor, nn

from mend_lightning.editors.factors import Factors
from mend_lightning.editors.mend import MendEditor
from mend_lightning.editors.original_checkpoint import editor_entries, original_names
from mend_lightning.errors import BaseModelMismatchError, StateDictError

SHAPES = {"a": (4, 6), "b": (6, 4), "c": (4, 6)}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def base_model() -> nn.Module:
    return nn.ModuleDict({name: nn.Linear(*shape) for name, shape in SHAPES.items()})


def trained_editor(**settings) -> MendEditor:
    """An editor with statistics, and with parameters that all differ."""
    editor = MendEditor(SHAPES, **{"rank": 3, **settings})
    with torch.no_grad():
        for parameter in editor.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    editor.train()(factors())
    return editor.eval()


def factors() -> dict[str, Factors]:
    task = torch.tensor([0, 0, 0, 1, 1])
    return {n: Factors(torch.randn(5, i), torch.randn(5, o), task, tasks=2) for n, (i, o) in SHAPES.items()}


def as_original(editor: MendEditor) -> dict[str, Tensor]:
    """The state dict that the original would hold for this editor."""
    saved = {}
    for ours, value in editor.state_dict().items():
        theirs = original_names(editor.layers, editor.settings["shared"], editor.state_dict())[ours]
        saved[theirs] = -value if ours == "edit_rates" else value.float().reshape(value.shape or (1,)).clone()
    for theirs in [name for name in saved if name.endswith((".u_s", ".v_s"))]:
        group = theirs.rpartition(".")[0]
        saved[theirs.removesuffix("_s") + "_std"] = (saved[theirs] / (saved[f"{group}.k"] - 1)).sqrt()
    return saved


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("inputs", ["combined", "separate", "u", "delta", "smaller"])
@pytest.mark.parametrize("n_hidden", [0, 1, 2])
def test_round_trip(shared, inputs, n_hidden):
    editor = trained_editor(shared=shared, inputs=inputs, n_hidden=n_hidden)
    again = MendEditor.from_original(base_model(), as_original(editor), [f"{name}.weight" for name in SHAPES]).eval()
    inferred = {name: again.settings[name] for name in ("shared", "inputs", "n_hidden", "rank")}
    assert inferred == {"shared": shared, "inputs": inputs, "n_hidden": n_hidden, "rank": 3}
    for name, value in editor.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    given = factors()
    for name, delta in editor(given).items():
        assert relative_error(again(given)[name].dense(), delta.dense()) < ROUNDING


def test_rates_are_negated_because_the_original_adds():
    saved = as_original(trained_editor())
    editor = MendEditor.from_original(base_model(), saved, list(SHAPES))
    assert torch.equal(editor.edit_rates, -saved["edit_lrs"])


def test_rank_that_was_cut_to_the_width():
    editor = MendEditor.from_original(
        base_model(), as_original(trained_editor(rank=1920, inputs="separate")), list(SHAPES)
    )
    assert editor.settings["rank"] == 6
    assert editor.transforms[0].nets["u"].layers[0].u.shape == (4, 4)


def test_settings_that_the_checkpoint_does_not_tell():
    editor = MendEditor.from_original(
        base_model(), as_original(trained_editor(init="xavier")), list(SHAPES),
        init="xavier", normalize=False, constant_units="original",
    )  # fmt: skip
    assert not editor.transforms[0].nets["combined"].layers[0].residual
    assert not editor.transforms[0].normalize
    assert editor.transforms[0].u_stats.constant_units == "original"


def test_editor_that_never_trained_has_empty_statistics():
    saved = as_original(trained_editor())
    for name in saved:
        if name.rpartition(".")[2] in ("u_mean", "u_std", "u_s", "v_mean", "v_std", "v_s", "k"):
            saved[name] = torch.full_like(saved[name], torch.nan)
    editor = MendEditor.from_original(base_model(), saved, list(SHAPES))
    assert int(editor.transforms[0].u_stats.count) == 0
    assert not editor.transforms[0].u_stats.mean.any()
    assert all(delta.dense().isfinite().all() for delta in editor(factors()).values())


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "mend", "archive"])
def test_wrapped_checkpoints_are_opened_and_the_base_model_left_out(wrapper):
    saved = as_original(trained_editor())
    inside = {**saved, "model.a.weight": torch.zeros(6, 4), "model_config": object()}
    assert editor_entries({"step": 7, "opt": {}, wrapper: inside}).keys() == saved.keys()
    assert editor_entries({"archive": {"model": inside}}).keys() == saved.keys()


def changed(changes: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """A good checkpoint with some entries replaced, or taken out where the value is None."""
    saved = {**as_original(trained_editor()), **changes}
    return {name: value for name, value in saved.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"edit_lrs": None}, "no entry 'edit_lrs', neither at the top nor inside model, .* Pass what torch.load gives"),
        ({"mend.(4, 6).k": None}, r"missing mend.\(4, 6\).k; foreign nothing. Pass a complete checkpoint"),
        ({"mend.(4, 6).extra": torch.ones(1)}, r"missing nothing; foreign mend.\(4, 6\).extra"),
        ({"other": torch.ones(1)}, "missing nothing; foreign other"),
        ({"mend.(4, 6).mlp.layers.0.bias": torch.ones(9)}, r"bias' has shape \(9,\), expected \(10,\) for the layers"),
        ({"mend.(4, 6).u_mean": torch.full((4,), torch.nan)}, "u_mean' holds NaN or infinity.* Use an earlier file"),
        (
            {"mend.(4, 6).mlp1.layers.0.bias": torch.ones(4)},
            r"fit no variant of MEND .*\(4, 6\): mlp, mlp1; .*expected",
        ),
    ],
)
def test_spoilt_checkpoints(changes, text):
    with pytest.raises(StateDictError, match=text):
        MendEditor.from_original(base_model(), changed(changes), list(SHAPES))


def test_networks_of_another_class():
    saved = {k: v for k, v in as_original(trained_editor()).items() if ".mlp." not in k}
    with pytest.raises(StateDictError, match="No low-rank networks .* Only mlp_class=IDMLP with a rank"):
        MendEditor.from_original(base_model(), saved, list(SHAPES))


@pytest.mark.parametrize("layers", [["a", "b"], ["a", "b", "b"]])
def test_wrong_number_of_layers(layers):
    with pytest.raises(StateDictError, match="3 edit rates, but 2 different layers were given. Pass .*in their order"):
        MendEditor.from_original(base_model(), as_original(trained_editor()), layers)


def test_layer_that_the_model_lacks():
    with pytest.raises(
        BaseModelMismatchError, match="ModuleDict has no linear layer 'layers.a' .*near matches: .*base model"
    ):
        MendEditor.from_original(base_model(), as_original(trained_editor()), ["layers.a.weight", "b", "c"])


def test_model_of_another_size():
    other = nn.ModuleDict({name: nn.Linear(8, 8) for name in SHAPES})
    text = r"transforms for layers of the shapes .*\(4, 6\), \(6, 4\); the layers given need \(8, 8\). Pass the base"
    with pytest.raises(BaseModelMismatchError, match=text):
        MendEditor.from_original(other, as_original(trained_editor()), list(SHAPES))
    with pytest.raises(StateDictError, match=r"has shape .* expected .* for the layers given. Pass the base model"):
        MendEditor.from_original(other, as_original(trained_editor(shared=False)), list(SHAPES))


def test_unshared_transforms_of_other_layers():
    base = base_model()
    base["d"] = nn.Linear(4, 6)
    with pytest.raises(
        StateDictError, match="transforms for the layers a#weight, b#weight, c#weight; .*need a#weight, b#weight, d"
    ):
        MendEditor.from_original(base, as_original(trained_editor(shared=False)), ["a", "b", "d"])
