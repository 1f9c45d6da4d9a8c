"""Questions: streaming passes over the patterns, and what they add up to."""

from __future__ import annotations

from dualhook.query.answers import Answer, Answers
from dualhook.query.collectors import GroupSums, Receipt, TopPatterns, TopPatternsBy
from dualhook.query.cosine import cosine_scores, norms_of_queries
from dualhook.query.decay import leaves_out_decay
from dualhook.query.fit import fit_decay
from dualhook.query.gradients import Gradient
from dualhook.query.influence import Decay, contributed_scores, decayed_scores
from dualhook.query.parts import REPLAY_BYTES, Composition, ReplayShare, StepTaken, Synchronization
from dualhook.query.pull import pull_of
from dualhook.query.replay import Replay
from dualhook.query.scores import LayerQuery, Scores
from dualhook.query.sealed import seal
from dualhook.query.self_influence import self_influence
from dualhook.query.slots import answered
from dualhook.query.streaming import KEPT, dual_output, scan
from dualhook.query.tasks import HERE, Collector, Workers
from dualhook.query.weights import rebuild

__all__ = [
    "HERE",
    "KEPT",
    "REPLAY_BYTES",
    "Answer",
    "Answers",
    "Collector",
    "Composition",
    "Decay",
    "Gradient",
    "GroupSums",
    "LayerQuery",
    "Receipt",
    "Replay",
    "ReplayShare",
    "Scores",
    "StepTaken",
    "Synchronization",
    "TopPatterns",
    "TopPatternsBy",
    "Workers",
    "answered",
    "contributed_scores",
    "cosine_scores",
    "decayed_scores",
    "dual_output",
    "fit_decay",
    "leaves_out_decay",
    "norms_of_queries",
    "pull_of",
    "rebuild",
    "scan",
    "seal",
    "self_influence",
]
