"""The options of every command: one frozen dataclass each, a field a line; and their written form, TOML.

The command line fills them in this order: the defaults here, `--config recipe.toml`, flags.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from minimax_m1.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Backend = Literal["triton", "compiled", "torch", "reference"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
GpuName = Literal["a100-40gb", "a100-80gb", "h100", "h800", "h200", "b200", "l40s", "rtx4090"]  # of planning.GPUS
Quantization = Literal["int8", "int8-experts", "int4", "int4-g32", "int4-g64", "int4-g128"]
Text = Annotated[str, Parameter(allow_leading_hyphen=True)]  # such as -5 + 3


def option(default: Any, help: str) -> Any:
    """Return a dataclass field with its help text; `...` as the default makes it required, a dict is copied."""
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=dataclasses.MISSING if default is ... else default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model, and how it is held."""

    model: Path | None = option(None, "checkpoint folder; without it, the model that ships with the package")
    dtype: Dtype = option("auto", "of the weights in memory; auto: as in the checkpoint")
    quantization: Quantization | None = option(
        None, "round the weights to so many bits [default: as in the checkpoint]"
    )
    device: str = option("cpu", "where the model runs, as torch names it: cpu, cuda, cuda:1")
    backend: Backend | None = option(None, "kernels to run with; reference is the plain formula [default: fastest]")


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How many requests run together, and in how much memory."""

    max_batch_size: int = option(32, "sequences that run together")
    max_num_tokens: int = option(2048, "tokens of one step: the decoding sequences' and chunks of prompts")
    max_model_len: int | None = option(None, "most tokens of prompt and answer [default: what model and cache allow]")
    cache_bytes: int | None = option(None, "memory for keys, values and states [default: 40% of what is free]")
    prefix_cache: bool = option(True, "run what prompts have in common once")
    checkpoint_bytes: int | None = option(
        None, "memory for cached prefixes' states [default: a quarter of cache_bytes]"
    )
    checkpoint_every: int | None = option(
        None, "a checkpoint every so many prompt tokens, besides those at turns' ends"
    )
    speculative_tokens: int = option(0, "tokens drafted from the text itself at each step; 0: off")
    routing_log: bool = option(False, "count which experts each layer uses, for every request and in all")

    def __post_init__(self) -> None:
        least = {"max_batch_size": 1, "max_model_len": 2, "cache_bytes": 1, "checkpoint_bytes": 0}
        least |= {"checkpoint_every": 64, "speculative_tokens": 0, "max_num_tokens": self.max_batch_size + 64}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                why = " (max_batch_size + 64)" if name == "max_num_tokens" else ""
                raise UserError(f"{name}: {value} cannot be used; accepted: a whole number of at least {bound}{why}")


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(ModelSettings):
    """How the answer is drawn."""

    max_new_tokens: int = option(4096, "most tokens of one answer, thinking included")
    greedy: bool = option(False, "always the most probable token; the shipped model is greedy unless told otherwise")
    temperature: float | None = option(None, "0 is greedy [default: 1, or 0 with the shipped model]")
    top_p: float = option(0.95, "draw from the smallest set of tokens with this probability; 1: off")
    top_k: int = option(0, "draw from this many most probable tokens; 0: off")
    min_p: float = option(0.0, "drop tokens less probable than this share of the best one; 0: off")
    repetition_penalty: float = option(1.0, "above 1 discourages tokens that stand in the text already")
    max_thinking_tokens: int | None = option(None, "most tokens of thinking, 0 for none at all [default: no limit]")
    stop: tuple[str, ...] = option((), "texts that end the answer")
    seed: int | None = option(None, "the same seed draws the same answer")


@dataclass(frozen=True, kw_only=True)
class ChatSettings(SamplingSettings):
    """Options of `minimax-m1 chat`."""

    system: Text | None = option(None, "instruction that the whole conversation stands under")


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(SamplingSettings):
    """Options of `minimax-m1 generate`."""

    prompt: Text = option(..., "what to say to the model; - reads it from stdin")
    system: Text | None = option(None, "instruction that the prompt stands under")
    raw: bool = option(False, "continue the prompt as it is, without the chat template")
    quiet: bool = option(False, "leave out the thinking, which otherwise goes to stderr")


@dataclass(frozen=True, kw_only=True)
class ServeSettings(ModelSettings, EngineSettings):
    """Options of `minimax-m1 serve`."""

    model: Annotated[Path | None, Parameter(name=["--model", "--model-path"])] = option(
        None, "checkpoint folder; without it, the model that ships with the package"
    )
    served_model_name: str | None = option(None, "the model's id for clients [default: the folder's name]")
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 for every network this machine is in")
    port: int = option(8000, "port to listen on; 0: any that is free")
    api_key: str | None = option(None, "what clients must send; also MINIMAX_M1_API_KEY [default: nothing]")
    keys: Path | None = option(None, "TOML file of keys with their quotas")
    prices: Path | None = option(None, "TOML file of prices by input length [default: MiniMax's launch prices]")
    usage_db: Path | None = option(None, "SQLite file of the usage [default: in the user's state folder]")
    dynamic_batching: bool = option(True, "let requests join and leave at every step; without, one runs at a time")
    max_queue_size: int = option(256, "outputs that may wait beyond those that run; a request above gets 503")
    max_body_bytes: int = option(32 << 20, "most bytes of a request")
    thinking_budget: int | None = option(None, "most tokens of thinking, if a request does not say [default: no limit]")
    drain_seconds: float = option(30.0, "after SIGTERM, time for requests in flight to end before they are aborted")
    cors_origins: tuple[str, ...] = option((), "web origins that browsers may call from, such as https://a.example")
    access_log: bool = option(True, "one line of JSON on stderr for every request")

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"port": 0, "max_queue_size": 0, "max_body_bytes": 1, "thinking_budget": 0, "drain_seconds": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise UserError(f"{name}: {value} cannot be used; accepted: a number of at least {bound}")
        if self.port > 65535:
            raise UserError(f"port: {self.port} cannot be used; accepted: 0 to 65535")


@dataclass(frozen=True, kw_only=True)
class InfoSettings:
    """Options of `minimax-m1 info`."""

    model: str | None = option(None, "folder with a config.json, or a preset such as minimax-m1 [default: shipped]")
    cache_bytes: str | None = option(None, "show what fits into a cache of this size, such as 8GiB")
    max_batch_size: int = option(32, "sequences that are to run together in that cache")
    json: bool = option(False, "print one JSON object")

    def __post_init__(self) -> None:
        if self.max_batch_size < 1:
            raise UserError(f"max_batch_size: {self.max_batch_size} cannot be used; accepted: a whole number from 1")


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings:
    """Options of `minimax-m1 quantize`."""

    model: Path | None = option(None, "checkpoint folder; without it, the model that ships with the package")
    output: Path = option(..., "folder to write the smaller checkpoint to")
    quantization: Quantization = option("int8", "bits, and the inputs that share a scale; int4 is int4-g32")
    dtype: Dtype = option("auto", "of what is not quantized; auto: as in the checkpoint")
    overwrite: bool = option(False, "replace what is in the output folder")


@dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    """Options of `minimax-m1 convert`."""

    checkpoint: Path = option(..., "a training run, one of its checkpoints, or a model's folder that can be read")
    output: Path = option(..., "folder to write the model to")
    dtype: Dtype = option("auto", "of the weights; auto: as in the checkpoint, float32 in a run's")
    overwrite: bool = option(False, "replace the model in the output folder")


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """Options of `minimax-m1 merge`."""

    adapter: Path = option(..., "folder of a LoRA adapter, such as runs/lora/adapter")
    model: Path | None = option(None, "its base model [default: the one that the adapter names]")
    output: Path = option(..., "new folder for the merged checkpoint")
    dtype: Dtype = option("auto", "of the merged weights; auto: as in the base model")


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Options of `minimax-m1 report`."""

    output: Path | None = option(None, "file to write [default: report.html in the run; of several runs, compare.html]")


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """Options of `minimax-m1 bench`."""

    sizes: tuple[Literal["nano", "small"], ...] = option(("nano", "small"), "presets to measure on a CPU")
    quick: bool = option(False, "on a CPU: shorter and coarser, to see whether everything runs")
    only: tuple[str, ...] = option((), "cases to measure [default: all]")
    json: Path | None = option(None, "file to write the figures to")


