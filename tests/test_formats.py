"""Weight formats: the meaning of every code, from an independent source, and registration."""

import math
from statistics import NormalDist

import pytest
import torch
from conftest import DEVICE
from problems import draw, relative_error, tolerance

import bitblas
from bitblas import formats
from bitblas.formats import FORMATS, Affine, Table, WeightFormat

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 = E2M1 + [-value for value in E2M1]


def fp8_values(dtype: torch.dtype) -> list[float]:
    return torch.arange(256, dtype=torch.uint8).view(dtype).double().tolist()


def nf4_values() -> list[float]:
    """As the QLoRA paper constructs it: quantiles of N(0, 1), an exact zero, at most 1."""
    top = 0.9677083
    quantile = NormalDist().inv_cdf

    def side(count: int) -> list[float]:
        return [quantile(top + (0.5 - top) * i / count) for i in range(count)]

    negative, positive = side(7), side(8)
    largest = quantile(top)
    return sorted([-x / largest for x in negative] + [0.0] + [x / largest for x in positive])


# written from the specification; a new format needs its line here
EXPECTED: dict[str, list[float]] = {
    **{f"uint{b}": [float(c) for c in range(2**b)] for b in (1, 2, 3, 4, 8)},
    **{f"int{b}": [float(c - 2 ** (b - 1)) for c in range(2**b)] for b in (2, 3, 4)},
    "int1": [-1.0, 1.0],
    "int8": [float(c if c < 128 else c - 256) for c in range(256)],
    "fp4_e2m1": E2M1,
    "mxfp4": E2M1,
    "nvfp4": E2M1,
    "nf4": nf4_values(),
    "e4m3_float8": fp8_values(torch.float8_e4m3fn),
    "e5m2_float8": fp8_values(torch.float8_e5m2),
}
PACKED = [name for name, fmt in FORMATS.items() if not fmt.is_dense]
DENSE = [name for name, fmt in FORMATS.items() if fmt.is_dense]
INTEGER = [name for name, fmt in FORMATS.items() if fmt.is_integer]
FP8 = {"e4m3_float8": torch.float8_e4m3fn, "e5m2_float8": torch.float8_e5m2}
INT_DTYPES = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]
FLOAT_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def all_codes(name: str) -> torch.Tensor:
    return torch.arange(1 << FORMATS[name].bits, device=DEVICE).to(torch.uint8)


def is_same(a: float, b: float, tolerance: float) -> bool:
    if math.isnan(b):
        return math.isnan(a)
    if tolerance:
        return abs(a - b) <= tolerance
    return a == b and math.copysign(1, a) == math.copysign(1, b)


@pytest.mark.parametrize("name", PACKED)
def test_code_table(name):
    values = list(FORMATS[name].code_values())
    expected = EXPECTED[name]
    assert len(values) == len(expected)
    rounding = 1e-6 if name == "nf4" else 0.0  # its authors computed the quantiles in float32
    wrong = [c for c, pair in enumerate(zip(values, expected)) if not is_same(*pair, rounding)]
    assert not wrong


def test_nf4_is_bit_for_bit_the_published_table():
    values = torch.tensor(FORMATS["nf4"].code_values(), dtype=torch.float64)
    assert values[1].item() == -0.6961928009986877
    assert values[8].item() == 0.07958029955625534
    assert values[14].item() == 0.7229568362236023
    assert torch.equal(values, values.float().double())  # every entry is a float32 number


@pytest.mark.parametrize("name", PACKED)
def test_to_values_reads_the_table(name):
    values = FORMATS[name].to_values(all_codes(name)).tolist()
    assert all(map(is_same, values, FORMATS[name].code_values(), [0.0] * len(values)))


