"""Checkpoints in and out: safetensors in the official layout, streamed tensor by tensor.

A folder holds config.json and either model.safetensors or model.safetensors.index.json with its shards. Tensor names
are the official ones; the two spellings of Transformers' `minimax` port (on disk, and in memory with stacked experts)
are understood when reading. Quantized matrices have two tensors each (`quantization`).
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minimax_m1 import shipped
from minimax_m1.config import MiniMaxM1Config, QuantizationConfig
from minimax_m1.errors import UserError
from minimax_m1.kernels.quantized import QuantizedWeight
from minimax_m1.model import Gate, MiniMaxM1ForCausalLM
from minimax_m1.progress import progress_bar
from minimax_m1.quantization import (
    QuantizedModule,
    from_checkpoint,
    plan_quantized,
    quantize_weight,
    quantized_matrices,
    to_checkpoint,
)
from minimax_m1.settings import ModelSettings
from minimax_m1.tokenizer import MiniMaxM1Tokenizer

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
QUANTIZED_DTYPES = {"I8": torch.int8, "U8": torch.uint8}  # in safetensors; of quantized matrices alone


class Piece(NamedTuple):
    """Where the values of one official tensor lie."""

    file: Path
    source: str  # the tensor's name in the file
    part: tuple[int | slice, ...] | None  # the piece of it; None: all
    shape: tuple[int, ...]
    dtype: torch.dtype


# -- reading ------------------------------------------------------------------------------------------------------


def load_model(
    folder: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
    quantization: str | None = None,
) -> MiniMaxM1ForCausalLM:
    """Load a checkpoint folder; at no time is more in memory than the model and one tensor.

    Args:
        folder: config.json and safetensors; model_type minimax_m1, minimax_text_01, or minimax (Transformers).
        dtype: of the parameters; None or "auto" keeps each tensor's own. The router's stay at least in float32, as in
            the official checkpoint.
        device: where the parameters go.
        progress: show a bar on stderr.
        quantization: a name such as int8 (`config.QUANTIZATIONS`): the matrices are rounded to so many bits as they are
            read. None: the checkpoint as it is, quantized or not.

    Returns:
        The model, in eval mode.

    Raises:
        UserError: the folder, config.json, the index or a shard is missing or damaged; or tensors are missing,
            unexpected or of the wrong shape (all are listed at once); or the checkpoint is quantized in another way.
    """
    folder = Path(folder)
    wanted = parse_dtype(dtype)
    config = MiniMaxM1Config.from_pretrained(folder)
    stored, asked = config.quantization, None if quantization is None else QuantizationConfig.parse(quantization)
    if stored is not None and asked not in (None, stored):
        raise UserError(f"quantization: {quantization!r} cannot be used; {folder} is {stored.name} already")
    model, pieces = _plan(folder, config)
    if stored is None and asked is not None:
        plan_quantized(model, asked)
    _materialise(model, pieces, wanted, torch.device(device))
    state = model.state_dict()  # quantized matrices have no memory yet, and their entries are not used
    for module in model.modules():
        if isinstance(module, QuantizedModule):
            module.materialise(torch.device(device))
    matrices = quantized_matrices(model)
    names = sorted(state.keys() & pieces.keys(), key=lambda name: (pieces[name].file, name))
    for name in progress_bar(names, "Loading weights") if progress else names:
        if name in matrices:
            matrices[name].copy_(_read_quantized(name, pieces, matrices[name], asked if stored is None else None))
        elif name.removesuffix("_scale") not in matrices:  # a scale is read with its values
            state[name].copy_(_read(pieces[name]))
    return model.eval()


def load_checkpoint(settings: ModelSettings) -> tuple[MiniMaxM1ForCausalLM, MiniMaxM1Tokenizer]:
    """Load the model and the tokenizer that a command's settings name, with a progress bar.

    Raises:
        UserError: the checkpoint or the device cannot be used.
    """
    folder = shipped.find(settings.model)
    if not folder.is_dir():
        raise UserError(f"model: there is no folder {folder}; a checkpoint folder with config.json is needed")
    try:
        torch.empty(0, device=settings.device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise UserError(f"device: {settings.device!r} cannot be used: {str(error).splitlines()[0]}") from None
    tokenizer = MiniMaxM1Tokenizer.from_pretrained(folder)
    model = load_model(
        folder, dtype=settings.dtype, device=settings.device, progress=True, quantization=settings.quantization
    )
    return model, tokenizer


def _plan(folder: Path, config: MiniMaxM1Config) -> tuple[MiniMaxM1ForCausalLM, dict[str, Piece]]:
    """Return the network of a checkpoint on the meta device and where its tensors lie, held against each other."""
    with torch.device("meta"):
        model = MiniMaxM1ForCausalLM(config)
    if config.quantization is not None:
        plan_quantized(model, config.quantization)
    pieces = find_pieces(folder)
    _check_pieces(folder, pieces, model)
    return model, pieces


def _read_quantized(
    name: str, pieces: dict[str, Piece], like: QuantizedWeight, quantization: QuantizationConfig | None
) -> QuantizedWeight:
    """Read one matrix in the form of `like`: round it as `quantization` says, or (None) take it as it is stored."""
    if quantization is not None:
        return quantize_weight(_read(pieces[name]).to(like.tiles.device), quantization, name)
    values, scales = (_read(pieces[n]).to(like.tiles.device) for n in (name, f"{name}_scale"))
    return from_checkpoint(values, scales, like.size_in, like.group_size)


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the torch dtype of a name such as "bfloat16"; None for None and "auto".

    Raises:
        UserError: not a floating-point dtype that parameters can have.
    """
    if dtype is None or dtype == "auto":
        return None
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise UserError(f"dtype: {str(dtype)!r} cannot be used; accepted: auto, {', '.join(DTYPES)}")
    return found


