"""The scaling model: its traffic is what processes really send, its page is the one in docs, its sums add up."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench import scale_model
from bench.machines import H100, H200, MACHINES, Machine
from bench.scale_model import Cluster, Model, encoder_seconds, loss_collectives, predict, wire_bytes

ROOT = Path(__file__).resolve().parents[2]
MODEL = Model(parameters=594_000_000, dim=768, itemsize=2, chunk=64, clip_gb=0.4, clip_bytes=320_000)
CLUSTER = Cluster(H200, clip_ms=3.0)


ROWS, DIM, PARAMETERS = 24, 20, 1000


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what 2 and 4 gloo processes handed to torch.distributed."""
    folder = tmp_path_factory.mktemp("counts")
    command = [sys.executable, str(ROOT / "tests/bench/collective_ranks.py"), str(folder)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *map(str, (ROWS, DIM, PARAMETERS))], check=True, env=environment, timeout=300)
    return folder


@pytest.mark.parametrize("world", [2, 4])
def test_traffic_is_what_processes_send(world: int, counted: Path) -> None:
    counts = json.loads((counted / f"{world}.json").read_text())

    def predicted(collectives: list[scale_model.Collective]) -> list[tuple[str, int]]:
        return sorted((c.kind, c.nbytes) for c in collectives)

    for engine in ("torch", "triton"):
        for ids in (True, False):
            calls = counts[f"{engine} {'with' if ids else 'without'} ids"]
            default, agreed = (sorted(map(tuple, call)) for call in calls)
            assert default == predicted(loss_collectives(ROWS, DIM, world, 4, engine, ids)), (engine, ids)
            assert agreed == predicted(loss_collectives(ROWS, DIM, world, 4, engine, ids, agreed=True)), (engine, ids)
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
    with pytest.raises(SystemExit):
        scale_model.parser().parse_args(["--machine", "A100"])
    other = scale_model.report(scale_model.parser().parse_args(["--machine", "H100"]))
    assert "python -m bench.scale_model --machine H100`" in other and "Rates of one H100" in other


def test_one_gpu_sends_nothing_and_more_share_the_work() -> None:
    alone = predict(MODEL, CLUSTER, 65536, 1)
    assert alone.sent == {"loss": 0.0, "gradients": 0.0}
    assert alone.seconds["loss, links"] == alone.seconds["gradients, links"] == 0.0
    many = predict(MODEL, CLUSTER, 65536, 64)
    repeated = {chunks: 1 + (1 - 1 / chunks) / 3 for chunks in (16, 1024)}  # all forward passes but one chunk's
    share = alone.seconds["encoders"] / 64 * repeated[16] / repeated[1024]
    assert many.seconds["encoders"] == pytest.approx(share)
    assert many.seconds["loss"] <= alone.seconds["loss"] / 64 * 1.001
    # 2·N²·D a pass at the given rate: 3 passes while the exponentials take up to 256 MiB, 4 beyond
    assert alone.seconds["loss"] == pytest.approx(4 * 2 * 65536**2 * 768 / (0.71 * 790e12))
    small = predict(MODEL, CLUSTER, 8192, 1)
    assert small.seconds["loss"] == pytest.approx(3 * 2 * 8192**2 * 768 / (0.71 * 790e12))
    assert many.step == pytest.approx(sum(many.seconds.values()))


def test_gradients_hide_behind_the_backward_pass_only_as_far_as_it_lasts() -> None:
    few, enough = predict(MODEL, CLUSTER, 8 * 64, 64), predict(MODEL, CLUSTER, 64 * 64, 64)
    reduced = wire_bytes("all-reduce", 4 * MODEL.parameters, 64) / (0.8 * 50e9)
    assert few.seconds["gradients, links"] == pytest.approx(reduced - 2 / 3 * 8 * 3e-3, rel=0.01)
    assert enough.seconds["gradients, links"] == 0.0


