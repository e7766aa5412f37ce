# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,-all
#     notebook_metadata_filter: kernelspec,jupytext,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Distillation with soft-DTW: what does a small model learn from a large one?
#
# A small model can learn from labels alone. This notebook lets it learn from a large model as well,
# in two ways: from the teacher's **distribution over the next token** at every step, and from the
# teacher's **last hidden states**, word by word. Soft dynamic time warping (soft-DTW) says which word
# of the one belongs to which word of the other.
#
# Two questions: **how much closer does the student come to its teacher**, and **does soft-DTW warp
# anything**, or would matching word by word have done the same?
#
# As it stands it distils a tiny teacher that comes with the package: no network, no GPU, less than
# five minutes. One setting makes it GPT-2 XL → GPT-2 on a GPU.

# %% [markdown]
# ## Install, and what machine this is
#
# `kdkit` comes from an attached dataset of wheels, or from the checkout that this notebook lies in.
# `begin` installs what else is missing, from attached wheels or from PyPI, and leaves torch, numpy and
# ipywidgets as they are. On Kaggle it sends downloads to scratch and takes the hub's token from the
# secret `HF_TOKEN`. Where a card is visible that this build of torch has no kernels for, it stops here
# and says what to install.

# %%
import importlib
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from packaging.version import Version

if find_spec("kdkit") is None:
    wheels = list(Path(os.environ.get("KDKIT_INPUTS", "/kaggle/input")).rglob("kdkit-*.whl"))
    if not wheels and not Path("../pyproject.toml").is_file():
        raise ModuleNotFoundError("kdkit is not here: attach the dataset of its wheels under Input, and run this again")
    place = str(max(wheels, key=lambda wheel: Version(wheel.name.split("-")[1]))) if wheels else ".."
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", place], check=True)
    importlib.invalidate_caches()

# %% [markdown]
# Training stops after so many hours, saves, and says how to go on in another session; Kaggle ends one
# after 12.

# %%
from kdkit.session import begin

session = begin(hours=11)

# %% [markdown]
# ## Settings
#
# The only cell to change. `PAIR` is a preset: `demo` is the embedded pair, for a CPU; `gpt2-dolly` is
# GPT-2 XL → GPT-2 on Dolly, for a card of about 16 GB and the internet (or both models and the rows
# attached). Another pair of one tokenizer goes into `CHANGES`, which takes what `kdkit distill --set`
# takes. With two cards the teacher has the second one to itself.
#
# `SIZE` is a budget for the GPT-2 pair on a T4, planned at about a second a step with room to spare.
# The embedded pair on a CPU stays far below it, and below five minutes at the smallest.
#
# Stopping a cell saves the last step; **running the notebook again goes on from there**. On Kaggle,
# attach the output of the stopped version first.

# %% tags=["parameters"]
PAIR = "gpt2-dolly" if session.suits("gpt2-dolly") else "demo"
SIZE = os.environ.get("KDKIT_SIZE", "10 minutes")  # or "1 hour", "11 hours"
CHANGES = ["teacher.device=cuda:1"] if session.machine.num_devices > 1 else []
HUB = None  # "you/student": also push the student there, as a private repository
RESUME = True  # False refuses a folder in which there is a run
RUN = Path("runs") / f"01_dtw_distill-{PAIR}-{SIZE.replace(' ', '-')}"

LONG = {"logging": {"every_steps": 100}, "checkpoint": {"every_minutes": 15}}
SIZES = {
    "smoke": {"optim": {"max_steps": 3}, "data": {"test_rows": 6}, "evaluation": {"max_new_tokens": 8}},
    "10 minutes": {"optim": {"max_steps": 200}, "data": {"test_rows": 150, "validation_rows": 200}},
    "1 hour": {"optim": {"max_steps": 1_000}, "data": {"train_rows": None}, **LONG},
    "11 hours": {"optim": {"max_steps": 15_000}, "data": {"train_rows": None}, **LONG},
}

# %% [markdown]
# ## The two runs
#
# **Before**: the student learns from the labels alone. **After**: it goes on from there for as many
# steps, and minimises KL(teacher ‖ student) over the next token plus the soft-DTW divergence between
# its hidden states, projected into the teacher's space, and the teacher's. What is not set here comes
# from the presets.

