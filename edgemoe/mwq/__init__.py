"""Nested ("matryoshka") quantization: one 8-bit code a weight whose top bits are every lower level.

quantize.py chooses codes and scales, packing.py owns the bit layout (docs/FORMAT.md), convert.py
streams a checkpoint into a store.
"""

from __future__ import annotations
