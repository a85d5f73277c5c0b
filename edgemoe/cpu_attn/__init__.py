"""Attention on the CPU and the KV cache."""
