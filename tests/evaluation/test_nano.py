"""The table of m1-nano: made for any model, refused for unknown families, and true of the shipped one."""

import json

import pytest

from minimax_m1 import shipped
from minimax_m1.errors import UserError
from minimax_m1.evaluation.nano import FamilyResult, evaluate_nano, to_table
from minimax_m1.settings import EvalSettings


def test_an_untrained_model_has_a_table_of_zeros(tiny_checkpoint, capsys):
    settings = EvalSettings(model=tiny_checkpoint, problems=2, families=("addition", "sorting"), json=True)
    evaluate_nano(settings)
    table = json.loads(capsys.readouterr().out)
    assert table["families"]["addition"] == {"problems": 2, "correct": 0, "accuracy": 0.0}
    assert list(table["families"]) == ["addition", "sorting"]


def test_the_table():
    results = [FamilyResult("addition", 4, 3, 100, [("1+1", "3", "2")]), FamilyResult("sorting", 4, 4, 50, [])]
    lines = to_table(results, seconds=2.0).splitlines()
    assert lines[2] == "| addition | 4 | 3 | 75.0% |"
    assert lines[4] == "| all | 8 | 7 | 87.5% |"


def test_an_unknown_family_is_one_clear_line(tiny_checkpoint):
    with pytest.raises(UserError, match="families: 'poetry' is not known"):
        evaluate_nano(EvalSettings(model=tiny_checkpoint, families=("poetry",)))


WEAK = ("alphabetical order", "Roman numerals")  # its card says so


@pytest.mark.slow
def test_the_shipped_model_solves_unseen_problems():
    try:
        shipped.path()
    except UserError as error:
        pytest.skip(str(error))
    for result in evaluate_nano(EvalSettings(problems=25, seed=1)):
        least = 0.5 if result.family in WEAK else 0.8
        assert result.accuracy >= least, f"{result.family}: {result.errors[:3]}"
