"""The contract that every op keeps, on every small case."""

import pytest
import torch

import snapgen_kernels
from snapgen_kernels import checks
from snapgen_kernels.testing import CASES, SPECS, Case, bench_cases, small_cases

ALL = [case for op in SPECS for case in small_cases(op)]
FIRST = [small_cases(op)[0] for op in SPECS]
SINGLE = [case for case in ALL if case.dtype == torch.float32 and case.layout == "channels_last" and not case.offset]
# A fast gradcheck that fails builds the whole Jacobian for its message: 300 GB for the largest of the small cases.
DIFFERENTIATED = [
    case for case in SINGLE if max(t.numel() for t in case.inputs().values() if isinstance(t, torch.Tensor)) <= 2500
]


@pytest.mark.parametrize("case", ALL, ids=str)
def test_the_reference_is_plain_pytorch(case: Case) -> None:
    checks.check_reference(case)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_outputs_and_gradients_of_the_public_function(case: Case) -> None:
    checks.check_values(case)
    checks.check_gradients(case)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_outputs_and_gradients_of_the_registered_op(case: Case) -> None:
    checks.check_gradients(case, function=case.spec.registered)
    checks.check_gradients(case, function=case.spec.registered, layout="strided")


@pytest.mark.parametrize("case", DIFFERENTIATED, ids=str)
def test_derivatives_are_numerically_right(case: Case) -> None:
    checks.check_gradcheck(case)
    checks.check_gradgradcheck(case)


@pytest.mark.parametrize("case", SINGLE, ids=str)
def test_opcheck(case: Case) -> None:
    checks.check_opcheck(case)


@pytest.mark.parametrize("case", [c for c in ALL if c.name == "layout" or c.dtype == torch.bfloat16], ids=str)
def test_fake_tensors_keep_dtype_and_strides(case: Case) -> None:
    inputs = case.inputs()
    arguments = tuple(case.spec.arguments(inputs))
    torch.library.opcheck(getattr(torch.ops.snapgen, case.op), arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_compiles_as_one_graph(case: Case) -> None:
    checks.check_compile(case)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_repeats_bitwise(case: Case) -> None:
    checks.check_repeats(case)


@pytest.mark.parametrize("case", SINGLE, ids=str)
def test_reference_mode_is_the_reference_and_exports(case: Case) -> None:
    checks.check_reference_mode(case)


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_fused_mode_runs_the_kernel_or_says_why_not(case: Case) -> None:
    inputs = case.inputs()
    with snapgen_kernels.use("fused"):
        if "cpu" in case.spec.kernels():
            checks.check_values(case)
        else:
            with pytest.raises(snapgen_kernels.FusedUnavailable, match=case.op):
                case.spec.public(inputs)


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_inference_mode_and_no_grad(case: Case) -> None:
    inputs = case.inputs()
    with torch.inference_mode():
        quiet = checks.outputs_of(case.spec.registered(inputs))
    for q, p in zip(quiet, checks.outputs_of(case.spec.registered(inputs)), strict=True):
        assert torch.equal(q, p)


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_unneeded_gradients_are_not_computed(case: Case) -> None:
    """One leaf at a time: the gradient is that of the full backward, and nothing else is asked of the op."""
    inputs = case.inputs(requires_grad=True)
    full = checks.run(case, case.spec.registered, inputs)
    for name in checks.leaves_of(case, inputs):
        alone = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        alone[name].requires_grad_()
        outputs = checks.outputs_of(case.spec.registered(alone))
        used = [o for o in outputs if o.requires_grad]
        upstream = [g for o, g in zip(outputs, checks.upstream_of(outputs), strict=True) if o.requires_grad]
        (grad,) = torch.autograd.grad(used, [alone[name]], upstream)
        torch.testing.assert_close(grad, full[f"gradient of {name}"], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_inputs_are_left_alone(case: Case) -> None:
    inputs = case.inputs(requires_grad=True)
    before = {k: v.detach().clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    checks.run(case, case.spec.public, inputs)
    checks.run(case, case.spec.registered, inputs)
    for name, value in before.items():
        assert torch.equal(inputs[name].detach(), value), name


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_autocast(case: Case) -> None:
    """Under bf16 autocast, public function and registered op stay within the bound of eager under autocast."""
    inputs = case.inputs()
    exact = checks.outputs_of(case.spec.reference(checks.in_double(inputs)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        eager = checks.outputs_of(case.spec.eager(inputs))
        for function in (case.spec.public, case.spec.registered):
            for m, e, x in zip(checks.outputs_of(function(inputs)), eager, exact, strict=True):
                checks.assert_close(str(case), m.to(torch.bfloat16), e.to(torch.bfloat16), x)


@pytest.mark.parametrize("op", SPECS)
def test_every_case_states_its_cost(op: str) -> None:
    assert bench_cases(op)
    for case in CASES[op]:
        flops, size = case.cost()
        assert flops > 0 and size > 0, case


@pytest.mark.parametrize("op", SPECS)
def test_wrong_arguments_are_named(op: str) -> None:
    """Every tensor argument with one dimension too many, and every one as integers, gives an error that names it."""
    case = next((c for c in small_cases(op) if c.name in ("all", "shortcut")), small_cases(op)[0])
    inputs = case.inputs()
    for name, value in inputs.items():
        if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
            continue
        public = name.replace("norm1_", "norm1.").replace("norm2_", "norm2.") if op == "resblock" else name
        public = public.replace("norm_", "norm.") if op == "sepconv" else public
        with pytest.raises(ValueError, match=f"{op}: .*{public}"):
            case.spec.public({**inputs, name: value[None]})
        with pytest.raises(TypeError, match=f"{op}: .*{public}"):
            case.spec.public({**inputs, name: value.to(torch.int64)})
        if name not in ("x", "q"):
            with pytest.raises(ValueError, match=f"{op}: .*{public}.*meta"):
                case.spec.public({**inputs, name: value.to("meta")})
