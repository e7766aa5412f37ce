"""Figures hold the numbers they were given, and their titles say what those show."""

import math
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from kdkit.errors import UserError
from kdkit.plots import (
    SpanView,
    ablation_finding,
    comparison_finding,
    figure_bytes,
    plot_ablation,
    plot_alignment,
    plot_comparison,
    plot_evaluations,
    plot_expert_shares,
    plot_gradients,
    plot_rollout,
    plot_schedule,
    plot_spans,
    plot_sweep,
    plot_terms,
    plot_training,
    plot_weights,
    plot_word_experts,
)

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def train_row(step, stage="distill", **figures):
    return {"kind": "train", "stage": stage, "step": step, "learning_rate": 1e-4, **figures}


def kd_rows():
    first = [
        train_row(
            step, "warm_start", loss=5.0 - step / 10, **{"part/lm": 5.0 - step / 10, "weight/lm": 1.0, "weight/kd": 0}
        )
        for step in (10, 20)
    ]
    second = [
        train_row(step, loss=2.0, **{"part/kd": 3.0 / step, "part/lm": 30.0 / step, "weight/kd": 0.7, "weight/lm": 0.3})
        for step in (10, 20, 30)
    ]
    return [*first, *second]


def model_row(name, rouge_l=None, spread=1.0, **others):
    if rouge_l is None:
        return {"model": name, **others}
    bounds = {"rouge_l_low": rouge_l - spread, "rouge_l_high": rouge_l + spread}
    return {"model": name, "rouge_l": rouge_l, **bounds, **others}


def title(figure):
    return figure.get_suptitle().replace("\n", " ")


def lines_of(axes):
    """Label -> (x, y) of each labelled line, without the gaps."""
    found = {}
    for line in axes.get_lines():
        x, y = (np.asarray(column, dtype=float) for column in line.get_data())
        found[line.get_label()] = (x[np.isfinite(y)].tolist(), y[np.isfinite(y)].tolist())
    return found


def assert_draws(figure):
    assert isinstance(figure, Figure)
    assert figure_bytes(figure, "png").startswith(PNG_MAGIC)


class TestPlotTraining:
    def test_draws_total_and_parts_at_the_steps_of_the_whole_run(self):
        figure = plot_training(kd_rows())
        assert_draws(figure)
        lines = lines_of(figure.axes[0])
        assert lines["total"] == ([10, 20, 30, 40, 50], [4.0, 3.0, 2.0, 2.0, 2.0])
        assert lines["kd"] == ([30, 40, 50], pytest.approx([0.3, 0.15, 0.1]))
        assert lines["lm"][1] == pytest.approx([4.0, 3.0, 3.0, 1.5, 1.0])

    def test_no_line_joins_two_stages(self):
        line = plot_training(kd_rows()).axes[0].get_lines()[0]
        assert np.flatnonzero(np.isnan(line.get_ydata())).tolist() == [2]

    def test_names_the_stages_where_they_begin(self):
        texts = {text.get_text(): text.xy[0] for text in plot_training(kd_rows()).axes[0].texts}
        assert texts == {"warm_start": 0.0, "distill": 20.0}

    def test_the_title_tells_the_parts_of_the_last_stage(self):
        assert title(plot_training(kd_rows())) == "distill, 30 steps: kd 0.3 → 0.1, lm 3 → 1"

    def test_the_title_tells_the_loss_where_one_part_is_all(self):
        rows = [train_row(step, loss=4.0 - step / 10, **{"part/kd": 1.0, "weight/kd": 1.0}) for step in (10, 20)]
        assert title(plot_training(rows)) == "distill, 20 steps: loss 3 → 2"

    def test_a_loss_that_is_not_finite_is_the_finding(self):
        rows = [train_row(10, loss=2.0), train_row(20, loss=math.nan), train_row(30, loss=None)]
        figure = plot_training(rows)
        assert_draws(figure)
        assert title(figure) == "The loss is not finite at step 20"

    def test_parts_far_apart_get_a_logarithmic_axis_and_close_ones_do_not(self):
        assert plot_training([train_row(1, loss=100.0), train_row(2, loss=1.0)]).axes[0].get_yscale() == "log"
        assert plot_training([train_row(1, loss=2.0), train_row(2, loss=1.0)]).axes[0].get_yscale() == "linear"

    @pytest.mark.parametrize("ratio", [40.0, 1e4, 1e13])
    def test_a_logarithmic_axis_is_marked_however_far_it_reaches(self, ratio):
        axes = plot_training([train_row(1, loss=ratio), train_row(2, loss=1.0)]).axes[0]
        low, high = axes.get_ylim()
        assert 2 <= sum(low <= tick <= high for tick in axes.get_yticks()) <= 15

    def test_one_row_shows_as_a_dot(self):
        figure = plot_training([train_row(10, loss=1.0)])
        assert_draws(figure)
        assert figure.axes[0].get_lines()[0].get_marker() == "o"

    def test_every_axis_is_labelled(self):
        axes = plot_training(kd_rows()).axes
        assert [a.get_ylabel() for a in axes] == ["loss per token", "weight", "learning\nrate"]
        assert axes[-1].get_xlabel() == "optimizer steps"

    def test_refuses_rows_without_training(self):
        with pytest.raises(UserError, match='none of kind "train"'):
            plot_training([{"kind": "eval", "step": 1}])


