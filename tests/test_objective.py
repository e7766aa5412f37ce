"""The terms together: their size and gradients, their sum, their schedules, and what a batch may not change."""

import pytest
import torch
from accelerate import Accelerator
from crossing import (
    BYTES,
    META_SPACE,
    PAIRS,
    Pair,
    batch_of,
    gpt2,
    gradients,
    llama,
    make_pair,
    moment_of,
    qwen_moe,
    run_objective,
    tokenizer_of,
)
from torch import Tensor
from transformers import AutoTokenizer

from kdkit.config import ObjectiveConfig, demo_folder, load_config
from kdkit.data.batch import teacher_view
from kdkit.data.vocabulary import byte_groups
from kdkit.losses import LOSSES, GroupedIds, VocabularyGroups, VocabularyMatch
from kdkit.losses.alignment import alignment_loss, pool_units
from kdkit.teacher.sources import LiveTeacher
from kdkit.training.model import DistillModel
from kdkit.training.objective import Across, Moment, Objective
from kdkit.training.validation import measure_objective

RAMP = {"start": 0.0, "end": 1.0}
ONLY = {"kd": {"weight": 0.0}}
WIDTH = len(tokenizer_of(META_SPACE))


def all_terms(pair: Pair) -> dict:
    """Every term that a pair can have, on ramps as in the preset student-aware."""
    terms = {
        "kd": {"weight": 0.7, "temperature": {"start": 2.0, "end": 1.5}},
        "lm": {"weight": 0.3},
        "dtw": {"weight": 0.1, "band": 4, "importance": "inverse_entropy"},
        "hidden": {"weight": {"start": 0.0, "end": 0.1, "begin": 0.1, "finish": 0.4}},
        "attention": {"weight": {"start": 0.0, "end": 0.1, "begin": 0.1, "finish": 0.4}, "num_layers": 2},
        "layerwise": {"weight": {"start": 0.0, "end": 0.05, "begin": 0.4, "finish": 0.7}, "mixing": "learnt"},
        "contrastive": {"weight": {"start": 0.0, "end": 0.05, "begin": 0.7, "finish": 1.0}},
    }
    if pair.teacher_tokenizer is not None:
        terms["span"] = {"weight": 0.2}
    if pair.is_moe:
        terms["routing"] = {"weight": RAMP}
    return terms


@pytest.mark.parametrize("crosses", [True, False], ids=["two tokenizers", "one tokenizer"])
@pytest.mark.parametrize("name", PAIRS)
class TestAtInitialisation:
    def test_each_term_is_at_most_10_and_has_a_share_of_the_gradient(self, name, crosses):
        """Seed 001 to 004: sums of squares of 40 to 200 beside a kd of 3, and a kd that was summed over tokens."""
        pair = make_pair(name, crosses=crosses)
        model, teacher, batch = pair.model(all_terms(pair)), LiveTeacher(pair.teacher), pair.batch(4)
        moment = moment_of(batch)
        run_objective(model, teacher, batch, moment)["loss"].backward()
        whole, alone = gradients(model), {}
        for term in (terms := model.objective.terms):
            model.objective.terms = (term,)
            found = run_objective(model, teacher, batch, moment)
            found["loss"].backward()
            alone[term.name] = gradients(model)
            part = found["sums"][term.name].item() / moment.counts[term.counts]
            assert 0.0 <= part * term.scale(moment) <= 10.0, term.name
        assert list(alone) == [term.name for term in terms]
        norms = {term: gradient.norm().item() for term, gradient in alone.items()}
        for term, norm in norms.items():
            assert 0.0 < norm < float("inf"), term
            print(f"{term}: {norm / sum(norms.values()):.1%} of the gradients' norms")
        torch.testing.assert_close(sum(alone.values()), whole, rtol=1e-4, atol=1e-5 * whole.norm().item())

    def test_weighted_parts_sum_to_the_total(self, name, crosses):
        pair = make_pair(name, crosses=crosses)
        model, batch = pair.model(all_terms(pair)), pair.batch(4)
        moment = moment_of(batch)
        with torch.no_grad():
            found = run_objective(model, LiveTeacher(pair.teacher), batch, moment)
        weights = {"kd": 0.7 * 1.5**2, "lm": 0.3, "span": 0.2, "dtw": 0.1, "hidden": 0.1, "attention": 0.1}
        weights |= {"layerwise": 0.05, "contrastive": 0.05, "routing": 1.0}
        parts = {
            term.name: found["sums"][term.name].double().item() / moment.counts[term.counts]
            for term in model.objective.terms
        }
        total = sum(weights[term] * part for term, part in parts.items())
        assert found["loss"].item() == pytest.approx(total, rel=1e-6)


