"""Write the demo rows: `train.jsonl`, `validation.jsonl`, `test.jsonl`.

    python data/demo/make_rows.py [FOLDER]

Ten families of small writing tasks, filled from the lexicon in `words.py`. A row is
`{"instruction", "input", "output"}`; `output` is a string, or a list of strings when several
wordings are right (the first is the one to learn, drawn at random among them). The same seed gives
the same bytes. No question stands in two splits, whichever way it is asked.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import words

SEED = 20250
SPLIT_ROWS = {"train": 4500, "validation": 400, "test": 500}

Row = dict[str, str | list[str]]


def row(rng: Random, instruction: str | list[str], text: str, *answers: str) -> Row:
    """One row; picks an instruction, and which of the right answers comes first."""
    if isinstance(instruction, list):
        instruction = rng.choice(instruction)
    ordered = rng.sample(answers, len(answers))
    return {
        "instruction": instruction,
        "input": text,
        "output": ordered[0] if len(ordered) == 1 else ordered,
    }


def an(phrase: str) -> str:
    """The phrase with its indefinite article."""
    vowel = phrase[0] in "aeiou" and not phrase.startswith("uni")
    return f"{'an' if vowel else 'a'} {phrase}"


def capital(text: str) -> str:
    """The text with its first letter in upper case; the rest stays."""
    return text[0].upper() + text[1:]


def person(rng: Random) -> tuple[str, str, str]:
    """A first name, its pronoun and its possessive."""
    name = rng.choice(list(words.PEOPLE))
    return name, *words.PEOPLE[name]


def place(rng: Random) -> str:
    """An invented place name."""
    return rng.choice(words.PLACE_STARTS) + rng.choice(words.PLACE_ENDS)


def pick(rng: Random, choices: str) -> str:
    """One of the choices that a comma separates."""
    return rng.choice(words.listed(choices))


# --- the families -------------------------------------------------------------------------------


def tense(rng: Random) -> Row:
    """A habit in the present tense, moved to the past or the future."""
    name, _, _ = person(rng)
    habit = rng.choice(words.HABITS)
    chosen = rng.sample(words.VERBS, 2)
    things = [pick(rng, verb[4]).rstrip("*") for verb in chosen]

    def sentence(forms: list[str]) -> str:
        return f"{habit} {name} {forms[0]} the {things[0]} and {forms[1]} the {things[1]}."

    now = sentence([verb[1] for verb in chosen])
    if rng.random() < 0.5:
        ask = ["Rewrite the sentence in the past tense.", "Put this into the past tense."]
        return row(rng, ask, now, sentence([verb[2] for verb in chosen]))
    ask = ["Rewrite the sentence in the future tense.", "Put this into the future tense."]
    return row(rng, ask, now, sentence([f"will {chosen[0][0]}", chosen[1][0]]))


def passive(rng: Random) -> Row:
    """An active sentence, turned into the passive voice."""
    _, third, past, participle, objects = rng.choice(words.VERBS)
    thing = pick(rng, objects)
    plural, thing = thing.endswith("*"), thing.rstrip("*")
    doer = f"the {rng.choice(words.ROLE_ADJECTIVES)} {rng.choice(words.ROLES)}"
    moment = rng.choice(words.MOMENTS)
    if rng.random() < 0.5:
        verb, auxiliary = past, "were" if plural else "was"
    else:
        verb, auxiliary = third, "are" if plural else "is"
    ask = ["Rewrite the sentence in the passive voice.", "Make this sentence passive."]
    given = f"{capital(doer)} {verb} the {thing} {moment}."
    return row(
        rng,
        ask,
        given,
        f"The {thing} {auxiliary} {participle} by {doer} {moment}.",
        f"{capital(moment)} the {thing} {auxiliary} {participle} by {doer}.",
    )


def belonging(rng: Random) -> Row:
    """A list of attributes, turned into a sentence about a thing."""
    name, _, possessive = person(rng)
    kind = rng.choice(list(words.THINGS))
    materials, uses = words.THINGS[kind]
    look, material = rng.choice(words.LOOKS), pick(rng, materials)
    use, maker = pick(rng, uses), place(rng)
    notes = [
        f"thing: {kind}",
        f"owner: {name}",
        f"look: {look}",
        f"material: {material}",
        f"made in: {maker}",
        f"used to: {use}",
    ]
    rng.shuffle(notes)
    thing = f"{look} {material} {kind}"
    return row(
        rng,
        ["Describe the thing in one sentence.", "Turn the notes into one sentence."],
        "; ".join(notes),
        f"With {possessive} {thing} from {maker}, {name} can {use}.",
        f"The {thing} from {maker} belongs to {name}, who uses it to {use}.",
    )


def town(rng: Random) -> Row:
    """Facts about an invented place, turned into a sentence."""
    name = river = place(rng)
    while river == name:
        river = place(rng)
    kind, fame = rng.choice(words.PLACE_KINDS), rng.choice(words.PLACE_FAME)
    people = rng.randrange(1, 100) * rng.choice((10, 100))
    facts = [f"name: {name}", f"kind: {kind}", f"river: {river}", f"people: {people}", f"known for: {fame}"]
    rng.shuffle(facts)
    return row(
        rng,
        ["Introduce the place to a visitor.", "Write one sentence about the place."],
        "; ".join(facts),
        f"The {kind} of {name} on the river {river} has {people} people and is famous for its {fame}.",
        f"Famous for its {fame}, the {kind} of {name} on the river {river} has {people} people.",
    )


def story(rng: Random) -> Row:
    """A short story with one question about it."""
    finder, pronoun, possessive = person(rng)
    keeper = rng.choice([name for name in words.PEOPLE if name != finder])
    relation = rng.choice(words.RELATIONS[words.PEOPLE[keeper][0]])
    day = rng.choice(words.DAYS)
    thing = rng.choice(list(words.THINGS))
    full = f"{rng.choice(words.LOOKS)} {thing}"
    found = f"{rng.choice(words.FOUND_AT)} {rng.choice(words.LANDMARKS)}"
    kept = rng.choice(words.KEPT_AT)
    tale = (
        f"On {day} {finder} found {an(full)} {found}. {capital(pronoun)} gave it to {possessive} "
        f"{relation} {keeper}, who keeps it {kept}."
    )
    question, answers = rng.choice(
        (
            (
                f"Where did {finder} find the {thing}?",
                (
                    f"The {full} was found by {finder} {found} on {day}.",
                    f"On {day} {finder} found the {full} {found}.",
                ),
            ),
            (
                f"Who has the {thing} now?",
                (
                    f"Now {finder}'s {relation} {keeper} has the {full}.",
                    f"The {full} now belongs to {keeper}, the {relation} of {finder}.",
                ),
            ),
            (
                f"Where is the {thing} now?",
                (
                    f"The {full} is now {kept}, where {keeper} keeps it.",
                    f"Now {keeper} keeps the {full} {kept}.",
                ),
            ),
        )
    )
    return row(rng, f"Read the story and answer: {question}", tale, *answers)


def directions(rng: Random) -> Row:
    """A route in shorthand, explained in words."""
    stops = rng.sample(words.LANDMARKS, 5)
    start, goal, marks = stops[0], stops[1], stops[2:]
    steps = rng.sample(list(words.STEPS), rng.choice((2, 3)))
    notes = [step.format(mark) for step, mark in zip(steps, marks, strict=False)]
    said = [words.STEPS[step].format(mark) for step, mark in zip(steps, marks, strict=False)]
    route = f"{', '.join(said[:-1])} and then {said[-1]}"
    return row(
        rng,
        ["Explain the way in one sentence.", "Tell a visitor how to get there."],
        f"Route: {' > '.join([start, *notes, goal])}",
        f"From the {start}, {route} to reach the {goal}.",
        f"To get from the {start} to the {goal}, {route}.",
    )


def timetable(rng: Random) -> Row:
    """A person's week, told in one sentence."""
    name, pronoun, _ = person(rng)
    days = sorted(rng.sample(range(7), rng.choice((2, 3))))
    keys = rng.sample(list(words.ACTIVITIES), len(days))
    hours = [rng.randrange(12) for _ in days]
    entries = list(zip(days, hours, keys, strict=True))
    rng.shuffle(entries)
    given = "; ".join(f"{words.DAYS[d][:3]} {h + 1} {key}" for d, h, key in entries)
    told = [(words.DAYS[d], words.HOURS[h], words.ACTIVITIES[key]) for d, h, key in sorted(entries)]
    by_deed = [f"{deed} on {day} at {hour}" for day, hour, deed in told]
    by_day = [f"on {day} at {hour} {pronoun} {deed}" for day, hour, deed in told]
    by_day[0] = by_day[0].replace(f" {pronoun} ", f" {name} ", 1)
    return row(
        rng,
        ["Sum up the week in the order of the days.", "Describe the week from its first day on."],
        f"Week of {name}: {given}",
        f"This week {name} {', '.join(by_deed[:-1])} and {by_deed[-1]}.",
        f"{capital(', '.join(by_day[:-1]))} and {by_day[-1]}.",
    )


