"""The sections of the demo's report: each does its part of the work and tells what came of it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snapgen import io, report
from snapgen.data.shapes import SKILLS
from snapgen.pipeline import SnapGenPipeline
from snapgen.report import Card, Html, Section

# Training showed none of these, and they cover every kind of caption that it did show.
PROMPTS = (
    "a blue star",
    "a green cross right of a black circle",
    "three stars",
    "a pink star and a green square",
    "a black ring below a pink cross",
    "two purple circles",
    "a circle above a triangle",
    "a yellow star and a black cross",
    "an orange square below a yellow circle",
    "four rings",
    "a blue square and a green ring",
    "a purple square left of a pink star",
    "a square and a star",
    "three orange rings",
    "a red cross and a yellow ring",
    "an orange ring",
)
PATH_PROMPT = "a yellow star above a pink ring"
MANY, FEW = 28, 4  # steps: the paper's, and what its step-distilled model takes
DISTILLED = "tiny-4"  # from "tiny"
SEED = 0
GENEVAL = 0.66  # of the real SnapGen, on photographs of everyday things (authors' slides, table of T2I models)
_CHECKOUT = Path(__file__).resolve().parents[1]


@dataclass
class Run:
    """What the sections share: where to write, what to draw with, and a line to say what is going on.

    Attributes:
        few: what draws in a few steps: the same pipeline, or one that was distilled from it.
        hero: the header's pictures. figures: the header's figures, (value, label). Both are filled by sections.
    """

    out: Path
    checkpoint: str
    pipe: SnapGenPipeline
    per_skill: int
    few: SnapGenPipeline
    say: Callable[[str], None] = lambda text: None
    hero: str = ""
    figures: list[tuple[str, str]] = field(default_factory=list)


def draw_pictures(state: Run) -> Section:
    """The same prompts and noise at 28 and at 4 steps, each picture judged."""
    from snapgen.checker import check
    from snapgen.evaluate import draw
    from snapgen.pictures import save_grid

    galleries, right = {}, {}
    for steps, pipe in ((MANY, state.pipe), (FEW, state.few)):
        state.say(f"{len(PROMPTS)} prompts, {steps} steps")
        pictures = draw(pipe, PROMPTS, steps=steps, guidance=pipe.config.guidance, seed=SEED)
        results = [check(picture, prompt) for picture, prompt in zip(pictures, PROMPTS, strict=True)]
        right[steps] = sum(result.correct for result in results)
        cards = [
            Card(picture, prompt, result.correct, "" if result.correct else result.reason)
            for picture, prompt, result in zip(pictures, PROMPTS, results, strict=True)
        ]
        galleries[steps] = report.gallery(cards, small=steps == FEW)
        captions = [p if r.correct else f"{p} (wrong)" for p, r in zip(PROMPTS, results, strict=True)]
        save_grid(pictures, state.out / f"grid-{steps}.png", captions=captions, size=160, columns=4)
    state.hero = galleries[MANY]
    calls, fewer = (n * (2 if p.config.guidance != 1 else 1) for n, p in ((MANY, state.pipe), (FEW, state.few)))
    few = "is" if state.few.config.steps == FEW else "is not"
    who = f"This model {few}" if state.few is state.pipe else f"These are by {DISTILLED}, which was"
    body = report.join(
        report.paragraph(
            f"Same prompts, same noise as above, but {FEW} Euler steps instead of {MANY}, and {fewer} calls of the "
            f"denoiser instead of {calls}. The checker accepts {right[FEW]} of {len(PROMPTS)} here and {right[MANY]} "
            f"of {len(PROMPTS)} above. {who} distilled for few steps, as the paper's is."
        ),
        galleries[FEW],
    )
    return Section(
        name="pictures",
        title=f"{FEW} steps instead of {MANY}",
        body=body,
        command=f'snapgen generate "{PROMPTS[1]}" -o out.png --steps {FEW}'
        + f" --checkpoint {state.checkpoint if state.few is state.pipe else DISTILLED}",
        summary=f"right: {right[MANY]} of {len(PROMPTS)} at {MANY} steps, {right[FEW]} at {FEW}",
    )


def score(state: Run) -> Section:
    """Unseen captions of each skill, beside the same model before training."""
    from snapgen.evaluate import score_shapes, untrained

    scores = {}
    rows = ((MANY, "", state.pipe), (FEW, "", state.few), (MANY, "untrained, ", untrained(state.pipe, SEED)))
    for steps, who, pipe in rows:
        name = f"{who}{steps} steps"
        state.say(f"{len(SKILLS) * state.per_skill} captions, {name}")
        guidance = pipe.config.guidance
        scores[name] = score_shapes(pipe, steps=steps, guidance=guidance, per_skill=state.per_skill, seed=SEED)
    guided = {f"{steps} steps": pipe.config.guidance for steps, _, pipe in rows[:2]}
    settings = dict(per_skill=state.per_skill, guidance=guided, seed=SEED, checkpoint=state.checkpoint)
    io.write_json(state.out / "scores.json", dict(settings, scores=scores))
    plot_scores(scores, state.out / "scores.png")

    many, few = scores[f"{MANY} steps"], scores[f"{FEW} steps"]
    before = scores[f"untrained, {MANY} steps"]["overall"]
    error = (sum(many[s] * (1 - many[s]) / state.per_skill for s in SKILLS)) ** 0.5 / len(SKILLS)
    state.figures += [
        (f"{many['overall']:.2f}", f"share right on unseen captions, {MANY} steps"),
        (f"{few['overall']:.2f}", f"the same in {FEW} steps"),
    ]
    columns = (*SKILLS, "overall")
    body = report.join(
        report.paragraph(
            f"{state.per_skill} captions of each of GenEval's six skills, none of them shown in training (but for the "
            f"six captions of a single object, which are all there are). A program that reads the pictures decides "
            f"whether shapes, colours, numbers and places are what the caption says. The overall score is the mean of "
            f"the six; its standard error at {MANY} steps is {error:.2f}."
        ),
        report.bars(scores, columns),
        report.table(
            ["", *(skill.replace("_", " ") for skill in columns)],
            [[name, *(f"{row[skill]:.2f}" for skill in columns)] for name, row in scores.items()],
        ),
        report.paragraph(
            f"For scale: the paper's SnapGen scores {GENEVAL} on GenEval itself, whose prompts name everyday objects "
            f"and whose pictures are photographs at 1024×1024. The shapes world has the same six kinds of question and "
            f"is far easier, so the two figures are not comparable; what is comparable is the same model untrained."
        ),
    )
    return Section(
        name="scores",
        title="How often a picture shows what was asked",
        body=body,
        command=f"snapgen eval shapes {state.checkpoint} --steps {MANY} --per-skill {state.per_skill}",
        summary=f"{many['overall']:.2f} at {MANY} steps, {few['overall']:.2f} at {FEW}; untrained {before:.2f}",
    )


def show_path(state: Run) -> Section:
    """What the model sees and what it expects, step by step."""
    from snapgen.pictures import to_pictures

    state.say(PATH_PROMPT)
    times, seen, expected = denoising_path(state.pipe, PATH_PROMPT)
    # More of the early steps, where the layout is decided.
    shown = sorted({round((MANY - 1) * (at / 7) ** 1.5) for at in range(8)})
    strips = []
    for latents, what in ((seen, "What the model is given"), (expected, "What it expects the picture to be")):
        with torch.no_grad():
            images = state.pipe.decoder.decode(latents[shown].to(state.pipe.decoder.dtype))
        cards = [Card(p, f"t = {times[at]:.2f}") for p, at in zip(to_pictures(images), shown, strict=True)]
        strips += [report.heading(what), report.gallery(cards, small=True)]
    body = report.join(
        report.paragraph(
            f"“{PATH_PROMPT}”, {MANY} steps from noise (t = 1) to picture (t = 0). The model predicts the velocity v "
            f"of the straight path x(t) = (1 − t) picture + t noise; x(t) − t v is then the picture it expects. The "
            f"layout settles in the first few steps, edges and colours in the rest."
        ),
        *strips,
    )
    command = f'snapgen generate "{PATH_PROMPT}" -o out.png'
    return Section("path", "From noise to picture", body, command, f"{MANY} steps of “{PATH_PROMPT}”")


def time_ops(state: Run) -> Section:
    """The quick benchmark, as a process of its own: it starts Python anew with malloc tuned."""
    import snapgen_kernels

    title, command = "The fused ops on this machine", "python -m bench --quick"
    cpp = snapgen_kernels.backends()["cpp"]
    if not (_CHECKOUT / "bench" / "__main__.py").is_file():
        return _left_out(
            title, command, "Timing needs the checkout: the benchmark is not part of the installed package."
        )
    if not cpp["available"]:
        return _left_out(title, command, f"There are no fused ops to time on this processor: {cpp['reason']}.")
    table, plot = state.out / "bench.json", state.out / "bench.png"
    state.say(command)
    arguments = ["--quick", "--json", str(table), "--plot", str(plot)]
    done = subprocess.run(
        [sys.executable, "-m", "bench", *arguments], cwd=_CHECKOUT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-2000:]
        raise RuntimeError(f"{command} failed with exit code {done.returncode}:\n{said}")
    measured = json.loads(table.read_text())
    # fwd+bwd is the sum of the other two.
    comparisons = [found for found in compare(measured["rows"]) if found["mode"] != "fwd+bwd"]
    gains = [found["gain"] for found in comparisons if found["gain"]]
    machine = measured["machine"]
    busy = machine["load"] > machine["threads"] + 0.5
    body = report.join(
        report.paragraph(
            f"Median of many runs on {machine['device']}, {machine['threads']} threads; every case is checked against "
            f"fp64 before it is timed. Ours is faster than the best peer in {sum(gain > 1 for gain in gains)} of "
            f"{len(gains)} rows. “bwd” is the backward pass alone; “of floor” is how near we are to what this "
            f"machine’s measured matrix products and memory copies allow."
        ),
        report.note(f"Other programs were running (load {machine['load']}), so these times are rough.") if busy else "",
        _timing_table(comparisons),
        report.picture(plot, "Speed-ups of the fused ops, and how near they are to the machine’s limits", plate=True)
        if plot.is_file()
        else "",
        report.paragraph("Only ops with a kernel for this processor are timed here; the others run PyTorch. ",
                         report.code("make bench"), " times every op, shape and peer."),
    )  # fmt: skip
    summary = f"{sum(gain > 1 for gain in gains)} of {len(gains)} faster than the best peer"
    return Section("timing", title, body, command, summary)


def count(state: Run) -> Section:
    """Parameters and MACs of every preset, and the ablation ladder beside the published changes."""
    from snapgen import info
    from snapgen.config import PRESETS

    presets = []
    for preset in PRESETS.values():
        state.say(preset.name)
        denoiser, decoder = info.denoiser_counts(preset.denoiser)[""], info.decoder_counts(preset)[""]
        published = [
            info.si(target).replace(".00", "") for target in (preset.target_params, preset.target_macs) if target
        ]
        presets.append(
            [preset.name, f"{preset.resolution}", info.si(denoiser.params), info.si(denoiser.macs),
             " / ".join(published) or "–", info.si(decoder.params), info.si(decoder.macs)]
        )  # fmt: skip
    state.say("ladder")
    rungs = []
    for row in info.ladder():
        ours, published = row.get("ours", {}), row.get("published", {})
        rungs.append(
            [row["step"], info.si(row["params"]), info.si(row["macs"])]
            + [f"{changes[key]:{style}}".replace("-", "−") if key in changes else "–"
               for key in ("params", "macs") for changes, style in ((ours, "+.1%"), (published, "+.0%"))]
        )  # fmt: skip
    body = report.join(
        report.paragraph(
            "Counted on the instantiated modules, not from a formula. MACs are multiply-accumulates of one forward "
            "pass at the preset’s resolution. The published decoder has 1.38M parameters and 224 GMACs at 1024×1024."
        ),
        report.table(["preset", "pixels", "denoiser", "MACs", "published", "decoder", "MACs"], presets, left=1),
        report.heading("The ablation ladder"),
        report.paragraph(
            "From a thin SDXL to SnapGen, one change a line, at a 128×128 latent. Changes are relative to the step "
            "that the paper compares with; where it gives none there is a dash."
        ),
        report.table(
            ["step", "params", "MACs", "Δ params", "published", "Δ MACs", "published"], rungs, strong=[len(rungs) - 1]
        ),
    )
    return Section(
        "models", "The models, counted", body, "snapgen info --ladder", f"{len(presets)} presets and the ladder"
    )


def export_packages(state: Run) -> Section:
    """Core ML packages of every part, and what is in them."""
    title, command = "Packages for the phone", f"snapgen export coreml {state.checkpoint} -o {state.out.name}/coreml"
    if importlib.util.find_spec("coremltools") is None:
        return _left_out(title, command, "The export needs coremltools, which is not installed here: "
                         "pip install 'snapgen[export]'.")  # fmt: skip
    from snapgen import info
    from snapgen.export.coreml import descriptions, export_pipeline

    exported = export_pipeline(state.pipe, state.out / "coreml", progress=lambda what, _: state.say(what))
    packages = descriptions(exported)
    rows, borders = [], []
    for found in packages:
        name = Path(found["path"]).name
        weights = ", ".join(f"{info.si(kind['elements'])} {dtype}" for dtype, kind in found["weights"].items())
        rows.append(
            [name, f"{found['system']}+", weights, report.size(found["file_bytes"]),
             sum(found["operations"].values()), info.si(found["flops"]), f"{found['psnr']:.1f} dB"]
        )  # fmt: skip
        for side in ("inputs", "outputs"):
            for feature in found[side]:
                shape = " × ".join(map(str, feature["shape"]))
                kind = f"{shape} {feature['dtype']}"
                borders.append([name, side[:-1], report.code(feature["name"]), kind, feature["about"]])
                name = ""
    operations = [
        report.details(
            f"Operations of {Path(found['path']).name}",
            report.table(["operation", "count"], [[report.code(k), n] for k, n in found["operations"].items()]),
        )
        for found in packages
    ]
    body = report.join(
        report.paragraph(
            "Core ML packages in fp16 for the Neural Engine, converted without a Mac. Each program was run here, "
            "operation by operation, and compared with the PyTorch model before it was kept: the last column is the "
            "peak signal-to-noise ratio of its outputs. They lie in ",
            report.code(f"{state.out.name}/coreml"),
            ".",
        ),
        report.table(["package", "runs on", "weights", "size", "operations", "FLOP a call", "PSNR"], rows, left=3),
        report.heading("Inputs and outputs"),
        report.table(["package", "", "name", "shape and type", "what it is"], borders, left=5),
        *operations,
    )
    total = report.size(sum(found["file_bytes"] for found in packages))
    worst = min(found["psnr"] for found in packages)
    return Section("coreml", title, body, command, f"{len(packages)} packages, {total}, PSNR {worst:.0f} dB or more")


# --- what the sections use --------------------------------------------------------------------------------------------


def denoising_path(pipe: SnapGenPipeline, prompt: str, steps: int = MANY) -> tuple[list[float], Tensor, Tensor]:
    """Before each step: its time, the latents, and the picture's latents that the model expects then.

    Returns:
        Times [steps] from 1 down, latents x_t and predictions x_t - t v, both [steps, C, H, W].
    """
    from snapgen.sampler import sample

    config = pipe.denoiser.config
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    latents = [torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).to(pipe.device)]
    with torch.no_grad():
        sample(
            pipe.denoiser,
            pipe.scheduler,
            latents[0],
            pipe.encode_prompt([prompt]),
            steps=steps,
            guidance_scale=pipe.config.guidance,
            negative=pipe.encode_prompt([""]),
            on_step=lambda _, after: latents.append(after),
        )
    path = torch.cat(latents)
    # An Euler step is x + (t' - t) v, so two states give back the velocity that led from one to the other.
    t = pipe.scheduler.sigmas.to(path)[:, None, None, None]
    velocity = torch.diff(path, dim=0) / torch.diff(t, dim=0)
    return t[:-1].flatten().tolist(), path[:-1], path[:-1] - t[:-1] * velocity


def plot_scores(scores: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Bars of every skill and overall for each named set of scores, as a picture file."""
    from matplotlib.figure import Figure

    groups, width = (*SKILLS, "overall"), 0.8 / len(scores)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    for at, ((name, row), color) in enumerate(zip(scores.items(), _COLORS, strict=False)):
        places = [group + (at - (len(scores) - 1) / 2) * width for group in range(len(groups))]
        axes.bar(places, [row[group] for group in groups], 0.92 * width, label=name, color=color)
    axes.set_xticks(range(len(groups)), [group.replace("_", " ") for group in groups])
    axes.set_ylim(0, 1)
    axes.set_ylabel("share right")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)
    figure.legend(loc="outside upper center", ncols=len(scores), frameon=False)
    with io.whole_file(path) as temporary:
        figure.savefig(temporary, dpi=160)


