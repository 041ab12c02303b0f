"""GenEval: whether pictures show the objects, numbers, colours and positions of a prompt (Ghosh et al. 2023).

Prompts are its `evaluation_metadata.jsonl`, a line each, such as {"tag": "colors", "include": [{"class": "bench",
"count": 1, "color": "red"}], "prompt": "a photo of a red bench"}. Pictures are drawn into the folders that it expects:

    00000/metadata.jsonl        the prompt's line
    00000/samples/00000.png     the pictures, 4 for each prompt

So its own program can judge them. Or a :class:`Detector` is handed in, whatever it rests on, and they are judged here
by the benchmark's rules: what it does after detection, and nothing of the detection, is part of this file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image
from rich.console import Console
from rich.progress import track

from snapgen import io
from snapgen.metrics.benchmarks import DrawConfig, claim, draw_files, mean

PROMPTS = "evaluation_metadata.jsonl"
# The benchmark's own settings.
CONFIDENCE, COUNTING_CONFIDENCE = 0.3, 0.9  # below which a detection does not count; where objects are counted
MOST = 16  # detections of a class
POSITION_MARGIN = 0.1  # of both objects' sizes, by which their centres must be apart to stand beside each other
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


class Detection(NamedTuple):
    """An object found in a picture."""

    box: tuple[float, float, float, float]  # left, top, right, bottom, pixels
    confidence: float  # in [0, 1]


class Detector(Protocol):
    """What GenEval needs to see: the benchmark takes Mask2Former (Swin-S, trained on COCO) and CLIP ViT-L/14."""

    def detect(self, picture: Image.Image) -> Mapping[str, Sequence[Detection]]:
        """The objects in a picture, by COCO's class names ("potted plant"), in any order and of any confidence."""
        ...

    def colors(self, picture: Image.Image, found: Sequence[Detection], name: str) -> Sequence[str]:
        """The colour, one of `COLORS`, of each of some objects of class `name`."""
        ...


class Verdict(NamedTuple):
    """Whether a picture shows what its prompt says, and if not, why."""

    correct: bool
    reason: str


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The prompts of a metadata file, or of a folder that holds it.

    Raises:
        ValueError: it does not exist, or a line is not as it must be; names the line.
    """
    file = path / PROMPTS if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"prompts: {file} does not exist; it is part of GenEval (prompts/{PROMPTS})")
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                found.append(_checked(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}:{number}: no metadata of a prompt ({error})") from error
    if not found:
        raise ValueError(f"prompts: {file} holds none")
    return found


def _checked(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not isinstance(entry.get("tag"), str):
        raise ValueError('must be an object with "prompt" and "tag"')
    for clause in (*entry.get("include", ()), *entry.get("exclude", ())):
        if not isinstance(clause["class"], str) or not isinstance(clause["count"], int):
            raise ValueError('"class" must be a text and "count" a number')
        if "position" in clause:
            relation, target = clause["position"]
            if relation not in ("left of", "right of", "above", "below") or not isinstance(target, int):
                raise ValueError(f'"position" must be a relation and a number, not {clause["position"]}')
    return entry


def draw(
    pipe: Any, prompts: Sequence[Mapping[str, Any]], out: Path, config: DrawConfig, console: Console | None = None
) -> None:
    """Draw the benchmark's pictures into its folders; goes on where it was stopped.

    Raises:
        ValueError: `out` holds pictures that were drawn in another way.
    """
    config = config.of(pipe)
    claim(out, {"benchmark": "GenEval", "prompts": len(prompts), **config.record()})
    wanted = []
    for number, entry in enumerate(prompts):
        folder = out / f"{number:05d}"
        io.write_text(folder / "metadata.jsonl", json.dumps(entry))
        for sample in range(config.per_prompt):
            noise = number * config.per_prompt + sample
            wanted.append((noise, entry["prompt"], folder / "samples" / f"{sample:05d}.png"))
    draw_files(pipe, wanted, config, console)


def score(folder: Path, detector: Detector, console: Console | None = None) -> dict[str, Any]:
    """Judge the pictures in a folder of :func:`draw`.

    Returns:
        overall: mean over the tags of the share of pictures that are right. tags: that share for each.
        pictures, prompts: how many; prompts_with_one: share of prompts of which one picture at least is right.
        wrong: for each picture that is not, why.

    Raises:
        ValueError: the folder holds no pictures.
    """
    folders = sorted(p for p in folder.glob("*") if p.is_dir() and p.name.isdigit()) if folder.is_dir() else []
    by_tag: dict[str, list[bool]] = {}
    by_prompt: list[bool] = []
    wrong: dict[str, str] = {}
    for home in track(folders, "judging", console=console, disable=console is None):
        entry = _checked(io.read_json(home / "metadata.jsonl"))
        right = []
        for path in sorted((home / "samples").glob("*.png")):
            with Image.open(path) as picture:
                verdict = judge(picture.convert("RGB"), entry, detector)
            right.append(verdict.correct)
            if not verdict.correct:
                wrong[str(path.relative_to(folder))] = verdict.reason
        by_tag.setdefault(entry["tag"], []).extend(right)
        if right:
            by_prompt.append(any(right))
    tags = {tag: mean(right) for tag, right in by_tag.items() if right}
    if not tags:
        raise ValueError(f"pictures: {folder} holds none in GenEval's folders (00000/samples/00000.png)")
    return {
        "overall": mean(tags.values()),
        "tags": tags,
        "pictures": sum(map(len, by_tag.values())),
        "prompts": len(by_prompt),
        "prompts_with_one": mean(by_prompt),
        "wrong": wrong,
    }


def judge(picture: Image.Image, entry: Mapping[str, Any], detector: Detector) -> Verdict:
    """Whether a picture shows what the metadata `entry` says, by the benchmark's rules."""
    least = COUNTING_CONFIDENCE if entry["tag"] == "counting" else CONFIDENCE
    found = {name: strongest(objects, least) for name, objects in detector.detect(picture).items()}
    return verdict(entry, found, lambda objects, name: detector.colors(picture, objects, name))