@dataclass(frozen=True, kw_only=True)
class EvalSettings(ModelSettings):
    """Options of `minimax-m1 eval`."""

    problems: int = option(200, "unseen problems of each family")
    families: tuple[str, ...] = option((), "families to measure [default: all]")
    seed: int = option(0, "decides the problems")
    json: bool = option(False, "print one JSON object")
    show_errors: int = option(0, "wrong answers to print for each family")

    def __post_init__(self) -> None:
        if self.problems < 1:
            raise UserError(f"problems: {self.problems} cannot be used; accepted: a whole number of at least 1")


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """Options of `minimax-m1 plan`."""

    model: Annotated[str | None, Parameter(name=["--model", "--preset"])] = option(
        None, "folder with a config.json, or a preset such as minimax-m1 [default: shipped]"
    )
    gpu: GpuName = option("h100", "kind of GPU")
    num_gpus: int = option(8, "how many")
    tokens: float | None = option(None, "to train on, such as 1e12 [default: 20 for each active parameter]")
    sequence_length: int = option(4096, "tokens of a sequence")
    batch_tokens: int | None = option(None, "tokens of a step [default: a sequence for each GPU, at most 128Mi]")
    dtype: Literal["float32", "bfloat16"] = option("bfloat16", "of the products; weights and optimizer are float32")
    efficiency: float = option(0.4, "share of the GPU's peak that its products reach")
    margin: float = option(0.1, "share of the GPU's memory that is to stay free")
    price: float | None = option(None, "of a GPU-hour; without it no cost is shown")
    fit: Annotated[tuple[Path, ...], Parameter(consume_multiple=True)] = option(
        (), "fit the scaling law to runs instead: CSV or JSONL of parameters, tokens, loss, or folders of train"
    )
    budget: float | None = option(None, "with --fit: training FLOPs to divide [default: up to 100 times the runs']")
    compare: bool = option(False, "compare the FLOPs of generating with DeepSeek-R1's instead")
    plot: Path | None = option(None, "with --fit or --compare: file for the plot, such as plot.png")
    json: Path | None = option(None, "file to write the figures to")

    def __post_init__(self) -> None:
        for name in ("tokens", "price", "budget"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name}: {value} cannot be used; accepted: a number above 0")
        for name in ("num_gpus", "sequence_length", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}: {value} cannot be used; accepted: a whole number of at least 1")


