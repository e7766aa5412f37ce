"""What both models expect at a position of an answer, over temperatures: against scipy and closed forms."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdkit.errors import UserError
from kdkit.inspection import read_positions
from kdkit.inspection.distributions import token_name
from kdkit.losses import LOSSES
from kdkit.plots import figure_bytes, plot_temperature

TEMPERATURES = (0.5, 1.0, 2.0)
POSITION = 2


@pytest.fixture(scope="module")
def answer(aligned_models, trained_row):
    return read_positions(aligned_models, *trained_row)


@pytest.fixture(scope="module")
def expected(aligned_run, tiny_pair, trained_row):
    """Logits of student and teacher at POSITION, by hand, and the token that stands there."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair["teacher"])
    prompt, text = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in trained_row)
    read = torch.tensor([prompt + text[:POSITION]])
    logits = {}
    for name, folder in (("student", aligned_run.model), ("teacher", tiny_pair["teacher"])):
        with torch.no_grad():
            logits[name] = AutoModelForCausalLM.from_pretrained(folder)(read).logits[0, -1].double().numpy()
    return logits, tokenizer.decode(text[POSITION])


class TestReadPositions:
    def test_logits_are_those_that_predict_the_next_token(self, answer, expected):
        logits, _ = expected
        for name in ("student", "teacher"):
            assert getattr(answer, name)[POSITION].numpy() == pytest.approx(logits[name], abs=1e-4)

    def test_tokens_are_those_of_the_answer_and_its_end(self, answer, expected, trained_row):
        assert "".join(answer.tokens[:-1]).replace("␣", " ") == trained_row[1]
        assert answer.tokens[POSITION] == expected[1].replace(" ", "␣")
        assert answer.tokens[-1] == answer.tokenizer.eos_token
        assert answer.contexts[POSITION] == trained_row[0] + "".join(answer.tokens[:POSITION]).replace("␣", " ")

    def test_before_and_after_training_differ(self, aligned_models, answer, trained_row):
        before = read_positions(aligned_models, *trained_row, student="before")
        assert torch.equal(before.teacher, answer.teacher)
        assert not torch.allclose(before.student, answer.student, atol=1e-4)


class TestView:
    def test_distributions_are_softened_by_temperature(self, answer, expected):
        view = answer.view(POSITION, loss="forward_kl", temperatures=TEMPERATURES)
        for name in ("student", "teacher"):
            own = expected[0][name]
            best = softmax(own / 2.0).max()
            assert getattr(view, name).shape == (3, 12)
            assert getattr(view, name)[2].max() == pytest.approx(best, rel=1e-3)

    def test_the_tokens_shown_are_those_that_either_finds_likeliest(self, answer, expected):
        view = answer.view(POSITION, loss="forward_kl", temperatures=TEMPERATURES)
        p, q = (softmax(expected[0][name]) for name in ("teacher", "student"))
        ids = np.argsort(-np.maximum(p, q))[:12]
        named = [token_name(answer.tokenizer, int(token)) for token in sorted(ids, key=lambda token: -p[token])]
        assert list(view.tokens) == named
        assert view.num_others == len(p) - 12

    @pytest.mark.parametrize(("index", "temperature"), list(enumerate(TEMPERATURES)))
    def test_losses_are_scipys(self, answer, expected, index, temperature):
        view = answer.view(POSITION, loss="tvd", temperatures=TEMPERATURES)
        p, q = (softmax(expected[0][name] / temperature) for name in ("teacher", "student"))
        assert list(view.losses) == list(LOSSES)
        assert view.losses["forward_kl"][index] == pytest.approx(rel_entr(p, q).sum(), rel=1e-3)
        assert view.losses["reverse_kl"][index] == pytest.approx(rel_entr(q, p).sum(), rel=1e-3)
        assert view.losses["tvd"][index] == pytest.approx(abs(p - q).sum() / 2, rel=1e-3)

    def test_forward_kl_pushes_by_the_gap_over_temperature(self, answer, expected):
        """d KL(p‖q) / dz = (q − p) / T, z the student's logits."""
        view = answer.view(POSITION, loss="forward_kl", temperatures=TEMPERATURES)
        for index, temperature in enumerate(TEMPERATURES):
            p, q = (softmax(expected[0][name] / temperature) for name in ("teacher", "student"))
            gap = (p - q) / temperature
            assert view.gradient_norm[index] == pytest.approx(np.linalg.norm(gap), rel=1e-3)
            shown = view.teacher[index] - view.student[index]
            assert view.push[index] == pytest.approx(shown / temperature, abs=1e-6)

    def test_the_runs_own_loss_has_the_runs_arguments(self, answer):
        skewed = replace(answer, loss="skew_forward_kl", loss_arguments={"alpha": 0.0})
        view = skewed.view(POSITION, loss="forward_kl", temperatures=TEMPERATURES)
        assert view.losses["skew_forward_kl"] == pytest.approx(view.losses["forward_kl"])

    def test_an_unknown_loss_is_refused(self, answer):
        with pytest.raises(UserError, match="known are forward_kl"):
            answer.view(0, loss="forwardkl")


