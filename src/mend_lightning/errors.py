"""Named errors. Each is also the builtin it refines, so `except ValueError` keeps working."""


class MendError(Exception):
    """Base of every error this package raises on purpose."""


class LayerNotFoundError(MendError, ValueError):
    """A layer pattern matched nothing, or what it matched cannot be edited."""


class LayerNotCalledError(MendError, RuntimeError):
    """A chosen layer did not run in the forward pass, so it has no gradient factors."""


class EmptyEditError(MendError, ValueError):
    """An edit (or a locality example) has no label token to learn from."""


class NonFiniteError(MendError, ArithmeticError):
    """A loss or a gradient is NaN or infinite."""


class InferenceModeError(MendError, RuntimeError):
    """Gradients were asked for inside `torch.inference_mode()`."""


class CheckpointingError(MendError, RuntimeError):
    """The base model uses reentrant activation checkpointing, which hides activations from hooks."""


class RecordError(MendError, ValueError):
    """A line of a data file is not a usable record."""


class InputTooLongError(MendError, ValueError):
    """A text, or a number of them, is longer than what is run at once."""


class EmptyDatasetError(MendError, ValueError):
    """No record is left to train or evaluate on."""


class DataFileError(MendError, OSError):
    """A data file is missing or cannot be read."""


class TokenizerError(MendError, ValueError):
    """The tokenizer cannot encode what it was given the way this package needs."""


class ModelLoadError(MendError, OSError):
    """A base model could not be found, downloaded or verified."""


class ModelNotFoundError(MendError, AttributeError):
    """A LightningModule has no model at the attribute path that was given."""


class BaseModelMismatchError(MendError, ValueError):
    """An editor, edit or checkpoint belongs to another base model or to other shapes."""


class StateDictError(MendError, ValueError):
    """A saved file lacks parameters, has foreign ones, or they have other shapes."""


class CheckpointNotFoundError(MendError, FileNotFoundError):
    """There is no checkpoint where one was to be read."""


class OutputPathError(MendError, OSError):
    """A result cannot be written where it was asked to go."""


class EditNameError(MendError, KeyError):
    """A stack has no edit of that name, or has one already."""

    # KeyError shows the repr of its message.
    __str__ = Exception.__str__


class TrunkCacheError(MendError, ValueError):
    """A folder of trunk caches is damaged, or of another trunk or version."""


class ConfigError(MendError, ValueError):
    """A setting, or a combination of settings, cannot work."""


class MergeError(MendError, ValueError):
    """An edit cannot be added to a base model's weights: they are quantised, tied, sharded or not there."""


class AdapterError(MendError, ValueError):
    """An edit cannot be written as a PEFT adapter, or a PEFT adapter cannot be read as an edit."""


class MissingPackageError(MendError, ImportError):
    """An optional package that is needed is not installed."""


class StoppedError(MendError, RuntimeError):
    """Work was stopped before its end by whoever asked for it."""


class ProcessLostError(MendError, RuntimeError):
    """Another process of a distributed run has ended, or does not answer."""


class NoEffectWarning(UserWarning):
    """An operation ran but changed nothing."""


class TrunkCacheWarning(UserWarning):
    """A trunk cache is not used, is damaged in part, or grows no further; training continues, and is slower."""


class TruncationWarning(UserWarning):
    """A prompt is longer than max_length, and part of it was cut off."""


class NoStopWarning(UserWarning):
    """Nothing ends an answer, though the data are questions."""


class LowConfidenceWarning(UserWarning):
    """An edit is as large as it may be, and the model is still less sure of the new answer than was asked for."""


class FailingRunWarning(UserWarning):
    """The first look at a run's edits says that it fails: the base knows nothing, or edits do not reach their answers."""


class UnverifiedBaseWarning(UserWarning):
    """Whether a model is the base that an edit was made for cannot be told."""


class RandomWeightsWarning(UserWarning):
    """A base model was built with random weights, so what it answers means nothing."""


class CollidingEditWarning(UserWarning):
    """Two edits of a stack answer the same question."""


class DependentEditWarning(UserWarning):
    """An edit was made on top of another one, which is not active."""


class RoundingWarning(UserWarning):
    """A merged edit is small beside what the base's dtype can store, so much of it was rounded away."""


class TiedWeightsWarning(UserWarning):
    """An exported adapter changes a layer that shares its weight with another one."""
