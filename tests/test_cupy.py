"""Calls of CuPy, and the emulated CuPy, against the real package; a GPU is not needed."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import fake_cupy
import numpy as np
import pytest

import lowrank
from lowrank import filters
from lowrank.families import FAMILIES
from lowrank.metric import Moments

cupy = pytest.importorskip("cupy", reason="CuPy is not installed", exc_type=ImportError)
ROOT = Path(lowrank.__file__).parent
FILES = [
    *ROOT.glob("engine/cuda/*.py"), ROOT / "filters" / "gpu.py",
    *(ROOT / "interop" / "torch" / name for name in ("engine.py", "modules.py")),
]  # fmt: skip
#: Dotted names of CuPy that lowrank's modules have other names for, and of methods.
NAMES = {
    "xp": "cupy",
    "_runtime": "cupy.cuda.runtime",
    "_current_stream": "cupy.cuda.get_current_stream",
}
METHODS = {
    **dict.fromkeys(("astype", "reshape", "transpose", "ravel"), "cupy.ndarray"),
    **dict.fromkeys(("begin_capture", "end_capture", "wait_event"), "cupy.cuda.Stream"),
    "get_function": "cupy.RawModule", "launch": "cupy.cuda.graph.Graph",
}  # fmt: skip


def name_of(node):
    """Return the dotted name of CuPy that is called, or None."""
    names = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    if isinstance(node, ast.Name) and node.id in ("cupy", *NAMES):
        return ".".join([NAMES.get(node.id, node.id), *names])
    owner = METHODS.get(names[-1]) if names else None
    return f"{owner}.{names[-1]}" if owner else None


def calls():
    """Yield every call of CuPy in the source of lowrank: place, dotted name, call."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and (name := name_of(node.func)):
                yield f"{path.name}:{node.lineno}", name, node


def test_every_call_in_the_source_fits_cupys_signature():
    bound = 0
    for place, name, call in calls():
        if name.startswith("cupy.cuda.cublas."):
            continue  # needs its library; see below
        signature = fake_cupy.signature_of(name)  # raises if CuPy has no such name
        starred = any(isinstance(a, ast.Starred) for a in call.args)
        if signature is None or starred:
            continue
        try:
            signature.bind(*call.args, **{k.arg: k.value for k in call.keywords})
        except TypeError as error:
            pytest.fail(f"{place}: {name}: {error}")
        bound += 1
    assert bound > 50


def emulated():
    """Yield the functions of the emulated CuPy by their dotted names."""
    owners = {
        "cupy": fake_cupy, "cupy.ndarray": fake_cupy.ndarray, "cupy.cuda": fake_cupy.cuda,
        "cupy.cuda.runtime": fake_cupy.runtime, "cupy.RawKernel": fake_cupy.RawKernel,
        "cupy.RawModule": fake_cupy.RawModule, "cupy.cuda.graph.Graph": fake_cupy.Graph,
        **{f"cupy.cuda.{c.__name__}": c for c in (fake_cupy.Device, fake_cupy.Stream)},
        **{f"cupy.cuda.{c.__name__}": c for c in (fake_cupy.Event, fake_cupy.Function)},
    }  # fmt: skip
    own = {"prepare", "installed", "signature_of", "real"}
    for owner, found in owners.items():
        for name, value in vars(found).items():
            is_method = inspect.isfunction(value) or isinstance(value, classmethod)
            if (is_method and not name.startswith("_") and name not in own) or (
                name == "__init__" and owner.endswith(("Stream", "Event", "RawModule", "Device"))
            ):
                path = owner if name == "__init__" else f"{owner}.{name}"
                yield path, getattr(found, name)