def test_few_clips_take_as_long_as_the_host_launches_their_kernels() -> None:
    launches = 5e-6 * (1047 + 1505)
    assert encoder_seconds(MODEL, CLUSTER, 2) == pytest.approx((2 * 3e-3, launches))
    assert encoder_seconds(MODEL, CLUSTER, 4 * 64)[1] == pytest.approx(4 * launches + 3 * 5e-6 * 1047)
    few, many = predict(MODEL, CLUSTER, 2 * 64, 64), predict(MODEL, CLUSTER, 8 * 64, 64)
    assert few.seconds["encoders"] == pytest.approx(launches)
    assert many.seconds["encoders"] == pytest.approx(8 * 3e-3)
    assert scale_model._host_bound(MODEL, CLUSTER) == 4, "12 ms on the device, 12.76 on the host; 15 for 5 clips"
    slow = replace(CLUSTER, launch_us=50.0)
    assert predict(MODEL, slow, 2 * 64, 64).seconds["optimizer"] == pytest.approx(max(28 * 594e6 / 4.3e12, 30 * 50e-6))
    # the host's time, too, hides gradients
    reduced = wire_bytes("all-reduce", 4 * MODEL.parameters, 64) / (0.8 * 50e9)
    waiting = predict(MODEL, slow, 2 * 64, 64).seconds["gradients, links"]
    assert waiting == pytest.approx(reduced - 50e-6 * 1505, rel=0.01)


def test_activations_are_those_of_a_chunk() -> None:
    for local, held in ((8, 8 * 0.4e9), (64, 64 * 0.4e9), (256, 64 * 0.4e9)):
        assert predict(MODEL, CLUSTER, local * 8, 8).held["activations"] == pytest.approx(held)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_a_cluster_has_its_machines_rates(machine: Machine) -> None:
    cluster = scale_model.cluster_from(None, 1.2e12, machine, {"launch_us": 7.0})
    assert cluster.clip_ms == pytest.approx(1.2e15 / (0.5e12 * machine.tflops)) and cluster.launch_us == 7.0
    found = predict(MODEL, cluster, 65536, 8)
    assert found.seconds["loss"] == pytest.approx(4 * 2 * 65536**2 * 768 / 8 / (0.71e12 * machine.tflops))
    assert found.seconds["optimizer"] == pytest.approx(28 * 594e6 / (1e12 * machine.tbytes))


def test_the_largest_batch_is_the_last_that_fits() -> None:
    limits = [scale_model._limit(MODEL, Cluster(machine, clip_ms=3.0), 1024) for machine in (H100, H200)]
    for machine, rows in zip((H100, H200), limits, strict=True):
        held = [sum(predict(MODEL, Cluster(machine, clip_ms=3.0), n, 1024).held.values()) for n in (rows, rows + 65536)]
        assert held[0] <= 1e9 * machine.gbytes < held[1]
    assert 0 < limits[0] < limits[1]


def test_the_chunk_is_the_engines() -> None:
    engine = pytest.importorskip("fastclap.kernels.contrastive.triton_engine")
    operands = importlib.import_module("fastclap.kernels.contrastive.triton_operands")
    for dim in (512, 768, 1024):
        for row_bytes in (0, 1 << 20, 1 << 24, 1 << 40):
            assert scale_model.chunk_rows(132, dim, row_bytes) == operands.chunk_rows(90, 132, dim, row_bytes)
    assert scale_model.KEPT_BYTES == engine.KEPT_BYTES


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
    cluster = scale_model.cluster_from(tmp_path, 1.2e12, H100, {})
    assert cluster.clip_ms == pytest.approx(4.0) and cluster.second_forward == pytest.approx(1.25)
    assert "250 clips/s (batch of 64, some GPU)" in cluster.source["a clip"]
    assert cluster.source["the loss"].startswith("PREDICTION")
    assert cluster.loss_tflops == Cluster(H100, clip_ms=1.0).loss_tflops
    write(
        "loss",
        [
            row(4 * one_pass_ms, **loss, form="fastclap Triton"),
            row(2 * one_pass_ms, **loss, form="open_clip"),
            row(2 * one_pass_ms, stage="whole step", **loss),
        ],
    )
    cluster = scale_model.cluster_from(tmp_path, 1.2e12, H100, {})
    assert cluster.loss_tflops == pytest.approx(500.0)
    assert not any(text.startswith("PREDICTION") for text in cluster.source.values())
    write("step", [row(3200.0, form="reference, as released", rows=32)])
    write("loss", [])
    with pytest.raises(SystemExit, match="--lots step loss"):
        scale_model.cluster_from(tmp_path, 1.2e12, H100, {})


def test_the_page_names_the_records(tmp_path: Path) -> None:
    rows = [{"case": {"form": "fastclap", "rows": 64}, "median_ms": 256.0}]
    (tmp_path / "step.json").write_text(json.dumps({"lot": "step", "device": "some GPU", "rows": rows}))
    printed = scale_model.report(scale_model.parser().parse_args(["--records", str(tmp_path)]))
    assert f"python -m bench.scale_model --records {tmp_path}" in printed and "some GPU" in printed
    assert "H200" in printed and "H100" not in printed, "a measured machine beside a predicted one"
