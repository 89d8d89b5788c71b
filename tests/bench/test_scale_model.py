"""The scaling model: its traffic is what processes really send, its page is the one in docs, its sums add up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import scale_model
from bench.scale_model import Machine, Model, loss_collectives, predict, wire_bytes

ROOT = Path(__file__).resolve().parents[2]
MODEL = Model(parameters=594_000_000, dim=768, itemsize=2, chunk=64, chunk_gb=60.0, clip_bytes=320_000)
MACHINE = Machine(clip_ms=3.0)


ROWS, DIM, PARAMETERS = 24, 20, 1000


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what 2 and 4 gloo processes handed to torch.distributed."""
    folder = tmp_path_factory.mktemp("counts")
    command = [sys.executable, str(ROOT / "tests/bench/collective_ranks.py"), str(folder)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *map(str, (ROWS, DIM, PARAMETERS))], check=True, env=environment, timeout=300)
    return folder


@pytest.mark.parametrize("world", [2, 4])
def test_traffic_is_what_processes_send(world: int, counted: Path) -> None:
    counts = json.loads((counted / f"{world}.json").read_text())

    def predicted(collectives: list[scale_model.Collective]) -> list[tuple[str, int]]:
        return sorted((c.kind, c.nbytes) for c in collectives)

    for engine in ("torch", "triton"):
        for ids in (True, False):
            seen = sorted(map(tuple, counts[f"{engine} {'with' if ids else 'without'} ids"]))
            assert seen == predicted(loss_collectives(ROWS, DIM, world, 4, engine, ids)), (engine, ids)
    assert {kind for kind, _ in counts["gradients"]} == {"all-reduce"}
    sent = sum(nbytes for _, nbytes in counts["gradients"])
    assert sent == sum(c.nbytes for c in scale_model.gradient_collectives(PARAMETERS))


def test_bytes_on_a_ring() -> None:
    assert wire_bytes("all-gather", 800, 8) == wire_bytes("reduce-scatter", 800, 8) == 700
    assert wire_bytes("all-reduce", 800, 8) == 1400
    assert wire_bytes("all-reduce", 800, 1) == 0


def test_the_page_in_docs_is_what_the_command_prints() -> None:
    printed = scale_model.report(scale_model.parser().parse_args([]))
    assert (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8") == printed, (
        "run python -m bench.scale_model > docs/scaling.md"
    )
    assert "PREDICTION" in printed and "not measured" in printed


def test_one_gpu_sends_nothing_and_more_share_the_work() -> None:
    alone = predict(MODEL, MACHINE, 65536, 1)
    assert alone.sent == {"loss": 0.0, "gradients": 0.0}
    assert alone.seconds["loss, links"] == alone.seconds["gradients, links"] == 0.0
    many = predict(MODEL, MACHINE, 65536, 64)
    repeated = {chunks: 1 + (1 - 1 / chunks) / 3 for chunks in (16, 1024)}  # all forward passes but one chunk's
    share = alone.seconds["encoders"] / 64 * repeated[16] / repeated[1024]
    assert many.seconds["encoders"] == pytest.approx(share)
    assert many.seconds["loss"] <= alone.seconds["loss"] / 64 * 1.001
    # 2·N²·D a pass at the given rate: 3 passes while 2·N² bytes fit, 4 beyond
    assert alone.seconds["loss"] == pytest.approx(3 * 2 * 65536**2 * 768 / (0.71 * 790e12))
    large = predict(MODEL, MACHINE, 524288, 1)
    assert large.seconds["loss"] == pytest.approx(4 * 2 * 524288**2 * 768 / (0.71 * 790e12))
    assert many.step == pytest.approx(sum(many.seconds.values()))


def test_gradients_hide_behind_the_backward_pass_only_as_far_as_it_lasts() -> None:
    few, enough = predict(MODEL, MACHINE, 2 * 64, 64), predict(MODEL, MACHINE, 64 * 64, 64)
    reduced = wire_bytes("all-reduce", 4 * MODEL.parameters, 64) / (0.8 * 50e9)
    assert few.seconds["gradients, links"] == pytest.approx(reduced - 2 / 3 * 2 * 3e-3, rel=0.01)
    assert enough.seconds["gradients, links"] == 0.0


def test_the_chunk_is_the_engines() -> None:
    engine = pytest.importorskip("fastclap.kernels.contrastive.triton_engine")
    for dim in (512, 768, 1024):
        for row_bytes in (0, 1 << 20, 1 << 24, 1 << 40):
            assert scale_model.chunk_rows(132, dim, row_bytes) == engine.chunk_rows(90, 132, dim, row_bytes)


def test_records_replace_predictions(tmp_path: Path) -> None:
    def write(lot: str, rows: list[dict[str, object]]) -> None:
        (tmp_path / f"{lot}.json").write_text(json.dumps({"lot": lot, "device": "some GPU", "rows": rows}))

    def row(median_ms: float, **case: object) -> dict[str, object]:
        return {"case": case, "median_ms": median_ms}

    loss = {"loss": "info_nce", "rows": 65536, "dim": 768}
    one_pass_ms = 2e3 * 65536**2 * 768 / 500e12
    write(
        "step",
        [
            row(3200.0, form="reference, as released", rows=32),
            row(160.0, form="fastclap", rows=32),
            row(256.0, form="fastclap", rows=64),
            row(1280.0, form="fastclap, gradient cache", rows=256),
            {"case": {"form": "fastclap", "rows": 128}, "reason": "out of memory"},
        ],
    )
    machine = scale_model.machine_from(tmp_path, 1.2e12, {})
    assert machine.clip_ms == pytest.approx(4.0) and machine.second_forward == pytest.approx(1.25)
    assert "250 clips/s (batch of 64, some GPU)" in machine.source["a clip"]
    assert machine.source["the loss"].startswith("PREDICTION")
    assert machine.loss_tflops == Machine(clip_ms=1.0).loss_tflops
    write(
        "loss",
        [
            row(4 * one_pass_ms, **loss, form="fastclap Triton"),
            row(2 * one_pass_ms, **loss, form="open_clip"),
            row(2 * one_pass_ms, stage="whole step", **loss),
        ],
    )
    machine = scale_model.machine_from(tmp_path, 1.2e12, {})
    assert machine.loss_tflops == pytest.approx(500.0)
    assert not any(text.startswith("PREDICTION") for text in machine.source.values())
    write("step", [row(3200.0, form="reference, as released", rows=32)])
    write("loss", [])
    with pytest.raises(SystemExit, match="--lots step loss"):
        scale_model.machine_from(tmp_path, 1.2e12, {})


def test_the_page_names_the_records(tmp_path: Path) -> None:
    rows = [{"case": {"form": "fastclap", "rows": 64}, "median_ms": 256.0}]
    (tmp_path / "step.json").write_text(json.dumps({"lot": "step", "device": "some GPU", "rows": rows}))
    printed = scale_model.report(scale_model.parser().parse_args(["--records", str(tmp_path)]))
    assert f"python -m bench.scale_model --records {tmp_path}" in printed and "some GPU" in printed