def strongest(objects: Sequence[Detection], least: float) -> list[Detection]:
    """Up to 16 detections above a confidence, the surest first."""
    return sorted((o for o in objects if o.confidence > least), key=lambda o: -o.confidence)[:MOST]


def verdict(
    entry: Mapping[str, Any],
    found: Mapping[str, Sequence[Detection]],
    colors: Callable[[Sequence[Detection], str], Sequence[str]],
) -> Verdict:
    """The benchmark's rules on what was found, the surest first.

    Each clause of "include" needs `count` objects at least of its class; of the surest `count`, all must have its
    colour, and each must stand in its relation to each of those of the clause it names. A class of "exclude" may have
    less than `count` objects.
    """
    reasons: list[str] = []
    matched: list[Sequence[Detection] | None] = []
    for clause in entry.get("include", ()):
        name, count = clause["class"], clause["count"]
        chosen = found.get(name, ())[:count]
        reason = ""
        if len(chosen) < count:
            reason = f"{len(chosen)} of {count} {name} found"
        elif "color" in clause and (seen := list(colors(chosen, name))).count(clause["color"]) < count:
            reason = f"{name} is {' and '.join(seen)}, not {clause['color']}"
        elif "position" in clause:
            relation, target = clause["position"]
            others = matched[target]
            if others is None:
                reason = f"nothing for {name} to be {relation}"
            elif not all(relation in relations(one.box, other.box) for one in chosen for other in others):
                reason = f"{name} is not {relation} its target"
        reasons += [reason] if reason else []
        matched.append(None if reason else chosen)
    for clause in entry.get("exclude", ()):
        name, count = clause["class"], clause["count"]
        if len(found.get(name, ())) >= count:
            reasons.append(f"{len(found[name])} {name} found, must be less than {count}")
    return Verdict(not reasons, "; ".join(reasons))


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """How a box stands to another: of "left of", "right of", "above", "below" none, one or two.

    The distance d of the centres is first made smaller, along each axis, by a tenth of both boxes' sizes there; what is
    left over must be more than half of |d|.
    """
    kept, apart = [], []
    for axis in (0, 1):
        size, other_size = abs(box[axis + 2] - box[axis]), abs(other[axis + 2] - other[axis])
        distance = (box[axis] + box[axis + 2] - other[axis] - other[axis + 2]) / 2
        apart.append(distance)
        kept.append(math.copysign(max(abs(distance) - POSITION_MARGIN * (size + other_size), 0.0), distance))
    if max(map(abs, kept)) < 1e-3:
        return set()
    x, y = (value / math.hypot(*apart) for value in kept)
    names = ((x < -0.5, "left of"), (x > 0.5, "right of"), (y < -0.5, "above"), (y > 0.5, "below"))
    return {name for holds, name in names if holds}
