"""One rank of `minimax-m1 train`, with a vocabulary from few records and without a report, for speed."""

from pathlib import Path

import torch._dynamo  # noqa: F401 here, or torch loads it in every rank when it first divides a tensor

from minimax_m1.settings import read_toml
from minimax_m1.training import trainer, vocabulary
from minimax_m1.training.settings import TrainSettings


def main(recipe: str) -> None:
    vocabulary.VOCABULARY_RECORDS = 300
    trainer._write_report = lambda output: None
    trainer.train(TrainSettings.from_dict(read_toml(Path(recipe))))