PERCENT = (0, 5, 10, 25, 40, 55, 70, 85, 100)
STUDENT_AWARE = {
    "kd": (0.7,) * 9,
    "lm": (0.3,) * 9,
    "hidden": (0, 0, 0, 0.05, 0.1, 0.1, 0.1, 0.1, 0.1),
    "attention": (0, 0, 0, 0.05, 0.1, 0.1, 0.1, 0.1, 0.1),
    "layerwise": (0, 0, 0, 0, 0, 0.025, 0.05, 0.05, 0.05),
    "contrastive": (0, 0, 0, 0, 0, 0, 0, 0.025, 0.05),
}
TEMPERATURE = (2.0, 1.975, 1.95, 1.875, 1.8, 1.725, 1.65, 1.575, 1.5)


class TestPresetStudentAware:
    def test_weights_and_temperature_are_these_numbers(self):
        """The curriculum of seeds 001 to 004, counted in optimizer steps."""
        objective = load_config({"preset": ["demo-moe", "student-aware"]}).objective
        for index, percent in enumerate(PERCENT):
            for name, schedule in objective.weights.items():
                expected = STUDENT_AWARE.get(name, (0,) * 9)[index]
                assert schedule.at(4 * percent, 400) == pytest.approx(expected, rel=1e-12, abs=0.0), (name, percent)
            assert objective.kd.temperature.at(4 * percent, 400) == pytest.approx(TEMPERATURE[index], rel=1e-12)


class TestEvaluation:
    @pytest.mark.parametrize("step", [0, 3, 7, 10])
    def test_at_a_step_is_the_training_objective_on_the_same_rows_at_that_step(self, step):
        """Seed 002: evaluation took other weights than training, so that the two losses could not be compared."""
        pair = make_pair("a Qwen2-MoE teacher", crosses=True)
        model, teacher, batch = pair.model(all_terms(pair)), LiveTeacher(pair.teacher), pair.batch(6)
        trained = run_objective(model.train(), teacher, batch, moment_of(batch, step=step))
        moment = Moment(step, 10)
        measured = measure_objective(
            model,
            model.objective,
            [(batch, True)],
            feed=lambda batch: (batch, teacher(batch, model.objective.views_at(moment))),
            moment=moment,
            accelerator=Accelerator(cpu=True),
        )
        assert measured["loss"] == pytest.approx(trained["loss"].item(), rel=1e-6)
        assert {name.removeprefix("part/") for name in measured if name.startswith("part/")} == trained["sums"].keys()


DECOMPOSABLE = {
    "kd, hybrid": {"kd": {"weight": 1.0, "temperature": 2.0}},
    "kd, hybrid, top-k": {"kd": {"weight": 1.0, "loss": "reverse_kl", "top_k": 8}},
    "kd, uld": {"kd": {"weight": 1.0, "across": "uld"}},
    "kd, uld, top-k": {"kd": {"weight": 1.0, "across": "uld", "top_k": 8}},
    "lm": {**ONLY, "lm": {"weight": 1.0}},
    "span": {**ONLY, "span": {"weight": 1.0, "temperature": 100.0}},
    "dtw": {**ONLY, "dtw": {"weight": 1.0, "band": 4, "importance": "inverse_entropy"}},
    "dtw, adaptive band": {**ONLY, "dtw": {"weight": 1.0, "importance": "inverse_entropy", "adaptive_band": {}}},
    "hidden": {**ONLY, "hidden": {"weight": 1.0}},
    "hidden, mse": {**ONLY, "hidden": {"weight": 1.0, "kind": "mse"}},
    "attention": {**ONLY, "attention": {"weight": 1.0, "num_layers": 2}},
    "layerwise": {**ONLY, "layerwise": {"weight": 1.0, "mixing": "learnt"}},
    "routing without load balance": {**ONLY, "routing": {"weight": 1.0, "load_balance": 0.0}},
}