# %%
from kdkit.config import load_config

before_config = load_config(
    {"preset": [PAIR, "sft"], **SIZES[SIZE]},
    [*CHANGES, "data.test=null", "data.validation_rows=32", "evaluation.teacher=false", "evaluation.before=false"],
)
from_before = [f"student.path={RUN / 'before' / 'model'}", "student.from_scratch=false", "evaluation.teacher=true"]
after_config = load_config({"preset": [PAIR, "fkl-dtw"], **SIZES[SIZE]}, [*CHANGES, *from_before])

# %% [markdown]
# ### The teacher
#
# Loaded once by itself, to see that it is worth learning from: its answers to three validation rows.

# %%
from kdkit.data import load_rows
from kdkit.evaluation import generate_answers
from kdkit.loading import describe_model, load_teacher, load_tokenizer
from kdkit.notebook import AnswersTable

teacher = load_teacher(after_config.teacher, session.machine)
tokenizer = load_tokenizer(after_config.teacher.path)
about = describe_model(teacher)
print(f"{about.architecture}: {about.num_parameters:,} parameters, {about.dtype} on {about.device}")
rows = load_rows(after_config.data.validation, template=after_config.data.template, limit=3, tokenizer=tokenizer)
answers = generate_answers(teacher, tokenizer, rows.dataset["prompt"])
del teacher  # the run loads its own
AnswersTable([{**row, "teacher": answer.text} for row, answer in zip(rows.dataset, answers)])

# %% [markdown]
# ### Before: the labels alone
#
# A line every ten seconds at most: the loss, its parts before their weights, and the time left.

# %%
from kdkit.session.runs import start_or_resume

before = start_or_resume(before_config, RUN / "before", session=session, resume=RESUME)

# %% [markdown]
# ### After: the teacher's distributions and its hidden states
#
# `kd` is in nats per token, `dtw` per answer.

# %%
after = start_or_resume(after_config, RUN / "after", session=session, resume=RESUME)

# %% [markdown]
# ## Did it learn what it was asked to?
#
# Both parts should fall. If one stays where it was, its weight or its learning rate is wrong.

# %%
from kdkit.notebook import ask_models, hand_over, show
from kdkit.plots import plot_alignment, plot_comparison, plot_training
from kdkit.report import write_run_report
from kdkit.training.folder import RunFolder

print(f"student: {after.model}\nreport: {write_run_report(after.folder)}")

logged = [row for row in RunFolder(after.folder).metrics.rows() if row["kind"] == "train"]
show(plot_training(logged))

# %% [markdown]
# ### What does the doctor say?
#
# It looks in the log for what is known to go wrong: a learning rate that stays 0, an evaluation that
# stands still, a term far larger than the others, answers that get worse. `kdkit doctor` says the same
# of any run's folder, and of the logs of other trainers.

# %%
from kdkit.doctor import diagnose_run
from kdkit.widgets import DiagnosisBox

DiagnosisBox(diagnose_run(after.folder))

# %% [markdown]
# ## Before, after, teacher
#
# On test rows that nobody trained on, answered greedily. ROUGE-L compares the words of an answer with
# those of the reference; perplexity is that of the reference under the model.

# %%
from kdkit.notebook import LABELS
from kdkit.report import comparison_table

comparison = [{"model": label, **after.evaluations[name]} for name, label in LABELS.items()]
display(comparison_table(comparison))
show(plot_comparison(comparison, student="after", baseline="before"))

# %% [markdown]
# ## What does soft-DTW align?
#
# While it trained, student and teacher read the same answer. The log says how much of the alignment
# lay off the diagonal, and what soft-DTW's alignment cost as a share of the one that does not warp.

# %%
for row in (logged[0], logged[-1]):
    off, ratio = row["dtw/off_diagonal_fraction"], row["dtw/to_diagonal_ratio"]
    print(f"step {row['step']}: {off:.1%} of the alignment off the diagonal, {ratio:.3f} of the diagonal's cost")

# %% [markdown]
# One answer from the test rows, word by word: dark is where the alignment is expected to pass, the
# dashed line is the diagonal. Costs are 1 − cosine between hidden states: 0 for the same direction, 1
# for unrelated ones.

# %%
from kdkit.inspection import alignment_of, choose_example, load_run_models

