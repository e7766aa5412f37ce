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
# # The student's own text: when does it help, and when does training collapse?
#
# A student that learns from given answers alone never sees its own mistakes. DistiLLM therefore puts
# more and more of the student's own text in place of the data, whenever the validation loss rises. In
# one recorded run (DTW + DistiLLM, GPT-2) that ended badly: ROUGE-L fell from 21.8 to about 6, exact
# match from 2.8 % to 0, and the loss rose from 8 to 47. The remedy there was to switch the mechanism
# off.
#
# Two questions: **what does a weak student's own text do to its training**, and **what do a guard and
# a collapse rule change**?
#
# As it stands it distils the tiny teacher that comes with the package: no network, no GPU, less than
# five minutes.

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
# The only cell to change. `THRESHOLD` is DistiLLM's φ: the share of batches that are the student's own
# text, fresh or from the replay buffer. `SIZE` sets the optimizer steps: `start` of them supervised,
# to get a weak student, then `arm` of them in each of three ways. With two cards the teacher has the
# second one to itself.
#
# Running the notebook again goes on where it stopped.

# %% tags=["parameters"]
PAIR = "gpt2-dolly" if session.suits("gpt2-dolly") else "demo"
SIZE = os.environ.get("KDKIT_SIZE", "5 minutes")  # or "1 hour"
THRESHOLD = 0.8
CHANGES = ["teacher.device=cuda:1"] if session.machine.num_devices > 1 else []  # what `kdkit distill --set` takes
RUN = Path("runs") / f"05_student_generation-{PAIR}-{SIZE.replace(' ', '-')}"

STEPS = {"smoke": {"start": 3, "arm": 4}, "5 minutes": {"start": 60, "arm": 100}, "1 hour": {"start": 300, "arm": 1500}}
NUM_STEPS = STEPS[SIZE]
TEST_ROWS = {"smoke": 6, "5 minutes": 150, "1 hour": 500}[SIZE]

# %% [markdown]
# ## A weak start
#
# A few supervised steps: a student that writes sentences, mostly wrong ones. Seed 000 let such a
# student feed itself.

# %%
from kdkit.config import load_config
from kdkit.session.runs import start_or_resume

answered = f"evaluation.generate_rows={min(TEST_ROWS, 50)}"
COMMON = [f"data.test_rows={TEST_ROWS}", answered, "evaluation.teacher=false", "evaluation.before=false", *CHANGES]
start_config = load_config(
    {"preset": [PAIR, "sft"], "optim": {"max_steps": NUM_STEPS["start"]}}, COMMON
)
start = start_or_resume(start_config, RUN / "start", session=session)

# %% [markdown]
# ## Three ways on
#
# All three minimise KL(teacher ‖ student) from the same start, in as many steps, on the same prompts.
#
# - **gold**: on the answers of the rows alone.
# - **unguarded**: a batch in `THRESHOLD` is the student's own text, whatever it is.
# - **guarded**: the same, but a text has to end, must not repeat itself, and the teacher must not find
#   it too unlikely; a text that is refused leaves its row's own answer in its place. Beside that a
#   collapse rule takes the threshold back when two evaluations in a row find ROUGE-L fallen.

# %%
OFF = {"mode": "off"}
MIXED = {"mode": "mixed", "threshold": THRESHOLD, "replay_ratio": "constant", "capacity": 200}
ARMS = {"gold": OFF, "unguarded": {**MIXED, "guard": None, "collapse": None}, "guarded": MIXED}

