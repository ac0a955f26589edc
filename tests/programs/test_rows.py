"""Rows on demand are those that the array has in memory, in any order, and no more are read."""

from __future__ import annotations

import importlib.util
import mmap

import h5py
import numpy as np
import pytest
import scipy.sparse
import torch

from pyro_vae.programs.rows import ArrayRows, SparseFileRows, SparseTensorRows, rows_of, tensor_of

needs_zarr = pytest.mark.skipif(
    importlib.util.find_spec("zarr") is None, reason="the extra zarr is not installed"
)

X = np.random.default_rng(0).poisson(0.7, (40, 5))
ORDERS = [
    slice(0, 40),
    slice(7, 12),
    torch.tensor([3, 3, 0, 39, 17, 3]),
    torch.arange(5, 9),
    torch.tensor([9]),
    torch.tensor([], dtype=torch.long),
]


class CSRInFile:
    """What AnnData gives of a sparse matrix in a file, of its public attributes."""

    format = "csr"

    def __init__(self, path, matrix):
        self.group = h5py.File(path, "w")
        for name in ("data", "indices", "indptr"):
            self.group[name] = getattr(matrix, name)
        self.shape, self.dtype = matrix.shape, matrix.dtype


CSRInFile.__module__ = "anndata.made_up"


def made(kind, x, tmp_path):
    if kind == "memmap":
        np.save(tmp_path / "x.npy", x)
        return np.load(tmp_path / "x.npy", mmap_mode="r")
    if kind == "written":
        np.save(tmp_path / "x.npy", x)
        return np.load(tmp_path / "x.npy", mmap_mode="r+")[:]
    if kind == "zarr":
        import zarr

        array = zarr.create_array(
            str(tmp_path / "x.zarr"), shape=x.shape, dtype=x.dtype, chunks=(7, *x.shape[1:])
        )
        array[:] = x
        return zarr.open_array(str(tmp_path / "x.zarr"), mode="r")
    if kind == "hdf5":
        file = h5py.File(tmp_path / "x.h5", "w")
        return file.create_dataset("x", data=x, chunks=(7, *x.shape[1:]))
    if kind == "file":
        return CSRInFile(tmp_path / "x.h5", scipy.sparse.csr_matrix(x))
    if kind.startswith("torch"):
        return getattr(torch.from_numpy(x), kind.removeprefix("torch."))()
    return getattr(scipy.sparse, kind)(x)


KINDS = [
    *(
        "memmap",
        "written",
        "hdf5",
        "file",
        "csr_matrix",
        "csc_array",
        "coo_matrix",
        "torch.to_sparse",
    ),
    pytest.param("zarr", marks=needs_zarr),
]


