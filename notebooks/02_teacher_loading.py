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
# # Which teacher fits this machine and this student?
#
# Before a step of training, four things decide whether a pair works, and each can fail without a word:
#
# 1. **Dtype**: does the teacher fit into memory, and are its answers in that dtype still its own?
# 2. **Head**: can its logits be had from its last hidden states, a few positions at a time?
# 3. **Experts**: in a mixture-of-experts (MoE) teacher, who reads what, and are its experts ever unused?
# 4. **Tokenizer**: do its ids mean what the student's ids mean, and if not, where do the two meet?
#
# At the end a student that shares nothing with its teacher but the text learns from it. As it stands
# this is the pair that comes with the package: no network, no GPU, less than five minutes.

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
# The only cell to change. `PAIR` is a preset of an MoE teacher and a student with another tokenizer:
# `demo-moe` is the embedded pair; `moe-smollm` is Huihui-MoE-1B → SmolLM-135M, for a card of about
# 16 GB and the internet (or models and rows attached). `SIZE` sets how many rows are read and the
# optimizer steps at the end. With two cards the teacher has the second one to itself.

# %% tags=["parameters"]
PAIR = "moe-smollm" if session.suits("moe-smollm") else "demo-moe"
SIZE = os.environ.get("KDKIT_SIZE", "5 minutes")  # or "1 hour"
OBJECTIVE = "fkl"  # or "span", "fkl-dtw": what the student learns from the teacher at the end
CHANGES = ["teacher.device=cuda:1"] if session.machine.num_devices > 1 else []  # what `kdkit distill --set` takes
RUN = Path("runs") / f"02_teacher_loading-{PAIR}-{SIZE.replace(' ', '-')}"

ROWS = {"smoke": 20, "5 minutes": 400, "1 hour": 400}[SIZE]
STEPS = {"smoke": 3, "5 minutes": 100, "1 hour": 500}[SIZE]
TEST_ROWS = {"smoke": 6, "5 minutes": 150, "1 hour": 300}[SIZE]

# %% [markdown]
# ## Which dtype does this machine compute in?
#
# `preflight` ran one small operation: a card can be visible and still have no kernels in this build of
# torch, and then the first real operation dies. A P100 needs a build for CUDA 12.6 or older; `begin`
# above would have stopped and said which.
#
# `usable_dtype` asks for bfloat16 **units**. `torch.cuda.is_bf16_supported()` also counts emulation,
# which a P100 and a T4 have and which is very slow. A CPU computes in float32.

# %%
from kdkit.inspection import nf4_obstacle
from kdkit.runtime import usable_dtype

machine = session.machine
here = usable_dtype(machine.device, machine.capability)
print(f"here ({machine.name}): {here.dtype}; {here.reason}")
for card, capability in {"P100": (6, 0), "T4": (7, 5), "A100": (8, 0)}.items():
    choice = usable_dtype("cuda", capability)
    print(f"{card}: {choice.dtype}; {choice.reason}")
obstacle = nf4_obstacle(machine)
print(f"4 bits (nf4): {'left out, ' + obstacle if obstacle else 'will be tried below'}")

# %% [markdown]
# ## How large is the teacher in each dtype?
#
# Counted on shapes; no weight is read. In 4 bits a weight takes half a byte, and each block of 64 a
# scale of four bytes. But transformers packs **linear layers alone**. It keeps the experts of an MoE
# block as one stacked parameter, and these stay in half precision: 4 bits save little on an MoE.
#
# The second model is the real pair's teacher. Where it cannot be reached, a config of its class stands
# in: 24 layers of width 1,024, 8 experts and 151,936 ids, as recorded runs of that pair report;
# attention as in Qwen3-0.6B, and experts so wide that all weights together are about a billion.

# %%
from transformers import Qwen3MoeConfig

from kdkit.attached import find_model
from kdkit.config import demo_folder
from kdkit.inspection import read_config, weight_rows
from kdkit.notebook import show
from kdkit.plots import plot_weights

REAL = "huihui-ai/Huihui-MoE-1B-A0.6B"
LAYERS = {"num_hidden_layers": 24, "hidden_size": 1024, "vocab_size": 151_936, "tie_word_embeddings": True}
ATTENTION = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
EXPERTS = {"num_experts": 8, "moe_intermediate_size": 1280}
reachable = session.has_internet or find_model(REAL) is not None
real = read_config(REAL) if reachable else Qwen3MoeConfig(**LAYERS, **ATTENTION, **EXPERTS)
name = "Huihui-MoE-1B" if reachable else "A 1 B MoE of its class"
embedded = read_config(demo_folder() / "moe_teacher")
show(plot_weights({"The embedded MoE teacher": weight_rows(embedded), name: weight_rows(real)}))

