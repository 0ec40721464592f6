"""Headers of .npy files: what numpy writes is read, anything else refused, and no Python source is parsed."""

import ast
import io

import numpy as np
import pytest

from data_prep.npy import MAX_HEADER_BYTES, load_array, parse_header

ARRAYS = {
    "index": np.arange(21, dtype=np.int64).reshape(7, 3),
    "features": np.arange(24, dtype=np.uint16).reshape(2, 3, 2, 2),
    "one axis": np.arange(5, dtype=np.float32),
    "keys": np.array([b"000", b"0012"]),
    "bytes": np.arange(6, dtype=np.uint8).reshape(2, 3),
    "no rows": np.zeros((0, 3), np.int64),
    "no axis": np.array(7.0),
}


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize("name", ARRAYS)
def test_what_numpy_writes_is_read_without_a_parser(tmp_path, name, version, mapped, monkeypatch):
    """A parser fails when threads use it at once: python/cpython issue 106905."""
    array, path = ARRAYS[name], tmp_path / "a.npy"
    with open(path, "wb") as stream:
        np.lib.format.write_array(stream, array, version)

    def depth_mismatch(*arguments, **options):
        raise SystemError("AST constructor recursion depth mismatch (before=36, after=215)")

    monkeypatch.setattr(ast, "parse", depth_mismatch)
    found = load_array(path, mapped)
    assert found.dtype == array.dtype and found.shape == array.shape and (found == array).all()


def test_an_array_by_columns_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.asfortranarray(np.ones((3, 2))))
    assert parse_header((tmp_path / "a.npy").read_bytes()).by_columns
    with pytest.raises(ValueError, match="by columns, expected 176 by rows"):
        load_array(tmp_path / "a.npy")


@pytest.mark.parametrize("array", [np.zeros(2, ">i8"), np.zeros(2, "M8[s]"), np.zeros(2, "i4,f4"), np.zeros(2, "U3")])
def test_other_types_are_refused(array):
    stream = io.BytesIO()
    np.save(stream, array)
    with pytest.raises(ValueError, match="expected that of an array of numbers or bytes"):
        parse_header(stream.getvalue())


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, ARRAYS["index"])
    whole = path.read_bytes()
    for count in (*range(0, 140), len(whole) - 1):
        path.write_bytes(whole[:count])
        for mapped in (True, False):
            with pytest.raises(ValueError):
                load_array(path, mapped)


def test_a_header_longer_than_what_is_read_is_refused():
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1,), }".ljust(60_000) + b"\n"
    file = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    assert parse_header(file).shape == (1,)
    with pytest.raises(ValueError, match="expected that of an array"):
        parse_header(file[:MAX_HEADER_BYTES])
