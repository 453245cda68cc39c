"""`sksm demo`: it proves what it claims, and leaves nothing behind."""

import importlib.metadata
import json
import os
import signal
import struct
import subprocess

import numpy as np
import psutil
import pytest

from sksm.commands.demonstration import data, proofs
from sksm.commands.demonstration.proofs import Proof
from sksm.linux import ksm
from sksm.linux.features import Feature
from tests.commands.conftest import PROGRAM
from tests.conftest import poll

pytestmark = [
    pytest.mark.machine,  # root's demo sets ksmd to work
    pytest.mark.usefixtures("runtime"),
    pytest.mark.needs(Feature.MEMFD, Feature.PAGEMAP, Feature.PROCESS_VM_READV),
]


def with_header(header):
    return struct.pack("<Q", len(header)) + header + b"x" * (1 << 17)


BEYOND = b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [99999999, 0]}}'


def test_small_demo_proves_everything(sksm_program, data_file, answer_of, runtime):
    """Two workers, 8 MiB: all four proofs, and the figures that back them."""
    done = sksm_program(
        "demo", "--workers=2", "--no-ksmd", "--json", f"--data={data_file}"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = answer_of(done.stdout)
    assert [proof["holds"] for proof in found["proofs"]] == [True] * 4
    assert found["data_bytes"] == 8 << 20
    first, second = found["merges"]
    assert first["stored_bytes"] == second["merged_bytes"] > 0.9 * found["data_bytes"]
    assert found["after"]["pool_bytes"] == first["stored_bytes"]
    change = found["total_before_bytes"] - found["total_after_bytes"]
    assert found["saved_bytes"] == change
    assert found["ksmd"]["seconds"] is None
    assert [path.name for path in runtime.glob("demo-*")] == []


@pytest.mark.usefixtures("in_80_columns")
def test_text_says_why_rss_does_not_fall(sksm_program, data_file):
    """On the first screen, in 80 columns, before anything is done."""
    done = sksm_program("demo", "--workers=2", "--no-ksmd", f"--data={data_file}")
    assert done.returncode == 0, done.stderr
    head = done.stdout[: done.stdout.index("Memory")]
    assert "RSS" in head
    assert "will not fall" in head
    assert max(len(line.rstrip()) for line in done.stdout.splitlines()) <= 80


def test_proof_that_fails_exits_with_1(sksm_here, data_file, monkeypatch):
    """And says so, in both forms."""
    failed = Proof("the data is in memory once", False, "it is not")
    monkeypatch.setattr(proofs, "saved", lambda *_: failed)
    args = ("demo", "--workers=2", "--no-ksmd", f"--data={data_file}")
    result = sksm_here(*args)
    assert result.exit_code == 1
    assert "FAILED  the data is in memory once" in result.stdout
    assert "Not everything was proved" in result.stdout
    result = sksm_here(*args, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["holds"] is False


def test_checksums_really_compare(tmp_path):
    """One byte that differs from the file, or from before, fails the proof."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    right = {"data": proofs.hashlib.sha256(b"x" * 100).hexdigest(), "private": "1"}
    assert proofs.intact(path, 100, [right, right], [right, right]).holds
    for wrong in ({**right, "data": "2"}, {**right, "private": "2"}):
        assert not proofs.intact(path, 100, [right, right], [right, wrong]).holds
        assert not proofs.intact(path, 100, [wrong, right], [right, right]).holds
    changed = {**right, "data": "2"}
    assert not proofs.intact(path, 100, [changed], [changed]).holds


def test_without_the_package_it_names_the_way_out(sksm_here, monkeypatch):
    """`make demo`, or a file of one's own."""

    def files(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", files)
    result = sksm_here("demo")
    assert result.exit_code == 1
    assert "make demo" in result.stderr
    assert "--data FILE" in result.stderr


@pytest.mark.parametrize(
    ("content", "suffix", "complaint"),
    [
        (b"x" * 100, ".bin", "too few"),
        (b"\xff" * (1 << 17), ".safetensors", "not a safetensors file"),
        (with_header(b"[1]"), ".safetensors", "not a safetensors file"),
        (with_header(b'{"a": 1}'), ".safetensors", "not a safetensors file"),
        (with_header(BEYOND), ".safetensors", "not a safetensors file"),
    ],
)
def test_file_that_will_not_do_is_refused(
    sksm_here, tmp_path, content, suffix, complaint
):
    """With the reason, and no worker is left behind."""
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    result = sksm_here("demo", "--workers=2", "--no-ksmd", f"--data={path}")
    assert result.exit_code == 1
    assert complaint in result.stderr
    assert psutil.Process().children() == []


def test_file_that_does_not_fit_is_refused(tmp_path):
    """Before anything is loaded."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * (1 << 17))
    with pytest.raises(data.SksmError, match="2 MiB of memory, and 1 MiB"):
        data.check(path, 2 << 20, 1 << 20)


def test_tensors_are_views_of_the_file(tmp_path):
    """Names, types and shapes as the header says; bfloat16 stays bytes."""
    numbers = np.arange(6, dtype="<f4")
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
            "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        }
    ).encode()
    path = tmp_path / "file.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + numbers.tobytes())
    with path.open("ab") as file:
        file.write(bytes(range(8)))
    found = data.load(path)
    assert (found.arrays["a"] == numbers.reshape(2, 3)).all()
    assert found.arrays["b"].tolist() == list(range(8))
    assert np.shares_memory(found.arrays["a"], found.contents)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_demo_ends_its_workers(data_file, runtime, number):
    """No process, no directory, no word but the exit code."""
    demo = subprocess.Popen(
        [*PROGRAM, "demo", "--workers=3", f"--data={data_file}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    children = poll(lambda: len(found := children_of(demo.pid)) >= 3 and found)
    demo.send_signal(number)
    _, err = demo.communicate(timeout=30)
    assert demo.returncode == 128 + number
    assert err.strip() == ""
    poll(lambda: not any(child.is_running() for child in children))
    assert list(runtime.glob("demo-*")) == []


def test_killed_demo_takes_its_workers_along(data_file):
    """Their stdin ends with it."""
    demo = subprocess.Popen(
        [*PROGRAM, "demo", "--workers=2", f"--data={data_file}"],
        stdout=subprocess.DEVNULL,
    )
    children = poll(lambda: len(found := children_of(demo.pid)) >= 2 and found)
    demo.kill()
    demo.wait()
    poll(lambda: not any(child.is_running() for child in children))


def children_of(pid):
    try:
        return psutil.Process(pid).children()
    except psutil.NoSuchProcess:
        return []


@pytest.mark.root
@pytest.mark.needs(Feature.KSM)
def test_ksmd_is_measured_on_a_sample_and_left_as_it_was(
    sksm_program, data_file, answer_of
):
    """Time and factor are said; every knob is back; nothing stays merged."""
    knobs, sharing = ksm._knobs(), ksm.figures()["pages_sharing"]
    done = sksm_program("demo", "--workers=3", "--json", f"--data={data_file}")
    assert done.returncode == 0, done.stderr
    cost = answer_of(done.stdout)["ksmd"]
    assert cost["why_not"] == ""
    assert cost["sample_bytes"] == 8 << 20
    assert cost["factor"] == pytest.approx(2.0)
    assert cost["seconds"] == pytest.approx(2 * cost["sample_seconds"])
    assert ksm._knobs() == knobs
    assert ksm.figures()["pages_sharing"] <= sharing  # ksmd forgets ended processes


@pytest.mark.skipif(os.geteuid() == 0, reason="for those who are not root")
def test_ordinary_user_is_told_that_ksmd_was_not_measured(
    sksm_program, data_file, answer_of
):
    """The rest is proved all the same."""
    done = sksm_program("demo", "--workers=2", "--json", f"--data={data_file}")
    assert done.returncode == 0, done.stderr
    found = answer_of(done.stdout)
    assert found["holds"] is True
    assert "only root" in found["ksmd"]["why_not"]


@pytest.mark.slow
def test_whole_demo_saves_memory_within_a_minute(sksm_program, answer_of):
    """The real weights, five workers: net of everything, in 60 s."""
    try:
        data.find()
    except data.SksmError as error:
        pytest.skip(str(error))
    done = sksm_program("demo", "--json")
    assert done.returncode == 0, done.stderr
    found = answer_of(done.stdout)
    assert found["saved_bytes"] > 2.5 * found["data_bytes"]
