"""One test for each thing that BitBLAS 0.1 got wrong, with numbers that the bug would change."""

import pytest
import torch
from calls import check, logical_weight, multiply
from conftest import DEVICE
from problems import draw

import bitblas
from bitblas.layouts import pack_rows


def exact(config, weight, A, **extras):
    """The product of a logical weight, as a list of rows."""
    matmul = bitblas.Matmul(config)
    A = A.to(config.torch_A_dtype).to(DEVICE)
    return matmul(A, matmul.transform_weight(weight.to(DEVICE)), **extras)


def identity_product(W_dtype, weight, **fields):
    """A = identity: the decoded weight itself, transposed, in float32."""
    n, k = weight.shape
    config = bitblas.MatmulConfig(N=n, K=k, W_dtype=W_dtype, out_dtype="float32", **fields)
    return exact(config, weight, torch.eye(k)).T.cpu()


@pytest.mark.parametrize("W_dtype", ["uint1", "int1"])
@pytest.mark.parametrize("A_dtype", ["float16", "int8"])
def test_packing_1_bit_weights_loses_no_element(W_dtype, A_dtype):
    bits = torch.randint(0, 2, (19, 40))
    weight = bits if W_dtype == "uint1" else 2 * bits - 1
    got = identity_product(W_dtype, weight, A_dtype=A_dtype)
    assert torch.equal(got, weight.float())


def test_int1_codes_mean_minus_and_plus_one():
    matmul = bitblas.Matmul(bitblas.MatmulConfig(N=1, K=2, W_dtype="int1"))
    packed = matmul.weight_transform(torch.tensor([[0, 1]], dtype=torch.int8, device=DEVICE))
    A = torch.tensor([[3.0, 5.0]], dtype=torch.float16, device=DEVICE)
    assert matmul(A, packed).item() == -3 + 5


def test_fp4_e2m1_has_two_exponent_bits():
    got = identity_product("fp4_e2m1", torch.arange(16).view(1, 16)).view(-1)
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert got.tolist() == magnitudes + [-x for x in magnitudes]


@pytest.mark.parametrize("W_dtype", ["e4m3_float8", "e5m2_float8"])
@pytest.mark.parametrize("A_dtype", ["float16", "bfloat16", "float32"])
def test_fp8_is_exact_for_every_finite_byte(W_dtype, A_dtype):
    """Zero and the subnormals included."""
    codes = torch.arange(256, dtype=torch.uint8).view(256, 1)
    dtype = torch.float8_e4m3fn if W_dtype == "e4m3_float8" else torch.float8_e5m2
    values = codes.view(dtype).float()
    finite = values.isfinite()
    got = identity_product(W_dtype, codes, A_dtype=A_dtype)
    assert torch.equal(got[finite], values[finite])
    assert torch.equal(got[~finite].isnan(), values[~finite].isnan())
    assert torch.equal(got[values.isinf()], values[values.isinf()])


def test_e4m3_nan_reaches_its_row_alone():
    weight = torch.zeros(4, 64, dtype=torch.uint8)
    weight[2, 5] = 0x7F
    config = bitblas.MatmulConfig(N=4, K=64, W_dtype="e4m3_float8")
    assert exact(config, weight, torch.ones(1, 64)).isnan().tolist() == [
        [False, False, True, False]
    ]


@pytest.mark.parametrize("A_dtype", ["float16", "int8"])
def test_uint8_above_127(A_dtype):
    weight = torch.arange(256).view(4, 64)
    assert torch.equal(identity_product("uint8", weight, A_dtype=A_dtype), weight.float())


@pytest.mark.parametrize(
    "W_dtype, value", [("uint4", 16), ("int4", 8), ("int4", -9), ("uint2", 4), ("int2", -3)]
)
def test_value_out_of_range_does_not_spill_into_its_neighbour(W_dtype, value):
    matmul = bitblas.Matmul(bitblas.MatmulConfig(N=1, K=8, W_dtype=W_dtype))
    weight = torch.ones(1, 8, dtype=torch.int8, device=DEVICE)
    weight[0, 3] = value
    with pytest.raises(ValueError, match=f"{W_dtype} takes values"):
        matmul.transform_weight(weight)


def test_largest_value_leaves_its_neighbours_alone():
    weight = torch.zeros(2, 16)
    weight[:, ::2] = 15
    assert torch.equal(identity_product("uint4", weight), weight)


def test_negative_zeros_in_rescale():
    weight = torch.randint(0, 16, (8, 32))
    config = bitblas.MatmulConfig(
        N=8,
        K=32,
        W_dtype="uint4",
        out_dtype="float32",
        with_scaling=True,
        with_zeros=True,
        zeros_mode="rescale",
    )
    half = dict(dtype=torch.float16, device=DEVICE)
    scale, zeros = torch.full((8, 1), 0.5, **half), torch.full((8, 1), -3.0, **half)
    got = exact(config, weight, torch.eye(32), scale=scale, zeros=zeros).T.cpu()
    assert torch.equal(got, weight * 0.5 + 3)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("N", [8, 13])
def test_packed_zeros_are_read_from_their_own_bits(bits, N):
    zeros = torch.randint(0, 1 << bits, (3, N), dtype=torch.uint8)
    config = bitblas.MatmulConfig(
        N=N,
        K=6,
        W_dtype=f"uint{bits}",
        group_size=2,
        out_dtype="float32",
        with_zeros=True,
        zeros_mode="quantized",
    )
    packed = pack_rows(zeros.to(DEVICE), bits)
    got = exact(config, torch.zeros(N, 6), torch.eye(6), zeros=packed).cpu()
    assert torch.equal(got, -zeros.float().repeat_interleave(2, dim=0))