NINE = ("kd", "lm", "span", "dtw", "hidden", "attention", "layerwise", "contrastive", "routing")


def term_rows(*, steps=(1, 2, 3), terms=NINE):
    """Each term's part is 2, its weight 0.1 and rising, kd's share what is left of 10."""
    rows = []
    for step in steps:
        weighted = {f"weighted/{name}": 0.1 * step for name in terms}
        weighted["weighted/kd"] = 10 - sum(value for name, value in weighted.items() if name != "weighted/kd")
        parts = {f"part/{name}": 2.0 for name in terms} | {f"weight/{name}": 0.1 * step for name in terms}
        rows.append(train_row(step, loss=10.0, kd_temperature=2.0, **parts, **weighted))
    return rows


def strip_of(figure, term, column):
    """The line of a term's strip."""
    names = [axes.get_ylabel() for axes in figure.axes]
    return figure.axes[names.index(term) + column].get_lines()[0]


class TestPlotTerms:
    def test_each_of_nine_terms_has_its_part_its_weight_and_its_share(self):
        figure = plot_terms(term_rows())
        assert_draws(figure)
        for term in NINE[1:]:
            assert strip_of(figure, term, 0).get_ydata().tolist() == [2.0, 2.0, 2.0]
            assert strip_of(figure, term, 1).get_ydata().tolist() == pytest.approx([0.1, 0.2, 0.3])
            assert strip_of(figure, term, 2).get_ydata().tolist() == pytest.approx([1, 2, 3])  # of 10, in percent
        assert strip_of(figure, "kd", 2).get_ydata().tolist() == pytest.approx([92, 84, 76])
        assert [axes.get_title() for axes in figure.axes[:3]] == [
            "before its weight",
            "weight",
            "share of the total (%)",
        ]

    def test_shares_and_weights_are_measured_from_zero(self):
        figure = plot_terms(term_rows())
        assert all(figure.axes[row * 3 + column].get_ylim()[0] == 0 for row in range(9) for column in (1, 2))

    def test_the_title_tells_the_largest_and_the_sum_of_the_others(self):
        found = title(plot_terms(term_rows()))
        assert found == "Step 3: kd 76 %, lm 3 %, span 3 %, the other 6 terms together 18 % of the loss"

    def test_a_part_that_was_not_on_yet_leaves_a_gap(self):
        rows = term_rows()
        for name in ("part/routing", "weighted/routing"):
            del rows[0][name]
        assert strip_of(plot_terms(rows), "routing", 0).get_xdata().tolist() == [2.0, 3.0]

    def test_training_curves_of_more_than_three_terms_are_these(self):
        assert len(plot_training(term_rows(terms=NINE[:3])).axes) == 3
        assert len(plot_training(term_rows(terms=NINE[:4])).axes) == 3 * 5

    def test_a_loss_that_is_not_finite_is_the_finding(self):
        rows = [*term_rows(), train_row(4, loss=None, **{f"weight/{name}": 0.1 for name in NINE})]
        figure = plot_terms(rows)
        assert_draws(figure)
        assert title(figure) == "The loss is not finite at step 4"


