"""Knowledge distillation: each formula by hand, who gets gradients, features of any layers on one grid, teachers."""

import math
import os
import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import QUIET, denoiser_task
from small_teachers import small_teacher, taught_task
from test_train import assert_same, config, data, weights
from torch import nn

from snapgen.config import PRESETS
from snapgen.data.loader import Batch
from snapgen.distill.features import LayerPair, Taps, as_grid, averaged, feature_loss, layer, transformers
from snapgen.distill.knowledge import KnowledgeDistillation, velocity_distance
from snapgen.distill.scaling import Scaling, density, phi, scaled
from snapgen.distill.teacher import Teacher
from snapgen.seeds import Draws
from snapgen.tasks import DenoiserTask
from snapgen.text import TextEmbedding
from snapgen.train import train

pytestmark = pytest.mark.method

LAST = LayerPair("transformer.transformer_blocks.2", "up.0.layers.1.transformer")
FIRST = LayerPair("transformer.transformer_blocks.0", "mid", "mlp")


def batch(count: int = 2) -> Batch:
    pictures = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return Batch(captions=["a red circle", "two stars"][:count], images=pictures, positions=range(count))


# ---- scaling ---------------------------------------------------------------------------------------------------------


def test_density_is_the_logit_normal_one():
    # rho(t) = exp(-logit(t)^2 / 2) / (sqrt(2 pi) t (1 - t)); logit(0.2) = -log 4.
    by_hand = math.exp(-(math.log(4) ** 2) / 2) / (math.sqrt(2 * math.pi) * 0.2 * 0.8)
    found = density(torch.tensor([0.2, 0.8, 0.5, 0.0, 1.0]))
    assert found.tolist() == pytest.approx([by_hand, by_hand, 4 / math.sqrt(2 * math.pi), 0, 0], rel=1e-5, abs=1e-6)
    # A density: it integrates to one.
    t = (torch.arange(20000, dtype=torch.float32) + 0.5) / 20000
    assert density(t).double().mean().item() == pytest.approx(1, abs=1e-4)


def test_share_of_the_task_is_largest_in_the_middle():
    # rho(0.1) / rho(0.5) = exp(-(log 9)^2 / 2) / (4 * 0.09)
    tenth = math.exp(-(math.log(9) ** 2) / 2) / 0.36
    assert phi(torch.tensor([0.1, 0.5, 0.9])).tolist() == pytest.approx([tenth, 1, tenth], rel=1e-5)
    assert phi(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0, 0], abs=1e-12)


def test_scaled_loss_by_hand():
    task = torch.tensor([2.0, 0.5], requires_grad=True)
    distilled = torch.tensor([0.1, 3.0], requires_grad=True)
    share = torch.tensor([0.25, 1.0])
    # 0.25 * 2 + 0.75 * (2 / 0.1) * 0.1 = 2; 0.5.
    found = scaled(task, distilled, share)
    assert found.tolist() == pytest.approx([2.0, 0.5])
    # The quotient is a constant: d/d task = share, d/d distilled = (1 - share) * quotient.
    found.sum().backward()
    assert task.grad.tolist() == pytest.approx([0.25, 1.0])
    assert distilled.grad.tolist() == pytest.approx([0.75 * 20, 0.0])


def test_scaled_loss_of_a_student_that_has_arrived_is_finite():
    distilled = torch.zeros(1, requires_grad=True)
    found = scaled(torch.tensor([2.0]), distilled, torch.tensor([0.25]))
    found.backward()
    assert found.item() == 0.5 and distilled.grad.isfinite().all()


def test_constant_scaling_by_hand_and_its_errors():
    constant = Scaling(scaling="constant", kd_weight=0.5)
    assert constant(torch.tensor([2.0]), torch.tensor([3.0]), torch.tensor([0.1])).item() == 3.5
    by_time = Scaling()(torch.tensor([2.0]), torch.tensor([3.0]), torch.tensor([0.5]))
    assert by_time.item() == pytest.approx(2.0)
    with pytest.raises(ValueError, match="scaling: got 'none'"):
        Scaling(scaling="none")
    with pytest.raises(ValueError, match=r"kd_weight: got -1"):
        Scaling(kd_weight=-1.0)


# ---- features --------------------------------------------------------------------------------------------------------


