"""Fixed arithmetic: whatever the environment asks for is dropped. (That bytes follow is tested on stages, in test_pipeline.)"""

import os
import subprocess
import sys

import pytest

from rlhf_vs_dpo.run import arithmetic

SHOW = """
import os, sys
from rlhf_vs_dpo.run import arithmetic
arithmetic.fix()
import numpy, torch
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__
wide = [n for n in __cpu_dispatch__ if __cpu_features__[n] and (n.startswith("AVX512") or n == "X86_V4")]
print(torch.get_num_threads(), torch.backends.cpu.get_cpu_capability(), len(wide), os.environ.get("MKL_CBWR"), hash("a"))
"""


def shown(**env: str) -> list[str]:
    return run(SHOW, **env).split()


def run(code: str, **env: str) -> str:
    """What a process of its own prints, started with `env` and none of the libraries' variables besides."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(arithmetic.FAMILIES) and k != "PYTHONHASHSEED"}
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | path | env, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_threads_instructions_and_hashes_are_those_of_the_project_whatever_was_asked_for():
    plain = shown()
    assert plain[0] == "2" and plain[3] == "AVX2" and plain[2] == "0"
    asked = {"OMP_NUM_THREADS": "7", "OMP_THREAD_LIMIT": "1", "MKL_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "default",
             "MKL_CBWR": "COMPATIBLE", "PYTHONHASHSEED": "5"}  # fmt: skip
    assert shown(**asked) == plain


BYTES = """
import hashlib
from rlhf_vs_dpo.run import arithmetic
arithmetic.fix()
import torch
print(torch.__version__.split("+")[0], arithmetic.name().split(",")[0])
generator = torch.Generator().manual_seed(0)
a, b = torch.randn(300, 257, generator=generator), torch.randn(257, 123, generator=generator)
heads = (a[None, None, :, start : start + 16] for start in (0, 16, 32))
for made in (a @ b, a.exp(), a.sigmoid().log(), a.softmax(-1), torch.nn.functional.scaled_dot_product_attention(*heads)):
    print(hashlib.md5(made.numpy().tobytes()).hexdigest()[:8])
"""


def test_bytes_are_those_of_other_makers_processors():
    """Recorded on an AMD EPYC, and on Intel's Haswell, Broadwell and Skylake as qemu-user emulates them."""
    found = run(BYTES).splitlines()
    if found[0] != "2.13.0 AVX2":
        pytest.skip(f"recorded with torch 2.13.0 on x86-64, not with {found[0]}")
    assert found[1:] == ["b5572a40", "0abd4d9a", "7ffc62eb", "56118d7e", "3d75d9b8"]


def test_native_leaves_all_as_it_is_and_says_so():
    found = shown(RLHF_NATIVE="1", OMP_NUM_THREADS="1", PYTHONHASHSEED="5")
    assert found[0] == "1" and found[3] == "None"
    assert shown(RLHF_NATIVE="0")[0] == "2"


@pytest.mark.parametrize(("value", "native"), [("1", True), ("", False), ("0", False)])
def test_its_name(monkeypatch, value, native):
    monkeypatch.setenv("RLHF_NATIVE", value)
    assert arithmetic.native() == native == arithmetic.name().startswith("native")


def test_too_late_is_an_error(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with pytest.raises(RuntimeError, match="numpy, torch is loaded already"):
        arithmetic.fix()
