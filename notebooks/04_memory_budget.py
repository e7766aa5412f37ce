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
# # Does it fit, and what takes the room?
#
# A distillation step holds two models, one of them with gradients and optimizer states, the activations
# of a pass that waits for its way back, and logits over tens of thousands of ids. Whether all of it fits
# is usually found out after an hour, by an error. It can be told **before anything is loaded**: the sizes
# that decide are in the two models' `config.json` and in the settings of the run.
#
# Three questions: **what fills a card of 16 GB**, **which setting moves which part**, and **how far is
# the plan from a measured run**? The large pairs below are planned, not run: no network, no GPU, no
# weights, less than five minutes. What is measured at the end is the small pair that comes with the
# package.

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
# The only cell to change. `TEACHER` and `STUDENT` are folders with a `config.json`, attached models or
# hub names; `shape_folder` finds the sizes of a few published models that come with the package, without
# weights. `PRESET` has everything else of the run, and `CHANGES` what `kdkit plan --set` takes. The
# preset `moe-smollm` keeps rows to 256 tokens; here they are four times as long. `CARD` and `BESIDE` are
# names that `kdkit plan --gpu` knows.
#
# `SIZE` sets the rows at a time of the measured runs at the end, and their optimizer steps.

# %% tags=["parameters"]
from kdkit.memory.shapes import shape_folder

TEACHER = shape_folder("huihui-moe-1b")
STUDENT = shape_folder("smollm-135m")
PRESET = "moe-smollm"
CHANGES = ["data.max_length=1024", "data.max_prompt_length=512", "evaluation.batch_size=4"]
CARD, BESIDE = "p100", "t4x2"

SIZE = os.environ.get("KDKIT_SIZE", "5 minutes")
BATCHES = {"smoke": [4, 64], "5 minutes": [16, 64, 128]}[SIZE]
STEPS = {"smoke": 2, "5 minutes": 4}[SIZE]

# %% [markdown]
# ## A table that was written after the fact
#
# Four recorded runs (seeds 001 to 004) distilled Huihui-MoE-1B into SmolLM-135M on a P100 that said 96
# to 98 % full. Their table: teacher 4.5 GB, student 0.5, activations 3, optimizer states 2, gradients
# 1.5, intermediates of the divergence 3.
#
# Here the same run is planned under their settings: rows of 384 tokens, an average of the weights, mixed
# precision. The number of rows at a time is not in that report; later ones have 32 rows an optimizer
# step in 8 parts, so it is taken for 4. A GB is 10⁹ bytes in this table, and 2³⁰ nowhere else below.

# %%
from kdkit.config import load_config
from kdkit.memory.cards import find_card
from kdkit.memory.planning import Pair, plan_run

SAID = {"teacher weights": 4.5, "student weights": 0.5, "student's activations": 3.0}
SAID |= {"optimizer states": 2.0, "gradients": 1.5, "divergence": 3.0}
models = [f"teacher.path={shape_folder('huihui-moe-1b')}", f"student.path={shape_folder('smollm-135m')}"]
theirs = ["teacher.dtype=float32", "data.max_length=384", "optim.ema={decay: 0.999}", "evaluation.batch_size=4"]
seeds_config = load_config("moe-smollm", [*models, *theirs])
seeds = plan_run(seeds_config, find_card("p100")).worst
print(f"{'GB':>24}   said  planned")
for part in [*SAID, *(name for name in seeds.parts if name not in SAID)]:
    planned = max(parts.get(part, 0) for parts in seeds.phases.values()) / 1e9
    print(f"{part:>24} {SAID.get(part, 0) or '':>6} {planned:8.1f}")

# %% [markdown]
# - **Confirmed: the teacher and the student.** A teacher of 4.5 GB is 1.1 billion weights in float32;
#   half precision would have halved it at once.
# - **Near: the activations.** They hang on the rows at a time, which the report leaves out.
# - **Too much: the optimizer states.** Two moments of this student are little more than half of what was
#   said. The rest may be the average of the weights, as large as the student, which is not in the table.
# - **Cannot be: the gradients.** 135 million float32 numbers are 0.5 GB, not 1.5. AdamW's temporaries,
#   alive while it steps, are as much again, and by then the activations are gone.
# - **Missing**: the lines without a number in the second column. And parts do not peak together: a sum
#   of the largest says more than was ever there.
#
# And the divergence? The plan has far less of it than the report. That code had the logits of all
# positions: the teacher's and its probabilities, and the student's, its log-probabilities and their
# gradient.