# %% [markdown]
# Weights are not all: the student has weights, gradients and two moments of the optimizer in float32,
# 16 bytes a parameter, and activations come on top.
#
# ## What does half precision do to its answers?
#
# The teacher reads the same validation rows in each dtype. `finite` is the check that a run makes on
# its first batch: a model trained in bfloat16 can overflow in float16, whose largest number is 65,504.
# `KL` is how far the distribution over the next token moves away from that of float32, in nats a
# token; what a student has yet to learn is some 0.1 to 5 of them.

# %%
from kdkit.config import load_config
from kdkit.inspection import pair_tokenizers, precision_rows, sample_batch

config = load_config({"preset": [PAIR, "fkl"]}, CHANGES)
student_tokenizer, teacher_tokenizer = pair_tokenizers(config)
batch = sample_batch(config, teacher_tokenizer, num_rows=8)
dtypes = ["float32", "float16", "bfloat16", *([] if obstacle else ["nf4"])]
print(f"{'dtype':>9}  finite  largest error of a logit  KL, nats a token  same most likely token")
for row in precision_rows(config.teacher.path, batch, machine, dtypes=dtypes):
    if row["finite"]:
        figures = f"{row['largest_error']:25.3f} {row['mean_kl']:17.2g} {row['same_top_fraction']:23.1%}"
    print(f"{row['dtype']:>9}  {row['finite']!s:>6}  {figures if row['finite'] else row['problem']}")

# %% [markdown]
# ## Can its head be taken apart?
#
# Logits of all positions and the whole vocabulary are what fills a card. If the head can be had apart
# from the backbone, they are made for a few positions at a time. `check_head` proves by numbers that
# head(backbone) gives the model's own logits, also at the size at which a softcap would bend them.
# Where it does not, the reason is printed, and a run takes the model's own logits.

# %%
from kdkit.loading import check_head, describe_model, head_of, load_teacher

teacher = load_teacher(config.teacher, machine)
about, head = describe_model(teacher), check_head(teacher)
print(f"{about.architecture}: {about.num_parameters:,} parameters, {about.dtype} on {about.device}")
print("the head is proved apart" if head is None else f"own logits needed: {head}")
if head is None:
    num_ids, width = head_of(teacher).weight.shape
    positions, gib = len(batch["positions"]), len(batch["positions"]) * num_ids * 4 / 2**30
    print(f"{num_ids:,} ids x {width}; logits of these {positions} positions would take {gib:.3f} GiB in float32")

# %% [markdown]
# ## Which experts are used?
#
# In each block a router sends a token to a few experts. If it sends all tokens to the same ones, the
# others are memory for nothing, and a loss that matches experts has nothing to match. Below: how the
# tokens of the validation rows are spread, layer by layer.

# %%
from kdkit.inspection import expert_shares
from kdkit.plots import plot_expert_shares

shares = expert_shares(teacher, sample_batch(config, teacher_tokenizer, num_rows=ROWS))
show(plot_expert_shares(shares))

# %% [markdown]
# ### Word by word
#
# One row, its prompt and its answer. Dark: the word's tokens went to this expert with most of their
# weight. Four layers at most are shown, from the first on.

# %%
from kdkit.inspection import sample_rows, word_experts
from kdkit.plots import plot_word_experts

