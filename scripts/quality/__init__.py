"""What scripts/measure_quality.py is made of: how good quantized experts are, and beside whom."""
