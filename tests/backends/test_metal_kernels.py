"""Apple's own quantised kernels read our packed bytes exactly: their source, run on a CPU.

See metal_shim.cpp. The source is the one in the installed mlx; the wheel for macOS carries the same
bytes. The shim is written for one version of it: with another these tests fail, and say so.

Covered: qmv_quad, qmv_fast, qmv and qmv_wide (decoding), and of the prefill kernels qmm_t and
qmm_t_splitk the unpacking, the tiling and the parts of K. Not covered: their products (simdgroup
matrices), the kernels of quantized_nax.h for chips with matrix units, and which kernel MLX picks.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx
import mlx.core as mx
import numpy as np
import pytest

from bitdistill import exporters, packing
from bitdistill.backends.mlx_layout import GROUP_SIZES, group_size

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SHIM = Path(__file__).with_name("metal_shim.cpp")
INCLUDE = Path(next(iter(mlx.__path__))) / "include"
SOURCE = INCLUDE / "mlx" / "backend" / "metal" / "kernels" / "quantized.h"
SHA256 = "040ee89ae58555104ff0edfbb1546f15bca4e372fab4350ed613f66ab3c2d393"
COMPILERS = [name for name in ("g++", "clang++") if shutil.which(name)] or ["c++"]
TYPES: dict[str, Any] = {
    "float": np.float32,
    "half": np.float16,
    "bfloat": ml_dtypes.bfloat16,
}
Matmul = Callable[..., np.ndarray]


def prepare(source: bytes, folder: Path) -> None:
    """Put what the shim includes into a folder; fails for a source that it was not written for."""
    if hashlib.sha256(source).hexdigest() != SHA256:
        pytest.fail(
            f"mlx {version('mlx')} has another {SOURCE.name} than mlx 0.32.4, for which the shim "
            "was written: compare the two, extend metal_shim.cpp and SHAPES to what is new, and "
            "then put the hash of the new one into SHA256"
        )
    for name in ("metal_stdlib", "metal_simdgroup"):  # what they declare is in the shim
        (folder / name).touch()
    kernels = folder / SOURCE.relative_to(INCLUDE)
    kernels.parent.mkdir(parents=True)
    # memory of a threadgroup is shared by its fibres, and each threadgroup runs to its end
    kernels.write_bytes(re.sub(rb"threadgroup (T \w+\[)", rb"static \1", source))


def test_another_source_fails(tmp_path: Path) -> None:
    """Rather than being skipped, or run by a shim that does not fit it."""
    with pytest.raises(pytest.fail.Exception, match=r"another quantized\.h than mlx 0\.32\.4"):
        prepare(b"// a later release", tmp_path)


@pytest.fixture(scope="module", params=COMPILERS)
def matmul(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Matmul:
    """`matmul(kernel, x, words, scales, biases)`: x (M, K) times packed (N, K / 16)."""
    folder = tmp_path_factory.mktemp("shim")
    prepare(SOURCE.read_bytes(), folder)
    library = folder / "shim.so"
    command = [
        request.param, "-std=c++17", "-O2", "-shared", "-fPIC", "-Wno-attributes",
        "-Wno-ignored-attributes", f"-I{folder}", f"-I{INCLUDE}", SHIM, "-o", library,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    function = ctypes.CDLL(str(library)).metal_matmul

    def call(kernel: str, x: np.ndarray, *packed: np.ndarray) -> np.ndarray:
        type_name = next(name for name, dtype in TYPES.items() if x.dtype == dtype)
        (rows, columns), outputs = x.shape, len(packed[0])
        assert all(part.dtype == x.dtype for part in packed[1:])
        arrays = [np.ascontiguousarray(a) for a in (*packed, x)]
        y = np.full((rows, outputs), np.nan, x.dtype)
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in (*arrays, y)]
        group = columns // packed[1].shape[1]
        names = (kernel.encode(), type_name.encode())
        assert function(*names, group, *pointers, rows, outputs, columns) == 0
        return y

    return call


# What a kernel takes: `qmv_fast` K in whole blocks of 512, `qmv_quad` K = 64 or 128.
SHAPES: dict[str, list[tuple[int, int, int]]] = {
    "qmv_fast": [(1, 8, 512), (2, 36, 1024), (1, 16, 9728)],
    "qmv": [(1, 1, 32), (3, 7, 96), (1, 24, 576), (2, 13, 1536), (1, 9, 2560)],
    "qmv_wide": [(5, 9, 32), (8, 24, 576), (3, 8, 2560)],
    "qmv_quad": [(1, 8, 128), (2, 70, 128), (1, 8, 64), (2, 70, 64)],
    "qmm_t": [(1, 33, 64), (40, 70, 576), (33, 32, 1024)],
    "qmm_t_splitk": [(1, 33, 64), (33, 70, 576), (20, 32, 1024)],
}
CASES = [(kernel, shape) for kernel, shapes in SHAPES.items() for shape in shapes]
GROUPED = [(*case, group) for case in CASES for group in GROUP_SIZES if case[1][2] % group == 0]


def random_case(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers of int8 range (M, K) and trits (N, K) with the largest sums, and their products."""
    tokens, rows, columns = shape
    random = np.random.default_rng(columns)
    trits = random.integers(-1, 2, (rows, columns)).astype(np.int8)
    trits[-1] = 1
    q = random.integers(-128, 128, (tokens, columns))
    q[0] = -128
    return q, trits, q @ trits.T.astype(np.int64)


