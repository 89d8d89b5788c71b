"""Counts of machine code, on listings short enough to count by hand."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from bench import log_mel_code, machine_code
from bench.kernel_peers import FRONT_ENDS
from bench.machine_code import Counts, Instruction
from fastclap.kernels import cuda_tools, offline
from fastclap.kernels.log_mel import cuda_engine


def listing(*lines: str) -> list[Instruction]:
    """Instructions at 0x10, 0x20, … as cuobjdump prints them, encodings and all."""
    text = "\n".join(f"        /*{16 * (i + 1):04x}*/   {line} ;   /* 0x000fe200 */" for i, line in enumerate(lines))
    return machine_code.parse(text)


@pytest.mark.parametrize(
    ("text", "wavefronts"),
    [
        ("LDS R2, [R4]", 1),
        ("LDS.U8 R2, [R4]", 1),
        ("@!P0 STS.64 [R4], R2", 2),
        ("LDS.128 R4, [R8+0x40]", 4),
        ("LDG.E R2, desc[UR4][R2.64]", 1),
        ("STG.E.128 desc[UR4][R2.64], R4", 4),
        ("LDL.LU.64 R2, [R1]", 2),
        ("LDSM.16.M88.4 R4, [R2]", 4),
        ("STSM.16.MT88.2 [R2], R4", 2),
        ("LDSM.16.M88 R4, [R2]", 1),
        ("SHFL.BFLY PT, R3, R2, 0x10, 0x1f", 1),
        ("FFMA R2, R3, R4, R5", 0),
        ("LDC.64 R2, c[0x0][0x210]", 0),
    ],
)
def test_wavefronts_of_an_instruction(text: str, wavefronts: int) -> None:
    assert Instruction(0, text).wavefronts == wavefronts


def test_shortest_way_goes_past_rare_branches_and_early_exits() -> None:
    code = listing(
        "@!P0 EXIT",  # 10: an exit, but not always
        "@P1 BRA 0x50",  # 20
        "FADD R1, R1, R2",  # 30: rare
        "FADD R1, R1, R2",  # 40: rare
        "@!P2 BRA P3, 0x70",  # 50
        "FMUL R1, R1, R2",  # 60
        "EXIT",  # 70
        "BRA 0x80",  # 80: padding
    )
    assert [line.at for line in machine_code.shortest(code, 0x10, None)] == [0x10, 0x20, 0x50, 0x70]
    assert [line.at for line in machine_code.shortest(code, 0x30, 0x60)] == [0x30, 0x40, 0x50, 0x60]
    assert machine_code.loops(code) == []
    with pytest.raises(ValueError, match="no way from 0x50 to 0x20"):
        machine_code.shortest(code, 0x50, 0x20)


def test_a_tile_around_products_and_a_step_of_them() -> None:
    code = listing(
        "MOV R1, RZ",  # 10
        "@!P0 BRA 0x70",  # 20: depth 0
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR1], R2",  # 30: the loop
        "@!P1 BRA 0xa0",  # 40: waits at the end
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR24], R24",  # 50
        "@P2 BRA 0x30",  # 60
        "STS.64 [R4], R2",  # 70
        "@P3 BRA 0x90",  # 80
        "EXIT",  # 90
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR1], R2",  # a0
        "@!P1 BRA 0xa0",  # b0
        "BRA 0x50",  # c0: back, but no loop around the products
    )
    tile, step = machine_code.product_tile(code)
    assert tile == Counts(instructions=5, wavefronts=2, products=0)
    assert step == Counts(instructions=4, wavefronts=0, products=1)


def test_a_store_behind_a_branch_is_on_the_way_where_it_is_said_to_happen() -> None:
    code = listing(
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR24], R24",  # 10: the loop
        "@P2 BRA 0x10",  # 20
        "@P0 BRA 0x50",  # 30
        "UTMASTG.2D [UR8], [UR4]",  # 40
        "FADD R1, R1, R2",  # 50
        "@P0 BRA 0x80",  # 60
        "UTMASTG.2D [UR8], [UR4]",  # 70
        "EXIT",  # 80
    )
    tiles = [machine_code.product_tile(code, stores)[0].instructions for stores in (0, 1, 2)]
    assert tiles == [4, 5, 6]


def test_cycles_of_instructions_over_those_of_products() -> None:
    # 8 warps of 1597 + 206 + 71 · 12 instructions on 4 schedulers; 128 · 128 · 768 products, 2048 of them a cycle
    assert machine_code.issue_to_tensor(1803, 71, 768) == pytest.approx(2 * 2655 / 6144)
    small = machine_code.issue_to_tensor(100, 10, 64, rows=64, columns=64, depth=32, warps=4)
    assert small == pytest.approx(120 / 128)


def test_a_tile_of_attention_is_a_turn_of_the_first_loop_that_multiplies() -> None:
    code = listing(
        "STG.E [R2], RZ",  # 10: a loop without products
        "@P0 BRA 0x10",  # 20
        "LDG.E R2, desc[UR4][R2.64]",  # 30: for every clip
        "LDS R4, [R8]",  # 40: whole tiles
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR24], R24",  # 50
        "FFMA R1, R2, R3, R4",  # 60
        "@P1 BRA 0x40",  # 70
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR24], R24",  # 80: the last tile
        "FSEL R1, R2, R3, P3",  # 90
        "@P2 BRA 0x80",  # a0
        "@P4 BRA 0x30",  # b0
    )
    assert machine_code.attention_tile(code) == Counts(instructions=4, wavefronts=1, products=1)


def test_a_tile_of_rows() -> None:
    code = listing("MOV R1, RZ", "LDG.E.128 R4, desc[UR4][R2.64]", "SHFL.BFLY PT, R3, R2, 0x1, 0x1f", "@P0 BRA 0x20")
    assert machine_code.row_tile(code) == Counts(instructions=3, wavefronts=5, products=0)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("name", FRONT_ENDS)
def test_a_frame_of_log_mel_has_the_instructions_of_its_steps(name: str, arch: int) -> None:
    if cuda_tools.why_no_compiler() is not None:
        pytest.skip(str(cuda_tools.why_no_compiler()))
    spec = FRONT_ENDS[name]
    code = machine_code.parse(offline._cuobjdump(cuda_engine.cubin(spec, torch.float32, False, arch), "-sass"))
    steps = machine_code.log_mel_frame(code, spec)
    found = cuda_engine.layout(spec)
    assert isinstance(found, cuda_engine.Layout)
    frames, rows = found.frames, found.r1 // 2
    # Samples in and out of registers; real numbers of a frame; complex ones out, then in; every power that a mel has.
    bins = cuda_engine.mel_runs(spec, frames)
    first = (spec.win_length + found.r1 * found.r2) / 32
    second = (2 * rows * found.r2 + min(bins.high, spec.n_fft // 2) - bins.low) / 32
    assert 2 * spec.hop_length / 32 < steps["samples"].wavefronts < 6 * spec.hop_length / 32
    assert 0.6 * first < steps["first"].wavefronts < 1.5 * first
    assert 0.9 * second < steps["second"].wavefronts < 1.4 * second
    assert bins.runs[:, 1].sum() * 4 / frames < steps["third"].wavefronts < bins.runs[:, 1].sum() * 8 / frames
    assert all(counts.instructions > counts.wavefronts / 4 and not counts.products for counts in steps.values())
    assert ("means" in steps) == spec.remove_dc and ("range" in steps) == (spec.dynamic_range is not None)


def test_the_page_of_the_cuda_kernel(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    record = (Path(__file__).resolve().parents[2] / "bench" / "records" / "log-mel-cuda.md").read_text(encoding="utf-8")
    for name, arch in itertools.product(log_mel_code.SPECS, offline.ARCHITECTURES):
        assert record.count(f"| {name} | {arch} |") == 2
    if cuda_tools.why_no_compiler() is not None:
        pytest.skip(str(cuda_tools.why_no_compiler()))
    monkeypatch.setattr(log_mel_code, "SPECS", {"whisper-80": FRONT_ENDS["whisper-80"]})
    monkeypatch.setattr("sys.argv", ["log_mel_code"])
    assert log_mel_code.main() == 0
    assert len(capsys.readouterr().out.splitlines()) == len(offline.ARCHITECTURES)
    form, steps, well = next(log_mel_code.rows())
    page = log_mel_code.page([form], [steps])
    assert well and " | ".join(form) in page and " | ".join(steps) in page


def test_places_are_visited_and_branches_that_skip_them_are_not_taken() -> None:
    code = listing("MOV R1, RZ", "@P0 BRA 0x40", "STS.64 [R2], R4", "MOV R3, RZ", "@P1 BRA 0x60", "EXIT", "EXIT")
    way = machine_code._visiting(code, 0x10, 0x50, [0x30])
    assert [line.at for line in way] == [0x20, 0x30, 0x40, 0x50]


def test_counts_add_up() -> None:
    assert Counts(1, 2, 3) + Counts(4, 5, 6) * 2 == Counts(9, 12, 15)
