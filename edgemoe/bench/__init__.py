"""How fast a store is prefilled and decoded here, beside what the machine could do, and llama.cpp.

    measure.py    rounds of both sides in turn
    result.py     what they add up to
    timing.py     seconds of some work; percentiles
    tokens.py     what is fed
    traffic.py    bytes and multiply-adds a token, from the layouts
    machine.py    memory bandwidth and integer throughput
    llamacpp.py   the other side; llamacpp_child.py runs in its Python

Everything is measured in one run, in turn: on a machine that others use too, only that compares.
"""

from __future__ import annotations

from .measure import bench
from .result import Bench, LlamaCppBench
from .timing import Spread

__all__ = ["Bench", "LlamaCppBench", "Spread", "bench"]
