"""What kernels cost by their machine code."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from lissom.bench import machine
from lissom.kernels import _triton

from .aot import compile_for_a_gpu

CODE = """
        code for sm_90
        .section        .text.kernel,"ax",@progbits
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @P0  LDG.E R2, [R4.64] ;
        /*0020*/             @!UP1 UIADD3 UR4, UR4, 0x1, URZ ;
        /*0030*/                   NOP ;
        /*0040*/                   EXIT ;
$kernel$__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath:
        /*0050*/                   FMUL R1, R1, R2 ;
"""


def test_instructions_are_those_of_the_body():
    assert [*machine._body(CODE)] == ["LDC", "LDG", "UIADD3", "EXIT"]


COSTS = """
# Of an RTX 3090 the products alone, whose tiles are its own; then an H100.
for capability in (86, 90):
    found = {case.name: cost(case, capability) for case in cases(capability)
             if capability == 90 or case.name in (
                 "lift", "lift with a gain of rows, of weight and 8 bits more", "syrk")}
    assert len(found) >= 3
    for name, x in found.items():
        # With the tiles of an H100 an RTX 3090 spills 160 bytes, and has one program.
        assert x.spilled <= (100 if capability == 86 else 0), (name, x)
        assert x.registers > 0 and x.instructions > 1 and x.programs, (name, x)
        if name.startswith("lift"):
            # One program multiplies while another rounds.
            assert x.programs >= 2, (name, x)
# A T4, whose products are on no tensor cores.
for case in cases(75):
    if case.name in ("adamw8, 8 bits", "quantize_linear, 4 bits", "project", "lift"):
        x = cost(case, 75)
        assert x.spilled == 0 and x.programs, (case.name, x)
# What they had before they were cut: 157, 102, 39, 53, 38, 24 and 35.
most = {"adamw8, 8 bits": 86, "adam8, 8 bits": 70, "stochastic_round": 22, "split": 32,
        "quantize_linear, 8 bits": 24, "lift": 22, "lift with a gain of rows": 28}
for name, count in most.items():
    assert found[name].instructions < count, (name, found[name])
"""


@pytest.mark.slow
@pytest.mark.skipif(not _triton.EXACT, reason="needs triton >= 3.6")
def test_no_kernel_has_lost_its_registers(tmp_path):
    """Which would cost what no other test sees."""
    compile_for_a_gpu(COSTS, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not _triton.EXACT, reason="needs triton >= 3.6")
def test_rows_are_written(tmp_path):
    names = ["lift", "project", "adamw8, 4 bits"]
    command = [sys.executable, "-m", "lissom.bench.machine", "--capability", "80", "--kernels",
               ";".join(names), "--json", str(tmp_path / "rows.json")]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(done.stdout.splitlines()) == 3
    assert [(row["kernel"], row["capability"]) for row in rows] == [(name, 80) for name in names]
    other = subprocess.run([*command, "--kernels", "lift;none"], env=environment,
                           capture_output=True, text=True, check=False)
    assert other.returncode == 2
    assert "--kernels 'none' must be of 'adamw8, 32 bits', " in other.stderr
    refused = subprocess.run(command, env={**environment, "TRITON_INTERPRET": "1"},
                             capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "TRITON_INTERPRET unset" in refused.stderr
