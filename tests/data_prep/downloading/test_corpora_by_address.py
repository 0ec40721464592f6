"""Corpora of addresses end to end: a published table, img2dataset against a local server, verified shards."""

import functools
import http.server
import json
import threading

import pytest

from data_prep.__main__ import main
from data_prep.manifest import read_manifest
from tests.data_prep.annotations.prepared import metas, picture, put, write_json
from tests.data_prep.annotations.test_caption_sets import coco_file

LOCAL = ["--processes", "1", "--workers", "1", "--timeout", "60", "--retries", "0", "--allow-private-addresses"]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    (tmp_path / "www").mkdir()
    handler = functools.partial(Quiet, directory=str(tmp_path / "www"))
    instance = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=instance.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{instance.server_port}"
    instance.shutdown()
    instance.server_close()


@pytest.mark.slow(10)
def test_cc3m_from_its_table_to_shards(server, tmp_path, capsys):
    for number in range(3):
        put(tmp_path / "www" / f"{number}.jpg", picture(number))
    table = tmp_path / "Validation_GCC-1.1.0-Validation.tsv"
    table.write_text(
        "".join(f"picture {number} , seen\t{server}/{number}.jpg\n" for number in range(4)) + "\tnothing\n"
    )
    command = ["cc3m", "--input", str(table), "--output", str(tmp_path / "cc3m"), *LOCAL]
    assert main(command) == 0
    assert "cc3m dev: 5 rows (published: 15,840, 15,835 fewer)" in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "cc3m" / "dev")
    assert (manifest.rows, manifest.rejected) == (3, {"bad_url": 1, "http_404": 1})
    assert manifest.provenance["arguments"]["corpus"] == "cc3m"
    assert [meta["captions"] for meta in metas(tmp_path / "cc3m" / "dev")] == [
        [f"picture {n} , seen"] for n in range(3)
    ]
    assert main(command) == 2 and "already prepared" in capsys.readouterr().err


@pytest.mark.slow(10)
def test_coco_by_the_addresses_in_its_annotations(server, tmp_path):
    path = coco_file(tmp_path, "val2014", (3, 4))
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["coco_url"] = f"{server}/{image['file_name']}"
        put(tmp_path / "www" / image["file_name"], picture(image["id"]))
    write_json(path, content)
    assert main(["coco", "--captions", str(path), "--download", "--output", str(tmp_path / "coco"), *LOCAL]) == 0
    first, second = metas(tmp_path / "coco" / "dev")
    assert first["captions"] == ["Caption 0 of 3.", "Caption 1 of 3."] and first["sentence_id"] == [300, 301]
    assert second["image_identities"] == ["coco/4"] and second["url"].endswith("COCO_val2014_000000000004.jpg")
