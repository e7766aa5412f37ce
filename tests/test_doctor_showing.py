"""A diagnosis as text and as HTML: all of it is there, nothing breaks a line, a terminal or a page."""

import io
import json
import re
import sys
from html.parser import HTMLParser

import click
import pytest
from diagnoses import EVIL, healthy_diagnosis, made_up_diagnosis, quoting_diagnosis

from kdkit.doctor.page import diagnosis_html, diagnosis_style
from kdkit.doctor.showing import WIDTH, diagnosis_lines, show_diagnosis

LONG = f"{'word ' * 60}{'x' * 300}"
JUNK = "\x1b[31mred\x1b[0m\x07 bell \ud800 half\r\nnext\tline"
AS_TEXT = """\
fail  KD901 too long ×2
      seen  stage distill: warm-up of 1000 of 4687 steps
      seen  stage distill: and again at step 7
      why   cause of KD901
      do    fix of KD901
      set   optim.warmup_steps: 468
      set   optim.scheduler: null
      from  source of KD901

warn  KD902 a bit odd
      seen  stage distill: 0.5 where 0.7 was due
      why   cause of KD902
      do    fix of KD902
      from  source of KD902

good  looked for and not seen: never seen (KD903); nor this (KD904)
skip  not asked, as these are missing: two evaluations (KD905, KD906); a log (KD907)
2 fail, 1 warn, 2 good, 3 skipped"""


class Terminal(io.StringIO):
    """An output that says it is one."""

    def isatty(self):
        return True


class TestDiagnosisLines:
    def test_all_of_a_diagnosis(self):
        assert "\n".join(diagnosis_lines(made_up_diagnosis())) == AS_TEXT

    def test_nothing_wrong_is_three_lines(self):
        assert list(diagnosis_lines(healthy_diagnosis())) == [
            "good  looked for and not seen: never seen (KD903)",
            "skip  not asked, as these are missing: a log (KD907)",
            "0 fail, 0 warn, 1 good, 1 skipped",
        ]

    @pytest.mark.parametrize("width", [40, 80, 120])
    def test_no_line_is_wider_than_asked_and_no_word_is_lost(self, width):
        lines = list(diagnosis_lines(quoting_diagnosis(LONG), width=width))
        wrapped = [line for line in lines if not line.startswith("fail")]  # the name of a check is short
        assert max(map(len, wrapped)) <= width
        assert "".join(wrapped).count("x") >= 8 * 300

    def test_colours_change_nothing_but_the_colour(self):
        coloured = list(diagnosis_lines(made_up_diagnosis(), is_coloured=True))
        assert "\x1b[31m" in coloured[0]
        assert click.unstyle("\n".join(coloured)) == AS_TEXT

    def test_what_a_log_holds_reaches_no_terminal(self):
        text = "\n".join(diagnosis_lines(quoting_diagnosis(JUNK)))
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
        assert "red bell ? half next line" in text
        text.encode("utf-8")