def test_tokens_become_the_grid_row_by_row():
    tokens = torch.arange(6.0).view(1, 6, 1)
    assert as_grid(tokens, (4, 6)).tolist() == [[[[0.0, 1, 2], [3, 4, 5]]]]
    # Of a joint block's (text, image) the image.
    assert torch.equal(as_grid((torch.zeros(1, 77, 1), tokens), (2, 3)), as_grid(tokens, (2, 3)))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))
def test_any_patch_grid_is_found(height, width, patch):
    grid = torch.rand(1, 3, height, width)
    tokens = grid.flatten(2).transpose(1, 2)
    assert torch.equal(as_grid(tokens, (height * patch, width * patch)), grid)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.zeros(1, 77, 8), "77 tokens, which are no grid of the aspect of 8x8"),
        (torch.zeros(1, 32, 8), "32 tokens"),
        (torch.zeros(1, 3, 4, 8), "grid of 4x8; the latents' 8x8"),
        (torch.zeros(1, 3), r"\(1, 3\); features are"),
        ("text", "str"),
    ],
)
def test_what_is_no_grid_is_named(output, message):
    with pytest.raises(ValueError, match=message):
        as_grid(output, (8, 8), "block")


def test_averages_by_hand():
    grid = torch.arange(16.0).view(1, 1, 4, 4)
    assert averaged(grid, (2, 2)).tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]
    # Three cells on two: the middle one counts half in each.
    assert averaged(torch.tensor([[[[0.0, 3.0, 9.0]]]]), (1, 2)).tolist() == [[[[1.0, 7.0]]]]


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_averages_keep_the_mean(height, width, drawn):
    size = drawn.draw(st.integers(1, height)), drawn.draw(st.integers(1, width))
    grid = torch.rand(2, 3, height, width)
    found = averaged(grid, size)
    assert found.shape == (2, 3, *size)
    torch.testing.assert_close(found.mean((2, 3)), grid.mean((2, 3)))


def test_feature_loss_by_hand():
    teacher = torch.tensor([[[[1.0, 3.0], [5.0, 7.0]]]])  # mean 4
    student = torch.tensor([[[[1.5]]]])
    assert feature_loss(teacher, student).tolist() == [6.25]
    assert feature_loss(student, teacher).tolist() == [6.25]
    assert feature_loss(teacher, teacher + 2).tolist() == [4.0]
    with pytest.raises(ValueError, match=r"teacher's are 1 channels of 2x2, the student's 2 of 2x2"):
        feature_loss(teacher, torch.zeros(1, 2, 2, 2))
    with pytest.raises(ValueError, match="of 1x2"):
        feature_loss(teacher, torch.zeros(1, 1, 1, 2))


def test_velocity_distance_by_hand():
    assert velocity_distance(torch.tensor([[1.0, 2], [0, 0]]), torch.tensor([[0.0, 0], [0, 4]])).tolist() == [2.5, 8.0]


def test_an_unknown_layer_lists_near_ones():
    teacher = small_teacher().network
    with pytest.raises(
        ValueError, match=r"MMDiT has none called 'transformer\.transformer_blocks\.9'; near are .*s\.2"
    ):
        layer(teacher, "transformer.transformer_blocks.9")
    with pytest.raises(ValueError, match="projector: got 'deep'"):
        LayerPair("a", "b", "deep")
    with pytest.raises(ValueError, match="layers: got 'last'"):
        LayerPair.parse("last", teacher, teacher)
    with pytest.raises(ValueError, match="no transformer layers"):
        transformers(nn.Linear(1, 1))


def test_last_transformer_layers_are_found():
    student = denoiser_task().modules["denoiser"]
    pair = LayerPair.parse("last:last:conv", small_teacher().network, student)
    assert pair == LayerPair(LAST.teacher, LAST.student, "conv")


def test_taps_leave_nothing_behind():
    teacher = small_teacher()
    text = teacher.read(["a red circle"])
    arguments = torch.randn(1, 8, 4, 4), torch.tensor([0.3])
    before = {name: len(part._forward_hooks) for name, part in teacher.network.named_modules()}
    with Taps(teacher.network, [LAST.teacher]) as taps:
        velocity = teacher.network(arguments[0], arguments[1] * 1000, text.context, text.mask, text.pooled)
    grids = taps.grids([LAST.teacher], (4, 4))
    assert grids[0].shape == (1, 32, 4, 4)
    assert {name: len(part._forward_hooks) for name, part in teacher.network.named_modules()} == before
    assert not taps._outputs
    # What was tapped is what the network goes on with: its last layers on it give its output.
    tokens = grids[0].flatten(2).transpose(1, 2)
    inner = teacher.network.transformer
    temb = inner.time_text_embed(arguments[1] * 1000, text.pooled)
    patches = inner.proj_out(inner.norm_out(tokens, temb))
    torch.testing.assert_close(patches.transpose(1, 2).unflatten(2, (4, 4)), velocity.sample)
    with pytest.raises(RuntimeError, match="was not called"):
        taps.grids([LAST.teacher], (4, 4))


