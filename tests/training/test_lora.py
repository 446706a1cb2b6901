"""LoRA: what peft adds is what the formula says, trains alone, is never passed over, and merges into the weights."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minimax_m1.batch import ForwardBatch
from minimax_m1.config import MiniMaxM1Config, QuantizationConfig
from minimax_m1.errors import UserError
from minimax_m1.model import Experts, Linear, MiniMaxM1ForCausalLM
from minimax_m1.quantization import quantize_model
from minimax_m1.settings import read_toml
from minimax_m1.training.lora import add_lora, load_lora, merge_lora, save_lora
from minimax_m1.training.settings import TrainSettings
from tests.ranks import launch
from tests.tolerances import LOGITS, relative_error

peft = pytest.importorskip("peft")

ALL = ("attention", "experts", "shared")


def tiny(seed: int = 0, **changes: object) -> MiniMaxM1ForCausalLM:
    """A lightning and a softmax layer with shared experts; no two sizes of a matrix agree."""
    values = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        shared_intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        attn_type_list=(0, 1),
        num_local_experts=4,
        initializer_range=0.2,
        max_position_embeddings=256,
    )
    model = MiniMaxM1ForCausalLM(MiniMaxM1Config(**{**values, **changes}))
    model.init_weights(seed)
    return model


def settings(targets: tuple[str, ...] = ALL, **changes: object) -> TrainSettings:
    return TrainSettings(init=Path("base"), lora_rank=3, lora_alpha=6.0, lora_targets=targets, **changes)


def with_additions(targets: tuple[str, ...] = ALL, **changes: object) -> MiniMaxM1ForCausalLM:
    """A model whose B matrices are not zero any more."""
    model = tiny(**changes)
    add_lora(model, settings(targets))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(0.0, 0.1, generator=generator)
    return model.eval()


def ids(count: int = 40) -> Tensor:
    return torch.randint(64, (count,), generator=torch.Generator().manual_seed(2))


@torch.no_grad()  # with gradients, other kernels run where a frozen part needs none
def logits(model: MiniMaxM1ForCausalLM) -> Tensor:
    hidden, _ = model.forward_packed(ids(), ForwardBatch.packed([25, 15]))
    return model.compute_logits(hidden)


def loss(model: MiniMaxM1ForCausalLM) -> Tensor:
    hidden, _ = model.forward_packed(ids()[:-1], ForwardBatch.packed([39]))
    return torch.nn.functional.cross_entropy(model.compute_logits(hidden), ids()[1:])


def sum_by_formula(base: MiniMaxM1ForCausalLM, model: MiniMaxM1ForCausalLM) -> MiniMaxM1ForCausalLM:
    """W + (alpha / r) B A in float64, of the A and B as peft's file lays them out; no code of peft or of ours."""
    merged = copy.deepcopy(base).double()
    weights = dict(merged.named_parameters())
    adapted = dict(model.named_parameters())
    for name, a in adapted.items():
        if ".lora_A." not in name:
            continue
        a, b = a.detach().double(), adapted[name.replace(".lora_A.", ".lora_B.")].detach().double()
        plain = name.partition(".lora_A.")[0]
        if not plain.removesuffix(".base_layer").endswith("experts"):
            weights[plain + ".weight"].data += 2.0 * b @ a
            continue
        weight = weights[plain.removesuffix(".base_layer") + (".w2" if a.shape[1] == 24 else ".w13")]
        for e in range(4):
            weight.data[e] += 2.0 * b[:, e::4] @ a[3 * e : 3 * e + 3]  # A by expert, B by rank and then by expert
    return merged


@pytest.mark.parametrize("targets", [ALL, ("attention",), ("experts",), ("shared",)], ids="+".join)
def test_only_the_targets_get_additions_and_the_start_is_the_base_to_the_bit(targets):
    base = tiny()
    model = copy.deepcopy(base)
    add_lora(model, settings(targets))
    assert torch.equal(logits(model), logits(base))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    kinds = {"attention": ".self_attn.", "experts": ".experts.", "shared": ".shared_mlp."}
    numbers = {"attention": 2 * 3 + 2 * 4, "experts": 2 * 2 * 2, "shared": 2 * 2 * 3}
    assert all(".lora_" in name and any(kinds[target] in name for target in targets) for name in trained)
    assert len(trained) == sum(numbers[target] for target in targets)


