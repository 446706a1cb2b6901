"""One rank of `minimax-m1 train`, with a vocabulary from few records, for speed."""

import sys
from pathlib import Path

from minimax_m1.settings import read_toml
from minimax_m1.training import vocabulary
from minimax_m1.training.settings import TrainSettings
from minimax_m1.training.trainer import train

if __name__ == "__main__":
    vocabulary.VOCABULARY_RECORDS = 300
    train(TrainSettings.from_dict(read_toml(Path(sys.argv[1]))))
