"""What a call, and the packing of a weight, refuse: the operand, what came and what is valid."""

import numpy as np
import pytest
import torch

from bitblas import Matmul, MatmulConfig

N, K, M = 48, 64, 3
HALF, META = torch.float16, "meta"


def operator(W_dtype="uint4", **fields):
    return Matmul(MatmulConfig(M, N, K, W_dtype=W_dtype, **fields), target="cpu")


def operands(op):
    """Valid operands of zeros for an operator."""
    config = op.config
    features = K // 2 if config.A_dtype == "int4" else K
    A = torch.zeros((M, features), dtype=config.torch_A_dtype)
    W = (
        torch.zeros(op.retrieve_weight_shape(), dtype=HALF)
        if config.is_dense
        else op.weight_transform(torch.zeros((N, K), dtype=torch.int8))
    )
    extras = {}
    if config.with_scaling:
        extras["scale"] = torch.zeros((N, config.num_groups), dtype=config.scale_dtypes[0])
    if config.with_zeros:
        extras["zeros"] = torch.zeros(config.zeros_shape, dtype=config.zeros_dtypes[0])
    if config.with_bias:
        extras["bias"] = torch.zeros(N, dtype=config.torch_out_dtype)
    if config.format.has_global_scale:
        extras["global_scale"] = torch.ones(1)
    return {"A": A, "W": W, **extras}


ALL = {"with_scaling": True, "with_zeros": True, "with_bias": True, "group_size": 32}
INT8 = {"A_dtype": "int8", "out_dtype": "int32"}


def call(fields=ALL, W_dtype="uint4", **changes):
    """A call of a valid problem with some operands changed: a tensor, or a function of the old."""

    def run():
        op = operator(W_dtype, **fields)
        given = operands(op)
        for name, change in changes.items():
            given[name] = change(given.get(name)) if callable(change) else change
        op(**given)

    return run


def positional(*extras, fields=ALL, **named):
    def run():
        op = operator(**fields)
        given = operands(op)
        op(given["A"], given["W"], *extras, **named)

    return run


def zeros(*shape, dtype=HALF):
    return torch.zeros(shape, dtype=dtype)


def move(x):
    return x.to(META)


