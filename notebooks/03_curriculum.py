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
# # A curriculum of many terms: what does each one contribute, and when?
#
# A student can be asked for more than its teacher's next tokens: its last hidden states, its attention
# maps, its layers, its place among the other texts, the outputs of an MoE teacher's experts. Four
# recorded runs (Huihui-MoE-1B → SmolLM-135M) brought such terms in one after the other, while the
# temperature fell from 2.0 to 1.5. None of them says which term did anything.
#
# Three questions: **what share of the loss** is each term's, **whose gradient** moves the student, and
# **what is lost** when a term is left out?
#
# As it stands it distils a tiny MoE teacher into a deeper, narrower student that reads by another
# tokenizer: no network, no GPU, less than five minutes.

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
# The only cell to change. `PAIR` is a preset; `demo-moe` is the embedded pair. With a dense teacher
# take "routing" out of `FEATURES` and of `TREE` below. `ARMS` names what is left out in which runs;
# each is trained with the same seeds. `SIZE` sets their number, the optimizer steps and what is left
# out.
#
# Running the notebook again goes on where it stopped.

# %% tags=["parameters"]
PAIR = "demo-moe"
SIZE = os.environ.get("KDKIT_SIZE", "5 minutes")  # or "1 hour"
CHANGES = ["teacher.device=cuda:1"] if session.machine.num_devices > 1 else []  # what `kdkit distill --set` takes
RUN = Path("runs") / f"03_curriculum-{PAIR}-{SIZE.replace(' ', '-')}"

FEATURES = ["hidden", "attention", "layerwise", "contrastive", "routing"]
ARMS = {"features": FEATURES, "lm": ["lm"], "kd": ["kd", "span"]}
if SIZE == "1 hour":
    ARMS |= {name: [name] for name in FEATURES}
ARMS = {"features": FEATURES} if SIZE == "smoke" else ARMS
NUM_STEPS = {"smoke": 10, "5 minutes": 60, "1 hour": 300}[SIZE]
NUM_SEEDS = {"smoke": 1, "5 minutes": 3, "1 hour": 5}[SIZE]
TEST_ROWS = {"smoke": 6, "5 minutes": 60, "1 hour": 300}[SIZE]

# %% [markdown]
# ## The schedule, before anything is trained
#
# The preset `student-aware` has the recorded schedule: `kd` and `lm` from the start, hidden states and
# attention from 10 to 40 % of the steps, layers from 40 to 70 %, contrast from 70 % on. The experts
# join with the layers; the embedded teacher has four in each. With two tokenizers `kd` compares the
# first token of each span of bytes, and `span`, here with its weight written out, the whole span.

# %%
from kdkit.config import load_config

few_rows = [f"data.test_rows={TEST_ROWS}", "data.validation_rows=32", "evaluation.generate_rows=0"]
looks = [f"evaluation.every_steps={NUM_STEPS}", f"logging.every_steps={max(NUM_STEPS // 30, 1)}"]
COMMON = [*few_rows, *looks, "evaluation.teacher=false", "evaluation.before=false", *CHANGES]
WITH_LAYERS = {"start": 0.0, "end": 0.05, "begin": 0.4, "finish": 0.7}
TREE = {
    "preset": [PAIR, "student-aware"],
    "objective": {"span": {"weight": 0.7}, "routing": {"weight": WITH_LAYERS}},
    "optim": {"max_steps": NUM_STEPS, "batch_size": 8},
}
kept = [f"checkpoint.every_steps={max(NUM_STEPS // 10, 1)}", "checkpoint.keep=11"]
full_config = load_config(TREE, [*COMMON, *kept])

# %% [markdown]
# The temperature T softens both distributions before `kd` compares them, and shrinks the gradient by
# about T². `temperature_scaling=square` multiplies `kd` by T² to make up for it. So the loss that is
# minimised holds `kd` four times at T = 2 and 2.25 times at T = 1.5: **the loss falls by this alone**,
# whether or not the student learns.

# %%
from kdkit.inspection import planned_rows
from kdkit.notebook import show
from kdkit.plots import plot_schedule

show(plot_schedule(planned_rows(full_config, num_steps=NUM_STEPS)))

