"""A checkpoint quantized and measured by llama.cpp's own programs.

They are not part of llama-cpp-python's wheel, but their sources are in its sdist:

    pip download --no-binary :all: --no-deps --no-build-isolation llama-cpp-python==0.3.36
    tar xf llama_cpp_python-0.3.36.tar.gz
    cmake -S llama_cpp_python-0.3.36/vendor/llama.cpp -B llama -DCMAKE_BUILD_TYPE=Release \\
        -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \\
        -DLLAMA_BUILD_SERVER=OFF -DGGML_NATIVE=ON
    cmake --build llama -j2 --target llama-quantize llama-imatrix llama-perplexity

(ten minutes on 2 cores); llama/bin is what --bin takes.

Everything but the experts is Q8_0, so that types differ by their experts alone. Divergences are
against the F16 file in llama.cpp, whose perplexity is the base of dppl: the "PPL(base)" that
llama-perplexity prints beside a divergence is of log probabilities cut off at -16, too low.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader

from edgemoe.checkpoint import Checkpoint
from edgemoe.errors import UsageError, shown
from edgemoe.evaluate import Window
from edgemoe.export import export
from edgemoe.terminal.evaluate_output import progress

from .scored_text import ScoredText, head
from .work import Product, Work, identity, run, say

TYPES = ("IQ2_XS", "Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
PROGRAMS = ("llama-quantize", "llama-imatrix", "llama-perplexity")
CALIBRATION_CTX = 512

_NUMBER = r"(-?(?:\d+\.?\d*(?:e[-+]?\d+)?|nan|inf))"
_FIGURES = {
    "kld": rf"Mean\s+KLD:\s*{_NUMBER}\s*±\s*{_NUMBER}",
    "ppl": rf"Mean PPL\(Q\)\s*:\s*{_NUMBER}\s*±\s*{_NUMBER}",
    "same_top": rf"Same top p:\s*{_NUMBER}\s*±\s*{_NUMBER}\s*%",
}


@dataclass(frozen=True)
class Programs:
    """Where llama.cpp's programs lie, and how many threads they take."""

    directory: Path
    threads: int

    def check(self) -> None:
        """Raise UsageError unless all are there."""
        missing = [name for name in PROGRAMS if not (self.directory / name).is_file()]
        if missing:
            raise UsageError(
                f"{shown(self.directory)} has no {', '.join(missing)}: build llama.cpp's tools as "
                "scripts/quality/llamacpp.py says"
            )

    def __getitem__(self, name: str) -> Path:
        return self.directory / name

    def key(self, name: str) -> dict[str, Any]:
        """What a product has in its key of the program that made it."""
        return {"program": identity(self[name])}


def measure(
    checkpoint: Checkpoint,
    programs: Programs,
    calibration: Path,
    calibration_bytes: int,
    text: ScoredText,
    work: Work,
    types: Sequence[str],
) -> list[dict[str, Any]]:
    """Bits, divergence, change of perplexity and same-top share of each type; JSON-ready.

    Raises:
        UsageError: a program fails, llama.cpp fell back to another type than asked for, or scored
            other tokens than `text` has.
    """
    programs.check()
    f16 = _export(checkpoint, work)
    imatrix = _imatrix(programs, f16, calibration, calibration_bytes, work)
    base, base_log = _base(programs, f16, text, work)
    check_tokens(base.path, text.windows)
    f16_ppl = base_perplexity(base_log.read_text(errors="replace"))
    others = matrices_besides_experts(f16.path)
    out = []
    for kind in types:
        quantized = _quantize(programs, kind, f16, imatrix, others, work)
        bits, held = expert_bits(quantized.path)

        def diverge(log: Path, model: Path = quantized.path) -> None:
            words = _perplexity(programs, model, text, base.path)
            run([*words, "--kl-divergence"], log)

        key = {"model": quantized.digest, "base": base.digest, **programs.key("llama-perplexity")}
        log = work.product(f"kld-{kind}-{text.name}.log", key, diverge)
        figures = read_figures(log.path.read_text(errors="replace"), log.path)
        figures["dppl"] = figures["ppl"] / f16_ppl - 1
        out.append({"type": kind, "bits": bits, "tensors": held} | figures)
        say(f"{kind}: {bits:.3f} bits, KLD {figures['kld']:.6f} +- {figures['kld_se']:.6f}")
    return out


def _export(checkpoint: Checkpoint, work: Work) -> Product:
    def make(out: Path) -> None:
        with progress("F16 export") as report:
            export(checkpoint.path, out, type="f16", progress=lambda a, b, _: report(a, b))

    return work.product(
        "f16.gguf", {"checkpoint": [identity(f) for f in checkpoint.fingerprint_files()]}, make
    )


def _imatrix(programs: Programs, f16: Product, calibration: Path, size: int, work: Work) -> Product:
    """Mean squares of activations; the calibration text keeps its markers, read as tokens."""

    def cut(out: Path) -> None:
        with calibration.open("rb") as file:
            out.write_bytes(head(file.read(size).decode("utf-8", "ignore"), size).encode())

    source = {"source": identity(calibration), "size": size}
    text = work.product("calibration.txt", source, cut)

    def make(out: Path) -> None:
        files: list[str | Path] = ["-m", f16.path, "-f", text.path, "-o", out]
        options = ["-c", str(CALIBRATION_CTX), "-t", str(programs.threads), "--parse-special"]
        run([programs["llama-imatrix"], *files, *options], work.directory / "imatrix.log")

    key = {"model": f16.digest, "text": text.digest, "ctx": CALIBRATION_CTX}
    key |= programs.key("llama-imatrix")
    return work.product("imatrix.gguf", key, make)


