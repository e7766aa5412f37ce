"""Groups of ids that may begin the same text: their masses, the loss over them, and that real tokenizers obey them."""

import json

import pytest
import torch
from families import FAMILIES, TEXTS
from transformers import AutoTokenizer

from kdkit.config import demo_folder
from kdkit.data.spans import shared_spans
from kdkit.data.vocabulary import byte_groups, matching_ids, token_bytes
from kdkit.losses import LOSSES, GroupedIds, VocabularyGroups, grouped
from kdkit.losses.cross_tokenizer import group_logprobs

STUDENT = torch.tensor([0, 1, 1, -1, 2, 0, -1])
TEACHER = torch.tensor([2, 2, 0, 1, -1])


def logprobs(rows, columns, seed, *, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1).to(dtype)


class TestGroupLogprobs:
    def test_masses_by_a_loop(self):
        x = logprobs(4, 7, 0)
        found = group_logprobs(x, GroupedIds(STUDENT, 3))
        for row in range(4):
            for group in range(3):
                mass = sum(float(x[row, i].exp()) for i in range(7) if int(STUDENT[i]) == group)
                assert float(found[row, group].exp()) == pytest.approx(mass, rel=1e-12)
            assert found[row, 3:].tolist() == [float(x[row, 3]), float(x[row, 6])]

    def test_a_group_of_one_is_that_id(self):
        x = logprobs(4, 7, 1, dtype=torch.float32)
        assert torch.equal(group_logprobs(x, GroupedIds(STUDENT, 3))[:, 2], x[:, 4])

    @pytest.mark.parametrize("scale", [1.0, 1e4])
    def test_gradient(self, scale):
        def run(logits):
            return group_logprobs((scale * logits).log_softmax(-1), GroupedIds(STUDENT, 3))

        logits = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
        if scale == 1.0:
            torch.autograd.gradcheck(run, logits)
        run(logits).sum().backward()
        assert torch.isfinite(logits.grad).all()

    def test_a_group_without_mass(self):
        x = torch.tensor([[0.0, -torch.inf, -torch.inf, -torch.inf, -torch.inf, -torch.inf, -torch.inf]])
        x.requires_grad_()
        found = group_logprobs(x, GroupedIds(STUDENT, 3))
        assert found[0].tolist() == [0.0, -torch.inf, -torch.inf, -torch.inf, -torch.inf]
        found[0, 0].backward()
        assert torch.isfinite(x.grad).all()


class TestGrouped:
    groups = VocabularyGroups(GroupedIds(STUDENT, 3), GroupedIds(TEACHER, 3))

    @pytest.mark.parametrize("name", LOSSES)
    def test_is_the_loss_of_masses_and_the_distance_of_what_is_left(self, name):
        student, teacher = logprobs(5, 7, 3), logprobs(5, 5, 4)
        found = grouped(student, teacher, groups=self.groups, loss=LOSSES[name])
        for row in range(5):
            q, p = student[row].exp(), teacher[row].exp()
            masses = [[float(side[ids == g].sum()) for g in range(3)] for side, ids in ((q, STUDENT), (p, TEACHER))]
            rests = [sorted(side[ids < 0].tolist(), reverse=True) for side, ids in ((q, STUDENT), (p, TEACHER))]
            columns = [
                torch.tensor([[*mass, sum(rest)]]).double().log() for mass, rest in zip(masses, rests, strict=True)
            ]
            left = abs(rests[0][0] - rests[1][0]) + rests[0][1]
            expected = float(LOSSES[name](*columns)) + left
            assert float(found[row]) == pytest.approx(expected, rel=1e-6, abs=1e-7)

    @pytest.mark.parametrize("name", LOSSES)
    def test_zero_where_both_write_the_same_texts(self, name):
        """Ids differ, masses of groups do not: nothing is to be learnt here, and hybrid over ids would find much."""
        student, teacher = torch.zeros(1, 7).double(), torch.zeros(1, 5).double()
        student[0], teacher[0] = (
            torch.tensor([0.1, 0.2, 0.2, 0.05, 0.3, 0.1, 0.05]),
            torch.tensor([0.1, 0.2, 0.2, 0.4, 0.1]),
        )
        groups = VocabularyGroups(
            GroupedIds(torch.where(STUDENT < 0, 3, STUDENT), 4), GroupedIds(torch.where(TEACHER < 0, 3, TEACHER), 4)
        )
        value = grouped(student.log(), teacher.log(), groups=groups, loss=LOSSES[name])
        assert value.item() == pytest.approx(0.0, abs=1e-7)

    @pytest.mark.parametrize("top_k", [1, 2, 3, 9])
    def test_top_k_keeps_the_teachers_likeliest_groups(self, top_k):
        student, teacher = logprobs(5, 7, 5), logprobs(5, 5, 6)
        whole = grouped(student, teacher, groups=self.groups, loss=LOSSES["forward_kl"])
        cut = grouped(student, teacher, groups=self.groups, loss=LOSSES["forward_kl"], top_k=top_k)
        assert (cut <= whole + 1e-12).all()  # coarser eyes see less
        if top_k >= 3:
            torch.testing.assert_close(cut, whole)

    def test_half_precision_and_extremes_are_finite(self):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            student = logprobs(3, 7, 7, scale=1e3, dtype=dtype).requires_grad_()
            value = grouped(student, logprobs(3, 5, 8, scale=1e3, dtype=dtype), groups=self.groups, loss=LOSSES["jsd"])
            value.sum().backward()
            assert value.dtype == torch.float32
            assert torch.isfinite(value).all()
            assert torch.isfinite(student.grad).all()

    def test_what_does_not_fit_is_refused(self):
        with pytest.raises(ValueError, match="over 6 and 5 ids, groups of 7 and 5"):
            grouped(logprobs(1, 6, 0), logprobs(1, 5, 0), groups=self.groups, loss=LOSSES["jsd"])
        with pytest.raises(ValueError, match="each of 0 to 3 must have an id"):
            GroupedIds(STUDENT, 4)
        with pytest.raises(ValueError, match="3 groups of the student, 2 of the teacher"):
            VocabularyGroups(GroupedIds(STUDENT, 3), GroupedIds(torch.tensor([0, 1]), 2))