ROW = zeros(N)
CALLS = [  # (id, exception, regex of the message, the call)
    ("A list", TypeError, r"A: got list, expected a tensor", call(A=[[1.0]])),
    ("A None", TypeError, r"A: got NoneType, expected a tensor", call(A=None)),
    (
        "A array",
        TypeError,
        r"A: got ndarray, expected a tensor",
        call(A=np.zeros((M, K), dtype=np.float16)),
    ),
    (
        "A float32",
        TypeError,
        r"A: got torch\.float32, expected torch\.float16 .*'float16'",
        call(A=torch.Tensor.float),
    ),
    ("A complex", TypeError, r"A: got torch\.complex64, expected", call(A=lambda A: A.cfloat())),
    (
        "A unsigned",
        TypeError,
        r"A: got torch\.uint8, expected torch\.int8",
        call(INT8, A=zeros(M, K, dtype=torch.uint8)),
    ),
    (
        "A features",
        ValueError,
        r"A: got shape \(3, 63\), expected \(\.\.\., 64\) for K=64",
        call(A=zeros(M, K - 1)),
    ),
    ("A scalar", ValueError, r"A: got shape \(\), expected \(\.\.\., 64\)", call(A=zeros())),
    (
        "A unpacked int4",
        ValueError,
        r"A: got shape \(3, 64\), expected \(\.\.\., 32\) .*two int4",
        call({"A_dtype": "int4", "out_dtype": "int32"}, "int4", A=zeros(M, K, dtype=torch.int8)),
    ),
    (
        "A not transposed",
        ValueError,
        r"A: got shape \(64, 3\), expected \(\.\.\., 64\)",
        call({"layout": "tt"}),
    ),
    (
        "A transposed vector",
        ValueError,
        r"A: got shape \(64,\), expected \(\.\.\., 64, M\)",
        call({"layout": "tt"}, A=zeros(K)),
    ),
    ("A sparse", TypeError, r"A: got a torch\.sparse_coo", call(A=torch.Tensor.to_sparse)),
    ("A elsewhere", ValueError, r"W: is on cpu, expected meta, where A is", call(A=move)),
    ("W elsewhere", ValueError, r"W: is on meta, expected cpu, where A is", call(W=move)),
    ("W list", TypeError, r"W: got list, expected a tensor", call(W=[1])),
    ("W None", TypeError, r"W: got NoneType, expected a tensor", call(W=None)),
    ("W sparse", TypeError, r"W: got a torch\.sparse_coo", call(W=torch.Tensor.to_sparse)),
    (
        "W unpacked",
        TypeError,
        r"W: got torch\.float16, expected a packed weight of torch\.int8",
        call(W=zeros(N, K)),
    ),
    (
        "W unpacked codes",
        ValueError,
        r"W: got shape \(48, 64\), expected \(48, 32\) .*uint4, N=48, K=64",
        call(W=zeros(N, K, dtype=torch.int8)),
    ),
    (
        "W rank 4",
        ValueError,
        r"W: .*got shape \(3, 4, 2, 64\)",
        call(W=lambda W: W.unflatten(1, (4, 2))),
    ),
    ("W rank 1", ValueError, r"W: .*got shape \(1536,\)", call(W=torch.Tensor.flatten)),
    ("W empty", ValueError, r"W: .*got shape \(0,\)", call(W=zeros(0, dtype=torch.int8))),
    (
        "W truncated",
        ValueError,
        r"W: got shape \(3, 7, 64\), expected \(3, 8, 64\)",
        call(W=lambda W: W[:, 1:]),
    ),
    (
        "W storage",
        TypeError,
        r"W: got torch\.int32, expected a packed weight of torch\.int8",
        call(W=lambda W: W.view(torch.int32)),
    ),
    (
        "W of a wider storage",
        TypeError,
        r"W: got torch\.int8, expected a packed weight of torch\.int32",
        call({"storage_dtype": "int32"}, W=lambda W: W.view(torch.int8)),
    ),
    (
        "W dense dtype",
        TypeError,
        r"W: got torch\.float32, expected torch\.float16",
        call({}, "float16", W=torch.Tensor.float),
    ),
    (
        "W dense shape",
        ValueError,
        r"W: got shape \(64, 48\), expected \(48, 64\)",
        call({}, "float16", W=zeros(K, N)),
    ),
    ("scale missing", ValueError, r"scale: missing, .*\(48, 2\)", call(scale=None)),
    ("zeros missing", ValueError, r"zeros: missing, .*\(48, 2\)", call(zeros=None)),
    ("bias missing", ValueError, r"bias: missing, .*\(48,\)", call(bias=None)),
    ("scale unexpected", ValueError, r"scale: .*with_scaling=False", call({}, scale=zeros(N, 1))),
    ("zeros unexpected", ValueError, r"zeros: .*with_zeros=False", call({}, zeros=zeros(N, 1))),
    ("bias unexpected", ValueError, r"bias: .*with_bias=False", call({}, bias=ROW)),
    ("scale number", TypeError, r"scale: got float, expected a tensor", call(scale=1.0)),
    ("zeros list", TypeError, r"zeros: got list, expected a tensor", call(zeros=[8])),
    ("bias array", TypeError, r"bias: got ndarray, expected", call(bias=np.zeros(N))),
    ("scale sparse", TypeError, r"scale: got a torch\.sparse", call(scale=torch.Tensor.to_sparse)),
    ("scale elsewhere", ValueError, r"scale: is on meta, expected cpu", call(scale=move)),
    ("zeros elsewhere", ValueError, r"zeros: is on meta, expected cpu", call(zeros=move)),
    ("bias elsewhere", ValueError, r"bias: is on meta, expected cpu", call(bias=move)),
    (
        "scale of other groups",
        ValueError,
        r"scale: got shape \(48, 1\), expected \(48, 2\)",
        call(scale=zeros(N, 1)),
    ),
    (
        "scale transposed",
        ValueError,
        r"scale: got shape \(2, 48\), expected \(48, 2\)",
        call(scale=torch.Tensor.t),
    ),
    ("scale vector", ValueError, r"scale: got shape \(48,\), expected \(48, 2\)", call(scale=ROW)),
    (
        "scale dtype",
        TypeError,
        r"scale: got torch\.float32, expected torch\.float16",
        call(scale=torch.Tensor.float),
    ),
    (
        "scale dtype of int8 A",
        TypeError,
        r"scale: got torch\.bfloat16, expected torch\.float16 or torch\.float32",
        call({**INT8, "with_scaling": True}, scale=zeros(N, 1, dtype=torch.bfloat16)),
    ),
    (
        "scale of mxfp4",
        TypeError,
        r"scale: got torch\.float16, expected torch\.float8_e8m0fnu or torch\.uint8",
        call({}, "mxfp4", scale=zeros(N, K // 32)),
    ),
    (
        "zeros dtype",
        TypeError,
        r"zeros: got torch\.int8, expected torch\.float16",
        call(zeros=lambda z: z.to(torch.int8)),
    ),
    (
        "zeros packed shape",
        ValueError,
        r"zeros: got shape \(48, 2\), expected \(2, 24\)",
        call({**ALL, "zeros_mode": "quantized"}, zeros=zeros(N, 2)),
    ),
    (
        "zeros packed dtype",
        TypeError,
        r"zeros: got torch\.int32, expected torch\.int8",
        call({**ALL, "zeros_mode": "quantized"}, zeros=lambda z: z.to(torch.int32)),
    ),
    (
        "bias shape",
        ValueError,
        r"bias: got shape \(1, 48\), expected \(48,\)",
        call(bias=zeros(1, N)),
    ),
    (
        "bias dtype",
        TypeError,
        r"bias: got torch\.float64, expected torch\.float16",
        call(bias=torch.Tensor.double),
    ),
    (
        "global_scale missing",
        ValueError,
        r"global_scale: missing, nvfp4",
        call({}, "nvfp4", global_scale=None),
    ),
    (
        "global_scale unexpected",
        ValueError,
        r"global_scale: .*uint4",
        call(global_scale=torch.ones(1)),
    ),
    (
        "global_scale shape",
        ValueError,
        r"global_scale: got shape \(2,\) .*expected one float32",
        call({}, "nvfp4", global_scale=torch.ones(2)),
    ),
    (
        "global_scale number",
        TypeError,
        r"global_scale: got float, expected a tensor",
        call({}, "nvfp4", global_scale=0.5),
    ),
    (
        "input_scale of float A",
        ValueError,
        r"input_scale: .*8-bit activations only, A_dtype is 'float16'",
        call(input_scale=torch.ones(M)),
    ),
    (
        "input_scale rows",
        ValueError,
        r"input_scale: got shape \(1,\) .*expected 3 float32",
        call(INT8, input_scale=torch.ones(1)),
    ),
    (
        "input_scale dtype",
        ValueError,
        r"input_scale: got shape \(3,\) torch\.float16, expected 3 float32",
        call(INT8, input_scale=zeros(M)),
    ),
    (
        "input_scale elsewhere",
        ValueError,
        r"input_scale: is on meta, expected cpu",
        call(INT8, input_scale=torch.ones(M, device=META)),
    ),
    (
        "output shape",
        ValueError,
        r"output: got shape \(48, 3\), expected \(3, 48\)",
        call(output=zeros(N, M)),
    ),
    (
        "output dtype",
        TypeError,
        r"output: got torch\.float32, expected torch\.float16",
        call(output=torch.zeros(M, N)),
    ),
    (
        "output elsewhere",
        ValueError,
        r"output: is on meta, expected cpu",
        call(output=zeros(M, N).to(META)),
    ),
    ("output list", TypeError, r"output: got list, expected a tensor", call(output=[])),
    (
        "output sparse",
        TypeError,
        r"output: got a torch\.sparse",
        call(output=zeros(M, N).to_sparse()),
    ),
    (
        "output expanded",
        ValueError,
        r"output: got strides \(0, 1\) .*share memory",
        call(output=ROW.expand(M, N)),
    ),
    (
        "output and a gradient",
        ValueError,
        r"output: not with an A that requires grad",
        call(A=lambda A: A.requires_grad_(), output=zeros(M, N)),
    ),
    (
        "A nested",
        TypeError,
        r"A: got a nested tensor",
        call(A=torch.nested.nested_tensor([ROW], layout=torch.jagged)),
    ),
    (
        "scale twice",
        TypeError,
        r"scale: given twice",
        positional(zeros(N, 2), scale=zeros(N, 2)),
    ),
    (
        "bias twice",
        TypeError,
        r"bias: given twice",
        positional(ROW, bias=ROW, fields={"with_bias": True}),
    ),
    (
        "too many",
        TypeError,
        r"got 5 operands after W, expected at most scale, zeros, bias, output",
        positional(ROW, ROW, ROW, ROW, ROW),
    ),
    (
        "extra without features",
        ValueError,
        r"scale: got a tensor, but the config has with_scaling=False",
        positional(ROW, fields={}),
    ),
    ("unknown name", TypeError, r"scales", positional(scales=ROW)),
]


@pytest.mark.parametrize(
    ("error", "message", "run"), [pytest.param(*r[1:], id=r[0]) for r in CALLS]
)
def test_bad_operand_is_refused_by_name(error, message, run):
    with pytest.raises(error, match=message):
        run()


@pytest.mark.parametrize(
    ("field", "value"),
    [("N", 96), ("N", 16), ("K", 96), ("K", 32), ("W_dtype", "uint2"), ("W_dtype", "uint8")],
)
def test_weight_packed_for_another_size_is_refused(field, value):
    other = Matmul(
        MatmulConfig(**{"M": 1, "N": N, "K": K, "W_dtype": "uint4", field: value}), target="cpu"
    )
    packed = torch.zeros(other.retrieve_weight_shape(), dtype=torch.int8)
    with pytest.raises(ValueError, match=r"W: got shape .*, expected .*uint4, N=48, K=64"):
        operator()(zeros(M, K), packed)


def test_weight_packed_for_another_activation_width_is_refused():
    int8 = Matmul(MatmulConfig(1, N, K, W_dtype="uint4", **INT8), target="cuda -arch=sm_90")
    packed = int8.transform_weight(torch.ones(N, K))
    with pytest.raises(ValueError, match=r"W: packed for 8-bit activations, .*'float16'"):
        operator()(zeros(M, K), packed)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["W", "scale", "zeros", "bias", "output"])
def test_operand_on_the_gpu_beside_a_on_the_cpu_is_refused(name):
    op = operator(**ALL)
    given = {**operands(op), "output": zeros(M, N)}
    given[name] = given[name].cuda()
    with pytest.raises(ValueError, match=rf"{name}: is on cuda:0, expected cpu"):
        op(**given)


def test_forward_mode_is_refused_rather_than_given_zero_tangents():
    config = MatmulConfig(1, 32, 64, "float32", "uint4", "float32")
    matmul = Matmul(config, target="cpu")
    W = matmul.transform_weight(torch.zeros((32, 64), dtype=torch.int8))
    A = torch.ones((1, 64))
    with pytest.raises(ValueError, match="A: carries a tangent"):
        torch.func.jvp(lambda a: matmul(a, W), (A,), (A,))