def _perplexity(programs: Programs, model: Path, text: ScoredText, base: Path) -> list[str | Path]:
    ctx = str(len(text.windows[0].tokens))
    threads = str(programs.threads)
    files: list[str | Path] = ["-m", model, "-f", text.path, "--kl-divergence-base", base]
    return [programs["llama-perplexity"], *files, "-c", ctx, "-t", threads]


def _base(programs: Programs, f16: Product, text: ScoredText, work: Work) -> tuple[Product, Path]:
    """The F16 model's log probabilities, two bytes a token of the vocabulary; and the run's log."""
    log = work.directory / f"f16-{text.name}.log"

    def make(out: Path) -> None:
        run(_perplexity(programs, f16.path, text, out), log)

    key = {"model": f16.digest, "text": text.digest, **programs.key("llama-perplexity")}
    return work.product(f"f16-{text.name}.kld", key, make), log


def _quantize(
    programs: Programs,
    kind: str,
    f16: Product,
    imatrix: Product,
    others: Sequence[str],
    work: Work,
) -> Product:
    log = work.directory / f"quantize-{kind}.log"
    options: list[str | Path] = ["--imatrix", imatrix.path, "--token-embedding-type", "q8_0"]
    options += ["--output-tensor-type", "q8_0"]
    options += [word for name in others for word in ("--tensor-type", f"{name}=q8_0")]

    def make(out: Path) -> None:
        ends: list[str | Path] = [f16.path, out, kind, str(programs.threads)]
        run([programs["llama-quantize"], *options, *ends], log)
        check_fallback(log.read_text(errors="replace"), kind)

    key = {"model": f16.digest, "imatrix": imatrix.digest, "type": kind, "others": list(others)}
    key |= programs.key("llama-quantize")
    return work.product(f"{kind}.gguf", key, make)


def check_fallback(log: str, kind: str) -> None:
    """Refuse a file in which llama-quantize put another type than asked for.

    Raises:
        UsageError: its log says so.
    """
    lines = [line for line in log.splitlines() if re.search(r"fallback quant|falling back", line)]
    if lines:
        raise UsageError(
            f"llama.cpp cannot make this model {kind}, rows do not fit its blocks: "
            f"{' '.join(lines[-1].split())}; leave {kind} out with --types"
        )


def matrices_besides_experts(path: Path) -> list[str]:
    """Patterns of llama-quantize's --tensor-type for all matrices but experts' and embeddings."""
    roles = set()
    for tensor in GGUFReader(path).tensors:
        name = str(tensor.name)
        matrix = tensor.tensor_type == GGMLQuantizationType.F16
        if matrix and "_exps" not in name and name.startswith("blk."):
            roles.add(name.split(".", 2)[2])
    return sorted(roles)


def expert_bits(path: Path) -> tuple[float, dict[str, int]]:
    """Bits a weight of all experts' tensors of a GGUF, and how many of these are of which type.

    Raises:
        UsageError: there are none, or a matrix besides them is not of 8 bits or more.
    """
    size = weights = 0
    held: dict[str, int] = {}
    for tensor in GGUFReader(path).tensors:
        kind = tensor.tensor_type.name
        if "_exps" in str(tensor.name):
            size += int(tensor.n_bytes)
            weights += int(tensor.n_elements)
            held[kind] = held.get(kind, 0) + 1
        elif kind not in ("Q8_0", "F16", "F32"):
            raise UsageError(f"{shown(path)}: {tensor.name} is {kind}, not Q8_0: not comparable")
    if not weights:
        raise UsageError(f"{shown(path)} has no experts")
    return 8 * size / weights, held


def read_figures(log: str, where: Path) -> dict[str, float]:
    """Figures that llama-perplexity --kl-divergence prints: kld in nats, same_top as a share.

    Raises:
        UsageError: one is missing, or not a number.
    """
    out = {}
    for name, pattern in _FIGURES.items():
        found = re.search(pattern, log)
        if found is None or not np.isfinite([float(found[1]), float(found[2])]).all():
            raise UsageError(f"{shown(where)}: llama-perplexity has not said its {name}")
        scale = 0.01 if name == "same_top" else 1.0
        out[name], out[f"{name}_se"] = scale * float(found[1]), scale * float(found[2])
    return out


def base_perplexity(log: str) -> float:
    """The perplexity that a run of llama-perplexity ends with.

    Raises:
        UsageError: it did not end.
    """
    found = re.search(rf"Final estimate: PPL = {_NUMBER}", log)
    if found is None:
        raise UsageError("llama-perplexity has not said the F16 model's perplexity")
    return float(found[1])


def check_tokens(base: Path, todo: Sequence[Window]) -> None:
    """Hold that llama.cpp scored the tokens we score (it writes them before it puts a BOS).

    Raises:
        UsageError: it did not.
    """
    with base.open("rb") as file:
        magic = file.read(8)
        ctx, _, chunks = np.frombuffer(file.read(12), "<i4").tolist()
        tokens = np.frombuffer(file.read(4 * ctx * chunks), "<i4")
    ours = np.stack([w.tokens for w in todo])
    same = magic == b"_logits_" and tokens.size == ours.size and ours.shape == (chunks, ctx)
    if not same or (tokens.reshape(ours.shape)[:, 1:] != ours[:, 1:]).any():
        raise UsageError(
            f"{shown(base)}: llama.cpp cut the text into {chunks} windows of {ctx} other tokens "
            f"than the {len(ours)} here: its tokenizer is not the checkpoint's"
        )