def shares(student, teacher, texts):
    """Of the spans of some texts, how many begin with ids of one group, and how many with ids of equal bytes."""
    groups, equal = byte_groups(student, teacher), dict(zip(*matching_ids(student, teacher), strict=True))
    num_spans = in_group = in_pair = 0
    for text in texts:
        ours, theirs = (
            tokenizer(text, add_special_tokens=False, return_offsets_mapping=True) for tokenizer in (student, teacher)
        )
        spans = shared_spans(text, ours["offset_mapping"], theirs["offset_mapping"])
        for span in range(len(spans)):
            own = ours["input_ids"][spans.ids[0].index(span)]
            other = theirs["input_ids"][spans.ids[1].index(span)]
            num_spans += 1
            in_group += groups.student[own] == groups.teacher[other] >= 0
            in_pair += equal.get(own) == other
    return in_group / num_spans, in_pair / num_spans


class TestByteGroups:
    def test_the_first_tokens_of_the_demos_answers_are_in_one_group(self):
        """Pairs of equal bytes are 61 % of them: the loss over pairs taught the student to leave the other words."""
        student = AutoTokenizer.from_pretrained(demo_folder() / "deep_student")
        teacher = AutoTokenizer.from_pretrained(demo_folder() / "moe_teacher")
        lines = (demo_folder() / "test.jsonl").read_text(encoding="utf-8").splitlines()
        answers = [json.loads(line)["output"] for line in lines]
        answers = [answer if isinstance(answer, str) else answer[0] for answer in answers]
        in_group, in_pair = shares(student, teacher, answers)
        assert in_group > 0.99
        assert 0.5 < in_pair < 0.7

    @pytest.mark.parametrize("pair", [("byte-level", "meta-space"), ("meta-space", "byte-level")], ids="-".join)
    def test_of_two_families(self, pair):
        student, teacher = (FAMILIES[name]() for name in pair)
        in_group, in_pair = shares(student, teacher, TEXTS)
        assert in_group > 0.9
        assert in_group > in_pair

    def test_one_tokenizer_with_itself_has_groups_of_one(self):
        tokenizer = FAMILIES["byte-level"]()
        groups = byte_groups(tokenizer, tokenizer)
        assert groups.student == groups.teacher
        assert sorted(group for group in groups.student if group >= 0) == list(range(groups.num_groups))

    def test_special_tokens_are_in_none_but_the_ends_are_one(self):
        student, teacher = FAMILIES["byte-level"](), FAMILIES["meta-space"]()
        groups = byte_groups(student, teacher)
        assert groups.student[student.eos_token_id] == groups.teacher[teacher.eos_token_id] >= 0
        assert groups.student[student.pad_token_id] == groups.teacher[teacher.unk_token_id] == -1
        alone = groups.student.count(groups.student[student.eos_token_id])
        assert alone == 1

    def test_every_token_with_bytes_is_in_a_group(self):
        student, teacher = FAMILIES["meta-space"](), FAMILIES["byte-level"]()
        groups = byte_groups(student, teacher)
        for index, written in enumerate(token_bytes(student)):
            assert (groups.student[index] >= 0) == (written is not None or index == student.eos_token_id)
