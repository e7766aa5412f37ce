"""Small things that many test files need; nothing here reads the network or a GPU."""

import json
import sys

import emulated
import pytest
from tiny import make_pair, tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from traces import made_up_traces
from transformers import PreTrainedTokenizerFast

from kdkit import cli
from kdkit.cuda import Module
from kdkit.inspection import load_run_models, save_traces
from kdkit.losses import cuda
from kdkit.training.run import run_distillation

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "A naïve café owner sells crêpes and coffee for 12 euros.",
    "Please write a short answer to the question below.",
    "### Instruction:\nSay hello.\n\n### Response:\nHello there!",
    "All happy families are alike; each unhappy family is unhappy in its own way.",
)


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 ids: any text, no unknown token, an emoji in several tokens; pad is not end-of-text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="session")
def emulated_losses(tmp_path_factory):
    """The kernels of the losses on a CUDA driver whose device is the CPU, in blocks of five threads."""
    kernels = list(cuda.KERNELS.values())
    driver = emulated.build_driver(tmp_path_factory.mktemp("losses_driver"), cuda.SOURCE, kernels)
    return cuda.Launcher(Module(emulated.CUBIN, device=0, driver=str(driver)), most_threads=5)


@pytest.fixture
def kdkit(monkeypatch, capsys):
    """Calls the command line in this process; returns (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["kdkit", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory):
    """Folders of a random teacher and a random student."""
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def aligned_run(tiny_pair, tmp_path_factory):
    """A finished run with a dtw term, on one row in batches of one, so that a log row speaks of that row alone."""
    one_row = ("data.train_rows=1", "optim.scheduler=constant", "optim.warmup_steps=0", "evaluation.before=true")
    objective = {"kd": {"weight": 1.0}, "dtw": {"weight": 0.5, "band": 4}}
    config = tiny_config(tiny_pair, *one_row, objective=objective, batch_size=1, max_steps=2)
    return run_distillation(config, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="session")
def aligned_models(aligned_run):
    """Its models, loaded."""
    return load_run_models(aligned_run.folder)


@pytest.fixture(scope="session")
def trained_row(aligned_models):
    """Its training row as models read it: prompt, answer."""
    with open(aligned_models.config.data.train, encoding="utf-8") as file:
        row = json.loads(file.readline())
    answer = row["output"] if isinstance(row["output"], str) else row["output"][0]
    return f"{row['instruction']}\n{row['input']}\nAnswer:\n", answer


@pytest.fixture(scope="session")
def explorer_cells(aligned_run, trained_row, tmp_path_factory):
    """Sources of notebook cells: the first loads a run, each other shows the explorer it names."""
    traces = tmp_path_factory.mktemp("traces") / "threshold_sweep.json"
    save_traces(made_up_traces(), traces)
    prompt, answer = trained_row
    return {
        "models": f"from kdkit import widgets\nfrom kdkit.inspection import load_run_models\n"
        f"models = load_run_models({str(aligned_run.folder)!r})",
        "threshold": f"threshold = widgets.threshold_explorer({str(traces)!r})\nthreshold",
        "temperature": "temperature = widgets.temperature_explorer("
        f"models, [{{'prompt': {prompt!r}, 'references': [{answer!r}]}}])\ntemperature",
        "memory": "from kdkit import load_config\nfrom kdkit.memory.shapes import shape_folder\n"
        "paths = [f'teacher.path={shape_folder(\"huihui-moe-1b\")}', f'student.path={shape_folder(\"smollm-135m\")}']\n"
        "memory = widgets.memory_explorer(load_config('moe-smollm', paths))\nmemory",
        "alignment": f"alignment = widgets.alignment_explorer(models, {prompt!r}, {answer!r})\nalignment",
    }
