"""Whole writes and locked folders."""

import csv
import errno
import itertools
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest

from guided_diffusion import files

ROOT = Path(__file__).resolve().parents[1]
HOLD = """
import sys
from guided_diffusion import files
with files.locked(sys.argv[1], "--out"):
    print("held", flush=True)
    input()
"""


def fail(aside):
    (aside / "new").write_text("2")
    raise OSError("disk full")


def touched(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def test_listing(tmp_path):
    folder = touched(tmp_path, "b.png", "a.PNG", "c.txt", ".hidden.png", "x/a.png", ".git/a.png", "x/y, z/ä b.png")
    (folder / "x" / "round").symlink_to("..")
    (folder / "gone.png").symlink_to("nowhere")
    flat = [f"{folder}/{name}" for name in ("a.PNG", "b.png", "gone.png")]
    assert files.list_files(folder, (".png",)) == flat
    deep = [*flat, f"{folder}/x/a.png", f"{folder}/x/y, z/ä b.png"]
    assert files.list_files(folder, (".png",), deep=True) == deep
    stems = files.by_stem(f"{folder}/", (".png",), deep=True)
    assert list(stems) == ["a", "b", "gone", "x/a", "x/y, z/ä b"] and list(stems.values()) == deep
    touched(folder, "x/a.tif")
    with pytest.raises(ValueError, match=r"x/a.png and .*x/a.tif share a stem"):
        files.by_stem(folder, (".png", ".tif"), deep=True)
    nfc, nfd = (unicodedata.normalize(form, "é/ü") for form in ("NFC", "NFD"))
    touched(tmp_path, f"images/{nfd}.png", f"masks/{nfc}.tif")
    for kind in ("images", "masks"):
        assert list(files.by_stem(tmp_path / kind, (".png", ".tif"), deep=True)) == [nfc]


def test_a_folder_of_a_url(monkeypatch):
    """What blobfile says of a folder of a bucket, whose names it gives with their separators."""
    walked = [("gs://b/d/", ("x",), ("a.png", ".h.png")), *((f"gs://b/d/{x}/", (), ("a.png",)) for x in ("x", ".git"))]
    monkeypatch.setattr(files.bf, "walk", lambda folder: iter(walked))
    assert files.list_files("gs://b/d", (".png",)) == ["gs://b/d/a.png"]
    assert files.by_stem("gs://b/d", (".png",), deep=True) == {"a": "gs://b/d/a.png", "x/a": "gs://b/d/x/a.png"}


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"Pr\xe4parat_000.png", r"Pr\\xe4parat_000\.png: a name that is not UTF-8"),
        (b"d\xe4/a.png", r"d\\xe4/a\.png: a name that is not UTF-8"),
        (b"a\nb.png", r"a\\u000ab\.png: a name that has control characters"),
        ("a\u2028b.png".encode(), r"a\\u2028b\.png: a name that has control"),
        (b"=1+1_000.png", r"=1\+1_000\.png: a name that begins with ="),
    ],
)
def test_names_that_no_line_can_hold_are_refused(tmp_path, name, shown):
    touched(tmp_path, "fine, really ;'\".png", os.fsdecode(name))
    with pytest.raises(ValueError, match=shown) as caught:
        files.list_files(tmp_path, (".png",), deep=True)
    assert len(str(caught.value).splitlines()) == 1 and str(caught.value).encode()
    assert files.list_files(tmp_path, (".tif",), deep=True) == []


def test_a_file_appears_whole(tmp_path):
    with files.writing(tmp_path / "a.bin") as file:
        file.write(b"half")
        assert not (tmp_path / "a.bin").exists()
    assert (tmp_path / "a.bin").read_bytes() == b"half"
    files.write_json(tmp_path / "b.json", {"ä": [1]})
    assert (tmp_path / "b.json").read_text() == '{\n  "\\u00e4": [\n    1\n  ]\n}\n'
    files.write_text(tmp_path / "c.txt", "ä\r\n", durable=False)
    assert (tmp_path / "c.txt").read_bytes() == b"\xc3\xa4\r\n"
    assert {path.name for path in tmp_path.iterdir()} == {"a.bin", "b.json", "c.txt"}


def test_what_was_there_stays_after_an_error(tmp_path):
    files.write_bytes(tmp_path / "a", b"old")
    with pytest.raises(KeyboardInterrupt), files.writing(tmp_path / "a") as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_full_disk_is_named_through_an_archive(tmp_path):
    with (
        pytest.raises(OSError, match=r"cannot write .*a\.zip: No space left") as caught,
        files.writing(tmp_path / "a.zip"),
    ):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            raise ValueError("the archive is already closed")  # as torch and zipfile do
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_an_error_with_the_path(tmp_path):
    with pytest.raises(OSError, match=r"cannot write .*none/a: No such file"):
        files.write_bytes(tmp_path / "none" / "a", b"")