# ---- the objective ---------------------------------------------------------------------------------------------------


def kd(teacher, student, **changes) -> KnowledgeDistillation:
    torch.manual_seed(2)
    return KnowledgeDistillation(teacher, student, **changes)


@pytest.mark.parametrize("mode", ["output", "features", "both", "two pairs", "constant"])
def test_loss_by_its_formula(mode):
    pairs = {"output": (), "two pairs": (LAST, FIRST)}.get(mode, (LAST,))
    scaling = Scaling(scaling="constant", kd_weight=0.3) if mode == "constant" else Scaling()
    task = taught_task(lambda t, s: kd(t, s, output=mode != "features", pairs=pairs, scaling=scaling))
    objective = task.objective
    (phase,) = task.phases()
    assert phase.modules == (("denoiser", "text_encoder", "projectors") if pairs else ("denoiser", "text_encoder"))
    loss, figures = phase.loss(batch(), Draws(0, 0, range(2)))
    noised = task.noised(batch(), Draws(0, 0, range(2)))
    with torch.no_grad():
        own = (task.velocity(noised) - (noised.noise - noised.x0)).square().mean((1, 2, 3))
        text = objective.teacher.read(noised.captions)
        network = objective.teacher.network
        taught = network(noised.x_t, noised.t * 1000, text.context, text.mask, text.pooled).sample
        out = (task.velocity(noised) - taught).square().mean((1, 2, 3))
        logit = torch.log(noised.t / (1 - noised.t))
        share = torch.exp(-logit.square() / 2) / (4 * noised.t * (1 - noised.t))

        def joined(one):
            if mode == "constant":
                return own + 0.3 * one
            return share * own + (1 - share) * own / one * one

        features = []
        for index, pair in enumerate(pairs):
            found = {}
            handles = [
                layer(module, name).register_forward_hook(
                    lambda _, __, out, key=key, found=found: found.update({key: out})
                )
                for key, module, name in (
                    ("theirs", network, pair.teacher),
                    ("ours", task.modules["denoiser"], pair.student),
                )
            ]
            network(noised.x_t, noised.t * 1000, text.context, text.mask, text.pooled)
            task.velocity(noised)
            for handle in handles:
                handle.remove()
            psi = task.modules["projectors"].pairs[index](found["ours"])
            theirs = found["theirs"][1].transpose(1, 2).unflatten(2, (4, 4))
            if psi.shape[-1] == 2:
                theirs = nn.functional.avg_pool2d(theirs, 2)
            features.append((theirs - psi).square().mean((1, 2, 3)))
    expected = torch.zeros(2)
    if mode != "features":
        expected = expected + joined(out)
    if pairs:
        expected = expected + sum(joined(one) for one in features) / len(pairs)
        assert figures["feature_kd"].item() == pytest.approx(sum(features).mean().item() / len(pairs), rel=1e-4)
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-4)
    assert figures["task"].item() == pytest.approx(own.mean().item(), rel=1e-4)
    assert not any(value.requires_grad for value in figures.values())


def test_student_and_projectors_get_gradients_and_the_teacher_none():
    task = taught_task(lambda t, s: kd(t, s, pairs=(LAST, FIRST)))
    (phase,) = task.phases()
    loss, _ = phase.loss(batch(), Draws(0, 0, range(2)))
    loss.backward()
    for name in phase.modules:
        without = [key for key, p in task.modules[name].named_parameters() if p.grad is None or not p.grad.any()]
        # Of a padded batch's text encoder, words and places that do not occur have none.
        assert not [key for key in without if "embedding" not in key], name
    assert all(p.grad is None and not p.requires_grad for p in task.objective.teacher.network.parameters())