@pytest.mark.parametrize("targets", [ALL, ("experts",), ("attention", "shared")], ids="+".join)
def test_outputs_and_gradients_are_those_of_the_formula_in_float64(targets):
    base = tiny()
    model = with_additions(targets)
    assert relative_error(logits(model), logits(sum_by_formula(base, model))) < LOGITS

    model.train()
    loss(model).backward()
    summed = sum_by_formula(base, model)
    loss(summed).backward()
    gradients = dict(summed.named_parameters())
    adapted = dict(model.named_parameters())
    for name, a in adapted.items():
        if ".lora_A." not in name:
            continue
        b = adapted[name.replace(".lora_A.", ".lora_B.")]
        plain = name.partition(".lora_A.")[0]
        if not plain.removesuffix(".base_layer").endswith("experts"):
            grad = gradients[plain + ".weight"].grad
            expected_a, expected_b = 2.0 * b.detach().double().T @ grad, 2.0 * grad @ a.detach().double().T
        else:
            grad = gradients[plain.removesuffix(".base_layer") + (".w2" if a.shape[1] == 24 else ".w13")].grad
            expected_a, expected_b = torch.zeros_like(a).double(), torch.zeros_like(b).double()
            for e in range(4):
                of_expert = slice(3 * e, 3 * e + 3)
                expected_a[of_expert] = 2.0 * b[:, e::4].detach().double().T @ grad[e]
                expected_b[:, e::4] = 2.0 * grad[e] @ a[of_expert].detach().double().T
        # a gradient goes through more sums than a logit
        assert relative_error(a.grad, expected_a) < 10 * LOGITS, name
        assert relative_error(b.grad, expected_b) < 10 * LOGITS, name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_lowers_the_loss_and_leaves_the_base_alone(checkpointing):
    base = tiny()
    model = copy.deepcopy(base)
    add_lora(model, settings())
    model.model.activation_checkpointing = checkpointing
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0] - 0.1
    frozen = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen.keys() == dict(base.named_parameters()).keys()
    for name, parameter in base.named_parameters():
        assert frozen[name].grad is None and torch.equal(frozen[name], parameter), name


def test_activation_checkpointing_changes_no_gradient():
    model = with_additions().train()
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.model.activation_checkpointing = checkpointing
        loss(model).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("targets", [ALL, ("attention",), ("experts",), ("shared",)], ids="+".join)
def test_decoding_uses_the_additions(targets):
    """The fused decoding kernels read weights directly; a model with additions must not come to them."""
    model = with_additions(targets)
    merged = copy.deepcopy(model)
    merge_lora(merged)
    prompt = ids(9)[None]
    written = model.generate(prompt, max_new_tokens=24, temperature=0.0)
    assert torch.equal(written, merged.generate(prompt, max_new_tokens=24, temperature=0.0))
    assert not torch.equal(written, tiny().eval().generate(prompt, max_new_tokens=24, temperature=0.0))


@pytest.mark.parametrize("targets", [ALL, ("experts",), ("shared", "attention")], ids="+".join)
def test_merging_gives_a_plain_model_with_the_sums(targets):
    base, model = tiny(), with_additions(targets)
    expected, summed = logits(model), sum_by_formula(base, model)
    merge_lora(model)
    assert relative_error(logits(model), expected) < LOGITS
    assert not hasattr(model, "peft_config")
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]
    assert {type(m) for m in model.modules()} >= {Linear, Experts}
    for name, parameter in model.named_parameters():
        assert relative_error(parameter, dict(summed.named_parameters())[name]) < 1e-6, name  # one float32 rounding
    assert model.state_dict().keys() == base.state_dict().keys()


def test_merging_into_bfloat16_rounds_once():
    model = tiny().to(torch.bfloat16)
    base = copy.deepcopy(model)
    add_lora(model, settings())
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            assert parameter.dtype == torch.float32
            parameter.data.normal_(0.0, 0.1)
    summed = sum_by_formula(base, model)
    merge_lora(model)
    for name, parameter in model.named_parameters():
        exact = dict(summed.named_parameters())[name]
        assert parameter.dtype == torch.bfloat16
        # half a unit in the last of 8 bits, and a little for float32's own rounding
        assert bool(((parameter.double() - exact).abs() <= exact.abs() * 2**-8 * 1.01 + 1e-7).all()), name


