"""The commands as processes: what goes to stdout, what to stderr, and how a mistake ends."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minimax_m1 import shipped
from tests.e2e.conftest import ENVIRONMENT, PROGRAM, Command

TINY_RECIPE = """
output = "run"
steps = 4
warmup_steps = 1
decay_steps = 1
tokens_per_batch = 512
vocab_size = 400
eval_every = 0
export_dtype = "float32"
[mixture]
addition = 1
[model]
hidden_size = 32
intermediate_size = 32
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
attn_type_list = [0, 1]
num_local_experts = 2
"""


@pytest.mark.slow
def test_the_answer_alone_is_on_stdout(command: Command, tiny_checkpoint: Path) -> None:
    options = ("--model", tiny_checkpoint, "--max-new-tokens", 30, "--seed", 3)
    loud = command("generate", "--prompt", "2 plus 3", *options)
    quiet = command("generate", "--prompt", "2 plus 3", *options, "--quiet")
    assert loud.returncode == quiet.returncode == 0
    assert loud.stdout == quiet.stdout != ""
    assert quiet.stderr == ""
    assert "(stopped at --max-new-tokens 30)" in loud.stderr


@pytest.mark.slow
def test_raw_prompt_from_stdin(command: Command, tiny_checkpoint: Path) -> None:
    options = ("--model", tiny_checkpoint, "--max-new-tokens", 5, "--greedy", "--raw")
    piped = command("generate", "--prompt", "-", *options, stdin="2 plus 3")
    given = command("generate", "--prompt", "2 plus 3", *options)
    assert (piped.returncode, piped.stdout, piped.stderr) == (0, given.stdout, "")


def test_chat_line_by_line(command: Command, tiny_checkpoint: Path) -> None:
    lines = "2 plus 3\n\n/help\n/nonsense\n/reset\n2 plus 3\n/exit\nnever read\n"
    result = command("chat", "--model", tiny_checkpoint, "--max-new-tokens", 5, "--greedy", stdin=lines)
    assert (result.returncode, result.stderr) == (0, "")
    assert "1 lightning and 1 softmax layers" in result.stdout
    assert "\x1b" not in result.stdout
    assert "There is no command /nonsense" in result.stdout
    before, after = result.stdout.split("The conversation is forgotten.")
    assert before.count("5 tokens, ") == after.count("5 tokens, ") == 1
    # the same question, the same answer: nothing was remembered
    answer = after.split("\n(5 tokens")[0].strip("\n")
    assert answer and answer in before


@pytest.mark.slow
def test_chat_ends_with_its_input(command: Command, tiny_checkpoint: Path) -> None:
    result = command("chat", "--model", tiny_checkpoint, stdin="")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.slow
def test_odd_bytes_are_no_crash(tiny_checkpoint: Path) -> None:
    arguments = ["chat", "--model", str(tiny_checkpoint), "--max-new-tokens", "2"]
    result = subprocess.run(
        [*PROGRAM, *arguments], input=b"\xff\xfe\n", capture_output=True, env=ENVIRONMENT, check=False
    )
    assert (result.returncode, result.stderr) == (0, b"")


@pytest.mark.slow
def test_train_then_eval_then_generate(command: Command, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(TINY_RECIPE)
    trained = command("train", "--config", "recipe.toml")
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr.startswith("run/model: the model; ")
    measured = command("eval", "nano", "--model", "run/model", "--problems", 2, "--families", "addition", "--json")
    assert (measured.returncode, measured.stderr) == (0, "")
    assert json.loads(measured.stdout)["families"]["addition"]["problems"] == 2
    answered = command("generate", "--prompt", "1 + 1", "--model", "run/model", "--max-new-tokens", 3)
    assert answered.returncode == 0


# -- mistakes (more of them, without a process each, in tests/cli) ------------------------------------------------


def test_a_truncated_shard_is_one_line_and_status_2(command: Command, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "truncated"))
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    result = command("generate", "--prompt", "hi", "--model", folder)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("error: ") and "model.safetensors" in result.stderr


def test_an_unknown_flag_is_one_line_and_status_2(command: Command) -> None:
    result = command("chat", "--temprature", "1")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: Unknown option: --temprature. Did you mean --temperature?\n"


@pytest.mark.slow
def test_a_closed_pipe_is_no_traceback(tiny_checkpoint: Path) -> None:
    arguments = ["generate", "--prompt", "hi", "--model", str(tiny_checkpoint), "--quiet", "--max-new-tokens", "300"]
    process = subprocess.Popen([*PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 1
    process.stderr.close()


# -- the first impression -----------------------------------------------------------------------------------------


def test_help_does_not_wait_for_torch(record_property) -> None:
    code = (
        "import sys; sys.argv[1:] = ['--help']\n"
        "from minimax_m1.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    record_property(
        "help_seconds", time.perf_counter() - start
    )  # in the report of --junit-xml; not a matter of passing
    assert (result.returncode, result.stderr) == (0, "")
    assert "chat" in result.stdout


def test_the_installed_command() -> None:
    program = Path(sys.executable).with_name("minimax-m1")
    if not program.exists():
        pytest.skip("the package is not installed beside this interpreter")
    result = subprocess.run([program, "info", "--model", "nano"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_model_that_was_not_shipped_is_one_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    if (Path(shipped.__file__).parent / "checkpoints" / shipped.NAME).exists():
        pytest.skip("the model is there")
    result = command("generate", "--prompt", "hi")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
