"""Bad input of the command line: an exit code, one line, no traceback, nothing left behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_model import CONFIG, fails, make_checkpoint, make_store, run
from tiny_checkpoints import expert_names, make_tensors, write_raw, write_tensors

from edgemoe.store import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "src")


@pytest.fixture
def clean(tmp_path: Path) -> Iterator[Path]:
    """The place for OUT; nothing may be in it when the test ends."""
    place = tmp_path / "place"
    place.mkdir()
    yield place
    assert os.listdir(place) == []


def flip(path: Path, at: int, out: Path) -> Path:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    out.write_bytes(data)
    return out


# What is not there, or not what it should be.


@pytest.mark.parametrize("name", ["x.emoe", "x.gguf", "dir/x.safetensors"])
def test_missing_model(name: str, clean: Path) -> None:
    says = f"{name}: cannot open the model: No such file or directory .*-p"
    fails("run", name, says=says, cwd=clean)
    fails("run", name, "hello", says=says, cwd=clean)
    fails("inspect", name, says=says, cwd=clean)


def test_missing_model_by_option(clean: Path) -> None:
    fails("run", "-m", "nothing", "hi", says="nothing: cannot open the model", cwd=clean)


def test_hub_names_are_not_downloaded(clean: Path) -> None:
    says = r"downloads nothing: hf download org/name .* && edgemoe convert name name\.emoe"
    fails("run", "-m", "org/name", "hi", says=says, code=2, cwd=clean)
    fails("convert", "org/name", "x.emoe", says=says, code=2, cwd=clean)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "the text is empty"),
        (b" \n\n", "the text is empty"),
        (b"Once upon a time.", r"17 tokens are too few to calibrate on: give text of at least"),
        (bytes(range(256)) * 9, "not UTF-8 text at byte 128"),
        (b"GGUF\0\0\0\0" * 99, "a binary file, not text"),
        (None, "cannot read the text: No such file or directory"),
    ],
)
def test_calibration_text_that_is_none(
    data: bytes | None, says: str, checkpoint: Path, tmp_path: Path
) -> None:
    text = tmp_path / "calib.txt"
    if data is not None:
        text.write_bytes(data)
    fails("convert", checkpoint, tmp_path / "x.emoe", "--calib", text, says=says, code=2)
    assert not list(tmp_path.glob("*.emoe*"))


def test_missing_checkpoint(clean: Path) -> None:
    fails("convert", "nowhere", "x.emoe", says="nowhere does not exist", cwd=clean)


def test_directory_without_config(tmp_path: Path, clean: Path) -> None:
    (tmp_path / "empty").mkdir()
    fails("run", tmp_path / "empty", says=r"is a directory without config\.json: neither")
    fails("inspect", tmp_path / "empty", says=r"is a directory without config\.json")
    fails("convert", tmp_path / "empty", clean / "x.emoe", says=r"has no config\.json; give")


def test_checkpoint_where_a_store_is_wanted(checkpoint: Path, tmp_path: Path) -> None:
    says = f"is a checkpoint, not a store; convert it once: edgemoe convert {checkpoint} src.emoe$"
    fails("run", checkpoint, "hi", says=says)
    fails("run", "-m", checkpoint, says=says)
    fails("inspect", checkpoint, says=says)
    spaced = tmp_path / "a b"
    shutil.copytree(checkpoint, spaced)
    fails("run", spaced, says=f"edgemoe convert '{spaced}' 'a b.emoe'$")
    shard = checkpoint / "model.safetensors"
    fails("run", shard, says=f"part of a checkpoint, .* edgemoe convert {checkpoint} src.emoe$")


def test_gguf_where_a_store_is_wanted(tmp_path: Path, clean: Path) -> None:
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF" + bytes(60))
    fails("run", gguf, says=f"is a GGUF file, not a store; .*edgemoe convert {gguf} m.emoe$")
    renamed = gguf.rename(tmp_path / "m.bin")
    fails("run", renamed, says="is a GGUF file, not a store")
    fails("convert", renamed, clean / "x.emoe", says="is GGUF version 0; only versions 2 and 3")


@pytest.mark.parametrize("data", [b"", b"EDGEMOE\0", os.urandom(20_000)])
def test_not_a_store(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.emoe"
    path.write_bytes(data)
    fails("run", path, "hi", says=r"x\.emoe")
    fails("inspect", path, says=r"x\.emoe")


def test_a_pipe_is_not_waited_on(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.emoe")
    fails("run", tmp_path / "x.emoe", "hi", says="not a file")


def test_a_name_with_control_characters_stays_on_one_line(tmp_path: Path) -> None:
    fails("run", "evil\n\x1b[31m.emoe", says=r"evil\\n\\x1b\[31m\.emoe", cwd=tmp_path)


# Damaged checkpoints.


def rewrite(checkpoint: Path, **changes: Any) -> None:
    tensors = make_tensors(CONFIG)
    for change in changes.values():
        change(tensors)
    write_tensors(checkpoint / "model.safetensors", tensors)


def test_truncated_safetensors(checkpoint: Path, clean: Path) -> None:
    path = checkpoint / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    fails("convert", checkpoint, clean / "x.emoe", says=r"model\.safetensors")
    os.truncate(path, 5)
    fails("convert", checkpoint, clean / "x.emoe", says=r"model\.safetensors")


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def test_overlapping_safetensors(checkpoint: Path, clean: Path) -> None:
    path = checkpoint / "model.safetensors"
    header, data = header_of(path)
    first, second = expert_names(0, 0)[:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    write_raw(path, header, data)
    fails("convert", checkpoint, clean / "x.emoe", says=r"model\.safetensors")


def test_shape_product_that_wraps(checkpoint: Path, clean: Path) -> None:
    path = checkpoint / "model.safetensors"
    header, data = header_of(path)
    header["model.norm.weight"]["shape"] = [2**62 + 4, 4]
    write_raw(path, header, data)
    fails("convert", checkpoint, clean / "x.emoe", says=r"model\.safetensors")


def test_wrong_tensor_shape(checkpoint: Path, clean: Path) -> None:
    name = expert_names(2, 1)[0]
    rewrite(checkpoint, shape=lambda t: t.update({name: t[name].T.copy()}))
    says = rf"{name}.* has shape \[16, 12\], where config\.json implies \[12, 16\]"
    fails("convert", checkpoint, clean / "x.emoe", says=says)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", [expert_names(2, 3)[2], "model.norm.weight"])
def test_nan_weights(name: str, bad: float, checkpoint: Path, clean: Path) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors[name].reshape(-1)[-1] = bad

    rewrite(checkpoint, spoil=spoil)
    fails("convert", checkpoint, clean / "x.emoe", says=name.replace(".", r"\."))


def test_unknown_tensor_config_and_family(checkpoint: Path, clean: Path) -> None:
    rewrite(checkpoint, more=lambda t: t.update({"model.extra.weight": np.ones(3, np.float32)}))
    fails("convert", checkpoint, clean / "x.emoe", says=r"model\.extra\.weight")
    rewrite(checkpoint)
    for change in ({"surprise": 1}, {"hidden_act": "gelu"}, {"model_type": "gpt9"}):
        (checkpoint / "config.json").write_text(json.dumps(CONFIG | change))
        [(key, value)] = change.items()
        fails("convert", checkpoint, clean / "x.emoe", says=f"{key}.*{value}|{value}.*{key}")


def test_tokenizer_missing(checkpoint: Path, clean: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    fails("convert", checkpoint, clean / "x.emoe", says=r"has no tokenizer\.json; download it")


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("tokenizer.json", "{}", r"tokenizer\.json cannot be loaded"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json is not a JSON object"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "chat template, line 1"),
        ("chat_template.jinja", "{{ 'open", "chat template, line 1"),
        ("generation_config.json", '{"num_beams": 5}', "num_beams = 5 is not supported"),
        ("generation_config.json", '{"top_p": 3}', "top_p must be a number above 0"),
    ],
)
def test_text_side_is_checked_before_the_weights(
    file: str, content: str, says: str, checkpoint: Path, clean: Path
) -> None:
    (checkpoint / file).write_text(content)
    fails("convert", checkpoint, clean / "x.emoe", says=says)


# What must not be overwritten, and where nothing can be written.


def test_existing_out(checkpoint: Path, store: Path, tmp_path: Path) -> None:
    out = tmp_path / "old.emoe"
    shutil.copy(store, out)
    before = out.read_bytes()
    fails("convert", checkpoint, out, says="exists already; give --force", code=2)
    assert out.read_bytes() == before
    assert run("convert", checkpoint, out, "--force")[0] == 0
    letter = tmp_path / "letter.txt"
    letter.write_text("Dear")
    for name in (letter, checkpoint / "model.safetensors"):
        says = "is not a store, so --force does not replace it"
        fails("convert", checkpoint, name, "--force", says=says, code=2)
    assert letter.read_text() == "Dear"
    fails("convert", checkpoint, tmp_path, "--force", says="is a directory; give", code=2)
    fails("convert", checkpoint, "/dev/null", "--force", says="not a regular file", code=2)
    fails(
        "convert",
        checkpoint,
        tmp_path / "no/x",
        says="there is no directory .*no; make it first",
        code=2,
    )
    assert not any("tmp" in p.name or p.name.startswith(".") for p in tmp_path.iterdir())


def test_full_disk(checkpoint: Path, clean: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(clean)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system")
    try:
        says = r"x\.emoe.*No space left on device; free \d+ bytes or choose another place"
        fails("convert", checkpoint, clean / "x.emoe", says=says)
        assert os.listdir(clean) == []
    finally:
        subprocess.run(["umount", str(clean)], check=True)


def test_file_size_limit(checkpoint: Path, clean: Path) -> None:
    """What a full disk looks like where no small disk can be mounted."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    says = r"cannot write .*x\.emoe: File too large"
    fails("convert", checkpoint, clean / "x.emoe", says=says, preexec_fn=limit)