class TestShowDiagnosis:
    def shown(self, monkeypatch, output):
        monkeypatch.setattr(sys, "stdout", output)
        show_diagnosis(quoting_diagnosis(LONG))
        return output.getvalue()

    @pytest.mark.parametrize(("columns", "widest"), [(60, 60), (300, WIDTH)])
    def test_a_terminal_is_filled_in_colour_as_far_as_lines_are_readable(self, monkeypatch, columns, widest):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.delenv("NO_COLOR", raising=False)
        text = self.shown(monkeypatch, Terminal())
        lines = click.unstyle(text).splitlines()
        assert max(len(line) for line in lines if not line.startswith("fail")) == widest
        assert "\x1b[" in text

    def test_who_wants_no_colour_gets_none(self, monkeypatch):
        monkeypatch.setenv("NO_COLOR", "1")
        assert "\x1b[" not in self.shown(monkeypatch, Terminal())

    def test_elsewhere_it_is_plain_whatever_the_terminal(self, monkeypatch):
        monkeypatch.setenv("COLUMNS", "60")
        text = self.shown(monkeypatch, io.StringIO())
        assert "\x1b[" not in text
        assert max(len(line) for line in text.splitlines() if not line.startswith("fail")) == WIDTH

    def test_the_command_takes_a_log_with_halves_of_characters(self, tmp_path, kdkit):
        """A stage named by half a character ended in a UnicodeEncodeError."""
        rows = [{"stage": "\ud800", "step": step, "learning_rate": 0.0, "loss": 1.0} for step in range(4)]
        (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        code, said, _ = kdkit("doctor", tmp_path)
        assert code == 1
        assert "seen  stage ?: learning rate 0" in said


class Piece(HTMLParser):
    """Tags, attributes and text of a piece of a page; fails on tags that do not close."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts)).strip()

    @property
    def num_open(self):
        return sum(name == "open" for name, _ in self.attributes)


class TestDiagnosisHtml:
    def test_all_of_a_diagnosis(self):
        assert Piece(diagnosis_html(made_up_diagnosis())).text == (
            "2 fail 1 warn 2 good 3 skipped "
            "fail KD901 too long ×2 "
            "seen stage distill: warm-up of 1000 of 4687 steps stage distill: and again at step 7 "
            "why cause of KD901 what to do fix of KD901 optim.warmup_steps: 468 optim.scheduler: null "
            "source source of KD901 "
            "warn KD902 a bit odd seen stage distill: 0.5 where 0.7 was due why cause of KD902 what to do fix of KD902 "
            "source source of KD902 "
            "2 looked for and not seen KD903 never seen KD904 nor this "
            "3 not asked, as something is missing KD905 unasked, KD906 unasked too two evaluations KD907 unknown a log"
        )

    def test_findings_are_open_and_the_rest_is_folded_away(self):
        assert Piece(diagnosis_html(made_up_diagnosis())).num_open == 2
        assert Piece(diagnosis_html(made_up_diagnosis(), is_folded=True)).num_open == 0

    def test_a_healthy_run_is_one_line(self):
        text = Piece(diagnosis_html(healthy_diagnosis())).text
        assert text.startswith("good Nothing wrong was found. 1 looked for and not seen")

    def test_where_nothing_could_be_asked_nothing_is_called_good(self):
        healthy = healthy_diagnosis()
        unasked = type(healthy)("run", [], [], {"KD907": "a log"}, healthy.names)
        assert Piece(diagnosis_html(unasked)).text.startswith("skipped No check could be asked.")

    @pytest.mark.parametrize(
        ("only", "codes"),
        [
            ("fail", ["KD901"]),
            ("warn", ["KD902"]),
            ("good", ["KD903", "KD904"]),
            ("skipped", ["KD905", "KD906", "KD907"]),
        ],
    )
    def test_one_part_alone(self, only, codes):
        html = diagnosis_html(made_up_diagnosis(), only=only)
        assert re.findall(r"<code>(KD\d+)</code>", html) == codes
        piece = Piece(html)
        assert piece.num_open == piece.tags.count("details") == 1

    def test_text_is_escaped_wherever_it_goes(self):
        html = diagnosis_html(quoting_diagnosis(EVIL))
        assert "<script" not in html
        piece = Piece(html)
        assert piece.text.count(EVIL) == 10
        assert {name for name, _ in piece.attributes} == {"class", "open"}

    def test_what_a_log_holds_can_be_written_to_a_file(self):
        html = diagnosis_html(quoting_diagnosis(JUNK))
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", html)
        html.encode("utf-8")

    def test_its_style_touches_nothing_else_and_fetches_nothing(self):
        rules = re.sub(r"\{[^}]*\}", "{}", diagnosis_style())
        selectors = [name.strip() for rule in rules.split("{}") for name in rule.split(",") if name.strip()]
        assert len(selectors) > 10
        assert all(name.startswith(".diagnosis") for name in selectors)
        assert "url(" not in diagnosis_style()
        assert "@import" not in diagnosis_style()

    def test_every_class_has_a_style(self):
        classes = {
            word
            for diagnosis in (made_up_diagnosis(), healthy_diagnosis())
            for name, value in Piece(diagnosis_html(diagnosis)).attributes
            if name == "class"
            for word in value.split()
        }
        assert not {word for word in classes if f".{word}" not in diagnosis_style()}
