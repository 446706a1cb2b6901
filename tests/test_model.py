"""The network's public wrapper, its variants, and what training needs of it."""

import math

import pytest
import torch
import torch.nn.functional as F

from minimax_m1.batch import ForwardBatch
from minimax_m1.cache import HybridCache
from minimax_m1.config import MiniMaxM1Config
from minimax_m1.errors import UserError
from minimax_m1.kernels.lightning import lightning_slopes
from minimax_m1.model import DynamicGate, Gate, MiniMaxM1ForCausalLM, Routing, drop_experts, load_balancing_loss
from tests.tolerances import LOGITS, relative_error

SMALL = MiniMaxM1Config(
    vocab_size=89,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=6,  # not a power of two
    num_key_value_heads=2,
    head_dim=8,
    rotary_dim=4,
    attn_type_list=(0, 1, 1, 0),  # the last layer is lightning
    num_local_experts=4,
    layernorm_linear_attention_alpha=1.5,
    layernorm_linear_attention_beta=0.9,
    layernorm_full_attention_alpha=1.2,
    layernorm_full_attention_beta=0.7,
    layernorm_mlp_alpha=1.1,
    layernorm_mlp_beta=1.3,
)
VARIANTS = {
    "prenorm": {},
    "postnorm": {"postnorm": True},
    "shared": {"shared_intermediate_size": 24},
    "window": {"sliding_window": 9},
    "dynamic_gate": {"dynamic_gate": True},
    "tied": {"tie_word_embeddings": True},
    "one_layer": {"num_hidden_layers": 1, "attn_type_list": (0,)},
}


def make_model(seed=0, dtype=torch.float32, **changes):
    model = MiniMaxM1ForCausalLM(SMALL.replace(**changes)).to(dtype)
    model.init_weights(seed)
    for parameter in model.parameters():
        parameter.data.mul_(6 if parameter.dim() > 1 else 1)
    return model.eval()