@pytest.mark.parametrize("dtype", INT_DTYPES + FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("name", INTEGER)
def test_integer_values_to_codes(name, dtype):
    fmt, codes = FORMATS[name], all_codes(name)
    values = fmt.to_values(codes, torch.int64)
    if not dtype.is_floating_point:
        limits = torch.iinfo(dtype)
        fits = (values >= limits.min) & (values <= limits.max)
        values, codes = values[fits], codes[fits]
    assert torch.equal(fmt.to_codes(values.to(dtype)), codes)


@pytest.mark.parametrize("dtype", INT_DTYPES, ids=str)
@pytest.mark.parametrize("name", ["nf4", "fp4_e2m1", "mxfp4", "nvfp4"])
def test_code_formats_take_codes(name, dtype):
    codes = all_codes(name)
    assert torch.equal(FORMATS[name].to_codes(codes.to(dtype)), codes)


@pytest.mark.parametrize("view", ["fp8", "int8", "uint8"])
@pytest.mark.parametrize("name", FP8)
def test_fp8_takes_tensors_or_bytes(name, view):
    codes = all_codes(name)
    given = codes.view(FP8[name] if view == "fp8" else getattr(torch, view))
    assert torch.equal(FORMATS[name].to_codes(given), codes)


@pytest.mark.parametrize("name", DENSE)
def test_dense_weight_is_the_value(name):
    fmt = FORMATS[name]
    weight = torch.randn(5, 7, device=DEVICE)
    stored = fmt.to_codes(weight)
    assert stored.dtype == getattr(torch, name)
    assert torch.equal(fmt.to_values(stored), weight.to(getattr(torch, name)).double())


@pytest.mark.parametrize("name", INTEGER)
def test_integer_out_of_range_is_refused(name):
    fmt, values = FORMATS[name], EXPECTED[name]
    for value in (min(values) - 1, max(values) + 1):
        with pytest.raises(ValueError, match=name):
            fmt.to_codes(torch.tensor([value], device=DEVICE))


@pytest.mark.parametrize("name", ["nf4", "fp4_e2m1", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("code", [-1, 16])
def test_code_out_of_range_is_refused(name, code):
    with pytest.raises(ValueError, match=f"{name} takes codes 0..15"):
        FORMATS[name].to_codes(torch.tensor([code], device=DEVICE))


@pytest.mark.parametrize("bad", [0.5, math.nan, math.inf])
def test_fraction_nan_and_infinity_are_refused(bad):
    with pytest.raises(ValueError, match="int4"):
        FORMATS["int4"].to_codes(torch.tensor([bad], device=DEVICE))


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_go_with_integer_formats_only(name):
    assert FORMATS[name].is_integer == name.startswith(("int", "uint"))
    fields = dict(N=32, K=32, W_dtype=name, with_scaling=True, with_zeros=True)
    if FORMATS[name].is_integer:
        assert bitblas.MatmulConfig(**fields).with_zeros
    else:
        with pytest.raises(ValueError, match="with_zeros"):
            bitblas.MatmulConfig(**fields)


class ToyTable(WeightFormat):
    name, bits, source_format = "toy_table", 4, "toy"
    decoder = Table(tuple((-1) ** i * (0.25 + i / 8) for i in range(16)))

    def to_codes(self, weight):
        return self.check_codes(weight)


class ToyAffine(WeightFormat):
    """5-bit odd numbers, -31..31."""

    name, bits, source_format, is_integer = "toy_affine", 5, "int", True
    decoder = Affine(step=2, offset=-31)

    def to_codes(self, weight):
        return ((weight.to(torch.int16) + 31) // 2).to(torch.uint8)


@pytest.fixture
def registered():
    """A function that registers a format for the time of the test."""
    names = []

    def register(format_class):
        formats.register(format_class)
        names.append(format_class.name)

    yield register
    for name in names:
        del FORMATS[name]


def check_product(seed, **fields):
    config = bitblas.MatmulConfig(M=1, N=37, K=64, **fields)
    problem = draw(config, 3, seed, DEVICE)
    matmul = bitblas.Matmul(config)
    packed = matmul.weight_transform(problem.codes)
    assert torch.equal(matmul.inverse_transform_weight(packed).view(torch.uint8), problem.codes)
    error = relative_error(matmul(problem.A, packed, **problem.extras()), problem.expected())
    assert error <= tolerance(config)


@pytest.mark.parametrize("A_dtype", ["float16", "bfloat16", "float32"])
def test_new_table_format_works_end_to_end(registered, seed, A_dtype):
    registered(ToyTable)
    check_product(seed, A_dtype=A_dtype, W_dtype="toy_table", group_size=32, with_scaling=True)


@pytest.mark.parametrize("A_dtype", ["float16", "bfloat16", "float32"])
def test_new_affine_format_works_end_to_end(registered, seed, A_dtype):
    registered(ToyAffine)
    check_product(
        seed,
        A_dtype=A_dtype,
        W_dtype="toy_affine",
        group_size=32,
        with_scaling=True,
        with_zeros=True,
        zeros_mode="original",
    )


def test_new_integer_format_works_with_int8_activations(registered, seed):
    registered(ToyAffine)
    check_product(
        seed, A_dtype="int8", W_dtype="toy_affine", out_dtype="int32", accum_dtype="int32"
    )


def test_registering_a_name_twice_is_refused(registered):
    registered(ToyTable)
    with pytest.raises(ValueError, match="toy_table.*already registered"):
        formats.register(ToyTable)


def test_unknown_format_lists_the_known_ones():
    with pytest.raises(ValueError, match="W_dtype: unknown weight format 'int5'.*uint4.*nf4"):
        bitblas.MatmulConfig(N=8, K=8, W_dtype="int5")