class TestPlotSchedule:
    @pytest.fixture
    def planned(self):
        return [
            {
                "step": step,
                "weight/kd": 0.7,
                "weight/hidden": max(step - 4, 0) / 60,
                "kd_temperature": t,
                "kd_scale": t * t,
            }
            for step, t in ((step, 2 - step / 20) for step in range(11))
        ]

    def test_draws_each_weight_and_what_the_temperature_makes_of_kd(self, planned):
        figure = plot_schedule(planned)
        assert_draws(figure)
        drawn = {axes.get_ylabel(): axes.get_lines()[0].get_ydata() for axes in figure.axes}
        assert list(drawn) == ["kd", "hidden", "temperature T", "kd's factor T²"]
        assert drawn["hidden"][[4, 10]].tolist() == pytest.approx([0, 0.1])
        assert drawn["kd's factor T²"][[0, 10]].tolist() == [4.0, 2.25]

    def test_the_title_tells_when_terms_begin_and_what_t_squared_does(self, planned):
        expected = "From the start kd; after 40 % of the steps hidden; T² takes kd's factor from 4 to 2.25"
        assert title(plot_schedule(planned)) == expected

    def test_refuses_no_steps(self):
        with pytest.raises(UserError, match="nothing to draw"):
            plot_schedule([])


class TestPlotGradients:
    @pytest.fixture
    def rows(self):
        def row(step, kd, hidden):
            shares = {"gradient_share/kd": kd, "gradient_share/hidden": 100 - kd, "gradient_cosine/kd": 0.9}
            place = {"kind": "gradient", "stage": "distill", "step": step, "loss": 3.0, "gradient_norm": 1.5}
            return {**place, **shares, "gradient_cosine/hidden": hidden}

        return [row(10, 90, 0.2), row(20, 80, -0.5)]

    def test_draws_shares_and_cosines_of_each_term(self, rows):
        figure = plot_gradients(rows)
        assert_draws(figure)
        assert strip_of(figure, "kd", 0).get_ydata().tolist() == [90, 80]
        assert strip_of(figure, "hidden", 1).get_ydata().tolist() == [0.2, -0.5]
        low, high = figure.axes[1].get_ylim()
        assert low < -1 < 1 < high

    def test_the_title_tells_the_last_shares_and_who_pulls_against_the_rest(self, rows):
        assert (
            title(plot_gradients(rows))
            == "Step 20: kd 80 %, hidden 20 % of the gradients' norms; against the whole: hidden"
        )
        rows[-1]["gradient_cosine/hidden"] = -0.01  # as good as at right angles
        assert "against" not in title(plot_gradients(rows))

    def test_refuses_rows_without_gradients(self):
        with pytest.raises(UserError, match='none of kind "gradient"'):
            plot_gradients([train_row(1, loss=1.0)])