def parse_bytes(name: str, value: int | str) -> int:
    """Return a number of bytes, given as such or with a unit: 8GiB, 512 MB, 1.5GiB.

    Args:
        name: of the setting, for the message.

    Raises:
        UserError: anything else, or not at least one byte.
    """
    match = re.fullmatch(r"([0-9]+|[0-9]*\.[0-9]+) ?([KMGT]i?B|B)?", str(value).strip())
    unit = match[2] if match else None
    scale = 1 if unit in (None, "B") else (1024 if "i" in unit else 1000) ** ("KMGT".index(unit[0]) + 1)
    size = round(Fraction(match[1]) * scale) if match and (unit or match[1].isdigit()) else 0
    if size < 1 or isinstance(value, bool):
        raise UserError(f"{name}: {value!r} cannot be used; accepted: bytes, or a number of KB, MB, GB, KiB, MiB, GiB")
    return size


# -- TOML ---------------------------------------------------------------------------------------------------------


def read_toml(path: Path) -> dict[str, Any]:
    """Return the content of a TOML file.

    Raises:
        UserError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config: cannot read {path}: {error.strerror}; a TOML file is needed") from None
    except ValueError as error:  # bad UTF-8 or bad TOML
        raise UserError(f"config: {path} is not TOML: {error}") from None


def to_toml(settings: Any) -> str:
    """Return a settings object as TOML that `read_toml` reads back; fields that are None are left out."""
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    return "".join(f"{name} = {_toml_value(value)}\n" for name, value in values.items() if value is not None)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, (str, Path)):
        return _toml_string(str(value))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_string(key)} = {_toml_value(item)}" for key, item in value.items()) + "}"
    assert isinstance(value, (tuple, list)), f"{value!r} has no form in TOML"
    return "[" + ", ".join(map(_toml_value, value)) + "]"


def _toml_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's, but for DEL