def difference(ours, theirs):
    """Return what keeps calls that fit `ours` from fitting `theirs`, or None."""
    known = list(theirs.values())
    ours = [p for p in ours if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    for place, p in enumerate(ours):
        other = theirs.get(p.name)
        if other is None or (other.default is p.empty) != (p.default is p.empty):
            return f"parameter {p.name}"
        if p.kind is p.POSITIONAL_OR_KEYWORD and known.index(other) != place:
            return f"place of {p.name}"
    return None


def test_the_emulated_functions_have_cupys_parameters():
    compared = []
    for path, function in emulated():
        theirs = fake_cupy.signature_of(path)
        if theirs is None:
            continue
        ours = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
        assert difference(ours, theirs.parameters) is None, f"{path}{theirs}"
        compared.append(path)
    assert {"cupy.cuda.Stream.begin_capture", "cupy.asarray", "cupy.ndarray.get"} <= {*compared}
    assert len(compared) > 35


def test_array_code_calls_what_cupy_has(rng):
    conv = lowrank.dense(rng.standard_normal((12, 8, 3, 3)), rng.standard_normal(12), padding=1)
    with fake_cupy.installed() as module:
        fake_cupy.hooks.is_dry = True  # kernels are not compiled
        a = module.asarray(rng.standard_normal((4, 4)))
        with pytest.raises(TypeError, match="hermitian"):  # the emulation binds every call
            np.linalg.svd(a, hermitian=True)
        for name in ("channel_svd", "spatial_svd", "tucker", "network_decoupling", "kronecker"):
            family = FAMILIES[name]
            variant = family.variants(conv)[0]
            rank = next(iter(family.sweep(conv, variant))).rank
            f = family.fit(conv.to("cuda"), rank, variant)
            for dtype in ("float32", "float16"):
                f.compile((9, 9), dtype)(module.zeros((2, 8, 9, 9), dtype))
        moments = Moments(conv, paired=True, centred=True)
        moments.add(module.zeros((2, 8, 9, 9), np.float32), module.zeros((2, 8, 9, 9), np.float32))
        moments.metric()
        for image in (module.zeros((20, 21, 3), np.uint8), module.zeros((20, 21, 3))):
            filters.correlate(image, filters.gauss(1.0), mode="mirror", axes=(0, 1))
            filters.correlate(image, rng.random((3, 3)), mode="constant", cval=1, axes=(0, 1))


@pytest.fixture(scope="module")
def toolkit(tmp_path_factory):
    """Make libraries of no code with the symbols that CuPy's modules need: a CUDA toolkit."""
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "lib64").mkdir()
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime.h").touch()
    libs = Path(cupy.__file__).parents[1] / "cupy_backends" / "cuda" / "libs"
    cuda = cupy.cuda.runtime.runtimeGetVersion() // 1000
    needed = (f"libcublasLt.so.{cuda}", f"libnvJitLink.so.{cuda}", "libcusparse.so.12")
    wanted = {name: set() for name in needed}  # by the libraries that are needed
    for module in (*libs.glob("cublas.*.so"), *libs.glob("cusolver.*.so")):
        text = subprocess.run(
            ["nm", "-D", "--undefined-only", module], capture_output=True, text=True, check=True
        ).stdout
        for symbol, version in re.findall(r" U (cu\w+)@(lib\S+)", text):
            wanted.setdefault(version, set()).add(symbol)
    for name, symbols in wanted.items():
        code = "".join(f"int {symbol}(void) {{ return 0; }}\n" for symbol in sorted(symbols))
        (folder / "stub.c").write_text(code)
        (folder / "stub.map").write_text(f"{name} {{ global: *; }};\n")
        command = [
            "gcc",
            "-shared",
            "-fPIC",
            "stub.c",
            f"-Wl,-soname,{name}",
            "-o",
            f"lib64/{name}",
        ]
        subprocess.run([*command, "-Wl,--version-script,stub.map"], cwd=folder, check=True)
    return folder


def test_libraries_of_an_installed_toolkit_are_loaded(toolkit):
    code = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import cupy, fake_cupy
from lowrank.engine.cuda import device
missing = device.missing_libraries()
gemm = fake_cupy.signature_of("cupy.cuda.cublas.gemmStridedBatchedEx")
library = device.load_cublas()
counts = [len(f.argtypes) for f in (library.cublasGemmStridedBatchedEx, library.cublasSetStream_v2)]
print(json.dumps([missing, [*gemm.parameters], counts]))
"""
    env = os.environ | {"CUDA_PATH": str(toolkit), "CUDA_HOME": str(toolkit)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    missing, parameters, counts = json.loads(run.stdout)
    assert missing == []
    assert parameters == [*inspect.signature(fake_cupy._gemm).parameters]
    assert counts == [len(parameters), 2]


def test_a_wheel_alone_is_explained():
    if cupy.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(lowrank.engine.NoGPU, match=r"driver|GPU"):
        lowrank.dense(np.ones((4, 3, 3, 3))).to("cuda")


def test_kernels_compile_with_the_options_that_cupy_adds():
    pytest.importorskip("nvidia.cu13", reason="needs the wheel nvidia-cuda-nvrtc")
    source = (ROOT / "engine" / "cuda" / "kernels.cu").read_text()
    nvrtc, name = cupy.cuda.nvrtc, "transpose<float>"
    program = nvrtc.createProgram(source, "kernels.cu", (), ())
    nvrtc.addNameExpression(program, name)
    own = ("-ftz=true", "--device-as-default-execution-space", "-arch=sm_90")
    nvrtc.compileProgram(program, ("-std=c++17", *own))
    assert nvrtc.getCUBIN(program).startswith(b"\x7fELF")
    assert "transpose" in nvrtc.getLoweredName(program, name)
    nvrtc.destroyProgram(program)