def in_portions(pair: Pair, objective: dict, *portions: int) -> tuple[float, Tensor]:
    """Loss and gradient of eight rows, fed as so many rows at a time of one accumulation window."""
    model, teacher = pair.model(objective), LiveTeacher(pair.teacher)
    counts, loss, start = moment_of(pair.batch(8)).counts, 0.0, 0
    for size in portions:
        found = run_objective(model, teacher, pair.batch(size, skip=start), Moment(10, 10, counts))["loss"]
        found.backward()
        loss, start = loss + found.item(), start + size
    assert start == 8
    return loss, gradients(model)


class TestAccumulation:
    @pytest.mark.parametrize("objective", DECOMPOSABLE.values(), ids=DECOMPOSABLE.keys())
    def test_eight_rows_are_twice_four_across_tokenizers(self, objective):
        """trl #4719: a loss that averages micro-batches weighs short answers more under accumulation."""
        pair = make_pair("a Qwen2-MoE teacher", crosses=True)
        whole, split = in_portions(pair, objective, 8), in_portions(pair, objective, 4, 4)
        uneven = in_portions(pair, objective, 1, 7)
        for other in (split, uneven):
            assert other[0] == pytest.approx(whole[0], rel=1e-5)
            assert (other[1] - whole[1]).norm() <= 1e-4 * whole[1].norm()

    @pytest.mark.parametrize(
        ("name", "term"), [("contrastive", {}), ("contrastive", {"over": "sequences"}), ("routing", {})]
    )
    def test_what_is_no_sum_over_items_says_so(self, name, term):
        pair = make_pair("a Qwen2-MoE teacher", crosses=True)
        objective = {**ONLY, name: {"weight": 1.0, **term}}
        assert [term.decomposable for term in pair.model(objective).objective.terms] == [False]
        assert in_portions(pair, objective, 4, 4)[0] != pytest.approx(in_portions(pair, objective, 8)[0], rel=1e-6)

    def test_all_others_are_sums_over_items(self):
        pair = make_pair("a Qwen2-MoE teacher", crosses=True)
        found = {term.name for term in pair.model(all_terms(pair)).objective.terms if not term.decomposable}
        assert found == {"contrastive", "routing"}


def kd_of(pair: Pair, kd: dict, *, through_spans: bool = False, num_rows: int = 3) -> tuple[float, Tensor]:
    """Mean of kd and its gradient; `through_spans` sends a pair of one tokenizer through the path of two."""
    theirs = pair.tokenizer if through_spans else pair.teacher_tokenizer
    batch = batch_of(pair.tokenizer, theirs, num_rows)
    across = None
    if through_spans:
        every = torch.arange(len(pair.tokenizer))
        groups = GroupedIds(every, len(every))
        match = VocabularyMatch(every, every, len(every), len(every))
        across = Across(VocabularyGroups(groups, groups), match)
    model = pair.model({"kd": {"weight": 1.0, **kd}, "span": {"weight": 0.0}}, across=across)
    found = run_objective(model, LiveTeacher(pair.teacher), batch, moment_of(batch))["loss"]
    found.backward()
    return found.item(), gradients(model)


def assert_same(ours: tuple[float, Tensor], theirs: tuple[float, Tensor], tolerance: float = 3e-5) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance)
    assert (ours[1] - theirs[1]).norm() <= 10 * tolerance * theirs[1].norm()


@pytest.mark.parametrize("loss", LOSSES)
class TestKd:
    @pytest.mark.parametrize("top_k", [None, 8])
    def test_one_tokenizer_as_if_it_were_two_is_the_plain_divergence(self, loss, top_k):
        pair = make_pair("a wider student, untied", crosses=False)
        kd = {"loss": loss, "top_k": top_k, "temperature": 2.0}
        assert_same(kd_of(pair, kd, through_spans=True), kd_of(pair, kd))

    @pytest.mark.parametrize("crosses", [True, False], ids=["two tokenizers", "one tokenizer"])
    def test_as_many_kept_ids_as_there_are_is_dense_and_few_are_another_number(self, loss, crosses):
        """A preset with top_k 256 has to work for a vocabulary of fewer."""
        pair = make_pair("a wider student, untied", crosses=crosses)
        dense = kd_of(pair, {"loss": loss})
        for top_k in (1024, 5000):
            assert_same(kd_of(pair, {"loss": loss, "top_k": top_k}), dense)
        few, gradient = kd_of(pair, {"loss": loss, "top_k": 8})
        assert few != pytest.approx(dense[0], rel=1e-3)
        assert 0.0 < gradient.norm() < float("inf")


