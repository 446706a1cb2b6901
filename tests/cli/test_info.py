"""`info` reads config.json alone and tells what the reports of M1 tell."""

import json
from pathlib import Path

from minimax_m1.config import PRESETS, MiniMaxM1Config


def test_minimax_m1(run) -> None:
    facts = json.loads(run("info", "--model", "minimax-m1", "--json").out)
    assert facts["parameters"]["total"] == 456_089_655_296
    assert facts["weight_bytes"]["bfloat16"] == 912_210_767_872
    assert (facts["architecture"]["lightning_layers"], facts["architecture"]["softmax_layers"]) == (70, 10)
    assert "reference" in facts["backends"]


def test_text_names_what_the_json_counts(run) -> None:
    status, out, err = run("info", "--model", "minimax-m1")
    assert (status, err) == (0, "")
    assert "456,089,655,296" in out and "849.6 GiB" in out and "94.97 GFLOP" in out


def test_every_preset(run) -> None:
    for name in PRESETS:
        assert json.loads(run("info", "--model", name, "--json").out)["model"] == name


def test_a_folder_with_nothing_but_a_config(run, tmp_path: Path) -> None:
    MiniMaxM1Config.preset("nano").save_pretrained(tmp_path)
    assert str(tmp_path) in run("info", "--model", tmp_path).out


def test_a_config_that_describes_no_network(run, tmp_path: Path) -> None:
    values = MiniMaxM1Config.preset("nano").to_dict() | {"num_attention_heads": 7}
    (tmp_path / "config.json").write_text(json.dumps(values))
    status, _, err = run("info", "--model", tmp_path)
    assert (status, err.count("\n")) == (2, 1)
    assert "num_attention_heads: 7" in err


def test_what_fits_into_a_cache(run, tmp_path: Path) -> None:
    facts = json.loads(run("info", "--model", "minimax-m1", "--cache-bytes", "8GiB", "--json").out)
    assert facts["cache"]["num_slots"] == 10 and facts["cache"]["used_bytes"] <= 8 * 2**30
    out = run("info", "--model", "minimax-m1", "--cache-bytes", "8GiB", "--max-batch-size", 4).out
    assert "4, a state of 280.0 MiB each: 1.1 GiB" in out and "pages of 64 tokens, 5.0 MiB each" in out
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("cache_bytes = 1000000000\nmax_batch_size = 1\n")
    assert "A cache of 953.7 MiB" in run("--config", recipe, "info", "--model", "minimax-m1").out


def test_a_cache_that_holds_nothing(run) -> None:
    status, _, err = run("info", "--model", "minimax-m1", "--cache-bytes", "100MB")
    assert (status, err.count("\n")) == (2, 1)
    assert "cache_bytes: 100,000,000 cannot be used; accepted: at least 298,844,160" in err
    assert "max_batch_size: 0" in run("info", "--cache-bytes", "1GB", "--max-batch-size", 0).err
