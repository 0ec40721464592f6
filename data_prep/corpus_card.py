"""Writes the README.md of a corpus, by which Hugging Face's ``load_dataset(CORPUS)`` finds and reads its splits."""

from __future__ import annotations

import json
import re
from pathlib import Path

from data_prep.manifest import MANIFEST_NAME, Manifest, ManifestError, load_manifest, write_atomically
from data_prep.shard_members import FIELD_OF, IMAGE_EXTENSIONS

CARD_NAME = "README.md"
MEMBERS = "members"  # in a manifest's provenance: what follows the keys in the names of its members, such as jpg
_MARK = "<!-- written by data_prep; a README.md without this line is left alone -->"
_KINDS = {
    "txt": "string",
    "text": "string",
    "json": "json",
    **dict.fromkeys(IMAGE_EXTENSIONS, "image"),
}  # as read there
_KINDS |= {extension: "video" for extension, field in FIELD_OF.items() if field == "video"}


def write_card(corpus: Path) -> None:
    """Name the finished splits of the folder ``corpus`` in its README.md, unless a README.md of others is there.

    The front matter is that of Hugging Face's dataset cards: ``configs`` and ``dataset_info``. A split whose manifest
    is damaged is left out. Raises OSError.
    """
    path, written = corpus / CARD_NAME, None
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return
    while (found := sorted(corpus.glob(f"[!.]*/{MANIFEST_NAME}"))) != written:  # another split may have been finished
        splits = {file.parent.name: _manifest(file.parent) for file in found}
        write_atomically(path, _card(corpus.resolve().name, {name: one for name, one in splits.items() if one}))
        written = found


def _manifest(split_dir: Path) -> Manifest | None:
    try:
        return load_manifest(split_dir)
    except ManifestError:  # `verify` says what is wrong with it
        return None


def _card(name: str, splits: dict[str, Manifest]) -> str:
    lines = ["---", "configs:", "- config_name: default", "  data_files:"]
    for split in splits:
        lines += [f"  - split: {_quoted(re.sub(r'[^0-9A-Za-z_.]', '_', split))}"]
        lines += [f"    path: {_quoted(f'{split}/*.tar')}"]
    if columns := _columns(list(splits.values())):
        # Without it the types of all columns would be guessed from five samples: a null there, then a text, fails.
        lines += ["dataset_info:", "  features:"]
        for column, kind in {**columns, "__key__": "string", "__url__": "string"}.items():
            lines += [f"  - name: {_quoted(column)}", f"    dtype: {kind}"]
    rows = ", ".join(f"{manifest.rows} rows of {split}" for split, manifest in splits.items())
    return "\n".join([*lines, "---", _MARK, "", f"# {name}", "", f"Shards in WebDataset's form: {rows}.", ""])


def _columns(splits: list[Manifest]) -> dict[str, str]:
    """Member -> the kind of its column; nothing where they are not all known."""
    members = [manifest.provenance.get(MEMBERS) for manifest in splits]
    if not all(isinstance(one, list) for one in members):
        return {}
    names = sorted({name for names in members for name in names})
    kinds = {name: _KINDS.get(name.rpartition(".")[2].lower()) for name in names}
    return {} if None in kinds.values() else kinds


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
