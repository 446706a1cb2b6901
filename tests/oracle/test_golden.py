"""The network against numbers of the official code (tests/golden/m1_h8, a small random checkpoint, float32)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minimax_m1 import MiniMaxM1ForCausalLM
from minimax_m1.cache import HybridCache
from minimax_m1.kernels import compiled
from minimax_m1.kernels.lightning import lightning_slopes
from tests.tolerances import LOGITS, LOGITS_BFLOAT16, relative_error

FOLDER = Path(__file__).parent.parent / "golden" / "m1_h8"
BACKENDS = [None, "torch", "reference"] + (["compiled"] if compiled.library else [])


@pytest.fixture(scope="module")
def golden():
    return load_file(FOLDER / "golden.safetensors")


@pytest.fixture(scope="module")
def model():
    return MiniMaxM1ForCausalLM.from_pretrained(FOLDER).eval()


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 20, 37, 256, 300])
def test_prefill_logits(model, golden, length, backend):
    expected = golden[f"prefill_logits.n{length}"]
    output = model(golden[f"input_ids.{length}"], logits_to_keep=expected.shape[1], backend=backend)
    assert output.logits.dtype == torch.float32
    assert relative_error(output.logits, expected) < LOGITS


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 37, 256, 300])
def test_cached_decode_and_greedy_tokens(model, golden, length, backend):
    cache = HybridCache(model.config, max_seqs=1, max_len=length + 17)
    ids, logits, tokens = golden[f"input_ids.{length}"][0], [], []
    for _ in range(17):
        hidden, _ = model.forward_packed(ids, cache.batch([0], [len(ids)], backend), cache)
        logits.append(model.compute_logits(hidden[-1:], backend))
        ids = logits[-1].argmax(-1)
        tokens.append(int(ids))
    assert tokens == golden[f"greedy_tokens.n{length}"][0].tolist()
    assert relative_error(torch.cat(logits[1:]), golden[f"decode_logits.n{length}"][0]) < LOGITS


@torch.no_grad()
def test_hidden_states_lightning_states_keys_and_values(model, golden):
    hidden_states = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: hidden_states.append(args[0])) for layer in model.model.layers
    ]
    cache = HybridCache(model.config, max_seqs=1, max_len=37)
    last, _ = model.forward_packed(golden["input_ids.37"][0], cache.batch([0], [37]), cache)
    for hook in hooks:
        hook.remove()
    expected = golden["hidden_states.n37"][:, 0]  # the official code's last entry is after the final norm
    assert relative_error(torch.stack([*hidden_states, last]), expected) < LOGITS
    for layer in model.config.lightning_layers:
        assert relative_error(cache.states[layer][0], golden[f"lightning_state.{layer}.n37"][0]) < LOGITS
    for layer in model.config.softmax_layers:
        for name, pool in (("k", cache.keys), ("v", cache.values)):
            expected = golden[f"kv_{name}.{layer}.n37"][0].transpose(0, 1)
            assert relative_error(pool[layer][:, cache.pages[0][0], :37], expected) < LOGITS


def test_slopes(golden):
    # recorded without the layer factor, which is 1 + 1e-5 at layer 0
    assert relative_error(lightning_slopes(8, 0, 8) / (1 + 1e-5), golden["slopes"]) < 1e-6


@torch.no_grad()
def test_left_padding_gives_each_row_its_own_result(model, golden):
    """The official code lets its softmax layers attend to padding (`leftpad.*`); ours must not repeat that."""
    ids, mask = golden["leftpad.input_ids"], golden["leftpad.mask"]
    logits = model(ids, attention_mask=mask).logits
    for row, row_mask, row_logits in zip(ids, mask.bool(), logits, strict=True):
        alone = model(row[row_mask][None]).logits[0]
        assert relative_error(row_logits[row_mask], alone) < LOGITS
        assert not row_logits[~row_mask].any()


@torch.no_grad()
@pytest.mark.parametrize("length", [37, 300])
def test_bfloat16_weights(golden, length):
    """The official run rounds activations too; ours keeps them in float32 on a CPU and is to be nearer the truth."""
    model = MiniMaxM1ForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    logits = model(golden[f"input_ids.{length}"]).logits
    official, exact = golden[f"bf16_prefill_logits.n{length}"], golden[f"prefill_logits.n{length}"]
    assert relative_error(logits, official) < LOGITS_BFLOAT16
    assert relative_error(logits, exact) < relative_error(official, exact)