def test_feature_distillation_reaches_the_student_up_to_the_layer_and_its_projector():
    task = taught_task(lambda t, s: kd(t, s, output=False, pairs=(FIRST,), scaling=Scaling(scaling="constant")))
    noised = task.noised(batch(), Draws(0, 0, range(2)))
    _, (target,) = task.objective.teacher.velocity(
        noised.x_t, noised.t, task.objective.teacher.read(noised.captions), [FIRST.teacher]
    )
    with Taps(task.modules["denoiser"], ["mid"]) as taps:
        task.velocity(noised)
    (feature,) = task.modules["projectors"](taps.grids(["mid"], (4, 4)))
    feature_loss(target, feature).mean().backward()
    denoiser, projectors = task.modules["denoiser"], task.modules["projectors"]
    assert all(p.grad is not None and p.grad.any() for p in denoiser.mid.parameters())
    assert all(p.grad is not None and p.grad.any() for p in denoiser.down.parameters())
    assert all(p.grad is None for p in denoiser.up.parameters())
    assert all(p.grad is not None and p.grad.any() for p in projectors.parameters())


def test_guidance_is_folded_into_the_velocity_alone():
    plain, guided = small_teacher(), small_teacher(guidance=3.0)
    x_t, t = torch.randn(2, 8, 4, 4), torch.tensor([0.2, 0.7])
    text, empty = plain.read(["a red circle", "two stars"]), plain.read(["", ""])
    with_text, features = plain.velocity(x_t, t, text, [LAST.teacher])
    without, _ = plain.velocity(x_t, t, empty)
    found, same = guided.velocity(x_t, t, text, [LAST.teacher])
    torch.testing.assert_close(found, without + 3.0 * (with_text - without))
    assert torch.equal(same[0], features[0])


def test_a_teachers_answer_does_not_depend_on_its_neighbours_captions():
    teacher = small_teacher()
    x_t, t = torch.randn(2, 8, 4, 4), torch.tensor([0.2, 0.7])
    both, _ = teacher.velocity(x_t, t, teacher.read(["a star", "a red circle left of a blue square"]))
    alone, _ = teacher.velocity(x_t[:1], t[:1], teacher.read(["a star"]))
    torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-5)


def test_wrong_objectives_are_named():
    teacher, student = small_teacher(), denoiser_task().modules["denoiser"]
    with pytest.raises(ValueError, match="output: is off and there are no layers"):
        KnowledgeDistillation(teacher, student, output=False)
    with pytest.raises(ValueError, match=r"near are up\.0\.layers"):
        KnowledgeDistillation(teacher, student, pairs=[LayerPair(LAST.teacher, "up.0.layers.7")])
    teacher.network.register_to_config(in_channels=16)
    with pytest.raises(ValueError, match="teacher: its latents have 16 channels, the student's have 8"):
        KnowledgeDistillation(teacher, student)
    with pytest.raises(ValueError, match=r"teacher: Linear's forward takes input; it must take"):
        Teacher(nn.Linear(1, 1), lambda captions: None)


