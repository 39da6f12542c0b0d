"""Rows, clocks and the progress line of a run, and what it says of its machine."""

import contextlib
import getpass
import json
import math
import platform
import socket
import struct
import time
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from research import metrics, process


def row(step: int, **values) -> dict:
    position = dict(step=step, tokens=64 * step, flops=1e6 * step, train_seconds=0.5 * step)
    return position | {"train/loss": 5.0 / step, "perf/tokens_per_s": 1000.0} | values


def write(folder: Path, resume_step: int, *steps: int) -> None:
    with metrics.MetricsWriter(str(folder), resume_step) as writer:
        for step in steps:
            writer.write(row(step))


def steps_on_disk(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder: Path) -> list[Event]:
    """Of all event files in the order of writing: TFRecords of length (8 bytes), crc, content, crc."""
    found = []
    for path in sorted((folder / "tb").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        raw, at = path.read_bytes(), 0
        while at < len(raw):
            (size,) = struct.unpack_from("<Q", raw, at)
            found.append(Event.FromString(raw[at + 12 : at + 12 + size]))
            at += size + 16
    return found


def test_rows_are_on_disk_as_soon_as_they_are_written(tmp_path):
    with metrics.MetricsWriter(str(tmp_path), 0) as writer:
        wanted = row(1, **{"eval/bits_per_byte@24": None})
        writer.write(wanted)
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == wanted


def test_rows_of_steps_that_run_again_are_cut(tmp_path):
    write(tmp_path, 0, 1, 2, 3, 4)
    write(tmp_path, 2, 3, 4, 5)
    assert steps_on_disk(tmp_path) == [1, 2, 3, 4, 5]
    write(tmp_path, 0, 1)
    assert steps_on_disk(tmp_path) == [1]
    assert not list(tmp_path.glob("*.new"))


def test_a_row_cut_off_by_a_kill_is_dropped(tmp_path):
    write(tmp_path, 0, 1, 2, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + json.dumps(row(3))[:20])
    write(tmp_path, 3, 4)
    assert steps_on_disk(tmp_path) == [1, 2, 3, 4]


@pytest.mark.parametrize("damage", [b'{"st\0p": ', b'{"st\xffp": 2}', b"7", b"null", b'{"a": 1}', b'{"step": "2"}'])
def test_rows_after_a_damaged_one_are_dropped(tmp_path, caplog, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
    with metrics.MetricsWriter(str(tmp_path), 3):
        pass
    assert path.read_text() == '{"step": 1}\n' and "damaged" in caplog.text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused(tmp_path, value):
    with metrics.MetricsWriter(str(tmp_path), 0) as writer:
        with pytest.raises(ValueError, match="train/loss"):
            writer.write(row(1, **{"train/loss": value}))
        writer.write(row(2))
    assert steps_on_disk(tmp_path) == [2]


@pytest.mark.parametrize("name", metrics.POSITION)
def test_a_row_without_its_position_is_refused(tmp_path, name):
    broken = row(1)
    del broken[name]
    with metrics.MetricsWriter(str(tmp_path), 0) as writer, pytest.raises(ValueError, match=name):
        writer.write(broken)


def test_tensorboard_holds_the_same_numbers_and_where_a_resume_began(tmp_path):
    write(tmp_path, 0, 1, 2, 3)
    time.sleep(1.1)  # event files are named by the second
    write(tmp_path, 2, 3, 4)
    found = events(tmp_path)
    losses = [
        (event.step, value.simple_value)
        for event in found
        for value in event.summary.value
        if value.tag == "train/loss"
    ]
    assert [step for step, _ in losses] == [1, 2, 3, 3, 4]
    assert losses[-1][1] == pytest.approx(5 / 4)
    assert {v.tag for e in found for v in e.summary.value} == {"train/loss", "perf/tokens_per_s"}
    begun = [event.step for event in found if event.session_log.status == SessionLog.START]
    assert begun == [1, 3]  # TensorBoard leaves out what was there from these steps on


def test_clocks_measure_and_go_on_over_a_resume():
    clocks = metrics.Clocks()
    with clocks.measure("train"):
        time.sleep(0.05)
        with clocks.measure("eval"):
            time.sleep(0.02)
        assert clocks.total("train") >= 0.07
    first = clocks.to_dict()
    assert first["train"] >= first["eval"] + 0.05 and first["eval"] >= 0.02
    resumed = metrics.Clocks()
    with resumed.measure("train"):
        time.sleep(0.02)
    resumed.add(json.loads(json.dumps(first)))
    assert resumed.total("train") >= first["train"] + 0.02
    assert resumed.total("eval") == first["eval"] and resumed.total("checkpoint") == 0


def test_a_clock_stops_where_an_error_leaves_its_block():
    clocks = metrics.Clocks()
    with contextlib.suppress(KeyError), clocks.measure("train"):
        raise KeyError
    total = clocks.total("train")
    time.sleep(0.01)
    assert clocks.total("train") == total


def test_the_first_lap_after_a_resume_leaves_out_the_run_before():
    clocks = metrics.Clocks()
    clocks.add({"train": 100.0})
    assert clocks.lap("train", 103.0) == 3.0
    assert clocks.lap("train", 104.5) == 1.5


def test_progress_is_plain_lines_where_there_is_no_terminal(capfd):
    with metrics.Progress(50, 0, "balanced") as progress:
        for step in range(1, 51):
            progress.update(row(step))
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert not out and "\x1b" not in err and "\r" not in err
    assert len(lines) == 10
    assert lines[0].startswith("balanced: step 5/50  tokens 320  loss 1.000  1,000 tokens/s")
    assert lines[-1].startswith("balanced: step 50/50") and lines[-1].endswith(" 0 s left")


def test_the_environment_names_no_machine_and_no_person():
    found = metrics.environment()
    assert found["packages"].keys() == set(metrics.PACKAGES)
    assert found["platform"] and found["device"] and found["python"] == platform.python_version()
    values = {str(v) for v in found.values()} | {str(v) for v in found["packages"].values()}
    words = {word for value in values for word in value.replace("/", " ").split()}
    assert not words & {socket.gethostname(), platform.node(), getpass.getuser()}
    assert str(Path.home()) not in json.dumps(found) and str(Path.cwd()) not in json.dumps(found)


def test_peaks_are_bytes_of_this_process():
    assert 50e6 < process.peak_bytes() < 1e12
    peak = metrics.device_peak_bytes()
    assert peak is None or peak >= 0
