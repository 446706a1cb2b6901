"""`report` says where its page is; what is no run is one line."""

import json

import pytest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    return tmp_path


def test_one_run(run, folder) -> None:
    pytest.importorskip("matplotlib")
    assert run("report", folder) == (0, f"{folder / 'report.html'}\n", "")
    assert (folder / "report.html").is_file() and (folder / "report" / "loss.png").is_file()


def test_several_runs(run, folder, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(folder)
    assert run("report", folder, ".") == (0, "compare.html\n", "")
    assert run("report", folder, folder, "--output", "both.html") == (0, "both.html\n", "")
    assert (folder / "compare.html").is_file() and (folder / "both.html").is_file()


def test_no_run(run, folder) -> None:
    status, out, err = run("report", folder / "nothing")
    assert (status, out) == (2, "") and err.startswith("error: run: ") and err.count("\n") == 1
    assert run("report").err.startswith("error: run: none given")