every = max(NUM_STEPS["arm"] // 4, 1)
from_start = [f"student.path={start.model}", "student.from_scratch=false", f"evaluation.every_steps={every}"]
results = {}
for name, rollout in ARMS.items():
    tree = {"preset": [PAIR, "fkl"], "optim": {"max_steps": NUM_STEPS["arm"]}, "rollout": rollout}
    config = load_config(tree, [*COMMON, *from_start, "logging.every_steps=5"])
    results[name] = start_or_resume(config, RUN / name, session=session)
    if results[name] is None:  # the session's time is over
        break

# %% [markdown]
# ## What came out

# %%
from kdkit.notebook import show
from kdkit.plots import plot_comparison, plot_rollout
from kdkit.report import comparison_table

comparison = [{"model": "start", **start.evaluations["student"]}]
comparison += [{"model": name, **result.evaluations["student"]} for name, result in results.items()]
display(comparison_table(comparison))
show(plot_comparison(comparison, student="guarded", baseline="unguarded"))

# %% [markdown]
# ## The unguarded run
#
# Above, where the training rows came from. Below, φ and the validation ROUGE-L on one time axis.

# %%
from kdkit.training.folder import RunFolder

metrics = {name: list(RunFolder(result.folder).metrics.rows()) for name, result in results.items()}
show(plot_rollout(metrics["unguarded"]))

# %% [markdown]
# ## The guarded run
#
# The same threshold. What the guard refuses, and why, is the panel below: it does not enter the
# buffer, and gold rows take its place. The weaker the student, the less of its text is used.

# %%
show(plot_rollout(metrics["guarded"]))

# %% [markdown]
# What the generated texts were like as training went on: the share that passed, tokens of a text, the
# share of 4-grams that it had said before, and how likely the teacher finds it (nats a token). `nan`:
# where there is no guard nobody asks, or nothing was replayed. `age` is how many steps ago a replayed text was written.

# %%
for name in ("unguarded", "guarded"):
    print(f"{name:>10}  step  passed  tokens  repeats  teacher    age")
    written = [row for row in metrics[name] if "rollout/mean_tokens" in row]
    for row in written[:: max(len(written) // 6, 1)]:
        names = ("pass_fraction", "mean_tokens", "repeat_fraction", "teacher_logprob", "age_steps")
        passed, tokens, repeats, teacher, age = (row.get(f"rollout/{n}", float("nan")) for n in names)
        print(f"{row['step']:16} {passed:7.0%} {tokens:7.1f} {repeats:8.0%} {teacher:8.2f} {age:6.1f}")

# %% [markdown]
# ## What is in the buffers
#
# The newest texts of both replay buffers at the end.

# %%
from kdkit.inspection import replayed_texts

for name in ("unguarded", "guarded"):
    held = replayed_texts(results[name].folder)
    print(f"{name}: {len(held)} texts")
    for text in held[:4]:
        print(f"  {text['age_steps']:3} steps old, teacher {text['teacher_logprob']:6.2f}: {text['text']}")

# %% [markdown]
# ## A slider: the threshold
#
# Eighteen runs of one seed that were made before (`data/demo/threshold_sweep.yaml`): the same weak
# start, then 160 steps of skew reverse KL with a share φ of own text, with and without guard and
# collapse rule. Under this loss and with exact labels the student's own text did no harm, even
# unguarded; the guard kept most of its gain away. Your own sweep can be shown as well:
# `threshold_explorer({"mine": "runs/sweep"})`.

# %%
from kdkit.widgets import threshold_explorer

threshold_explorer()

# %% [markdown]
# ## DistiLLM's own schedule
#
# With `rollout.mode=adaptive` the threshold starts at 0 and rises by 0.1 whenever the validation loss
# rises by 0.1 above a reference. This is what it would do on a given sequence of losses, for each of
# the four references (the paper compares with the previous evaluation, its code with the last one
# that fired):

# %%
from kdkit.training.rollout import AdaptiveThreshold

losses = [3.0, 2.5, 2.65, 2.8, 2.7, 3.2, 3.25, 3.4, 2.9, 3.0]
print(f"{'loss':>12}", *(f"{loss:5.2f}" for loss in losses))
for reference in ("initial", "previous", "best", "last_fired"):
    threshold, trace = AdaptiveThreshold(0.0, reference=reference), []
    for loss in losses:
        threshold.observe(loss)
        trace.append(threshold.value)
    print(f"{reference:>12}", *(f"{value:5.1f}" for value in trace))

# %% [markdown]
# ## What this did not show
#
# - **That the student's own text is bad.** It is bad for a weak student. For one that writes well it
#   is where much of the field's gain is: `rollout.gate` waits until a validation ROUGE-L is reached.
# - **Seed 000's whole collapse.** Its code also counted the student's text one position late, dropped
#   its end-of-text, and learnt it as labels. Here labels are exact to the token and the student's text
#   never is a label.
# - **That a difference of a point is real.** One seed. `kdkit sweep --over rollout.threshold=0,0.1,...,0.8
#   --seeds 8` runs as many thresholds and seeds as you have time for.
