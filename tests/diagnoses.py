"""Diagnoses made by hand, for what shows them."""

from kdkit.doctor.findings import Check, Diagnosis, NotApplicable, examine, fail, warn

EVIL = "<script>alert(1)</script> & co"


def check(code: str, name: str, *seen, lacks: str | None = None) -> Check[None]:
    """A check that sees this of every part, or lacks something."""

    def look(_):
        if lacks is not None:
            raise NotApplicable(lacks)
        return seen

    return Check(code, name, "symptom", f"cause of {code}", f"fix of {code}", f"source of {code}", look)


def made_up_diagnosis() -> Diagnosis:
    """Two failures of one check, a warning, two checks that passed and three that were skipped."""
    steps = {"optim.warmup_steps": 468, "optim.scheduler": None}
    return examine(
        "run",
        {"distill": None},
        [
            check("KD901", "too long", fail("warm-up of 1000 of 4687 steps", **steps), fail("and again at step 7")),
            check("KD902", "a bit odd", warn("0.5 where 0.7 was due")),
            check("KD903", "never seen"),
            check("KD904", "nor this"),
            check("KD905", "unasked", lacks="two evaluations"),
            check("KD906", "unasked too", lacks="two evaluations"),
            check("KD907", "unknown", lacks="a log"),
        ],
    )


def healthy_diagnosis() -> Diagnosis:
    """Nothing seen."""
    return examine("run", {None: None}, [check("KD903", "never seen"), check("KD907", "unknown", lacks="a log")])


def quoting_diagnosis(text: str) -> Diagnosis:
    """The text wherever text can be."""
    checks = [check("KD901", text, fail(text, optim=text)), check("KD903", text), check("KD907", text, lacks=text)]
    texts = {"cause": text, "fix": text, "source": text}
    return examine(text, {text: None}, [Check(**(vars(each) | texts)) for each in checks])