# Damaged stores.


def test_store_with_a_flipped_bit(store: Path, tmp_path: Path) -> None:
    with Store.open(store) as sound:
        expert = sound.expert_segment(2, 1, 4).offset
        dense = sound.tensor_segments("layers.1.q")[0].offset
        section = sound.sections["tokenizer.json"].offset
    for at, what in [
        (expert, "layer 2 expert 1 segment 8-bit"),
        (dense, r"tensor layers\.1\.q segment 2-bit"),
        (section, r"section tokenizer\.json"),
    ]:
        broken = flip(store, at + 70, tmp_path / "b.emoe")
        fails("run", broken, "hi", "--bits", "8", says=f"{what} is damaged")
        if at == expert:  # a segment that 6 bits do not read
            assert run("run", broken, "hi", "--bits", "6", "-n", "3")[0] == 0
        code, out, err = run("inspect", broken, "--verify")
        assert code == 1 and err == ""
        assert "DAMAGED" in out and what.replace("\\", "") in out.splitlines()[-1]
        code, out, _ = run("inspect", broken, "--verify", "--json")
        assert code == 1 and len(json.loads(out)["damaged"]) == 1


def test_store_with_a_damaged_header(store: Path, tmp_path: Path) -> None:
    with Store.open(store) as sound:
        header = sound._block.header_offset
    broken = flip(store, header + 40, tmp_path / "b.emoe")
    for command in (["run", broken, "hi"], ["inspect", broken], ["inspect", broken, "--verify"]):
        fails(*command, says=r"b\.emoe: .*header")
    cut = tmp_path / "cut.emoe"
    cut.write_bytes(store.read_bytes()[:-10])
    fails("run", cut, "hi", says=r"cut\.emoe")