@pytest.mark.parametrize("targets", [ALL, ("experts",), ("attention",)], ids="+".join)
def test_save_and_load(tmp_path, targets):
    model = with_additions(targets)
    save_lora(model, tmp_path / "adapter")
    loaded = tiny()
    load_lora(loaded, tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(Path("base").resolve())
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (3, 6.0, True)


@pytest.mark.parametrize("targets", [ALL, ("experts",), ("attention", "shared")], ids="+".join)
def test_peft_reads_what_is_saved_and_we_read_what_peft_saves(tmp_path, targets):
    model = with_additions(targets)
    save_lora(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny(), tmp_path / "ours")
    assert torch.equal(logits(theirs.base_model.model), logits(model))
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = tiny()
    load_lora(loaded, tmp_path / "theirs")
    assert torch.equal(logits(loaded), logits(model))
    assert relative_error(logits(theirs.merge_and_unload()), logits(model)) < LOGITS


def test_the_seed_decides_the_additions():
    models = [tiny() for _ in range(3)]
    before = torch.random.get_rng_state()
    for model, seed in zip(models, (0, 0, 1), strict=True):
        add_lora(model, settings(seed=seed))
    first, same, other = (dict(model.named_parameters()) for model in models)
    drawn = [name for name in first if ".lora_A." in name]
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_refusals(tmp_path):
    model = with_additions()
    save_lora(model, tmp_path / "adapter")
    with pytest.raises(UserError, match="the model has additions already"):
        add_lora(model, settings())
    with pytest.raises(UserError, match="the model has additions already"):
        load_lora(model, tmp_path / "adapter")
    for call in (merge_lora, lambda m: save_lora(m, tmp_path / "x")):
        with pytest.raises(UserError, match="the model has no additions"):
            call(tiny())
    quantized = tiny()
    quantize_model(quantized, QuantizationConfig.parse("int8"))
    with pytest.raises(UserError, match="a quantized model cannot get LoRA additions"):
        add_lora(quantized, settings())
    with pytest.raises(UserError, match="a quantized model cannot get LoRA additions"):
        load_lora(quantized, tmp_path / "adapter")
    with pytest.raises(UserError, match="lora_targets: the model has none of shared"):
        add_lora(tiny(shared_intermediate_size=0), settings(("shared",)))
    with pytest.raises(UserError, match="'experts' cannot be used with expert_parallel above 1"):
        add_lora(tiny(), settings(expert_parallel=2))
    with pytest.raises(UserError, match=r"is of another model: .*lora_A.weight is \[3, 32\] instead of \[3, 48\]"):
        load_lora(tiny(hidden_size=48), tmp_path / "adapter")
    save_lora(with_additions(num_hidden_layers=3, attn_type_list=(0, 1, 0)), tmp_path / "deeper")
    with pytest.raises(UserError, match=r"layers.2.* has no place in the model"):
        load_lora(tiny(), tmp_path / "deeper")


@pytest.mark.parametrize("values", ["", "[]", "{}", '{"peft_type": "IA3"}', '{"peft_type": "LORA", "r": 0}'])
def test_a_damaged_config_is_one_line(tmp_path, values):
    save_lora(with_additions(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(values)
    with pytest.raises(UserError, match=r"^adapter: ") as caught:
        load_lora(tiny(), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_one_line(tmp_path):
    save_lora(with_additions(), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UserError, match="adapter: cannot read"):
        load_lora(tiny(), tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="adapter: cannot read"):
        load_lora(tiny(), tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="adapter: cannot read"):
        load_lora(tiny(), tmp_path)


def sum_of_losses(model: MiniMaxM1ForCausalLM, seed: int) -> Tensor:
    """The loss of a micro-batch of its own."""
    tokens = torch.randint(64, (40,), generator=torch.Generator().manual_seed(seed))
    hidden, _ = model.forward_packed(tokens[:-1], ForwardBatch.packed([39]))
    return model.lm_head.token_losses(hidden, tokens[1:])[0].sum()


def train_and_save(model: MiniMaxM1ForCausalLM, seeds: list[int], folder: Path) -> None:
    """Take three steps of SGD on the micro-batches of `seeds`."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        for seed in seeds:
            sum_of_losses(model, seed).backward()
        optimizer.step()
    save_lora(model, folder)


def main(folder: str) -> None:
    """Be one of two ranks, with a micro-batch of its own."""
    from minimax_m1.training.parallel import close_world, init_world, parallelize

    wanted = settings(batches_per_step=2, activation_checkpointing=True)
    world = init_world(wanted)
    model = with_additions().train()
    parallelize(model, world, wanted)
    train_and_save(model, [world.rank], Path(folder))
    close_world(world)


@pytest.mark.slow
def test_two_ranks_train_the_same_additions_as_one(tmp_path):
    launch("tests.training.test_lora", 2, str(tmp_path / "two"))
    train_and_save(with_additions().train(), [0, 1], tmp_path / "one")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    start = dict(with_additions().named_parameters())
    assert one.keys() == two.keys()
    for name, expected in one.items():
        before = start[re.sub(r"(lora_[AB])", r"\1.default", name.removeprefix("base_model.model."))]
        assert not torch.equal(expected, before), name
        assert relative_error(two[name], expected) < LOGITS, name


@pytest.mark.parametrize("name", ["sft", "lora"])
def test_the_recipes_are_valid(name):
    recipe = TrainSettings.from_dict(read_toml(Path(__file__).parents[2] / "recipes" / f"{name}.toml"))
    assert bool(recipe.lora_rank) == (name == "lora")
    assert recipe.init is not None and recipe.init.name == "m1-nano"
    assert recipe.warmup_steps + recipe.decay_steps < recipe.steps
