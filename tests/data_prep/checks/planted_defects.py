"""Defects that are planted in a split for the doctor: what each is called, and the function that makes it."""

import gzip
import io
import json
import os
import tarfile
from dataclasses import replace

import numpy as np

from data_prep.manifest import read_manifest, write_manifest

SHARD, INDEX = "00001.tar", "00001.index.npy"


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


def manifest_content(folder, **changes):
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    for shard in content["shards"]:
        shard |= changes.get(shard["file"], {})
    path.write_text(json.dumps(content | {name: value for name, value in changes.items() if name in content}))


def edit_index(folder, change, name=INDEX):
    """Change an index and tell the manifest its new hash."""
    index = np.load(folder / name)
    change(index)
    np.save(folder / name, index)
    manifest = read_manifest(folder)
    shards = [
        replace(shard, index_sha256=hash_of(folder / name)) if shard.index_file == name else shard
        for shard in manifest.shards
    ]
    write_manifest(folder, replace(manifest, shards=tuple(shards)))


def hash_of(path):
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def replace_tar(folder, content):
    """Another tar in the place of one, as if it had been written so."""
    (folder / SHARD).write_bytes(content)
    manifest_content(folder, **{SHARD: {"bytes": len(content), "sha256": hash_of(folder / SHARD)}})


def members(folder):
    with tarfile.open(folder / SHARD) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]


def tar_of(entries, **options):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", **options) as tar:
        for member, content in entries:
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def link_out(folder):
    os.rename(folder / SHARD, folder.parent.parent / "elsewhere.tar")
    (folder / SHARD).symlink_to(folder.parent.parent / "elsewhere.tar")


def sparse(folder):
    first, *rest = members(folder)
    first[0].type = tarfile.GNUTYPE_SPARSE
    replace_tar(folder, tar_of([first, *rest], format=tarfile.USTAR_FORMAT))


LOST_SHARD = {  # samples k2 and k3, four rows, are lost with it
    "truncated_shard": lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:3000]),
    "empty_shard": lambda f: (f / SHARD).write_bytes(b""),
    "missing_shard": lambda f: (f / SHARD).unlink(),
    "changed_shard": lambda f: flip(f / SHARD, 700),
    "not_a_tar": lambda f: replace_tar(f, b"<html>not found</html>" * 500),
    "compressed_shard": lambda f: replace_tar(f, gzip.compress((f / SHARD).read_bytes())),
    "broken_header": lambda f: replace_tar(f, broken_second_header(f)),
    "sparse_member": sparse,
    "link_out": link_out,
}
REPAIRED = {  # nothing is lost
    "missing_index": lambda f: (f / INDEX).unlink(),
    "changed_index": lambda f: flip(f / INDEX, 140),
    "bad_index": lambda f: (f / INDEX).write_bytes(b"no index"),
    "wrong_counts": lambda f: manifest_content(f, **{SHARD: {"rows": 7}}, rows=15),
    "wrong_totals": lambda f: manifest_content(f, rows=99),
    "appended_data": lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes() + b"x" * 1024),
    "stray_file": lambda f: (f / "00009.tar").write_bytes(b"who knows"),
    "orphaned_index": lambda f: (f / "00009.index.npy").write_bytes(b"who knows"),
    "leftover": lambda f: (f / ".manifest.json.4999999").write_text("{"),
    "rejected_tail": lambda f: append(f / "rejected.jsonl", '{"reason": "timeout", "name": "x", "rows": 1}\n'),
    "rejected_counts": lambda f: (f / "rejected.jsonl").unlink(),
    "rejected_damaged": lambda f: (f / "rejected.jsonl").write_text("no json\n"),
}
LOST_SAMPLE = {  # one sample, two rows
    "bad_row": lambda f: edit_index(f, lambda index: index.__setitem__((0, 1), 7)),
    "unsafe_name": lambda f: rename_members(f, "../evil"),
    "not_a_file": lambda f: link_member(f),
}


def broken_second_header(folder):
    content = bytearray((folder / SHARD).read_bytes())
    second = members(folder)[1][0].offset
    content[second : second + 512] = b"?" * 512
    return bytes(content)


def append(path, text):
    with open(path, "a") as stream:
        stream.write(text)


def rename_members(folder, key):
    """The first sample of the shard under another name, its bytes where they are."""
    entries = members(folder)
    for member, _ in entries[:3]:
        member.name = key + "." + member.name.partition(".")[2]
    replace_tar(folder, tar_of(entries, format=tarfile.USTAR_FORMAT))


def link_member(folder):
    """The first image of the shard becomes a link: its content stays where it is, as data of nothing."""
    content = bytearray((folder / SHARD).read_bytes())
    header = members(folder)[0][0]
    header.type, header.linkname = tarfile.SYMTYPE, "/etc/passwd"
    content[header.offset : header.offset + 512] = header.tobuf(tarfile.USTAR_FORMAT)
    replace_tar(folder, bytes(content))
