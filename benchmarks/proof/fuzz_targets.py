"""What `fuzz.py` feeds: each reader of foreign bytes, with sound samples and the errors that it may end with."""

from __future__ import annotations

import functools
import hashlib
import http.client
import io
import json
import random
import socket
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from PIL import Image
from safetensors.torch import save

from benchmarks.proof.fuzz_clips import clips
from benchmarks.proof.fuzz_target import Files, Target
from data_prep.annotations import karpathy, nlvr2, snli_ve, vqav2
from data_prep.annotations.annotated import records as local_records
from data_prep.checks.info import describe_split, format_table
from data_prep.checks.verify import verify_split
from data_prep.downloading import bounded_http, failures
from data_prep.filters import Limits, check_image
from data_prep.images import ImageProblem
from data_prep.manifest import MANIFEST_NAME, ManifestError
from data_prep.record import PrepError, Record, Rejection
from data_prep.shard_writer import SplitWriter
from data_prep.sources import url_table
from pipeline.checkpoint import files as checkpoint_files
from pipeline.checkpoint import restore
from pipeline.checkpoint.files import CheckpointError
from pipeline.checkpoint.reading import Reader
from pipeline.checkpoint.state import RunState
from pipeline.config.options import ConfigError
from pipeline.config.recipes import load_recipe
from pipeline.data.shard_files import LostCorpus
from pipeline.data.shard_reader import open_corpora
from pipeline.data.tokenizer import load_tokenizer
from pipeline.data.transforms import UnusableSample, clip_transform, decode_image
from pipeline.weights.files import read_state_dict
from pipeline.weights.importing import import_flm
from pipeline.weights.inert_pickle import read_foreign

MAX_PIXELS = 250_000
_REPOSITORY = Path(__file__).resolve().parents[2]


def images() -> Target:
    picture = Image.radial_gradient("L").resize((40, 30))
    rgb = Image.merge("RGB", (picture, picture.rotate(90, expand=False), picture))
    alpha = rgb.copy()
    alpha.putalpha(picture)
    exif = Image.Exif()
    exif[0x0112] = 6
    made = [_encoded(rgb, fmt, exif=exif) for fmt in ("JPEG", "PNG", "WEBP", "TIFF")]
    made += [_encoded(rgb, "JPEG", progressive=True), _encoded(rgb.convert("CMYK"), "JPEG"), _encoded(alpha, "PNG")]
    made += [_encoded(rgb, fmt) for fmt in ("GIF", "BMP", "PPM", "ICO")] + [_encoded(rgb.convert("P"), "PNG")]
    made += [_encoded(rgb, fmt, save_all=True, append_images=[rgb.rotate(9)]) for fmt in ("GIF", "PNG", "WEBP", "MPO")]
    made += [_encoded(picture.convert("I;16"), "PNG"), _encoded(rgb, "TIFF", compression="jpeg")]

    def use(_: Path, files: Files) -> str | None:
        data, reason = files["image"], None
        try:
            stored, _ = check_image(data, Limits(max_pixels=MAX_PIXELS, min_side=1))
        except ImageProblem as error:
            reason = f"ImageProblem: {error.reason}"
        else:
            decode_image(stored, MAX_PIXELS)  # what preparing keeps, training reads
        try:
            clip_transform(32)(decode_image(data, MAX_PIXELS, draft_size=64))
        except UnusableSample:
            pass
        return reason

    return Target("images", lambda generator: {"image": generator.choice(made)}, use, ())


def splits(name: str, *mutable: str) -> Target:
    with tempfile.TemporaryDirectory() as folder:
        with SplitWriter(Path(folder) / "train", "toy", "train", 1, 2) as writer:
            for number in range(4):
                image = _encoded(Image.new("RGB", (24, 16), (number * 60, 9, 9)), "JPEG")
                captions = tuple(f"caption {c} of {number}" for c in range(1 + number % 2))
                writer.add(Record(f"k{number}", (image,), captions, {"number": number}, ("jpg",)))
        made = {f"train/{path.name}": path.read_bytes() for path in (Path(folder) / "train").iterdir()}

    def use(folder: Path, _: Files) -> str | Exception | None:
        reasons: list[Exception] = []
        (corpus,) = open_corpora([folder], "train")
        for index in range(min(len(corpus), 50)):
            for read in (corpus.read, corpus.read_text):
                try:
                    read(index)
                except UnusableSample as error:
                    reasons.append(error)
        corpus.close()
        problems = verify_split(folder / "train", Limits(), 1).problems
        try:
            format_table([describe_split(folder / "train")])
        except ManifestError as error:
            reasons.append(error)
        return reasons[0] if reasons else "verify: named the change" if problems else None

    return Target(name, lambda _: dict(made), use, (ManifestError, LostCorpus), mutable, _manifest_amended)


