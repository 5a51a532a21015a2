# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""The notebooks, executed at tiny size with the network cut off."""

import os
import re
from pathlib import Path

import nbformat
import pytest
import tiny
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from peft import LoraConfig, get_peft_model

from trl_alp import LayerwisePerturbation


FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
# A placeholder until the repository has a home; then:
# sed -i 's#OWNER/trl_alp#REAL/NAME#' notebooks/*.ipynb tests/test_notebooks.py
REPOSITORY = "OWNER/trl_alp"

# Attempts are counted as well as refused, since libraries swallow errors of the network. The kernel talks by ZeroMQ,
# which has sockets of its own.
CUT_OFF = """
import socket as _socket
_attempts = []
def _refuse(*arguments, **_):
    _attempts.append(arguments[-1:])
    raise OSError("a notebook at tiny size must not need the network")
_socket.socket.connect = _socket.socket.connect_ex = _socket.getaddrinfo = _refuse
"""
NOTHING_TRIED = "assert not _attempts, _attempts"


def read(name):
    return nbformat.read(FOLDER / name, as_version=4)


def execute(notebook, folder):
    """Run a notebook as a user's Jupyter would, offline; what the environment of tests or CI switches off (TRL's
    ping, for one) is left on, so that the notebook has to do it itself."""
    notebook.cells = [
        nbformat.v4.new_code_cell(CUT_OFF),
        *notebook.cells,
        nbformat.v4.new_code_cell(NOTHING_TRIED),
    ]
    switches = ("HF_HUB_", "TRL_", "CI")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(switches)}
    environment |= {"TRL_ALP_SIZE": "tiny", "TMPDIR": str(folder), "ACCELERATE_USE_CPU": "true"}
    client = NotebookClient(
        notebook, timeout=250, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute(env=environment)
    return notebook


def outputs(notebook, kind):
    return [out for cell in notebook.cells for out in cell.get("outputs", []) if kind in out.get("data", {})]


def files():
    return {path.name for path in FOLDER.iterdir()} - {".ipynb_checkpoints"}


def test_the_quickstart_notebook_runs_offline_and_draws_its_figures(tmp_path):
    before = files()
    notebook = execute(read("01_quickstart.ipynb"), tmp_path)
    assert len(outputs(notebook, "image/png")) == 3
    assert files() == before and len(list(tmp_path.glob("trl_alp_*/*/alp/metrics.jsonl"))) == 2


def test_the_gsm8k_notebook_runs_offline_on_a_cpu(tmp_path):
    before = files()
    notebook = execute(read("02_gsm8k_lora_colab.ipynb"), tmp_path)
    assert len(outputs(notebook, "image/png")) == 1
    assert files() == before and list(tmp_path.glob("trl_alp_*/**/adapter_model.safetensors"))


def test_under_fp16_autocast_with_fp32_weights_and_lora_the_noise_enters_in_fp32():
    """What the GSM8K notebook says of a T4, as far as a CPU can tell."""
    model = get_peft_model(tiny.model(), LoraConfig(target_modules="all-linear"))
    perturbation = LayerwisePerturbation(model, noise_scale="rms", sigma_init=1e-4)
    with perturbation.applied(seed=0), torch.autocast("cpu", dtype=torch.float16):
        model(torch.arange(40).reshape(2, 20)).logits.float().mean().backward()
    assert perturbation.hidden_dtype == torch.float32
    assert (perturbation.effective_noise() - 1).abs().max() < 0.05
    assert perturbation.log_sigma.grad.isfinite().all()


@pytest.mark.slow
def test_the_diagnosing_notebook_runs_offline_and_names_both_planted_faults(tmp_path):
    before = files()
    notebook = execute(read("03_diagnose_your_run.ipynb"), tmp_path)
    assert len(outputs(notebook, "image/png")) == 4
    printed = "".join(out["text"] for cell in notebook.cells for out in cell.get("outputs", []) if "text" in out)
    assert "sound: healthy" in printed and "never synced: weights:" in printed
    assert re.search(r"^sampling: .*top_k=5", printed, re.MULTILINE)
    assert files() == before and list(tmp_path.glob("trl_alp_*/report/index.html"))


def test_a_cell_that_asks_for_the_network_is_noticed_even_if_it_hides_the_error(tmp_path):
    hiding = """
import urllib.request
try:
    urllib.request.urlopen("http://127.0.0.1:9/")
except OSError:
    pass
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(hiding)])
    with pytest.raises(CellExecutionError, match="AssertionError"):
        execute(notebook, tmp_path)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_stored_without_outputs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None and not cell.metadata, cell.source


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_open_in_colab_and_install_there_alone(name):
    first, install, *others = read(name).cells
    badge = f"](https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{name})"
    assert first.cell_type == "markdown" and badge in first.source
    (line,) = [line for line in install.source.splitlines() if "pip install" in line and "%" in line]
    assert line.startswith("    %pip install") and f'@ git+https://github.com/{REPOSITORY}"' in line
    assert 'if "google.colab" in sys.modules:' in install.source
    for cell in others:
        assert cell.cell_type == "markdown" or not re.search(r"^\s*[%!]", cell.source, re.MULTILINE), cell.source
    everything = "\n".join(cell.source for cell in (first, install, *others))
    assert "TRL_ALP_SIZE" in everything
    for repository in re.findall(r"(?:github\.com|/github)/([\w.-]+/[\w.-]+)", everything):
        assert repository.removesuffix(".git") in (REPOSITORY, "huggingface/trl"), repository


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_documents_and_notebooks_named_in_a_notebook_exist(name):
    text = "\n".join(cell.source for cell in read(name).cells)
    for document in re.findall(r"`(docs/[\w./-]+)`", text):
        assert (FOLDER.parent / document).is_file(), document
    for other in re.findall(r"`(\d\d_\w+\.ipynb)`", text):
        assert (FOLDER / other).is_file(), other
