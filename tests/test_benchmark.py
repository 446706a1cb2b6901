"""The benchmark runs, compares like with like, and refuses what it does not know."""

import json

import pytest

from minimax_m1.benchmark import llama_cpp, main
from minimax_m1.errors import UserError
from minimax_m1.settings import BenchSettings


@pytest.mark.slow
def test_a_quick_run_writes_its_figures(tmp_path, capsys):
    pytest.importorskip("transformers", reason="transformers is not installed: it is the peer")
    settings = BenchSettings(sizes=("nano",), quick=True, only=("decode-1", "train"), json=tmp_path / "figures.json")
    main(settings)
    written = json.loads((tmp_path / "figures.json").read_text())
    assert [row["case"] for row in written["figures"]] == ["nano decode-1", "nano train 4x512"]
    assert all(row["ours"] > 0 and row["peer"] > 0 and row["ceiling"] > 0 for row in written["figures"])
    assert written["machine"]["gemm_gflops"] > 0
    assert "ratio" in capsys.readouterr().out


def test_an_unknown_case_is_refused_before_anything_is_measured():
    with pytest.raises(UserError, match="only: 'speed' is not a case; choose from prefill-8k"):
        main(BenchSettings(only=("speed",)))


@pytest.mark.slow
def test_a_quick_run_of_the_engine(tmp_path):
    """Without Transformers' share: its peers are the engine itself."""
    cases = ("prefix", "routing-log", "speculation")
    main(BenchSettings(sizes=("nano",), quick=True, only=cases, json=tmp_path / "figures.json"))
    written = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert [row["case"] for row in written] == [
        "nano float32 first token, 512 cached",
        "nano int8 first token, 512 cached",
        "nano 16 requests, routing logs",
        "nano repeated text, 8 drafts",
    ]
    assert all(row["ours"] > 0 and row["peer"] > 0 for row in written)


def test_llama_cpp_is_used_or_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP_BIN", raising=False)
    monkeypatch.delenv("LLAMA_CPP_CONVERT", raising=False)
    assert llama_cpp.find(is_asked_for=False) is None
    with pytest.raises(UserError, match="LLAMA_CPP_BIN: is not set; accepted: a folder with llama-bench"):
        main(BenchSettings(only=("llama-cpp",)))
    monkeypatch.setenv("LLAMA_CPP_BIN", str(tmp_path / "build" / "bin"))
    with pytest.raises(UserError, match=r"LLAMA_CPP_BIN: .* has no llama-bench"):
        main(BenchSettings())
    (tmp_path / "build" / "bin").mkdir(parents=True)
    for tool in llama_cpp.TOOLS:
        (tmp_path / "build" / "bin" / tool).touch(mode=0o755)
    with pytest.raises(UserError, match=r"LLAMA_CPP_CONVERT: .* accepted: llama.cpp's convert_hf_to_gguf.py"):
        main(BenchSettings())
    (tmp_path / "convert_hf_to_gguf.py").touch()
    found = llama_cpp.find(is_asked_for=True)
    assert found is not None and found.converter == tmp_path / "convert_hf_to_gguf.py"