class TestPlotAblation:
    @pytest.fixture
    def rows(self):
        def row(name, low, high):
            middle = (low + high) / 2
            return {
                "without": name,
                "num_seeds": 3,
                "cross_entropy": middle,
                "cross_entropy_low": low,
                "cross_entropy_high": high,
            }

        return [row("kd", 0.2, 0.4), row("lm", -0.1, 0.2), row("routing", -0.3, -0.1)]

    def test_draws_each_difference_with_its_interval_about_zero(self, rows):
        figure = plot_ablation(rows)
        assert_draws(figure)
        (axes,) = figure.axes
        lines = [line.get_xdata() for line in axes.get_lines()]
        assert list(lines[0]) == [0, 0]
        assert [0.2, 0.4] in [list(line) for line in lines]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["without kd", "without lm", "without routing"]

    def test_the_finding_counts_a_difference_only_where_its_interval_leaves_out_zero(self, rows):
        assert ablation_finding(rows) == (
            "Cross-entropy is worse without kd; cross-entropy is better without routing; "
            "no difference in cross-entropy is shown for lm"
        )

    def test_more_is_better_where_it_is(self, rows):
        scored = [{name.replace("cross_entropy", "rouge_l"): value for name, value in row.items()} for row in rows]
        assert ablation_finding(scored[:1], "rouge_l") == "ROUGE-L is better without kd"

    def test_one_seed_finds_nothing(self):
        row = {"without": "kd", "num_seeds": 1, "rouge_l": -5.0, "rouge_l_low": math.nan, "rouge_l_high": math.nan}
        figure = plot_ablation([row])
        assert_draws(figure)
        assert title(figure) == "ROUGE-L: one seed each, so that no difference can be told from chance"

    def test_refuses_rows_without_a_difference(self):
        with pytest.raises(UserError, match="nothing to draw"):
            plot_ablation([{"without": "kd", "num_seeds": 2}])


class TestPlotEvaluations:
    @pytest.fixture
    def rows(self):
        scores = {10: (12.0, 30.0), 20: (18.0, 20.0), 30: (15.0, 25.0)}
        return [
            {"kind": "eval", "stage": "distill", "step": step, "rouge_l": rouge_l, "perplexity": perplexity}
            for step, (rouge_l, perplexity) in scores.items()
        ]

    def test_draws_both_metrics_and_rings_the_best(self, rows):
        figure = plot_evaluations(rows)
        assert_draws(figure)
        rouge_axes, perplexity_axes = figure.axes
        assert rouge_axes.get_lines()[0].get_ydata().tolist() == [12.0, 18.0, 15.0]
        assert rouge_axes.get_lines()[1].get_data() == ([20.0], [18.0])
        assert perplexity_axes.get_lines()[1].get_data() == ([20.0], [20.0])
        assert [a.get_ylabel() for a in figure.axes] == ["ROUGE-L (%)", "perplexity"]

    def test_the_title_tells_first_last_and_best(self, rows):
        assert title(plot_evaluations(rows)) == "ROUGE-L rose from 12 to 15; best: 18 at step 20"

    def test_steps_go_on_from_training_rows_of_the_stage_before(self, rows):
        figure = plot_evaluations([train_row(100, "warm_start", loss=1.0), *rows])
        assert figure.axes[0].get_lines()[0].get_xdata().tolist() == [110.0, 120.0, 130.0]

    def test_perplexity_alone_gets_the_one_panel(self):
        figure = plot_evaluations([{"kind": "eval", "stage": "s", "step": 5, "perplexity": 7.5}])
        assert_draws(figure)
        assert len(figure.axes) == 1
        assert title(figure) == "Perplexity is 7.5 after 5 steps"

    def test_an_evaluation_without_answers_leaves_no_hole(self, rows):
        del rows[1]["rouge_l"]
        assert plot_evaluations(rows).axes[0].get_lines()[0].get_xdata().tolist() == [10.0, 30.0]

    def test_refuses_rows_without_a_figure(self):
        with pytest.raises(UserError, match="neither rouge_l nor perplexity"):
            plot_evaluations([{"kind": "eval", "stage": "s", "step": 5, "loss": 1.0}])


