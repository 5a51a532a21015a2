"""The front door: `trl-alp` and its commands."""

import os
import re
import subprocess
import sys

import pytest
import tiny

import trl_alp
from trl_alp.__main__ import main


def alone(*arguments):
    """In a process of its own; torch may not be imported."""
    script = (
        "import sys\nfrom trl_alp.__main__ import main\n"
        "try:\n    status = main(sys.argv[1:])\nexcept SystemExit as stopped:\n    status = stopped.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\nsys.exit(status)"
    )
    environment = os.environ | {"COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60, env=environment
    )


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--version"], 0, f"trl_alp {trl_alp.__version__}"),
        (["--help"], 0, "doctor"),
        (["doctor", "--help"], 0, "exit status: 0 healthy, 1 not healthy, 2 could not run"),
        (["report", "--help"], 0, "exit status: 0 all runs are on the page"),
        (["doctor", "/no/such/model", "--engine", "transformers"], 2, "there is no folder /no/such/model"),
        ([], 2, "COMMAND"),
    ],
)
def test_it_answers_without_torch(arguments, status, said):
    done = alone(*arguments)
    assert done.returncode == status and said in done.stdout + done.stderr, done.stderr


def test_the_report_needs_no_torch(tmp_path):
    (tmp_path / "alp").mkdir()
    (tmp_path / "alp" / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    done = alone("report", str(tmp_path))
    assert done.returncode == 0 and done.stdout.strip().endswith("index.html"), done.stderr


@pytest.mark.parametrize("command", ["doctor", "report"])
def test_help_shows_an_example_and_every_default(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert re.search(rf"examples:\n  trl-alp {command} ", text)
    optional = re.split(r"\n  (?=--)", text[text.index("\noptions:") :])[1:]
    told = "default|as JSON|write|draw|PEFT|vllm.LLM|tokenizer of|print no|candidates|may have instead"
    assert optional and all(re.search(told, option) for option in optional), optional


def test_commands_run_under_it_as_by_themselves(tmp_path, capsys):
    tiny.saved(tmp_path)
    arguments = [str(tmp_path), "--engine", "transformers", "--num-completions", "64", "--no-progress"]
    assert main(["doctor", *arguments, "--device", "cpu", "--max-tokens", "8"]) == 0
    assert capsys.readouterr().out.startswith("healthy: ")


def test_a_reader_that_has_enough_is_no_error_and_costs_no_file(tmp_path):
    """As in `trl-alp doctor ... | head -1`."""
    tiny.saved(tmp_path / "model")
    arguments = [str(tmp_path / "model"), "--engine", "transformers", "--num-completions", "64", "--max-tokens", "8"]
    arguments += ["--no-progress", "--device", "cpu", "--json", str(tmp_path / "out.json")]
    code = "import sys; from trl_alp.__main__ import main; sys.exit(main(['doctor', *sys.argv[1:]]))"
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 0 and "BrokenPipe" not in said, said
    assert (tmp_path / "out.json").is_file()


def test_every_public_name_is_found_and_others_are_not():
    for module in (trl_alp, __import__("trl_alp.doctor").doctor, __import__("trl_alp.report").report):
        for name in module.__all__:
            assert getattr(module, name).__name__ == name
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            module.nothing  # noqa: B018
