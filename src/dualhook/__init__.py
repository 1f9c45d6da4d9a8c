"""Record the dual memory of a training run, then ask which training patterns a prediction attends to.

A linear map trained by gradient descent is a key-value memory of its own training (Irie, Csordás, Schmidhuber,
*The Dual Form of Neural Networks Revisited*, ICML 2022)::

    W_T q  =  a_T W_0 q  +  sum_s value_s (key_s · q)        value_s = -c_s ∂L/∂y_s,  key_s = x_s

====================  =======================================================================  =========
word                  meaning                                                                  shape
====================  =======================================================================  =========
pattern               one row: one position of one sample through one layer in one step
key                   the layer's input x_s (a bias is one more component, the constant 1)     [n, i]
output_grad           ∂L/∂y_s as autograd gives it, stored raw                                 [n, o]
coefficient c_s       what the optimiser made of it, up to the step asked about
value                 -c_s · output_grad                                                       [n, o]
query                 the layer's input for a test sample                                      [q, i]
attention weight      key_s · query, signed                                                    [q, n]
contribution          u · value_s (key_s · query) for a direction u on the layer's output      [q, n]
explained             the share of W_T q - a_T W_0 q that the patterns add up to
cancellation          sum of absolute contributions over the absolute value of their sum
====================  =======================================================================  =========

Letters in shapes: n pattern, i input, o output, t step, q query, b sample of a batch.
"""

from __future__ import annotations

from importlib import metadata

from dualhook.attention import Attention
from dualhook.compaction import compact
from dualhook.errors import DualHookError, InexactWarning
from dualhook.influence import Influence
from dualhook.memory import DualMemory, load
from dualhook.recorder import Recorder, instrument
from dualhook.table import Table

__all__ = [
    "Attention",
    "DualHookError",
    "DualMemory",
    "InexactWarning",
    "Influence",
    "Recorder",
    "Table",
    "compact",
    "instrument",
    "load",
]

__version__ = metadata.version("dualhook")
