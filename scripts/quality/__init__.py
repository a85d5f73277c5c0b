"""What scripts/measure_quality.py is made of: how good quantized experts are, and beside whom."""

import os

# The float32 passes have threads of their own: BLAS's beside them made one four times as slow. It
# reads these once, when NumPy is first imported.
for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
