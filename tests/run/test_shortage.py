"""Memory that runs out: a batch is begun again in halves, an error names the key to lower, a kill by the kernel is recognised."""

import pytest
import torch

from rlhf_vs_dpo.errors import OutOfMemory
from rlhf_vs_dpo.run import frame, shortage


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    ],
)  # fmt: skip
def test_an_error_of_memory_names_what_to_lower(error):
    said = str(shortage.of(error))
    assert said.startswith("out of memory (") and "RLHF_MICRO_TOKENS" in said and "\n" not in said


def test_other_errors_are_left_alone():
    assert shortage.of(RuntimeError("shapes do not match")) is None and shortage.of(ValueError("memory")) is None


def test_what_a_machine_really_says_when_memory_is_asked_for_that_it_does_not_have():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert isinstance(shortage.of(error.value), OutOfMemory)


def test_a_stage_says_so_and_exits_with_1(tmp_path, monkeypatch, capsys):
    from conftest import ROOT

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(frame, "Recorder", Silent)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    with pytest.raises(SystemExit) as end, frame.stage("x", []):
        raise torch.OutOfMemoryError("CUDA out of memory")
    said = capsys.readouterr().err
    assert (
        end.value.code == 1 and "error: out of memory (CUDA out of memory); lower" in said and "Traceback" not in said
    )


class Silent:
    def tell(self, **message):
        pass

    def end(self, status):
        pass


def test_kills_of_the_kernel_are_counted(tmp_path, monkeypatch):
    before = shortage.kills()
    assert before >= 0

    class Path:
        def __init__(self, name):
            self.name = name

        def read_text(self):
            return "low 0\noom 3\noom_kill 2\n" if "cgroup" in self.name else "nr_free_pages 9\noom_kill 5\n"

    monkeypatch.setattr(shortage, "Path", Path)
    assert shortage.kills() == 7
