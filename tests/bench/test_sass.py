"""Loops and instructions of machine code, from a listing as the disassembler prints it."""

from pathlib import Path

import pytest
from temposae.bench import sass

ROOT = "/clone/kernels/loss/triton.py"
LINES = (sass.ROOT / "kernels/loss/triton.py").read_text().splitlines()
COLUMNS = next(n for n, line in enumerate(LINES, 1) if "for start in range(0, D, BLOCK)" in line)
SLOTS = next(n for n, line in enumerate(LINES, 1) if "for start in range(0, count, BLOCK)" in line)
# A loop over columns with one over slots inside, both of token_loss_kernel; a conditional loop exit; padding.
LISTING = f"""
        .size           token_loss_kernel,(.L_x_9 - token_loss_kernel)
.text.token_loss_kernel:
	//## File "{ROOT}", line 21
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   IMAD.MOV.U32 R8, RZ, RZ, RZ ;
.L_x_1:
	//## File "{ROOT}", line {COLUMNS + 2}
        /*0020*/              @!P0 LDG.E R4, desc[UR4][R2.64] ;
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_2:
        /*0040*/                   FFMA R8, R4, R4, R8 ;
        /*0050*/                   ISETP.GE.AND P0, PT, R5, R6, PT ;
	//## File "{ROOT}", line {SLOTS}
        /*0060*/              @!P0 BRA `(.L_x_2) ;
        /*0070*/               @P1 BRA `(.L_x_3) ;
	//## File "{ROOT}", line {COLUMNS}
        /*0080*/              @!P2 BRA `(.L_x_1) ;
.L_x_3:
        /*0090*/                   MUFU.RCP R4, R4 ;
        /*00a0*/                   STG.E desc[UR4][R2.64], R8 ;
        /*00b0*/                   EXIT ;
.L_x_4:
        /*00c0*/                   BRA `(.L_x_4);
        /*00d0*/                   NOP;
        /*00e0*/                   NOP;
.L_x_9:
"""


def test_loops_are_named_by_function_and_variable_of_their_statement() -> None:
    code = sass.parse(LISTING)
    name = "token_loss_kernel.start"
    assert code.loops == [sass.Loop(name, 0x40, 0x60), sass.Loop(name, 0x20, 0x80)]
    assert len(code.opcodes) == 12  # neither the padding nor the trap before it
    assert code.loop_instructions == 7
    assert code.loop_sizes == {name: 7}


def test_instructions_are_executed_as_often_as_their_loops() -> None:
    code = sass.parse(LISTING)
    inner, outer = code.loops
    code = code._replace(loops=[inner._replace(name="inner"), outer])
    found = code.executed({"inner": 100, "token_loss_kernel.start": 10}, float_cycles=1)
    assert found == {
        "issue": 5 + 10 * 4 + 100 * 3,  # an instruction belongs to its innermost loop
        "barrier": 10,
        "float": 2 + 100,  # IMAD at half rate, FFMA
        "integer": 2 * 100,
        "special": 8,
        "memory": 4 * (2 + 10),  # LDC, STG and the LDG of the loop
    }
    assert code.executed({"inner": 100, "token_loss_kernel.start": 10}, float_cycles=2)["float"] == 2 + 200
    assert code.executed({"inner": 0, "token_loss_kernel.start": 0}, float_cycles=1)["issue"] == 5
    assert code.executed({}, float_cycles=1)["issue"] == 12  # loops without trips run once


def test_copies_of_a_loop_share_its_trips() -> None:
    code = sass.parse(LISTING)  # both loops have one name
    assert code.executed({"token_loss_kernel.start": 10}, float_cycles=1)["issue"] == 5 + 5 * 4 + 5 * 3


@pytest.mark.parametrize(
    ("line", "name"),
    [(COLUMNS, "token_loss_kernel.start"), (COLUMNS + 1, "token_loss_kernel.start"), (1, "kernels/loss/triton.py:1")],
)
def test_statements(line: int, name: str) -> None:
    assert sass.name_of([(ROOT, line)], ()) == name


def test_the_innermost_statement_names_a_loop(tmp_path: Path) -> None:
    source = """def kernel(n):
    for start in tl.range(0, n):
        while tile >= 0 and start:
            tile -= 1
        start += 1
    for rank in tl.static_range(4):
        rank += 1
"""
    file = tmp_path / "kernels/op/triton.py"
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert sass._statements(file) == [(2, 5, "kernel.start"), (3, 4, "kernel.tile")]
