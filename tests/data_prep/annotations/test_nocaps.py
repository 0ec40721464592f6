"""nocaps: small files of exactly the published schema."""

from data_prep.manifest import read_manifest
from tests.data_prep.annotations.prepared import metas, picture, prepare, put, rejected, write_json

DOMAINS = ("in-domain", "near-domain", "out-domain")


def entry(number):
    name = f"{number:04x}ea2087020901"
    return {
        "id": number,
        "open_images_id": name,
        "height": 20,
        "width": 20,
        "coco_url": f"https://example.org/{name}.jpg",
        "file_name": f"{name}.jpg",
        "license": 0,
        "date_captured": "2018-11-06 11:04:33",
        "domain": DOMAINS[number % 3],
    }


def content(count, captions=10):
    annotations = [
        {"image_id": number, "id": captions * number + n, "caption": f"caption {n} of {number}"}
        for number in range(count)
        for n in range(captions)
    ]
    info = {"description": "nocaps validation dataset", "version": "0.1", "year": 2018}
    return {"licenses": [], "info": info, "images": [entry(n) for n in range(count)], "annotations": annotations}


def words(folder, document):
    path = write_json(folder / "nocaps_val_4500_captions.json", document)
    for number in range(len(document.get("images", ()))):
        put(folder / "images" / entry(number)["file_name"], picture(number))
    return ["nocaps", "--input", path, "--images", folder / "images", "--output", folder / "data" / "nocaps"]


def test_images_with_their_captions_and_domains(tmp_path, capsys):
    assert prepare(*words(tmp_path, content(4))) == 0
    assert "nocaps dev: 4 images (published: 4,500, 4,496 fewer), 40 captions" in capsys.readouterr().out
    found = metas(tmp_path / "data" / "nocaps" / "dev")
    assert [meta["domain"] for meta in found] == [*DOMAINS, DOMAINS[0]]
    assert found[1]["captions"] == [f"caption {n} of 1" for n in range(10)] and found[1]["image_id"] == 1
    assert found[1]["image_identities"] == ["open_images/0001ea2087020901"]
    assert read_manifest(tmp_path / "data" / "nocaps" / "dev").texts == "captions"


def test_what_is_wrong_is_named(tmp_path):
    document = content(3)
    document["images"][1]["domain"] = "elsewhere"
    document["annotations"][0]["caption"] = 7
    document["annotations"] = document["annotations"][:20]
    assert prepare(*words(tmp_path, document)) == 0
    names = {(reason, rows) for reason, _, rows in rejected(tmp_path / "data" / "nocaps" / "dev")}
    assert names == {("unknown_label", 1), ("malformed_row", 1), ("missing_image", 1), ("empty_caption", 1)}


def test_a_file_of_images_alone_is_refused(tmp_path, capsys):
    document = content(2) | {"annotations": []}
    assert prepare(*words(tmp_path, document)) == 2
    assert "no captions, which are published of the validation images only" in capsys.readouterr().err
