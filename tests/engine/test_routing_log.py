"""A routing log against a loop over tokens, layers and experts."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minimax_m1.batch import ForwardBatch
from minimax_m1.config import MiniMaxM1Config
from minimax_m1.engine.routing_log import RoutingLog, record_routing
from minimax_m1.model import MiniMaxM1ForCausalLM, Routing

LAYERS, EXPERTS, TOP_K = 3, 5, 2
CONFIG = MiniMaxM1Config(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=8,
    num_hidden_layers=LAYERS,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_local_experts=EXPERTS,
    num_experts_per_tok=TOP_K,
)


def random_routings(num_rows: int, seed: int) -> list[Routing]:
    """Routings as the model gives them; now and then the second expert is unused."""
    generator = torch.Generator().manual_seed(seed)
    routings = []
    for _ in range(LAYERS):
        probs = torch.rand(num_rows, EXPERTS, generator=generator).softmax(-1)
        weights, ids = probs.topk(TOP_K)
        weights[torch.rand(num_rows, generator=generator) < 0.3, 1] = 0
        routings.append(Routing(probs, ids, weights / weights.sum(-1, keepdim=True)))
    return routings


def naive(steps: list[tuple[list[Routing], int, int]]) -> tuple[list, list, list]:
    """Return counts [L][E], weight sums [L][E] and the ids [tokens][L][K] of one request's rows of some steps."""
    counts = [[0] * EXPERTS for _ in range(LAYERS)]
    sums = [[0.0] * EXPERTS for _ in range(LAYERS)]
    tokens = []
    for routings, start, stop in steps:
        for row in range(start, stop):
            tokens.append([])
            for layer, routing in enumerate(routings):
                tokens[-1].append([])
                for k in range(TOP_K):
                    expert, weight = int(routing.expert_ids[row, k]), float(routing.expert_weights[row, k])
                    tokens[-1][-1].append(expert if weight else -1)
                    if weight:
                        counts[layer][expert] += 1
                        sums[layer][expert] += weight
    return counts, sums, tokens


steps_of_gaps_and_lengths = st.lists(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), min_size=3, max_size=3), min_size=1, max_size=4
)


@given(steps=steps_of_gaps_and_lengths, seed=st.integers(0, 1000))
def test_against_a_loop(steps: list[list[tuple[int, int]]], seed: int) -> None:
    """Requests 0 and 1 have logs, 2 has none; between their rows are some of nobody."""
    logs: list[RoutingLog | None] = [RoutingLog.of(CONFIG, keep_token_ids=True), RoutingLog.of(CONFIG), None]
    totals = RoutingLog.of(CONFIG)
    ran: list[list[tuple[list[Routing], int, int]]] = [[], [], []]
    for number, lengths in enumerate(steps):
        rows, end = [], 0
        for log, (gap, length) in zip(logs, lengths, strict=True):
            rows.append((log, end + gap, end + gap + length))
            end += gap + length
        routings = random_routings(end + 1, seed + number)
        for request, (_, start, stop) in zip(ran, rows, strict=True):
            request.append((routings, start, stop))
        record_routing(routings, rows, totals)
    for log, request in zip([*logs, totals], [*ran, ran[0] + ran[1] + ran[2]], strict=True):
        if log is not None:
            counts, sums, tokens = naive(request)
            assert log.counts.tolist() == counts and log.num_tokens == len(tokens)
            np.testing.assert_allclose(log.weight_sums, sums, rtol=1e-9)
            if log.step_ids is not None:
                assert log.to_dict()["token_expert_ids"] == tokens


def test_logs_add_up_to_the_totals() -> None:
    first, second, totals = (RoutingLog.of(CONFIG) for _ in range(3))
    for seed in range(5):
        record_routing(random_routings(9, seed), [(first, 0, 4), (second, 4, 9)], totals)
    first.add(second.counts, second.weight_sums, second.num_tokens)
    assert first.num_tokens == totals.num_tokens == 45
    assert first.to_dict() == totals.to_dict()


def test_what_the_network_does() -> None:
    """A log of a real forward: every token uses K experts a layer, with weights that sum to 1."""
    model = MiniMaxM1ForCausalLM(CONFIG).eval()
    model.init_weights(seed=0)
    with torch.inference_mode():
        _, routings = model.forward_packed(torch.arange(12), ForwardBatch.packed([12]))
    log = RoutingLog.of(CONFIG)
    record_routing(routings, [(log, 0, 12)])
    assert log.counts.sum(1).tolist() == [12 * TOP_K] * LAYERS
    np.testing.assert_allclose(log.weight_sums.sum(1), 12, rtol=1e-5)


def test_as_json() -> None:
    log = RoutingLog(np.array([[0, 6, 2], [4, 4, 0]]), np.array([[0, 3.0, 1.5], [1, 3, 0]]), num_tokens=4)
    written = json.loads(json.dumps(log.to_dict()))
    assert written["num_tokens"] == 4 and written["num_experts"] == 3 and "token_expert_ids" not in written
    first, second = written["layers"]
    assert first["experts"] == [1, 2] and first["counts"] == [6, 2] and first["mean_weights"] == [0.5, 0.75]
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(3)
    assert first["load_balance_entropy"] == pytest.approx(entropy, abs=1e-6)
    assert second == {"layer": 1, "experts": [0, 1], "counts": [4, 4]} | {
        "mean_weights": [0.25, 0.75],
        "load_balance_entropy": pytest.approx(math.log(2) / math.log(3), abs=1e-6),
    }


@pytest.mark.parametrize(("counts", "expected"), [([5, 5, 5, 5], 1), ([0, 9, 0, 0], 0), ([0, 0, 0, 0], 0), ([7], 0)])
def test_entropy_of_extremes(counts: list[int], expected: float) -> None:
    assert RoutingLog(np.array([counts]), np.zeros((1, len(counts)))).load_balance_entropy[0] == pytest.approx(expected)


def test_an_empty_log_is_json_too() -> None:
    written = json.loads(json.dumps(RoutingLog.of(CONFIG, keep_token_ids=True).to_dict()))
    assert written["token_expert_ids"] == [] and written["layers"][0]["experts"] == []