class TestAcross:
    def test_groups_have_the_same_numbers_whenever_they_are_made(self):
        """Their order is that of sums, so that a resumed run differed in the last digits from an uninterrupted one."""
        folders = (demo_folder() / META_SPACE, demo_folder() / BYTES)
        made = [byte_groups(*(AutoTokenizer.from_pretrained(folder) for folder in folders)) for _ in range(3)]
        assert made[0] == made[1] == made[2]


class TestDtw:
    def test_importance_across_tokenizers_is_the_teachers_certainty_unit_by_unit(self):
        pair = make_pair("a Qwen2-MoE teacher", crosses=True)
        model, batch = pair.model({**ONLY, "dtw": {"weight": 1.0, "importance": "inverse_entropy"}}), pair.batch(5)
        found = run_objective(model, LiveTeacher(pair.teacher), batch, moment_of(batch))["sums"]["dtw"]
        read = teacher_view(batch)
        with torch.no_grad():
            teacher = pair.teacher(input_ids=read["input_ids"], attention_mask=read["attention_mask"])
            student = pair.student.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            hidden = pair.teacher.model(input_ids=read["input_ids"], attention_mask=read["attention_mask"])
        weights = torch.zeros(len(read["unit_ids"]), batch["max_units"])
        for row, units in enumerate(read["unit_ids"].tolist()):
            for unit in range(batch["max_units"]):
                entropies = []
                for place, own in enumerate(units):
                    if own == unit:
                        p = teacher.logits[row, place - 1].double().softmax(-1)
                        entropies.append(-(p * p.log()).sum().item())
                weights[row, unit] = 1.0 / (1.0 + sum(entropies) / max(len(entropies), 1))
        ours, lengths = pool_units(student.last_hidden_state, batch["unit_ids"], batch["max_units"])
        theirs, _ = pool_units(hidden.last_hidden_state, read["unit_ids"], batch["max_units"])
        expected = alignment_loss(
            model.adapters["projector"](ours),
            theirs,
            lengths,
            lengths,
            gamma=0.1,
            band=32,
            metric="cosine",
            divergence=True,
            normalize="max_length",
            student_weights=weights,
            teacher_weights=weights,
        ).per_sample.sum()
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        assert weights.std() > 0.001


class TestAttention:
    def test_a_student_that_drops_attention_is_compared_by_distributions(self):
        """GPT-2 drops a tenth by default: its maps do not sum to 1, and the term has a floor."""
        found = {}
        for rate in (0.0, 0.1):
            torch.manual_seed(1)
            student = gpt2(len(tokenizer_of(BYTES)), dropout=rate).train()
            teacher = gpt2(len(tokenizer_of(BYTES)))
            teacher.load_state_dict(student.state_dict())
            pair = Pair(student, teacher.eval(), tokenizer_of(BYTES), None)
            found[rate] = in_portions(pair, {**ONLY, "attention": {"weight": 1.0, "num_layers": 3}}, 8)
        assert found[0.0][0] == pytest.approx(0.0, abs=1e-6)
        assert 0.01 < found[0.1][0] < 1.0
        assert torch.isfinite(found[0.1][1]).all()


class TestUld:
    def test_needs_no_match_of_ids(self):
        """It is what is left where nobody can say what the ids of a vocabulary stand for."""
        pair = make_pair("a Qwen2-MoE teacher", crosses=True)
        batch, config = pair.batch(4), ObjectiveConfig.model_validate({"kd": {"across": "uld"}})
        expected = run_objective(
            pair.model({"kd": {"across": "uld"}}), teacher := LiveTeacher(pair.teacher), batch, moment_of(batch)
        )
        model = DistillModel(pair.student, Objective(config, across=Across()), teacher=teacher.shape)
        assert torch.equal(run_objective(model, teacher, batch, moment_of(batch))["loss"], expected["loss"])


class TestGradientCheckpointing:
    def test_changes_no_gradient_of_a_term_that_looks_inside(self):
        """Maps and layers of a recomputed layer have to be those that the gradient flows through."""
        torch.manual_seed(1)
        student = llama(WIDTH, 16, 3, 2, tied=True)
        teacher = qwen_moe(len(tokenizer_of(BYTES)))
        pair = Pair(student.train(), teacher.eval(), tokenizer_of(META_SPACE), tokenizer_of(BYTES))
        plain = in_portions(pair, all_terms(pair), 8)
        student.activation_checkpointing_enable({"use_reentrant": False})
        assert_same(in_portions(pair, all_terms(pair), 8), plain)