class TestPlotComparison:
    @pytest.fixture
    def rows(self):
        others = {"exact_match": 3.0, "perplexity": 9.0}
        return [
            model_row("teacher", 30.0, exact_match=6.0, perplexity=5.0),
            model_row("SFT", 20.0, **others),
            model_row("KD", 26.2, **others),
        ]

    def test_draws_each_value_with_its_interval(self, rows):
        figure = plot_comparison(rows)
        assert_draws(figure)
        axes = figure.axes[0]
        bars, dots = axes.get_lines()[::2], axes.get_lines()[1::2]
        assert [list(bar.get_xdata()) for bar in bars] == [[29.0, 31.0], [19.0, 21.0], [25.2, 27.2]]
        assert [dot.get_xdata()[0] for dot in dots] == [30.0, 20.0, 26.2]
        assert [text.get_text() for text in axes.get_yticklabels()] == ["teacher", "SFT", "KD"]
        assert [a.get_xlabel().split("\n")[0] for a in figure.axes] == ["ROUGE-L (%)", "exact match (%)", "perplexity"]

    def test_the_title_tells_how_much_of_the_gap_is_closed(self, rows):
        assert title(plot_comparison(rows)) == "KD closes 62 % of the ROUGE-L gap between SFT and the teacher"

    @pytest.mark.parametrize(("seeds", "over"), [(1, "rows"), (5, "sampling seeds")])
    def test_says_what_the_intervals_are_over(self, seeds, over):
        figure = plot_comparison([model_row("KD", 3.0, seeds=seeds)])
        assert figure.get_supxlabel() == f"dots: values; bars: 95 % intervals over {over}"

    def test_a_metric_that_nobody_has_gets_no_panel(self):
        assert len(plot_comparison([model_row("KD", 3.0)]).axes) == 1

    def test_draws_names_with_dollars_and_figures_without_bounds_or_end(self):
        rows = [{"model": "$x$_{2", "rouge_l": 0.0, "perplexity": math.inf}, model_row("b", 1.0, perplexity=4.85e8)]
        figure = plot_comparison(rows)
        assert_draws(figure)
        assert figure.axes[0].get_yticklabels()[0].get_text() == "$x$_{2"

    def test_refuses_rows_without_a_metric(self):
        with pytest.raises(UserError, match="nothing to draw"):
            plot_comparison([{"model": "a"}])


class TestComparisonFinding:
    @pytest.mark.parametrize(
        ("rows", "sentence"),
        [
            (
                [model_row("student", 25.0), model_row("before", 20.0), model_row("teacher", 30.0)],
                "The student closes 50 % of the ROUGE-L gap between its start and the teacher",
            ),
            (
                [model_row("before", 20.0), model_row("after", 25.0), model_row("teacher", 30.0)],
                "The student closes 50 % of the ROUGE-L gap between its start and the teacher",
            ),
            (
                [model_row("SFT", 20.0, 3.0), model_row("KD", 21.0, 3.0), model_row("teacher", 30.0)],
                "KD closes 10 % of the ROUGE-L gap between SFT and the teacher, "
                "but its 95 % interval overlaps that of SFT",
            ),
            (
                [model_row("SFT", 20.0), model_row("KD", 31.5), model_row("teacher", 30.0)],
                "KD is 11.5 ROUGE-L points above SFT (the teacher: 30.0)",
            ),
            ([model_row("SFT", 20.0), model_row("KD", 24.0)], "KD is 4.0 ROUGE-L points above SFT"),
            (
                [model_row("SFT", 20.0), model_row("KD", 6.0), model_row("teacher", 30.0)],
                "KD is 14.0 ROUGE-L points below SFT",
            ),
            ([model_row("SFT", 20.0), model_row("KD", 20.0)], "KD equals SFT in ROUGE-L"),
            (
                [model_row("student", 24.0), model_row("teacher", 30.0)],
                "The student reaches 80 % of the teacher's ROUGE-L",
            ),
            ([model_row("student", 24.0)], "The student reaches 24.0 ROUGE-L"),
            (
                [{"model": "SFT", "rouge_l": 20.0}, model_row("KD", 24.0)],
                "KD is 4.0 ROUGE-L points above SFT, with no interval to judge it by",
            ),
            ([model_row("teacher", 24.0)], "No student was measured by ROUGE-L"),
        ],
    )
    def test_says_what_the_numbers_say(self, rows, sentence):
        assert comparison_finding(rows) == sentence

    def test_speaks_of_the_models_asked_for(self):
        rows = [model_row("a", 10.0), model_row("b", 15.0), model_row("c", 12.0), model_row("T", 20.0)]
        sentence = comparison_finding(rows, student="b", baseline="c", teacher="T")
        assert sentence.startswith("b closes 38 % of the ROUGE-L gap between c and")