def _manifest_amended(files: Files, name: str) -> Files:
    try:
        content = json.loads(files[f"train/{MANIFEST_NAME}"])
        for shard in content["shards"]:
            for entry, size, digest in (("file", "bytes", "sha256"), ("index_file", None, "index_sha256")):
                if f"train/{shard[entry]}" == name:
                    shard[digest] = _sha256(files[name])
                    shard |= {size: len(files[name])} if size else {}
    except (ValueError, KeyError, TypeError, RecursionError):
        return files
    return files | {f"train/{MANIFEST_NAME}": json.dumps(content).encode()}


def checkpoints() -> Target:
    state = {**RunState(step=3, samples_seen=12, optimizer_steps=3).__dict__}
    with tempfile.TemporaryDirectory() as folder:
        partial, final = Path(folder) / "step_00000003.tmp", checkpoint_files.checkpoint_path(Path(folder), 3)
        partial.mkdir()
        final.parent.mkdir()
        listed: dict = {}
        for rank, begin in ((0, 0), (1, 4)):
            writer = checkpoint_files.PartWriter(partial, rank)
            part = {kind: torch.arange(begin, begin + 4.0) for kind in checkpoint_files.KINDS}
            writer.add(checkpoint_files.Piece("net.weight", begin, (2, 4), part))
            if rank == 0:
                whole = {kind: torch.ones(3) for kind in checkpoint_files.KINDS}
                writer.add(checkpoint_files.Piece("net.bias", 0, (3,), whole))
            listed |= writer.finish()
        checkpoint_files.publish(partial, final, state, listed)
        made = {f"checkpoints/{final.name}/{path.name}": path.read_bytes() for path in final.iterdir()}

    def use(folder: Path, _: Files) -> str | None:
        path, skipped = checkpoint_files.newest_valid(folder)
        if path is None:
            raise CheckpointError(skipped[0].partition(": ")[2] if skipped else "no checkpoint")
        restore.read_state(path)
        restore.load_weights(folder)
        reader = Reader(path)
        for kind in checkpoint_files.KINDS:
            for _name, tensor in reader.read_all(kind):
                tensor.sum()
        return None

    return Target("checkpoints", lambda _: dict(made), use, (CheckpointError, ConfigError), (), _checkpoint_amended)


