"""`urls` end to end: the real img2dataset against a local server that does everything servers do."""

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.checks.info import row_texts
from data_prep.checks.verify import verify_split
from data_prep.downloading.bounded_download import get_image
from data_prep.downloading.bounded_http import Bounds
from data_prep.downloading.courtesy import Courtesy
from data_prep.drawn.synth import SynthOptions, write_url_tables
from data_prep.filters import Limits
from data_prep.manifest import read_manifest
from tests.data_prep.test_filters import encode, png_bomb

JPEG = encode(size=(64, 48))
# of a server on this machine, which may have other work: none of these tests waits for the end of a minute
LOCAL = ["--processes", "1", "--workers", "1", "--timeout", "60", "--retries", "0", "--allow-private-addresses"]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by path: what a well-behaved server, a broken one and a hostile one would say."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        kind = self.path.split("/")[1].split("?")[0]
        self.server.hits.append(kind)
        if kind in ("404", "500"):
            self.send_error(int(kind))
        elif kind == "local":
            self._head(302, [("Location", "file:///etc/passwd")])
        elif kind == "endless":
            self._head(200, [])
            self._stream(b"\xff\xd8" * 20000, 0, 400)
        elif kind == "drip":
            self._head(200, [])
            self._stream(b"\xff", 0.3, 40)
        elif kind == "cut":
            self._head(200, [("Content-Length", str(len(JPEG)))])
            self.wfile.write(JPEG[: len(JPEG) // 2])
        elif kind == "hang" and self.server.hanging:
            self._head(200, [])
            self._stream(b"\xff", 0.2, 200)
        else:
            body = {"zero": b"", "html": b"<html>gone</html>", "bomb": png_bomb(), "half": JPEG[: len(JPEG) // 2]}
            headers = [("X-Robots-Tag", "noai")] if kind == "noai" else []
            content = body.get(kind, JPEG)
            self._head(200, [("Content-Length", str(len(content))), *headers])
            self.wfile.write(content)

    def _head(self, status, headers):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()

    def _stream(self, chunk, pause, times):
        try:
            for _ in range(times):
                self.wfile.write(chunk)
                time.sleep(pause)
        except OSError:
            pass  # the client has had enough, as it should


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True


@pytest.fixture
def server():
    instance = Server(("127.0.0.1", 0), Handler)
    instance.hits, instance.hanging = [], True
    threading.Thread(target=instance.serve_forever, daemon=True).start()
    yield instance
    instance.shutdown()
    instance.server_close()


@pytest.fixture
def silent_port():
    """A port that is taken, so that nobody listens there."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def url(server, path):
    return f"http://127.0.0.1:{server.server_port}/{path}"


def write_table(path, rows):
    path.write_text("url\tcaption\n" + "".join(f"{address}\t{caption}\n" for address, caption in rows))
    return path


def command(table, output, *more):
    return ["urls", "--input", str(table), "--output", str(output), *LOCAL, *more]


def fetch_one(server, path, timeout=1, max_bytes=10**6):
    return tried(url(server, path), Bounds(timeout, 3 * timeout, max_bytes, allow_private=True))


def tried(address, bounds):
    """The bytes behind an address, or what is wrong."""
    try:
        return get_image(address, bounds, Courtesy())
    except OSError as error:
        return str(error)


@pytest.mark.slow
def test_a_download_is_bounded_in_bytes_time_and_kind_of_address(server):
    """Invariant 7: nothing fetched is trusted, nothing is unbounded."""
    assert fetch_one(server, "ok") == JPEG
    assert "larger than the bound" in fetch_one(server, "endless")
    assert "larger than the bound" in fetch_one(server, "ok", max_bytes=100)
    assert "timed out" in fetch_one(server, "drip")  # each byte comes in time, all of them would not
    assert "broke off" in fetch_one(server, "cut")
    assert "not http" in fetch_one(server, "local")
    assert "X-Robots-Tag" in fetch_one(server, "noai")
    assert "404" in fetch_one(server, "404")
    assert tried("file:///etc/passwd", Bounds(1, 3, 100)) == "address is not http(s)"


@pytest.mark.slow
def test_every_row_is_written_or_counted_by_its_reason(server, silent_port, tmp_path, capsys):
    """Invariant 8: 14 rows in, 4 written, 10 counted by reason."""
    rows = [(url(server, f"ok?{i}"), f"picture {i}") for i in range(4)]
    rows += [(url(server, kind), kind) for kind in ("404", "zero", "html", "bomb", "half", "noai", "endless")]
    rows += [(f"http://127.0.0.1:{silent_port}/closed", "closed"), ("file:///etc/passwd", "local")]
    rows += [(url(server, "ok"), "")]
    table = write_table(tmp_path / "rows.tsv", rows)
    output = tmp_path / "data" / "web"
    assert main(command(table, output, "--max-image-bytes", "1000000")) == 0
    manifest = read_manifest(output / "train")
    assert manifest.rejected == {
        "http_404": 1,
        "empty_image": 1,
        "html_page": 1,
        "too_many_pixels": 1,
        "truncated_image": 1,
        "disallowed_by_server": 1,
        "image_bytes_too_large": 1,
        "connection_failed": 1,
        "bad_url": 1,
        "empty_caption": 1,
    }
    assert manifest.rows + sum(manifest.rejected.values()) == len(rows)
    assert list(row_texts(output / "train", manifest)) == [f"picture {i}" for i in range(4)]
    assert sorted(p.name for p in output.iterdir()) == ["README.md", "train"]  # the working folder is gone
    assert verify_split(output / "train", Limits(), 1).problems == []
    assert "4 rows" in capsys.readouterr().out


@pytest.mark.slow
def test_failure_of_everything_is_an_error_and_a_later_run_succeeds(server, tmp_path, capsys):
    """img2dataset itself exits 0 when every download fails."""
    table = write_table(tmp_path / "rows.tsv", [(url(server, f"500?{i}"), "x") for i in range(5)])
    output = tmp_path / "web"
    assert main(command(table, output)) == 3
    message = capsys.readouterr().err
    assert "0 of 5 URLs" in message and "5 http_500" in message and message.count("\n") == 1
    assert not (output / "train").exists()
    first = len(server.hits)
    assert main(command(table, output)) == 3  # what failed is tried again, not believed
    assert len(server.hits) == first + 5
    capsys.readouterr()
    other = write_table(tmp_path / "other.tsv", [(url(server, "ok"), "x")])
    assert main(command(other, output)) == 0  # nothing was made of the first table that could be lost


def test_private_addresses_are_downloaded_when_allowed_only(server, tmp_path, monkeypatch):
    """Invariant 7: a table of URLs from outside does not reach into one's own network."""
    given = []
    monkeypatch.setattr(
        "data_prep.options.downloads.make_parts", lambda plan, options, *_: given.append(options.fetch) or sys.exit(9)
    )
    table = write_table(tmp_path / "rows.tsv", [(url(server, "ok"), "x")])
    arguments = ["urls", "--input", str(table), "--output", str(tmp_path / "web")]
    for more, expected in (([], False), (["--allow-private-addresses"], True)):
        with pytest.raises(SystemExit):
            main([*arguments, *more])
        assert given[-1].allow_private_addresses is expected
    assert "private address (127.0.0.1)" in tried(url(server, "ok"), Bounds(1, 3, 10**6)) and server.hits == []


@pytest.mark.slow
def test_a_run_that_passes_its_deadline_ends(server, tmp_path, capsys):
    """Invariant 7: no unbounded wait."""
    table = write_table(tmp_path / "rows.tsv", [(url(server, "hang"), "late")])
    assert main(command(table, tmp_path / "web", "--deadline-seconds", "3")) == 2
    assert "deadline passed after 0 of 1 URLs; run the same command to resume" in capsys.readouterr().err


@pytest.mark.slow
def test_the_synthetic_corpus_goes_through_the_network_unchanged(tmp_path):
    served = tmp_path / "www"
    handler = type("Files", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *args: None})
    instance = Server(("127.0.0.1", 0), lambda *args: handler(*args, directory=str(served)))
    threading.Thread(target=instance.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{instance.server_port}"
    write_url_tables(served, base, SynthOptions({"train": 40}))
    extra = ["--extra-columns", "main_colour,main_shape", "--json-columns", "questions,scene"]
    try:
        assert main(command(served / "train.tsv", tmp_path / "demo", *extra)) == 0
    finally:
        instance.shutdown()
        instance.server_close()
    folder = tmp_path / "demo" / "train"
    manifest = read_manifest(folder)
    assert manifest.rows == 40 and manifest.rejected == {}
    with tarfile.open(folder / "00000.tar") as tar:
        assert tar.getnames()[:3] == ["train_000000000.jpg", "train_000000000.txt", "train_000000000.json"]
        image = tar.extractfile("train_000000007.jpg").read()
        meta = json.loads(tar.extractfile("train_000000007.json").read())
    assert image == (served / "images" / "train" / "train_0000007.jpg").read_bytes()
    assert f"{meta['main_colour']} {meta['main_shape']}" in meta["captions"][0]
    assert meta["questions"][0]["answer"] == meta["main_colour"]


def start(*arguments):
    root = Path(__file__).resolve().parents[3]
    return subprocess.Popen(
        [sys.executable, "-m", "data_prep", *arguments],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_synth_leaves_nothing_half_written(tmp_path, number, code):
    """Invariant 6: complete, or not there."""
    process = start("synth", "--output", str(tmp_path / "synth"), "--dev", "0", "--test", "0", "--workers", "2")
    wait_for(lambda: list(tmp_path.glob("synth/.train.*.part/00000.tar")))
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, message = process.communicate(timeout=60)
    assert process.returncode == code
    assert not (tmp_path / "synth").exists()
    assert message.count("\n") <= 1 and "Traceback" not in message


@pytest.mark.slow
def test_an_interrupted_download_ends_its_processes_and_resumes_without_finished_parts(server, tmp_path):
    rows = [(url(server, f"ok?{i}"), f"picture {i}") for i in range(150)]  # parts of 100 and 50
    rows[130] = (url(server, "hang"), "late")
    table = write_table(tmp_path / "rows.tsv", rows)
    process = start(*command(table, tmp_path / "web", "--rows-per-part", "100"))
    wait_for(lambda: "hang" in server.hits, seconds=100)  # with one process the first part is finished by then
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=30)
    assert process.returncode == 130 and message.startswith("interrupted") and message.count("\n") == 1
    assert not (tmp_path / "web" / "train").exists()
    server.hanging = False
    server.hits.clear()
    assert main(command(table, tmp_path / "web", "--rows-per-part", "100")) == 0
    assert len(server.hits) == 50 and read_manifest(tmp_path / "web" / "train").rows == 150


def test_command_line_errors_are_one_line_with_code_2(tmp_path, capsys):
    """Invariant 9: unknown options and wrong values are refused, naming the fix."""
    for arguments, expected in (
        (["synth", "--trian", "5"], "did you mean --train?"),
        (["synth", "--train", "many"], "expected a whole number from 0"),
        (["urls"], "--input"),
        (["urls", "--input", str(tmp_path / "none.tsv"), "--output", str(tmp_path)], "no such file"),
        (["urls", "--input", "x", "--min-yield", "7"], "from 0 to 1"),
        (["urls", "--input", "x", "--split", "../train"], "plain folder name"),
        (["sinth"], "synth"),
        (["verify", str(tmp_path / "none")], "no such folder"),
        (["info", str(tmp_path)], "nothing prepared"),
    ):
        try:
            code = main(arguments)
        except SystemExit as error:
            code = error.code
        message = capsys.readouterr().err
        assert code == 2 and expected in message and message.count("\n") == 1, message


def test_wrong_columns_name_those_found_and_leave_nothing(tmp_path, capsys):
    table = tmp_path / "rows.tsv"
    table.write_text("link\ttext\nhttp://h/1\tx\n")
    assert main(command(table, tmp_path / "web")) == 2
    assert "no column url, caption; found: link, text" in capsys.readouterr().err
    assert list((tmp_path / "web").iterdir()) == []


def test_verify_and_info_on_the_command_line(tmp_path, capsys):
    arguments = ["synth", "--output", str(tmp_path / "synth"), "--train", "30", "--dev", "0", "--test", "0"]
    assert main([*arguments, "--pair-share", "0.1"]) == 0
    assert main(["verify", str(tmp_path), "--workers", "1"]) == 0
    assert capsys.readouterr().out.count(": ok") == 2
    assert main(["info", str(tmp_path), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert [(split["corpus"], split["rows"]) for split in described] == [("synth", 30), ("synth_pairs", 3)]
    tar = tmp_path / "synth" / "train" / "00000.tar"
    content = bytearray(tar.read_bytes())
    content[600] ^= 1
    tar.write_bytes(content)
    assert main(["verify", str(tmp_path), "--workers", "1"]) == 1
    assert "SHA-256" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["photos/1.jpg", "/x/me/1.jpg", "C:\\photos\\1.jpg", "file:///x/me/1.jpg"])
def test_a_table_of_paths_names_the_row_and_the_verb_for_own_pictures(path, tmp_path, capsys):
    table = write_table(tmp_path / "rows.tsv", [(path, "a dog"), (path, "a cat")])
    assert main(command(table, tmp_path / "web")) == 2
    error = capsys.readouterr().err
    assert "2 bad_url, such as row 0: " in error and "`python -m data_prep local`" in error and error.count("\n") == 1
    other = write_table(tmp_path / "other.tsv", [(path, "a bird")])
    assert main(command(other, tmp_path / "web")) == 2  # what the first run left is of no account
    assert "--restart" not in capsys.readouterr().err