rows = sample_rows(config, teacher_tokenizer, num_rows=ROWS).dataset
row = min(rows.select(range(min(len(rows), 20))), key=lambda row: len(row["prompt"]))
layers = list(shares)[:: -(-len(shares) // 4)]
routed = word_experts(teacher, teacher_tokenizer, row["prompt"] + row["references"][0], layers=layers)
show(plot_word_experts(routed.words, routed.gates, layers=routed.layers))

# %% [markdown]
# ### Are these the experts' real outputs?
#
# The routing loss learns from each expert's own output, taken from its slice of the weights. Weighted
# by the router's gates and added up, the shared expert included, they must be what the block gives
# out. The largest difference, as a fraction of the largest number:

# %%
from kdkit.inspection import gated_sum_errors

errors = gated_sum_errors(teacher, batch)
print(", ".join(f"layer {layer}: {error:.1g}" for layer, error in errors.items()))
del teacher  # the run loads its own

# %% [markdown]
# ## Do teacher and student mean the same by an id?
#
# **same**: one vocabulary. **padded**: the same ids, and one side has reserved ones at its end; the
# shared ones can be compared. **different**: id 500 is one word here and another there; comparing
# them, or cutting the longer vocabulary, teaches nonsense without an error. It is proved on texts, not
# taken from names. Three pairs: the embedded dense teacher and its student, the same with a reserved
# token added to the student's, and the pair above.

# %%
from kdkit.data.spans import tokenizer_relation

dense = load_config({"preset": ["demo", "fkl"]})
(own, theirs), (padded, _) = pair_tokenizers(dense), pair_tokenizers(dense)
padded.add_special_tokens({"additional_special_tokens": ["<reserved_0>"]})
compared = {"dense teacher": (theirs, own), "a reserved token": (theirs, padded)}
compared[PAIR] = (teacher_tokenizer, student_tokenizer)
for name, (a, b) in compared.items():
    relation = tokenizer_relation(a, b)
    print(f"{name}: {relation.kind}; {relation.evidence}")

# %% [markdown]
# ### Where the two meet
#
# Both read the same bytes. A span is the smallest stretch at whose both ends a token of either side
# ends: there, and only there, both models have read the same and can be asked what comes next.

# %%
from kdkit.inspection import compare_tokenizers, read_spans
from kdkit.plots import plot_spans

pair = compare_tokenizers(student_tokenizer, teacher_tokenizer, [row["references"][0] for row in rows])
print(f"{pair.twin_fraction:.0%} of the student's {pair.student_ids:,} ids have a twin of the same bytes")
print(f"{pair.num_spans:,} spans in {len(rows)} answers; {pair.twin_span_fraction:.0%} are one token on either side")
print(f"tokens a span: student {pair.student_tokens_per_span:.2f}, teacher {pair.teacher_tokens_per_span:.2f}")
show(plot_spans(read_spans(row["references"][0], student_tokenizer, teacher_tokenizer)))

# %% [markdown]
# ## Does the student learn from it?
#
# **Before**: labels alone. **After**: as many steps more with `OBJECTIVE`, from where that ended. `fkl`
# compares groups of tokens that may begin the same text, wherever a span begins, and how likely both
# models find the span. `span` leaves the first part out and has the labels beside it. On the embedded
# pair (one seed, 100 steps, 150 test rows; the start has ROUGE-L 18.5 and perplexity 12.6):
#
# | from the same start | ROUGE-L | perplexity |
# |---|---|---|
# | `fkl` | 38.2 | 4.4 |
# | labels alone | 41.0 | 4.0 |
# | `span` | 41.6 | 3.9 |
# | tokens of equal bytes alone (`objective.kd.across=hybrid`, `objective.span.weight=0`) | 18.4 | 85 |
#
# The last line is why it has to be groups and spans: in 39 of 100 spans the two first tokens are not
# the same bytes, and the tokens within a span would be taught by nobody.

# %%
from kdkit.session.runs import start_or_resume

COMMON = [*CHANGES, f"data.test_rows={TEST_ROWS}", "evaluation.every_steps=0", "logging.every_steps=5"]
sft = {"preset": [PAIR, "sft"], "optim": {"max_steps": STEPS}}
quiet = ["evaluation.generate_rows=0", "evaluation.teacher=false", "evaluation.before=false", "data.validation_rows=32"]
before = start_or_resume(load_config(sft, [*COMMON, *quiet, "data.test=null"]), RUN / "before", session=session)

# %% [markdown]
# `kd` is in nats a span, `span` in nats a token of the student.

# %%
from_before = [f"student.path={before.model}", "student.from_scratch=false"]
distil = {"preset": [PAIR, OBJECTIVE], "optim": {"max_steps": STEPS}}
few = ["evaluation.teacher=true", "data.validation_rows=50"]
after = start_or_resume(load_config(distil, [*COMMON, *few, *from_before]), RUN / "after", session=session)

# %% [markdown]
# ### Before, after, teacher
#
# On test rows that nobody trained on. Perplexity is each model's own, a token, and student and teacher
# cut a text into different tokens: compare before with after, not either with the teacher.

# %%
from kdkit.notebook import LABELS
from kdkit.plots import plot_comparison, plot_training
from kdkit.report import comparison_table
from kdkit.training.folder import RunFolder

logged = [entry for entry in RunFolder(after.folder).metrics.rows() if entry["kind"] == "train"]
show(plot_training(logged))
comparison = [{"model": label, **after.evaluations[name]} for name, label in LABELS.items()]
display(comparison_table(comparison))
show(plot_comparison(comparison, student="after", baseline="before"))

# %% [markdown]
# ## What this did not show
#
# - **That the teacher made the difference.** "After" has had twice the steps of "before", and labels
#   alone went further in so few. A pair that trains is not yet one that pays: the README compares over
#   seeds, on more steps and on the teacher's answers.
# - **Memory in use.** Weights are counted above; activations, the optimizer's state and generation
#   are not.
# - **nf4's loss of accuracy**, where no GPU was there to try it on; nor how slow each dtype is.
# - **That an expert is for something.** A word's expert is where the router sends it, which need not
#   be anything that has a name.
# - **The real pair.** On a CPU a config of its class was counted; its own dtypes, experts and spans
#   are seen where `PAIR` is `moe-smollm`.