class TestPlotAlignment:
    def test_shows_the_matrix_with_its_words_and_the_diagonal(self):
        matrix = np.eye(3)
        figure = plot_alignment(matrix, ["a", "$5", "c"], ["x", "y\n", "a very long word indeed"])
        assert_draws(figure)
        axes = figure.axes[0]
        assert np.array_equal(axes.images[0].get_array(), matrix)
        assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "$5", "c"]
        assert [text.get_text() for text in axes.get_xticklabels()] == ["x", "y\\n", "a very long w…"]
        (path,) = axes.get_lines()
        assert (list(path.get_xdata()), list(path.get_ydata())) == ([0, 2], [0, 2])

    def test_the_title_tells_the_share_off_the_diagonal(self):
        assert title(plot_alignment(np.eye(4), list("abcd"), list("abcd"))).startswith("0 % of the alignment")
        matrix = np.eye(4)
        matrix[0, 2] = matrix[0, 3] = matrix[3, 0] = 1.0  # 3 of 7
        assert title(plot_alignment(matrix, list("abcd"), list("abcd"))).startswith("43 % of the alignment")

    def test_a_slanted_path_is_not_off_the_diagonal(self):
        matrix = np.repeat(np.eye(3), 2, axis=1)  # (3, 6)
        assert title(plot_alignment(matrix, list("abc"), list("abcdef"))).startswith("0 % of the alignment")
        assert title(plot_alignment(matrix.T, list("abcdef"), list("abc"))).startswith("0 % of the alignment")

    @pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (40, 35)])
    def test_draws_any_shape_and_labels_only_few_units(self, shape):
        n, m = shape
        figure = plot_alignment(np.ones(shape), ["s"] * n, ["t"] * m)
        assert_draws(figure)
        labels = {text.get_text() for text in figure.axes[0].get_yticklabels()}
        assert ("s" in labels) == (max(shape) <= 32)

    def test_refuses_a_matrix_that_does_not_fit_the_units(self):
        with pytest.raises(UserError, match=r"the alignment is \(2, 3\) for 3 student and 2 teacher units"):
            plot_alignment(np.ones((2, 3)), list("abc"), list("ab"))


class TestFigureBytes:
    def test_the_same_figure_gives_the_same_svg(self):
        first, second = (figure_bytes(plot_training(kd_rows())) for _ in range(2))
        assert first == second
        assert first.lstrip().startswith(b"<?xml")

    def test_a_character_that_the_font_lacks_is_a_box_and_no_warning(self):
        """A token of a language model is often one: each slider move reddened the notebook."""
        figure = Figure()
        figure.suptitle("\u4f60\x18")
        assert figure_bytes(figure, "png").startswith(PNG_MAGIC)


