"""Fixtures that more than one folder of tests uses."""

import os
from pathlib import Path

# Before anything imports Triton: it decides then whether kernels are compiled for a GPU or interpreted.
if not any(Path("/dev").glob("nvidia*")):
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from hypothesis import settings

from minimax_m1.config import MiniMaxM1Config

settings.register_profile("no deadline", deadline=None)  # a busy machine is no counterexample
settings.load_profile("no deadline")

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of data that is too large for the repository; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("MINIMAX_M1_DATA", PROJECT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data in {folder}; set MINIMAX_M1_DATA")
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with a random two-layer model and a tokenizer of a few lines. Do not write into it."""
    from minimax_m1.model import MiniMaxM1ForCausalLM
    from minimax_m1.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    words = "pear apple plum quince cherry orange think answer letter number sort words how many of the in".split()
    tokenizer = train_tokenizer([f"{first} {second}." for first in words for second in words], vocab_size=320)
    assert len(tokenizer) == 320  # the texts have enough pairs to merge
    config = MiniMaxM1Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attn_type_list=(0, 1),
        num_local_experts=4,
        max_position_embeddings=4096,
    )
    model = MiniMaxM1ForCausalLM(config)
    model.init_weights(seed=0)
    model.lm_head.weight.data[tokenizer.eos_token_id] = 0  # greedy, it talks on until it is stopped
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