# Settings and prompts.


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--bits", "5"], "'--bits': must be 2, 3, 4, 6 or 8, not 5"),
        (["--dense-bits", "x"], "'--dense-bits': must be 2, 3, 4, 6 or 8, not x"),
        (["-t", "0"], "'--threads': must be a whole number from 1 to 1024, not 0"),
        (["-t", "10000"], "'--threads': must be a whole number from 1 to 1024, not 10000"),
        (["--kv-type", "f32"], "'f32' is not one of 'f16', 'int8'"),
        (["-t", "1025"], "from 1 to 1024, not 1025"),
        (["-n", "0"], "'--max-tokens': must be a whole number from 1 to 2147483647, not 0"),
        (["-n", "many"], "must be a whole number .*, not many"),
        (["-c", "-5"], "'--ctx-size': must be a whole number from 1"),
        (["--temp", "-1"], "'--temp': must be a number from 0 to 100, not -1"),
        (["--temp", "nan"], "from 0 to 100, not nan"),
        (["--top-k", "-1"], "'--top-k': must be a whole number from 0"),
        (["--top-p", "2"], "'--top-p': must be a number above 0 to 1, not 2"),
        (["--top-p", "0"], "above 0 to 1, not 0"),
        (["--min-p", "1.1"], "'--min-p': must be a number from 0 to 1, not 1.1"),
        (["--repeat-penalty", "0"], "'--repeat-penalty': must be a number above 0 to 100, not 0"),
        (["--seed", "-1"], "'--seed': must be a whole number from 0 to 18446744073709551615"),
        (["--mem", "lots"], "'--mem': 'lots' is not a memory size: write it as 512M"),
        (["--mem", "0"], "'--mem': a memory size must be above zero"),
        (["--stop", ""], "--stop needs some text"),
        (["--nosuch"], "No such option.*--nosuch"),
        (["-c", "32769"], "context size must be from 1 to 32768 for this model, not 32769"),
    ],
)
def test_settings_out_of_range(args: list[str], says: str, store: Path) -> None:
    fails("run", store, "hi", *args, says=says, code=2)


