"""Export of the large presets' text encoders at small sizes: CLIP-L, CLIP-G and Gemma-2 with their published flags."""

import copy
from pathlib import Path

import pytest
import torch
from small_models import SMALL
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, Gemma2Config, Gemma2Model

pytest.importorskip("coremltools", reason="the Core ML export is an optional part")

from snapgen.data.shapes import VOCABULARY
from snapgen.decoder import TinyDecoder
from snapgen.export import gemma, parity
from snapgen.export.convert import convert
from snapgen.export.coreml import export_pipeline
from snapgen.export.gemma import gemma_chunks
from snapgen.export.interpreter import Chain, Program
from snapgen.export.options import Options
from snapgen.export.text import TextEncoder
from snapgen.export.tools import ExportError, ParityError
from snapgen.pipeline import SnapGenPipeline
from snapgen.sampler import make_scheduler
from snapgen.text import build_tiny_text
from snapgen.unet import SnapGenUNet
from snapgen_kernels import use

pytestmark = pytest.mark.export

PROMPTS = ("a red circle", "a small blue star above a large green square", "two yellow rings", "")
GEMMA_TOKENS = 24


def lively(module: nn.Module, seed: int) -> nn.Module:
    """Weights so large that every layer moves the states, and no norm or bias is trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.2 if parameter.ndim == 1 else 2.0 * parameter.shape[-1] ** -0.5
            drawn = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(parameter + drawn if parameter.ndim == 1 else drawn)
    return module.eval()


def clip(words: int, width: int, act: str, **changes) -> CLIPTextModelWithProjection:
    """CLIP-L is published with quick_gelu, CLIP-G with gelu; both with eos_token_id 2, "the largest id"."""
    config = dict(
        vocab_size=words, hidden_size=width, intermediate_size=4 * width, projection_dim=width, num_hidden_layers=3,
        num_attention_heads=2, hidden_act=act, bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    return lively(CLIPTextModelWithProjection(CLIPTextConfig(**{**config, **changes})), width)


def small_gemma(words: int, layers: int = 3, **changes) -> Gemma2Model:
    """Gemma-2-2b's flags: 2 queries per KV head of 256, soft caps 50 and 30, scores scaled by 256^-1/2."""
    config = dict(
        vocab_size=words, hidden_size=40, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=256, query_pre_attn_scalar=256, attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0, sliding_window=4096, hidden_activation="gelu_pytorch_tanh", pad_token_id=0,
        bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    return lively(Gemma2Model(Gemma2Config(**{**config, **changes})), 7)


def tokenizer():
    """Word-level, its end token the one of the largest id, as CLIP's."""
    made, _ = build_tiny_text(VOCABULARY, hidden_size=8, layers=1, heads=1, max_tokens=512)
    return made


@pytest.fixture(scope="module")
def pipe() -> SnapGenPipeline:
    torch.manual_seed(0)
    shared = tokenizer()
    words = len(shared.get_vocab())
    left = copy.deepcopy(shared)
    left.padding_side = "left"  # as Gemma's own
    return SnapGenPipeline(
        denoiser=SnapGenUNet(**dict(SMALL.denoiser, context_dim=40, pooled_dim=36)).eval(),
        decoder=TinyDecoder(**SMALL.decoder).eval(),
        scheduler=make_scheduler(3.0),
        text_encoder=clip(words, 16, "quick_gelu"),
        tokenizer=shared,
        text_encoder_2=clip(words, 20, "gelu", eos_token_id=3, bos_token_id=2),
        tokenizer_2=shared,
        text_encoder_3=small_gemma(words),
        tokenizer_3=left,
        max_tokens=GEMMA_TOKENS,
    )


TEXTS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@pytest.fixture(scope="module")
def exported(pipe, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("texts")
    return out, export_pipeline(pipe, out, Options(parts=TEXTS))


def test_they_are_exported_and_hold(exported):
    out, found = exported
    files = {"TextEncoder.mlpackage", "TextEncoder2.mlpackage", "TextEncoder3.mlpackage"}
    assert {path.name for path in out.glob("*.mlpackage")} == files
    for name in TEXTS:
        assert found["parts"][name]["psnr"] >= 45, found["parts"][name]["psnr"]
        operations = found["parts"][name]["packages"][0]["operations"]
        # Heads of k and v are not copied, and nothing is a norm of Core ML's own.
        assert not set(operations) & {"tile", "gather_nd", "layer_norm", "inverse", "pow", "square"}
    assert found["parts"]["text_encoder_3"]["packages"][0]["operations"]["tanh"] == 3 * 4


def test_borders_are_those_of_the_pipeline(exported):
    _, found = exported

    def borders(name: str, side: str) -> dict:
        return {f["name"]: (f["shape"], f["dtype"]) for f in found["parts"][name]["packages"][0][side]}

    for name, width in (("text_encoder", 16), ("text_encoder_2", 20)):
        assert borders(name, "inputs") == {"input_ids": ([1, 77], "int32")}
        assert borders(name, "outputs") == {
            "hidden_embeds": ([1, 77, width], "float16"),
            "pooled_outputs": ([1, width], "float16"),
        }
    assert borders("text_encoder_3", "inputs") == {
        "input_ids": ([1, GEMMA_TOKENS], "int32"),
        "attention_mask": ([1, 1, 1, GEMMA_TOKENS], "float16"),
    }
    assert borders("text_encoder_3", "outputs") == {"last_hidden_state": ([1, GEMMA_TOKENS, 40], "float16")}


def test_joined_as_documented_they_are_the_pipeline_s_context(exported, pipe):
    """What an app does with the three packages' outputs, against `encode_prompt`, for prompts of different lengths."""
    out, _ = exported
    first, second, third = (Program(out / f"TextEncoder{number}.mlpackage") for number in ("", "2", "3"))
    for prompt in PROMPTS:
        ids = pipe.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
        clips = [program({"input_ids": ids}) for program in (first, second)]
        tokens = pipe.tokenizer_3(prompt, padding="max_length", max_length=GEMMA_TOKENS, return_tensors="pt")
        mask = tokens.attention_mask[:, None, None]
        states = third({"input_ids": tokens.input_ids, "attention_mask": mask})["last_hidden_state"]
        wide = torch.cat([found["hidden_embeds"] for found in clips], 2)
        context = torch.cat((nn.functional.pad(wide, (0, 40 - 36)), states), 1)
        wanted = pipe.encode_prompt([prompt])
        assert wanted.mask.tolist() == [[True] * 77 + tokens.attention_mask[0].bool().tolist()]
        assert parity.psnr(context[wanted.mask], wanted.context[wanted.mask]) > 50
        pooled = torch.cat([found["pooled_outputs"] for found in clips], 1)
        assert parity.psnr(pooled, wanted.pooled) > 50


@pytest.mark.parametrize("number", ["text_encoder", "text_encoder_2"])
def test_clip_in_exported_form_is_clip(pipe, number):
    model = getattr(pipe, number)
    ids = pipe.tokenizer(list(PROMPTS), padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad(), use("reference"):
        wanted = model(input_ids=ids, output_hidden_states=True)
        states, pooled = TextEncoder(model, batch=4, tokens=77, penultimate=True)(ids.int())
    torch.testing.assert_close(states.float(), wanted.hidden_states[-2], rtol=2.0**-11, atol=2e-5)
    torch.testing.assert_close(pooled.float(), wanted.text_embeds, rtol=2.0**-11, atol=2e-5)


def test_end_token_2_means_the_first_of_the_largest_ids(pipe):
    """As transformers reads old configs of CLIP; CLIP-L pads with its end token."""
    ids = torch.tensor([[2, 5, 9, 9, 9, 9], [9, 5, 6, 7, 3, 2], [1, 2, 1, 1, 1, 2]], dtype=torch.int32)
    with torch.no_grad():
        _, pooled = TextEncoder(pipe.text_encoder, batch=3, tokens=6, penultimate=True)(ids)
        wanted = pipe.text_encoder(input_ids=ids.long()).text_embeds
    torch.testing.assert_close(pooled.float(), wanted, rtol=2.0**-11, atol=2e-5)


def forms(chunks, ids, mask):
    """Chunks run one after the other in PyTorch."""
    values = {"input_ids": ids.int(), "attention_mask": mask[:, None, None].half()}
    for chunk in chunks:
        given = {feature.name: values[feature.name] for feature in chunk.inputs}
        # fp32 between chunks, to see the form's own error.
        values[chunk.outputs[0][0]] = chunk(**given)
    return values["last_hidden_state"]


@pytest.mark.parametrize(
    "changes", [{}, {"attn_logit_softcapping": None}, {"num_key_value_heads": 4}, {"query_pre_attn_scalar": 100}]
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_gemma_in_exported_form_is_gemma(pipe, changes, side):
    words = len(pipe.tokenizer.get_vocab())
    model = small_gemma(words, **changes)
    padded = copy.deepcopy(pipe.tokenizer_3)
    padded.padding_side = side
    tokens = padded(list(PROMPTS), padding="max_length", max_length=GEMMA_TOKENS, return_tensors="pt")
    real = tokens.attention_mask.bool()
    with torch.no_grad(), use("reference"):
        wanted = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        (part,) = gemma_chunks(model, batch=4, tokens=GEMMA_TOKENS)
        got = forms([part], tokens.input_ids, real)
    assert real.sum(1).unique().numel() >= 3
    torch.testing.assert_close(got.float()[real], wanted[real], rtol=2.0**-11, atol=2e-5)
    # Trained weights are as they were: the parts share or copy them.
    again = small_gemma(words, **changes)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_scores_are_capped(pipe):
    """Scores far beyond 50, where the cap decides."""
    model = small_gemma(len(pipe.tokenizer.get_vocab()))
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.q_proj.weight.mul_(8)
    tokens = pipe.tokenizer_3(list(PROMPTS), padding="max_length", max_length=GEMMA_TOKENS, return_tensors="pt")
    real = tokens.attention_mask.bool()
    with torch.no_grad():
        wanted = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        for layer in model.layers:
            layer.self_attn.attn_logit_softcapping = 1e4
        uncapped = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        got = forms(gemma_chunks(model, batch=4, tokens=GEMMA_TOKENS), tokens.input_ids, real)
    torch.testing.assert_close(got.float()[real], wanted[real], rtol=2.0**-10, atol=2e-4)
    assert parity.psnr(uncapped[real], wanted[real]) < 40


# --- chunks ---------------------------------------------------------------------------------------------------------


def test_gemma_is_cut_by_a_parameter_budget(pipe, tmp_path):
    model = pipe.text_encoder_3
    layer = sum(parameter.numel() for parameter in model.layers[0].parameters())
    chunks = gemma_chunks(model, batch=1, tokens=GEMMA_TOKENS, budget=2 * layer + 40)
    assert [chunk.file for chunk in chunks] == ["TextEncoder3Chunk1.mlpackage", "TextEncoder3Chunk2.mlpackage"]
    sizes = [sum(parameter.numel() for parameter in chunk.parameters()) for chunk in chunks]
    assert sum(sizes) == sum(parameter.numel() for parameter in model.parameters())
    assert max(sizes) <= 2 * layer + 40

    small = gemma_chunks(model, batch=1, tokens=GEMMA_TOKENS, budget=1)
    assert [len(chunk.layers) for chunk in small] == [0, 1, 1, 1, 0]
    for chunk in chunks:
        convert(chunk, tmp_path / chunk.file, "iOS17")
    cases = parity.make_cases(pipe, 77 + GEMMA_TOKENS, 4, 4)
    program = Chain([Program(tmp_path / chunk.file) for chunk in chunks])
    assert set(program.inputs) == {"input_ids", "attention_mask"}
    assert parity.check("text_encoder_3", program, pipe, cases) >= 45


def test_the_table_is_converted_in_fp16_and_stays_as_it_was(pipe):
    chunk, *_ = gemma_chunks(pipe.text_encoder_3, batch=1, tokens=GEMMA_TOKENS)
    table = chunk.embed_tokens.weight
    before = table.clone()
    with chunk.converting():
        assert chunk.embed_tokens.weight.dtype == torch.float16
        assert torch.equal(chunk.embed_tokens.weight, before.half())
    assert chunk.embed_tokens.weight is table and torch.equal(table, before)


def test_the_published_size_is_five_packages():
    """By arithmetic alone: no weight is drawn."""
    with torch.device("meta"):
        model = Gemma2Model(Gemma2Config())
    groups, room = [[]], gemma.CHUNK_PARAMETERS
    total = 0
    for name, size in gemma._units(dict(model.state_dict()), 26):
        total += size
        if groups[-1] and size > room:
            groups.append([])
            room = gemma.CHUNK_PARAMETERS
        groups[-1].append(name)
        room -= size
    assert total == 2_614_341_888
    assert [len(group) for group in groups] == [1, 7, 7, 7, 6]


# --- fp16 -----------------------------------------------------------------------------------------------------------


def grown(pipe, residual: float, branch: float):
    """The pipeline with a Gemma whose residual stream and gated products grow, and their largest magnitudes."""
    model = copy.deepcopy(pipe.text_encoder_3)
    seen = {"residual": 0.0, "branch": 0.0}
    with torch.no_grad():
        for layer in model.layers:
            layer.post_attention_layernorm.weight.copy_((1 + layer.post_attention_layernorm.weight) * residual - 1)
            layer.mlp.up_proj.weight.mul_(branch**0.5)
            layer.mlp.gate_proj.weight.mul_(branch**0.5)

    def watch(name, tensor):
        seen[name] = max(seen[name], float(tensor.abs().max()))

    for layer in model.layers:
        layer.register_forward_hook(lambda _, inputs, output: watch("residual", output))
        layer.mlp.down_proj.register_forward_hook(lambda _, inputs, output: watch("branch", inputs[0]))
    parts = dict(pipe.components, text_encoder_3=model)
    return SnapGenPipeline(**parts, max_tokens=GEMMA_TOKENS), seen


@pytest.mark.complete
def test_activations_beyond_fp16_are_held(pipe, tmp_path, monkeypatch):
    """Four and ten times what fp16 holds: the folded factors keep them; without these the gate refuses the package."""
    large, seen = grown(pipe, residual=5e4, branch=1e4)
    found = export_pipeline(large, tmp_path / "held", Options(parts=("text_encoder_3",)))
    assert seen["residual"] > 2 * 65504 and seen["branch"] > 2 * 65504
    assert found["parts"]["text_encoder_3"]["psnr"] >= 45

    for name in ("RESIDUAL", "BRANCH"):
        with monkeypatch.context() as patch:
            patch.setattr(gemma, name, 1)
            with pytest.raises(ParityError, match="text_encoder_3: the exported program is -inf dB"):
                export_pipeline(large, tmp_path / name, Options(parts=("text_encoder_3",)))
        assert list((tmp_path / name).iterdir()) == []


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(sliding_window=16), "text_encoder_3: 24 tokens; its sliding window is 16"),
        (dict(use_bidirectional_attention=True), "text_encoder_3: bidirectional attention"),
        (dict(hidden_activation="silu"), "text_encoder_3: hidden_activation 'silu'; exported is 'gelu_pytorch_tanh'"),
    ],
)
def test_other_gemmas_are_refused(changes, message):
    with pytest.raises(ExportError, match=message):
        gemma_chunks(small_gemma(20, layers=1, **changes), batch=1, tokens=GEMMA_TOKENS)


def test_a_weight_that_finds_no_place_is_an_error(pipe):
    model = copy.deepcopy(pipe.text_encoder_3)
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ExportError, match=r"text_encoder_3: extra\.bias, extra\.weight belong to no layer"):
        gemma_chunks(model, batch=1, tokens=GEMMA_TOKENS)
    model = copy.deepcopy(pipe.text_encoder_3)
    model.layers[0].self_attn.q_norm = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="q_norm"):
        gemma_chunks(model, batch=1, tokens=GEMMA_TOKENS)


def test_encoders_that_are_not_there_are_named(pipe, tmp_path):
    less = SnapGenPipeline(**dict(pipe.components, text_encoder_2=None, tokenizer_2=None), max_tokens=GEMMA_TOKENS)
    with pytest.raises(ExportError, match="parts: the pipeline has no text_encoder_2; leave it out"):
        export_pipeline(less, tmp_path / "out", Options(parts=("text_encoder_2",)))
    assert not (tmp_path / "out").exists()
