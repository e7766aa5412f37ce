"""Each term's gradient by itself: the same as that of an objective which has no other term."""

import pytest
import torch
from tiny import ALL_TERMS, build_trainer, tiny_config

from kdkit.errors import UserError
from kdkit.inspection import gradient_rows, term_gradients
from kdkit.training.folder import RunFolder
from kdkit.training.objective import Moment, count_items
from kdkit.training.run import run_distillation

FEATURES = {**ALL_TERMS, "hidden": {"weight": {"start": 0.0, "end": 0.2, "begin": 0.5}}, "contrastive": {"weight": 0.1}}
DECOMPOSABLE = {name: part for name, part in FEATURES.items() if name != "contrastive"}
HALF, END = 5, 10


def gradient_of(model, batch, signal, moment):
    """Of the whole objective by an ordinary backward pass, weights laid end to end."""
    model.zero_grad()
    model(batch, signal=signal, moment=moment)["loss"].backward()
    return torch.cat([p.grad.flatten() for p in model.student.parameters()])


@pytest.fixture
def scene(tiny_pair, tmp_path):
    """Model, batch, signal and moment of one step, for an objective."""

    def make(objective, step=END):
        trainer = build_trainer(tiny_config(tiny_pair, objective=objective), tmp_path / "run")
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
        counts = {name: float(count) for name, count in count_items(batch).items()}
        moment = Moment(step, END, counts)
        signal = trainer.teacher and trainer.teacher(batch, trainer.objective.views_at(moment))
        return trainer.model, batch, signal, moment

    return make


class TestTermGradients:
    def test_a_terms_gradient_is_that_of_an_objective_which_has_no_other(self, scene):
        model, batch, signal, moment = scene(FEATURES)
        found = term_gradients(model, batch, signal=signal, moment=moment)
        whole = gradient_of(model, batch, signal, moment)
        assert set(found.terms) == {"kd", "lm", "dtw", "hidden", "contrastive"}
        for name, term in found.terms.items():
            others = {other: {**FEATURES[other], "weight": 0.0} for other in found.terms if other != name}
            alone = gradient_of(*scene({**FEATURES, **others}))
            assert term.norm == pytest.approx(alone.norm().item(), rel=1e-4)
            cosine = torch.nn.functional.cosine_similarity(alone, whole, dim=0).item()
            assert term.cosine == pytest.approx(cosine, abs=1e-4)

    def test_together_they_are_the_gradient_and_the_loss_of_the_step(self, scene):
        model, batch, signal, moment = scene(FEATURES)
        found = term_gradients(model, batch, signal=signal, moment=moment)
        assert found.norm == pytest.approx(gradient_of(model, batch, signal, moment).norm().item(), rel=1e-4)
        assert found.loss == pytest.approx(model(batch, signal=signal, moment=moment)["loss"].item(), rel=1e-5)
        assert sum(found.shares.values()) == pytest.approx(100)

    def test_a_term_without_a_weight_at_that_step_has_none(self, scene):
        model, batch, signal, moment = scene(FEATURES, step=HALF)
        assert "hidden" not in term_gradients(model, batch, signal=signal, moment=moment).terms

    def test_one_term_alone_is_the_whole(self, scene):
        model, batch, signal, moment = scene({"kd": {"weight": 0.7}})
        found = term_gradients(model, batch, signal=signal, moment=moment)
        assert found.shares == {"kd": 100.0}
        assert found.terms["kd"].cosine == pytest.approx(1.0)

    def test_nothing_of_the_model_is_changed(self, scene):
        model, batch, signal, moment = scene(FEATURES)
        terms = model.objective.terms
        before = {name: value.clone() for name, value in model.state_dict().items()}
        term_gradients(model, batch, signal=signal, moment=moment)
        assert model.objective.terms is terms
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.fixture(scope="module")
def short_run(tiny_pair, tmp_path_factory):
    """A finished run that kept a checkpoint of each step and was evaluated there."""
    config = tiny_config(
        tiny_pair,
        "checkpoint.every_steps=1",
        "checkpoint.keep=5",
        "evaluation.every_steps=1",
        objective=DECOMPOSABLE,
    )
    return run_distillation(config, tmp_path_factory.mktemp("runs") / "run")


class TestGradientRows:
    def test_there_is_one_for_each_checkpoint_with_the_loss_of_the_evaluation_there(self, short_run):
        """The evaluation is another way to the same rows, weights and temperature."""
        rows = gradient_rows(short_run.folder, num_rows=7)
        assert [(row["kind"], row["stage"], row["step"]) for row in rows] == [
            ("gradient", "distill", step) for step in (1, 2, 3)
        ]
        evaluated = [row for row in RunFolder(short_run.folder).metrics.rows() if row["kind"] == "eval"]
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in evaluated], rel=1e-4)

    def test_terms_appear_with_their_weights(self, short_run):
        first, *_, last = gradient_rows(short_run.folder, num_rows=2)
        assert "gradient_share/hidden" not in first
        assert last["gradient_share/hidden"] > 0
        assert -1 <= last["gradient_cosine/hidden"] <= 1

    def test_no_random_draw_outside_is_disturbed(self, short_run):
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        gradient_rows(short_run.folder, num_rows=1)
        assert torch.equal(torch.rand(3), expected)

    def test_a_folder_without_a_finished_run_is_refused(self, tmp_path):
        with pytest.raises(UserError, match="holds no finished run"):
            gradient_rows(tmp_path)