# %% [markdown]
# ## One run of it
#
# A line every ten seconds at most, with each part before its weight. `kd` is in nats per span of bytes
# that both tokenizers cut alike, `lm` and `span` in nats per token of the student, the others per word.

# %%
from kdkit.session.runs import start_or_resume

full = start_or_resume(full_config, RUN / "arms" / "full" / f"seed-{full_config.seed}", session=session)

# %% [markdown]
# ## What each term contributes, and when
#
# Each row is a term. On the left the part as the term defines it, in the middle its weight, on the
# right its weighted share of the total. A part that is small before its weight stays small after it.

# %%
from kdkit.plots import plot_terms
from kdkit.training.folder import RunFolder

show(plot_terms(RunFolder(full.folder).metrics.rows()))

# %% [markdown]
# ## Whose gradient moves the student?
#
# A share of the loss is not yet a pull: a term can be large and flat. At each checkpoint of the run,
# the gradient of every weighted term is taken by itself, on the same eight validation rows. Left: its
# norm as a share of all norms. Right: its cosine with the gradient of all terms together; near 0 it
# pulls aside, below 0 against.

# %%
from kdkit.inspection import gradient_rows
from kdkit.plots import plot_gradients

gradients = gradient_rows(full.folder)
show(plot_gradients(gradients))

# %% [markdown]
# The last checkpoint in numbers: what a term weighs, what it is of the loss, what it is of the pull.

# %%
logged = [row for row in RunFolder(full.folder).metrics.rows() if row["kind"] == "train"][-1]
print(f"{'':>12}  weight  of the loss  of the gradients  cosine")
for name in ("kd", "lm", "span", *FEATURES):
    weight, of_loss = logged[f"weight/{name}"], logged[f"weighted/{name}"] / logged["loss"]
    of_norms, cosine = (gradients[-1][f"gradient_{what}/{name}"] for what in ("share", "cosine"))
    print(f"{name:>12}  {weight:6.3f}  {of_loss:11.1%}  {of_norms / 100:16.1%}  {cosine:6.2f}")

# %% [markdown]
# ## What is lost without it?
#
# The same run without a term, or without all terms over the student's inside ("features"): as many
# steps, the same rows in the same order, the same seeds. What each of them says is in `arms/log.txt`.

# %%
from kdkit.session.arms import run_arms

arms = {"full": full_config}
for name, lacking in ARMS.items():
    arms[name] = load_config(TREE, [*COMMON, *(f"objective.{term}.weight=0" for term in lacking)])
results = run_arms(arms, RUN / "arms", session=session, num_seeds=NUM_SEEDS)

# %% [markdown]
# Differences to the full curriculum on the test rows, seed by seed. An interval that contains 0 shows
# no difference; with one seed there is no interval. Cross-entropy is what `lm` minimises: a run in which
# `lm` has the clipped gradient for itself is ahead in it at first, whatever it will write later.

# %%
from kdkit.inspection import ablation_rows
from kdkit.plots import plot_ablation

figures = {name: {seed: run.evaluations["student"] for seed, run in runs.items()} for name, runs in results.items()}
show(plot_ablation(ablation_rows(figures)))

# %% [markdown]
# ## What this did not show
#
# - **That the terms over the inside are useless, or useful.** At the smallest size a student from
#   random weights has barely learnt to spell. Such terms may matter later, in longer runs, with
#   pretrained models, or with more weight: `objective.hidden.weight=1.0` in `CHANGES` is one change.
# - **That `kd` does harm, or good.** In few steps, cross-entropy favours labels alone. Whether `kd` and
#   `span` pay is a question of longer runs and of ROUGE-L, which here is that of noise.
# - **That this order is a good one.** Only terms were left out. Nothing was trained with all terms from
#   the start, with the order turned round, or at a constant temperature.
# - **What a term does together with others.** Each was left out alone. Two that do the same work both
#   look superfluous.
# - **What the optimizer makes of a gradient.** AdamW divides by the gradient's own size, and clipping
#   cuts it; shares are those before both, on eight rows.
# - **Anything about SmolLM.** The embedded pair has the shape of that one, not its size.