# %%
pair = Pair.of(seeds_config)
tokens = seeds_config.optim.batch_size * seeds_config.data.max_length
whole = 4 * tokens * (2 * pair.teacher.vocab_size + 3 * pair.student.vocab_size)
print(f"{tokens:,} positions x {pair.teacher.vocab_size:,} and {pair.student.vocab_size:,} ids: {whole / 1e9:.1f} GB")
chunked = max(parts.get("divergence", 0) for parts in seeds.phases.values())
print(f"in chunks of {seeds_config.objective.chunk_tokens} positions: {chunked / 1e9:.1f} GB")
fullest = (seeds.peak_bytes + whole) / seeds.card.memory_bytes
print(f"the plan's peak is {seeds.used_fraction:.0%} of the card; with whole logits beside it {fullest:.0%}")

# %% [markdown]
# So the 3 GB were there, and need not have been: in chunks the divergence takes a fraction of them. The
# report's own remedy, to compare the 256 likeliest ids alone, comes after all logits have been formed.
# (96 to 98 % may well be what the allocator had reserved. It keeps what it once had, so such a figure is
# no lower bound of what a run needs.)
#
# ## The run of the settings above, on one card
#
# A bar for each phase of a step: the teacher's pass, the student's, the terms over hidden states, the
# way back, the optimizer's step, an evaluation. The solid line is the card, the dotted one 92 %
# of it, above which an estimate is no promise. What stays over all phases stands on the left.

# %%
from kdkit.memory.showing import plan_bars, plan_lines
from kdkit.notebook import show
from kdkit.plots import plot_memory

config = load_config(PRESET, [f"teacher.path={TEACHER}", f"student.path={STUDENT}", *CHANGES])
plan = plan_run(config, find_card(CARD))
show(plot_memory(plan_bars(plan.worst)))
print("\n".join(plan_lines(plan)))

# %% [markdown]
# The hours come from what the card's maker states and an assumed share of it: right in what is faster
# than what, and wrong by a factor of two or so. `kdkit plan --measured RUN` takes a run's own speed.
#
# ## Beside it: two cards
#
# Each T4 has less room than the P100, but there are two: the teacher takes one, and its bars leave the
# student's. No model is split: only what the terms look at goes from one card to the other.

# %%
two = load_config(PRESET, [f"teacher.path={TEACHER}", f"student.path={STUDENT}", *CHANGES, "teacher.device=cuda:1"])
plan_of_two = plan_run(two, find_card(BESIDE))
show(plot_memory(plan_bars(plan_of_two.worst)))
print("\n".join(plan_lines(plan_of_two)))

# %% [markdown]
# ## Which setting moves which part?
#
# Every move plans the run again. What to try:
#
# - **rows at a time** and **tokens a row** move the activations in proportion; with `attention=eager`,
#   which the matching of attention maps needs, length does it by its square.
# - **checkpointing** keeps one state a layer, and adds a forward pass.
# - **chunk** moves the divergence. Below some size only the gradient of the head is left.
# - **K** moves nothing that can be seen: a live teacher's logits are there before the K likeliest are
#   known. It counts where they are stored.
# - **teacher**: 4 bits save little here, since the stacked experts stay in half precision. A P100 has no
#   units for int8, which is then said below the figure.

# %%
from kdkit.widgets import memory_explorer

memory_explorer(config, [find_card(CARD), find_card(BESIDE)])

# %% [markdown]
# ## The fastest settings that fit
#
# `fit_run`, which is `kdkit plan --fit`, tries all of them. First what leaves the result as it is: how a
# step's rows are split, checkpointing, the chunk. Only where that is not enough
# does it give something up, and says what. The patch goes into the run's YAML file.