@pytest.mark.parametrize("group_size", [-1, 32])
def test_nf4_with_scales(seed, group_size):
    config = bitblas.MatmulConfig(
        N=40, K=96, W_dtype="nf4", group_size=group_size, with_scaling=True
    )
    problem = draw(config, 3, seed, DEVICE)
    check(problem, multiply(problem))


@pytest.mark.parametrize("W_dtype", ["int1", "int2", "int4", "int8"])
@pytest.mark.parametrize("with_zeros", [False, True])
def test_signed_weights_with_scales_and_zeros(seed, W_dtype, with_zeros):
    config = bitblas.MatmulConfig(
        N=40, K=96, W_dtype=W_dtype, group_size=32, with_scaling=True, with_zeros=with_zeros
    )
    problem = draw(config, 3, seed, DEVICE)
    matmul = bitblas.Matmul(config)
    packed = matmul.transform_weight(logical_weight(problem), problem.scale, problem.zeros)
    check(problem, matmul(problem.A, packed, **problem.extras()))


@pytest.mark.parametrize("W_dtype", ["uint4", "int4", "int2", "int8"])
def test_int8_activations_with_scales(seed, W_dtype):
    config = bitblas.MatmulConfig(
        N=40,
        K=96,
        A_dtype="int8",
        W_dtype=W_dtype,
        out_dtype="float32",
        group_size=32,
        with_scaling=True,
    )
    problem = draw(config, 3, seed, DEVICE)
    check(problem, multiply(problem))


def test_int4_activations_with_int2_weights(seed):
    config = bitblas.MatmulConfig(N=40, K=96, A_dtype="int4", W_dtype="int2", out_dtype="int32")
    problem = draw(config, 3, seed, DEVICE)
    assert torch.equal(multiply(problem).double(), problem.expected())


@pytest.mark.parametrize("layout", ["nn", "tn", "tt"])
def test_layouts_other_than_nt(layout):
    A = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float16, device=DEVICE)
    weight = torch.tensor([[1, 0, 2], [4, 5, 6]], device=DEVICE)  # (N, K)
    matmul = bitblas.Matmul(bitblas.MatmulConfig(N=2, K=3, W_dtype="uint4", layout=layout))
    packed = matmul.transform_weight(weight.T if layout[1] == "n" else weight)
    assert matmul(A.T if layout[0] == "t" else A, packed).tolist() == [[7, 32]]


@pytest.mark.parametrize("k_split", [1, 2, 4])
@pytest.mark.parametrize("dtypes", [("float16", "float16"), ("float16", "int4"), ("int8", "int8")])
def test_split_k_gives_the_whole_product(seed, dtypes, k_split):
    config = bitblas.MatmulConfigWithSplitK(
        N=40,
        K=192,
        A_dtype=dtypes[0],
        W_dtype=dtypes[1],
        out_dtype="float32",
        k_split=k_split,
    )
    problem = draw(config, 5, seed, DEVICE)
    matmul = bitblas.MatmulWithSplitK(config)
    packed = matmul.transform_weight(logical_weight(problem))
    check(problem, matmul(problem.A, packed))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dense_with_bias_only(seed, dtype):
    config = bitblas.MatmulConfig(
        N=40, K=96, A_dtype=dtype, W_dtype=dtype, out_dtype=dtype, with_bias=True
    )
    problem = draw(config, 3, seed, DEVICE)
    matmul = bitblas.Matmul(config)
    check(problem, matmul(problem.A, matmul.transform_weight(problem.codes), problem.bias))


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values in a tensor whose every stride is doubled."""
    bigger = x.new_zeros([2 * size for size in x.shape])
    view = bigger[tuple(slice(None, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view


@pytest.mark.parametrize("zeros_mode", ["original", "rescale", "quantized"])
def test_non_contiguous_inputs(seed, zeros_mode):
    config = bitblas.MatmulConfig(
        N=40,
        K=96,
        W_dtype="uint4",
        group_size=32,
        with_scaling=True,
        with_zeros=True,
        zeros_mode=zeros_mode,
        with_bias=True,
    )
    problem = draw(config, 4, seed, DEVICE)
    matmul = bitblas.Matmul(config)
    W = matmul.transform_weight(logical_weight(problem))
    extras = {name: strided(x) for name, x in problem.extras().items()}
    check(problem, matmul(strided(problem.A), strided(W), **extras))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_gpu(seed):
    config = bitblas.MatmulConfig(N=256, K=256, W_dtype="int4", with_scaling=True)
    matmul = bitblas.Matmul(config)
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        problem = draw(config, 3, seed, device)
        out = matmul(
            problem.A, matmul.transform_weight(logical_weight(problem)), **problem.extras()
        )
        assert out.device == torch.device(device)
        check(problem, out)


def test_unsorted_opt_m(seed):
    layer = bitblas.Linear(96, 40, W_dtype="int4", opt_M=[64, 1, 16])
    config = layer.bitblas_matmul.config
    problem = draw(config, 17, seed, DEVICE)
    layer.to(DEVICE).load_and_transform_weight(logical_weight(problem))
    check(problem, layer(problem.A))


@pytest.mark.parametrize("accum_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("W_dtype", ["uint1", "float16"])
def test_sums_do_not_stall_at_16_bits(W_dtype, accum_dtype):
    """Adding ones in float16 stops at 2048, in bfloat16 at 256."""
    config = bitblas.MatmulConfig(
        N=2, K=4099, W_dtype=W_dtype, out_dtype="float32", accum_dtype=accum_dtype
    )
    assert exact(config, torch.ones(2, 4099), torch.ones(1, 4099)).tolist() == [[4099, 4099]]
