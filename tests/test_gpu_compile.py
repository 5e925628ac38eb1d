"""tools/gpu_compile: what is read of a compile, and the tool from end to end."""

import json

import pytest

from paged_kv.kernels.gpu import unsupported_version
from tools.gpu_compile import __main__ as gpu_compile
from tools.gpu_compile import archs, compiler

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.64.CONSTANT R2, [R2.64] ;
        /*0020*/              @UP1 UTMALDG.3D [UR8], [UR4] ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
"""


def test_instructions_are_counted_with_and_without_a_predicate():
    assert compiler.count_ops(SASS) == {"LDC": 1, "LDG": 1, "UTMALDG": 1, "HGMMA": 2}


@pytest.mark.parametrize(
    ("registers", "threads", "smem_bytes", "expected"),
    [
        (168, 384, 229504, 1),
        (32, 128, 0, 16),  # 2048 threads
        (168, 384, 0, 1),  # 64512 registers
        (16, 32, 0, 32),
        (24, 128, 41 * 1024, 5),  # 42 KiB each, of 228
    ],
)
def test_blocks_per_sm_are_bound_by_what_runs_out_first(registers, threads, smem_bytes, expected):
    blocks = archs.blocks_per_sm(
        "H100", registers=registers, threads=threads, smem_bytes=smem_bytes
    )
    assert blocks == expected


def test_output_of_another_version_is_an_error():
    with pytest.raises(RuntimeError, match=r"the compiler.s output holds no .*entry function"):
        compiler._assembled("ptxas info : 0 bytes gmem")


needs_compilers = pytest.mark.skipif(
    unsupported_version() is not None or compiler.missing() is not None,
    reason=f"{unsupported_version() or compiler.missing()}",
)


@pytest.mark.aot
@needs_compilers
def test_the_tool_tells_and_writes_what_a_case_takes(tmp_path, capsys):
    path = tmp_path / "out.json"
    assert gpu_compile.main(["append_64", "nothing", "ci_mha", "--json", str(path)]) == 1
    (record,) = json.loads(path.read_text())
    assert list(record) == [
        "case", "arch", "kernel", "registers", "spill_stores", "spill_loads", "smem_bytes", "ops",
    ]  # fmt: skip
    assert (record["case"], record["arch"], record["kernel"]) == (
        "append_64", "H100", "paged_append",
    )  # fmt: skip
    assert (record["spill_stores"], record["spill_loads"]) == (0, 0)
    assert record["registers"] > 0
    assert record["ops"] is None or record["ops"]["STG"] > 0
    printed = capsys.readouterr()
    assert "no case 'nothing'" in printed.err
    assert "pools of float32 are none of bfloat16, float16" in printed.err
    header, row = printed.out.splitlines()
    assert header.split()[:4] == ["case", "arch", "kernel", "registers"]
    assert row.split()[:4] == ["append_64", "H100", "paged_append", str(record["registers"])]


def test_without_compilers_the_tool_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(compiler, "missing", lambda: "needs `pip install x`: no ptxas")
    assert gpu_compile.main(["append_64"]) == 2
    assert "gpu_compile needs `pip install x`: no ptxas" in capsys.readouterr().err