def test_memory_that_is_too_little(store: Path) -> None:
    says = r"--mem 1\.0 MiB is too little: .*need \d+\.\d [MG]iB; give --mem \d+M or more"
    fails("run", store, "hi", "--mem", "1M", says=says)


def test_the_named_memory_is_enough(store: Path) -> None:
    _, _, err = run("run", store, "hi", "--mem", "1M", "-n", "4")
    needed = err.split("give --mem ")[1].split()[0]
    assert run("run", store, "hi", "--mem", needed, "-n", "4")[0] == 0


def test_empty_prompts(store: Path) -> None:
    says = "the prompt is empty"
    fails("run", "", says=says, code=2)
    fails("run", store, "", says=says, code=2)
    fails("run", store, says=says, code=2, text=b"\n")
    fails("run", store, says=says, code=2)  # stdin is /dev/null


def test_prompts_that_are_not_text(store: Path) -> None:
    fails("run", store, says="not UTF-8 at byte 2", code=2, text=b"ab\xff")
    fails(
        "run", store, b"ab\xff".decode("utf-8", "surrogateescape"), says="not valid UTF-8", code=2
    )


def test_prompt_longer_than_the_context(store: Path) -> None:
    says = r"the prompt has 40 tokens and the context 16: give a larger --ctx-size or shorten it"
    fails("run", store, "--raw", "x" * 40, "-c", "16", says=says, code=2)
    says = r"the prompt has 32768 tokens and the context 32768: shorten it"
    fails("run", store, "--raw", says=says, code=2, text=b"x" * 32768)


def test_a_prompt_without_end(store: Path) -> None:
    says = "the prompt has 9000000 characters, far more than the 32768 tokens .*: shorten it"
    fails("run", store, "--mem", "512M", says=says, code=2, text=b"x" * 9_000_000)
    fails("run", store, says="longer than 16 MiB", code=2, text=b"x" * 17_000_000)


def test_arguments_that_contradict(store: Path) -> None:
    says = "more than one model and one prompt were given: put the prompt in quotes"
    fails("run", store, "two", "-p", "three", says=says, code=2)
    fails("run", store, "two", "-m", "three", says=says, code=2)
    fails("run", store, "once", "upon", says=r"unexpected extra argument.*upon", code=2)
    fails("convert", store, says="Missing argument 'OUT'", code=2)
    fails("nosuch", says="No such command 'nosuch'", code=2)


def test_output_that_cannot_be_written(store: Path) -> None:
    with open("/dev/full", "wb") as full:
        for more in ([], ["--json"]):
            code, _, err = run("run", store, "hi", "-n", "4", *more, stdout=full)
            assert code == 1 and "Traceback" not in err
            assert err.splitlines()[-1].endswith("No space left on device")
        code, _, err = run("inspect", store, stdout=full)
        assert code == 1 and len(err.splitlines()) == 1