class TestImport:
    def test_drawing_needs_neither_torch_nor_pyplot(self):
        code = (
            "import sys; import kdkit.plots as plots; assert 'matplotlib' not in sys.modules;"
            "plots.figure_bytes(plots.plot_training([{'kind': 'train', 'stage': 's', 'step': 1, 'loss': 1.0}]));"
            "print(sorted({'torch', 'matplotlib.pyplot', 'transformers'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


def rollout_rows():
    def row(step, gold, fresh, replayed, **figures):
        shares = {"gold": gold, "fresh": fresh, "replayed": replayed}
        named = {f"rollout/{name}_fraction": share for name, share in shares.items()}
        return train_row(step, loss=1.0, **named, **{f"rollout/{name}": value for name, value in figures.items()})

    refused = {"refused/no_end": 0.5, "refused/repeats": 0.25, "refused/too_short": 0.0}
    return [
        row(10, 1.0, 0.0, 0.0, threshold=0.0),
        row(20, 0.25, 0.75, 0.0, threshold=0.8, pass_fraction=0.25, **refused),
        {"kind": "eval", "stage": "distill", "step": 20, "rouge_l": 6.0, "rollout/taken_back": 1.0},
        row(30, 0.5, 0.0, 0.5, threshold=0.4),
    ]


class TestPlotRollout:
    def test_title_says_how_much_was_trained_on_and_what_happened(self):
        assert title(plot_rollout(rollout_rows())) == (
            "60% of the training rows were the student's own text; the guard let 25% pass; "
            "the threshold was taken back once; ROUGE-L ended at 6.0"
        )

    def test_shares_threshold_and_reasons_are_the_rows_own(self):
        mix, threshold, refused, rouge = plot_rollout(rollout_rows()).axes
        labels = [text.get_text() for text in mix.get_legend().get_texts()]
        assert labels == ["gold", "fresh", "replayed"]
        assert lines_of(threshold)["_child0"] == ([9.0, 10.0, 20.0, 30.0], [0.0, 0.8, 0.4, 0.4])
        assert [text.get_text() for text in refused.get_legend().get_texts()] == ["no end", "repeats"]
        assert lines_of(rouge)["_child0"] == ([20.0], [6.0])

    def test_without_a_guard_there_is_no_panel_of_what_it_refuses(self):
        kept = ("guard", "pass_fraction", "refused/")
        rows = [{k: v for k, v in row.items() if not any(name in k for name in kept)} for row in rollout_rows()]
        labels = [axes.get_ylabel() for axes in plot_rollout(rows).axes]
        assert not any("generated texts" in label for label in labels)
        assert len(labels) == 3  # the mix, the threshold, and ROUGE-L on the same panel

    def test_rows_without_a_rollout_are_refused(self):
        with pytest.raises(UserError, match="speaks of a rollout"):
            plot_rollout(kd_rows())


class TestPlotSweep:
    CELLS = (
        {"a.threshold": 0, "a.guard": None, "rouge_l": [20.0, 22.0]},
        {"a.threshold": 0.5, "a.guard": None, "rouge_l": [6.0, 7.0]},
        {"a.threshold": 0, "a.guard": "on", "rouge_l": [20.0, 22.0]},
        {"a.threshold": 0.5, "a.guard": "on", "rouge_l": []},
    )

    def test_title_names_the_best_and_the_worst(self):
        figure = plot_sweep(self.CELLS, x="a.threshold", lines="a.guard")
        assert title(figure) == "ROUGE-L: best 21.0 at threshold 0, guard null, worst 6.5 at threshold 0.5, guard null"
        assert "2 seeds" in figure.get_supxlabel()

    def test_points_are_means_at_the_numbers(self):
        (axes,) = plot_sweep(self.CELLS, x="a.threshold", lines="a.guard").axes
        drawn = [
            (container[0].get_xdata().tolist(), container[0].get_ydata().tolist()) for container in axes.containers
        ]
        assert drawn == [([0.0, 0.5], [21.0, 6.5]), ([0.0], [21.0])]

    def test_values_that_are_no_numbers_stand_side_by_side(self):
        (axes,) = plot_sweep(self.CELLS, x="a.guard").axes
        assert [label.get_text() for label in axes.get_xticklabels()] == ["null", "on"]

    def test_nothing_measured_is_refused(self):
        with pytest.raises(UserError, match="no run of the sweep has rouge_l"):
            plot_sweep(self.CELLS[3:], x="a.threshold")


class TestPlotWeights:
    ROWS = (
        {"dtype": "float16", "embeddings": 2 * 2**30, "experts": 6 * 2**30, "other": 2 * 2**30},
        {"dtype": "nf4", "embeddings": 2 * 2**30, "experts": 6 * 2**30, "other": 2**29},
    )

    def test_bars_are_the_parts_one_after_the_other(self):
        figure = plot_weights({"a model": self.ROWS})
        assert_draws(figure)
        (axes,) = figure.axes
        drawn = [[(bar.get_x(), bar.get_width()) for bar in container] for container in axes.containers]
        assert drawn == [[(0, 2), (0, 2)], [(2, 6), (2, 6)], [(8, 2), (8, 0.5)]]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["float16", "nf4"]
        assert axes.get_xlabel() == "GiB of weights"

    def test_title_tells_what_4_bits_leave_and_why(self):
        assert title(plot_weights({"a model": self.ROWS})) == (
            "nf4 takes 85% of float16; 71% of that are experts, which it does not pack"
        )
        dense = [{**row, "experts": 0} for row in self.ROWS]
        assert title(plot_weights({"a": dense, "b": dense})) == "nf4 takes 62% and 62% of float16"

    def test_nothing_is_refused(self):
        with pytest.raises(UserError, match="no weights to draw"):
            plot_weights({})


class TestPlotExpertShares:
    def test_cells_are_shares_against_an_even_one_and_the_title_has_the_extremes(self):
        figure = plot_expert_shares({1: np.array([0.5, 0.3, 0.2]), 4: np.array([0.1, 0.1, 0.8])})
        assert_draws(figure)
        axes = figure.axes[0]
        np.testing.assert_allclose(axes.get_images()[0].get_array(), [[1.5, 0.9, 0.6], [0.3, 0.3, 2.4]])
        assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "4"]
        assert [text.get_text() for text in axes.texts][:3] == ["50%", "30%", "20%"]
        assert title(figure) == "An even share is 33.3%; expert 2 of layer 4 gets 80%, expert 0 of layer 4 gets 10%"

    def test_nothing_is_refused(self):
        with pytest.raises(UserError, match="no shares of experts"):
            plot_expert_shares({})


