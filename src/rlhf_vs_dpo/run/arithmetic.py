"""The same arithmetic on every x86-64 processor with AVX2, so that the same commit gives the same bytes.

Floating-point sums depend on how they are split: by the width of the processor's vectors, by the number of threads, by
what a library thinks best at the moment. All of that is read from the environment once, when torch, numpy and MKL are
loaded. So a stage replaces itself, before it imports any of them, by itself in an environment where it is fixed:

    instruction set   AVX2: what every x86-64 server since about 2015 has (others: see below). MKL takes it on Intel's
                      processors alone, until it is told better (`take_avx2`)
    threads           THREADS in every library, and never fewer when the machine is busy. They sleep while they wait
                      (PASSIVE): threads that spin slow their neighbours tenfold where there are more than cores
    order of sets     PYTHONHASHSEED, though nothing here should iterate over a set of strings

Sums in which threads race for the last word (atomic adds) are switched off in `language.models`, for they need torch.

RLHF_NATIVE=1 leaves all as the machine has it. Its bytes are then its own, and log, tags and report say so. On other
processors (ARM) only the number of threads is fixed; on a GPU, results are the same on GPUs of the same kind.
"""

import ctypes
import importlib.util
import os
import platform
import sys
from pathlib import Path

THREADS = 2
MARK = "RLHF_ARITHMETIC"  # in the environment of a process that was started with fixed arithmetic
# Whatever the environment asks of these libraries is dropped: a limit of threads or a schedule would move bits, too.
FAMILIES = ("ATEN_", "ARROW_USER_SIMD", "BLIS_", "DNNL_", "GLIBC_TUNABLES", "GOMP_", "GOTO_", "KMP_", "MKL_", "NPY_",
            "OMP_", "ONEDNN_", "OPENBLAS_")  # fmt: skip
FIXED_THREADS = {
    "OMP_NUM_THREADS": str(THREADS),
    "OMP_DYNAMIC": "FALSE",
    "OMP_WAIT_POLICY": "PASSIVE",
    "MKL_NUM_THREADS": str(THREADS),
    "MKL_DYNAMIC": "FALSE",
    "OPENBLAS_NUM_THREADS": str(THREADS),
    "PYTHONHASHSEED": "0",
}
MKL_CBWR_BRANCH, MKL_CBWR_AVX2 = 1, 10  # of mkl_types.h
FIXED_INSTRUCTIONS = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "ARROW_USER_SIMD_LEVEL": "AVX2",
    # All groups of AVX-512 by the names that numpy has had for them; it passes over those that it does not know.
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR",
}


def native() -> bool:
    """Whether the user asked for the machine's own arithmetic."""
    return os.environ.get("RLHF_NATIVE", "") not in ("", "0")


def fixed_environment(environment: dict[str, str]) -> dict[str, str]:
    """`environment` with the arithmetic fixed, whatever it asked for."""
    kept = {name: value for name, value in environment.items() if not name.startswith(FAMILIES)}
    instructions = FIXED_INSTRUCTIONS if platform.machine().lower() in ("x86_64", "amd64") else {}
    return kept | FIXED_THREADS | instructions | {MARK: "fixed"}


def fix() -> None:
    """Replace this process by itself with fixed arithmetic; returns where it is fixed, or RLHF_NATIVE asks for none.

    Call it before anything imports torch or numpy. Raises RuntimeError where that has happened, for it would change nothing.
    """
    wanted = fixed_environment(dict(os.environ))
    # Libraries that are loaded set variables of these families, too: what counts is that they started from the fixed ones.
    changed = any(os.environ.get(name) != value for name, value in fixed_environment({}).items())
    if native():
        return
    if not changed:
        take_avx2()
        return
    if loaded := {"numpy", "torch"} & sys.modules.keys():
        raise RuntimeError(f"{', '.join(sorted(loaded))} is loaded already: its arithmetic can no longer be fixed")
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)


def take_avx2() -> bool:
    """Let MKL take its AVX2 branch whoever made the processor; returns whether it does.

    MKL grants `MKL_CBWR=AVX2` to Intel's processors alone, and elsewhere takes kernels that sum in another order (an AMD EPYC gave
    another `base` model). The branch itself needs AVX2 and nothing of Intel. MKL asks `mkl_serv_intel_cpu_true`, which remembers its
    answer in the variable that its first instruction reads (`mov eax, [rip + offset]`): where the answer is no, it is made yes
    here, before MKL is used. Where torch has no such MKL, nothing is done.
    """
    mkl = _mkl()
    if mkl is None:
        return False
    if not mkl.mkl_serv_intel_cpu_true():
        function = ctypes.cast(mkl.mkl_serv_intel_cpu_true, ctypes.c_void_p).value or 0
        instruction = ctypes.string_at(function, 6)
        if not instruction.startswith(b"\x8b\x05"):
            return False
        answer = function + len(instruction) + int.from_bytes(instruction[2:], "little", signed=True)
        ctypes.c_int.from_address(answer).value = 1
    return mkl.mkl_serv_cbwr_get(MKL_CBWR_BRANCH) == MKL_CBWR_AVX2


def _mkl() -> ctypes.CDLL | None:
    """The library in which torch carries MKL; None where there is none."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None or "MKL_CBWR" not in fixed_environment({}):
        return None
    library = Path(found.origin).with_name("lib") / "libtorch_cpu.so"
    if not library.exists():
        return None
    try:
        mkl = ctypes.CDLL(str(library))
    except OSError:  # it needs others (CUDA's), which torch knows how to find
        import torch  # noqa: F401

        mkl = ctypes.CDLL(str(library))
    return mkl if hasattr(mkl, "mkl_serv_intel_cpu_true") and hasattr(mkl, "mkl_serv_cbwr_get") else None


def name() -> str:
    """How this process computes, in words: for the log, the tags of its run, and the report."""
    if native():
        return "native: RLHF_NATIVE is set, and these bytes are this machine's own"
    if take_avx2():
        return f"AVX2, {THREADS} threads"
    return f"{platform.machine()}, {THREADS} threads: these bytes are those of this kind of processor"