@pytest.mark.parametrize(("kernel", "shape", "group"), GROUPED)
def test_integer_products(
    matmul: Matmul, kernel: str, shape: tuple[int, int, int], group: int
) -> None:
    """With the shared ones and minus ones: exact in fp32, rounded once in 16 bits."""
    q, trits, exact = random_case(shape)
    words = packing.pack_affine(trits)
    for dtype in TYPES.values():
        scale = 1 if dtype is np.float32 else 128
        ones = np.ones((len(trits), shape[2] // group), dtype)
        y = matmul(kernel, (q / scale).astype(dtype), words, ones, -ones)
        assert np.array_equal(y, (exact / scale).astype(np.float32).astype(dtype))


@pytest.mark.parametrize(("kernel", "shape"), CASES)
def test_stored_scales(matmul: Matmul, kernel: str, shape: tuple[int, int, int]) -> None:
    """D and -D as in a stock layer: exact where sums of x fit the bits that D leaves."""
    _, trits, _ = random_case(shape)
    x = np.random.default_rng(0).integers(-1, 2, (shape[0], shape[2])).astype(np.float32)
    group = group_size(shape[2])
    scale = np.float32(ml_dtypes.bfloat16(0.0173))
    scales = np.full((len(trits), shape[2] // group), scale)
    y = matmul(kernel, x, packing.pack_affine(trits), scales, -scales)
    assert np.array_equal(y, (x @ trits.T.astype(np.float32)) * scale)


def test_bytes_of_an_artifact(
    matmul: Matmul, student_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """Every ternary matrix of a written file, as it lies there, by each kernel that takes it."""
    student = student_dir("qwen3", hidden_size=128, intermediate_size=576)
    artifact = exporters.export(student, "mlx", tmp_path / "artifact")
    tensors = mx.load(str(artifact / "model.safetensors"))
    paths = [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]
    assert len(paths) == 14
    for path in paths:
        words, scales, biases = (
            np.array(tensors[f"{path}.{part}"]) for part in ("weight", "scales", "biases")
        )
        columns = words.shape[1] * 16
        trits = packing.unpack_affine(words, columns).astype(np.int64)
        x = np.random.default_rng(0).integers(-2, 3, (2, columns))
        for kernel in (
            "qmv",
            "qmv_wide",
            "qmm_t",
            "qmm_t_splitk",
            *(["qmv_quad"] if columns in (64, 128) else []),
        ):
            y = matmul(kernel, x.astype(np.float16), words, scales, biases)
            exact = (x @ trits.T) * np.float64(scales[0, 0])
            assert np.array_equal(y, exact.astype(np.float16)), (path, kernel)
