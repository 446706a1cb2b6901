"""Vocabularies: built, extended or found again; old tokens keep their ids and what the network makes of them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minimax_m1.batch import ForwardBatch
from minimax_m1.config import MiniMaxM1Config
from minimax_m1.errors import UserError
from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.tokenizer import MiniMaxM1Tokenizer
from minimax_m1.tokenizer.vocabulary import O200K_SPLIT, TRAINED_ADDED_TOKENS, build_backend
from minimax_m1.training import vocabulary
from minimax_m1.training.checkpoint import Checkpoints
from minimax_m1.training.parallel import World
from minimax_m1.training.settings import TrainSettings
from minimax_m1.training.vocabulary import build_tokenizer, extend_embeddings, train_prefix_tokenizer
from tests.tolerances import LOGITS, relative_error

ONE_PROCESS = World(0, 1, torch.device("cpu"), None, 0, 1, 0, 1, None)
OLD_TEXTS = ["the answer is what the user wants to know. Add and sort the letters of a word.\n"] * 3
NEW_TEXTS = ["quiet quails quote quizzes; Quince jam, please. The quick fox thanks the other one.\n"] * 3
OLD_SIZE, NEW_SIZE = 330, 360
REFUSED = r"^vocab_size: only a vocabulary that was built here can be extended; accepted: 0 with this init$"
OTHER_TEXTS = [
    "",
    " ",
    "1024 + 7 = 1031\r\n\r\n",
    " Ünï cödé, 你 好 🙂",
    "<think>\nquite\n</think>\n",
    "theanswer  is\tThe",
]


@pytest.fixture(scope="module")
def old() -> MiniMaxM1Tokenizer:
    return train_prefix_tokenizer(OLD_TEXTS, OLD_SIZE)


@pytest.fixture(scope="module")
def new(old: MiniMaxM1Tokenizer) -> MiniMaxM1Tokenizer:
    return train_prefix_tokenizer(NEW_TEXTS, NEW_SIZE, old)


@pytest.fixture(scope="module")
def model(old: MiniMaxM1Tokenizer) -> MiniMaxM1ForCausalLM:
    config = MiniMaxM1Config(
        vocab_size=len(old), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, rotary_dim=8, attn_type_list=(0, 1), num_local_experts=4,
        bos_token_id=old.bos_token_id, eos_token_id=old.eos_token_id, pad_token_id=old.pad_token_id,
    )  # fmt: skip
    model = MiniMaxM1ForCausalLM(config)
    model.init_weights(seed=0)
    return model


def by_id(tokenizer: MiniMaxM1Tokenizer) -> dict[int, str]:
    return {row: token for token, row in tokenizer.get_vocab().items()}


# -- building ---------------------------------------------------------------------------------------------------------


def test_bytes_then_merges_then_added_tokens(old: MiniMaxM1Tokenizer) -> None:
    assert len(old) == OLD_SIZE == 256 + len(old.merges) + len(TRAINED_ADDED_TOKENS)
    tokens = by_id(old)
    assert [tokens[256 + i] for i in range(len(old.merges))] == [left + right for left, right in old.merges]
    assert tuple(tokens[row] for row in sorted(old.added_tokens.values())) == TRAINED_ADDED_TOKENS
    assert min(old.added_tokens.values()) == OLD_SIZE - len(TRAINED_ADDED_TOKENS)
    assert all(len(right) == 1 for _, right in old.merges)  # a merge extends a beginning by one character


def test_an_extended_vocabulary_begins_with_the_old_one(old: MiniMaxM1Tokenizer, new: MiniMaxM1Tokenizer) -> None:
    assert len(new) == NEW_SIZE
    assert new.merges[: len(old.merges)] == old.merges
    base = 256 + len(old.merges)
    assert {t: i for t, i in old.get_vocab().items() if i < base} == {
        t: i for t, i in new.get_vocab().items() if i < base
    }
    moved = NEW_SIZE - OLD_SIZE
    assert new.added_tokens == {token: row + moved for token, row in old.added_tokens.items()}
    assert (new.split_patterns, new.settings) == (old.split_patterns, old.settings)
    assert "Ġquot" in new.get_vocab() and "Ġquot" not in old.get_vocab()


def test_texts_keep_their_bytes_and_old_pieces_are_only_joined(
    old: MiniMaxM1Tokenizer, new: MiniMaxM1Tokenizer
) -> None:
    for text in (*OTHER_TEXTS, *OLD_TEXTS, *NEW_TEXTS, " " + NEW_TEXTS[0]):
        ids = new.encode(text)
        assert new.decode(ids) == text
        spelled, before = ([by_id(t)[row] for row in t.encode(text)] for t in (new, old))
        assert "".join(spelled) == "".join(before)
        ends, ends_before = (
            [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))] for pieces in (spelled, before)
        )
        assert set(ends) <= set(ends_before)
    assert len(new.encode(NEW_TEXTS[0])) < len(old.encode(NEW_TEXTS[0]))


def test_extending_by_nothing_changes_nothing(old: MiniMaxM1Tokenizer) -> None:
    same = train_prefix_tokenizer(NEW_TEXTS, OLD_SIZE, old)
    assert same.get_vocab() == old.get_vocab() and same.merges == old.merges


@pytest.mark.parametrize(("size", "least"), [(OLD_SIZE - 1, OLD_SIZE), (0, OLD_SIZE)])
def test_a_size_below_what_is_there_is_refused(old: MiniMaxM1Tokenizer, size: int, least: int) -> None:
    with pytest.raises(UserError, match=f"^vocab_size: {size} cannot be used; accepted: {least} or more$"):
        train_prefix_tokenizer(NEW_TEXTS, size, old)


def test_a_vocabulary_with_another_split_is_refused_in_one_line() -> None:
    size = 256 + len(TRAINED_ADDED_TOKENS)
    other = MiniMaxM1Tokenizer(
        build_backend([], O200K_SPLIT), dict(zip(TRAINED_ADDED_TOKENS, range(256, size), strict=True))
    )
    with pytest.raises(UserError, match=REFUSED):
        train_prefix_tokenizer(NEW_TEXTS, 400, other)


def test_the_official_vocabulary_is_refused_in_one_line(shared_data: Path) -> None:
    official = MiniMaxM1Tokenizer.from_pretrained(shared_data / "minimax-m1")
    with pytest.raises(UserError, match=REFUSED):
        train_prefix_tokenizer([], 200_100, official)


# -- where a run's vocabulary comes from ------------------------------------------------------------------------------


def run_settings(folder: Path, **changes: object) -> TrainSettings:
    return TrainSettings.from_dict({"output": str(folder / "run"), "mixture": {"addition": 1.0}, **changes})


@pytest.fixture
def _few_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "VOCABULARY_RECORDS", 200)


@pytest.mark.usefixtures("_few_records")
def test_without_init_it_is_built_from_the_mixture(tmp_path: Path) -> None:
    settings = run_settings(tmp_path, vocab_size=320)
    built = build_tokenizer(settings)
    assert len(built) == 320
    assert built.get_vocab() == build_tokenizer(settings).get_vocab()
    other = build_tokenizer(replace(settings, mixture={"sorting": 1.0}))
    assert built.get_vocab() != other.get_vocab()
    with pytest.raises(UserError, match=r"^vocab_size: 0 cannot be used without init"):
        build_tokenizer(replace(settings, vocab_size=0))


@pytest.mark.usefixtures("_few_records")
def test_with_init_it_is_inits_extended_where_asked(old: MiniMaxM1Tokenizer, tmp_path: Path) -> None:
    old.save_pretrained(tmp_path / "init")
    settings = run_settings(tmp_path, init=str(tmp_path / "init"))
    assert build_tokenizer(settings).get_vocab() == old.get_vocab()
    extended = build_tokenizer(replace(settings, vocab_size=OLD_SIZE + 8))
    assert len(extended) == OLD_SIZE + 8 and extended.merges[: len(old.merges)] == old.merges


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # said at every save in one process
@pytest.mark.usefixtures("_few_records")
def test_a_run_that_goes_on_keeps_its_own(old: MiniMaxM1Tokenizer, tmp_path: Path) -> None:
    old.save_pretrained(tmp_path / "run" / "tokenizer")
    with Checkpoints(tmp_path / "run" / "checkpoints", 1, ONE_PROCESS) as checkpoints:
        checkpoints.save(1, {"model": {"w": torch.zeros(1)}})
    settings = run_settings(tmp_path, vocab_size=320)
    assert build_tokenizer(settings).get_vocab() == old.get_vocab()
    assert len(build_tokenizer(replace(settings, resume=False))) == 320


# -- the network's rows -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_old_tokens_mean_what_they_meant(
    model: MiniMaxM1ForCausalLM, old: MiniMaxM1Tokenizer, new: MiniMaxM1Tokenizer
) -> None:
    """On a text of old pieces only, the logits of the old tokens are those of before, wherever their ids are now."""
    grown = extend_embeddings(model, old, new)
    assert (grown.config.vocab_size, grown.config.eos_token_id) == (NEW_SIZE, new.eos_token_id)
    assert model.config.vocab_size == OLD_SIZE
    ids = [old.bos_token_id, *old.encode(OLD_TEXTS[0]), old.eos_token_id]
    places = torch.tensor([new.get_vocab()[by_id(old)[row]] for row in range(OLD_SIZE)])
    assert new.encode(OLD_TEXTS[0]) == ids[1:-1]  # no new token occurs
    before, after = (
        network.compute_logits(network.forward_packed(torch.as_tensor(row_ids), ForwardBatch.packed([len(ids)]))[0])
        for network, row_ids in ((model, ids), (grown, places[ids]))
    )
    assert relative_error(after[:, places], before) < LOGITS


def merged(token: str, merges: list[tuple[str, str]]) -> list[str]:
    """Apply the merges in order, each wherever it fits, from the left."""
    pieces = list(token)
    for left, right in merges:
        i = 0
        while i < len(pieces) - 1:
            if pieces[i : i + 2] == [left, right]:
                pieces[i : i + 2] = [left + right]
            i += 1
    return pieces


@pytest.mark.parametrize(
    "texts",
    [
        pytest.param(NEW_TEXTS, id="ASCII"),
        pytest.param([" été, élève, ñu, Évian; 你好, 你们 äß"] * 3, id="in any language"),
    ],
)
def test_new_tokens_begin_as_their_pieces(
    model: MiniMaxM1ForCausalLM, old: MiniMaxM1Tokenizer, texts: list[str]
) -> None:
    """The pieces of a token: what the old merges, by brute force, make of its bytes; it may end inside a character."""
    new = train_prefix_tokenizer(texts, NEW_SIZE, old)
    grown = extend_embeddings(model, old, new)
    known = old.get_vocab()
    fresh = {token: row for token, row in new.get_vocab().items() if token not in known}
    assert len(fresh) > 20
    for token, row in fresh.items():
        pieces = [known[piece] for piece in merged(token, old.merges)]
        mean = model.model.embed_tokens.weight[pieces].mean(0)
        assert torch.equal(grown.model.embed_tokens.weight[row], mean), token
        assert torch.equal(grown.lm_head.weight[row], model.lm_head.weight[pieces[0]]), token


def test_the_same_vocabulary_is_the_same_network(model: MiniMaxM1ForCausalLM, old: MiniMaxM1Tokenizer) -> None:
    assert extend_embeddings(model, old, train_prefix_tokenizer([], OLD_SIZE, old)) is model