def test_a_folder_is_replaced_whole_or_stays(tmp_path):
    folder = tmp_path / "out"
    files.replace_folder(folder, lambda aside: (aside / "old").write_text("1"), "--out")
    with pytest.raises(OSError, match="disk full"):
        files.replace_folder(folder, fail, "--out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]
    files.replace_folder(folder, lambda aside: (aside / "new").write_text("2"), "--out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_a_folder_that_a_link_leads_to_is_replaced_there(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/out")
    for text in ("one", "two"):
        files.replace_folder(tmp_path / "out", lambda folder, text=text: (folder / text).touch(), "--out")
        assert (tmp_path / "out").is_symlink() and [path.name for path in (tmp_path / "disk/out").iterdir()] == [text]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]


def test_a_folder_replaced_and_killed_at_random_is_the_old_or_the_new_one(tmp_path):
    """Another process replaces a folder of twenty files over and over, and is killed."""
    folder = tmp_path / "out"

    def fill(version):
        def write(aside):
            for k in range(20):
                (aside / f"{k}.txt").write_text(version)

        return write

    def replace_for_ever():
        for round in itertools.count():
            files.replace_folder(folder, fill(f"version {round}"), "--out")

    def versions():
        return {path.read_text() for path in folder.glob("*.txt")}

    rng = random.Random(0)
    for _ in range(30):
        process = multiprocessing.get_context("fork").Process(target=replace_for_ever)
        process.start()
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.join()
        if folder.exists():
            assert len(versions()) == 1 and len(list(folder.glob("*.txt"))) == 20
        with pytest.raises(OSError, match="disk full"):
            files.replace_folder(folder, fail, "--out")
        assert {path.name for path in tmp_path.iterdir()} <= {"out"}
    files.replace_folder(folder, fill("last"), "--out")
    assert versions() == {"last"} and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_was_moved_away_when_its_run_was_killed_is_put_back(tmp_path):
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "old").touch()
    touched(tmp_path / ".out.part", "half", files.LOCK)
    with pytest.raises(OSError, match="disk full"):
        files.replace_folder(tmp_path / "out", fail, "--out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


def test_two_do_not_replace_a_folder_at_once(tmp_path):
    script = f"""
from guided_diffusion import files
try:
    files.replace_folder({str(tmp_path / "out")!r}, lambda aside: None, "--out")
except ValueError as error:
    print(error)
"""
    said = []

    def fill(aside):
        said.append(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)

    files.replace_folder(tmp_path / "out", fill, "--out")
    assert said[0].startswith("--out ") and "is in use by process" in said[0]


def test_a_link_takes_the_place_of_another(tmp_path):
    for target in ("one", "two", "two"):
        files.write_link(tmp_path / "link", target)
        assert os.readlink(tmp_path / "link") == target and os.listdir(tmp_path) == ["link"]


def test_a_fingerprint_tells_files_wherever_they_lie(tmp_path):
    prints = {}
    for name, files_of in {
        "a": {"x/1.png": b"11", "x/2.png": b"2"},
        "moved": {"x/2.png": b"3", "x/1.png": b"22"},  # which have the same sizes
        "one more": {"x/1.png": b"11", "x/2.png": b"2", "x/3.png": b""},
        "renamed": {"x/1.png": b"11", "x/4.png": b"2"},
        "changed": {"x/1.png": b"11", "x/2.png": b"longer"},
    }.items():
        for path, data in files_of.items():
            touched(tmp_path / name, path)
            (tmp_path / name / path).write_bytes(data)
        prints[name] = files.fingerprint([str(tmp_path / name / path) for path in files_of])
    assert prints.pop("moved") == prints["a"]
    assert len(set(prints.values())) == len(prints) and files.fingerprint([]) == ""
    urls = ["gs://bucket/data/1.png", "gs://bucket/data/2.png"]
    assert files.fingerprint(urls) == files.fingerprint([url.replace("data", "other/data") for url in urls])


@pytest.mark.parametrize("what", ["pipe", "device"])
def test_what_has_no_end_is_no_file(tmp_path, what):
    path = tmp_path / "a.json"
    os.mkfifo(path) if what == "pipe" else path.symlink_to("/dev/zero")
    readers = (files.read_bytes, files.read_json, lambda path: files.list_files(path.parent, (".json",)))
    for read in readers:
        with pytest.raises(ValueError, match=f"^{path} is no file, but a pipe or a device: remove it$"):
            read(path)
    with pytest.raises(ValueError, match="is no file"), files.reading_table(path):
        pass
    assert files.list_files(tmp_path, (".png",)) == []  # nobody asked for it


def test_leftovers_of_killed_runs_go(tmp_path):
    for name in (".model.pt.12.part", "model.pt", "mine.part"):
        (tmp_path / name).touch()
    files.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt", "mine.part"}
    files.remove_leftovers(tmp_path / "none")
    touched(tmp_path, ".a[1].npz.12.part", ".b.npz.12.part", ".kept.part/whole.png")  # a folder is replace_folder's
    files.remove_leftovers(tmp_path, "a[1].npz")
    assert (tmp_path / ".b.npz.12.part").exists() and not (tmp_path / ".a[1].npz.12.part").exists()
    files.remove_leftovers(tmp_path)
    assert (tmp_path / ".kept.part/whole.png").exists() and not (tmp_path / ".b.npz.12.part").exists()


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_is_one_runs_until_it_ends(tmp_path, holder):
    refusal = rf"--out {tmp_path} is in use by process {holder.pid} on \S+: stop"
    for _ in range(2):
        with pytest.raises(ValueError, match=refusal), files.locked(tmp_path, "--out"):
            pass
    holder.kill()
    holder.wait()
    with files.locked(tmp_path, "--out"):
        pass
    with files.locked(tmp_path, "--out"):  # given back
        pass


def test_a_claimed_folder_is_tidied_and_keeps_no_lock(tmp_path, holder):
    out = tmp_path / "out"
    touched(out, ".a.json.12.part", "masks/.b.tif.12.part", "split/masks/.b.tif.3.part", "masks/b.tif", "mine.part")
    with pytest.raises(OSError, match="disk full"), files.claimed(out, "--out"):
        assert (out / files.LOCK).exists()
        fail(out)
    assert sorted(path.name for path in out.rglob("*.*")) == ["b.tif", "mine.part"]
    with pytest.raises(ValueError, match=rf"in use by process {holder.pid}"), files.claimed(tmp_path, "--out"):
        pass
    assert (tmp_path / files.LOCK).exists()  # which is the holder's


def test_what_another_run_is_writing_is_left_alone(tmp_path, holder):
    """As a training in a folder of the one that figures go to."""
    touched(tmp_path, ".a.pt.12.part", "best/.a.pt.12.part")
    above = tmp_path.parent / f"{tmp_path.name}-above"
    above.mkdir()
    (above / "run").symlink_to(tmp_path)
    touched(above, "other/.b.pt.12.part")
    with files.claimed(above, "--out"):
        assert not list((above / "other").iterdir())
    assert len(list(tmp_path.rglob("*.part"))) == 2


def test_a_lock_that_its_holder_took_away_is_none(tmp_path, monkeypatch):
    """Else a third run would make another file of that name, and two would have the folder."""
    lock = files.fcntl.lockf

    def just_late(file, operation):
        lock(file, operation)
        (tmp_path / files.LOCK).unlink()

    monkeypatch.setattr(files.fcntl, "lockf", just_late)
    with pytest.raises(ValueError, match="was in use a moment ago: try again"), files.locked(tmp_path, "--out"):
        pass


def test_a_forked_child_holds_no_lock(tmp_path):
    with files.locked(tmp_path / "new", "--out"):
        child = os.fork()
        if not child:
            signal.pause()
    try:
        command = [sys.executable, "-c", HOLD, str(tmp_path / "new")]
        assert subprocess.run(command, input="\n", text=True, timeout=60).returncode == 0
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_outputs_among_inputs_are_refused(tmp_path):
    inner = tmp_path / "in" / "deep"
    inner.mkdir(parents=True)
    for out in (tmp_path / "in", inner / "out"):
        with pytest.raises(ValueError, match="lies in the input"):
            files.check_apart(out, [tmp_path / "in"], out)
    with pytest.raises(ValueError, match="would replace the input"):
        files.check_apart(tmp_path, [inner], tmp_path)
    files.check_apart(tmp_path, [inner], tmp_path / "kept")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        files.check_apart(tmp_path / "file", [inner], tmp_path / "file")


def test_what_no_program_of_ours_wrote_is_a_user_s_mistake():
    assert files.parse_json('{"a": [1]}') == {"a": [1]}
    for text in (100_000 * "[", b"\xff", ""):
        with pytest.raises(ValueError):
            files.parse_json(text)
    refusal = r"a.csv is no readable table \(field larger than field limit"
    with pytest.raises(ValueError, match=refusal), files.reading_table("a.csv"):
        list(csv.reader(["x" * 200_000]))


def test_nothing_else_reads_json():
    """Which is nested at will where it is not ours."""
    found = [path for path in ROOT.glob("guided_diffusion/**/*.py") if re.search(r"\bjson\.loads?\(", path.read_text())]
    assert [path.name for path in found] == [
        "failures.py",
        "files.py",
    ]  # the former reads what the engine's stages wrote


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("", "--out is empty"),
        ("gs://bucket/out", "--out gs://bucket/out is a URL: give a local folder"),
        ("file", "--out file: file is a file, or a link that leads nowhere: give a folder"),
        ("gone/new", "--out gone/new: gone is a file, or a link that leads nowhere: give a folder"),
        ("/proc/new/er", "--out /proc/new/er: /proc cannot be written to; give another folder"),
    ],
)
def test_places_that_cannot_be_written_to(tmp_path, monkeypatch, path, why):
    monkeypatch.chdir(tmp_path)
    touched(tmp_path, "file")
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(ValueError, match=f"^{re.escape(why)}"):
        files.check_place(path, "--out")
    files.check_place("a/new/place", "--out")
    files.check_place(tmp_path, "--out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "gone"]