class TestTokenName:
    def test_what_cannot_be_seen_is_written_out(self, byte_tokenizer):
        def named(text):
            return [token_name(byte_tokenizer, token) for token in byte_tokenizer(text)["input_ids"]]

        assert "".join(named(" the\n\tfox\x18")) == "␣the\\n\\tfox\\x18"
        assert all(name and "\ufffd" not in name for name in named("🙂"))  # pieces of a character have their own names


class TestPlotTemperature:
    def test_the_title_says_what_is_left_of_the_gradient(self, answer, expected):
        view = answer.view(POSITION, loss="forward_kl", temperatures=TEMPERATURES)
        title = plot_temperature(view, temperature=2.0).get_suptitle()
        p, q = ({t: softmax(expected[0][name] / t) for t in (1.0, 2.0)} for name in ("teacher", "student"))
        left = np.linalg.norm(p[2.0] - q[2.0]) / 2 / np.linalg.norm(p[1.0] - q[1.0])
        assert f"is {left:.2g} of that at T = 1, with T² {4 * left:.2g} of it" in title
        assert f"{p[2.0].max():.0%}" in title
        assert f"→ “{view.label}”" in title

    def test_bars_and_curves_are_those_of_the_view(self, answer):
        view = answer.view(POSITION, loss="jsd", temperatures=TEMPERATURES)
        figure = plot_temperature(view, temperature=0.5)
        shares, push, losses, norms = figure.axes
        assert [bar.get_width() for bar in shares.containers[0]][:-1] == pytest.approx(view.teacher[0].tolist())
        assert sum(bar.get_width() for bar in shares.containers[1]) == pytest.approx(1.0, abs=1e-5)
        assert [bar.get_width() for bar in push.containers[0]] == pytest.approx((0.25 * view.push[0]).tolist())
        curves = {line.get_label(): line for line in losses.get_lines()}
        assert [curves[name].get_ydata().tolist() for name in LOSSES] == [v.tolist() for v in view.losses.values()]
        assert curves["jsd"].get_linewidth() > curves["tvd"].get_linewidth()
        assert norms.get_lines()[2].get_ydata() == pytest.approx(view.gradient_norm * np.square(TEMPERATURES))
        assert figure_bytes(figure, "png").startswith(b"\x89PNG")

    def test_models_that_agree_can_be_drawn(self, answer):
        view = replace(answer, student=answer.teacher).view(0, loss="reverse_kl", temperatures=TEMPERATURES)
        figure = plot_temperature(view, temperature=2.0)
        assert math.isclose(view.gradient_norm.max(), 0, abs_tol=1e-5)
        assert figure_bytes(figure, "png").startswith(b"\x89PNG")

    def test_a_temperature_that_was_not_measured_is_refused(self, answer):
        with pytest.raises(UserError, match=r"temperature 3 was not measured; known are 0\.5, 1, 2"):
            plot_temperature(answer.view(0, loss="tvd", temperatures=TEMPERATURES), temperature=3.0)