class Doubled(nn.Module):
    """Gives a variance beside the velocity."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict=True):
        return (torch.cat((hidden_states, hidden_states), 1) * self.weight,)


def test_a_network_that_gives_no_velocity_is_named():
    empty = TextEmbedding(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool), None)
    with pytest.raises(ValueError, match=r"teacher: Doubled gives \(1, 16, 4, 4\) for latents \(1, 8, 4, 4\)"):
        Teacher(Doubled(), lambda captions: empty).velocity(torch.zeros(1, 8, 4, 4), torch.zeros(1), empty)


def test_the_real_sizes_on_the_meta_device():
    from diffusers import SD3Transformer2DModel

    from snapgen.unet import SnapGenUNet

    def text(width: int, pooled: int) -> TextEmbedding:
        return TextEmbedding(torch.empty(1, 333, width), torch.ones(1, 333, dtype=torch.bool), torch.empty(1, pooled))

    with torch.device("meta"):
        large = SD3Transformer2DModel(  # SD3.5-Large
            sample_size=128, patch_size=2, in_channels=16, num_layers=38, attention_head_dim=64,
            num_attention_heads=38, joint_attention_dim=4096, caption_projection_dim=2432,
            pooled_projection_dim=2048, out_channels=16, pos_embed_max_size=192, qk_norm="rms_norm",
        ).to(torch.bfloat16)  # fmt: skip
        student = SnapGenUNet(**PRESETS["t2i-1024"].denoiser)
        teacher = Teacher(large, lambda captions: text(4096, 2048))
        assert sum(p.numel() for p in large.parameters()) == pytest.approx(8.06e9, rel=0.01)
        pair = LayerPair.parse("last:last", large, student)
        assert pair.teacher == "transformer_blocks.37"
        objective = KnowledgeDistillation(teacher, student, pairs=[pair])
        projector = objective.modules["projectors"].pairs[0]
        assert (projector.in_channels, projector.out_channels) == (512, 2432)
        x_t, t = torch.empty(1, 16, 128, 128), torch.empty(1)
        velocity, (target,) = teacher.velocity(x_t, t, teacher.read([""]), [pair.teacher])
        assert velocity.shape == x_t.shape and target.shape == (1, 2432, 64, 64)
        own = text(2304, 2048)
        with Taps(student, [pair.student]) as taps:
            student(x_t, t, own.context, own.mask, own.pooled)
        (feature,) = objective.modules["projectors"](taps.grids([pair.student], (128, 128)))
        assert feature_loss(target, feature).shape == (1,)


# ---- runs ------------------------------------------------------------------------------------------------------------


def both_task() -> DenoiserTask:
    return taught_task(lambda t, s: kd(t, s, pairs=(LAST, FIRST)))


def test_a_distillation_stopped_goes_on_bitwise_and_leaves_the_teacher(tmp_path):
    task = both_task()
    teacher = task.objective.teacher.network
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    train(task, data(), config(), tmp_path / "alone", console=QUIET)
    assert all(torch.equal(p, before[name]) for name, p in teacher.state_dict().items())

    class Stopped(type(data())):
        read = 0

        def batch(self, indices):
            self.read += 1
            if self.read == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return super().batch(indices)

    with pytest.raises(KeyboardInterrupt):
        train(both_task(), Stopped(32, length=1000), config(), tmp_path / "stopped", console=QUIET)
    exported = train(both_task(), data(), config(), tmp_path / "stopped", console=QUIET)
    assert_same(tmp_path / "alone", tmp_path / "stopped")
    assert "model/projectors.pairs.0.weight" in weights(tmp_path / "alone")
    # The pipeline has the student alone.
    assert not (exported / "projectors").exists()
    with pytest.raises(ValueError, match="layers was"):
        train(taught_task(lambda t, s: kd(t, s, pairs=(LAST,))), data(), config(), tmp_path / "alone", console=QUIET)


def test_recomputed_activations_give_the_same_gradients():
    found = []
    for recompute in (False, True):
        task = both_task()
        if recompute:
            task.modules["denoiser"].enable_gradient_checkpointing()
        (phase,) = task.phases()
        loss, _ = phase.loss(batch(), Draws(0, 0, range(2)))
        loss.backward()
        found.append([p.grad for name in phase.modules for p in task.modules[name].parameters() if p.grad is not None])
    assert len(found[0]) > 100 and all(torch.equal(*both) for both in zip(*found, strict=True))


def test_micro_batches_give_the_run_of_the_whole_batch(tmp_path):
    for micro_batch in (4, 2):
        out = tmp_path / str(micro_batch)
        train(both_task(), data(), config(steps=2, lr=1e-4, micro_batch=micro_batch), out, console=QUIET)
    whole, parts = weights(tmp_path / "4"), weights(tmp_path / "2")
    start = {f"model/{key}.{name}": p for key, m in both_task().modules.items() for name, p in m.state_dict().items()}
    for name in ("model/denoiser.conv_out.weight", "model/projectors.pairs.0.weight"):
        moved = (whole[name] - start[name]).norm()
        assert moved > 0 and (whole[name] - parts[name]).norm() < 0.01 * moved


def test_distillation_brings_the_student_to_the_teacher():
    task = taught_task(lambda t, s: kd(t, s, scaling=Scaling(scaling="constant", kd_weight=10.0), pairs=(LAST,)))
    (phase,) = task.phases()
    optimizer = torch.optim.AdamW([p for name in phase.modules for p in task.modules[name].parameters()], lr=2e-3)
    seen = []
    for _ in range(30):
        loss, figures = phase.loss(batch(), Draws(0, 0, range(2)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(figures)
    for name in ("output_kd", "feature_kd"):
        assert seen[-1][name] < 0.6 * seen[0][name], name
