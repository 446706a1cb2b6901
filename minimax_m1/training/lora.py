"""LoRA: small trainable additions to frozen matrices, by peft, and their merging into the weights.

Shapes: a matrix W [out, in] becomes W + (alpha / r) B A with A [r, in] and B [out, r]; every expert has its own pair.
B begins as zeros, so that a run begins at the base model to the bit.
Source: LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from minimax_m1.errors import UserError
from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.training.settings import TrainSettings

if TYPE_CHECKING:
    from peft import LoraConfig

# Modules by their checkpoint names; attention has the first three in lightning layers, the others in softmax layers.
TARGET_MODULES = {
    "attention": ("qkv_proj", "output_gate", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"),
    "shared": ("gate_proj", "up_proj", "down_proj"),
}
EXPERT_PARAMETERS = ["experts.w13", "experts.w2"]
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what PeftModel, which wraps the network twice, calls it


def add_lora(model: MiniMaxM1ForCausalLM, settings: TrainSettings) -> None:
    """Add trainable low-rank additions to the matrices that the settings name, in place, and freeze all else.

    Embedding, head, norms and routers never get any. What is added is decided by `settings.seed`.

    The experts' additions cost more than their size: at each forward peft makes W + (alpha / r) B A of all experts of a
    layer, which is kept for the backward, and there its full gradient is computed: memory for one more copy of the
    experts unless activations are checkpointed, and 1.1 to 1.5 times the time of full training. Without `experts` among
    the targets no gradient of them is computed, and a step takes 0.75 to 0.8 times as long as full training.

    Raises:
        UserError: peft is missing; the model is quantized or has additions already, or has none of the targets; or its
            experts are divided over ranks, where peft's layout of their additions cannot follow.
    """
    from_peft = _peft()
    if "experts" in settings.lora_targets and settings.expert_parallel > 1:
        raise UserError(
            "lora_targets: 'experts' cannot be used with expert_parallel above 1; accepted: attention, shared"
        )
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    modules = [name for target in settings.lora_targets for name in TARGET_MODULES.get(target, ()) if name in present]
    parameters = EXPERT_PARAMETERS if "experts" in settings.lora_targets else None
    if not modules and not parameters:
        raise UserError(f"lora_targets: the model has none of {', '.join(settings.lora_targets) or 'them'}")
    config = from_peft.LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        target_modules=modules,
        target_parameters=parameters,
        base_model_name_or_path=str(settings.init.resolve()) if settings.init else None,
    )
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU, wherever the model is
        torch.manual_seed(settings.seed)
        _inject(model, config)


def save_lora(model: MiniMaxM1ForCausalLM, folder: str | Path) -> None:
    """Write the additions as peft does, for `PeftModel.from_pretrained`, `load_lora` and `minimax-m1 merge`.

    The base model's folder is recorded as an absolute path. Under torch.distributed every rank must call this; the
    first one writes.

    Raises:
        UserError: the folder cannot be written.
    """
    from_peft = _peft()
    weights = {PREFIX + name: _whole(tensor) for name, tensor in _additions(model).items()}
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    folder = Path(folder)
    config: LoraConfig = from_peft.LoraConfig(**{**_config(model).to_dict(), "inference_mode": True})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as unfinished:
            config.save_pretrained(unfinished)
            save_file(weights, Path(unfinished) / WEIGHTS_FILE, metadata={"format": "pt"})
            os.chmod(Path(unfinished) / WEIGHTS_FILE, (Path(unfinished) / CONFIG_FILE).stat().st_mode)
            for file in (WEIGHTS_FILE, CONFIG_FILE):
                os.replace(Path(unfinished) / file, folder / file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"lora: cannot write {folder}: {error}") from None


def load_lora(model: MiniMaxM1ForCausalLM, folder: str | Path) -> None:
    """Add the additions that a folder holds, in place; they can be trained further, all else is frozen.

    Raises:
        UserError: peft is missing, the folder is damaged or of another model, or the model is quantized or has
            additions already; the model may then be left with additions that do nothing.
    """
    folder = Path(folder)
    config = read_config(folder)
    config.inference_mode = False
    try:
        stored = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"adapter: cannot read {folder / WEIGHTS_FILE}: {error}") from None
    _inject(model, config)
    expected = {PREFIX + name: tensor for name, tensor in _additions(model).items()}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - stored.keys())]
    problems += [f"{name} has no place in the model" for name in sorted(stored.keys() - expected.keys())]
    problems += [
        f"{name} is {list(stored[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in stored and stored[name].shape != tensor.shape
    ]
    if problems:
        rest = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"adapter: {folder} is of another model: {problems[0].removeprefix(PREFIX)}{rest}")
    for name, tensor in expected.items():
        tensor.data = stored[name].to(device=tensor.device, dtype=tensor.dtype)


def merge_lora(model: MiniMaxM1ForCausalLM) -> None:
    """Add the additions to the weights, in place, and leave a plain model, still frozen.

    The sum is taken in float32 at least and rounded once to the weight's dtype.

    Raises:
        UserError: the model has no additions, or a sum is not finite; the model is then half merged.
    """
    tuner_layer = _peft_layer()
    _config(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, tuner_layer) and not isinstance(parent, tuner_layer):
                setattr(parent, name, _merge_module(child))
    del model.peft_config


def _merge_module(module: nn.Module) -> nn.Module:
    """Return the module inside, its weights with what the layers around it (one a parameter) add."""
    tuner_layer = _peft_layer()
    plain = module
    while isinstance(plain, tuner_layer):
        plain = plain.base_layer
    dtypes = {name: weight.dtype for name, weight in plain.named_parameters()}
    for tensor in module.parameters():
        tensor.data = tensor.data.to(torch.promote_types(tensor.dtype, torch.float32))
    while isinstance(module, tuner_layer):
        try:
            module.merge(safe_merge=True)
        except ValueError as error:  # what peft says of values that are not finite
            raise UserError(f"adapter: {error}") from None
        module = module.base_layer
    for name, weight in plain.named_parameters():
        weight.data = weight.data.to(dtypes[name])
    return plain


def read_config(folder: Path) -> LoraConfig:
    """Return what an adapter's adapter_config.json says.

    Raises:
        UserError: peft or the file is missing, or it is not of LoRA.
    """
    from_peft = _peft()
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.get("peft_type") != "LORA":
            raise UserError(f"adapter: {path} cannot be used; accepted: the config of a LoRA adapter, written by peft")
        return from_peft.LoraConfig.from_pretrained(str(folder))
    except OSError as error:
        raise UserError(f"adapter: cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError) as error:  # not JSON, or values that peft refuses
        if isinstance(error, UserError):
            raise
        raise UserError(f"adapter: {path} cannot be used: {error}") from None


def recorded_base(adapter: Path) -> Path:
    """Return the folder of the base model that an adapter names."""
    name = read_config(adapter).base_model_name_or_path
    if not name:
        raise UserError(f"model: {adapter} names no base model; give its folder")
    return Path(name)


def _inject(model: MiniMaxM1ForCausalLM, config: LoraConfig) -> None:
    """Put peft's layers around the matrices that `config` names; additions are float32 at least."""
    if model.config.quantization is not None:
        raise UserError("quantization: a quantized model cannot get LoRA additions; use the checkpoint of floats")
    if hasattr(model, "peft_config"):
        raise UserError("lora: the model has additions already; merge them first")
    try:
        _peft().inject_adapter_in_model(config, model)
    except ValueError as error:  # such as targets that the model does not have
        raise UserError(f"adapter: {error}") from None
    for tensor in _additions(model).values():
        tensor.data = tensor.data.to(torch.promote_types(tensor.dtype, torch.float32))


def _additions(model: nn.Module) -> dict[str, Tensor]:
    """Return the A and B of every matrix by their names in an adapter's file, but for `PREFIX`."""
    return {
        name.replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }


def _config(model: MiniMaxM1ForCausalLM) -> LoraConfig:
    if not hasattr(model, "peft_config"):
        raise UserError("lora: the model has no additions")
    configs: Any = model.peft_config
    return configs["default"]


def _whole(tensor: Tensor) -> Tensor:
    """Return all of a parameter, which may be divided over ranks, on the CPU."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()


def _peft() -> Any:
    """Return the package peft."""
    try:
        import peft
    except ImportError:
        raise UserError('lora: the package peft is missing; pip install "minimax-m1[lora]"') from None
    return peft


def _peft_layer() -> Any:
    """Return the class of every layer that peft puts around a module."""
    return _peft().tuners.tuners_utils.BaseTunerLayer
