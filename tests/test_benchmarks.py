"""GenEval and DPG-Bench: their prompts, the folders they expect, and their rules on numbers worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_models import denoiser_task

from snapgen.metrics import dpg, geneval
from snapgen.metrics.benchmarks import DrawConfig
from snapgen.metrics.geneval import Detection, relations, strongest, verdict

pytestmark = pytest.mark.method

# --- drawing for benchmarks ---


@pytest.fixture(scope="module")
def pipe() -> Any:
    task = denoiser_task()
    for module in task.modules.values():
        module.eval()
    return task.pipeline(task.modules)


def lines(path: Path, entries: Sequence[Any]) -> Path:
    path.write_text("\n".join(json.dumps(entry) for entry in entries) + "\n")
    return path


RED_BENCH = {"tag": "colors", "include": [{"class": "bench", "count": 1, "color": "red"}], "prompt": "a red circle"}
TWO_DOGS = {
    "tag": "counting",
    "include": [{"class": "dog", "count": 2}],
    "exclude": [{"class": "dog", "count": 3}],
    "prompt": "two stars",
}
LEFT = {
    "tag": "position",
    "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
    "prompt": "a star left of a circle",
}


def test_geneval_is_drawn_into_its_folders_and_gone_on_with(pipe: Any, tmp_path: Path) -> None:
    prompts = geneval.read_prompts(lines(tmp_path / "evaluation_metadata.jsonl", [RED_BENCH, TWO_DOGS]))
    assert prompts == geneval.read_prompts(tmp_path) == [RED_BENCH, TWO_DOGS]
    config = DrawConfig(steps=1, per_prompt=2, batch_size=3)
    geneval.draw(pipe, prompts, tmp_path / "out", config)
    files = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*"))
    assert files == [
        "00000/metadata.jsonl", "00000/samples/00000.png", "00000/samples/00001.png",
        "00001/metadata.jsonl", "00001/samples/00000.png", "00001/samples/00001.png", "drawn.json",
    ]  # fmt: skip
    assert json.loads((tmp_path / "out/00001/metadata.jsonl").read_text()) == TWO_DOGS
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.png")}
    assert len(set(before.values())) == 4  # each of a noise of its own
    for number, path in enumerate(sorted(before)):
        if number % 2:
            path.unlink()
    times = {path: path.stat().st_mtime_ns for path in before if path.exists()}
    geneval.draw(pipe, prompts, tmp_path / "out", DrawConfig(steps=1, per_prompt=2, batch_size=1))
    for path, mtime in times.items():
        assert path.stat().st_mtime_ns == mtime  # not drawn again
    for path, data in before.items():
        with Image.open(path) as now:
            path.with_suffix(".bin").write_bytes(data)
            with Image.open(path.with_suffix(".bin")) as then:
                # Sums in batches of another size may round another way.
                assert np.abs(np.asarray(now, int) - np.asarray(then, int)).max() <= 1
    with pytest.raises(ValueError, match="steps was 1, now 2"):
        geneval.draw(pipe, prompts, tmp_path / "out", DrawConfig(steps=2, per_prompt=2))


def test_what_is_left_open_is_as_the_checkpoint_draws():
    pipe = SimpleNamespace(config=SimpleNamespace(steps=4, guidance=1.0))
    assert DrawConfig().of(pipe).record() == dict(steps=4, guidance=1.0, per_prompt=4, seed=0)
    assert DrawConfig(steps=7, guidance=2.0).of(pipe).record() == dict(steps=7, guidance=2.0, per_prompt=4, seed=0)


def test_dpg_is_drawn_as_sheets(pipe: Any, tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name, text in (("10", "two stars"), ("2", "a red circle\n"), ("COCOval2014000000001171", "a star")):
        (folder / f"{name}.txt").write_text(text)
    prompts = dpg.read_prompts(folder)
    assert list(prompts.items())[:2] == [("2", "a red circle"), ("10", "two stars")] and len(prompts) == 3
    dpg.draw(pipe, prompts, tmp_path / "out", DrawConfig(steps=1))
    with Image.open(tmp_path / "out/sheets/10.png") as sheet:
        assert sheet.size == (64, 64)
        for number, part in enumerate(dpg.cut(sheet.convert("RGB"), 4)):
            with Image.open(tmp_path / f"out/single/10-{number}.png") as single:
                assert np.array_equal(np.asarray(part), np.asarray(single))
    assert sorted(p.name for p in (tmp_path / "out/sheets").iterdir()) == [
        "10.png",
        "2.png",
        "COCOval2014000000001171.png",
    ]
    with pytest.raises(ValueError, match="a sheet holds 1 or 4"):
        dpg.draw(pipe, prompts, tmp_path / "o", DrawConfig(per_prompt=3))


# --- GenEval's rules ---


def box(left: float, top: float, size: float = 10, confidence: float = 0.95) -> Detection:
    return Detection((left, top, left + size, top + size), confidence)


@pytest.mark.parametrize(
    ("at", "wanted"),
    [
        ((100, 0), {"right of"}),
        ((-100, 0), {"left of"}),
        ((0, -50), {"above"}),
        ((0, 50), {"below"}),
        ((40, 40), {"right of", "below"}),  # what is left over, 38, is 0.67 of the distance on both axes
        ((2, 0), set()),  # within a tenth of both sizes, 2
        ((2.1, 0), set()),  # 0.1 left over of 2.1: too little a share
        ((4.5, 0), {"right of"}),  # 2.5 of 4.5, 0.56
        ((100, 50), {"right of"}),  # down 48 of 111.8: 0.43
        ((0, 0), set()),
    ],
)
def test_positions_by_hand(at: tuple[float, float], wanted: set[str]) -> None:
    assert relations(box(*at).box, box(0, 0).box) == wanted


def no_colors(*_: Any) -> Sequence[str]:
    raise AssertionError("nobody asked for a colour")


def test_verdicts_by_hand() -> None:
    dogs = [box(0, 0), box(50, 0), box(90, 0)]
    assert verdict(TWO_DOGS, {"dog": dogs[:2]}, no_colors) == (True, "")
    assert verdict(TWO_DOGS, {"dog": dogs[:1]}, no_colors) == (False, "1 of 2 dog found")
    assert verdict(TWO_DOGS, {"dog": dogs}, no_colors) == (False, "3 dog found, must be less than 3")
    assert verdict(RED_BENCH, {"bench": dogs}, lambda found, name: ["red"] * len(found)).correct
    # Of three benches the surest alone is asked for its colour.
    asked: list[int] = []
    found = verdict(RED_BENCH, {"bench": dogs}, lambda found, name: asked.append(len(found)) or ["blue"])
    assert found == (False, "bench is blue, not red") and asked == [1]
    assert verdict(LEFT, {"cat": [box(100, 0)], "dog": [box(0, 0)]}, no_colors).correct
    assert (
        verdict(LEFT, {"cat": [box(0, 0)], "dog": [box(100, 0)]}, no_colors).reason == "dog is not left of its target"
    )
    assert verdict(LEFT, {"dog": [box(0, 0)]}, no_colors).reason == "0 of 1 cat found; nothing for dog to be left of"


def test_the_surest_count() -> None:
    found = [box(n, 0, confidence=n / 100) for n in range(100)]
    kept = strongest(found, 0.3)
    assert [round(d.confidence, 2) for d in kept] == [round(0.99 - n / 100, 2) for n in range(16)]
    assert strongest(found[:31], 0.3) == [] and strongest(found[:32], 0.3) == [found[31]]


class Seeing:
    """A detector of plain pictures: a red one shows a red bench, a green one two dogs, all else nothing."""

    def detect(self, picture: Image.Image) -> dict[str, list[Detection]]:
        colour = picture.getpixel((0, 0))
        if colour == (255, 0, 0):
            return {"bench": [box(0, 0, confidence=0.5)]}
        return {"dog": [box(0, 0), box(50, 0), box(9, 9, confidence=0.8)]} if colour == (0, 255, 0) else {}

    def colors(self, picture: Image.Image, found: Sequence[Detection], name: str) -> list[str]:
        return ["red"] * len(found)


def test_geneval_scores_by_hand(tmp_path: Path) -> None:
    drawn = {
        0: (RED_BENCH, ["red", "red", "blue"]),
        1: (TWO_DOGS, ["green", "red", "red", "red"]),
        2: (TWO_DOGS, ["blue"]),
    }
    for number, (entry, colours) in drawn.items():
        samples = tmp_path / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(entry))
        for n, colour in enumerate(colours):
            Image.new("RGB", (4, 4), {"green": (0, 255, 0)}.get(colour, colour)).save(samples / f"{n:05}.png")
    found = geneval.score(tmp_path, Seeing())
    # Counting takes what is surer than 0.9 alone, so the third dog does not count.
    assert found["tags"] == {"colors": pytest.approx(2 / 3), "counting": pytest.approx(1 / 5)}
    assert found["overall"] == pytest.approx((2 / 3 + 1 / 5) / 2)
    assert (found["pictures"], found["prompts"], found["prompts_with_one"]) == (8, 3, pytest.approx(2 / 3))
    assert found["wrong"]["00000/samples/00002.png"] == "0 of 1 bench found" and len(found["wrong"]) == 5
    with pytest.raises(ValueError, match="holds none in GenEval's folders"):
        geneval.score(tmp_path / "none", Seeing())


def test_geneval_prompts_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; it is part of GenEval"):
        geneval.read_prompts(tmp_path)
    wrong: list[Any] = [{"tag": "x"}, ["list"], {**RED_BENCH, "include": [{"class": 3, "count": 1}]}]
    wrong += [{**LEFT, "include": [{"class": "a", "count": 1, "position": ["beside", 0]}]}]
    for entry in wrong:
        with pytest.raises(ValueError, match=r"m\.jsonl:2: no metadata of a prompt"):
            geneval.read_prompts(lines(tmp_path / "m.jsonl", [RED_BENCH, entry]))
    with pytest.raises(ValueError, match="holds none"):
        geneval.read_prompts(lines(tmp_path / "m.jsonl", []))


# --- DPG-Bench's scores ---

HEADER = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language\n"
)


def test_dpg_scores_by_hand(tmp_path: Path) -> None:
    (tmp_path / "dpg.csv").write_text(
        HEADER
        + 'one,t,k,1,0,entity,whole,x,"Is there a dog, or a wolf?"\n'
        + "one,t,k,2,1,attribute,color,x,Is it red?\n"
        + 'one,t,k,3,"1,2",relation,spatial,x,Is it left?\n'
        + "two,t,k,1,0,global,,x,Is it dark?\n"
        + "three,t,k,1,0,entity,whole,x,Is it there?\n"
    )
    questions = dpg.read_questions(tmp_path / "dpg.csv")
    assert [q.needs for q in questions["one"]] == [(), (1,), (1, 2)]
    assert questions["one"][0].text == "Is there a dog, or a wolf?"
    # Shares: all yes; 2 no, so 3 fails with it; 1 no, so all fail.
    one = questions["one"]
    assert dpg.share(one, {1: True, 2: True, 3: True}) == 1
    assert dpg.share(one, {1: True, 2: False, 3: True}) == pytest.approx(1 / 3)
    assert dpg.share(one, {1: False, 2: True, 3: True}) == 0

    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)]
    sheets = tmp_path / "sheets"
    sheets.mkdir()
    dpg.sheet([Image.new("RGB", (6, 4), colour) for colour in colours]).save(sheets / "one.png")
    dpg.sheet([Image.new("RGB", (6, 4), (9, 9, 9))] * 4).save(sheets / "two.png")

    class Answering:
        def answer(self, picture: Image.Image, question: str) -> str:
            assert picture.size == (6, 4)
            red, _, blue = picture.getpixel((0, 0))
            if question == "Is it red?":
                return "yes" if red == 255 else "no, it is not"
            return "no" if blue == 255 and question.startswith("Is there") else "yes"

    found = dpg.score(sheets, questions, Answering())
    # Of "one": red 1; green 1/3; blue, no dog: 0; grey 1/3. Of "two": 1. "three" has no picture.
    assert found["overall"] == pytest.approx(100 * ((1 + 1 / 3 + 0 + 1 / 3) / 4 + 1) / 2)
    assert found["categories"] == {"attribute": 25, "entity": 75, "global": 100, "relation": 100}
    assert found["prompts"] == 2 and found["without_picture"] == ["three"]
    with pytest.raises(ValueError, match="holds none of the prompts'"):
        dpg.score(tmp_path, questions, Answering())
    with pytest.raises(ValueError, match="pictures: got 2"):
        dpg.score(sheets, questions, Answering(), pictures=2)


def test_dpg_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder; it is part of ELLA"):
        dpg.read_prompts(tmp_path / "none")
    with pytest.raises(ValueError, match=r"holds no \.txt file"):
        dpg.read_prompts(tmp_path)
    (tmp_path / "1.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"1\.txt is no text"):
        dpg.read_prompts(tmp_path)
    (tmp_path / "1.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"1\.txt is empty"):
        dpg.read_prompts(tmp_path)
    with pytest.raises(ValueError, match="does not exist; it is part of ELLA"):
        dpg.read_questions(tmp_path / "none.csv")
    (tmp_path / "q.csv").write_text("item_id,text\n")
    with pytest.raises(ValueError, match="has no column proposition_id"):
        dpg.read_questions(tmp_path / "q.csv")
    (tmp_path / "q.csv").write_text(HEADER + "one,t,k,first,0,entity,whole,x,Is it?\n")
    with pytest.raises(ValueError, match=r"q\.csv:2: no question"):
        dpg.read_questions(tmp_path / "q.csv")
