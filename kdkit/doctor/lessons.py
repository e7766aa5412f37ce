"""What the five post-mortems that kdkit grew out of said, what is true, and the check that says it now."""

from dataclasses import dataclass

RUNS = {
    "000": "GPT-2 trained with DTW and the student's own text, let in by an adaptive threshold",
    "001": "a student of 135M parameters under an MoE teacher of 1B: a learning rate of 0 over a whole epoch",
    "002": "the same pair: training and evaluation weighed the terms of the loss differently",
    "003": "the same pair: half an epoch with terms of the loss from 30 to 200, then a crash",
    "004": "the same pair: a loss that goes up and down, and a NaN, both blamed on the temperature",
}
"""Number of a post-mortem -> its run, in our words."""


@dataclass(frozen=True)
class Lesson:
    """One statement of a post-mortem, or one thing in its log, and what became of it."""

    run: str
    """Number of the post-mortem, one of `RUNS`."""
    said: str
    true: str
    """Begins with the verdict where there is one: fault, healthy, a taste."""
    codes: tuple[str, ...] = ()
    """Checks that look for it; none for what is healthy or a taste."""


LESSONS = (
    Lesson(
        "000",
        "ROUGE-L falls from 21.8 to about 6 while the threshold of the student's own text rises.",
        "Fault, and rightly explained: text of a weak student takes the place of the rows, and makes it weaker.",
        ("KD214",),
    ),
    Lesson("000", "The total loss rises from 8 to 47.", "Fault: it ends far above where it had been.", ("KD208",)),
    Lesson("000", "Exact match falls from 2.8 % to 0.", "Fault: it follows the ROUGE-L.", ("KD215",)),
    Lesson(
        "000",
        "Intervals of -1 never evaluate and never save; 1 and 2 are right.",
        "DistiLLM reads -1 as once an epoch, and the log has evaluations. Its intervals count optimizer steps: 1 and 2 "
        "evaluate and save at every step or two. Elsewhere -1 and 0 often are never.",
        ("KD121", "KD124"),
    ),
    Lesson(
        "000",
        "The adaptive threshold was on from the first step, without a warm start.",
        "Fault, known from the config: what is fed back has to be worth it first.",
        ("KD107",),
    ),
    Lesson(
        "000",
        "A threshold of 0.7 is a strict filter.",
        "The threshold is a share: at 0.7 the student writes 70 % of what it trains on.",
        ("KD119", "KD227"),
    ),
    Lesson(
        "000",
        "An epsilon of 0.01 instead of 0.1 lets the threshold rise very slowly.",
        "The other way round: the threshold rises when the loss has risen by epsilon, and 0.01 is sooner reached.",
        ("KD119",),
    ),
    Lesson(
        "000",
        "Beams and a low temperature keep bad text out.",
        "They change how text is drawn. What may be trained on is decided afterwards, by a guard.",
        ("KD118",),
    ),
    Lesson(
        "000",
        "Distillation loss from 1.8 to 1.2, DTW about 0.52, ROUGE-L 21 to 22 are good signs.",
        "Healthy, all three; the checks pass such a log.",
    ),
    Lesson(
        "001",
        "The schedule was made for 75,000 steps and got 4,687, so that the learning rate shows 0.00e+00.",
        "Two faults. The wrong length alone would have shown about 9e-06 by step 3000; a 0 at every row means that the "
        "optimizer or the scheduler never stepped.",
        ("KD103", "KD201", "KD202"),
    ),
    Lesson(
        "001",
        "Three evaluations agree to four decimals.",
        "Fault: nothing was learnt, or one result is shown again.",
        ("KD203",),
    ),
    Lesson(
        "001",
        "The feature loss of 40.8 is 40 times too large and dominates the total of 101.4.",
        "Fault of scale. It does not dominate: at its weight of 0.1 it is about 4 % of the total.",
        ("KD207",),
    ),
    Lesson(
        "001",
        "The parts and the total stand side by side.",
        "Fault: the parts, weighted, sum to 18.9, not to 101.4. Some other term or another weight is in the total.",
        ("KD220",),
    ),
    Lesson(
        "001",
        "A NaN of the label loss comes from exp(logits / T) overflowing at T = 3.",
        "Dividing by 3 makes logits smaller. The KD term of the same logits stayed finite, so that it was a batch "
        "without counted labels: a mean over nothing.",
        ("KD206",),
    ),
    Lesson(
        "001",
        "A perplexity of 485165195.41 means a model worse than random.",
        "It is e^20: the trainer cuts the exponent, and takes it of the total loss instead of the cross-entropy.",
        ("KD204", "KD205"),
    ),
    Lesson("001", "96 to 98 % of the card's memory in use.", "Worth a warning: a longer batch ends it.", ("KD211",)),
    Lesson("001", "The training loss stays at 21.5.", "Fault: it follows the learning rate of 0.", ("KD209",)),
    Lesson(
        "001",
        "Warm-up is only 62 optimizer steps; then: it is 21 %, and 10 to 15 % are optimal.",
        "The two contradict each other. A warm-up of 21 % is a taste; one counted in other steps than the optimizer's "
        "is a fault.",
        ("KD102", "KD103"),
    ),
    Lesson(
        "001",
        "The config says cosine, the code takes linear: a matter of names.",
        "Fault, if a mild one: the run is another than its config says.",
        ("KD218",),
    ),
    Lesson("001", "2.5 steps a second are too slow.", "A taste: how long one may wait is for its owner to say."),
    Lesson(
        "002",
        "Evaluation passed no step and so had the full weights of the curriculum; training had most of them at 0.",
        "Fault: two objectives, whose losses cannot be compared.",
        ("KD210",),
    ),
    Lesson(
        "002",
        "That is why two evaluations agree to four decimals.",
        "It cannot be: whatever the weights, the KD and label terms in the sum change when the student does. The "
        "student did not change, or the result was kept.",
        ("KD203",),
    ),
    Lesson(
        "002",
        "A KD loss of 39 is expected of a student with random weights.",
        "Fault. The student was not random: its label loss was 5.3 nats, and a guess among 49,152 tokens has 10.8. And "
        "a random one has a KD loss of 0.04 to 0.32 a token; a sum over tokens divided by rows is as large as 39.",
        ("KD207",),
    ),
    Lesson(
        "002",
        "Raw components: KD 27.457 and label loss 1.580.",
        "These are weighted: 0.7 x 39.22 and 0.3 x 5.27. A log has to say which it shows.",
        ("KD220",),
    ),
    Lesson(
        "002",
        "A learning rate of 2.01e-5 in the format .3e prints 0.000e+00.",
        "It prints 2.010e-05. What printed 0 was 0.",
        ("KD201",),
    ),
    Lesson("002", "Only KD and labels count in the first 10 % of the run.", "Healthy: the curriculum as planned."),
    Lesson(
        "003",
        "The final evaluation crashes: float16 meets float32 in a projection.",
        "Fault, and rightly explained: autocast had hidden it while training.",
        ("KD212",),
    ),
    Lesson(
        "003",
        "KD 30 to 40, feature 150 to 200, attention 90 to 140: no term is normalised.",
        "Fault, and rightly explained.",
        ("KD207",),
    ),
    Lesson("003", "A perplexity of 485,165,195.", "Fault: e^20 again.", ("KD204",)),
    Lesson("003", "36 lines a step, 896,000 in all.", "Fault, as a warning: nobody finds a figure.", ("KD216",)),
    Lesson(
        "003",
        "The label loss is logged at step 0 and never again.",
        "Fault: a term has gone without a word.",
        ("KD224",),
    ),
    Lesson(
        "003",
        "Stopped early at half of the run: patience was too short.",
        "Fault, of another kind: it watched the total loss, whose weights change along the curriculum.",
        ("KD122", "KD217"),
    ),
    Lesson(
        "003",
        "A load balance of 0.0001 shows that the experts have collapsed.",
        "Healthy: the term grows when experts fall idle, so that a small one is no collapse.",
    ),
    Lesson("003", "The curriculum is too slow: 6.7 % of a weight at half of the run.", "A taste."),
    Lesson(
        "003",
        "The student has 30 layers and the teacher 24; the vocabularies have 49,152 and 151,936 ids.",
        "Both can be trained with a map of layers and of tokens. Without one, a fault known from the config.",
        ("KD113", "KD116"),
    ),
    Lesson(
        "004",
        "Standard KD (Hinton et al. 2015) does not multiply by T squared.",
        "It does: section 2 says so, to keep gradients of soft and hard targets in proportion.",
        ("KD105",),
    ),
    Lesson(
        "004",
        "T = 3 makes a KD loss of 38, and T = 2 would make it 17.",
        "Fault of scale, and not of T squared: without that factor 4.2 is left, far above what even a random student "
        "has a token.",
        ("KD207",),
    ),
    Lesson(
        "004",
        "Logits above 11 overflow in a softmax of float16.",
        "Softmax takes off the largest logit first; no exponent is above 0. The NaN is the one of 001.",
        ("KD206",),
    ),
    Lesson(
        "004",
        "A loss that goes from 28 to 20 and back to 28 shows unstable gradients.",
        "Single micro-batches were logged, which differ by that much. The fault is that it does not fall.",
        ("KD209",),
    ),
    Lesson(
        "004",
        "A perplexity cut at e^20 is mended by showing e^50 beside it.",
        "Fault: another cut. A perplexity of the cross-entropy needs none.",
        ("KD204",),
    ),
    Lesson(
        "004",
        "With T = 2 the loss will go 17.5, 14.1, 9.2, 5.8, and perplexity 180,000 to 150.",
        "Hoped for and never measured; no check is built on them.",
    ),
    Lesson("004", "The temperature goes from 2.0 to 1.5 along the run.", "Healthy."),
)
"""In the order of the post-mortems."""