_COLORS = ("#3056c8", "#8fa8ec", "#b4b6ba", "#d9dade")


def compare(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The benchmark's rows by op, case, dtype and mode: `fused` and `peer` rows (None if missing), and `gain`."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in ("op", "case", "dtype", "mode")), []).append(row)
    found = []
    for (op, case, dtype, mode), members in groups.items():
        fused = next((row for row in members if row["provider"] == "fused"), None)
        peers = [row for row in members if row["provider"] != "fused"]
        peer = min(peers, key=lambda row: row["p50_ms"], default=None)
        gain = peer["p50_ms"] / fused["p50_ms"] if fused and peer else None
        found.append(dict(op=op, case=case, dtype=dtype, mode=mode, fused=fused, peer=peer, gain=gain))
    return found


def _left_out(title: str, command: str, why: str) -> Section:
    return Section("", title, report.note(why), command, f"left out: {why}")


def _timing_table(comparisons: Sequence[Mapping[str, Any]]) -> Html:
    rows: list[list[object]] = []
    above = ("", "")
    for found in comparisons:
        fused, peer, gain = found["fused"], found["peer"], found["gain"]
        here = (found["op"], found["case"])
        op, case = ("", "") if here == above else (report.code(found["op"]), report.code(found["case"]))
        above = here
        share = f"{fused['floor_ms'] / fused['p50_ms']:.0%}" if fused else "–"
        names = [op, case, found["dtype"], found["mode"], peer["provider"] if peer else "–"]
        rows.append([*names, _ms(fused), _ms(peer), f"{gain:.2f}×" if gain else "–", share])
    headings = ["op", "case", "dtype", "mode", "best peer", "ours, ms", "peer, ms", "gain", "of floor"]
    return report.table(headings, rows, left=5)


def _ms(row: Mapping[str, Any] | None) -> str:
    return "–" if row is None else f"{row['p50_ms']:.{3 if row['p50_ms'] < 1 else 2 if row['p50_ms'] < 10 else 1}f}"


SECTIONS: dict[str, Callable[[Run], Section]] = {
    "pictures": draw_pictures,
    "scores": score,
    "path": show_path,
    "timing": time_ops,
    "coreml": export_packages,
    "models": count,
}
