"""Hotness and the order of work: pure functions of demands; no disk, no CPU features."""
