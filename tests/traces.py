"""Made-up traces of a sweep over the threshold: the higher it is, the worse, and worse still without a guard."""

import math

LABELS = ("guard and collapse rule", "neither")
THRESHOLDS = tuple(number / 10 for number in range(9))
SEEDS = (10, 20, 30)
NUM_STEPS, LOG_EVERY, EVALUATE_EVERY = 200, 20, 40


def made_up_trace(label, threshold, seed):
    """One run: with a guard half of the threshold's share is the student's own, and it is taken back once."""
    is_guarded = label == LABELS[0]
    train_steps = [1, *range(LOG_EVERY, NUM_STEPS + 1, LOG_EVERY)]
    eval_steps = list(range(EVALUATE_EVERY, NUM_STEPS + 1, EVALUATE_EVERY))
    fires = is_guarded and threshold > 0.5
    phi = [threshold / 2 if fires and step > NUM_STEPS / 2 else threshold for step in train_steps]
    own = [value / 2 if is_guarded else value for value in phi]
    harm = threshold**2 * (0.2 if is_guarded else 0.9)
    rouge_l = [40 * (1 - math.exp(-step / 60)) * (1 - harm * step / NUM_STEPS) + seed / 5 for step in eval_steps]
    return {
        "label": label,
        "threshold": threshold,
        "seed": seed,
        "train_steps": train_steps,
        "gold": [1 - share for share in own],
        "fresh": [share / 2 for share in own],
        "replayed": [share / 2 for share in own],
        "empty": [0.0] * len(own),
        "phi": phi,
        "eval_steps": eval_steps,
        "rouge_l": rouge_l,
        "taken_back": [fires and step == 120 for step in eval_steps],
    }


def made_up_traces(labels=LABELS):
    """All of them."""
    return [made_up_trace(label, threshold, seed) for label in labels for threshold in THRESHOLDS for seed in SEEDS]
