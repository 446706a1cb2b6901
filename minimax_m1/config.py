"""The checkpoint's config.json as one frozen, validated object; field names are Hugging Face's."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minimax_m1.errors import UserError

LIGHTNING, SOFTMAX = 0, 1  # the values of attn_type_list

# `minimax` is the Transformers port of the same network: other keys and tensor names, translated on reading.
MODEL_TYPES = ("minimax_m1", "minimax_text_01", "minimax")

QUANTIZATIONS = ("int8", "int8-experts", "int4", "int4-g32", "int4-g64", "int4-g128")
GROUP_SIZES = (32, 64, 128)
INT4_GROUP_SIZE = 32  # of plain "int4": docs/benchmarks.md has what the others lose


@dataclass(frozen=True)
class QuantizationConfig:
    """How weights are stored in fewer bits: `quantization_config` of a config.json.

    Raises:
        UserError: a value that is not known; the message names it and what is accepted.
    """

    bits: int  # 8 or 4
    group_size: int | None = None  # 4 bits: input columns that share a scale; 8 bits: None, one scale an output
    modules: str = "all"  # every matrix but embedding, head, router and shared expert's coefficient; or "experts"

    def __post_init__(self) -> None:
        _require(self.bits in (8, 4), "quantization_config.bits", self.bits, "8 or 4")
        groups = (None,) if self.bits == 8 else GROUP_SIZES
        accepted = "null with 8 bits" if self.bits == 8 else f"{', '.join(map(str, groups))} with 4 bits"
        _require(self.group_size in groups, "quantization_config.group_size", self.group_size, accepted)
        _require(self.modules in ("all", "experts"), "quantization_config.modules", self.modules, "all or experts")

    @classmethod
    def parse(cls, name: str) -> QuantizationConfig:
        """Return what a name such as int8, int8-experts, int4 or int4-g64 stands for.

        Raises:
            UserError: no such name.
        """
        found = re.fullmatch(r"int(?:(8)|4(?:-g(32|64|128))?)(-experts)?", name)
        if found is None:
            raise UserError(f"quantization: {name!r} cannot be used; accepted: {', '.join(QUANTIZATIONS)}")
        modules = "experts" if found[3] else "all"
        return cls(8, None, modules) if found[1] else cls(4, int(found[2] or INT4_GROUP_SIZE), modules)

    @property
    def name(self) -> str:
        """The name that `parse` understands."""
        groups = "" if self.group_size is None else f"-g{self.group_size}"
        return f"int{self.bits}{groups}" + ("-experts" if self.modules == "experts" else "")

    @classmethod
    def from_dict(cls, values: Any) -> QuantizationConfig:
        """Read `quantization_config` of a config.json.

        Raises:
            UserError: not ours, or a value that is not known.
        """
        method = values.get("quant_method") if isinstance(values, Mapping) else values
        _require(method == "minimax_m1", "quantization_config.quant_method", method, '"minimax_m1"')
        return cls(**{name: values.get(name) for name in ("bits", "group_size")}, modules=values.get("modules", "all"))

    def to_dict(self) -> dict[str, Any]:
        """Return the `quantization_config` of a config.json."""
        return {"quant_method": "minimax_m1", **dataclasses.asdict(self)}


@dataclass(frozen=True)
class MiniMaxM1Config:
    """Architecture of a MiniMax-M1 type network.

    Sizes default to those of MiniMax-M1-40k and -80k; `postnorm`, the alphas and the betas default, as in the official
    code, to a plain pre-norm residual (M1's own config.json states them; so does `preset("minimax-m1")`). Every field
    of the official config.json is a field here under the same name. Keys that we do not know are kept in `extra` and
    written back, so that reading and saving a config loses nothing. `dynamic_gate` is ours.

    Raises:
        UserError: a value that cannot describe a network; the message names the field, the value and what is accepted.
    """

    vocab_size: int = 200_064
    hidden_size: int = 6144
    intermediate_size: int = 9216  # width of one expert
    num_hidden_layers: int = 80
    num_attention_heads: int = 64
    num_key_value_heads: int = 8  # softmax layers only; a lightning layer has num_attention_heads of each
    head_dim: int | None = None  # None: hidden_size / num_attention_heads (M1 states 128)
    rotary_dim: int | None = None  # leading dimensions of a head that are rotated; None: all of head_dim
    attn_type_list: tuple[int, ...] | None = None  # 0 lightning, 1 softmax; None: every eighth layer is softmax
    num_local_experts: int = 32
    num_experts_per_tok: int = 2
    shared_intermediate_size: int = 0  # width of the expert that every token uses; 0: there is none
    shared_moe_mode: str = "sigmoid"
    dynamic_gate: bool = False  # router logits divided by exp(temperature), one learned temperature a layer
    postnorm: bool = False  # True: the residual is the normed input
    layernorm_linear_attention_alpha: float = 1.0
    layernorm_linear_attention_beta: float = 1.0
    layernorm_full_attention_alpha: float = 1.0
    layernorm_full_attention_beta: float = 1.0
    layernorm_mlp_alpha: float = 1.0
    layernorm_mlp_beta: float = 1.0
    rms_norm_eps: float = 1e-5
    hidden_act: str = "silu"
    rope_theta: float = 10_000_000
    max_position_embeddings: int = 10_240_000
    sliding_window: int | None = None  # softmax layers: a token sees this many last tokens, itself included
    attention_dropout: float = 0.0
    router_aux_loss_coef: float = 0.001
    router_jitter_noise: float = 0.0
    output_router_logits: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    model_type: str = "minimax_m1"
    architectures: tuple[str, ...] = ("MiniMaxM1ForCausalLM",)
    extra: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.head_dim is None:
            _require(
                _is_count(self.hidden_size)
                and _is_count(self.num_attention_heads)
                and self.hidden_size % self.num_attention_heads == 0,
                "hidden_size",
                self.hidden_size,
                f"a multiple of num_attention_heads ({self.num_attention_heads}), or state head_dim",
            )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.rotary_dim is None:
            object.__setattr__(self, "rotary_dim", self.head_dim)
        if self.attn_type_list is None:
            object.__setattr__(self, "attn_type_list", hybrid_pattern(self.num_hidden_layers))
        object.__setattr__(self, "attn_type_list", tuple(self.attn_type_list))  # type: ignore[arg-type]
        object.__setattr__(self, "architectures", tuple(self.architectures or ()))
        self._validate()

    def _validate(self) -> None:
        for name in _COUNTS:
            _require(_is_count(getattr(self, name)), name, getattr(self, name), "a whole number of at least 1")
        for name in _NUMBERS:
            _require(_is_number(getattr(self, name)), name, getattr(self, name), "a number")
        for name in _SWITCHES:
            _require(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        types = self.attn_type_list
        assert types is not None and self.head_dim is not None and self.rotary_dim is not None
        _require(
            len(types) == self.num_hidden_layers and all(t in (LIGHTNING, SOFTMAX) for t in types),
            "attn_type_list",
            list(types),
            f"num_hidden_layers ({self.num_hidden_layers}) values, each 0 (lightning) or 1 (softmax)",
        )
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_attention_heads",
            self.num_attention_heads,
            f"a multiple of num_key_value_heads ({self.num_key_value_heads})",
        )
        _require(
            self.rotary_dim % 2 == 0 and self.rotary_dim <= self.head_dim,
            "rotary_dim",
            self.rotary_dim,
            f"an even number up to head_dim ({self.head_dim})",
        )
        _require(
            self.num_experts_per_tok <= self.num_local_experts,
            "num_experts_per_tok",
            self.num_experts_per_tok,
            f"1 to num_local_experts ({self.num_local_experts})",
        )
        _require(
            isinstance(self.shared_intermediate_size, int) and self.shared_intermediate_size >= 0,
            "shared_intermediate_size",
            self.shared_intermediate_size,
            "a whole number of at least 0",
        )
        _require(
            self.sliding_window is None or _is_count(self.sliding_window),
            "sliding_window",
            self.sliding_window,
            "null or a whole number of at least 1",
        )
        _require(self.rms_norm_eps > 0, "rms_norm_eps", self.rms_norm_eps, "a number above 0")
        _require(self.rope_theta > 0, "rope_theta", self.rope_theta, "a number above 0")
        _require(self.hidden_act == "silu", "hidden_act", self.hidden_act, '"silu"')
        _require(self.shared_moe_mode == "sigmoid", "shared_moe_mode", self.shared_moe_mode, '"sigmoid"')
        # M1 was published with both at 0, and neither has a place in the packed forward: better refused than ignored.
        _require(self.attention_dropout == 0, "attention_dropout", self.attention_dropout, "0")
        _require(self.router_jitter_noise == 0, "router_jitter_noise", self.router_jitter_noise, "0")
        _require(self.model_type in MODEL_TYPES, "model_type", self.model_type, " or ".join(MODEL_TYPES))

    # -- reading and writing ------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MiniMaxM1Config:
        """Build a config from the keys of a config.json, official or Transformers'; unknown keys are kept in `extra`.

        Raises:
            UserError: a value that cannot describe a network.
        """
        if values.get("model_type") == "minimax":
            values = config_from_transformers(values)
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        fields = {name: value for name, value in values.items() if name in known}
        extra = {name: value for name, value in values.items() if name not in known}
        return cls(**fields, extra=extra)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> MiniMaxM1Config:
        """Read `folder`/config.json.

        Raises:
            UserError: no such folder or file, not a JSON object, or a value that cannot describe a network.
        """
        path = Path(folder) / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"config: cannot read {path}: {error.strerror}; a folder with config.json is needed"
            ) from None
        except ValueError as error:  # bad UTF-8 or bad JSON
            raise UserError(f"config: {path} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise UserError(f"config: {path} holds a {type(values).__name__}; a JSON object is needed")
        try:
            return cls.from_dict(values)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @classmethod
    def preset(cls, name: str) -> MiniMaxM1Config:
        """Return one of the `PRESETS` by name.

        Raises:
            UserError: there is no preset of that name.
        """
        if name not in PRESETS:
            raise UserError(f"preset: {name!r} is not known; choose one of {', '.join(PRESETS)}")
        return cls(**PRESETS[name])

    def to_dict(self) -> dict[str, Any]:
        """Return the keys of a config.json, `extra` included; tuples become lists."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        values.update(self.extra)
        if not self.dynamic_gate:  # ours, not the official format's: written only where it says something
            del values["dynamic_gate"]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `folder`/config.json; the folder is created."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        (Path(folder) / "config.json").write_text(text, encoding="utf-8")

    def replace(self, **changes: Any) -> MiniMaxM1Config:
        """Return a copy with some fields changed; fields derived from others are not derived anew."""
        return dataclasses.replace(self, **changes)

    # -- what a layer needs to know -----------------------------------------------------------------------------

    @property
    def lightning_layers(self) -> list[int]:
        """Indices of the layers with lightning attention."""
        assert self.attn_type_list is not None
        return [i for i, kind in enumerate(self.attn_type_list) if kind == LIGHTNING]

    @property
    def softmax_layers(self) -> list[int]:
        """Indices of the layers with softmax attention."""
        assert self.attn_type_list is not None
        return [i for i, kind in enumerate(self.attn_type_list) if kind == SOFTMAX]

    @property
    def quantization(self) -> QuantizationConfig | None:
        """How the checkpoint's weights are quantized; None: they are not.

        Raises:
            UserError: `quantization_config` is of another program, or has values that are not known.
        """
        values = self.extra.get("quantization_config")
        return None if values is None else QuantizationConfig.from_dict(values)

    def attention_scales(self, layer: int) -> tuple[float, float]:
        """Return (alpha, beta) of the attention residual of one layer, by the layer's type."""
        assert self.attn_type_list is not None
        if self.attn_type_list[layer] == LIGHTNING:
            return self.layernorm_linear_attention_alpha, self.layernorm_linear_attention_beta
        return self.layernorm_full_attention_alpha, self.layernorm_full_attention_beta


def config_from_transformers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the config.json of Transformers' `minimax` port into the official keys; keys of both stay as they are.

    The port always norms the residual's input, and rotates whole heads; where a config.json states rotary_dim all the
    same, that is what the weights were trained with, and it is kept.

    Raises:
        UserError: a layer type or a kind of rotary embedding that M1 does not have.
    Source: transformers 5, models/minimax/configuration_minimax.py.
    """
    official = {_TRANSFORMERS_KEYS.get(name, name): value for name, value in values.items()}
    official.update(model_type="minimax_m1", architectures=["MiniMaxM1ForCausalLM"], postnorm=True)
    official.pop("block_size", None)  # how the port computes, not what
    layer_types = official.pop("layer_types", None)
    if layer_types is None and "attn_type_list" not in official:  # the port's default
        layer_types = [
            "linear_attention" if i % 2 else "full_attention" for i in range(values.get("num_hidden_layers", 32))
        ]
    if layer_types is not None:
        kinds = {"linear_attention": LIGHTNING, "full_attention": SOFTMAX}
        wrong = [kind for kind in layer_types if kind not in kinds]
        _require(not wrong, "layer_types", wrong[:1], " or ".join(kinds))
        official["attn_type_list"] = [kinds[kind] for kind in layer_types]
    rope = official.pop("rope_parameters", None) or {}
    rope_type = rope.get("rope_type", "default")
    _require(rope_type == "default", "rope_parameters.rope_type", rope_type, '"default"')
    official.setdefault("rope_theta", rope.get("rope_theta", 1_000_000.0))
    return official


def hybrid_pattern(num_layers: int, period: int = 8) -> tuple[int, ...]:
    """Return M1's layer pattern: the last of every `period` layers is softmax, the others are lightning."""
    return tuple(SOFTMAX if (i + 1) % period == 0 else LIGHTNING for i in range(num_layers))


def deepnorm_alpha(num_layers: int) -> float:
    """Return the residual scale (2 L)^(1/4) that M1 uses with its post-norm (DeepNorm, arXiv 2203.00555)."""
    return (2 * num_layers) ** 0.25


def _with_deepnorm(num_hidden_layers: int, **fields: Any) -> dict[str, Any]:
    alpha = deepnorm_alpha(num_hidden_layers)
    return dict(
        num_hidden_layers=num_hidden_layers,
        postnorm=True,
        layernorm_linear_attention_alpha=alpha,
        layernorm_full_attention_alpha=alpha,
        layernorm_mlp_alpha=alpha,
        **fields,
    )


PRESETS: dict[str, dict[str, Any]] = {
    # MiniMax-M1-40k and -80k (MiniMax-Text-01 is the same network)
    "minimax-m1": _with_deepnorm(80, head_dim=128, rotary_dim=64),
    # the model that ships with the package
    "m1-nano": _with_deepnorm(
        4,
        vocab_size=1536,
        hidden_size=128,
        intermediate_size=192,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rotary_dim=16,
        attn_type_list=(LIGHTNING, SOFTMAX, LIGHTNING, SOFTMAX),
        num_local_experts=8,
        rope_theta=10_000.0,
        max_position_embeddings=4096,
        initializer_range=0.06,
        router_aux_loss_coef=0.01,
    ),
    # the two sizes of the benchmarks
    "nano": _with_deepnorm(
        8,
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        rotary_dim=16,
        num_local_experts=8,
    ),
    "small": _with_deepnorm(
        16,
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=768,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        rotary_dim=32,
        num_local_experts=16,
    ),
}

_TRANSFORMERS_KEYS = {
    "linear_attn_alpha_factor": "layernorm_linear_attention_alpha",
    "linear_attn_beta_factor": "layernorm_linear_attention_beta",
    "full_attn_alpha_factor": "layernorm_full_attention_alpha",
    "full_attn_beta_factor": "layernorm_full_attention_beta",
    "mlp_alpha_factor": "layernorm_mlp_alpha",
    "mlp_beta_factor": "layernorm_mlp_beta",
    "dtype": "torch_dtype",
}
_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rotary_dim",
    "num_local_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
)
_NUMBERS = (
    "layernorm_linear_attention_alpha",
    "layernorm_linear_attention_beta",
    "layernorm_full_attention_alpha",
    "layernorm_full_attention_beta",
    "layernorm_mlp_alpha",
    "layernorm_mlp_beta",
    "rms_norm_eps",
    "rope_theta",
    "attention_dropout",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "initializer_range",
)
_SWITCHES = ("dynamic_gate", "postnorm", "output_router_logits", "tie_word_embeddings", "use_cache")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _require(holds: bool, name: str, value: object, accepted: str) -> None:
    if not holds:
        raise UserError(f"{name}: {value!r} cannot be used; accepted: {accepted}")
