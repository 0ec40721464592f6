"""Reads NLVR2 (github.com/lil-lab/nlvr): statements about pairs of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.annotations.annotated import Annotated, AnnotatedSplit
from data_prep.annotations.files import BadEntry, read_json_lines, text, whole_number
from data_prep.record import PrepError, Rejection

LABELS = ("True", "False")
SPLIT_OF = {"train": "train", "dev": "dev", "test1": "test", "test2": "test2"}
_EXPECTED = "NLVR2 as in dev.json: an object on each line"


def read_nlvr2(
    path: Path, split: str | None = None, balanced: Path | None = None, unbalanced: Path | None = None
) -> AnnotatedSplit:
    """A split of NLVR2, all statements about a pair together. Labels stay the texts "True" and "False".

    ``balanced`` and ``unbalanced`` are the published lists of the same form: each row then says which holds it.
    ``split`` is by default that of the identifiers (test1 is called test). Raises PrepError.
    """
    subsets = {name: _identifiers(file) for name, file in (("balanced", balanced), ("unbalanced", unbalanced)) if file}
    pairs: dict[str, Annotated] = {}
    problems: list[Rejection] = []
    seen: set[str] = set()
    num_statements, source = 0, None
    for line in read_json_lines(path, _EXPECTED):
        num_statements += 1
        if isinstance(line, Rejection):
            problems.append(line)
            continue
        name, entry = line
        try:
            name = text(entry, "identifier")
            found, pair_id = _parts(name)
            source = source or found
            if found != source:
                raise BadEntry("unknown_split", f"of {found}, the rows before it are of {source}")
            if name in seen:
                raise BadEntry("duplicate_id", "its identifier comes again; the earlier one counts")
            seen.add(name)
            _add(entry, name, pair_id, pairs, subsets)
        except BadEntry as error:
            problems.append(Rejection(error.reason, name, error.detail))
    counts = {"statements": num_statements, "pairs": len(pairs)}
    for subset, identifiers in subsets.items():
        if stranger := next((one for one in identifiers if one not in seen), None):
            raise PrepError(f"{balanced if subset == 'balanced' else unbalanced}: {stranger} is not in {path.name}")
        counts[subset] = len(identifiers)
    return AnnotatedSplit(split or SPLIT_OF[source or "train"], list(pairs.values()), problems, counts)


def _identifiers(path: Path) -> dict[str, None]:
    lines = read_json_lines(path, _EXPECTED)
    try:
        return dict.fromkeys(text(line[1], "identifier") for line in lines if not isinstance(line, Rejection))
    except BadEntry as error:
        raise PrepError(f"{path}: {error.detail}; expected {_EXPECTED}") from error


def _parts(identifier: str) -> tuple[str, str]:
    """("dev", "dev-850-0") of "dev-850-0-1": the split, and the pair without the number of the sentence."""
    pair_id, _, sentence = identifier.rpartition("-")
    fields = pair_id.split("-")
    if len(fields) != 3 or fields[0] not in SPLIT_OF or not all(part.isdecimal() for part in (*fields[1:], sentence)):
        raise BadEntry("malformed_row", f"identifier {ascii(identifier)[:60]}, expected SPLIT-SET-PAIR-SENTENCE")
    return fields[0], pair_id


def _add(
    entry: dict[str, Any],
    identifier: str,
    pair_id: str,
    pairs: dict[str, Annotated],
    subsets: dict[str, dict[str, None]],
) -> None:
    label, sentence = entry.get("label"), text(entry, "sentence")
    if label not in LABELS:
        raise BadEntry("unknown_label", f'label {ascii(label)[:40]}, expected the text "True" or "False"')
    urls = tuple(text(entry, side) for side in ("left_url", "right_url") if side in entry)
    if pair_id not in pairs:
        identities = urls if len(urls) == 2 else (f"{pair_id}-img0", f"{pair_id}-img1")
        images = tuple(_names(f"{pair_id}-img{number}.png", entry) for number in (0, 1))
        meta = {"synset": text(entry, "synset")} if "synset" in entry else {}
        pairs[pair_id] = Annotated(pair_id, images, tuple(f"nlvr2/{one}" for one in identities), meta)
    elif len(urls) == 2 and pairs[pair_id].identities != tuple(f"nlvr2/{url}" for url in urls):
        raise BadEntry("other_image", "its image addresses differ from those of the pair's earlier statement")
    of_subset = {}
    if subsets:
        of_subset = {"subset": next((name for name, members in subsets.items() if identifier in members), None)}
    pairs[pair_id].add(sentence, label=label, identifier=identifier, **of_subset)


def _names(name: str, entry: dict[str, Any]) -> tuple[str, ...]:
    """Where an image may lie: training images in numbered folders, the others together."""
    split = name.partition("-")[0]
    folders = ["", f"{split}/", f"images/{split}/"]
    if "directory" in entry:
        number = whole_number(entry, "directory")
        folders = [f"{folder}{number}/" for folder in folders] + folders
    return tuple(f"{folder}{name}" for folder in folders)