def plain_logits(model, ids):
    """The whole network again for one sequence, float64, written as model.md's formulas read: an independent check."""
    config, state = model.config, {name: x.double() for name, x in model.state_dict().items()}

    def norm(x, name, eps):
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * state[name]

    def rotate(x):
        half = config.rotary_dim // 2
        inverse = 1.0 / config.rope_theta ** (torch.arange(0, config.rotary_dim, 2).double() / config.rotary_dim)
        angle = torch.arange(len(ids)).double()[:, None] * inverse
        turned = torch.polar(torch.ones_like(angle), angle)[:, None] * torch.complex(
            x[..., :half], x[..., half : 2 * half]
        )
        return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), -1)

    x, heads, dim = state["model.embed_tokens.weight"][ids], config.num_attention_heads, config.head_dim
    for i, kind in enumerate(config.attn_type_list):
        p = f"model.layers.{i}."
        u = norm(x, p + "input_layernorm.weight", config.rms_norm_eps)
        if kind == 0:
            qkv = F.silu(u @ state[p + "self_attn.qkv_proj.weight"].T).view(-1, heads, 3 * dim)
            q, k, v = qkv.split(dim, -1)
            distance = (torch.arange(len(ids))[:, None] - torch.arange(len(ids))).double()
            decay = torch.exp(-lightning_slopes(heads, i, config.num_hidden_layers).double()[:, None, None] * distance)
            weights = torch.einsum("ihd,jhd->hij", q, k) * torch.where(distance >= 0, decay, 0.0)
            o = torch.einsum("hij,jhd->ihd", weights, v).flatten(1)
            o = norm(o, p + "self_attn.norm.weight", 1e-6) * torch.sigmoid(
                u @ state[p + "self_attn.output_gate.weight"].T
            )
            attention, alpha, beta = o @ state[p + "self_attn.out_proj.weight"].T, 1.5, 0.9
        else:
            q, k, v = (
                (u @ state[f"{p}self_attn.{name}_proj.weight"].T).view(len(ids), -1, dim) for name in ("q", "k", "v")
            )
            k, v = (t.repeat_interleave(heads // config.num_key_value_heads, 1) for t in (rotate(k), v))
            scores = torch.einsum("ihd,jhd->hij", rotate(q), k) / math.sqrt(dim)
            distance = torch.arange(len(ids))[:, None] - torch.arange(len(ids))
            seen = (distance >= 0) & (distance < (config.sliding_window or len(ids)))
            o = torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -math.inf).softmax(-1), v).flatten(1)
            attention, alpha, beta = o @ state[p + "self_attn.o_proj.weight"].T, 1.2, 0.7
        h = alpha * (u if config.postnorm else x) + beta * attention
        w = norm(h, p + "post_attention_layernorm.weight", config.rms_norm_eps)
        m = p + "block_sparse_moe."
        temperature = state.get(m + "gate.temperature", torch.zeros(()))
        top, chosen = (w @ state[m + "gate.weight"].T / temperature.exp()).softmax(-1).topk(config.num_experts_per_tok)
        y = torch.zeros_like(w)
        for t in range(len(ids)):
            for share, e in zip(top[t] / top[t].sum(), chosen[t].tolist(), strict=True):
                gate, up, down = (state[f"{m}experts.{e}.{name}.weight"] for name in ("w1", "w3", "w2"))
                y[t] += share * (down @ (F.silu(gate @ w[t]) * (up @ w[t])))
        if config.shared_intermediate_size:
            gate, up, down = (state[f"{p}shared_mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
            c = torch.sigmoid(w @ state[p + "coefficient.weight"].T)
            y = (1 - c) * y + c * ((F.silu(w @ gate.T) * (w @ up.T)) @ down.T)
        x = 1.1 * (w if config.postnorm else h) + 1.3 * y
    return norm(x, "model.norm.weight", config.rms_norm_eps) @ state["lm_head.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("backend", [None, "torch", "reference"])
def test_every_variant_is_the_formula(changes, backend):
    model = make_model(**changes)
    if "dynamic_gate" in changes:
        for layer in model.model.layers:
            layer.block_sparse_moe.gate.temperature.fill_(0.4)
    ids = torch.randint(0, 89, (70,), generator=torch.Generator().manual_seed(3))
    assert relative_error(model(ids[None], backend=backend).logits[0], plain_logits(model, ids)) < LOGITS


@torch.no_grad()
def test_float64_runs_in_float64():
    model = make_model(dtype=torch.float64)
    ids = torch.randint(0, 89, (40,))
    assert relative_error(model(ids[None]).logits[0], plain_logits(model, ids)) < 1e-6  # rotary angles are float32


@torch.no_grad()
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_padding_on_any_side_gives_each_row_its_own_result(changes):
    model = make_model(**changes)
    ids = torch.randint(0, 89, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(3, 20, dtype=torch.int64)
    mask[0, 13:], mask[1, :9], mask[2, 4:15] = 1, 1, 1  # left, right, both
    logits = model(ids, attention_mask=mask).logits
    for row in range(3):
        own = mask[row].bool()
        alone = model(ids[row][own][None]).logits[0]
        assert relative_error(logits[row][own], alone) < LOGITS
        assert not logits[row][~own].any()
    last = model(ids, attention_mask=mask, logits_to_keep=5).logits
    assert last.shape == (3, 5, 89)
    assert relative_error(last, logits[:, -5:]) < LOGITS


def test_labels_shift_ignore_padding_and_train():
    model = make_model()
    ids = torch.randint(0, 89, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    output = model(ids, attention_mask=mask, labels=ids)
    rows = [model(row[m.bool()][None]).logits[0] for row, m in zip(ids, mask, strict=True)]
    targets = [row[m.bool()][1:] for row, m in zip(ids, mask, strict=True)]
    expected = F.cross_entropy(torch.cat([r[:-1] for r in rows]), torch.cat(targets))
    assert relative_error(output.loss, expected + model.config.router_aux_loss_coef * output.aux_loss) < LOGITS
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_generation_mode_does_not_poison_training():
    """Something kept from a forward under inference_mode must not break a later backward."""
    model = make_model()
    ids = torch.randint(0, 89, (1, 9))
    with torch.inference_mode():
        model(ids)
    model(ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad is not None


def test_activation_checkpointing_changes_nothing():
    model = make_model()
    ids, batch = torch.randint(0, 89, (30,)), ForwardBatch.packed([18, 12])
    gradients = []
    for model.model.activation_checkpointing in (False, True):
        model.zero_grad()
        model.forward_packed(ids, batch)[0].square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_dynamic_gate_starts_as_the_plain_router_and_learns_its_temperature():
    gate, plain = DynamicGate(16, 4), Gate(16, 4)
    torch.nn.init.normal_(plain.weight)
    with torch.no_grad():
        gate.weight.copy_(plain.weight)
        gate.temperature.fill_(0.0)
    x = torch.randn(5, 16)
    batch = ForwardBatch.packed([5])
    assert torch.equal(gate(x, batch), plain(x, batch))
    gate(x, batch).square().sum().backward()
    assert gate.temperature.grad.abs() > 0


def test_load_balancing_loss_is_top_k_at_balance_and_grows_with_collapse():
    even = Routing(torch.full((8, 4), 0.25), torch.tensor([[0, 1], [2, 3]] * 4), torch.full((8, 2), 0.5))
    assert load_balancing_loss([even, even]).item() == pytest.approx(2.0)
    probs = F.one_hot(torch.zeros(8, dtype=torch.int64), 4).float()
    collapsed = Routing(probs, torch.tensor([[0, 1]] * 8), torch.full((8, 2), 0.5))
    assert load_balancing_loss([collapsed]).item() == pytest.approx(4.0)


def test_state_dict_has_official_names_and_views():
    model = make_model()
    state = model.state_dict()
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in state
    assert not any("w13" in name for name in state)
    other = make_model(seed=1)
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    state["model.layers.1.block_sparse_moe.experts.0.w1.weight"].fill_(7.0)
    assert (model.model.layers[1].block_sparse_moe.experts.w13[0, :40] == 7.0).all()
    del state["model.layers.0.block_sparse_moe.experts.3.w2.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), {}, "input_ids: [3] torch.int64 cannot be used"),
        (torch.zeros(1, 0, dtype=torch.int64), {}, "at least one token"),
        (torch.zeros(1, 3), {}, "input_ids: [1, 3] torch.float32"),
        (torch.tensor([[1, 89]]), {}, "input_ids: 89 is out of range; accepted: 0 to 88"),
        (torch.tensor([[1, -1]]), {}, "input_ids: -1 is out of range"),
        (
            torch.tensor([[1, 2]]),
            {"attention_mask": torch.ones(1, 3)},
            "attention_mask: [1, 3] beside input_ids [1, 2]",
        ),
        (torch.tensor([[1, 2, 3]]), {"attention_mask": torch.tensor([[1, 0, 1]])}, "row 0 has a gap"),
        (torch.tensor([[1, 2]]), {"attention_mask": torch.zeros(1, 2)}, "row 0 has a gap or no token"),
        (torch.tensor([[1, 2]]), {"backend": "fast"}, "backend: 'fast' is not known"),
    ],
)
def test_bad_input_is_one_clear_error(ids, options, message):
    with pytest.raises(UserError) as error:
        make_model()(ids, **options)
    assert message in str(error.value)


@torch.no_grad()
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("seed", range(3))
def test_any_split_and_any_batch_is_the_whole(changes, seed):
    """Sequences that start, continue in chunks and decode in one shared cache, in random company, equal the whole."""
    model, generator = make_model(**changes), torch.Generator().manual_seed(seed)
    texts = [torch.randint(0, 89, (n,), generator=generator) for n in (50, 3, 120, 71)]
    expected = [model(text[None]).logits[0] for text in texts]
    cache = HybridCache(model.config, max_seqs=5, max_len=128)
    slots, done, rows = [4, 0, 2, 1], [0] * 4, [[] for _ in texts]
    while any(d < len(t) for d, t in zip(done, texts, strict=True)):
        active = [i for i in range(4) if done[i] < len(texts[i]) and torch.rand((), generator=generator) < 0.7]
        sizes = {
            i: int(torch.randint(1, 40, (), generator=generator)) if torch.rand((), generator=generator) < 0.5 else 1
            for i in active
        }
        active.sort(key=lambda i: sizes[i] > 1 or done[i] == 0)  # decoding sequences first
        seqlens = [min(sizes[i], len(texts[i]) - done[i]) for i in active]
        if not active:
            continue
        ids = torch.cat([texts[i][done[i] : done[i] + n] for i, n in zip(active, seqlens, strict=True)])
        hidden, _ = model.forward_packed(ids, cache.batch([slots[i] for i in active], seqlens), cache)
        for i, n, logits in zip(active, seqlens, model.compute_logits(hidden).split(seqlens), strict=True):
            rows[i].append(logits)
            done[i] += n
    for row, whole in zip(rows, expected, strict=True):
        assert relative_error(torch.cat(row), whole) < LOGITS


@torch.no_grad()
def test_a_reset_slot_remembers_nothing():
    model = make_model()
    cache = HybridCache(model.config, max_seqs=1, max_len=64)
    first, second = torch.randint(0, 89, (40,)), torch.randint(0, 89, (30,))
    model.forward_packed(first, cache.batch([0], [40]), cache)
    cache.reset(0)
    hidden, _ = model.forward_packed(second, cache.batch([0], [30]), cache)
    assert relative_error(model.compute_logits(hidden), model(second[None]).logits[0]) < LOGITS


def test_a_tiny_expert_threshold_keeps_the_first_expert():
    weights = torch.tensor([[0.7, 0.3], [0.5, 0.5]])
    threshold = torch.tensor([5e-324, 1e-30])  # the first is 0 in float32
    assert drop_experts(weights, threshold).tolist() == [[1, 0], [1, 0]]