class TestPlotWordExperts:
    GATES = np.array([[[1.0, 0.0], [0.7, 0.3], [0.0, 1.0]]])

    def test_a_panel_for_each_layer_and_a_column_for_each_word(self):
        figure = plot_word_experts(["a", "b$", "c"], self.GATES, layers=[3])
        assert_draws(figure)
        axes = figure.axes[0]
        np.testing.assert_array_equal(axes.get_images()[0].get_array(), self.GATES[0].T)
        assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b$", "c"]
        assert axes.get_ylabel() == "layer 3\nexpert"
        assert title(figure) == (
            "In a layer, 3 words have 2.0 of 2 experts as their first on average; 50% of neighbours have the same one"
        )

    def test_words_beyond_the_width_are_left_out(self):
        figure = plot_word_experts(["w"] * 50, np.full((2, 50, 4), 0.25), layers=[0, 1])
        assert figure.axes[0].get_images()[0].get_array().shape == (4, 30)
        assert title(figure).startswith("In a layer, 30 words")

    def test_gates_that_do_not_fit_are_refused(self):
        with pytest.raises(UserError, match="for 1 layers and 2 words"):
            plot_word_experts(["a", "b"], self.GATES, layers=[3])


class TestPlotSpans:
    SPANS = (
        SpanView(0, 3, ["The"], ["The"], is_twin=True),
        SpanView(3, 10, [" riv", "er\n"], [" river\n"], is_twin=False),
    )

    def test_tokens_of_both_sides_stand_above_one_another_with_their_bytes(self):
        figure = plot_spans(self.SPANS)
        assert_draws(figure)
        (axes,) = figure.axes
        at = {text.get_text(): text.get_position() for text in axes.texts}
        assert at["␣river⏎"][1] == 0.5
        assert at["␣riv"][1] == at["er⏎"][1] == 2.5
        assert at["0"][0] < at["3"][0] < at["␣riv"][0] < at["␣river⏎"][0] < at["er⏎"][0]
        colours = [patch.get_facecolor() for patch in axes.patches]
        assert len(colours) == 5
        assert colours[0] == colours[1] != colours[2] == colours[4]
        assert title(figure) == (
            "3 tokens of the student's and 2 of the teacher's meet in 2 spans; 50% are one token of the same bytes on "
            "either side"
        )

    def test_no_line_is_too_long_and_what_is_left_out_is_said(self):
        figure = plot_spans(self.SPANS * 200)
        right = max(patch.get_x() + patch.get_width() for patch in figure.axes[0].patches)
        assert right <= figure.axes[0].get_xlim()[1]
        assert "more lines not shown" in title(figure)

    def test_nothing_is_refused(self):
        with pytest.raises(UserError, match="no spans to draw"):
            plot_spans([])
