"""A test for each trick that a file of weights can play on its reader: code, sizes, archives, files that are none."""

from __future__ import annotations

import argparse
import enum
import functools
import io
import json
import os
import pickle
import subprocess
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from model.config import TextConfig
from model.weights.released import read_layout
from pipeline.convert import main
from pipeline.weights.files import read_state_dict
from pipeline.weights.inert_pickle import read_foreign
from pipeline.weights.sources import load_text
from tests.released_fixture import released_fixture

WEIGHTS = {"state_dict": {"layer.weight": torch.arange(6.0).view(2, 3), "layer.bias": torch.ones(3)}}


class Calls:
    """Pickled as a call of ``function``."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Settings(dict):
    """A dictionary of a framework's own."""


class Stages(list):
    """A list of a framework's own."""


class Mode(enum.Enum):
    ON = 1


class Slots:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 3


def saved(path: Path, content: Any = WEIGHTS) -> Path:
    torch.save(content, path)
    return path


def archive(path: Path, members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members:
            file.writestr(zipfile.ZipInfo(name), content, compression)
    return path


def members_of(path: Path) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as file:
        return [(member.filename, file.read(member)) for member in file.infolist()]


def pickled(path: Path, content: bytes) -> Path:
    return archive(path, [("archive/data.pkl", content), ("archive/byteorder", b"little"), ("archive/version", b"3\n")])


def refused(path: Path) -> str:
    """The one line that each reader ends with."""
    messages = []
    for read in (read_foreign, read_state_dict):
        with pytest.raises(ValueError) as caught:
            read(path)
        messages.append(" ".join(str(caught.value).split()))
        assert len(messages[-1]) < 1000
    return messages[0]


def test_what_frameworks_leave_in_their_files_is_passed_over(tmp_path: Path) -> None:
    other = {"hyper_parameters": Settings(num_heads=4, stages=Stages([1, 2])), "callbacks": {Settings: Slots()}}
    other |= {
        "path": Path("somewhere"),
        "device": torch.device("cpu"),
        "seen": {1},
        "optimizer": OrderedDict(betas=(1, 2)),
    }
    other |= {
        "logged": defaultdict(list, loss=[1.0]),
        "counts": Counter("ab"),
        "score": np.float64(0.5),
        "mode": Mode.ON,
    }
    other |= {"schedule": functools.partial(int, base=2), "args": argparse.Namespace(lr=0.1), "array": np.ones(3)}
    found = read_foreign(saved(tmp_path / "a.ckpt", WEIGHTS | other))
    assert found["logged"] == {"loss": [1.0]} and found["counts"] == {"a": 1, "b": 1}
    assert all(torch.equal(found["state_dict"][name], value) for name, value in WEIGHTS["state_dict"].items())
    assert found["hyper_parameters"] == {"num_heads": 4, "stages": [1, 2]} and isinstance(
        found["hyper_parameters"], dict
    )
    assert type(found["path"]).__name__ == "ForeignObject" and found["optimizer"] == {"betas": (1, 2)}


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (subprocess.check_call, (["touch", "crater"],)),
        (eval, ("open('crater', 'w')",)),
        (exec, ("open('crater', 'w')",)),
        (getattr, (os, "system")),
        (io.open, ("crater", "w")),
        (torch.save, ([], "crater")),
        (torch.load, ("/dev/zero",)),
        (pickle.loads, (b"cposix\nmkdir\n(X\x06\0\0\0cratertR.",)),
    ],
)
def test_no_function_is_called(function: Callable, arguments: tuple, tmp_path: Path, monkeypatch) -> None:
    """Invariant 7. Some are refused, the others stay uncalled."""
    monkeypatch.chdir(tmp_path)
    try:
        path = saved(Path("a.ckpt"), WEIGHTS | {"x": Calls(function, *arguments)})
    except (pickle.PicklingError, TypeError):
        path = saved(Path("a.ckpt"), WEIGHTS | {"x": Calls(function, "x")})
    try:
        read_foreign(path)
    except ValueError as error:
        assert "\n" not in str(error)
    assert "not a plain weights file" in refused_by_plain_reader(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.ckpt"]


def refused_by_plain_reader(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        read_state_dict(path)
    return str(caught.value)


def test_a_pickle_in_a_pickle_stays_bytes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    inner = pickle.dumps(Calls(os.mkdir, "crater"), protocol=2)
    found = read_foreign(saved(Path("a.ckpt"), WEIGHTS | {"inner": inner}))
    assert found["inner"] == inner and not Path("crater").exists()


@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
def test_other_protocols_of_pickle_are_refused(protocol: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(pickled(Path("a.ckpt"), pickle.dumps({"x": Calls(os.mkdir, "crater")}, protocol)))
    assert not Path("crater").exists()


def test_archives_that_torch_does_not_write_are_refused(tmp_path: Path) -> None:
    """Invariant 7: no archive grows when it is read, hides a second member, or leads out of its folder."""
    members = members_of(saved(tmp_path / "sound.ckpt"))
    path, folder = tmp_path / "a.ckpt", members[0][0].partition("/")[0]

    assert "a compressed member" in refused(archive(path, members, zipfile.ZIP_DEFLATED))
    bomb = [(f"{folder}/data.pkl", b"\x80\x02" + b"0" * 10_000_000)]
    assert "a compressed member" in refused(archive(path, bomb, zipfile.ZIP_DEFLATED))
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive(path, [*members, members[0]])
    assert "twice" in refused(path)
    assert "twice" in refused(archive(path, [*members, (f"{folder}/DATA.PKL", b"")]))
    for name in (
        "/etc/crater",
        "../crater",
        f"{folder}/../../crater",
        f"{folder}//crater",
        "crater",
        f"{folder}\\..\\x",
    ):
        assert "outside its folder" in refused(archive(path, [*members, (name, b"x")])), name
    for name in ("constants.pkl", "CONSTANTS.pkl", "code/constants.pkl"):
        assert "TorchScript program" in refused(archive(path, [*members, (f"{folder}/{name}", b"x")]))
    assert "has data.pkl of []" in refused(archive(path, members[1:]))
    assert [entry.name for entry in tmp_path.iterdir()] in (["sound.ckpt", "a.ckpt"], ["a.ckpt", "sound.ckpt"])


def test_members_that_share_bytes_are_refused(tmp_path: Path) -> None:
    """The directory of the archive lists one member's bytes as those of a hundred."""
    path = archive(tmp_path / "a.ckpt", [("archive/data.pkl", b"\x80\x02N."), ("archive/data/0", bytes(10_000))])
    with zipfile.ZipFile(path, "a") as file:
        big = file.infolist()[1]
        for number in range(1, 100):
            copy = zipfile.ZipInfo(f"archive/data/{number}")
            copy.header_offset, copy.CRC, copy.file_size, copy.compress_size = (
                big.header_offset,
                big.CRC,
                10_000,
                10_000,
            )
            file.filelist.append(copy)
        file._didModify = True
    assert "members larger than the file" in refused(path)


def test_links_in_an_archive_are_not_followed(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("archive/data/9")
    link.external_attr = 0o120777 << 16
    path = saved(tmp_path / "a.ckpt")
    with zipfile.ZipFile(path, "a") as file:
        link.filename = file.namelist()[0].partition("/")[0] + "/data/9"
        file.writestr(link, "/etc/passwd")
    assert read_state_dict(path).keys() == WEIGHTS["state_dict"].keys()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.ckpt"]


def test_pipes_devices_and_folders_are_refused_without_waiting(tmp_path: Path) -> None:
    for suffix in ("ckpt", "safetensors"):
        os.mkfifo(tmp_path / f"pipe.{suffix}")
        (tmp_path / f"folder.{suffix}").mkdir()
        (tmp_path / f"zero.{suffix}").symlink_to("/dev/zero")
        for name in ("pipe", "folder", "zero"):
            assert "not a regular file" in refused(tmp_path / f"{name}.{suffix}")
    assert "no such file" in refused(tmp_path / "none.ckpt")
    assert "no such file" in refused(tmp_path / "a\0b.ckpt")
    spanned = bytearray(saved(tmp_path / "a.ckpt").read_bytes())
    spanned[spanned.rindex(b"PK\6\7") + 16] = 2  # of two disks
    (tmp_path / "a.ckpt").write_bytes(spanned)
    assert "cannot be read" in refused(tmp_path / "a.ckpt")


def nested(depth: int) -> bytes:
    """A dictionary whose key is a tuple of 2^depth elements, in a few bytes."""
    doubled = b"".join(
        b"h" + bytes([number]) + b"h" + bytes([number]) + b"\x86q" + bytes([number + 1]) for number in range(depth)
    )
    return b"\x80\x02}N\x85q\x00" + doubled + b"Ns."


def test_tuples_that_would_be_hashed_for_ever_are_refused(tmp_path: Path) -> None:
    assert "tuple of over" in refused(pickled(tmp_path / "a.ckpt", nested(60)))
    assert "tuple of over" in refused(pickled(tmp_path / "a.ckpt", b"\x80\x02}N" + b"\x85" * 200_000 + b"Ns."))  # deep


def test_dictionaries_and_wrappers_that_hold_themselves_end(tmp_path: Path) -> None:
    itself: dict[str, Any] = {"epoch": 3}
    itself["state_dict"] = itself
    with pytest.raises(ValueError, match="holds no tensors"):
        read_state_dict(saved(tmp_path / "a.ckpt", itself))
    assert main(["import-flm", str(tmp_path / "a.ckpt"), str(tmp_path / "out")]) == 2
    long = "module." * 50_000 + "a"
    assert list(read_state_dict(saved(tmp_path / "b.ckpt", {long: torch.ones(1)}))) == ["a"]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1).expand(10**11), "claims 400000000000 bytes"),
        (torch.zeros(10**4, 1).expand(-1, 10**7), "claims"),
        (torch.empty(10**12, device="meta"), "rebuild_meta_tensor_no_storage"),
        (
            torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), torch.ones(1), (10**12,)),
            "rebuild_sparse_tensor",
        ),
        (Calls(bytearray, 10**13), "makes objects by builtins.bytearray"),
        (Calls(torch.Tensor, 10**11), "makes objects by torch.Tensor"),
        (torch.nested.nested_tensor([torch.ones(1)]), "rebuild_nested_tensor"),
    ],
)
def test_sizes_that_the_file_has_no_bytes_for_are_refused(tensor: Any, message: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.ckpt", {"state_dict": {"a": tensor, "b": torch.ones(1)}})
    assert main(["import-flm", str(path), str(tmp_path / "out")]) == 2
    with pytest.raises(ValueError, match=message):
        read_state_dict(path)


def test_names_for_the_same_bytes_are_bounded(tmp_path: Path) -> None:
    value = torch.ones(100_000)
    assert len(read_state_dict(saved(tmp_path / "a.ckpt", {f"layer{n}": value for n in range(4)}))) == 4
    with pytest.raises(ValueError, match="claims"):
        read_state_dict(saved(tmp_path / "a.ckpt", {f"layer{n}": value for n in range(1000)}))


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    members = members_of(saved(tmp_path / "a.ckpt"))
    number = next(i for i, (name, _) in enumerate(members) if name.endswith("/data.pkl"))
    content = members[number][1].replace(b"K\x02K\x03\x86", b"K\x02J\xff\xff\xff\x7f\x86")  # of shape [2, 2^31 - 1]
    assert content != members[number][1]
    members[number] = (members[number][0], content)
    assert "cannot be read" in refused(archive(tmp_path / "b.ckpt", members))


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update({"text_transformer.encoder.layer.999999999999.output.dense.weight": torch.ones(1)}),
        lambda state: state.update({"cross_modal_text_layers." + "9" * 5000 + ".x": torch.ones(1)}),
        lambda state: state.update({"vit_model.visual.conv1.weight": torch.ones(0, 3, 0, 0)}),
        lambda state: state.update({"vit_model.visual.conv1.weight": torch.tensor(1.0)}),
        lambda state: state.update({"vit_model.visual.positional_embedding": torch.ones(1, 1)}),
        lambda state: state.update({"text_transformer.embeddings.word_embeddings.weight": torch.ones(3, 5)}),
        lambda state: state.update({"text_transformer.embeddings.position_embeddings.weight": torch.ones(())}),
    ],
)
def test_numbers_in_names_and_shapes_build_no_network(change: Callable, tmp_path: Path, capsys) -> None:
    state = dict(released_fixture("flm")[1])
    change(state)
    assert main(["import-flm", str(saved(tmp_path / "a.ckpt", {"state_dict": state})), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.glob("out*"))


def test_layers_are_counted_without_gaps() -> None:
    state = dict(released_fixture("flm")[1])
    assert read_layout(state, 4).model.text.top_layers > 0
    state["cross_modal_text_layers.7.x"] = torch.ones(1)
    with pytest.raises(ValueError, match="expected all from 0"):
        read_layout(state, 4)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{}", '{"used": 3}', "[" * 100_000, '{"used": {"a": ["b"]}, "aliased": {}, "dead": []}'],
    ids=lambda text: text[:20],
)
def test_a_foreign_import_report_is_one_line(text: str, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "imported"
    folder.mkdir()
    save_file({"w": torch.ones(2)}, folder / "weights.safetensors")
    (folder / "import.json").write_text(text)
    assert main(["export-flm", str(folder), str(tmp_path / "back.ckpt")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "back.ckpt").exists()


def test_a_model_s_own_code_is_not_run_whatever_is_answered(tmp_path: Path, monkeypatch) -> None:
    """Invariant 7: transformers asks at the terminal, unless it is told before."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder, crater = tmp_path / "model", tmp_path / "crater"
    folder.mkdir()
    names = {"AutoConfig": "code.Settings", "AutoModel": "code.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": names}))
    (folder / "code.py").write_text(f"open({str(crater)!r}, 'w').close()")
    with pytest.raises(ValueError, match="model.text.pretrained .* can't be loaded"):
        load_text(torch.nn.Module(), TextConfig(pretrained=str(folder)))
    assert not crater.exists()
