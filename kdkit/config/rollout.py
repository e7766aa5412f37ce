"""The fields of training on the student's own text: how much of it, how it is drawn, and what keeps it from harm."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from kdkit.config.part import Count, Part, Share

RolloutMode = Literal["off", "adaptive", "mixed", "on_policy"]


class GuardConfig(Part):
    """What a text of the student must be to be trained on."""

    min_tokens: Count = 2
    """Tokens of an answer at least, its end-of-text included."""
    require_end: bool = True
    """Refuse a text that was cut at max_new_tokens."""
    ngram: Count = 4
    """Length of the token sequences that are looked for again."""
    max_repeat_fraction: Share = 0.3
    """Share of a text's n-grams that occurred in it before."""
    min_teacher_logprob: float | None = Field(default=-4.0, le=0)
    """Teacher's mean log-likelihood of the text at least, in nats a token (-4: perplexity 55); None does not ask."""
    min_rouge_l: float | None = Field(default=None, ge=0, le=100)
    """ROUGE-L against the row's own answers at least, in percent; None does not ask. Rows without an answer pass."""


class CollapseConfig(Part):
    """When the student's text is found to do harm: the threshold goes back to where ROUGE-L was best, at most to half,
    the replay buffer is emptied, and an adaptive threshold stays below the value that did the harm."""

    max_rouge_drop_fraction: float = Field(default=0.1, gt=0, le=1)
    """Fall of the validation ROUGE-L below the best so far, as a fraction of it."""
    min_pass_fraction: Share = 0.2
    """Texts since the last evaluation that the guard has to let through."""
    min_texts: Count = 32
    """Texts below which their pass rate says nothing."""
    patience: Count = 2
    """Evaluations in a row that have to find a fall. Until then it is noted and an adaptive threshold does not rise,
    since in modes mixed and on_policy a threshold that was taken back stays there; 1 acts at once."""


class GateConfig(Part):
    """What a student must have reached before its text is used at all; once open, the gate stays open."""

    begin_fraction: float | None = Field(default=None, ge=0, lt=1)
    """Fraction of the stage before which nothing is generated; None: the learning rate's warm-up."""
    min_rouge_l: float = Field(default=20.0, ge=0, le=100)
    """Validation ROUGE-L at an evaluation, in percent."""


class RolloutConfig(Part):
    """Batches of the student's own text in place of the rows' answers (DistiLLM, GKD); gold rows alone feed lm."""

    mode: RolloutMode = "off"
    """adaptive: the share grows with the validation loss (DistiLLM); mixed: fixed; on_policy: every batch (GKD)."""
    threshold: Share | None = None
    """Share of batches that are the student's text: adaptive starts here (None: 0), mixed stays here (None: 0.5)."""
    threshold_step: float = Field(default=0.1, gt=0, le=1)
    """What a rise adds to the threshold (adaptive). DistiLLM: 0.1."""
    threshold_cap: Share = 1.0
    """The threshold never rises above it (adaptive). DistiLLM: 1."""
    loss_epsilon: float = Field(default=0.1, ge=0)
    """Rise of the validation cross-entropy, in nats, that raises the threshold (adaptive). DistiLLM: 0.1."""
    reference: Literal["initial", "previous", "best", "last_fired"] = "last_fired"
    """Evaluation to rise above (adaptive): the one before step 1, the last, the lowest, or the last that fired.
    DistiLLM's paper compares with the previous one, its code with the last that fired."""
    replay_ratio: Literal["constant", "decreasing", "increasing", "none"] = "decreasing"
    """How much of the threshold is freshly generated, the rest being replayed: half of it, all of it falling to none
    over the stage (DistiLLM's default), none of it rising to all; or none: nothing is replayed (GKD)."""
    capacity: Count = 1000
    """Texts that are kept for replay; the oldest make room. DistiLLM: 1000."""
    max_new_tokens: Count = 128
    """Tokens of a text at most, its end-of-text included; about 100 are enough (arXiv 2605.27028). DistiLLM: 256."""
    sampling_temperature: float = Field(default=1.0, ge=0)
    """Of the drawing; 0 takes the likeliest token. DistiLLM: 1."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus of the drawing. DistiLLM: 1."""
    num_beams: Count = 1
    """Beams; 1 draws one text."""
    ahead: Count = 1
    """Steps whose texts are written in one go: a large batch takes little longer than a small one. The last step's
    texts are then ahead - 1 steps old when they are trained on."""
    batch_size: Count | None = None
    """Prompts answered together; None: all of the accumulation windows that are written for."""
    guard: GuardConfig | None = GuardConfig()
    """What a text must be to be trained on; null trains on everything, as DistiLLM does."""
    collapse: CollapseConfig | None = CollapseConfig()
    """When the threshold is taken back; null never does, as DistiLLM."""
    gate: GateConfig | None = None
    """What the student must have reached first; null starts at once."""

    @field_validator("mode", mode="before")
    @classmethod
    def _off_is_no_boolean(cls, value: object) -> object:
        return "off" if value is False else value  # what YAML reads a bare off as

    @model_validator(mode="after")
    def _threshold_fits_mode(self) -> "RolloutConfig":
        if self.mode == "on_policy" and self.threshold not in (None, 1.0):
            raise ValueError(
                f"on_policy trains on the student's text alone, so its threshold is 1 (given: {self.threshold:g}); "
                "for a share of it take mode mixed"
            )
        if self.mode == "adaptive" and self.start_threshold > self.threshold_cap:
            raise ValueError(f"threshold ({self.threshold}) starts above threshold_cap ({self.threshold_cap})")
        return self

    @property
    def start_threshold(self) -> float:
        """Share of the student's text at the start."""
        defaults = {"off": 0.0, "adaptive": 0.0, "mixed": 0.5, "on_policy": 1.0}
        return defaults[self.mode] if self.threshold is None else self.threshold

    @property
    def is_on(self) -> bool:
        """Whether the student's text is used at all."""
        return self.mode != "off"