models = load_run_models(after.folder)
example = choose_example(after.predictions)
prompt, reference = example["prompt"], example["references"][0]
start = alignment_of(models, prompt, reference, student="before")
same = alignment_of(models, prompt, reference)
print("before training:", start.finding)
title = f"The same answer, after training: {same.finding}"
show(plot_alignment(same.matrix, same.student_units, same.teacher_units, title=title), size="narrow")

# %% [markdown]
# Two readers of the same words by the same tokenizer have little to warp. Where the texts differ it
# is another matter: here the student reads the reference, and the teacher an answer of its own to the
# same prompt. Training never does this; it shows what the warping is for.

# %%
own_words = (example["teacher"] or "").strip() or reference
other = alignment_of(models, prompt, reference, teacher_answer=own_words)
title = f"The teacher's own wording: {other.finding}"
show(plot_alignment(other.matrix, other.student_units, other.teacher_units, title=title), size="narrow")

# %% [markdown]
# ## Two sliders: γ and the band
#
# γ smooths the minimum over alignments: small, and the alignment is one path; large, and it is a cloud.
# The band forbids pairs of words far from the diagonal.

# %%
from kdkit.widgets import LiveControls, alignment_explorer, temperature_explorer

alignment_explorer(models, prompt, reference, teacher_answer=own_words)

# %% [markdown]
# ## A slider: temperature
#
# What teacher and student expect next, at each position of the same answer, and what a loss makes of
# it. A higher temperature shows more of what the teacher finds unlikely, and shrinks the gradient by
# about T²; `temperature_scaling=square` multiplies by T² to make up for it.

# %%
temperature_explorer(models, [example])

# %% [markdown]
# ## Answers side by side

# %%
AnswersTable(after.predictions[:6])

# %% [markdown]
# ## Your own prompt
#
# Change `PROMPT` and run the cell again, or type into the box below it. The embedded pair knows the
# kinds of task seen above and nothing else.

# %%
PROMPT = 'Say no politely, because you are at work.\nMessage from Nora: "Would you come to our tea party on Friday?"'

box = ask_models(models, PROMPT)

# %% [markdown]
# ## Take the student with you

# %%
hand_over(after.model, hub=HUB)

# %% [markdown]
# ## Turn the knobs while it trains
#
# A third run from the same start as "after" trains in the background; half a minute on a CPU with the
# embedded pair. Its sliders act from the next step on: temperature, the weights of the terms, and the
# threshold φ, the share of batches that the student writes itself. Every change is in the run's
# `metrics.jsonl` with its step: `kdkit distill runs/…/live/config.yaml --replay runs/…/live/metrics.jsonl`
# repeats the run, bit for bit on a CPU.
#
# Where nobody can move a slider, it trains here and shows the curves.

# %%
steps = min(max(SIZES[SIZE]["optim"]["max_steps"] // 2, 2), 300)
own_text = {"mode": "mixed", "threshold": 0.3, "capacity": 50, "collapse": None}
looks = [f"optim.max_steps={steps}", "logging.every_steps=2", f"evaluation.every_steps={max(steps // 5, 1)}"]
live_config = load_config(
    {"preset": [PAIR, "fkl-dtw"], **SIZES[SIZE], "rollout": own_text},
    [*CHANGES, *from_before, *looks, "evaluation.generate_rows=30", "evaluation.teacher=false"],
)
live = LiveControls(live_config, RUN / "live", session=session).start()

# %% [markdown]
# ## What this did not show
#
# - **That the teacher made the difference.** "After" has had twice the steps of "before". `kdkit
#   demo` gives labels alone, the teacher's distributions, and those with soft-DTW the same number of
#   steps.
# - **That warping helps.** With one tokenizer the alignment is close to the diagonal, so that
#   matching word by word would have trained much the same student. It has something to do where the
#   two texts or their tokens differ.
# - **That a difference of a point is real.** The intervals are over rows of one run; another seed
#   gives another run. For a claim of one ROUGE-L point, take five seeds or more.
# - **That the answers are right.** ROUGE-L counts shared words, and the embedded rows are made from
#   templates. The teacher of `gpt2-dolly` was trained on Dolly and may have seen the test rows: its
#   figures flatter it.