@pytest.mark.parametrize("dtype", ["float32", "uint16", "int8", ">i4", "bool"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_array(kind, dtype, tmp_path):
    x = X.astype(dtype)
    if kind.startswith("torch") and dtype in ("uint16", ">i4"):
        x = X  # torch has no such tensor
    if dtype == ">i4" and kind in ("csr_matrix", "csc_array", "coo_matrix", "file"):
        x = X.astype("i4")  # SciPy has no such matrix
    rows = rows_of("argument 'x'", made(kind, x, tmp_path))
    # The rule for dtypes is that of an array in memory.
    whole = tensor_of("x", x)
    assert (rows.shape, rows.dtype) == (tuple(whole.shape), whole.dtype)
    for order in ORDERS:
        found = rows.read(order)
        assert found.dtype == whole.dtype
        assert torch.equal(found, whole[order])
    assert rows.row_bytes == whole[0].nbytes


@pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR) tensor support is in beta")
@pytest.mark.parametrize("layout", ["to_sparse_csr", "to_sparse_csc", "to_sparse_bsr"])
def test_layouts_of_sparse_tensors(layout):
    x = torch.from_numpy(X).double()
    sparse = x.to_sparse_bsr((2, 5)) if layout == "to_sparse_bsr" else getattr(x, layout)()
    rows = rows_of("x", sparse)
    assert all(torch.equal(rows.read(order), x[order]) for order in ORDERS)


def test_sparse_tensors_of_more_dimensions():
    """Entries given twice count twice; hybrid ones have dense entries."""
    x = torch.from_numpy(X).double().reshape(20, 2, 5)
    for sparse in (x.to_sparse(), x.to_sparse(1), x[:, 0, 0].to_sparse()):
        rows = SparseTensorRows(sparse)
        index = torch.tensor([19, 4, 4])
        assert torch.equal(rows.read(index), sparse.to_dense()[index])
    entries = [[1, 1], [2, 2]], [3.0, 4.0], (3, 4)
    twice = torch.sparse_coo_tensor(*entries, check_invariants=True)
    assert SparseTensorRows(twice).read(slice(1, 2))[0, 2] == 7.0
    matrix = scipy.sparse.csr_matrix(([3.0, 4.0], [2, 2], [0, 0, 2, 2]), (3, 4))
    assert rows_of("x", matrix).read(slice(1, 2))[0, 2] == 7.0
    assert matrix.nnz == 2  # the user's own is left as it is


class Counting:
    """An array that notes how many rows are read of it at once."""

    dtype, shape, chunks = np.dtype("f4"), (40, 5), (8, 5)

    def __init__(self):
        self.read = []

    def __getitem__(self, key):
        part = X.astype("f4")[key]
        self.read.append((len(part), key))
        return part


def test_rows_are_read_in_ascending_order_each_once():
    array = Counting()
    rows = ArrayRows("x", array)
    assert rows.block == 8
    rows.read(torch.tensor([30, 2, 30, 11]))
    rows.read(torch.tensor([6, 4, 5]))
    (first, key), (second, part) = array.read
    assert (first, key.tolist()) == (3, [2, 11, 30])
    assert (second, part) == (3, slice(4, 7))
    with pytest.raises(
        IndexError, match=r"rows 2 to 40 are asked for of x, which has rows 0 to 39"
    ):
        rows.read(torch.tensor([2, 40]))


def test_pages_of_a_mapped_file_are_given_back(tmp_path, monkeypatch):
    """What was read is a copy; values that were written to the file stay there."""
    monkeypatch.setattr("pyro_vae.programs.rows._PAGES", 100)
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r+")
    rows = rows_of("x", mapped)
    mapped[3] = 77
    found = rows.read(slice(0, 10))
    assert bool((found[3] == 77).all())
    found[0] = -5
    assert np.array_equal(mapped[0], X[0])
    mapped.flush()
    assert np.load(tmp_path / "x.npy")[3, 0] == 77
    private = np.load(tmp_path / "x.npy", mmap_mode="c")
    private[4] = 55  # is in this process alone
    rows = rows_of("x", private)
    assert all(bool((rows.read(slice(4, 30))[0] == 55).all()) for _ in range(3))
    assert hasattr(mmap, "MADV_DONTNEED")


def test_refusals(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["words"] = ["a", "b"]
        with pytest.raises(TypeError, match=r"x of the batch is a Dataset of dtype object"):
            rows_of("x", file["words"])
        with pytest.raises(TypeError, match=r"x of the batch is a h5py File, which is no array"):
            rows_of("x", file)
    by_columns = CSRInFile(tmp_path / "y.h5", scipy.sparse.csr_matrix(X))
    by_columns.format = "csc"
    with pytest.raises(TypeError, match=r"in a file by columns \(csc\).*X.tocsr"):
        rows_of("x", by_columns)
    assert isinstance(
        rows_of("x", CSRInFile(tmp_path / "z.h5", scipy.sparse.csr_matrix(X))), SparseFileRows
    )


@pytest.mark.parametrize("value", [X, torch.from_numpy(X), 0.5, None, "x", [1, 2]])
def test_what_is_in_memory_has_no_rows_on_demand(value):
    assert rows_of("x", value) is None


def test_numbers_beyond_the_integers_of_pytorch_are_refused():
    with pytest.raises(ValueError, match=r"counts of the batch holds numbers of 2\*\*63"):
        tensor_of("counts", np.array([1, 2**63], dtype="uint64"))
    assert tensor_of("counts", np.array([1, 2**63 - 1], dtype="uint64"))[1] == 2**63 - 1
