"""Names that an editor takes from the training facts, and that nothing measured is among what constrains an edit."""

from __future__ import annotations

import pytest
from helpers.bases import REMARKS
from helpers.models import KINDS

pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(*REMARKS)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_fit_notes_the_names_that_neighbors_are_made_with(family, mend, edit_data, trainer):
    """Those of the training facts; what is measured is constrained by names that are not measured."""
    module, data = mend(family, contrasts=2), edit_data(KINDS[family])
    run = trainer(max_steps=1)
    run.fit(module, data)
    trained = {record.subject for record in data.sampler("train").records}
    assert trained and {name for names in module.editor.names.values() for name in names} <= trained
    for split in ("train", "validation"):
        for index in range(3):
            task = data.sampler(split).task(0, index)
            assert len(task.keep) == 2
            assert not any(asked == kept for asked, _ in task.locality for kept in task.keep)
    batch = next(iter(data.val_dataloader()))
    assert batch.x_keep is not None and len(batch.x_keep) == 2 * len(batch)


def test_without_contrasts_an_editor_takes_no_names(mend, edit_data, trainer):
    module, data = mend("llama"), edit_data("causal")
    trainer(max_steps=1).fit(module, data)
    assert module.editor.names == {} and next(iter(data.val_dataloader())).x_keep is None
