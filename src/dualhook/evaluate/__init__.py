"""What retraining says about scores of influence: for any score, and any function that trains.

Everything rests on ``train(samples, seed)``: train on these dataset rows, return what is measured of fixed queries
[query], such as the margins of their classes. :func:`retrain` calls it for many parts of the data and keeps what came
out; the tables set scores [query, sample] beside it, positive where training on the sample raised what is measured::

    runs = dualhook.evaluate.retrain(train, samples, subsets=50, seeds=(0, 1), folder="retrainings")
    print(dualhook.evaluate.datamodelling_table(influence.scores, runs))
    print(dualhook.evaluate.noise_table(train, samples, folder="retrainings"))

Every table has its noise floor beside it: what another seed does, or a perturbation of the initial weights by rounding.
"""

from __future__ import annotations

from dualhook.evaluate.judging import (
    datamodelling_score,
    datamodelling_table,
    group_table,
    mislabel_table,
    noise_table,
    removal_table,
)
from dualhook.evaluate.retraining import Retrainings, random_subsets, retrain

__all__ = [
    "Retrainings",
    "datamodelling_score",
    "datamodelling_table",
    "group_table",
    "mislabel_table",
    "noise_table",
    "random_subsets",
    "removal_table",
    "retrain",
]
