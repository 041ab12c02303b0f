"""The commands as a user types them: what they print and write, and one clear line for every mistake."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from small_models import denoiser_task

from snapgen import cli


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    denoiser_task().pipeline().save_pretrained(folder)
    return str(folder)


def run(capsys, *words: str) -> tuple[int, str]:
    code = 0
    try:
        cli.main(list(words))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    captured = capsys.readouterr()
    return code, " ".join((captured.out + captured.err).split())


def test_generate_draws_one_picture(capsys, checkpoint, tmp_path):
    out = tmp_path / "deep" / "out.png"
    words = ("generate", "a red circle left of a blue square", "--steps", "2", "--checkpoint", checkpoint)
    code, text = run(capsys, *words, "-o", str(out))
    assert code == 0 and "wrote" in text
    assert Image.open(out).size == (32, 32)
    first = out.read_bytes()
    run(capsys, *words, "-o", str(out))
    assert out.read_bytes() == first
    run(capsys, *words, "-o", str(out), "--seed", "1")
    assert out.read_bytes() != first


def test_generate_draws_a_grid_of_several(capsys, checkpoint, tmp_path):
    out = tmp_path / "grid.png"
    code, text = run(capsys, "generate", "a circle", "two stars", "--count", "2", "-o", str(out), "--steps", "1",
                     "--checkpoint", checkpoint)  # fmt: skip
    assert code == 0 and "4 of 32x32" in text
    assert Image.open(out).width > 2 * 128


def test_generate_says_which_words_it_never_saw(capsys, checkpoint, tmp_path):
    code, text = run(capsys, "generate", "a red dinosaur", "-o", str(tmp_path / "o.png"), "--steps", "1",
                     "--checkpoint", checkpoint)  # fmt: skip
    assert code == 0
    assert "note: prompt: the model never saw 'dinosaur'" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("generate", ""), "error: prompt: it is empty"),
        (("generate", "circle " * 50), "error: prompt: 50 words are too many"),
        (("generate", "a circle", "--steps", "0"), "error: num_inference_steps: got 0"),
        (("generate", "a circle", "--height", "33"), "error: height: got 33"),
        (
            ("info", "--preset", "huge"),
            "error: preset: unknown name 'huge'; choose one of digits, imagenet-256, t2i-1024, tiny",
        ),
        (("eval", "CHECKPOINT", "--per-skill", "0"), "error: per_skill: got 0"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(capsys, checkpoint, tmp_path, words, message):
    options = ("-o", str(tmp_path / "o.png"), "--checkpoint", checkpoint) if words[0] == "generate" else ()
    code, text = run(capsys, *(checkpoint if word == "CHECKPOINT" else word for word in words), *options)
    assert code == 2
    assert message in text
    assert not (tmp_path / "o.png").exists()


def test_brackets_in_a_path_are_not_taken_for_markup(capsys, tmp_path):
    code, text = run(capsys, "generate", "a circle", "--checkpoint", str(tmp_path / "[bold]run"))
    assert code == 2 and "[bold]run: no such checkpoint folder" in text


def test_wrong_checkpoints_are_named(capsys, tmp_path):
    code, text = run(capsys, "generate", "a circle", "--checkpoint", str(tmp_path / "absent"))
    assert code == 2 and "no such checkpoint folder" in text
    code, text = run(capsys, "export", "coreml", "absent", "-o", str(tmp_path / "packages"))
    assert code == 2 and "absent: no such checkpoint folder, nor a shipped one (tiny, tiny-4)" in text
    assert not (tmp_path / "packages").exists()
    code, text = run(capsys, "train", "-o", str(tmp_path / "run"), "--autoencoder", str(tmp_path / "absent"))
    assert code == 2 and "no such file" in text
    code, text = run(capsys, "train", "-o", str(tmp_path / "run"), "--preset", "t2i-1024")
    assert code == 2 and "name --clip-l, --clip-g and --gemma" in text
    code, text = run(capsys, "train-autoencoder", "-o", str(tmp_path / "run"), "--data", "nowhere")
    assert code == 2 and "data: got 'nowhere'" in text


def test_eval_writes_scores(capsys, checkpoint, tmp_path):
    out = tmp_path / "scores.json"
    code, text = run(capsys, "eval", checkpoint, "--steps", "1", "2", "--per-skill", "2", "-o", str(out))
    assert code == 0 and "2 steps" in text
    scores = json.loads(out.read_text())
    assert set(scores) == {"1 steps", "2 steps"}
    skills = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    for row in scores.values():
        assert row["overall"] == pytest.approx(sum(row[skill] for skill in skills) / 6)


def test_train_from_the_command_line(capsys, tmp_path):
    words = ("train-autoencoder", "--steps", "2", "--batch-size", "2", "--warmup", "1")
    code, text = run(capsys, *words, "-o", str(tmp_path / "autoencoder"))
    assert code == 0 and "trained" in text
    words = ("train", "--steps", "2", "--batch-size", "2", "--warmup", "1", "--export-dtype", "fp16")
    words = (*words, "--autoencoder", str(tmp_path / "autoencoder" / "export"), "-o", str(tmp_path / "run"))
    code, text = run(capsys, *words)
    assert code == 0 and "trained; wrote" in text
    out = tmp_path / "o.png"
    trained = str(tmp_path / "run" / "export")
    code, text = run(capsys, "generate", "a star", "--steps", "1", "--checkpoint", trained, "-o", str(out))
    assert code == 0, text
    assert Image.open(out).size == (64, 64)


def test_train_on_a_folder_counts_what_it_skips(capsys, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, caption in enumerate(("A house, red.", "a boat", "the sea's edge")):
        Image.new("RGB", (80, 70), (index * 80, 90, 120)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(caption)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (folder / "broken.txt").write_text("a broken picture")
    options = ("--data", str(folder), "--steps", "2", "--batch-size", "4", "--warmup", "1")
    code, text = run(capsys, "train-autoencoder", *options, "-o", str(tmp_path / "autoencoder"))
    assert code == 0, text
    latents = ("--autoencoder", str(tmp_path / "autoencoder" / "export"))
    code, text = run(capsys, "train", *options, *latents, "-o", str(tmp_path / "run"))
    assert code == 0, text
    assert "3 pairs in use, 1 skipped" in text and "broken.png" in text
    tokenizer = json.loads((tmp_path / "run" / "export" / "tokenizer" / "tokenizer.json").read_text())
    assert {"house", ",", "red", ".", "sea", "'", "edge", "picture"} <= set(tokenizer["model"]["vocab"])


def test_info_prints_counts_and_backends(capsys):
    code, text = run(capsys, "info")
    assert code == 0 and "t2i-1024" in text
    code, text = run(capsys, "info", "--preset", "imagenet-256", "--device")
    assert code == 0
    assert "370.92M" in text and torch.__version__ in text and "group_norm_silu" in text


def test_a_fresh_process_loads_what_another_saved(checkpoint, tmp_path):
    out = tmp_path / "o.png"
    command = [sys.executable, "-m", "snapgen.cli", "generate", "a circle", "--steps", "1", "--checkpoint", checkpoint]
    done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert out.exists()


def test_importing_loads_nothing_heavy():
    script = (
        "import sys, snapgen, snapgen_kernels\n"
        "heavy = {'diffusers', 'transformers', 'triton', 'coremltools', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-o", "out.xyz"), "error: out: got out.xyz; a picture's name ends in .png"),
        (("-o", "out"), "error: out: got out; a picture's name ends in .png"),
        (("--seed", str(2**64)), "error: seed: got 18446744073709551616; must fit into 64 bits"),
    ],
)
def test_generate_refuses_before_it_loads_or_draws(capsys, words, message):
    code, text = run(capsys, "generate", "a circle", "--checkpoint", "/nowhere", *words)
    assert code == 2 and message in text


def test_generate_does_not_draw_over_a_folder(capsys, tmp_path):
    folder = tmp_path / "a.png"
    folder.mkdir()
    code, text = run(capsys, "generate", "a circle", "--checkpoint", "/nowhere", "-o", str(folder))
    assert code == 2 and "is a folder; name a picture file" in text
