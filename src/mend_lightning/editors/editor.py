"""What all editors share: which layers of which base model they change, how they make edits, how they are saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from mend_lightning.editors.confidence import check_confidence
from mend_lightning.editors.edited_model import DeltaEdits, Edited, Made
from mend_lightning.editors.factors import Factors
from mend_lightning.editors.inner_steps import check_inner_steps, stepped_deltas
from mend_lightning.editors.making import make_edit
from mend_lightning.editors.precondition import InputMoments
from mend_lightning.editors.saving import DESCRIPTION, WEIGHTS, class_named, read_editor, save_editor
from mend_lightning.editors.wordings import check_wordings
from mend_lightning.edits.edit import Edit
from mend_lightning.errors import BaseModelMismatchError, ConfigError, StateDictError
from mend_lightning.models.fingerprint import base_fingerprint, same_base
from mend_lightning.models.forward.hooks import Delta
from mend_lightning.models.forward.run_trunk import run_trunk
from mend_lightning.models.forward.trunk import TrunkOutputs
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.inputs.formats import FormatSpec
from mend_lightning.models.inputs.rows import Rows
from mend_lightning.models.layers import layer_shape, layers_of_shapes, select_layers
from mend_lightning.models.sharding.collectives import own_class


class Editor(nn.Module):
    """An editor of some layers of one base model. Everything it learns is float32, whatever the base's dtype.

    An editor of gradients (MEND, KE) has a `forward`: factors in, deltas out. One that finds its deltas in another way
    (fine-tuning) overrides `make_deltas`; one whose edits change no weight (cache, in-context) overrides `edited`.

    Args:
        layers: name -> (d_in, d_out) of the edited layers.
        settings: the other arguments of the subclass's constructor, as builtins: they are saved with the editor.
    """

    # False: edits are no weight deltas, and there is no `Edit` to save.
    changes_weights = True
    # Parameters that are a few numbers a layer, and learn with a rate of their own (`MendModule.edit_rate_lr`).
    rate_names = ("edit_rates", "log_ridge")
    # Whether its edits can be kept off questions: `x_keep` of `make_deltas`.
    constrains = False
    # Weight of L_base, the drift of the pre-edit model; see `base_deltas`.
    c_base = 0.0
    # Name -> class: a saved editor names its class, and a file must not import code.
    _classes: ClassVar[dict[str, type[Editor]]] = {}

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        # Nobody else's: which editor a folder holds must not depend on what was imported before.
        if cls.__module__.startswith("mend_lightning."):
            Editor._classes.setdefault(cls.__name__, cls)

    def __init__(self, layers: Mapping[str, tuple[int, int]], **settings: Any) -> None:
        super().__init__()
        self.layers = {name: (d_in, d_out) for name, (d_in, d_out) in layers.items()}
        self.settings = settings
        self.set_confidence(settings.get("confidence"))
        # What the editor was trained for; `bind` sets it, and it is saved with the editor.
        self.base_name: str = ""
        self.base_options: dict[str, str | bool | None] = {}
        self.base_fingerprint: str = ""
        self.prompt_format: dict[str, str] = {}
        # Kind -> names that neighbors of a fact are made with, from the training facts; saved with the editor.
        self.names: dict[str, tuple[str, ...]] = {}
        # Text to ids, for editors that read or write text; not saved.
        self.encoder: Encoder | None = None

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        layers: Sequence[str] | None = None,
        last_blocks: int | None = None,
        **settings: Any,
    ) -> Self:
        """An editor for `model`; `layers` are names or patterns, None the paper's choice."""
        chosen = select_layers(model, layers, last_blocks)
        return cls({name: layer_shape(layer) for name, layer in chosen.items()}, **settings)

    @classmethod
    def default_settings(cls) -> dict[str, Any]:
        """The constructor's settings where none are given: what older files, which lack later ones, were made with."""
        # Not the class's: FSDP2 gives a sharded editor a class with a `__new__` of its own, which has none of them.
        parameters = signature(cls.__init__).parameters.items()
        return {name: each.default for name, each in parameters if each.default is not each.empty}

    @property
    def trainable(self) -> bool:
        """Whether there is anything to train: without, an editor is ready as it is built."""
        return any(True for _ in self.parameters())

    @property
    def calibrated(self) -> bool:
        """Whether edits can be made; False asks `fit` for `calibrate` first."""
        return True

    @property
    def follows_rephrases(self) -> bool:
        """Whether calibration needs pairs of phrasings."""
        return False

    def calibrate(self, moments: Mapping[str, InputMoments]) -> None:
        """Takes in moments of the layers' inputs (name -> InputMoments) where `calibrated` asked for them."""
        raise ConfigError(f"{type(self).__name__} needs no calibration.")

    def make_deltas(
        self, model: nn.Module, z_edit: Rows, trunk: TrunkOutputs | None = None, x_keep: Rows | None = None
    ) -> Made:
        """The weight deltas of the edits `z_edit`, each as large as the editor's `confidence` asks.

        Args:
            model: the base model, in eval mode.
            z_edit: the edits of several independent tasks.
            trunk: the trunk's outputs for `z_edit`, where they are there already.
            x_keep: questions that each task's edit must not touch (`constrained`); an editor that cannot be constrained
                (`constrains`) passes them over.
        """
        return stepped_deltas(self, model, z_edit, trunk or run_trunk(model, z_edit, self.modules_in(model)), x_keep)

    @property
    def inner_steps(self) -> int:
        """The most steps that an edit is made in (`stepped_deltas`); without a confidence there is nothing to go on for."""
        return 1 if self.confidence is None else self.settings.get("inner_steps", 1)

    @property
    def wordings(self) -> int:
        """In how many other wordings of its question an edit is made (`in_wordings`)."""
        return self.settings.get("wordings", 0)

    def from_factors(
        self, model: nn.Module, factors: Mapping[str, Factors], z_edit: Rows, trunk: TrunkOutputs
    ) -> dict[str, Delta]:
        """Deltas of gradient factors; an editor that also reads the edits' text overrides this."""
        return self(factors)

    def input_metrics(self) -> Mapping[str, Tensor]:
        """Layer name -> `A⁻¹` `[d_in, d_in]`, in whose metric constraints change an edit least; a layer without: identity."""
        return {}

    def shard_units(self) -> list[nn.Module] | None:
        """The modules that FSDP2 gathers one by one; None: this editor cannot work on a sharded model.

        An editor that has them uses its parameters in their `forward` and its own alone, reads no weight of the base, and
        runs the base equally often whatever the data: all processes must gather in step.
        """
        return None

    def base_deltas(self) -> Mapping[str, Delta] | None:
        """name -> Delta of one task that the model has before any edit; None: edits start from the base as it is.

        An editor that trains the base itself (ENN) has them. Each of its edits holds them as well.
        """
        return None

    def edited(
        self, model: nn.Module, z_edit: Rows, trunk: TrunkOutputs | None = None, x_keep: Rows | None = None
    ) -> Edited:
        """The model under the edits `z_edit`; arguments as in `make_deltas`."""
        return DeltaEdits(self.modules_in(model), self.make_deltas(model, z_edit, trunk, x_keep).deltas)

    def bind(
        self,
        model: nn.Module,
        name: str = "",
        prompt_format: Mapping[str, str] | None = None,
        options: Mapping[str, str | bool | None] | None = None,
    ) -> None:
        """Notes which base model (and prompt format) this editor is trained for.

        Args:
            model: the base model.
            name: what it was loaded by.
            prompt_format: the text around questions and answers.
            options: what else `load_base` needs to load it again (revision, kind, random_weights).
        """
        self.base_name = name or self.base_name
        self.base_options = dict(options or self.base_options)
        self.base_fingerprint = base_fingerprint(self.modules_in(model))
        self.prompt_format = dict(prompt_format or self.prompt_format)

    def check_base(self, model: nn.Module) -> None:
        """Raises BaseModelMismatchError unless `model` is the base this editor was trained for."""
        found = base_fingerprint(self.modules_in(model))
        if not same_base(self.base_fingerprint, found, "editor"):
            raise BaseModelMismatchError(
                f"This editor was trained for {self.base_name or 'another model'} (weights {self.base_fingerprint}); "
                f"the given model has other weights ({found}). Load the base model the editor was trained on."
            )

    def text_encoder(self) -> Encoder:
        """`encoder`, for editors that cannot do without.

        Raises:
            ConfigError: there is none.
        """
        if self.encoder is None:
            raise ConfigError(
                f"{type(self).__name__} reads text and has no encoder. MendModule with an EditDataModule and make_edit set "
                "one; elsewhere set editor.encoder = editor_encoder(editor, model, tokenizer) (mend_lightning.editors.making)."
            )
        return self.encoder

    def set_confidence(self, confidence: float | None) -> None:
        """Changes the probability at which edits stop growing; see `confident_scales`.

        Raises:
            ConfigError: it is no probability between 0 and 1, or this editor has no such setting.
        """
        check_confidence(confidence)
        if confidence is not None and "confidence" not in self.settings:
            raise ConfigError(
                f"{type(self).__name__} has no confidence: how far its edits go is decided in another way."
            )
        self.confidence = confidence
        if "confidence" in self.settings:
            self.settings["confidence"] = confidence

    def set_steps(self, inner_steps: int | None = None, wordings: int | None = None) -> None:
        """Changes in how many `inner_steps` and `wordings` edits are made (`MendSettings`); None leaves one as it is. Raises
        ConfigError where there cannot be so many, or where this editor has no such setting.
        """
        changed = {name: n for name, n in (("inner_steps", inner_steps), ("wordings", wordings)) if n is not None}
        for name in changed.keys() - self.settings.keys():
            raise ConfigError(f"{type(self).__name__} has no {name}: it makes its edits in another way.")
        check_inner_steps(1 if inner_steps is None else inner_steps, self.confidence)
        check_wordings(wordings or 0)
        self.settings |= changed

    def description(self) -> dict[str, Any]:
        """Everything but the parameters, as builtins: what `editor.json` and checkpoints hold."""
        return {
            "class": own_class(self).__name__,
            "base": self.base_name,
            "base_options": self.base_options,
            "base_fingerprint": self.base_fingerprint,
            "prompt_format": self.prompt_format,
            "layers": [[name, list(shape)] for name, shape in self.layers.items()],
            "settings": self.settings,
            **({"names": self.names} if self.names else {}),
        }

    def edit(
        self,
        model: nn.Module,
        tokenizer: Any,
        prompt: str,
        target: str,
        keep: Sequence[str] = (),
        contrasts: int | None = None,
        subject: str | None = None,
        format: FormatSpec | None = None,
    ) -> Edit:
        """An `Edit` that makes `model` answer `prompt` with `target`; arguments and several facts: see `make_edit`."""
        subjects = [subject] if subject else ()
        return make_edit(self, model, tokenizer, [(prompt, target)], keep, contrasts, subjects, format)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Saves the editor as `editor.safetensors` and `editor.json` in `folder`."""
        return save_editor(self.description(), self.state_dict(), folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Loads an editor that `save_pretrained` or `mend-lightning fit` wrote, in eval mode.

        `Editor.from_pretrained` loads any of this package's editors; a subclass's only its own.

        Raises:
            StateDictError: a file is missing, truncated, holds NaN, or the two do not fit together.
        """
        description, state = read_editor(folder)
        layers = {name: tuple(shape) for name, shape in description["layers"]}
        editor = class_named(description, Editor._classes, cls, folder)(layers, **description["settings"])
        editor.base_name, editor.base_fingerprint = description["base"], description["base_fingerprint"]
        editor.prompt_format, editor.base_options = description["prompt_format"], description["base_options"]
        editor.names = {kind: tuple(names) for kind, names in description.get("names", {}).items()}
        try:
            editor.load_state_dict(state)
        except RuntimeError as error:
            raise StateDictError(f"{Path(folder) / WEIGHTS} does not fit its {DESCRIPTION}: {error}") from error
        return editor.eval()

    def modules_in(self, model: nn.Module) -> dict[str, nn.Module]:
        """name -> module of the edited layers in `model`.

        Raises:
            BaseModelMismatchError: the model lacks one of them, or it has another shape there.
        """
        return layers_of_shapes(model, self.layers)


# What `fit` builds an editor with: everything but the layers is known from the config before the base is loaded.
EditorFactory = Callable[[Mapping[str, tuple[int, int]]], Editor]
