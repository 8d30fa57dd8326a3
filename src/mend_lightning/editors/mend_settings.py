"""The settings of MEND, in one place for everything that takes them: `MendEditor`, `MendModule` and `MendCallback`."""

from __future__ import annotations

from dataclasses import dataclass

from mend_lightning.editors.inner_steps import check_inner_steps
from mend_lightning.editors.least_descent import check_least_descent
from mend_lightning.editors.transform import Init, Inputs
from mend_lightning.editors.wordings import check_wordings
from mend_lightning.errors import ConfigError


@dataclass(frozen=True)
class MendSettings:
    """How a `MendEditor` is built; the defaults are the paper's.

    Args:
        rank: rank of the transforms' matrices (the paper's 1920), cut to the network's width.
        n_hidden: hidden layers of each network.
        shared: layers of one shape share a network and have their own scale and shift; False gives every
            layer its own network.
        normalize: normalise the factors with running statistics.
        init: "identity" or "xavier".
        inputs: what the networks see; see `GradientTransform`.
        edit_rate: initial α of every layer (the paper's 1e-4).
        precondition: damping λ of the inverse input second moment that ũ is multiplied by (`InputPreconditioner`);
            None leaves it out, as in the paper. Needs `calibrate` before the first edit and d_in × d_in numbers a layer.
        rephrase_ridge: with `precondition`, ridge ρ of the regression of rephrases' inputs on the edit's, which makes edits
            hold for rephrases (`InputPreconditioner`); None leaves it out, as in the paper.
        ridge: initial λ of the ridge regression that makes one ΔW of all tokens (MALMEN; `ridge.ridge_delta`), learned for
            each layer; None: MEND's plain sum.
        confidence: probability of its new answer at which an edit stops growing (`confident_scales`), whatever its
            rate; None, as in the paper: every edit has the size that the learned edit rate gives it.
        contrasts: questions of the edit's own wording about other subjects that are made for each fact and that the edit must not
            touch (`data.neighbors`, `constraints`); 0, as in the paper: none.
        inner_steps: the most gradient steps that an edit is made in, each on the model edited so far, until it reaches its
            `confidence` (`stepped_deltas`); 1, as in the paper.
        wordings: other wordings of its question that an edit is made in as well (`in_wordings`), at most eight; 0, as in the
            paper: the question alone.
        least_descent: with `precondition`, least cosine between an edit and the direction of steepest descent, which mends
            edits of facts unlike the calibration's (`descending`); 0.02 for example. Keeps d_in × d_in numbers more a layer.
            None, as in the paper: no edit is looked at.
        constant_units: see `RunningNormalizer`.

    Raises:
        ConfigError: `inner_steps` is not positive, or more than 1 without `confidence`; `ridge` is not positive;
            `least_descent` is no cosine; there are not so many `wordings`; `contrasts` is negative; or there is a
            `rephrase_ridge` or a `least_descent` without `precondition`.

    Example:
        >>> MendSettings(rank=256, precondition=1e-3).rephrase_ridge is None
        True
    """

    rank: int = 1920
    n_hidden: int = 1
    shared: bool = True
    normalize: bool = True
    init: Init = "identity"
    inputs: Inputs = "combined"
    edit_rate: float = 1e-4
    precondition: float | None = None
    rephrase_ridge: float | None = None
    ridge: float | None = None
    confidence: float | None = None
    constant_units: str = "center"
    contrasts: int = 0
    inner_steps: int = 1
    wordings: int = 0
    least_descent: float | None = None

    def __post_init__(self) -> None:
        if self.ridge is not None and self.ridge <= 0:
            raise ConfigError(f"ridge is the damping of a regression and must be positive, not {self.ridge}.")
        check_wordings(self.wordings)
        check_least_descent(self.least_descent, self.precondition)
        check_inner_steps(self.inner_steps, self.confidence)
        if self.contrasts < 0:
            raise ConfigError(f"contrasts is a number of questions; it must be 0 or more, not {self.contrasts}.")
        if self.rephrase_ridge is not None and self.precondition is None:
            raise ConfigError(
                "rephrase_ridge is a part of the preconditioning: set precondition (its damping) as well."
            )


@dataclass(frozen=True)
class HostMendSettings(MendSettings):
    """Settings for a model that is still being trained (`MendCallback`): a small editor that needs few steps.

    Args: as in `MendSettings`.

    Example:
        >>> HostMendSettings().rank, HostMendSettings(confidence=None).edit_rate
        (256, 0.0004)
    """

    rank: int = 256
    edit_rate: float = 4e-4
    confidence: float | None = 0.9