def ranking(rng: Random) -> Row:
    """Three things with a measure each, put in order."""
    unit, largest, smallest, (low, high), things = rng.choice(words.DIMENSIONS)
    names = rng.sample(words.listed(things), 3)
    values = rng.sample(range(low, high + 1), 3)
    given = ", ".join(f"{name} {value} {unit}" for name, value in zip(names, values, strict=True))
    falling = rng.random() < 0.5
    order = sorted(zip(values, names, strict=True), reverse=falling)
    first, last = (largest, smallest) if falling else (smallest, largest)
    (v1, n1), (v2, n2), (v3, n3) = order
    return row(
        rng,
        [f"Put these in order, {first} first.", f"Rank these from {first} to {last}."],
        f"Items: {given}",
        f"The {first} is the {n1} at {v1} {unit}, then comes the {n2} at {v2}, and the {last} is the {n3} at {v3}.",
        f"First comes the {n1} at {v1} {unit}, second the {n2} at {v2}, and last the {n3} at {v3}.",
    )


def reply(rng: Random) -> Row:
    """A polite yes or no to a message."""
    sender, _, _ = person(rng)
    day = rng.choice(words.DAYS)
    favour = rng.randrange(4)
    if favour == 0:
        item = rng.choice(list(words.THINGS))
        message, gladly, cannot = (
            f"Could you lend me your {item} on {day}?",
            f"lend you my {item}",
            f"lend you my {item}",
        )
    elif favour == 1:
        chore = rng.choice(words.CHORES)
        message = f"Could you help me {chore} on {day}?"
        gladly = cannot = f"help you {chore.replace(' my ', ' your ')}"
    elif favour == 2:
        event = rng.choice(words.EVENTS)
        message = f"Would you come to our {event} on {day}?"
        gladly = cannot = f"come to your {event}"
    else:
        pet = rng.choice(words.PETS)
        message = f"Could you look after my {pet} on {day}?"
        gladly = cannot = f"look after your {pet}"
    message = f'Message from {sender}: "{message}"'
    if rng.random() < 0.4:
        return row(
            rng,
            "Say yes politely.",
            message,
            f"Dear {sender}, of course I will gladly {gladly} on {day}.",
            f"Yes, {sender}, it will be a pleasure to {gladly} on {day}.",
        )
    excuse = rng.choice(list(words.EXCUSES))
    reason = words.EXCUSES[excuse]
    return row(
        rng,
        f"Say no politely, because {excuse}.",
        message,
        f"Dear {sender}, I am sorry that I cannot {cannot} on {day}, because {reason}.",
        f"Sorry, {sender}, but {reason} on {day}, so I cannot {cannot}.",
    )