def _checkpoint_amended(files: Files, name: str) -> Files:
    manifest = next(path for path in files if path.endswith(f"/{checkpoint_files.MANIFEST}"))
    try:
        content = json.loads(files[manifest])
        content.pop("sha256", None)
        if name != manifest:
            content["files"][name.rpartition("/")[2]] = {"bytes": len(files[name]), "sha256": _sha256(files[name])}
        return files | {manifest: checkpoint_files._with_own_hash(content)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return files


def weights() -> Target:
    content = {"visual.conv1.weight": torch.arange(6.0).view(2, 3), "half": torch.ones(3, dtype=torch.bfloat16)}
    wrapped = {"epoch": 3, "state_dict": content, "hyper_parameters": {"num_heads": 4}, "callbacks": {Target: [1, 2]}}
    made = [_saved(content), _saved(wrapped), _saved(content, _use_new_zipfile_serialization=False)]

    def sample(generator: random.Random) -> Files:
        if generator.random() < 0.3:
            return {"a.safetensors": save(content)}
        return {"a.ckpt": generator.choice(made)}

    def use(folder: Path, files: Files) -> str | None:
        (name,) = files
        if name == "a.ckpt":
            try:
                read_foreign(folder / name)
            except ValueError:
                pass
        for tensor in read_state_dict(folder / name).values():
            tensor.float().sum()
        return None

    return Target("weights", sample, use, (ValueError,))


def importer() -> Target:
    from tests.released_fixture import released_fixture

    _, state, _ = released_fixture("mlm")
    whole = _saved({"state_dict": state, "hyper_parameters": {"num_heads": 4}})
    with zipfile.ZipFile(io.BytesIO(whole)) as file:
        members = {member.filename: file.read(member) for member in file.infolist()}
    name = next(name for name in members if name.endswith("/data.pkl"))

    def use(folder: Path, files: Files) -> str | None:
        with zipfile.ZipFile(folder / "a.ckpt", "w") as file:
            for member, content in (members | {name: files["data.pkl"]}).items():
                file.writestr(member, content)
        import_flm(folder / "a.ckpt", folder / "out", 4)
        return None

    return Target("importer", lambda _: {"data.pkl": members[name]}, use, (ValueError,))


def downloads() -> Target:
    body = b"x" * 300
    made = [
        b"HTTP/1.1 200 OK\r\nContent-Length: 300\r\nX-Robots-Tag: googlebot: noai\r\n\r\n" + body,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n12c\r\n" + body + b"\r\n0\r\nA: b\r\n\r\n",
        b"HTTP/1.0 200\r\n\r\n" + body,
        b"HTTP/1.1 302 Found\r\nLocation: http://other.test/y?a=b\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 Not Found\r\nContent-Encoding: gzip\r\n\r\n",
    ]
    urls = [
        b"http://a.test/x y.jpg?a=1",
        "http://\u00fc.test:8080/\u00e4".encode(),
        b"http://[2001:db8::1]/x",
        b"https://a.test/",
    ]

    def use(_: Path, files: Files) -> str | None:
        opened: list[socket.socket] = []

        def answering(self: bounded_http._Connection) -> socket.socket:
            ours, theirs = socket.socketpair()
            theirs.setblocking(False)
            try:
                theirs.send(files["response"])
            except BlockingIOError:
                pass
            theirs.shutdown(socket.SHUT_WR)
            opened.append(theirs)  # closed, it would refuse the client's request
            return ours

        with (
            mock.patch.object(bounded_http, "resolve", lambda *_: []),
            mock.patch.object(bounded_http._Connection, "_first_that_answers", answering),
        ):
            bounds = bounded_http.Bounds(2, 4, 1000)
            accept = lambda headers: "noai" not in headers.get_all("X-Robots-Tag", [])  # noqa: E731
            try:
                found = bounded_http.fetch(files["url"].decode("utf-8", "surrogateescape"), bounds, {}, accept)
            except (OSError, ValueError, http.client.HTTPException) as error:
                return f"{failures.failure_reason(str(error))}"
            finally:
                for one in opened:
                    one.close()
            assert len(found) <= bounds.max_bytes
            return None

    def sample(generator: random.Random) -> Files:
        return {"response": generator.choice(made), "url": generator.choice(urls)}

    return Target("downloads", sample, use, (), ("response", "response", "response", "url"))


def tokenizers() -> Target:
    from data_prep.drawn.synth import SynthOptions, write_corpora
    from data_prep.tokenizer import train_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_corpora(Path(folder) / "synth", SynthOptions({"train": 20, "dev": 0, "test": 0}, pair_share=0))
        train_tokenizer([Path(folder) / "synth" / "train"], Path(folder) / "tokenizer", 300)
        made = {f"tokenizer/{path.name}": path.read_bytes() for path in (Path(folder) / "tokenizer").iterdir()}

    def use(folder: Path, _: Files) -> str | None:
        tokenizer = load_tokenizer(folder / "tokenizer")
        tokenizer.decode(tokenizer.encode("a large red circle", 20))
        return None

    return Target("tokenizers", lambda _: dict(made), use, (ValueError,))


def recipes() -> Target:
    made = [path.read_bytes() for path in sorted((_REPOSITORY / "pipeline" / "recipes").glob("*.yaml"))]

    def use(folder: Path, _: Files) -> str | None:
        load_recipe(folder / "a.yaml")
        return None

    return Target("recipes", lambda generator: {"a.yaml": generator.choice(made)}, use, (ConfigError,))


def tables() -> Target:
    tsv = "url\tcaption\tnumber\n" + "".join(f"http://h/{n}.jpg\tcaption {n}\t{n}\n" for n in range(5))
    lines = [{"url": f"http://h/{n}.jpg", "caption": f"c {n}", "number": n} for n in range(5)]
    jsonl = "".join(json.dumps(line) + "\n" for line in lines)
    made = {"a.tsv": tsv, "a.csv": tsv.replace("\t", ","), "a.jsonl": jsonl}

    def sample(generator: random.Random) -> Files:
        name = generator.choice(sorted(made))
        return {name: made[name].encode()}

    def use(folder: Path, files: Files) -> str | None:
        (name,) = files
        found = list(url_table.url_rows(folder / name, "url", "caption", ["number"], []))
        rejected = Counter(one.reason for one in found if isinstance(one, Rejection))
        return f"Rejection: {rejected.most_common(1)[0][0]}" if rejected else None

    return Target("tables", sample, use, (PrepError,))


def annotations() -> Target:
    question = {"question_id": 70, "image_id": 7, "question": "What?"}
    answers = [{"answer": "a net", "answer_confidence": "yes", "answer_id": number} for number in range(10)]
    annotation = {"question_id": 70, "image_id": 7, "answers": answers, "multiple_choice_answer": "a net"}
    annotation |= {"answer_type": "other", "question_type": "what"}
    sentence = {"raw": "A dog.", "sentid": 5, "tokens": ["a", "dog"], "imgid": 0}
    image = {"filename": "COCO_val2014_000000000007.jpg", "filepath": "val2014", "cocoid": 7, "imgid": 0}
    image |= {"split": "val", "sentids": [5], "sentences": [sentence]}
    statement = {"identifier": "dev-1-0-0", "sentence": "A dog.", "label": "True", "left_url": "l", "right_url": "r"}
    hypothesis = {"pairID": "7#0", "sentence2": "A dog.", "gold_label": "neutral", "Flikr30kID": "7"}
    made: dict[str, list[dict]] = {
        "vqav2": [
            {"data_subtype": "val2014", "questions": [question, question | {"question_id": 71}]},
            {"data_subtype": "val2014", "annotations": [annotation, annotation | {"question_id": 71}]},
        ],
        "coco": [{"dataset": "coco", "images": [image, image | {"cocoid": 8, "filename": "8.jpg"}]}],
        "nlvr2": [statement, statement | {"identifier": "dev-1-0-1"}],
        "snli_ve": [hypothesis, hypothesis | {"pairID": "7#1"}],
    }

    def sample(generator: random.Random) -> Files:
        name = generator.choice(sorted(made))
        documents = [json.dumps(document).encode() for document in made[name]]
        if name in ("nlvr2", "snli_ve"):
            return {f"{name}_dev.json": b"\n".join(documents)}
        return {f"{name}_{number}.json": document for number, document in enumerate(documents)}

    def use(folder: Path, files: Files) -> str | None:
        paths = [folder / name for name in sorted(files)]
        if paths[0].name.startswith("vqav2"):
            splits = vqav2.read_vqav2(paths[:1], paths[1:])
        elif paths[0].name.startswith("coco"):
            splits = karpathy.read_karpathy(paths[0], "coco")
        else:
            read = nlvr2.read_nlvr2 if paths[0].name.startswith("nlvr2") else snli_ve.read_snli_ve
            splits = [read(paths[0])]
        found = [one for split in splits for one in local_records(split, [folder])]
        rejected = Counter(one.reason for one in found if isinstance(one, Rejection) and one.reason != "missing_image")
        return f"Rejection: {rejected.most_common(1)[0][0]}" if rejected else None

    return Target("annotations", sample, use, (PrepError,))


TARGETS: dict[str, Callable[[], Target]] = {
    "images": images,
    "clips": clips,
    "shards": functools.partial(splits, "shards", "train/00000.tar", "train/00001.tar"),
    "indexes": functools.partial(splits, "indexes", "train/00000.index.npy", "train/00001.index.npy"),
    "manifests": functools.partial(splits, "manifests", f"train/{MANIFEST_NAME}"),
    "checkpoints": checkpoints,
    "weights": weights,
    "importer": importer,
    "downloads": downloads,
    "tokenizers": tokenizers,
    "recipes": recipes,
    "tables": tables,
    "annotations": annotations,
}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _encoded(image: Image.Image, fmt: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, fmt, **options)
    return stream.getvalue()


def _saved(content: object, **options) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()
