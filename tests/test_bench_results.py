"""What the benchmark leaves behind: rows, tables, pictures, and goals."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from bench import goals, machine, plot, tables
from bench.results import COLUMNS, Row, append, compare, read
from tests.bench_runs import row


def test_rows_survive_the_file(tmp_path: Path) -> None:
    rows = [row(), row(provider="eager, with a comma", p50_ms=1.2345678)]
    append(tmp_path / "a" / "rows.csv", rows)
    assert read(tmp_path / "a" / "rows.csv") == [rows[0], replace(rows[1], p50_ms=1.23457)]


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.csv"
    append(out, [row()])
    before = out.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left on the disk while writing"):
        append(out, [row()])
    assert out.read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    other.write_text("op,speed\nresblock,1\n")
    with pytest.raises(ValueError, match=r"other\.csv: its columns differ .*speed.* move it away"):
        append(other, [row()])
    with pytest.raises(ValueError, match=r"other\.csv, line 2: no value for case"):
        read(other)
    torn = tmp_path / "torn.csv"
    append(torn, [row()])
    torn.write_text(torn.read_text().replace(",5,", ",five,"))
    with pytest.raises(ValueError, match=r"torn\.csv, line 2: .*five"):
        read(torn)


def test_only_the_latest_run_is_compared() -> None:
    old, new = "2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00"
    rows = [
        row(date=old, p50_ms=9.0), row(date=old, provider="compile", p50_ms=0.1),
        row(date=new, p50_ms=2.0), row(date=new, provider="eager", p50_ms=5.0),
        row(date=new, provider="eager-nchw", p50_ms=3.0), row(date=new, malloc="stock", provider="eager", p50_ms=8.0),
    ]  # fmt: skip
    tuned, stock = compare(rows)
    assert tuned.speedup == pytest.approx(1.5)
    assert tuned.best_peer is not None and tuned.best_peer.provider == "eager-nchw"
    assert stock.fused is None and stock.speedup is None


def test_tables_are_rewritten_between_the_markers_and_then_up_to_date(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(f"# Title\n\n{tables.BEGIN}\nold\n{tables.END}\n\nmore\n")
    here = (str(readme), "--results", str(results))
    assert tables.main(here) == 0
    assert "No rows are recorded yet" in readme.read_text()
    rows = [row(), row(provider="eager", p50_ms=3.0), row(mode="bwd", p50_ms=0.5), row(mode="fwd+bwd", p50_ms=77.7)]
    append(results / "machine.csv", rows)
    assert tables.main((*here, "--check")) == 1
    assert "not up to date" in capsys.readouterr().err
    assert "No rows" in readme.read_text(), "--check writes nothing"
    assert tables.main(here) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n") and text.endswith("\nmore\n")
    assert "| op | case | dtype | mode | fused | eager | gain | GEMM | floor |" in text
    assert "| `resblock` | 256ch-128 | fp32 | fwd | **2.00** | 3.00 | 1.50x | 26% | 50% |" in text
    assert "| `resblock` | 256ch-128 | fp32 | bwd | **0.500** |  |  | 105% | 200% |" in text
    assert "77.7" not in text
    assert tables.main((*here, "--check")) == 0
    assert tables.main(here) == 0
    assert readme.read_text() == text


def test_whole_models_have_a_table_and_a_stock_malloc_a_column() -> None:
    model = dict(op="decoder", case="512px")
    rows = [
        row(**model, p50_ms=2.0, peak_bytes=100), row(**model, provider="eager", p50_ms=3.0, peak_bytes=400),
        row(**model, malloc="stock", p50_ms=4.0), row(**model, malloc="stock", provider="eager", p50_ms=20.0),
        row(),
    ]  # fmt: skip
    text = tables.tables(rows)
    assert "| model | case | dtype | mode | fused | eager | gain | stock | GEMM | floor | memory |" in text
    assert "| `decoder` | 512px | fp32 | fwd | **2.00** | 3.00 | 1.50x | 5.00x | 26% | 50% | 0.25x |" in text
    assert "| op | case | dtype | mode | fused | gain | GEMM | floor |" in text
    assert "malloc stock" not in text, "one machine, one table of each kind"
    assert "malloc stock" in tables.tables(rows[2:4])


def test_tables_need_their_markers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    assert tables.main((str(readme), "--results", str(tmp_path))) == 2
    for text in ("nothing", f"{tables.END}\n{tables.BEGIN}", f"{tables.BEGIN}\n{tables.BEGIN}\n{tables.END}"):
        readme.write_text(text)
        assert tables.main((str(readme), "--results", str(tmp_path))) == 2
        assert "needs the line" in capsys.readouterr().err
        assert readme.read_text() == text


def test_pictures_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "machine.csv"
    append(file, [row(dtype=d, mode=m, provider=p, p50_ms=1.0 + len(p)) for d in ("fp32", "bf16")
                  for m in ("fwd", "bwd", "fwd+bwd") for p in ("fused", "eager")])  # fmt: skip
    assert plot.main([str(file)]) == 0
    drawn = {path.name: path for path in tmp_path.iterdir() if path != file}
    names = {f"machine-tuned-2-{n}.{s}" for n in ("speedup", "roofline") for s in ("svg", "png")}
    assert set(drawn) == names
    speedup = drawn["machine-tuned-2-speedup.svg"].read_bytes()
    with Image.open(drawn["machine-tuned-2-roofline.png"]) as picture:
        assert len(picture.convert("RGB").resize((200, 150)).getcolors(200 * 150)) > 20
    assert plot.main([str(file), "--folder", str(tmp_path / "docs")]) == 0
    assert {path.name for path in (tmp_path / "docs").iterdir()} == names
    assert plot.main([str(file)]) == 0
    assert drawn["machine-tuned-2-speedup.svg"].read_bytes() == speedup, "the same rows give the same file"


def test_columns_name_everything_the_design_asks_for() -> None:
    asked = "op case provider mode dtype p20_ms p50_ms p80_ms bytes flops floor_ms device threads malloc torch triton "
    assert set((asked + "python snapgen commit date").split()) <= set(COLUMNS)


def test_the_file_is_named_after_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_processor", lambda: "AMD EPYC (TM) 9B14")
    name = machine.results_file("cpu").name
    assert name.startswith("amd-epyc-tm-9b14-") and name.endswith(".csv")
    assert set(name.removesuffix(".csv")) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def _measured(provider: str, ms: float, peak: int, **other: object) -> Row:
    return row(**{**dict(op="decoder", case="1024px", provider=provider, p50_ms=ms, peak_bytes=peak), **other})


def test_goals_are_judged_by_the_latest_rows() -> None:
    full = 4 * 128 * 1024 * 1024
    rows = [
        _measured("fused", 100.0, full, flops=8e9, gemm_gflops=100.0),  # 80 of 100 GFLOP/s
        _measured("fused-low", 140.0, int(1.25 * full)),
        _measured("eager", 150.0, 4 * full),
        _measured("openvino", 130.0, -1),
        _measured("fused", 100.0, full, malloc="stock"),
        _measured("eager", 400.0, full, malloc="stock"),
    ]
    text = goals.table(rows)
    for line in (
        "| 75% of the matrix product's rate | **80% of the matrix product's rate** | reached |",
        "| 1.40x the best peer | 1.30x the best of eager, openvino | missed |",
        "| at most 0.33x eager's peak memory | **0.25x eager's peak memory** | reached |",
        "| at most low memory: 1.30 full-size images | **1.25 full-size images** | reached |",
        "| at most low memory: 1.35x the time | 1.40x the time | missed |",
        "| 5.00x eager, malloc as it comes | 4.00x eager, malloc as it comes | missed |",
    ):
        assert line in text
    assert "No rows" in goals.table([])