def word_problem(rng: Random) -> Row:
    """A sum with two steps, worked out."""
    name, pronoun, _ = person(rng)
    thing = rng.choice(words.COUNTABLES)
    had, more = rng.randrange(2, 21), rng.randrange(2, 21)
    total = had + more
    if rng.random() < 0.5:
        away = rng.randrange(1, total - 1)
        left = total - away
        told = f"Then {pronoun} gets {more} more and loses {away}."
        worked = f"{had} plus {more} is {total} and {total} minus {away} is {left}"
    else:
        extra = rng.randrange(2, 21)
        left = total + extra
        told = f"Then {pronoun} buys {more} more and finds {extra}."
        worked = f"{had} plus {more} is {total} and {total} plus {extra} is {left}"
    return row(
        rng,
        f"At first {name} has {had} {thing}. {told} How many {thing} does {name} have now?",
        "",
        f"Now {name} has {left} {thing}, because {worked}.",
        f"Since {worked}, {name} has {left} {thing} now.",
    )


FAMILIES: dict[str, Callable[[Random], Row]] = {
    "tense": tense,
    "passive": passive,
    "belonging": belonging,
    "town": town,
    "story": story,
    "directions": directions,
    "timetable": timetable,
    "ranking": ranking,
    "reply": reply,
    "word_problem": word_problem,
}

# --- the splits ---------------------------------------------------------------------------------


def distinct_rows(rng: Random) -> Iterator[Row]:
    """Rows of the families in turn, each question once."""
    seen: set[str] = set()
    while True:
        for family in FAMILIES.values():
            made = family(rng)
            question = str(made["input"] or made["instruction"])
            while question in seen:
                made = family(rng)
                question = str(made["input"] or made["instruction"])
            seen.add(question)
            yield made


def make_splits(seed: int = SEED) -> dict[str, list[Row]]:
    """All rows by split, each split shuffled."""
    rng = Random(seed)
    rows = distinct_rows(rng)
    splits = {}
    for split, count in SPLIT_ROWS.items():
        splits[split] = [next(rows) for _ in range(count)]
        rng.shuffle(splits[split])
    return splits


def main() -> None:
    """Write one JSON Lines file for each split."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in make_splits().items():
        lines = [json.dumps(made, ensure_ascii=False) + "\n" for made in rows]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