def find_pieces(folder: Path) -> dict[str, Piece]:
    """Return where each official tensor of a checkpoint lies, from the headers of its files; reads no values.

    Raises:
        UserError: no weights, or an index or shard that is missing or damaged.
    """
    pieces: dict[str, Piece] = {}
    for path in _shards(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for source in file.keys():  # noqa: SIM118 - not a dict
                    header = file.get_slice(source)
                    shape, kind = tuple(header.get_shape()), header.get_dtype()
                    dtype = SAFETENSORS_DTYPES.get(kind) or QUANTIZED_DTYPES.get(kind)
                    if dtype is None:
                        raise UserError(f"{path}: {source} is {kind}; accepted: {', '.join(SAFETENSORS_DTYPES)}")
                    for name, part, part_shape in _official_parts(source, shape):
                        pieces[name] = Piece(path, source, part, part_shape, dtype)
        except (SafetensorError, OSError) as error:
            raise UserError(f"weights: cannot read {path}: {error}") from None
    return pieces


def _shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, each of them there."""
    if (folder / SINGLE_FILE).exists():
        return [folder / SINGLE_FILE]
    index = folder / INDEX_FILE
    if not index.exists():
        raise UserError(f"weights: {folder} has no {SINGLE_FILE} and no {INDEX_FILE}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"weights: {index} is not an index; needed: JSON with a weight_map of names to files") from None
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"weights: {folder} lacks {len(missing)} of {len(names)} shards: {_shorten(missing)}")
    return [folder / name for name in names]


def _official_parts(
    name: str, shape: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int | slice, ...] | None, tuple[int, ...]]]:
    """Yield (official name, part, its shape) of what a tensor of a file holds: itself, or stacked experts.

    Transformers' `minimax` keeps decay tables as buffers, which hold nothing to load, and has in memory
    `mlp.experts.gate_up_proj` [E, 2 I, hidden] and `mlp.experts.down_proj` [E, hidden, I] (transformers 5,
    conversion_mapping.py; on disk it writes the official names).
    """
    if name.endswith((".slope_rate", ".query_decay", ".key_decay", ".diagonal_decay", ".rotary_emb.inv_freq")):
        return
    name = re.sub(r"(layers\.\d+)\.mlp\.", r"\1.block_sparse_moe.", name)
    stacked = re.fullmatch(r"(.*\.experts\.)(gate_up_proj|down_proj)", name)
    if stacked is None or len(shape) != 3:
        yield name, None, shape
        return
    prefix, kind = stacked.groups()
    for expert in range(shape[0]):
        if kind == "down_proj":
            yield f"{prefix}{expert}.w2.weight", (expert,), shape[1:]
        else:
            width = shape[1] // 2
            yield f"{prefix}{expert}.w1.weight", (expert, slice(0, width)), (width, shape[2])
            yield f"{prefix}{expert}.w3.weight", (expert, slice(width, shape[1])), (shape[1] - width, shape[2])


def _check_pieces(folder: Path, pieces: dict[str, Piece], model: MiniMaxM1ForCausalLM) -> None:
    """Compare the checkpoint with the network, and name everything that does not fit in one error."""
    state = model.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    missing = sorted(expected.keys() - pieces.keys() - tied)
    unexpected = sorted(pieces.keys() - expected.keys())
    misshapen = [
        f"{name} {list(pieces[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in pieces and pieces[name].shape != shape
    ]
    of_other_type = [
        f"{name} {pieces[name].dtype}".replace("torch.", "")
        for name, tensor in state.items()
        if name in pieces and _kind(pieces[name].dtype) != _kind(tensor.dtype)
    ]
    found = [
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", misshapen),
        ("of another type", of_other_type),
    ]
    problems = [f"{len(names)} {what}: {_shorten(names)}" for what, names in found if names]
    if problems:
        raise UserError(f"weights: {folder} does not fit its config.json: " + "; ".join(problems))


def _kind(dtype: torch.dtype) -> torch.dtype | None:
    """What must agree between a checkpoint's tensor and the network's: any float will do, a whole number will not."""
    return None if dtype.is_floating_point else dtype


def _materialise(model: nn.Module, pieces: dict[str, Piece], dtype: torch.dtype | None, device: torch.device) -> None:
    """Give every parameter of a model on the meta device its (empty) memory, in its dtype."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # a tied parameter is made once
    for prefix, module in model.named_modules():
        for name, planned in list(module.named_parameters(recurse=False)):
            if planned not in made:
                kept = _checkpoint_dtype(f"{prefix}.{name}", pieces)
                if dtype is not None:
                    kept = torch.promote_types(dtype, torch.float32) if isinstance(module, Gate) else dtype
                memory = torch.empty_like(planned, dtype=kept, device=device)
                made[planned] = nn.Parameter(memory, planned.requires_grad)
            setattr(module, name, made[planned])


def _checkpoint_dtype(name: str, pieces: dict[str, Piece]) -> torch.dtype:
    """The dtype in the checkpoint of a parameter, a stack of experts included."""
    first_expert = re.sub(r"\.experts\.(w1|w2)3?$", r".experts.0.\1.weight", name)
    return pieces[first_expert].dtype


def _read(piece: Piece) -> Tensor:
    """Read one tensor. The file is opened each time: while it is, every page read of it counts as our memory."""
    try:
        with safe_open(piece.file, framework="pt") as file:
            return file.get_tensor(piece.source) if piece.part is None else file.get_slice(piece.source)[piece.part]
    except (SafetensorError, OSError) as error:
        raise UserError(f"weights: cannot read {piece.source} of {piece.file}: {error}") from None


# -- writing ------------------------------------------------------------------------------------------------------


def save_model(model: MiniMaxM1ForCausalLM, folder: str | Path, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write config.json and the weights under their official names; a later `load_model` gives the same bits.

    One file if it stays within `max_shard_bytes`, else shards with an index. Every file is written beside its place and
    moved there when all are complete, so that an interrupted save leaves an older checkpoint as it was. Weight files
    of an older checkpoint in the folder are removed.

    Raises:
        UserError: `max_shard_bytes` is not positive, or the folder cannot be written.
    """
    if max_shard_bytes <= 0:
        raise UserError(f"max_shard_bytes: {max_shard_bytes} cannot be used; accepted: a number above 0")
    folder = Path(folder)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]

    def write(path: Path, names: list[str]) -> None:
        save_file({name: state[name].contiguous() for name in names}, path, metadata={"format": "pt"})

    _write_folder(folder, model.config, model.dtype, state, max_shard_bytes, write)


def quantize_checkpoint(
    source: Path,
    folder: Path,
    quantization: QuantizationConfig,
    dtype: torch.dtype | str | None = None,
    progress: bool = False,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a checkpoint with its matrices in fewer bits, and copy what else lies in its folder.

    Loading it gives the same bits as loading the source with the same `quantization`.

    Each tensor is read, rounded and written on its own: no more is in memory than the largest of them twice, and some
    tens of MB. As with `save_model` an older checkpoint stays as it was until all is written.

    Args:
        dtype: of what is not quantized; None or "auto" keeps each tensor's own. The router's stays at least float32.

    Raises:
        UserError: the source cannot be used or is quantized already, or the folder cannot be written.
    """
    config, wanted = MiniMaxM1Config.from_pretrained(source), parse_dtype(dtype)
    if config.quantization is not None:
        raise UserError(f"quantization: {source} is {config.quantization.name} already; the float checkpoint is needed")
    model, pieces = _plan(source, config)
    plan_quantized(model, quantization)
    _materialise(model, pieces, wanted, torch.device("meta"))
    matrices, state = quantized_matrices(model), model.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    names = iter(progress_bar(list(state), "Quantizing") if progress else list(state))
    scales: dict[str, Tensor] = {}  # of a matrix just written; its name comes next

    def value(name: str) -> Tensor:
        if name in scales:
            return scales.pop(name)
        if name not in matrices:
            return _read(pieces[name]).to(state[name].dtype)
        values, scales[f"{name}_scale"] = to_checkpoint(quantize_weight(_read(pieces[name]), quantization, name))
        return values

    def write(path: Path, of_shard: list[str]) -> None:
        tensors = ((name, value(name)) for name in itertools.islice(names, len(of_shard)))
        _stream_file(path, {name: state[name] for name in of_shard}, tensors)

    of_weights = {"config.json", INDEX_FILE}
    others = [
        path
        for path in sorted(source.iterdir())
        if path.is_file() and path.suffix != ".safetensors" and path.name not in of_weights
    ]
    _write_folder(folder, model.config, model.dtype, state, max_shard_bytes, write, others)


def _stream_file(path: Path, planned: dict[str, Tensor], tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write a safetensors file tensor by tensor; `planned`, on the meta device, has their shapes and dtypes.

    The format: 8 bytes, the length of the header; the header, JSON; the values. The largest types lie first, so that
    each tensor is aligned, and are written at their place whatever the order they come in.
    """
    kinds = {dtype: kind for kind, dtype in {**SAFETENSORS_DTYPES, **QUANTIZED_DTYPES}.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(planned, key=lambda name: -planned[name].itemsize):
        tensor, begin = planned[name], end
        end += tensor.nbytes
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            like = planned[name]
            assert tensor.dtype == like.dtype and tensor.shape == like.shape, name
            tensor = tensor.contiguous()
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())))


def _write_folder(
    folder: Path,
    config: MiniMaxM1Config,
    dtype: torch.dtype,
    state: dict[str, Tensor],
    max_shard_bytes: int,
    write: Callable[[Path, list[str]], None],
    copied: Sequence[Path] = (),
) -> None:
    """Write config, index and, with `write`, the weight files, in the way `save_model` promises; copy other files."""
    shards = _plan_shards(state, max_shard_bytes)
    config = config.replace(extra={**config.extra, "torch_dtype": str(dtype).removeprefix("torch.")})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, names in shards.items():
            write(folder / f"{file}.part", names)
        others = {"config.json": config.to_dict()}
        if len(shards) > 1:
            others[INDEX_FILE] = _index(state, shards)
        for file, values in others.items():
            text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
            (folder / f"{file}.part").write_text(text, encoding="utf-8")
        for file in shards:  # safetensors makes files that only their owner may read
            shutil.copymode(folder / "config.json.part", folder / f"{file}.part")
        for path in copied:
            shutil.copyfile(path, folder / f"{path.name}.part")
        _put_in_place(folder, [*shards, *others, *(path.name for path in copied)])
    except (OSError, SafetensorError) as error:
        raise UserError(f"weights: cannot write {folder}: {error}") from None
    finally:
        for unfinished in folder.glob("*.part"):
            unfinished.unlink()


def _plan_shards(state: dict[str, Tensor], max_shard_bytes: int) -> dict[str, list[str]]:
    """Return file name -> tensor names, in the order of the network; a larger tensor has a shard of its own."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, tensor in state.items():
        if groups[-1] and filled + tensor.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += tensor.nbytes
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups, start=1)}


def _index(state: dict[str, Tensor], shards: dict[str, list[str]]) -> dict[str, Any]:
    total_size = sum(tensor.nbytes for tensor in state.values())
    weight_map = {name: file for file, names in shards.items() for name in names}
    return {"metadata": {"total_size": total_size}, "weight_map": weight_map}


def _put_in_place(folder: Path, files: list[str]) -> None:
    """Move the finished `.part` files to their names and remove weight files that are not among them."""
    for file in files:
        os.replace(folder / f"{file}.part", folder / file)
    for old in [*folder.glob("model*.safetensors"), folder / INDEX_FILE]:
        if old.name not in files:
            old.unlink(missing_ok=True)


def _shorten(names: list[str], most: int = 10) -> str:
    """Join names, at most so many."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