# %%
import yaml

from kdkit.memory.fit import fit_run

fit = fit_run(config, find_card(CARD))
print(yaml.safe_dump(fit.patch(), sort_keys=False))
print(f"given up: {'; '.join(fit.given_up) or 'nothing'}")
show(plot_memory(plan_bars(fit.plan.worst)))
print("\n".join(plan_lines(fit.plan)))

# %% [markdown]
# ## Other pairs
#
# Eight rows of 512 tokens, forward KL and soft-DTW, on the card of the settings: what the plan says, and
# what `fit_run` would set.

# %%
from kdkit.errors import UserError
from kdkit.memory.fit import as_settings

PAIRS = {"gpt2-xl": "gpt2", "qwen2.5-1.5b": "qwen2.5-0.5b", "qwen2.5-7b": "qwen2.5-0.5b"}
PAIRS |= {"llama-3.2-3b": "llama-3.2-1b", "huihui-moe-1b": "smollm-135m"}
for teacher, student in PAIRS.items():
    tree = {"preset": "fkl-dtw", "data": {"train": "train.jsonl", "validation": "validation.jsonl"}}
    tree |= {"teacher": {"path": str(shape_folder(teacher))}, "student": {"path": str(shape_folder(student))}}
    other = load_config(tree, ["optim.batch_size=8", "optim.max_steps=1000"])
    share = plan_run(other, find_card(CARD)).worst.used_fraction
    try:
        proposal = as_settings(fit_run(other, find_card(CARD)).changes)
    except UserError as error:
        proposal = str(error)
    print(f"{teacher} -> {student}: {share:.0%} of the card\n    {proposal or 'as it is'}")

# %% [markdown]
# ## Planned against measured
#
# The embedded pair learns for a few steps at several numbers of rows. On a card its tensors are counted
# by the allocator; on a CPU the growth of the process is looked at every two milliseconds, which has the
# allocator's gaps and the libraries' own buffers in it, some tens of MiB. So the last column is the one
# to read: **what each row more adds**, where all that stays the same falls out. The plan takes each row
# for as long as `data.max_length`; here that is four tokens more than the longest row has.

# %%
from kdkit.inspection import measured_peaks
from kdkit.memory.cards import card_here, card_of_budget

short = ["data.max_length=80", "data.max_prompt_length=72", "optim.precision=float32", "checkpoint.every_steps=1000"]
nothing_else = ["data.validation_rows=8", "data.test=null", "evaluation.batch_size=8", "evaluation.generate_rows=0"]
nothing_else += ["evaluation.every_steps=0", "evaluation.teacher=false", "evaluation.before=false"]
tree = {"preset": ["demo", "fkl"], "optim": {"max_steps": STEPS}}
runs = [load_config(tree, [*short, *nothing_else, f"optim.batch_size={rows}"]) for rows in BATCHES]
here = card_here() or card_of_budget(16)
measured = measured_peaks(runs)
planned = [plan_run(run, here).worst.tensor_bytes for run in runs]

# %% [markdown]
# Without context and slack, which are no tensors.

# %%
MIB = 2**20
print("rows   planned  measured   a row more: planned  measured   MiB")
for i, rows in enumerate(BATCHES):
    line = f"{rows:4} {planned[i] / MIB:9.0f} {measured[i] / MIB:9.0f}"
    if i > 0:
        more = MIB * (rows - BATCHES[i - 1])
        line += f" {(planned[i] - planned[i - 1]) / more:21.2f} {(measured[i] - measured[i - 1]) / more:9.2f}"
    print(line)

# %% [markdown]
# ## What this did not show
#
# - **A peak on a card.** No weight of the large pairs was loaded. Slack and context are allowances, and
#   another driver or allocator setting moves them by some hundred MiB: leave a tenth of the card free.
# - **Every family.** The activations of a layer are known by count for a few families; others are read
#   as if they were Llama.
# - **That a plan of 16 GB is a plan of your rows.** All rows are taken to be full. Shorter ones take
#   less, and one batch of long ones is enough to run out.
# - **Speed.** Seconds were looked up, not measured.
